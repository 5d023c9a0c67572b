"""Errors of training and sampling: non-finite values and running out of memory."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size


class NonFinite(RuntimeError):
    """A loss, gradient or sample was not finite. The message states where this happened and suggests a remedy.

    Args:
        statistics: JSON-ready statistics of the batch, or None if there was no batch.
    """

    def __init__(self, message: str, statistics: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.statistics = statistics


class OutOfMemory(RuntimeError):
    """An update or a batch of samples did not fit in memory. The message suggests a remedy."""


@contextlib.contextmanager
def told_when_out_of_memory(message: str) -> Iterator[None]:
    """Re-raise any out-of-memory error as OutOfMemory(message)."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        # The new exception refers to the first one, whose frames would keep the memory alive.
        error.__traceback__ = None
        raise OutOfMemory(message) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a smaller batch may avoid an error: out of memory on the CPU or on a device, or an error of cuDNN
    that large batches cause."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, Exception) and (
        should_reduce_batch_size(error)
        # accelerate does not recognise the error messages of cuBLAS and cuDNN.
        or (isinstance(error, RuntimeError) and ("_ALLOC_FAILED" in text or "CUDA error: out of memory" in text))
    )
