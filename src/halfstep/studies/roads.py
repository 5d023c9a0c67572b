"""The study `roads` compares, at equal cost, methods that distil one teacher to a few steps.

A student's cost is the number of forward passes in all stages from the teacher to this student, including those of
auxiliary networks, as counted by `Stage.update_cost`. A scale sets the cost of each student (8, 4, 2 and 1 steps), and
`funded` converts this cost to updates. A chain to 1 step contains all four students. Each of them costs the same as a
student that is trained directly from the teacher.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import fmean
from typing import ClassVar, Final, final

from halfstep.measure.evaluate import Method
from halfstep.metrics import rmse
from halfstep.objectives import (
    Consistency,
    Finishing,
    Halving,
    MomentMatching,
    Objective,
    Outcome,
    Plan,
    Role,
    Stage,
    Training,
    parents_of,
)
from halfstep.report.study_figure import Panel
from halfstep.report.words import count, number
from halfstep.runs import StageFolder
from halfstep.samplers import DDIM, Heun, Sampler, samplers
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.sampling import most_steps
from halfstep.studies.scales import Scale
from halfstep.studies.show import curves, spread, where

AT_BEST: Final = (Method(DDIM(), 256), Method(Heun(), 32))
"""Two ways to sample the teacher. The better of the two is the teacher at its best. Same-noise comparisons use the
second."""
HEUN_STEPS: Final = 2
"""The number of Heun steps that the teacher takes for each step of the first student."""


@final
@dataclass(frozen=True)
class Leg:
    """A stage whose number of updates is not known yet."""

    objective: Callable[[int], Objective]
    """Maps the number of updates to the objective. The cost of an update must not depend on this number."""
    training: Training
    passes: float
    """The number of forward passes in all stages from the teacher up to and including this stage."""


def funded(legs: Sequence[Leg]) -> Plan:
    """Return the stages with as many updates as their forward passes allow, but at least one update per stage.

    Each stage compensates for the rounding of the stages before it, so each total is exact to within half an update.
    """
    stages: list[Stage] = []
    for leg in legs:
        blank = Stage(leg.objective(1), leg.training)
        *before, _ = ways([*stages, blank])[-1]
        updates = max(1, round((leg.passes - passes_of(stages[place] for place in before)) / blank.update_cost))
        warmup = min(leg.training.warmup_updates, updates)
        training = replace(leg.training, num_updates=updates, warmup_updates=warmup)
        stages.append(Stage(leg.objective(updates), training))
    return Plan(tuple(stages))


def ways(stages: Sequence[Stage]) -> list[tuple[int, ...]]:
    """Return, for each stage, the indices of the stages from the undistilled teacher to this stage, inclusive."""
    models = [Outcome(Role.TEACHER)]
    found: list[tuple[int, ...]] = [()]
    for place, stage in enumerate(stages):
        parents = parents_of(stage.objective, models)
        assert parents is not None
        found.append((*found[parents.start], place))
        models.append(stage.objective.outcome)
    return found[1:]


def passes_of(stages: Iterable[Stage]) -> float:
    """Return the total number of forward passes of the stages."""
    return sum(stage.training.num_updates * stage.update_cost for stage in stages)


def _halving(scale: Scale, steps: Sequence[int], share: float = 1.0) -> list[Leg]:
    """Return the recipe's chain. Up to the first student in `steps`, the updates keep their proportions."""
    stages = scale.recipe.chain_plan().stages
    before = [stage for stage in stages if (stage.num_steps or 0) >= steps[0]]
    scaled = share * scale.roads.passes[steps[0]] / passes_of(before)
    legs = [_as_leg(stage, scaled * passes_of(before[: place + 1])) for place, stage in enumerate(before)]
    return legs + _halves(scale, steps, share)


def _second_order(scale: Scale, steps: Sequence[int], share: float = 1.0) -> list[Leg]:
    """Return a chain whose first stage learns from Heun steps of the teacher."""
    first = Halving(steps[0], HEUN_STEPS, teacher_sampler=Heun())
    training = _stage_of(scale, steps[0]).training
    return [_as_leg(Stage(first, training), share * scale.roads.passes[steps[0]]), *_halves(scale, steps, share)]


