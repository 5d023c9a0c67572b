"""Finishing: move a student's landing points onto the teacher's distribution, and keep the map from noise to sample.

A halved student lands where its teacher lands, up to an error that the squared loss spreads over neighbouring samples.
Finishing changes the law of the landing points x_s instead: for x_t at one of the student's times t, it descends on the
Kullback-Leibler divergence between x_s and data at noise level s, both with further noise up to a level tau:

    z = k x_s + b eps',   k = alpha_tau / alpha_s,   b^2 = sigma_tau^2 - k^2 sigma_s^2.

The gradient of the divergence is the difference of two scores of z, and in x0 it is auxiliary(z) - teacher(z): the
teacher's x0 belongs to data, that of the auxiliary denoiser to the student's landings, on which it is trained by
denoising score matching. Whitened by the student's own error it is a step for x0 = student(x_t, t), since x_s moves
with x0 in a positive proportion.

Why the landing point and not x0 itself: at s > 0 the student's x0 is a mean that lands well, not a sample. Why tau lies
inside the step, s < tau < t: more noise than x_t has would hide what the step decides, and levels of two steps never
mix, so that one auxiliary serves all steps. The map term holds x0 near its value before the finish: two maps can have
one distribution, and without it the game of the two networks drifts from map to map.

At one step this is distribution matching distillation with a regression to the student's own start instead of stored
pairs. The student stays deterministic, and DDIM its sampler.

Source: Yin et al. 2023 (arXiv:2311.18828) for one step; the form on the landing points of inner steps is halfstep's
own; compare Phased DMD (arXiv:2510.27684).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, ddim_step
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised
from halfstep.objectives.auxiliary import AUXILIARY, auxiliary_denoiser
from halfstep.objectives.base import (
    STUDENT,
    Auxiliary,
    Batch,
    EarlyEnd,
    Evals,
    Frozen,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    Training,
    Turn,
    check_one_process,
    check_whole,
    entry_mean,
    objectives,
)
from halfstep.objectives.guidance import Guidance
from halfstep.samplers import DDIM

START: Final = "start"

SMALLEST_ERROR: Final = 1e-3
"""Added to the mean error that whitens the gradient; the error is of the order of 0.1 for data of unit scale."""
LARGEST_RATIO: Final = 5.0
"""The largest sigma / alpha by which the auxiliary denoiser's error is weighted."""


