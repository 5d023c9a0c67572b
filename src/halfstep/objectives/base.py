"""The interface of an objective, and the one loss that teacher training and distillation share.

An objective defines the trained networks, their turns and losses, and the result. It does not depend on devices or
files. `Training` is the only declaration of the hyperparameters of an optimiser. Stages, helpers, recipes, the Python
API and the command line use it, and its docstrings are the help texts of the flags.

The shared loss of a sample is weight(log_snr) * mean((x0 - x0_target)^2), where the mean is over the sample's entries.
A weighting makes it the squared error in eps or v, or the larger of two, for any prediction of the network.
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
"""Largest batch size."""


@final
@dataclass(frozen=True)
class Training:
    """Hyperparameters of AdamW for one network over one stage.

    Raises:
        ValueError: if one is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    num_updates: int
    """Optimiser updates per stage."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    batch_size: int = 128
    """Samples per update, over all processes."""
    warmup_updates: int = 0
    """Updates over which the learning rate rises from 0 to its peak, at most the whole stage."""
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
    """Early stopping of the stage."""

    def __post_init__(self) -> None:
        check_whole("num_updates", self.num_updates)
        check_whole("batch_size", self.batch_size, most=MOST_AT_ONCE)
        check_whole("warmup_updates", self.warmup_updates, 0)
        for name in ("learning_rate", "grad_clip"):
            check_number(name, getattr(self, name), above=True)
        check_number("weight_decay", self.weight_decay)
        if not isinstance(self.adam_betas, tuple | list) or len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas must be two numbers, got {self.adam_betas!r}. Pass (0.9, 0.999)")
        for beta in self.adam_betas:
            check_number("adam_betas", beta, below=1)
        for name in ("ema_decay", "dropout"):
            check_number(name, getattr(self, name), below=1)
        check_switch("anneal", self.anneal)
        check_instance("early_end", self.early_end, EarlyEnd, "halfstep.EarlyEnd(patience=3)")

    def of_helper(self, rate: float, **changes: Any) -> "Training":
        """Return the hyperparameters of a helper: `rate` times the learning rate, and other `changes`.

        A helper has no EMA, because it is not passed on, and no early stopping, because its loss need not fall.
        """
        own: dict[str, Any] = {"learning_rate": rate * self.learning_rate, "ema_decay": 0.0, "early_end": EarlyEnd()}
        return replace(self, **own | changes)

    def rate_at(self, update: int) -> float:
        """Return the learning rate of an update (from 0): linear warm-up, then constant or linear decay to 0."""
        rate = self.learning_rate
        if self.anneal:
            rate *= 1 - update / self.num_updates
        # A stage may be shorter than its warm-up.
        if update < (warmup := min(self.warmup_updates, self.num_updates)):
            rate *= (update + 1) / warmup
        return rate


STUDENT: Final = "student"
"""Name of the player that a stage passes on. All other players are helpers of the objective."""


class Batch(NamedTuple):
    """Clean data `[batch, *dims]`, and conditions by name, each `[batch, ...]`."""

    x0: Tensor
    cond: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Models:
    """The networks that an objective uses."""

    student: Denoiser
    teacher: Denoiser | None = None
    """The teacher; None while training one."""
    helpers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The objective's own networks, keyed by the names in `Objective.helpers`."""


class Losses(NamedTuple):
    """The losses of a turn for a batch."""

    loss: Tensor
    """Weighted losses `[batch]`. The engine minimises their mean over the global batch."""
    log_snr: Tensor
    """Noise level of each sample, float64 `[batch]`, for statistics."""


class Role(StrEnum):
    """Role of a stage's model in the chain."""

    TEACHER = "teacher"
    """Undistilled: it predicts x0 at all times and samples in any number of steps."""
    MATCHED = "matched"
    """A teacher converted to another prediction, process or guidance."""
    STUDENT = "student"
    """A model distilled for `num_steps` steps of `sampler`."""


class Outcome(NamedTuple):
    """The role of a stage's model, and how to sample it. Stored in the manifest."""

    role: Role
    num_steps: int | None = None
    """Number of sampler steps that the model is trained for; None for any number."""
    sampler: Sampler = DDIM()
    """Sampler used for sampling, evaluation, the explorer and export."""


class Evals(NamedTuple):
    """Calls of one network per sample and update."""

    forward: float
    backward: float = 0.0

    @property
    def cost(self) -> float:
        """Cost in forward passes; a backward pass counts as two."""
        return self.forward + 2 * self.backward


@final
@dataclass(frozen=True)
class Auxiliary:
    """An additional network with its own optimiser: an auxiliary denoiser or a critic."""

    start: Callable[[Models], nn.Module]
    """Creates the network before the first update: a copy, never the student or teacher itself. A copy of the student
    has the teacher's weights in float32 or, on the base of a LoRA, its own adapter."""
    training: Callable[[Training], Training]
    """Maps the student's hyperparameters to its own. Its budget and batch are those of the stage."""


