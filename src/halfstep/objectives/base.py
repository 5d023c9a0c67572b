"""The interface of an objective, and the one loss that teacher training and distillation share.

An objective says what is trained, in which turns, against which loss, and what the result is. It knows nothing of
devices and files. `Training` declares the hyperparameters of one optimiser, once: stages, helpers, recipes, the Python
API and the command line take it, and its docstrings are the help texts of the flags.

The shared loss of a sample is weight(log_snr) * mean((x0 - x0_target)^2), the mean over the entries of a sample. A
weighting makes it the squared error in eps, v, or their maximum; the space in which a network predicts does not matter.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any, ClassVar, Final, NamedTuple, final

from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import check_instance, check_number, check_switch
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, per_sample
from halfstep.core.prediction import Weighting
from halfstep.objectives.guidance import Guidance
from halfstep.registry import Registry
from halfstep.samplers import DDIM, Sampler

FORBID_EXTRA = {"extra": "forbid"}
"""Tells pydantic to reject unknown names in a dataclass that is a field of a recipe."""


MOST_UPDATES: Final = 10**9
"""Largest number of updates, and of what is counted in them."""
MOST_AT_ONCE: Final = 2**20
"""Largest batch."""


def check_whole(name: str, value: object, least: int = 1, most: int = MOST_UPDATES) -> None:
    """Raise unless `value` is a whole number from `least` to `most`.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


@final
@dataclass(frozen=True)
class EarlyEnd:
    """The rule by which a stage ends before its budget: its loss has stopped falling.

    The mean loss of each `window` updates is compared with the lowest of all windows before it. When `patience` windows
    in a row were not lower than that by the share `min_drop`, the stage's rate is multiplied by a factor that falls
    linearly from 1 to 0 over one more window, and the stage ends. (The rate's fall to 0 is what averages a student's
    weights, so a stage that merely stopped would hand on a worse student.)

    Raises:
        ValueError: if a count is not a whole number in its range, the share is not in [0, 1), or the rule is changed
            without a patience.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    patience: int = 0
    """Windows in a row without progress that end a stage; 0 disables."""
    window: int = 1000
    """Updates of a window."""
    min_drop: float = 0.01
    """Share by which a window's loss must drop to count as progress."""

    def __post_init__(self) -> None:
        check_whole("early_end.patience", self.patience, 0)
        check_whole("early_end.window", self.window)
        check_number("early_end.min_drop", self.min_drop, below=1)
        if not self.patience:
            for field in fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise ValueError(f"early_end.{field.name} {value} has no effect without early_end.patience. Add it")

    def has_stopped_falling(self, losses: Sequence[float]) -> bool:
        """Return whether the mean losses of the windows so far end in `patience` windows without progress."""
        lowest, idle = math.inf, 0
        for loss in losses:
            if loss < lowest * (1 - self.min_drop) or lowest == math.inf:
                lowest, idle = loss, 0
            else:
                idle += 1
        return 0 < self.patience <= idle


@final
@dataclass(frozen=True)
class Training:
    """Hyperparameters of AdamW for one network over one stage.

    Raises:
        ValueError: if one is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    num_updates: int
    """Optimiser updates of a stage."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    batch_size: int = 128
    """Samples of an update, over all processes."""
    warmup_updates: int = 0
    """Updates over which the rate rises from 0 to its peak; the whole stage if that is shorter."""
    anneal: bool = True
    """Let the rate fall linearly to 0 over the stage."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decays."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.0
    """Decay of the moving average that the stage hands on; 0 hands on the weights."""
    dropout: float = 0.0
    """Dropout probability while training."""
    early_end: EarlyEnd = EarlyEnd()
    """When a stage may end before its budget."""

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
        """Return the hyperparameters of a helper of the stage: `rate` times the learning rate, and `changes`.

        A helper is not handed on, so it has no average of its own, and its loss is that of a game.
        """
        own: dict[str, Any] = {"learning_rate": rate * self.learning_rate, "ema_decay": 0.0, "early_end": EarlyEnd()}
        return replace(self, **own | changes)

    def rate_at(self, update: int) -> float:
        """Return the rate of update `update` (from 0): linear warm-up, then constant or linear to 0 after the last."""
        rate = self.learning_rate
        if self.anneal:
            rate *= 1 - update / self.num_updates
        # A stage that was shortened is not an error: it warms up to its end.
        if update < (warmup := min(self.warmup_updates, self.num_updates)):
            rate *= (update + 1) / warmup
        return rate


STUDENT: Final = "student"
"""The player whose network a stage hands on. All others are named by the objective's helpers."""


class Batch(NamedTuple):
    """Clean data `[batch, *dims]` and its conditions by name, each `[batch, ...]`."""

    x0: Tensor
    cond: Mapping[str, Tensor] = {}


@dataclass(frozen=True)
class Models:
    """The networks that an objective works with."""

    student: Denoiser
    teacher: Denoiser | None = None
    """The teacher; None while a teacher is trained."""
    helpers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The objective's own networks, by the names of `Objective.helpers`."""


class Losses(NamedTuple):
    """The losses of a turn for a batch."""

    loss: Tensor
    """Weighted losses, `[batch]`; the engine descends on their mean over the global batch."""
    log_snr: Tensor
    """The noise level of each sample, float64 `[batch]`, for statistics."""


