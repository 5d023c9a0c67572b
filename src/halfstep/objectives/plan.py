"""The plan: a chain of stages as data.

A stage says what is learned (a teacher by denoising or matching, a student with `num_steps` steps by halving), for how
many updates and at which rate. The chain of halvings is a list of them, not a loop hidden in a script.

Source of the defaults: Salimans & Ho 2022 (arXiv:2202.00512), section 5.2 and appendix; the authors' configurations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import final

from halfstep.core.grids import check_num_steps
from halfstep.core.weighting import SNRPlusOne, TruncatedSNR, Weighting
from halfstep.objectives.base import Objective, objectives
from halfstep.objectives.denoising import Denoising
from halfstep.objectives.halving import Halving
from halfstep.objectives.matching import GuidanceRange, Matching


@final
@dataclass(frozen=True)
class EarlyEnd:
    """The rule by which a stage ends before its budget: its loss has stopped falling.

    The mean loss of each `window` updates is compared with the lowest of all windows before it. When `patience` windows
    in a row were not lower than that by the share `min_drop`, the stage's rate is multiplied by a factor that falls
    linearly from 1 to 0 over one more window, and the stage ends. (The rate's fall to 0 is what averages a student's
    weights, so a stage that merely stopped would hand on a worse student.)

    Raises:
        ValueError: if a count is not a whole number of at least 1, or the share not in [0, 1).
    """

    window: int = 1000
    patience: int = 3
    min_drop: float = 0.01

    def __post_init__(self) -> None:
        for name in ("window", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"early end: {name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.min_drop < 1:
            raise ValueError(f"early end: min_drop must be in [0, 1), got {self.min_drop}")

    def has_stopped_falling(self, losses: Sequence[float]) -> bool:
        """Whether the mean losses of the windows so far end in `patience` that brought nothing."""
        lowest, idle = math.inf, 0
        for loss in losses:
            if loss < lowest * (1 - self.min_drop) or lowest == math.inf:
                lowest, idle = loss, 0
            else:
                idle += 1
        return idle >= self.patience


@final
@dataclass(frozen=True)
class Stage:
    """One row of a plan. The student of a halving stage starts as a copy of its teacher, with a fresh optimiser.

    Raises:
        ValueError: if a budget is not positive.
    """

    objective: Objective
    num_updates: int
    batch_size: int
    learning_rate: float
    warmup_updates: int = 0
    """Updates over which the rate rises from 0 to `learning_rate`."""
    anneal: bool = True
    """Whether the rate falls linearly to 0 over the stage, as the paper's distillation does."""
    weight_decay: float = 0.0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights, which is what the stage hands on; 0 hands on the weights."""
    dropout: float = 0.0
    early_end: EarlyEnd | None = None
    """When the stage may end before its budget; None for never."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size", "learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        for name in ("num_updates", "batch_size", "warmup_updates"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and at least 0, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.warmup_updates <= self.num_updates:
            raise ValueError(
                f"warmup_updates must be from 0 to num_updates = {self.num_updates}, got {self.warmup_updates}"
            )

    @property
    def num_steps(self) -> int | None:
        """Sampler steps that the stage's model is made for; None for a teacher, which takes any."""
        return self.objective.num_steps if isinstance(self.objective, Halving) else None

    @property
    def update_cost(self) -> float:
        """Cost of an update in forward passes of one sample: a backward pass counts as two."""
        return (3.0 + self.objective.teacher_evals) * self.batch_size

    def learning_rate_at(self, update: int) -> float:
        """The rate of update `update` (from 0): linear warm-up, then constant or linear to 0 after the last update."""
        rate = self.learning_rate
        if self.anneal:
            rate *= 1 - update / self.num_updates
        if update < self.warmup_updates:
            rate *= (update + 1) / self.warmup_updates
        return rate


