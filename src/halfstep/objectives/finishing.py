"""Finishing: match a student's landing points to the distribution of data and preserve the map from noise to samples.

A halved student lands where its teacher lands, up to an error that the squared loss spreads over neighbouring samples.
Finishing corrects the distribution of the landing points x_s. For x_t at the student's times t, noise up to a level tau
is added to both x_s and data at noise level s. Finishing reduces the Kullback-Leibler divergence between the two
resulting distributions. The module `landing_points` explains why the landing point is used instead of x0.

The gradient of the divergence is the difference between two scores at y, the landing point with added noise. In terms
of x0, it is auxiliary(y) - teacher(y). The teacher's x0 represents the data, and the auxiliary denoiser's x0 represents
the student's landing points, on which the auxiliary denoiser is trained by denoising score matching. Any change in x0 =
student(x_t, t) moves x_s proportionally in the same direction. The negative gradient, divided by the student's error,
is therefore used as the update direction for x0. The map term keeps x0 near its value before finishing. Without this
term, training would drift between different maps that produce the same distribution.

At s > 0, the score-matching gradient is mostly noise. Computed on the batch's data, with the same noise at t and
the same added noise, the gradient is almost identical. The teacher's error on this data is known, so the data serves as
a control variate.
This also removes the teacher's own bias: the student is then compared with the data instead of with the teacher.

With one step, finishing is distribution matching distillation, except that the regression targets come from the student
before finishing instead of from stored pairs. The student remains deterministic and still uses DDIM as its sampler.

Source: Yin et al. 2023 (arXiv:2311.18828) for one step. The extension to the landing points of inner steps and the
control variate are specific to halfstep; compare Phased DMD (arXiv:2510.27684).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from halfstep.core.door import check_number, check_whole
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import per_sample
from halfstep.core.prediction import Denoised
from halfstep.objectives.auxiliary import AUXILIARY, auxiliary_denoiser
from halfstep.objectives.base import (
    STUDENT,
    Auxiliary,
    Batch,
    Evals,
    Frozen,
    Helper,
    Losses,
    Models,
    Step,
    StepObjective,
    Training,
    Turn,
    check_one_process,
    entry_mean,
    objectives,
)
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.landing_points import Landing, noised_landing

START: Final = "start"

SMALLEST_ERROR: Final = 1e-3
"""The constant added to the mean error, by which the gradient is then divided. Without the constant, the quotient could
become arbitrarily large. The mean error is about 0.1 for unit-scale data."""
LARGEST_RATIO: Final = 5.0
"""The upper limit for sigma / alpha in the weight of the auxiliary denoiser's error."""


