"""Halving: one step of the student lands where K = 2 DDIM steps of the teacher land.

Divide a sample by its noise amplitude. In x / sigma a DDIM step is linear in x0, with r = alpha / sigma:

    x_s / sigma_s = x_t / sigma_t + (r_s - r_t) x0

so K teacher steps through times t = t_0 > t_1 > ... > t_K = s add up, and the x0 with which a single step lands on the
same point is the mean of the teacher's predictions with weights

    w_k = (r_{k+1} - r_k) / (r_s - r_t),   sum w_k = 1, every w_k >= 0.

At s = 0 the step lands on clean data, r_s is infinite, and all weight falls on the last prediction: no special case.
Being a mean, the target keeps the teacher's precision; solving x_s for x0 subtracts nearly equal numbers (2e-3 off in
float32 at 8192 steps, against less than 1e-6).

Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2; the authors' dpm.py for s = 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.clock import as_clock, per_sample
from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.weighting import TruncatedSNR, Weighting
from halfstep.objectives.base import (
    STUDENT,
    Batch,
    Evals,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    check_one_process,
    noisy_student_loss,
    objectives,
)
from halfstep.objectives.guidance import Guidance
from halfstep.samplers import DDIM


def halving_target(
    teacher: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    cond: Cond | None = None,
    num_teacher_steps: int = 2,
) -> Tensor:
    """The x0 with which one DDIM step from t to s lands where `num_teacher_steps` steps of the teacher do.

    Args:
        teacher: an unclipped denoiser; it is called `num_teacher_steps` times, without gradient.
        x_t: noisy samples `[batch, *dims]`.
        t: clock times at which the step starts, one for all or `[batch]`.
        s: clock times at which it lands, 0 <= s < t.
        cond: conditions by name, each `[batch, ...]`.

    Returns:
        Shaped as `x_t`: a mean of the teacher's predictions, with weights of at least 0.

    Raises:
        ValueError: if a time s is not in [0, t), or `num_teacher_steps` is not at least 1.
    """
    check_num_steps(num_teacher_steps)
    start, end = as_clock(t, x_t), as_clock(s, x_t)
    if not bool(((end >= 0) & (end < start)).all()):
        raise ValueError("a step must land at a time s with 0 <= s < t")
    return _target(teacher, x_t, start, end, cond, num_teacher_steps)


@torch.no_grad()
def _target(
    teacher: Denoiser, x_t: Tensor, start: Tensor, end: Tensor, cond: Cond | None, num_teacher_steps: int
) -> Tensor:
    """`halving_target` on clock tensors that are known to be right: looking at them would make the host wait for the
    device at every update."""
    process = teacher.process
    alpha_t, sigma_t = process.alpha_sigma(start)
    alpha_s, sigma_s = process.landing(end)
    # 1 / (r_s - r_t), multiplied out by sigma_s so that it is 0, not 1 / infinity, at s = 0.
    scale = sigma_s / (alpha_s - sigma_s * alpha_t / sigma_t)

    target = torch.zeros_like(x_t)
    left = torch.ones_like(start)
    ratio = alpha_t / sigma_t
    for k in range(num_teacher_steps):
        here = start + (end - start) * (k / num_teacher_steps)
        denoised = teacher(x_t, here, cond)
        if k == num_teacher_steps - 1:
            weight = left
        else:
            after = start + (end - start) * ((k + 1) / num_teacher_steps)
            alpha, sigma = process.alpha_sigma(after)
            weight = (alpha / sigma - ratio) * scale
            left, ratio = left - weight, alpha / sigma
            x_t = ddim_step(denoised, process, after)
        target = target + per_sample(weight, target) * denoised.x0
    return target


@final
@objectives.register("halve")
@dataclass(frozen=True)
class Halving(Objective):
    """Squared error against `halving_target` at the student's own times i / num_steps, i = 1 ... num_steps.

    Neither the target nor the loss clips x0. The default weighting is that of the paper's models.

    Raises:
        ValueError: if a number of steps is not a whole number of at least 1.
    """

    num_steps: int
    num_teacher_steps: int = 2
    weighting: Weighting = field(default_factory=TruncatedSNR)
    guidance: Guidance | None = None
    """What the teacher has learned; None for none."""
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        check_num_steps(self.num_teacher_steps)

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, DDIM())

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1), "teacher": Evals(self.num_teacher_steps)}

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        index = as_clock(draw.integers("time", self.num_steps), batch.x0)
        t, s = (index + 1) / self.num_steps, index / self.num_steps
        eps = draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)
        x_t = models.student.process.mix(batch.x0, eps, t)
        target = _target(teacher, x_t, t, s, cond, self.num_teacher_steps)
        return noisy_student_loss(models, x_t, t, target, cond, self.weighting)