class Role(StrEnum):
    """Role of a stage's model in the chain."""

    TEACHER = "teacher"
    """Undistilled: knows x0 at all times and takes any number of steps."""
    MATCHED = "matched"
    """A teacher carried over to another prediction, process or guidance."""
    STUDENT = "student"
    """Distilled for `num_steps` steps of `sampler`."""


class Outcome(NamedTuple):
    """A stage's result: the role of its model and how it is sampled. Stored in the manifest."""

    role: Role
    num_steps: int | None = None
    """Sampler steps that the model is made for; None for any number."""
    sampler: Sampler = DDIM()
    """How the model is sampled, evaluated, explored and exported."""


class Evals(NamedTuple):
    """Calls of one network for a sample of an update."""

    forward: float
    backward: float = 0.0

    @property
    def cost(self) -> float:
        """In forward passes; a backward pass costs two."""
        return self.forward + 2 * self.backward


@final
@dataclass(frozen=True)
class Auxiliary:
    """A further network with an optimiser of its own: an auxiliary denoiser, a critic."""

    start: Callable[[Models], nn.Module]
    """Makes the network before the first update: a copy, never student or teacher itself. A copy of the student has the
    teacher's weights in float32, whatever the teacher's precision, or additions of its own to a LoRA's base."""
    training: Callable[[Training], Training]
    """Makes its hyperparameters from the student's; budget and batch stay the stage's."""


@final
@dataclass(frozen=True)
class Average:
    """A moving average of a player's weights that the objective can call.

    Args:
        decay: reached in the end, in [0, 1); after n updates it is min(decay, (1 + n) / (10 + n)).
        of: the player whose weights are averaged.

    Raises:
        ValueError: if the decay is out of range.
    """

    decay: float
    of: str = STUDENT

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"the decay of an average must be in [0, 1), got {self.decay}")


@final
@dataclass(frozen=True)
class Frozen:
    """A player's network as it is before the first update, which the objective can call."""

    of: str = STUDENT


Helper = Auxiliary | Average | Frozen


class Turn(NamedTuple):
    """One optimiser step of one player."""

    trains: str
    """`STUDENT`, or the name of an `Auxiliary`."""
    loss: Callable[[Models, Batch, Draw], Losses]
    """Gradients reach this player only; the engine takes those of all others away."""


class Objective(ABC):
    """A training objective: players, turns, losses, and the resulting model."""

    needs_teacher: ClassVar[bool]
    """Whether `Models.teacher` must exist."""
    loss_falls: ClassVar[bool] = True
    """Whether a student's loss that stops falling means that it has learned; False for a game between two players and
    for a student that is its own teacher, whose losses `EarlyEnd` does not watch."""

    @property
    def learns_from_undistilled(self) -> bool:
        """Whether `Models.teacher` is the plan's latest undistilled model (a teacher or a matched one) instead of the
        model of the previous stage."""
        return False

    @property
    def refines(self) -> bool:
        """Whether the student starts from the latest student made for as many steps instead of the previous stage's
        model."""
        return False

    @property
    def label(self) -> str:
        """Name of the stage in its folder's name: the name of the class in the registry."""
        return objectives.name_of(self)

    @property
    def guides_teacher(self) -> bool:
        """Whether it guides its teacher at each call, which then must not have learned guidance."""
        return False

    @property
    @abstractmethod
    def outcome(self) -> Outcome:
        """Role, steps and sampler of the model that the stage hands on."""

    @property
    @abstractmethod
    def evals(self) -> Mapping[str, Evals]:
        """Network calls for a sample of an update: of "student", "teacher" and each helper. Cost estimates use these
        alone."""

    @property
    def guidance(self) -> Guidance | None:
        """The guidance that the student learns or keeps; None for none."""
        return None

    @property
    def helpers(self) -> Mapping[str, Helper]:
        """Further networks by name."""
        return {}

    def turns(self, update: int) -> tuple[Turn, ...]:
        """Return the optimiser steps of an update, in order; each has a batch and random numbers of its own."""
        return (Turn(STUDENT, self.loss),)

    def start(self, teacher: Denoiser) -> Denoiser:
        """Return what the student starts from: the teacher (which the engine copies), or one made from it.

        Raises:
            ValueError: if the teacher cannot be made into such a student.
        """
        return teacher

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        """Return the teacher as the student sees it: itself, or guided, or on the student's process.

        Args:
            null: conditions that stand for "no condition", for one sample; empty if there are none.

        Raises:
            ValueError: if the teacher cannot be seen so.
        """
        return teacher

    @abstractmethod
    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        """Return the losses of the student on the batch."""


objectives: Registry[type[Objective]] = Registry("objective")


def entry_mean(values: Tensor) -> Tensor:
    """Return the mean over the entries of each sample, `[batch]`."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values


def weighted_x0_loss(x0: Tensor, target: Tensor, log_snr: Tensor, weighting: Weighting) -> Tensor:
    """Return weight * mean((x0 - target)^2) for each sample, `[batch]`."""
    error = entry_mean((x0 - target).square())
    return per_sample(weighting(log_snr), error) * error


def check_one_process(models: Models) -> Denoiser:
    """Return the teacher after checking that it has the student's process.

    Raises:
        ValueError: if there is no teacher, or the processes differ.
    """
    if models.teacher is None:
        raise ValueError("a student learns from a teacher, and there is none")
    if models.teacher.process != models.student.process:
        raise ValueError(
            f"a student learns to land where its teacher does, so both need one noise process: the teacher has "
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
