"""Moment matching: the student's samples match the teacher's conditional mean at every noise level.

The student is a few-step ancestral sampler. The student's x0 at x_t defines a step to s, which samples the posterior
q(x_s | x_t, x0), as in `Ancestral(gamma=0)`. If, given x_t, the student's x0 is distributed like data, then x_s is
distributed like noisy data, and the mean of x0 given x_s is the teacher's x0 at (x_s, s). An auxiliary denoiser learns
that mean, and the student learns to reduce the difference between the auxiliary denoiser and the teacher. Each update
has two turns, with a separate batch for each turn. Let D = auxiliary - teacher at (x_s, s), and let w be the weight at
the log-SNR of s. The losses are

    auxiliary:  w (|auxiliary - x0|^2 + |auxiliary - teacher|^2),  minimal at the mean of E[x0 | x_s] and the teacher
    student:    w |x0 - sg(x0 - D)|^2 / 2,                         whose gradient in x0 is w D

The second term of the auxiliary denoiser's loss keeps that denoiser near the teacher and halves D at the minimum. The
value of the student's loss is w |D|^2 / 2, the moment gap. This loss need not fall, because the auxiliary denoiser
widens the gap while the student closes it.

The times are s ~ U(0, 1) and t = min(s + d, 1) with d ~ U(0, 1 / num_steps). No step is longer than the steps that the
student takes when sampling, and some steps start from pure noise.

Source: Salimans, Mensink, Heek & Hoogeboom 2024, "Multistep Distillation of Diffusion Models via Moment Matching"
(arXiv:2406.04103), algorithm 2, with means instead of sums over a sample's entries.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import check_number
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import as_clock
from halfstep.core.prediction import SNRPlusOne, Weighting
from halfstep.objectives.auxiliary import AUXILIARY, auxiliary_denoiser
from halfstep.objectives.base import (
    STUDENT,
    Auxiliary,
    Batch,
    Evals,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    Turn,
    check_one_process,
    objectives,
    weighted_x0_loss,
)
from halfstep.objectives.guidance import Guidance
from halfstep.samplers import Ancestral, ancestral_step


class _Step(NamedTuple):
    """A step of the student: the student's x0 at x_t, `[batch, *dims]`, and a sample x_s from the posterior."""

    x0: Tensor
    x_s: Tensor
    s: Tensor
    cond: Cond


@final
@objectives.register("moments")
@dataclass(frozen=True)
class MomentMatching(Objective):
    """Alternating moment matching for an ancestral student with `num_steps` steps.

    With the default weighting, the loss is the squared error in v, which is balanced across all noise levels.

    Source: Salimans et al. 2024 (arXiv:2406.04103), algorithm 2.

    Raises:
        ValueError: if `num_steps` is not a whole number of at least 1, or `auxiliary_rate` is not above 0.
    """

    num_steps: int
    weighting: Weighting = field(default_factory=SNRPlusOne)
    guidance: Guidance | None = None
    """The guidance that the teacher has learned, or None if it has not learned guidance."""
    auxiliary_rate: float = 1.0
    """Learning rate of the auxiliary denoiser, relative to the student's learning rate."""
    needs_teacher: ClassVar[bool] = True
    learns_from_undistilled: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        check_number("auxiliary_rate", self.auxiliary_rate, above=True)

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, Ancestral(gamma=0.0))

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(2, 1), "teacher": Evals(2), AUXILIARY: Evals(2, 1)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {
            AUXILIARY: Auxiliary(
                lambda models, _: auxiliary_denoiser(models), lambda own: own.of_helper(self.auxiliary_rate)
            )
        }

    def turns(self, update: int) -> tuple[Turn, ...]:
        return Turn(AUXILIARY, self.auxiliary_loss), Turn(STUDENT, self.loss)

    def auxiliary_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the losses of the auxiliary denoiser with respect to the student's x0 and the teacher's x0."""
        teacher = check_one_process(models)
        with torch.no_grad():
            x0, x_s, s, cond = self._step(models.student, batch, draw)
            known = teacher(x_s, s, cond).x0
        log_snr = models.student.process.log_snr(s)
        found = _auxiliary(models)(x_s, s, cond).x0
        losses = [weighted_x0_loss(found, target, log_snr, self.weighting) for target in (x0, known)]
        return Losses(losses[0] + losses[1], log_snr)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        x0, x_s, s, cond = self._step(models.student, batch, draw)
        with torch.no_grad():
            gap = teacher(x_s, s, cond).x0 - _auxiliary(models)(x_s, s, cond).x0
        log_snr = models.student.process.log_snr(s)
        # This is x0 - sg(x0 + gap), with x0 cancelled so that a small gap is not rounded to the precision of x0.
        return Losses(weighted_x0_loss(x0 - x0.detach(), gap, log_snr, self.weighting) / 2, log_snr)

    def _step(self, student: Denoiser, batch: Batch, draw: Draw) -> _Step:
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        s = as_clock(draw.uniform("time"), batch.x0)
        t = (s + as_clock(draw.uniform("step"), batch.x0) / self.num_steps).clamp(max=1)
        eps, noise = (draw.normal(purpose, batch.x0.shape[1:]).to(batch.x0) for purpose in ("noise", "posterior"))
        x_t = student.process.mix(batch.x0, eps, t)
        denoised = student(x_t, t, cond)
        with torch.no_grad():
            x_s = ancestral_step(denoised, student.process, t, s, noise)
        return _Step(denoised.x0, x_s, s, cond)


def _auxiliary(models: Models) -> Denoiser:
    helper = models.helpers[AUXILIARY]
    assert isinstance(helper, Denoiser)
    return helper