@final
@objectives.register("finish")
@dataclass(frozen=True)
class Finishing(StepObjective):
    """Distribution matching on the landing points of a student's steps, with a term that preserves the student's map.

    The student starts from the latest student with `num_steps` steps and learns from the undistilled teacher.

    Source: Yin et al. 2023 (arXiv:2311.18828) for one step.

    Raises:
        ValueError: if a count is not a whole number in its range, or a weight or rate is out of range.
    """

    num_steps: int
    map_weight: float | None = None
    """Weight of the squared distance between x0 and its value before finishing; None means num_steps / 2, but at least
    0.75. The default grows with the number of steps, because a student with more steps has less to gain from finishing
    and is more affected by errors of the auxiliary denoiser."""
    data_weight: float | None = None
    """Weight of the data's score in the student's target score, from 0 to 1. The teacher's score has the remaining
    weight. None means 1, or 0 if the teacher is guided, because guided samples are not distributed like data. A teacher
    is guided if it has learned guidance, or if its network takes the scale as an input (`Plan.embedded`)."""
    auxiliary_turns: int | None = None
    """Number of turns of the auxiliary denoiser per student turn; None means 1, or 2 if `data_weight` is 0. Both
    defaults cost the same, because a turn with data needs twice as many network calls."""
    auxiliary_rate: float = 15.0
    """Constant learning rate of the auxiliary denoiser, relative to the student's peak rate. The student's gradient is
    only correct if the auxiliary denoiser follows the student's changes, so it learns much faster."""
    lead_updates: int = 60
    """Number of initial updates that train only the auxiliary denoiser."""
    inside_step: bool | None = None
    """Whether to draw tau inside the step, from s to t, rather than from s to 1. With None, tau is drawn inside the
    step only if `data_weight` is 0."""
    whitened: bool = True
    """Whether to divide each sample's gradient by the mean distance between the student's x0 and the teacher's x0."""
    guidance: Guidance | None = None
    """The guidance that the teacher has learned, or None if it has not learned guidance."""
    learns_from_undistilled: ClassVar[bool] = True
    refines: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        if self.auxiliary_turns is not None:
            check_whole("auxiliary_turns", self.auxiliary_turns, most=1000)
        check_whole("lead_updates", self.lead_updates, 0)
        if self.data_weight is not None:
            check_number("data_weight", self.data_weight)
            if self.data_weight > 1:
                raise ValueError(f"data_weight must be at most 1, got {self.data_weight}")
            if self.data_weight and self.guidance is not None:
                raise ValueError(
                    f"data_weight {self.data_weight:g} would pull the student away from its guided teacher, because "
                    "guided samples are not distributed like data. Remove it, or set it to 0"
                )
        if self.map_weight is not None and not 0 <= self.map_weight < math.inf:
            raise ValueError(f"map_weight must be finite and at least 0, got {self.map_weight}")
        if not 0 < self.auxiliary_rate < math.inf:
            raise ValueError(f"auxiliary_rate must be a finite number above 0, got {self.auxiliary_rate}")

    @property
    def _share(self) -> float:
        """The weight of the data's score."""
        if self.data_weight is None:
            return 1.0 if self.guidance is None else 0.0
        return self.data_weight

    @property
    def _turns(self) -> int:
        """The auxiliary denoiser's number of turns per student turn."""
        return self.auxiliary_turns or (1 if self._share else 2)

    @property
    def evals(self) -> Mapping[str, Evals]:
        turns, on_data = self._turns, self._turns if self._share else 0
        return {
            STUDENT: Evals(1 + turns, 1),
            "teacher": Evals(1 + on_data),
            AUXILIARY: Evals(1 + turns + on_data, turns + on_data),
            START: Evals(1),
        }

    @property
    def helpers(self) -> Mapping[str, Helper]:
        auxiliary = Auxiliary(lambda models, _: auxiliary_denoiser(models), self._auxiliary_training)
        return {AUXILIARY: auxiliary, START: Frozen()}

    def _auxiliary_training(self, own: Training) -> Training:
        return own.of_helper(self.auxiliary_rate, anneal=False, warmup_updates=0)

    def turns(self, update: int) -> tuple[Turn, ...]:
        learning = (Turn(AUXILIARY, self.auxiliary_loss),) * self._turns
        return learning if update < self.lead_updates else (*learning, Turn(STUDENT, self.loss))

    def step_losses(self, models: Models, step: Step, denoised: Denoised, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        x0 = denoised.x0
        with torch.no_grad():
            landing = self._landing(models, denoised, step, draw)
            at = landing.y, landing.tau, step.cond
            own, real = models.helpers[AUXILIARY](*at).x0, teacher(*at).x0
            towards = real - own
            if self.whitened:
                towards = towards / per_sample(entry_mean((x0 - real).abs()) + SMALLEST_ERROR, towards)
            before = models.helpers[START](step.x_t, step.t, step.cond).x0
            target = x0 + towards
        # The gradient of the first term is proportional to minus `towards`, and the value of this term measures the
        # distance between the two denoisers.
        matching, moved = entry_mean((x0 - target).square()) / 2, entry_mean((x0 - before).square())
        weight = max(0.75, self.num_steps / 2) if self.map_weight is None else self.map_weight
        return Losses(matching + weight * moved, models.student.process.log_snr(landing.tau))

    def auxiliary_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the denoising score matching losses of the auxiliary denoiser on the student's landing points.

        The score of y given x_s is -eps' / b. The loss is the squared error in eps', with larger weights at low SNR.
        If `data_weight` is above 0, the loss also contains a product of two differences in eps' on data with the same
        noise: the auxiliary denoiser minus the teacher, and the teacher's error. If the teacher is exact, its error has
        mean 0 at each point, and the expected loss does not change.
        """
        step, process = self.step(models, batch, draw), models.student.process
        with torch.no_grad():
            denoised = models.student(step.x_t, step.t, step.cond)
            landing = self._landing(models, denoised, step, draw)
        alpha, sigma = process.alpha_sigma(landing.tau)

        def eps_of(x0: Tensor, y: Tensor) -> Tensor:
            return per_sample(landing.spread / sigma**2, x0) * (y - per_sample(alpha, x0) * x0)

        auxiliary, tau, cond = models.helpers[AUXILIARY], landing.tau, step.cond
        if not self._share:
            found = eps_of(auxiliary(landing.y, tau, cond).x0, landing.y)
            error = entry_mean((found - landing.eps).square())
        else:
            with torch.no_grad():
                data = landing.y + per_sample(landing.slope, landing.y) * (batch.x0 - denoised.x0)
                known = eps_of(check_one_process(models)(data, tau, cond).x0, data)
            # All samples go through one call, because DDP and FSDP2 expect each trained network to be called once.
            twice = {name: torch.cat([value] * 2) for name, value in cond.items()}
            on_landing, on_data = auxiliary(torch.cat([landing.y, data]), tau.repeat(2), twice).x0.chunk(2)
            error = entry_mean((eps_of(on_landing, landing.y) - landing.eps).square())
            error = error - 2 * self._share * entry_mean((eps_of(on_data, data) - known) * (known - landing.eps))
        weight = 1 + (sigma / alpha).clamp(max=LARGEST_RATIO) ** 2
        return Losses(per_sample(weight, error) * error, process.log_snr(landing.tau))

    def _landing(self, models: Models, denoised: Denoised, step: Step, draw: Draw) -> Landing:
        inside = not self._share if self.inside_step is None else self.inside_step
        until = step.t if inside else 1.0
        return noised_landing(denoised, models.student.process, step, draw, until=until, purpose="")
