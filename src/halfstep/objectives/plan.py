"""The plan: a chain of stages as data.

A stage is an objective and the hyperparameters of its student's optimiser. The chain of halvings is a list of stages,
not a loop hidden in a script.

Source of the defaults: Salimans & Ho 2022 (arXiv:2202.00512), section 5.2 and appendix; the authors' configurations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Final, final

from halfstep.core.grids import check_num_steps
from halfstep.core.prediction import TruncatedSNR, Weighting
from halfstep.objectives.base import Objective, Training, objectives
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.halving import Halving
from halfstep.objectives.moments import MomentMatching

HALVING: Final = Training(num_updates=50_000, learning_rate=5e-5)
"""The paper's training of a student: no warm-up, the rate falls linearly to 0."""


@final
@dataclass(frozen=True)
class Stage:
    """One row of a plan. The student of a halving stage starts as a copy of its teacher, with a fresh optimiser."""

    objective: Objective
    training: Training

    @property
    def num_steps(self) -> int | None:
        """Sampler steps that the stage's model is made for; None for any number."""
        return self.objective.outcome.num_steps

    @property
    def update_cost(self) -> float:
        """Cost of an update in forward passes of one sample."""
        return sum(evals.cost for evals in self.objective.evals.values()) * self.training.batch_size


@final
@dataclass(frozen=True)
class Plan:
    """Stages in the order in which they run, each with its folder's name."""

    stages: tuple[Stage, ...] = field(default=())

    def names(self, first: int = 0) -> list[str]:
        """Return folder names, numbered from `first`: "00-denoise", "01-match", "02-halve-0128", ..."""
        names = []
        for index, stage in enumerate(self.stages, start=first):
            steps = "" if stage.num_steps is None else f"-{stage.num_steps:04d}"
            names.append(f"{index:02d}-{objectives.name_of(stage.objective)}{steps}")
        return names

    @property
    def num_updates(self) -> int:
        """Updates of all stages together."""
        return sum(stage.training.num_updates for stage in self.stages)

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.stages + other.stages)

    def guided(self, guidance: Guidance | None) -> "Plan":
        """Return the plan with `guidance` as what the teachers of its students have learned."""
        return Plan(
            tuple(
                replace(stage, objective=replace(stage.objective, guidance=guidance))
                if isinstance(stage.objective, Halving | MomentMatching) and guidance is not None
                else stage
                for stage in self.stages
            )
        )

    @classmethod
    def of(cls, objective: Objective, training: Training) -> "Plan":
        """Return the plan of one stage."""
        return cls((Stage(objective, training),))

    @classmethod
    def halvings(
        cls,
        start: int,
        end: int = 1,
        training: Training = HALVING,
        *,
        factor: int = 2,
        students: Sequence[int] | None = None,
        updates_at: Mapping[int, int] | None = None,
        learning_rate_at: Mapping[int, float] | None = None,
        weighting: Weighting | None = None,
        guidance: Guidance | None = None,
    ) -> "Plan":
        """Return the chain start -> start / 2 -> ... -> end, one halving stage a student.

        Args:
            start: steps of the first teacher; the first student takes half of them.
            end: steps of the last student.
            training: of each stage. The paper has no warm-up; but a fresh Adam moves every weight by the full rate at
                once, from which a short stage does not recover.
            factor: teacher steps that a student's step replaces, at every stage.
            students: the steps of all students instead of `end` and `factor`: 256, 64, 16, 8, 4 for example.
            updates_at: exceptions, from a student's steps to its updates; by default twice `training.num_updates` at 2
                and 1, as in the paper.
            learning_rate_at: exceptions, from a student's steps to its rate; none by default.
            guidance: what the first teacher has learned.

        Raises:
            ValueError: if `end` is not below `start`, the factors do not lead from `start` to `end`, or an exception
                names a number of steps that is not in the chain.
        """
        steps = [start, *students] if students is not None else _divided(start, end, factor)
        factors = _factors(steps)
        doubled = 2 * training.num_updates
        exceptions = {2: doubled, 1: doubled} if updates_at is None else dict(updates_at)
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
                    replace(
                        training,
                        num_updates=exceptions.get(n, training.num_updates),
                        learning_rate=rates.get(n, training.learning_rate),
                    ),
                )
                for n, k in zip(steps[1:], factors, strict=True)
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