@final
@dataclass(frozen=True)
class Average:
    """A moving average of a player's weights that the objective can call.

    Args:
        decay: final decay, in [0, 1); after n updates the decay is min(decay, (1 + n) / (10 + n)).
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
    """A frozen copy of a player's network before the first update, which the objective can call."""

    of: str = STUDENT


Helper = Auxiliary | Average | Frozen


class Turn(NamedTuple):
    """One optimiser step of one player."""

    trains: str
    """`STUDENT`, or the name of an `Auxiliary`."""
    loss: Callable[[Models, Batch, Draw], Losses]
    """Returns its losses. The engine discards the gradients of all other players."""


class Objective(ABC):
    """A training objective: players, turns, losses, and the resulting model."""

    needs_teacher: ClassVar[bool]
    """Whether `Models.teacher` is required."""
    loss_falls: ClassVar[bool] = True
    """Whether the student has learned when its loss stops falling. False for a game between two players, and for a
    student that is its own teacher. `EarlyEnd` ignores their losses."""

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
        """Name of the stage in its folder's name. By default, the registered name of the class."""
        return objectives.name_of(self)

    @property
    def guides_teacher(self) -> bool:
        """Whether each call of the teacher is guided here. The teacher must then not have learned guidance."""
        return False

    @property
    @abstractmethod
    def outcome(self) -> Outcome:
        """Role, number of steps and sampler of the model that the stage passes on."""

    @property
    @abstractmethod
    def evals(self) -> Mapping[str, Evals]:
        """Calls of "student", "teacher" and each helper per sample and update. All cost estimates use these."""

    @property
    def guidance(self) -> Guidance | None:
        """The guidance that the student learns or keeps; None for none."""
        return None

    @property
    def helpers(self) -> Mapping[str, Helper]:
        """Additional networks by name."""
        return {}

    def turns(self, update: int) -> tuple[Turn, ...]:
        """Return the optimiser steps of an update, in order. Each has its own batch and random numbers."""
        return (Turn(STUDENT, self.loss),)

    def start(self, teacher: Denoiser) -> Denoiser:
        """Return the model that the student starts from: the teacher (which the engine copies), or one built from it.

        Raises:
            ValueError: if the teacher cannot be converted to this kind of student.
        """
        return teacher

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        """Return the teacher that the student learns from: the teacher itself, or guided, or on the student's process.

        Args:
            null: values that mean "no condition", by name, for one sample; may be empty.

        Raises:
            ValueError: if the teacher has no such view.
        """
        return teacher

    @abstractmethod
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the losses of the student on the batch."""


class Step(NamedTuple):
    """Steps of the student from x_t `[batch, *dims]` at times t to times s, each `[batch]`."""

    x_t: Tensor
    t: Tensor
    s: Tensor
    cond: Cond


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


objectives: Registry[type[Objective]] = Registry("objective")


def entry_mean(values: Tensor) -> Tensor:
    """Return the mean over the entries of each sample, `[batch]`."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def weighted_x0_loss(x0: Tensor, target: Tensor, log_snr: Tensor, weighting: Weighting) -> Tensor:
    """Return weight * mean((x0 - target)^2) for each sample, `[batch]`."""
    error = entry_mean((x0 - target).square())
    return per_sample(weighting(log_snr), error) * error


def check_deterministic(sampler: Sampler) -> None:
    """Raise ValueError unless the sampler is deterministic."""
    if sampler.stochastic:
        raise ValueError(
            f"{type(sampler).__name__} draws noise, so one step cannot land where its steps land. "
            "Choose a deterministic sampler for the teacher, such as DDIM()"
        )


def check_one_process(models: Models) -> Denoiser:
    """Return the teacher, which must have the student's process.

    Raises:
        ValueError: if no teacher exists, or the processes differ.
    """
    if models.teacher is None:
        raise ValueError("a student learns from a teacher, but none is given. Pass one")
    if models.teacher.process != models.student.process:
        raise ValueError(
            f"a student learns to land where its teacher lands, so both need the same noise process. The teacher has "
            f"{models.teacher.process}, the student {models.student.process}"
        )
    return models.teacher


def noisy_student_loss(
    models: Models, x_t: Tensor, t: Tensor, target: Tensor, cond: Cond, weighting: Weighting
) -> Losses:
    """Return the losses of the student's x0 at (x_t, t) against `target`."""
    process: NoiseProcess = models.student.process
    log_snr = process.log_snr(t)
    return Losses(weighted_x0_loss(models.student(x_t, t, cond).x0, target, log_snr, weighting), log_snr)
