"""The plan, which describes a chain of stages.

A stage consists of an objective and the hyperparameters of the student's optimiser. A chain of halvings is a plan with
one stage per student.

Source of the defaults: Salimans & Ho 2022 (arXiv:2202.00512), section 5.2 and appendix; the authors' configurations.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Final, NamedTuple, final

from halfstep.core.door import check_instance, check_whole, got
from halfstep.core.grids import check_num_steps
from halfstep.core.prediction import TruncatedSNR, Weighting
from halfstep.objectives.adversarial import Adversarial
from halfstep.objectives.base import STUDENT, Objective, Outcome, Role, Training
from halfstep.objectives.finishing import Finishing
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.halving import Halving
from halfstep.samplers import DDIM, Sampler

HALVING: Final = Training(num_updates=50_000, learning_rate=5e-5)
"""The paper's hyperparameters for a student: no warm-up, and a learning rate that decays linearly to 0."""

FINISHING: Final = Training(
    num_updates=260, batch_size=64, learning_rate=2e-5, adam_betas=(0.0, 0.99), grad_clip=1.0, ema_decay=0.98
)
"""Hyperparameters for finishing a student. `num_updates` includes updates that train only the auxiliary denoiser."""


@final
@dataclass(frozen=True)
class Stage:
    """One stage of a plan. In a halving stage, the student starts as a copy of the teacher, with a new optimiser.

    Raises:
        ValueError: if the student has no turn in any update.
    """

    objective: Objective
    training: Training

    def __post_init__(self) -> None:
        check_instance("the objective", self.objective, Objective, "halfstep.Halving(4)")
        check_instance("training", self.training, Training, "halfstep.Training(num_updates=2000, learning_rate=2e-4)")
        updates = range(self.training.num_updates)
        # The updates are checked in reverse, because the student almost always has a turn in the last one.
        if not any(turn.trains == STUDENT for update in reversed(updates) for turn in self.objective.turns(update)):
            raise ValueError(
                f"a stage of {type(self.objective).__name__} ends before its student's first turn, because num_updates "
                f"is {len(updates)}. Increase num_updates, or decrease lead_updates"
            )

    @property
    def num_steps(self) -> int | None:
        """The number of sampler steps that the stage's model is trained for, or None if any number works."""
        return self.objective.outcome.num_steps

    @property
    def update_cost(self) -> float:
        """The cost of one update of the whole batch, in single-sample forward passes."""
        return sum(evals.cost for evals in self.objective.evals.values()) * self.training.batch_size


class Parents(NamedTuple):
    """The models that a stage builds on, as indices into the models of earlier stages."""

    start: int
    """The model whose weights the student starts from."""
    teacher: int
    """The model that the student learns from."""


def parents_of(objective: Objective, models: Sequence[Outcome]) -> Parents | None:
    """Return the parents of a stage among the models of earlier stages, or None for the first stage.

    Raises:
        ValueError: if the earlier stages do not provide the models that the objective needs.
    """
    if not models:
        return None
    start = teacher = len(models) - 1
    name = objective.label
    if objective.refines:
        _, steps, sampler = objective.outcome
        same = [place for place, model in enumerate(models) if model == objective.outcome]
        if not same:
            students = [model for model in models if model.role is Role.STUDENT and model.sampler == sampler]
            made = sorted({model.num_steps for model in students if model.num_steps}, reverse=True)
            known = f"no student before it samples with {type(sampler).__name__}"
            if made:
                known = f"the students before it take {', '.join(map(str, made))} steps"
            raise ValueError(
                f"the stage {name} refines a {steps}-step student, but {known}. Choose an earlier student's number of "
                "steps"
            )
        start = same[-1]
    if objective.learns_from_undistilled:
        whole = [place for place, model in enumerate(models) if model.role is not Role.STUDENT]
        if not whole:
            raise ValueError(
                f"the stage {name} learns from an undistilled teacher, but the chain starts from a student. Start the "
                "chain from that student's teacher"
            )
        teacher = whole[-1]
    inner = _without_critic(objective)
    role, known_steps, known_sampler = models[teacher]
    if role is Role.STUDENT and isinstance(inner, Halving):
        asked_steps, asked_sampler = inner.num_steps * inner.num_teacher_steps, inner.teacher_sampler
        if known_steps not in (None, asked_steps) or known_sampler != asked_sampler:
            raise ValueError(
                f"the stage {name} needs a teacher with {asked_steps} steps of {type(asked_sampler).__name__}, but the "
                f"student before it was distilled for {known_steps} steps of {type(known_sampler).__name__} and can "
                "take no others. Choose a chain that starts with that number of steps"
            )
    return Parents(start, teacher)


