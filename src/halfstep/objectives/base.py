"""The interface of an objective, and the loss that teacher training and distillation share.

An objective defines which networks are trained, the turns and losses that train them, and the resulting model. It does
not depend on devices or files. Optimiser hyperparameters are declared only in `Training`. Stages, helpers, recipes, the
Python API and the command line all use this class, and its field docstrings serve as the flags' help texts.

The shared loss of a sample is weight(log_snr) * mean((x0 - x0_target)^2), where the mean is over the sample's entries.
The choice of weighting can turn this loss into the squared error in eps or v, or into the larger of the squared errors
in x0 and eps, regardless of what the network predicts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar, Final, NamedTuple, final

from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import FORBID_EXTRA, check_instance, check_number, check_switch, check_whole
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised, Weighting
from halfstep.objectives.early_end import EarlyEnd
from halfstep.objectives.guidance import Guidance
from halfstep.registry import Registry
from halfstep.samplers import DDIM, Sampler

MOST_AT_ONCE: Final = 2**20
"""Maximum batch size."""


@final
@dataclass(frozen=True)
class Training:
    """The hyperparameters of AdamW for one network in one stage.

    Raises:
        ValueError: if a hyperparameter is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    num_updates: int
    """Number of updates per stage."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    batch_size: int = 128
    """Number of samples per update, summed over all ranks."""
    warmup_updates: int = 0
    """Number of updates over which the learning rate rises from 0 to its peak; capped at the length of the stage."""
    anneal: bool = True
    """Decay the learning rate linearly to 0 over the stage."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """The two betas of AdamW."""
    grad_clip: float = 1.0
    """Maximum global gradient norm."""
    ema_decay: float = 0.0
    """Decay of the EMA weights that the stage passes on; 0 passes on the raw weights."""
    dropout: float = 0.0
    """Dropout probability during training."""
    early_end: EarlyEnd = EarlyEnd()
    """When to stop the stage early."""

    def __post_init__(self) -> None:
        check_whole("num_updates", self.num_updates)
        check_whole("batch_size", self.batch_size, most=MOST_AT_ONCE)
        check_whole("warmup_updates", self.warmup_updates, 0)
        for name in ("learning_rate", "grad_clip"):
            check_number(name, getattr(self, name), above=True)
        check_number("weight_decay", self.weight_decay)
        if not isinstance(self.adam_betas, tuple | list) or len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas!r}. Pass {Training.adam_betas}")
        for beta in self.adam_betas:
            check_number("adam_betas", beta, below=1)
        for name in ("ema_decay", "dropout"):
            check_number(name, getattr(self, name), below=1)
        check_switch("anneal", self.anneal)
        check_instance("early_end", self.early_end, EarlyEnd, "halfstep.EarlyEnd(patience=3)")

    def of_helper(self, rate: float, **changes: Any) -> "Training":
        """Return the hyperparameters of a helper, with the learning rate multiplied by `rate` and `changes` applied.

        A helper has no EMA, because it is not passed on, and no early stopping, because its loss need not fall.
        """
        own: dict[str, Any] = {"learning_rate": rate * self.learning_rate, "ema_decay": 0.0, "early_end": EarlyEnd()}
        return replace(self, **own | changes)

    def rate_at(self, update: int) -> float:
        """Return the learning rate at an update, counted from 0.

        The learning rate rises linearly during the warm-up, and is then constant or decays linearly to 0.
        """
        rate = self.learning_rate
        if self.anneal:
            rate *= 1 - update / self.num_updates
        # A stage may be shorter than its warm-up.
        if update < (warmup := min(self.warmup_updates, self.num_updates)):
            rate *= (update + 1) / warmup
        return rate


STUDENT: Final = "student"
"""Name of the player that a stage passes on. All other players are the objective's helpers."""


class Batch(NamedTuple):
    """A batch: clean data `[batch, *dims]` and conditions `[batch, ...]` keyed by name."""

    x0: Tensor
    cond: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Models:
    """The networks that an objective uses."""

    student: Denoiser
    teacher: Denoiser | None = None
    """The teacher, or None while a teacher is being trained."""
    helpers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The objective's additional networks, keyed by the names in `Objective.helpers`."""


