"""A DDIM step of the student, and its landing point with more noise: shared by several objectives.

The student's x0 at (x_t, t) takes x_t to x_s, the landing point. With further noise up to the level tau >= s, it is

    y = k x_s + b eps',   k = alpha_tau / alpha_s,   b^2 = sigma_tau^2 - k^2 sigma_s^2,

which is distributed as data at tau if x_s is distributed as data at s. Objectives use the landing point and not x0
itself, because at s > 0 the student's x0 is a mean over samples, not a sample. tau is inside the step, s < tau < t,
because more noise than in x_t would hide the effect of the step. The levels of two steps then never overlap, so one
critic or auxiliary denoiser works for all steps.
"""

from abc import abstractmethod
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, ddim_step
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised
from halfstep.objectives.base import Batch, Losses, Models, Objective


class Step(NamedTuple):
    """Steps of the student from x_t `[batch, *dims]` at times t to times s, each `[batch]`."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    cond: Cond


class Landing(NamedTuple):
    """Landing points with further noise, y = k x_s + spread eps `[batch, *dims]`, at the noise level of tau."""

    y: Tensor
    tau: Tensor
    spread: Tensor
    eps: Tensor


def noised_landing(
    denoised: Denoised, process: NoiseProcess, step: Step, draw: Draw, *, until: Tensor | float, purpose: str
) -> Landing:
    """Return the landing points of the steps with noise up to tau, drawn uniformly from s to `until`.

    Args:
        denoised: the student's output at (x_t, t); gradients flow through it.
        purpose: prefix of the purposes for which tau and the noise are drawn.
    """
    x_s = ddim_step(denoised, process, step.s)
    share = as_clock(draw.uniform(f"{purpose}tau"), x_s)
    tau = step.s + share * (until - step.s)
    (alpha, sigma), (alpha_s, _) = process.alpha_sigma(tau), process.landing(step.s)
    added = torch.where(step.s == 0, -torch.inf, process.log_snr(tau) - process.log_snr(step.s))
    # sigma_tau^2 - k^2 sigma_s^2, without subtracting nearly equal numbers.
    spread = sigma * torch.sqrt(-torch.expm1(added))
    eps = draw.normal(f"{purpose}landing", x_s.shape[1:]).to(x_s)
    y = per_sample(alpha / alpha_s, x_s) * x_s + per_sample(spread, x_s) * eps
    return Landing(y, tau, spread, eps)


class StepObjective(Objective):
    """An objective that calls the student once per turn, at the start of one of the student's own DDIM steps.

    A subclass defines `step_losses`; other objectives can add a term on the landing point (see `Adversarial`).
    """

    needs_teacher: ClassVar[bool] = True

    @final
    def step(self, models: Models, batch: Batch, draw: Draw) -> Step:
        """Return a step of the student for each sample of the batch, from times i / num_steps drawn uniformly."""
        num_steps = self.outcome.num_steps
        assert num_steps is not None
        index = as_clock(draw.integers("time", num_steps), batch.x0)
        t, s = (index + 1) / num_steps, index / num_steps
        x_t = models.student.process.mix(batch.x0, draw.normal("noise", batch.x0.shape[1:]).to(batch.x0), t)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        return Step(x_t, t, s, cond)

    @abstractmethod
    def step_losses(self, models: Models, step: Step, denoised: Denoised, draw: Draw) -> Losses:
        """Return the losses of the student for its output `denoised` at the start of the steps."""

    @final
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        step = self.step(models, batch, draw)
        return self.step_losses(models, step, models.student(step.x_t, step.t, step.cond), draw)
