"""Halving: one DDIM step of the student lands where K = 2 steps of the teacher land.

The target is the mean of the teacher's x0 over these K steps; see `samplers/ddim.py` for the formula. The teacher may
use any deterministic sampler for the steps.

Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2; the authors' dpm.py for s = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import as_clock
from halfstep.core.prediction import Denoised, TruncatedSNR, Weighting
from halfstep.objectives.base import (
    STUDENT,
    Evals,
    Losses,
    Models,
    Step,
    StepObjective,
    check_deterministic,
    check_one_process,
    objectives,
    weighted_x0_loss,
)
from halfstep.objectives.guidance import Guidance
from halfstep.samplers import DDIM, Sampler
from halfstep.samplers.ddim import landing_x0, steps_of


def halving_target(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    cond: Cond | None = None,
    num_teacher_steps: int = 2,
    sampler: Sampler | None = None,
) -> Tensor:
    """Return the x0 for which one DDIM step from t to s lands where `num_teacher_steps` steps of the teacher land.

    Args:
        teacher: an unclipped denoiser, which is called without gradients.
        x_t: noisy samples `[batch, *dims]`.
        t: clock times at which the step starts, `[batch]` or one time for all samples.
        s: clock times at which the step lands, with 0 <= s < t.
        cond: conditions, keyed by name, each `[batch, ...]`.
        sampler: the teacher's deterministic sampler; DDIM() if None.

    Returns:
        A tensor of the same shape as `x_t`. With DDIM, it is a weighted mean of the teacher's predictions, with
        nonnegative weights.

    Raises:
        ValueError: if a time s is not in [0, t), `num_teacher_steps` is less than 1, or the sampler is stochastic.
    """
    check_num_steps(num_teacher_steps)
    method = DDIM() if sampler is None else sampler
    check_deterministic(method)
    start, end = as_clock(t, x_t), as_clock(s, x_t)
    if not bool(((end >= 0) & (end < start)).all()):
        raise ValueError("a step must land at a time s with 0 <= s < t. Pass another s")
    return _target(teacher, x_t, start, end, cond, num_teacher_steps, method)


def _target(
    teacher: Denoiser,
    x_t: Tensor,
    start: Tensor,
    end: Tensor,
    cond: Cond | None,
    num_teacher_steps: int,
    sampler: Sampler,
) -> Tensor:
    """Return `halving_target` without the checks, which would block the host in every update."""
    times = [start + (end - start) * (k / num_teacher_steps) for k in range(num_teacher_steps)] + [end]
    return landing_x0(teacher.process, [steps_of(teacher, sampler, cond)] * num_teacher_steps, x_t, times)


@final
@objectives.register("halve")
@dataclass(frozen=True)
class Halving(StepObjective):
    """The squared error with respect to `halving_target` at the student's times i / num_steps, i = 1 ... num_steps.

    Neither the target nor the loss clips x0. The default weighting is the one used for the paper's models.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2.

    Raises:
        ValueError: if a number of steps is not a whole number of at least 1, the teacher's sampler is stochastic, or a
            multistep sampler takes too few steps to differ from DDIM.
    """

    num_steps: int
    num_teacher_steps: int = 2
    weighting: Weighting = field(default_factory=TruncatedSNR)
    guidance: Guidance | None = None
    """The guidance that the teacher has learned, or None if it has not learned guidance."""
    teacher_sampler: Sampler = field(default_factory=DDIM)
    """The deterministic sampler for the teacher's steps; the student uses DDIM."""

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        check_num_steps(self.num_teacher_steps)
        check_deterministic(self.teacher_sampler)
        # The first step of a multistep sampler is a DDIM step, and so is the step onto clean data.
        least = 3 if self.num_steps == 1 else 2
        if self.teacher_sampler.multistep and self.num_teacher_steps < least:
            raise ValueError(
                f"{type(self.teacher_sampler).__name__} needs at least {least} teacher steps for each step of a "
                f"student with num_steps={self.num_steps} to differ from DDIM, got {self.num_teacher_steps}. Take "
                "more teacher steps, or choose Heun()"
            )

    @property
    def evals(self) -> Mapping[str, Evals]:
        sampler = self.teacher_sampler
        # A batch may contain steps that land on clean data, and all samples of a batch need the same number of calls.
        calls = self.num_teacher_steps * max(sampler.evals_per_step, sampler.evals_last_step)
        return {STUDENT: Evals(1, 1), "teacher": Evals(calls)}

    def step_losses(self, models: Models, step: Step, denoised: Denoised, draw: Draw) -> Losses:
        teacher, log_snr = check_one_process(models), models.student.process.log_snr(step.t)
        target = _target(teacher, *step, self.num_teacher_steps, self.teacher_sampler)
        return Losses(weighted_x0_loss(denoised.x0, target, log_snr, self.weighting), log_snr)
