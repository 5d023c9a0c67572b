"""An adversarial term: a critic learns to distinguish the landing points of a student's steps from equally noisy data.

Let y be a landing point with noise added up to the level tau (see `landing_points`), let y+ be data at the same noise
level, and let D be the critic. In each update, the critic and the student take one turn each, with these losses:

    critic:    softplus(-D(y+)) + softplus(D(y)) + gamma / 2 (D(y+ + delta n) - D(y+))^2 / delta^2
    student:   its own loss + weight softplus(-D(y))

Averaged over the standard normal noise n, the critic's last term is gamma / 2 |grad D(y+)|^2 up to terms of order
delta^2. This is the R1 penalty, computed without a second derivative. Only the distributions of y and y+ matter, so
both are computed from the same sample of the batch. They share that sample's conditions, which are also inputs to the
critic.

The critic consists of the encoder half of a copy of the teacher and a small head on the encoder's deepest features. The
head is initialised to 0, so a new critic has no effect on the student. During the first updates, the critic is trained,
but the student ignores it.

Source: Goodfellow et al. 2014 (arXiv:1406.2661) for the non-saturating loss; Mescheder et al. 2018 (arXiv:1801.04406)
for R1; Wang et al. 2022 (arXiv:2206.02262) for adding noise to both data and samples; Lin et al. 2024
(arXiv:2402.13929) for building the critic from the teacher. Applying the critic to landing points is specific to
halfstep.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.core.denoiser import GUIDANCE, Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import check_number, check_whole
from halfstep.core.draw import Draw
from halfstep.core.prediction import Denoised
from halfstep.nets import EncoderHalf, encoder_half, takes_guidance
from halfstep.objectives.auxiliary import auxiliary_denoiser
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
    Step,
    StepObjective,
    Training,
    Turn,
    check_one_process,
    objectives,
)
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.landing_points import Landing, noised_landing

CRITIC: Final = "critic"


@final
class Critic(nn.Module):
    """A discriminator for noisy samples, which maps (y, tau, cond) to one number per sample that is larger for data.

    Args:
        encoder: the network that computes the features.
        takes_guidance: whether the encoder has an input for the guidance scale. If false, that condition is dropped.
    """

    def __init__(self, encoder: EncoderHalf, takes_guidance: bool = False) -> None:
        super().__init__()
        self.encoder, self.takes_guidance = encoder, takes_guidance
        like = next(encoder.parameters())
        self.norm = nn.GroupNorm(1, encoder.channels).to(like)
        self.leave = nn.Linear(encoder.channels, 1).to(like)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, y: Tensor, tau: Tensor, cond: Cond) -> Tensor:
        """Return one number per sample, `[batch]`, for samples `[batch, *dims]` at clock times `[batch]`."""
        time = tau.to(device=y.device, dtype=torch.promote_types(y.dtype, torch.float32))
        shown = {name: value for name, value in cond.items() if name != GUIDANCE or self.takes_guidance}
        features: Tensor = self.encoder(y, time, **shown)
        features = F.silu(self.norm(features.to(self.norm.weight.dtype)))
        pooled = features.flatten(2).mean(2) if features.ndim > 2 else features
        found: Tensor = self.leave(pooled)[:, 0]
        return found.to(y.dtype)


def critic_of(models: Models) -> Critic:
    """Return a trainable critic built from the unguided teacher, in the dtypes of `auxiliary_denoiser`.

    The critic shares no weights with the student, not even the base of a LoRA student.

    Raises:
        ValueError: if no teacher is given, or the encoder half of the teacher's network is unknown.
    """
    twin: Denoiser = auxiliary_denoiser(models)
    network = twin.network if isinstance(twin, NetworkDenoiser) else twin
    shown = takes_guidance(network)
    return Critic(encoder_half(network).requires_grad_(True), shown)


@final
@objectives.register("adversarial")
@dataclass(frozen=True)
class Adversarial(Objective):
    """An objective with an added adversarial term on the landing points of the student's steps.

    The wrapped objective still determines its own turns, their random numbers and the outcome.

    Source: Goodfellow et al. 2014 (arXiv:1406.2661) for the loss; Lin et al. 2024 (arXiv:2402.13929) for the critic.

    Raises:
        ValueError: if the objective is not a `StepObjective`, or a setting is out of range.
    """

    objective: Objective
    weight: float = 0.1
    """Weight of the adversarial term, relative to the objective's own loss."""
    rate: float = 4.0
    """Constant learning rate of the critic, relative to the student's peak rate."""
    gamma: float = 1.0
    """Weight of the penalty on the squared norm of the critic's gradient at data points; 0 disables the penalty."""
    delta: float = 0.1
    """Size of the perturbation that is used to estimate the critic's gradient."""
    lead_updates: int = 60
    """Number of initial updates during which the student ignores the critic."""
    needs_teacher: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.objective, StepObjective):
            known = ", ".join(name for name, kind in objectives.items() if issubclass(kind, StepObjective))
            raise ValueError(
                "an adversarial term needs an objective that trains the student on the student's own steps, which "
                f"{type(self.objective).__name__} does not do. Choose one of {known}"
            )
        check_whole("lead_updates", self.lead_updates, 0)
        for name in ("weight", "rate", "delta", "gamma"):
            check_number(f"{name} of a critic", getattr(self, name), above=name != "gamma")

    @property
    def _own(self) -> StepObjective:
        assert isinstance(self.objective, StepObjective)
        return self.objective

    @property
    def label(self) -> str:
        """The label of the wrapped objective, followed by "-critic"."""
        return f"{self.objective.label}-critic"

    @property
    def guides_teacher(self) -> bool:
        return self.objective.guides_teacher

    @property
    def learns_from_undistilled(self) -> bool:
        return self.objective.learns_from_undistilled

    @property
    def refines(self) -> bool:
        return self.objective.refines

    @property
    def outcome(self) -> Outcome:
        return self.objective.outcome

    @property
    def guidance(self) -> Guidance | None:
        return self.objective.guidance

    @property
    def evals(self) -> Mapping[str, Evals]:
        own = self.objective.evals
        calls = 3 if self.gamma else 2
        student = Evals(own[STUDENT].forward + 1, own[STUDENT].backward)
        return {**own, STUDENT: student, CRITIC: Evals(calls + 1, calls + 1)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {**self.objective.helpers, CRITIC: Auxiliary(lambda models, _: critic_of(models), self._critic_training)}

    def _critic_training(self, own: Training) -> Training:
        return own.of_helper(
            self.rate, adam_betas=(0.0, 0.99), anneal=False, warmup_updates=0, weight_decay=0.0, dropout=0.0
        )

    def turns(self, update: int) -> tuple[Turn, ...]:
        # The critic's turn is last, so the objective's own turns keep their positions and thus their random numbers.
        own, learning = self.objective.turns(update), Turn(CRITIC, self.critic_loss)
        if update >= self.lead_updates:
            own = tuple(Turn(STUDENT, self.loss) if turn.trains == STUDENT else turn for turn in own)
        return (*own, learning)

    def start(self, teacher: Denoiser) -> Denoiser:
        return self.objective.start(teacher)

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        return self.objective.view(teacher, student, null)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        step = self._own.step(models, batch, draw)
        denoised = models.student(step.x_t, step.t, step.cond)
        own = self._own.step_losses(models, step, denoised, draw)
        landing = self._landing(models, denoised, step, draw)
        found = models.helpers[CRITIC](landing.y, landing.tau, step.cond)
        return Losses(own.loss + self.weight * F.softplus(-found), own.log_snr)

    def critic_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the losses of the critic on data and on the student's landing points."""
        check_one_process(models)
        process, step = models.student.process, self._own.step(models, batch, draw)
        with torch.no_grad():
            landing = self._landing(models, models.student(step.x_t, step.t, step.cond), step, draw)
            eps = draw.normal("critic_data", batch.x0.shape[1:]).to(batch.x0)
            real = process.mix(batch.x0, eps, landing.tau)
        shown = [real, landing.y]
        if self.gamma:
            shown.append(real + self.delta * draw.normal("critic_change", real.shape[1:]).to(real))
        # All samples go through one call, because DDP and FSDP2 expect each trained network to be called once.
        count = len(shown)
        cond = {name: torch.cat([value] * count) for name, value in step.cond.items()}
        found = models.helpers[CRITIC](torch.cat(shown), landing.tau.repeat(count), cond).chunk(count)
        loss = F.softplus(-found[0]) + F.softplus(found[1])
        if self.gamma:
            loss = loss + self.gamma / 2 * ((found[2] - found[0]) / self.delta).square()
        return Losses(loss, process.log_snr(landing.tau))

    def _landing(self, models: Models, denoised: Denoised, step: Step, draw: Draw) -> Landing:
        return noised_landing(denoised, models.student.process, step, draw, until=step.t, purpose="critic_")