def _halves(scale: Scale, steps: Sequence[int], share: float) -> list[Leg]:
    """Return the stages that lead from each number in `steps` to the next."""
    legs = []
    for before, after in pairwise(steps):
        stage = _stage_of(scale, after)
        halving = Halving(after, before // after)
        legs.append(_as_leg(replace(stage, objective=halving), share * scale.roads.passes[after]))
    return legs


def _stage_of(scale: Scale, steps: int) -> Stage:
    """Return the stage of the recipe's chain that trains the student with `steps` steps.

    Raises:
        ValueError: if the chain has no such student.
    """
    stages = scale.recipe.chain_plan().stages
    for stage in stages:
        if stage.num_steps == steps:
            return stage
    made = ", ".join(str(stage.num_steps) for stage in stages)
    raise ValueError(
        f"the `roads` study needs a student with {steps} steps, but the recipe {scale.recipe.name} only has students "
        f"with {made} steps. Choose another recipe"
    )


def _as_leg(stage: Stage, passes: float) -> Leg:
    return Leg(lambda updates: stage.objective, stage.training, passes)


def _finished(scale: Scale, steps: Sequence[int]) -> list[Leg]:
    """Return the second-order chain and a finish for each student. The finish takes a share of the student's passes."""
    settings = scale.roads

    def finishing(number: int) -> Callable[[int], Objective]:
        # The default number of lead updates, which only train the auxiliary denoiser, would take up most of a short
        # finish.
        return lambda updates: Finishing(number, lead_updates=0)

    finishes = [Leg(finishing(number), settings.finish, settings.passes[number]) for number in steps]
    return _second_order(scale, steps, 1 - settings.finish_share) + finishes


def _consistency(scale: Scale, steps: Sequence[int]) -> list[Leg]:
    settings = scale.roads
    coarse, fine = settings.grid

    def consistency(number: int) -> Callable[[int], Objective]:
        return lambda updates: Consistency(number, max(coarse, 2 * number), fine, max(1, updates // 2))

    return [Leg(consistency(number), settings.consistency, settings.passes[number]) for number in steps]


def _moments(scale: Scale, steps: Sequence[int]) -> list[Leg]:
    settings = scale.roads
    return [_as_leg(Stage(MomentMatching(number), settings.moments), settings.passes[number]) for number in steps]


@final
@dataclass(frozen=True)
class Road:
    """A method of distillation."""

    label: str
    legs: Callable[[Scale, Sequence[int]], list[Leg]]
    """A function that returns the stages for students with the given numbers of steps, in descending order."""
    is_chain: bool = True
    """Whether one run trains all students. If not, each student is trained directly from the teacher."""

    def plan(self, scale: Scale, steps: int) -> Plan:
        """Return the plan of the run that trains the student with `steps` steps."""
        return funded(self.legs(scale, scale.roads.steps if self.is_chain else (steps,)))


ROADS: Final = {
    "halving": Road("halving, the paper's chain", _halving),
    "second_order": Road("halving, first stage with Heun", _second_order),
    "finish": Road("the same, each student finished", _finished),
    "consistency": Road("consistency, straight", _consistency, is_chain=False),
    "consistency_chain": Road("consistency, 8 to 1", _consistency),
    "moments": Road("moment matching, straight", _moments, is_chain=False),
}
"""The methods by their names in the study's JSON. Each method is a curve in the figure."""
TEACHERS: Final = {"ddim": "teacher, DDIM", "heun": "teacher, Heun"}
"""The samplers of the undistilled teacher that are compared at equal numbers of network calls."""
LABELS: Final = {name: road.label for name, road in ROADS.items()} | TEACHERS


def _road(scale: Scale, name: str, steps: int, seed: int) -> Trial:
    road = ROADS[name]
    plan = road.plan(scale, steps)
    way = way_to(plan, steps)

    def work(bench: Bench) -> Figures:
        run = f"road-{name}-{seed}" if road.is_chain else f"road-{name}-{steps}-{seed}"
        stages = bench.distil(run, plan, seed).stages()[1:]
        return {
            "passes": round(passes_of(plan.stages[place] for place in way)),
            "updates": sum(plan.stages[place].training.num_updates for place in way),
            "seconds": sum(stages[place].manifest(verify=False).seconds for place in way),
            **_measured(bench, stages[way[-1]], None, steps, seed),
        }

    return Trial({"method": name, "evals": steps, "seed": seed}, work)


def way_to(plan: Plan, steps: int) -> tuple[int, ...]:
    """Return the indices of the stages that lead to the last student with `steps` steps, including its own stage."""
    return next(
        way for stage, way in zip(plan.stages[::-1], ways(plan.stages)[::-1], strict=True) if stage.num_steps == steps
    )


def _teacher(method: Method, evals: int, seed: int) -> Trial:
    def work(bench: Bench) -> Figures:
        return _measured(bench, bench.teacher, method.sampler, method.num_steps, seed)

    return Trial({"method": samplers.name_of(method.sampler), "evals": evals, "seed": seed}, work)


def _measured(bench: Bench, stage: StageFolder, sampler: Sampler | None, steps: int, seed: int) -> Figures:
    result = bench.measured(stage, steps, sampler, noise=seed)
    best = AT_BEST[-1]
    pair = (
        bench.samples(stage, steps, sampler, noise=seed),
        bench.samples(bench.teacher, best.num_steps, best.sampler, noise=seed),
    )
    return {
        "distance": result.frechet,
        "kid": result.kid,
        "precision": result.precision,
        "recall": result.recall,
        "coverage": result.coverage,
        "same_noise": rmse(*pair),
        "seconds_per_1000": result.seconds_per_1000,
    }


def _methods(scale: Scale) -> list[tuple[Method, int]]:
    """Return the teacher's sampling methods, each with the number of network calls at which the method is shown."""
    equal = [
        (Method(samplers[name](), most_steps(name, evals)), evals) for name in TEACHERS for evals in scale.roads.steps
    ]
    return equal + [(method, method.num_evals) for method in AT_BEST]


COLUMNS: Final = {
    "distance": "distance",
    "kid": "KID",
    "precision": "precision",
    "recall": "recall",
    "coverage": "coverage",
    "same_noise": "same-noise distance",
    "updates": "updates",
    "seconds": "seconds of training",
    "seconds_per_1000": "seconds per 1,000 samples",
}
"""The column headings for the metrics of a trial."""


def _values(rows: Sequence[Finding], figure: str, method: str, evals: int) -> list[float]:
    found = [row.figures.get(figure) for row in where(rows, method=method, evals=evals)]
    return [float(value) for value in found if value is not None]


def _best(rows: Sequence[Finding]) -> float | None:
    """Return the distance of the teacher at its best, averaged over the seeds."""
    known = (_values(rows, "distance", samplers.name_of(one.sampler), one.num_evals) for one in AT_BEST)
    return min((fmean(values) for values in known if values), default=None)


@final
@studies.register("roads")
class Roads(Study):
    """Halving, finishing, consistency and moment matching from one teacher at equal cost, over several seeds."""

    title: ClassVar[str] = "Roads: methods of distillation at equal cost"
    question: ClassVar[str] = "Which method trains the best students with 8, 4, 2 and 1 steps at equal cost?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "road_seeds", "roads")

    def trials(self, scale: Scale) -> list[Trial]:
        trials = []
        for seed in range(scale.road_seeds):
            trials += [_teacher(method, evals, seed) for method, evals in _methods(scale)]
            trials += [_road(scale, name, steps, seed) for name in ROADS for steps in scale.roads.steps]
        return trials

    def costs(self, scale: Scale) -> dict[str, float]:
        samples = scale.recipe.evaluation.num_samples * scale.road_seeds
        costs = {"teacher": passes_of(scale.recipe.teacher_plan().stages)}
        for name, road in ROADS.items():
            plans = {road.plan(scale, steps) for steps in scale.roads.steps}
            costs[name] = scale.road_seeds * sum(passes_of(plan.stages) for plan in plans)
        drawn = len(ROADS) * sum(scale.roads.steps) + sum(
            method.num_evals for method in {method for method, _ in _methods(scale)}
        )
        return costs | {"samples": samples * drawn}

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        lines = []
        for method, label in LABELS.items():
            for evals in sorted({row.axes["evals"] for row in where(rows, method=method)}, reverse=True):
                line = [f"{label}, {evals}"]
                for figure in COLUMNS:
                    values = _values(rows, figure, method, evals)
                    mean = number(fmean(values) if values else None)
                    line.append(spread(values) if figure == "distance" else mean)
                failed = [row for row in where(rows, method=method, evals=evals) if "diverged" in row.figures]
                line[1] += f" (diverges in {len(failed)})" if failed else ""
                lines.append(line)
        settings = scale.roads
        budget = ", ".join(f"{settings.passes[steps]:,} ({count(steps, 'step')})" for steps in settings.steps)
        notes = (
            f"The distance is the Frechet distance of {scale.recipe.evaluation.num_samples:,} samples, as the mean "
            f"± standard deviation over {scale.road_seeds} seeds. The data and the network are those of the recipe "
            f"`{scale.recipe.name}`. The study sets the numbers of updates, and the paper's chain starts from "
            f"{scale.recipe.chain.start_steps} DDIM steps. All seeds share one teacher, and each seed has different "
            "training and sampling noise. The number after a method is the number of network calls per sample, which "
            "is the number of steps for a student. Heun takes as many steps as this number of calls allows.",
            "At equal cost, the stages that lead to a student take a fixed number of single-sample forward passes, "
            f"exact to within half an update: {budget}. A backward pass counts as two forward passes, and auxiliary "
            "networks are included. The seconds of training include only these stages.",
            "The same-noise distance is the root mean square difference from the teacher's samples with "
            f"{AT_BEST[-1].num_steps} Heun steps. It is not meaningful for moment-matching students with more than "
            "1 step, because they draw new noise at each step except the last.",
        )
        return Table(("method, network calls", *COLUMNS.values()), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        best = _best(rows)
        level = None if best is None else ("teacher at its best", best)
        rows = [row for row in rows if row.axes["evals"] in scale.roads.steps]
        quality, same_noise = (curves(rows, LABELS, "evals", figure) for figure in ("distance", "same_noise"))
        return [
            Panel("quality", "network calls", "Frechet distance", quality, level=level),
            Panel("map from noise to sample", "network calls", "same-noise distance", same_noise),
        ]
