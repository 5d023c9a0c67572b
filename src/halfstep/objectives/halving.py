"""Halving: one DDIM step of the student lands where K = 2 steps of the teacher land.

Divide a sample by its noise amplitude. In x / sigma a DDIM step is linear in x0, with r = alpha / sigma:

    x_s / sigma_s = x_t / sigma_t + (r_s - r_t) x0

so K DDIM steps of the teacher through times t = t_0 > t_1 > ... > t_K = s add up, and the x0 with which a single step
lands on the same point is the mean of the teacher's predictions with weights

    w_k = (r_{k+1} - r_k) / (r_s - r_t),   sum w_k = 1, every w_k >= 0.

At s = 0 the step lands on clean data, r_s is infinite, and all weight falls on the last prediction: no special case.
Being a mean, the target keeps the teacher's precision; solving x_s for x0 subtracts nearly equal numbers (2e-3 off in
float32 at 8192 steps, against less than 1e-6).

The teacher may take its steps with any deterministic sampler. A data-prediction sampler's step is DDIM's with an
effective x0, so the target is the mean of the effective x0, with the same weights. Any other sampler gives a landing
point x_s only, and one step of the student lands there with

    x0 = (x_s - q x_t) / (alpha_s - q alpha_t),   q = sigma_s / sigma_t,

which is x_s itself at s = 0. Here the steps and the quotient are computed in float64, from the teacher's x0 in its own
dtype. An error of x0 moves x_s in proportion to the width of the step, by which the quotient divides, so this target
keeps the teacher's precision as well.

Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2; the authors' dpm.py for s = 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import as_clock, per_sample
from halfstep.core.prediction import Denoised, TruncatedSNR, Weighting, eps_from_x0
from halfstep.objectives.base import (
    STUDENT,
    Evals,
    Losses,
    Models,
    Outcome,
    Role,
    check_one_process,
    objectives,
    weighted_x0_loss,
)
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.landing_points import Step, StepObjective
from halfstep.samplers import DDIM, DataPredictionSampler, Memory, Sampler


def halving_target(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    cond: Cond | None = None,
    num_teacher_steps: int = 2,
    sampler: Sampler | None = None,
) -> Tensor:
    """Return the x0 with which one DDIM step from t to s lands where `num_teacher_steps` steps of the teacher do.

    Args:
        teacher: an unclipped denoiser; it is called without gradient.
        x_t: noisy samples `[batch, *dims]`.
        t: clock times at which the step starts, one for all or `[batch]`.
        s: clock times at which it lands, 0 <= s < t.
        cond: conditions by name, each `[batch, ...]`.
        sampler: the teacher's, deterministic; DDIM() if None.

    Returns:
        Shaped as `x_t`: with DDIM a mean of the teacher's predictions, with weights of at least 0.

    Raises:
        ValueError: if a time s is not in [0, t), `num_teacher_steps` is not at least 1, or the sampler is stochastic.
    """
    check_num_steps(num_teacher_steps)
    method = DDIM() if sampler is None else sampler
    _check_deterministic(method)
    start, end = as_clock(t, x_t), as_clock(s, x_t)
    if not bool(((end >= 0) & (end < start)).all()):
        raise ValueError("a step must land at a time s with 0 <= s < t")
    return _target(teacher, x_t, start, end, cond, num_teacher_steps, method)


def _check_deterministic(sampler: Sampler) -> None:
    """Pass for a deterministic sampler.

    Raises:
        ValueError: for a stochastic one.
    """
    if sampler.stochastic:
        raise ValueError(
            f"{type(sampler).__name__} draws noise, so one step cannot land where its steps do. "
            "Choose a deterministic sampler for the teacher, such as DDIM()."
        )


@torch.no_grad()
def _target(
    teacher: Denoiser,
    x_t: Tensor,
    start: Tensor,
    end: Tensor,
    cond: Cond | None,
    num_teacher_steps: int,
    sampler: Sampler,
) -> Tensor:
    """Return `halving_target` for checked arguments; to check clock tensors would make the host wait for the device at
    every update."""
    times = [start + (end - start) * (k / num_teacher_steps) for k in range(num_teacher_steps)] + [end]
    if isinstance(sampler, DataPredictionSampler):
        return _mean(teacher, x_t, times, cond, sampler)
    return _solved(teacher, x_t, times, cond, sampler)


def _mean(
    teacher: Denoiser, x_t: Tensor, times: Sequence[Tensor], cond: Cond | None, sampler: DataPredictionSampler
) -> Tensor:
    """Return the mean of the effective x0 at the clock times `times`, from the start of the step to its landing."""
    process, memory = teacher.process, None
    alpha_t, sigma_t = process.alpha_sigma(times[0])
    alpha_s, sigma_s = process.landing(times[-1])
    # 1 / (r_s - r_t), multiplied out by sigma_s so that it is 0, not 1 / infinity, at s = 0.
    scale = sigma_s / (alpha_s - sigma_s * alpha_t / sigma_t)

    target = torch.zeros_like(x_t)
    left = torch.ones_like(times[0])
    ratio = alpha_t / sigma_t
    for here, after in pairwise(times):
        denoised, memory = sampler.effective(teacher, x_t, here, after, cond, memory)
        if after is times[-1]:
            weight = left
        else:
            alpha, sigma = process.alpha_sigma(after)
            weight = (alpha / sigma - ratio) * scale
            left, ratio = left - weight, alpha / sigma
            x_t = ddim_step(denoised, process, after)
        target = target + per_sample(weight, target) * denoised.x0
    return target


def _solved(teacher: Denoiser, x_t: Tensor, times: Sequence[Tensor], cond: Cond | None, sampler: Sampler) -> Tensor:
    """Return the x0 with which one DDIM step lands where `sampler` does, through the clock times `times`."""
    exact: Denoiser = _InFloat64(teacher, x_t)
    start = x_s = x_t.to(times[0])
    memory: Memory = None
    for here, after in pairwise(times):
        x_s, memory = sampler.step(exact, x_s, here, after, cond, memory)
    alpha_t, sigma_t = teacher.process.alpha_sigma(times[0])
    alpha_s, sigma_s = teacher.process.landing(times[-1])
    q = sigma_s / sigma_t
    x0 = (x_s - per_sample(q, start) * start) / per_sample(alpha_s - q * alpha_t, start)
    return x0.to(x_t)


@final
class _InFloat64(Denoiser):
    """Another denoiser for samples in float64, itself called with the dtype and device of `like`; eps follows from x0.

    The float64 samples are where clock tensors are: on the CPU if the device has no float64.
    """

    def __init__(self, denoiser: Denoiser, like: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.like = like

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t.to(self.like), t, cond).x0.to(x_t)
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


@final
@objectives.register("halve")
@dataclass(frozen=True)
class Halving(StepObjective):
    """Squared error against `halving_target` at the student's own times i / num_steps, i = 1 ... num_steps.

    Neither the target nor the loss clips x0. The default weighting is that of the paper's models.

    Raises:
        ValueError: if a number of steps is not a whole number of at least 1, or the teacher's sampler is stochastic.
    """

    num_steps: int
    num_teacher_steps: int = 2
    weighting: Weighting = field(default_factory=TruncatedSNR)
    guidance: Guidance | None = None
    """What the teacher has learned; None for none."""
    teacher_sampler: Sampler = field(default_factory=DDIM)
    """The deterministic sampler of the teacher's steps; the student's own is DDIM."""

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        check_num_steps(self.num_teacher_steps)
        _check_deterministic(self.teacher_sampler)

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, DDIM())

    @property
    def evals(self) -> Mapping[str, Evals]:
        sampler = self.teacher_sampler
        # A batch has steps onto clean data and others, and all its samples take as many calls.
        calls = self.num_teacher_steps * max(sampler.evals_per_step, sampler.evals_last_step)
        return {STUDENT: Evals(1, 1), "teacher": Evals(calls)}

    def step_losses(self, models: Models, step: Step, denoised: Denoised, draw: Draw) -> Losses:
        teacher, log_snr = check_one_process(models), models.student.process.log_snr(step.t)
        target = _target(teacher, *step, self.num_teacher_steps, self.teacher_sampler)
        return Losses(weighted_x0_loss(denoised.x0, target, log_snr, self.weighting), log_snr)