class Losses(NamedTuple):
    """The losses of one turn on a batch."""

    loss: Tensor
    """The weighted loss of each sample, `[batch]`. The engine minimises the mean loss over the global batch and rejects
    any other shape, such as a mean over the batch."""
    log_snr: Tensor
    """The log-SNR of each sample, float64 `[batch]`, which is used for statistics."""


class Role(StrEnum):
    """The role of a stage's model in the chain."""

    TEACHER = "teacher"
    """An undistilled model, which predicts x0 at every time t and can be sampled with any number of steps."""
    MATCHED = "matched"
    """A teacher converted to another prediction, process or guidance."""
    STUDENT = "student"
    """A model distilled for `num_steps` steps of `sampler`."""


class Outcome(NamedTuple):
    """The role of a stage's model and how to sample from it, as stored in the manifest."""

    role: Role
    num_steps: int | None = None
    """The number of sampler steps that the model is trained for, or None if it can be sampled with any number."""
    sampler: Sampler = DDIM()
    """The sampler used for sampling, evaluation, the explorer and export."""


class Evals(NamedTuple):
    """The number of calls to one network per sample and update."""

    forward: float
    backward: float = 0.0

    @property
    def cost(self) -> float:
        """The cost in forward passes, where a backward pass counts as two."""
        return self.forward + 2 * self.backward


@final
@dataclass(frozen=True)
class Auxiliary:
    """An additional network with its own optimiser: an auxiliary denoiser or a critic."""

    start: Callable[[Models, tuple[int, ...]], nn.Module]
    """Creates the network from the models and the shape of one sample, before the first update. The network must be new
    or a copy, never the student or the teacher itself. A copy of the student has the weights that the student starts
    from. If the student is a LoRA model, its copy shares the base and has a separate adapter. Weights that do not
    require gradients stay frozen. Random initial weights are drawn from torch's generator, which is seeded for the
    call. Dry runs and checks before a run call the function on the meta device, so it must not read tensor values."""
    training: Callable[[Training], Training]
    """Maps the student's hyperparameters to those of this network. The number of updates and the batch size must match
    those of the stage."""


@final
@dataclass(frozen=True)
class Average:
    """A copy of a player that holds the moving average of the player's weights, for the objective to call.

    The average itself is in float32 or float64, and the copy's weights have the player's dtypes.

    Args:
        decay: final decay, in [0, 1). After n updates, the decay is min(decay, (1 + n) / (10 + n)).
        of: name of the player to average.

    Raises:
        ValueError: if the decay is out of range.
    """

    decay: float
    of: str = STUDENT

    def __post_init__(self) -> None:
        check_number("the decay of an average", self.decay, below=1)


@final
@dataclass(frozen=True)
class Frozen:
    """A frozen copy of a player's network, made before the first update, for the objective to call."""

    of: str = STUDENT


Helper = Auxiliary | Average | Frozen


class Turn(NamedTuple):
    """One optimiser step of one player."""

    trains: str
    """The player that is trained in this turn: `STUDENT`, or the name of an `Auxiliary`."""
    loss: Callable[[Models, Batch, Draw], Losses]
    """Returns the losses of that player. The engine discards the gradients of all other players."""


class Objective(ABC):
    """A training objective, which defines the players, turns and losses of a stage and the resulting model."""

    needs_teacher: ClassVar[bool]
    """Whether `Models.teacher` is required."""
    loss_falls: ClassVar[bool] = True
    """Whether the student has finished learning once its loss has stopped falling. This is False for a game between two
    players and for a student that is its own teacher; `EarlyEnd` ignores the losses of such objectives."""

    @property
    def learns_from_undistilled(self) -> bool:
        """Whether `Models.teacher` is the plan's latest undistilled model (a teacher or a matched model) instead of the
        previous stage's model."""
        return False

    @property
    def refines(self) -> bool:
        """Whether the student starts from the latest student with the same number of steps instead of the previous
        stage's model."""
        return False

    @property
    def label(self) -> str:
        """The stage's name, as used in its folder's name. By default, this is the registered name of the class."""
        return objectives.name_of(self)

    @property
    def guides_teacher(self) -> bool:
        """Whether the objective guides each teacher call. If so, the teacher must not already have learned guidance."""
        return False

    @property
    @abstractmethod
    def outcome(self) -> Outcome:
        """The role, number of steps and sampler of the model that the stage passes on."""

    @property
    @abstractmethod
    def evals(self) -> Mapping[str, Evals]:
        """The number of calls to "student", "teacher" and each helper per sample and update. All cost estimates use
        these numbers."""

    @property
    def guidance(self) -> Guidance | None:
        """The guidance that the student learns or keeps, or None if it has no guidance."""
        return None

    @property
    def helpers(self) -> Mapping[str, Helper]:
        """The additional networks, keyed by name."""
        return {}

    def turns(self, update: int) -> tuple[Turn, ...]:
        """Return the optimiser steps of an update, in order. Each turn uses its own batch and random numbers."""
        return (Turn(STUDENT, self.loss),)

    def start(self, teacher: Denoiser) -> Denoiser:
        """Return the model that the student starts from: the teacher, which the engine copies, or a model built from
        it. Random initial weights are drawn from torch's generator, which is seeded for the call.

        Raises:
            ValueError: if the teacher cannot be converted to this kind of student.
        """
        return teacher

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        """Return the teacher that the student learns from: unchanged, with guidance, or on the student's noise process.

        Args:
            null: the values for one sample that represent "no condition", keyed by name; may be empty.

        Raises:
            ValueError: if the teacher cannot be guided or converted in this way.
        """
        return teacher

    @abstractmethod
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the losses of the student on the batch."""


class Step(NamedTuple):
    """Student steps from x_t `[batch, *dims]` at times t `[batch]` to times s `[batch]`."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    cond: Cond


