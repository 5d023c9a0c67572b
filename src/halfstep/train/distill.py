"""Distillation in memory, for models that are made in Python."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from halfstep.core.denoiser import NetworkDenoiser, warn_of_gain
from halfstep.data import Data, DataConfig, MemoryData, open_data, training_batch
from halfstep.objectives import Plan
from halfstep.train.engine import Batches, StageTrainer, Window, copy_denoiser, make_accelerator
from halfstep.train.model import Model


def as_batches(data: Tensor | np.ndarray | Data | str) -> Batches:
    """The batches of clean samples `[n, *dims]`, of opened data, or of a source that `open_data` opens."""
    if isinstance(data, Data):
        held = data
    elif isinstance(data, str):
        held = open_data(DataConfig(source=data))
    else:
        held = MemoryData("memory", torch.as_tensor(data))
    return lambda draw: training_batch(held, draw, False, "cpu")


def distill(
    teacher: NetworkDenoiser | Model,
    data: Tensor | np.ndarray | Data | str,
    *,
    start: int,
    to: int = 4,
    num_updates: int = 1000,
    batch_size: int = 128,
    learning_rate: float = 2e-4,
    plan: Plan | None = None,
    seed: int = 0,
    precision: str = "float32",
    on_window: Callable[[str, Window], None] | None = None,
) -> NetworkDenoiser:
    """A student that samples in `to` steps what the teacher samples in `start`: the whole chain of halvings, in memory.

    Args:
        teacher: an unclipped denoiser, or a loaded model; it is not changed.
        data: clean samples `[n, *dims]` (float32 as they are; uint8 as images), opened data, or a source such as a
            folder of images.
        start: DDIM steps of the teacher, `to` times a power of two.
        to: DDIM steps of the student.
        num_updates, batch_size, learning_rate: of each stage; twice the updates at 2 steps and 1.
        plan: the stages, in the place of the four arguments before it.
        seed: with the update, the key of every random number.
        on_window: called with the stage's name and its statistics at every hundredth update.

    Raises:
        ValueError: if `start` cannot be halved to `to`, or the data cannot be used.
        NonFinite: if training diverged.
    """
    chain = plan or Plan.halvings(
        start, to, num_updates=num_updates, batch_size=batch_size, learning_rate=learning_rate
    )
    batches = as_batches(data)
    accelerator = make_accelerator(precision)
    current = teacher.denoiser if isinstance(teacher, Model) else teacher
    warn_of_gain(current.process, current.prediction)
    was_training = current.training
    frozen = [parameter.requires_grad for parameter in current.parameters()]
    result = current
    for name, stage in zip(chain.names(1), chain.stages, strict=True):
        trainer = StageTrainer(
            copy_denoiser(result), result, stage, batches, seed=seed, stream=name, accelerator=accelerator
        )
        for update in trainer.run():
            if update % 100 == 0 or update == trainer.last_update:
                window = trainer.window()
                if on_window is not None:
                    on_window(name, window)
        result = trainer.finish()
    current.train(was_training)
    for parameter, needed in zip(current.parameters(), frozen, strict=True):
        parameter.requires_grad_(needed)
    return result