@final
@dataclass(frozen=True)
class Plan:
    """The stages of a run in execution order, each with a folder name."""

    stages: tuple[Stage, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.stages, tuple | list):
            raise ValueError(f"a plan must be a tuple of stages, got {got(self.stages)}. Pass (halfstep.Stage(...),)")
        for stage in self.stages:
            check_instance("a stage of a plan", stage, Stage, "halfstep.Stage(objective, training)")
        object.__setattr__(self, "stages", tuple(self.stages))

    def names(self, first: int = 0) -> list[str]:
        """Return the folder names, numbered from `first`: "00-denoise", "01-match", "02-halve-0128", ..."""
        names = []
        for index, stage in enumerate(self.stages, start=first):
            steps = "" if stage.num_steps is None else f"-{stage.num_steps:04d}"
            names.append(f"{index:02d}-{stage.objective.label}{steps}")
        return names

    @property
    def num_updates(self) -> int:
        """The total number of updates in all stages."""
        return sum(stage.training.num_updates for stage in self.stages)

    def __add__(self, other: "Plan") -> "Plan":
        return Plan(self.stages + other.stages)

    @property
    def start_steps(self) -> int | None:
        """The number of teacher steps per sample in the first halving stage, or None if no stage halves."""
        objectives = (_without_critic(stage.objective) for stage in self.stages)
        first = next((objective for objective in objectives if isinstance(objective, Halving)), None)
        return None if first is None else first.num_steps * first.num_teacher_steps

    @property
    def learned(self) -> tuple[Guidance, ...]:
        """The guidance of each stage that has guidance, in order."""
        return tuple(stage.objective.guidance for stage in self.stages if stage.objective.guidance is not None)

    def guided(self, guidance: Guidance | None) -> "Plan":
        """Return the plan, adapted to teachers that have learned `guidance`."""
        if guidance is None:
            return self
        return self.changed(lambda objective: _guided(objective, guidance))

    def embedded(self) -> "Plan":
        """Return the plan, adapted to a teacher whose network takes a guidance scale but has not learned guidance.

        Such a teacher's samples are guided, so the default data weight of a finish is 0.
        """
        return self.changed(_keeping_to_teacher)

    def changed(self, change: Callable[[Objective], Objective]) -> "Plan":
        """Return the plan with every objective replaced; `plan.changed(Adversarial)` adds a critic to each stage."""
        return Plan(tuple(replace(stage, objective=change(stage.objective)) for stage in self.stages))

    @classmethod
    def of(cls, objective: Objective, training: Training) -> "Plan":
        """Return a plan with one stage."""
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
        teacher_sampler: Sampler | None = None,
        teacher_steps: int | None = None,
    ) -> "Plan":
        """Return the chain start -> start / 2 -> ... -> end, with one halving stage per student.

        For the first student, the teacher may use another sampler or take more steps. A student that teaches the next
        student uses DDIM, the sampler for which it was distilled.

        Args:
            start: number of steps of the first teacher; the first student takes half as many.
            end: number of steps of the last student.
            training: hyperparameters of each stage. The paper uses no warm-up. Without one, the first update of a new
                Adam optimiser moves every weight by the full learning rate, and a short stage does not recover from
                that.
            factor: number of teacher steps that one student step replaces, in every stage.
            students: step counts of all students, such as 8, 2, 1; overrides `end` and `factor`.
            updates_at: maps a student's number of steps to a different number of updates. By default, the 2-step and
                1-step students get twice `training.num_updates`, as in the paper.
            learning_rate_at: maps a student's number of steps to a different learning rate.
            guidance: the guidance that the first teacher has learned.
            teacher_sampler: deterministic sampler of the first teacher; DDIM if None.
            teacher_steps: number of steps that the first teacher takes per step of the first student; None uses the
                chain's factor.

        Raises:
            ValueError: if `end` is not below `start`, the factors do not lead from `start` to `end`, `updates_at` or
                `learning_rate_at` contains a number of steps that is not in the chain, the sampler is stochastic, or a
                multistep sampler takes too few steps to differ from DDIM.
        """
        steps = [start, *students] if students is not None else divided(start, end, factor)
        factors = _factors(steps)
        doubled = 2 * training.num_updates
        exceptions = {2: doubled, 1: doubled} if updates_at is None else dict(updates_at)
        rates = dict(learning_rate_at or {})
        for name, given in (("updates_at", updates_at or {}), ("learning_rate_at", rates)):
            if foreign := sorted(set(given) - set(steps[1:])):
                raise ValueError(
                    f"{name} has an entry for {foreign[0]} steps, but the chain's students take {steps[1:]} steps. "
                    f"Use only these numbers as keys, or set {name} to None"
                )
        factors[0] = factors[0] if teacher_steps is None else teacher_steps
        stages: list[Stage] = []
        for number, each in zip(steps[1:], factors, strict=True):
            sampler = DDIM() if stages or teacher_sampler is None else teacher_sampler
            halving = Halving(number, each, weighting or TruncatedSNR(), guidance, sampler)
            updates, rate = exceptions.get(number, training.num_updates), rates.get(number, training.learning_rate)
            stages.append(Stage(halving, replace(training, num_updates=updates, learning_rate=rate)))
        return cls(tuple(stages))

    @classmethod
    def finishes(
        cls,
        steps: Sequence[int],
        training: Training = FINISHING,
        finishing: Callable[[int], Finishing] = Finishing,
    ) -> "Plan":
        """Return a plan with one finishing stage per number of steps, in the order of `steps`.

        Args:
            finishing: a function that maps a number of steps to the objective.

        Raises:
            ValueError: if a number is not a whole number of at least 1, or appears twice.
        """
        for number in steps:
            check_num_steps(number)
        if len(set(steps)) < len(steps):
            raise ValueError(
                f"a student can be finished only once, got {', '.join(map(str, steps))}. List each number once"
            )
        return cls(tuple(Stage(finishing(number), training) for number in steps))