@final
@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, each with its folder's name."""

    stages: tuple[Stage, ...] = field(default=())

    def names(self, first: int = 0) -> list[str]:
        """Folder names, numbered from `first`: "00-denoise", "01-match", "02-halve-0128", ..."""
        names = []
        for index, stage in enumerate(self.stages, start=first):
            steps = "" if stage.num_steps is None else f"-{stage.num_steps:04d}"
            names.append(f"{index:02d}-{objectives.name_of(stage.objective)}{steps}")
        return names

    @property
    def num_updates(self) -> int:
        """Updates of all stages together."""
        return sum(stage.num_updates for stage in self.stages)

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.stages + other.stages)

    @classmethod
    def halvings(
        cls,
        start: int,
        end: int = 1,
        *,
        factor: int = 2,
        students: Sequence[int] | None = None,
        num_updates: int = 50_000,
        updates_at: Mapping[int, int] | None = None,
        batch_size: int = 128,
        learning_rate: float = 5e-5,
        learning_rate_at: Mapping[int, float] | None = None,
        warmup_updates: int = 0,
        weighting: Weighting | None = None,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        grad_clip: float = 1.0,
        ema_decay: float = 0.0,
        dropout: float = 0.0,
        early_end: EarlyEnd | None = None,
        guidance: GuidanceRange | None = None,
    ) -> "Plan":
        """The chain start -> start / 2 -> ... -> end, one halving stage a student.

        Args:
            start: steps of the first teacher; the first student takes half of them.
            end: steps of the last student.
            factor: teacher steps that a student's step replaces, at every stage.
            students: the steps of all students, in the place of `end` and `factor`: 256, 64, 16, 8, 4 for example.
            num_updates: of each stage; the paper's 50,000 by default.
            updates_at: exceptions, from a student's steps to its updates; by default twice `num_updates` at 2 and 1,
                as in the paper.
            learning_rate: at the start of each stage, from where it falls linearly to 0.
            learning_rate_at: exceptions, from a student's steps to its rate; none by default.
            warmup_updates: updates of each stage over which the rate rises first; none in the paper. A fresh Adam moves
                every weight by the full rate at once, which a short stage does not have the time to mend.
            early_end: when a stage may end before its budget.
            guidance: the scales that teacher and student are shown, if the teacher has learned a range of them.

        Raises:
            ValueError: if `end` is not below `start`, the factors do not lead from `start` to `end`, or an exception
                names a number of steps that is not in the chain.
        """
        steps = [start, *students] if students is not None else _divided(start, end, factor)
        factors = _factors(steps)
        exceptions = {2: 2 * num_updates, 1: 2 * num_updates} if updates_at is None else dict(updates_at)
        rates = dict(learning_rate_at or {})
        given_for = (("updates", "updates_at", updates_at or {}), ("a learning rate", "learning_rate_at", rates))
        for what, name, given in given_for:
            foreign = sorted(set(given) - set(steps[1:]))
            if foreign:
                verb = "are" if what == "updates" else "is"
                raise ValueError(
                    f"{what} {verb} given for a student of {foreign[0]} steps, but the chain's students take "
                    f"{steps[1:]}: give exceptions for these, or none ({name} None)"
                )
        return cls(
            tuple(
                Stage(
                    Halving(n, k, weighting or TruncatedSNR(), guidance),
                    num_updates=exceptions.get(n, num_updates),
                    batch_size=batch_size,
                    learning_rate=rates.get(n, learning_rate),
                    warmup_updates=warmup_updates,
                    weight_decay=weight_decay,
                    adam_betas=adam_betas,
                    grad_clip=grad_clip,
                    ema_decay=ema_decay,
                    dropout=dropout,
                    early_end=early_end,
                )
                for n, k in zip(steps[1:], factors, strict=True)
            )
        )

    @classmethod
    def matching(
        cls,
        *,
        num_updates: int,
        batch_size: int,
        learning_rate: float,
        num_times: int = 1024,
        guidance: GuidanceRange | None = None,
        guided: bool = False,
        weighting: Weighting | None = None,
        warmup_updates: int = 0,
        anneal: bool = True,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        grad_clip: float = 1.0,
        ema_decay: float = 0.0,
        dropout: float = 0.0,
    ) -> "Plan":
        """A plan of one stage that carries a teacher over to another prediction, clock or guidance."""
        return cls(
            (
                Stage(
                    Matching(num_times, weighting or SNRPlusOne(), guidance, guided),
                    num_updates=num_updates,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    warmup_updates=warmup_updates,
                    anneal=anneal,
                    weight_decay=weight_decay,
                    adam_betas=adam_betas,
                    grad_clip=grad_clip,
                    ema_decay=ema_decay,
                    dropout=dropout,
                ),
            )
        )

    @classmethod
    def teacher(
        cls,
        *,
        num_updates: int,
        batch_size: int,
        learning_rate: float,
        weighting: Weighting | None = None,
        warmup_updates: int = 0,
        anneal: bool = False,
        weight_decay: float = 0.0,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        grad_clip: float = 1.0,
        ema_decay: float = 0.9999,
        dropout: float = 0.0,
    ) -> "Plan":
        """A plan of one stage that trains a teacher by denoising; it hands on its moving average."""
        return cls(
            (
                Stage(
                    Denoising(weighting or TruncatedSNR()),
                    num_updates=num_updates,
                    batch_size=batch_size,
                    learning_rate=learning_rate,
                    warmup_updates=warmup_updates,
                    anneal=anneal,
                    weight_decay=weight_decay,
                    adam_betas=adam_betas,
                    grad_clip=grad_clip,
                    ema_decay=ema_decay,
                    dropout=dropout,
                ),
            )
        )


def _divided(start: int, end: int, factor: int) -> list[int]:
    """start, start / factor, ..., end.

    Raises:
        ValueError: if `end` is not below `start` or is not met.
    """
    check_num_steps(start)
    check_num_steps(end)
    if not isinstance(factor, int) or factor < 2:
        raise ValueError(f"the factor of a stage must be a whole number of at least 2, got {factor!r}")
    if end >= start:
        raise ValueError(f"the end must be below the start: got a chain from {start} steps to {end}")
    steps = [start]
    while steps[-1] > end and steps[-1] % factor == 0:
        steps.append(steps[-1] // factor)
    if steps[-1] != end:
        near = end * factor
        while near < start:
            near *= factor
        how = "halved" if factor == 2 else f"divided by {factor} again and again"
        power = "two" if factor == 2 else str(factor)
        raise ValueError(
            f"{start} steps cannot be {how} to {end}: list the students' steps, or start from {end} times a "
            f"power of {power}, for example {near}"
        )
    return steps


def _factors(steps: Sequence[int]) -> list[int]:
    """The factor between each number of steps and the next.

    Raises:
        ValueError: if there is none between two of them, or no student.
    """
    if len(steps) < 2:
        raise ValueError("the list of students is empty: give the steps of each, such as 256, 64, 16, 8, 4")
    for number in steps:
        check_num_steps(number)
    for teacher, student in pairwise(steps):
        if student >= teacher or teacher % student:
            raise ValueError(
                f"a student of {student} steps cannot follow a teacher of {teacher}: its steps must divide the "
                f"teacher's, with a factor of at least 2; the chain is {', '.join(map(str, steps))}"
            )
    return [teacher // student for teacher, student in pairwise(steps)]