class StepObjective(Objective):
    """An objective that calls the student once per turn, at the start of one of the student's DDIM steps.

    A subclass defines `num_steps` and `step_losses`. Other objectives can add a loss term on the landing point, as
    `Adversarial` does.
    """

    num_steps: int
    """The student's number of steps."""
    needs_teacher: ClassVar[bool] = True

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, DDIM())

    @final
    def step(self, models: Models, batch: Batch, draw: Draw) -> Step:
        """Return one step of the student for each sample of the batch, from a uniformly drawn time i / num_steps."""
        index = as_clock(draw.integers("time", self.num_steps), batch.x0)
        t, s = (index + 1) / self.num_steps, index / self.num_steps
        x_t = models.student.process.mix(batch.x0, draw.normal("noise", batch.x0.shape[1:]).to(batch.x0), t)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        return Step(x_t, t, s, cond)

    @abstractmethod
    def step_losses(self, models: Models, step: Step, denoised: Denoised, draw: Draw) -> Losses:
        """Return the student's losses, given `denoised`, the student's output at the start of each step."""

    @final
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        step = self.step(models, batch, draw)
        return self.step_losses(models, step, models.student(step.x_t, step.t, step.cond), draw)


objectives: Registry[type[Objective]] = Registry("objective")


def entry_mean(values: Tensor) -> Tensor:
    """Return the mean over the entries of each sample, as a tensor `[batch]`."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def weighted_x0_loss(x0: Tensor, target: Tensor, log_snr: Tensor, weighting: Weighting) -> Tensor:
    """Return weight * mean((x0 - target)^2) for each sample, as a tensor `[batch]`."""
    error = entry_mean((x0 - target).square())
    return per_sample(weighting(log_snr), error) * error


def check_deterministic(sampler: Sampler) -> None:
    """Raise ValueError unless the sampler is deterministic."""
    if sampler.stochastic:
        raise ValueError(
            f"{type(sampler).__name__} draws noise, so its steps have no fixed landing point that a student could "
            "learn. Choose a deterministic sampler for the teacher, such as DDIM()"
        )


def check_one_process(models: Models) -> Denoiser:
    """Return the teacher, which must have the same noise process as the student.

    Raises:
        ValueError: if no teacher is given, or its noise process differs from the student's.
    """
    if models.teacher is None:
        raise ValueError("a student learns from a teacher, but none is given. Pass one")
    if models.teacher.process != models.student.process:
        raise ValueError(
            f"a student learns to land where its teacher lands, so both need the same noise process. The teacher has "
            f"{models.teacher.process}, but the student has {models.student.process}"
        )
    return models.teacher


def noisy_student_loss(
    models: Models, x_t: Tensor, t: Tensor, target: Tensor, cond: Cond, weighting: Weighting
) -> Losses:
    """Return the losses of the student's x0 at (x_t, t) with respect to `target`."""
    process: NoiseProcess = models.student.process
    log_snr = process.log_snr(t)
    return Losses(weighted_x0_loss(models.student(x_t, t, cond).x0, target, log_snr, weighting), log_snr)