def _without_critic(objective: Objective) -> Objective:
    """Return the objective inside an `Adversarial`, or any other objective unchanged."""
    return objective.objective if isinstance(objective, Adversarial) else objective


def _guided(objective: Objective, guidance: Guidance) -> Objective:
    """Return the objective with the guidance that the teacher has learned.

    Only student objectives are changed, whether wrapped or not. All others are returned unchanged.
    """
    if objective.outcome.role is not Role.STUDENT:
        return objective
    changes: dict[str, object] = {}
    for name in (setting.name for setting in fields(objective)):  # type: ignore[arg-type]
        if isinstance(wrapped := getattr(objective, name), Objective):
            changes[name] = _guided(wrapped, guidance)
        elif name == "guidance":
            changes[name] = guidance
    return replace(objective, **changes)  # type: ignore[type-var]


def _keeping_to_teacher(objective: Objective) -> Objective:
    """Return a finish with its default data weight replaced by 0. Return any other objective unchanged."""
    if isinstance(objective, Adversarial):
        return replace(objective, objective=_keeping_to_teacher(objective.objective))
    if isinstance(objective, Finishing) and objective.data_weight is None:
        return replace(objective, data_weight=0.0)
    return objective


def divided(start: int, end: int, factor: int) -> list[int]:
    """Return the steps of a chain: start, start / factor, ..., end.

    Raises:
        ValueError: if `end` is not below `start`, or cannot be reached by dividing by `factor`.
    """
    check_num_steps(start)
    check_num_steps(end)
    check_whole("the factor of a stage", factor, 2)
    if end >= start:
        raise ValueError(f"the end must be below the start, got a chain from {start} steps to {end}")
    steps = [start]
    while steps[-1] > end and steps[-1] % factor == 0:
        steps.append(steps[-1] // factor)
    if steps[-1] != end:
        near = end * factor
        while near < start:
            near *= factor
        how = "halved" if factor == 2 else f"divided repeatedly by {factor}"
        power = "two" if factor == 2 else str(factor)
        raise ValueError(
            f"{start} steps cannot be {how} to {end}. List the students' steps, or start from {end} times a "
            f"power of {power}, for example {near}"
        )
    return steps


def _factors(steps: Sequence[int]) -> list[int]:
    """Return the factor between each number of steps and the next.

    Raises:
        ValueError: if a number does not divide the previous number, or there are no students.
    """
    if len(steps) < 2:
        raise ValueError("the list of students is empty. List the steps of each student, such as 8, 2, 1")
    for number in steps:
        check_num_steps(number)
    for teacher, student in pairwise(steps):
        if student >= teacher or teacher % student:
            raise ValueError(
                f"a {student}-step student cannot follow a {teacher}-step teacher. The student's number of steps must "
                "divide the teacher's, with a factor of at least 2; the chain is "
                f"{', '.join(map(str, steps))}"
            )
    return [teacher // student for teacher, student in pairwise(steps)]
