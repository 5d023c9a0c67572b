"""Clock tensors and the one place where they meet the data.

A *clock* tensor (t, alpha, sigma, log_snr) is float64 and has one number per sample. Data is of any floating dtype
and any shape `[batch, *dims]`. Times near 0 and 1 differ by parts in 10^8 at 8192 steps, so the clock is never
computed in the data's precision; it is cast once, here, when it multiplies data.

In sampling all samples have one time. It stays a plain number then, which is a float64 as well: a step of a small
network takes as long as a hundred operations on tensors, however small these are.
"""

from typing import overload

import torch
from torch import Tensor


def clock_device(device: torch.device) -> torch.device:
    """The device that holds clock tensors for data on `device`: the same one, or the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def as_clock(times: Tensor | float, like: Tensor) -> Tensor:
    """A float64 clock tensor `[batch]` for the batch `like` `[batch, *dims]`; one number stands for every sample.

    Raises:
        ValueError: if `times` is neither a scalar nor of shape `[batch]`.
    """
    device = clock_device(like.device)
    if not isinstance(times, Tensor):
        # Filled on the device: a copy would make the host wait.
        return torch.full(like.shape[:1], times, dtype=torch.float64, device=device)
    values = times.to(device=device, dtype=torch.float64)
    if values.ndim == 0:
        values = values.expand(like.shape[0])
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"times have shape {tuple(values.shape)}, but the batch holds {like.shape[0]} samples: "
            "pass one time for all, or one for each sample"
        )
    return values


@overload
def per_sample(clock: Tensor, like: Tensor) -> Tensor: ...
@overload
def per_sample(clock: Tensor | float, like: Tensor) -> Tensor | float: ...
def per_sample(clock: Tensor | float, like: Tensor) -> Tensor | float:
    """The clock tensor `[batch]` in the dtype and on the device of `like`, shaped `[batch, 1, ...]` to multiply it; a
    number, which torch takes into the data's dtype, as it is."""
    if isinstance(clock, float):
        return clock
    return clock.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))