@final
@objectives.register("finish")
@dataclass(frozen=True)
class Finishing(Objective):
    """Distribution matching on the landing points of a student's steps, with a term that keeps its map.

    The student starts from the latest student of `num_steps` steps and learns from the undistilled teacher.

    Raises:
        ValueError: if a count is not a whole number in its range, or a weight or rate is not finite and in its range.
    """

    num_steps: int
    map_weight: float = 1.0
    """Weight of the squared distance to x0 before the finish."""
    auxiliary_turns: int = 2
    """Turns of the auxiliary denoiser before each of the student's."""
    auxiliary_rate: float = 6.0
    """Learning rate of the auxiliary denoiser, constant, over the student's peak rate."""
    lead_updates: int = 60
    """First updates, in which only the auxiliary denoiser learns."""
    inside_step: bool = True
    """Draw tau inside the step, from s to t; else from s to 1."""
    whitened: bool = True
    """Divide the gradient by the student's mean distance to the teacher's x0, for each sample."""
    guidance: Guidance | None = None
    """What the teacher has learned; None for none."""
    needs_teacher: ClassVar[bool] = True
    learns_from_undistilled: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        check_whole("auxiliary_turns", self.auxiliary_turns)
        check_whole("lead_updates", self.lead_updates, 0)
        if not 0 <= self.map_weight < math.inf:
            raise ValueError(f"map_weight must be finite and at least 0, got {self.map_weight}")
        if not 0 < self.auxiliary_rate < math.inf:
            raise ValueError(f"auxiliary_rate must be a finite number above 0, got {self.auxiliary_rate}")

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, DDIM())

    @property
    def evals(self) -> Mapping[str, Evals]:
        turns = self.auxiliary_turns
        return {
            STUDENT: Evals(1 + turns, 1),
            "teacher": Evals(1),
            AUXILIARY: Evals(1 + turns, turns),
            START: Evals(1),
        }

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {AUXILIARY: Auxiliary(auxiliary_denoiser, self._auxiliary_training), START: Frozen()}

    def _auxiliary_training(self, own: Training) -> Training:
        rate = self.auxiliary_rate * own.learning_rate
        return replace(own, learning_rate=rate, anneal=False, warmup_updates=0, ema_decay=0.0, early_end=EarlyEnd())

    def turns(self, update: int) -> tuple[Turn, ...]:
        learning = (Turn(AUXILIARY, self.auxiliary_loss),) * self.auxiliary_turns
        return learning if update < self.lead_updates else (*learning, Turn(STUDENT, self.loss))

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher, step = check_one_process(models), self._step(models, batch, draw)
        denoised = models.student(step.x_t, step.t, step.cond)
        x0 = denoised.x0
        with torch.no_grad():
            noised = self._noised(denoised, models.student.process, step, draw)
            at = noised.z, noised.tau, step.cond
            own, real = models.helpers[AUXILIARY](*at).x0, teacher(*at).x0
            towards = real - own
            if self.whitened:
                towards = towards / per_sample(entry_mean((x0 - real).abs()) + SMALLEST_ERROR, towards)
            before = models.helpers[START](step.x_t, step.t, step.cond).x0
            target = x0 + towards
        # The first gradient is minus `towards` for each entry; the value shows how far the two denoisers are apart.
        matching, moved = entry_mean((x0 - target).square()) / 2, entry_mean((x0 - before).square())
        return Losses(matching + self.map_weight * moved, models.student.process.log_snr(noised.tau))

    def auxiliary_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the denoising score matching losses of the auxiliary denoiser on the student's landing points.

        The score of z given x_s is -eps' / b. The loss is that of the error in eps', with more weight on little signal.
        """
        step, process = self._step(models, batch, draw), models.student.process
        with torch.no_grad():
            noised = self._noised(models.student(step.x_t, step.t, step.cond), process, step, draw)
        alpha, sigma = process.alpha_sigma(noised.tau)
        x0 = models.helpers[AUXILIARY](noised.z, noised.tau, step.cond).x0
        found = per_sample(noised.spread / sigma**2, x0) * (noised.z - per_sample(alpha, x0) * x0)
        error = entry_mean((found - noised.eps).square())
        weight = 1 + (sigma / alpha).clamp(max=LARGEST_RATIO) ** 2
        return Losses(per_sample(weight, error) * error, process.log_snr(noised.tau))

    def _step(self, models: Models, batch: Batch, draw: Draw) -> "_Step":
        """Return a step of the student for each sample of the batch."""
        index = as_clock(draw.integers("time", self.num_steps), batch.x0)
        t, s = (index + 1) / self.num_steps, index / self.num_steps
        x_t = models.student.process.mix(batch.x0, draw.normal("noise", batch.x0.shape[1:]).to(batch.x0), t)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        return _Step(x_t, t, s, cond)

    def _noised(self, denoised: Denoised, process: NoiseProcess, step: "_Step", draw: Draw) -> "_Noised":
        """Return the landing points of the steps with further noise."""
        x_s = ddim_step(denoised, process, step.s)
        share = as_clock(draw.uniform("tau"), x_s)
        tau = step.s + share * ((step.t if self.inside_step else 1.0) - step.s)
        (alpha, sigma), (alpha_s, _) = process.alpha_sigma(tau), process.landing(step.s)
        added = torch.where(step.s == 0, -torch.inf, process.log_snr(tau) - process.log_snr(step.s))
        # sigma_tau^2 - k^2 sigma_s^2, which must not be a difference of nearly equal numbers.
        spread = sigma * torch.sqrt(-torch.expm1(added))
        eps = draw.normal("landing", x_s.shape[1:]).to(x_s)
        z = per_sample(alpha / alpha_s, x_s) * x_s + per_sample(spread, x_s) * eps
        return _Noised(z, tau, spread, eps)


class _Step(NamedTuple):
    """A step of the student from x_t at time t to time s."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    cond: Cond


class _Noised(NamedTuple):
    """Landing points with further noise, z = k x_s + spread eps, at the noise level of tau."""

    z: Tensor
    tau: Tensor
    spread: Tensor
    eps: Tensor
