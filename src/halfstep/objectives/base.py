"""The interface of an objective, and the one loss that teacher training and distillation share.

The loss of a sample is weight(log_snr) * mean((x0 - x0_target)^2), the mean over the entries of a sample. A weighting
makes it the squared error in eps, v, or their maximum; the space in which a network predicts does not matter to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from halfstep.core.clock import per_sample
from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess
from halfstep.core.weighting import Weighting
from halfstep.registry import Registry


class Batch(NamedTuple):
    """Clean data `[batch, *dims]` and its conditions by name, each `[batch, ...]`."""

    x0: Tensor
    cond: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Models:
    """The denoisers that an objective works with; a teacher is absent where there is none to learn from."""

    student: Denoiser
    teacher: Denoiser | None = None


class Losses(NamedTuple):
    """What an objective returns for a batch."""

    loss: Tensor
    """Weighted losses, `[batch]`; the engine descends on their mean over the global batch."""
    log_snr: Tensor
    """The noise level of each sample, float64 `[batch]`, for statistics."""


class Objective(ABC):
    """(models, batch, draw) -> losses. It knows nothing of optimisers, devices and files."""

    needs_teacher: ClassVar[bool]
    """Whether `Models.teacher` must be there."""

    @property
    @abstractmethod
    def teacher_evals(self) -> int:
        """Network calls of the teacher for a sample of an update."""

    @abstractmethod
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Losses of the student on the batch, with gradients to the student only."""


objectives: Registry[type[Objective]] = Registry("objective")


def weighted_x0_loss(x0: Tensor, target: Tensor, log_snr: Tensor, weighting: Weighting) -> Tensor:
    """weight * mean((x0 - target)^2) for each sample, `[batch]`."""
    error = (x0 - target).square().flatten(1).mean(1) if x0.ndim > 1 else (x0 - target).square()
    return per_sample(weighting(log_snr), error) * error


def check_one_process(models: Models) -> Denoiser:
    """The teacher, which is there and has the student's process.

    Raises:
        ValueError: if there is none, or the processes differ.
    """
    if models.teacher is None:
        raise ValueError("a student learns from a teacher, and there is none")
    if models.teacher.process != models.student.process:
        raise ValueError(
            f"a student learns to land where its teacher does, so both need one noise process: the teacher has "
            f"{models.teacher.process}, the student {models.student.process}"
        )
    return models.teacher


def noisy_student_loss(
    models: Models, x_t: Tensor, t: Tensor, target: Tensor, cond: Cond, weighting: Weighting
) -> Losses:
    """The losses of the student's x0 at (x_t, t) against `target`."""
    process: NoiseProcess = models.student.process
    log_snr = process.log_snr(t)
    return Losses(weighted_x0_loss(models.student(x_t, t, cond).x0, target, log_snr, weighting), log_snr)
