"""The fast schedules of appendix E: fewer updates per stage, and stages that quarter the number of steps."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import ClassVar, final

from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel
from halfstep.report.words import number
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.scales import Scale
from halfstep.studies.show import spread, where


def students_by(start: int, factor: int) -> tuple[int, ...]:
    """Return the students' numbers of steps after `start`, down to 1.

    Each stage divides the number by `factor`, or reduces it to 1 if it is not divisible by `factor`.
    """
    steps = [start]
    while steps[-1] > 1:
        steps.append(steps[-1] // factor if steps[-1] % factor == 0 else 1)
    return tuple(steps[1:])


def shown(scale: Scale) -> list[int]:
    """Return the numbers of steps of the few-step students that all chains have in common, in descending order."""
    chains = [set(students_by(scale.recipe.chain.start_steps, factor)) for factor in scale.factors]
    return sorted((steps for steps in set.intersection(*chains) if steps <= 16), reverse=True)


def _trial(scale: Scale, factor: int, updates: int, rate: float, seed: int) -> Trial:
    # As in the paper, the number of updates is doubled at 2 steps and at 1 step, and all stages have the same learning
    # rate.
    training = scale.recipe.chain.training
    warmup = min(training.warmup_updates, updates)
    chain = scale.recipe.chain.model_copy(
        update={
            "factor": 2,
            "students": students_by(scale.recipe.chain.start_steps, factor),
            "training": replace(training, num_updates=updates, learning_rate=rate, warmup_updates=warmup),
            "updates_at": None,
            "learning_rate_at": None,
            "keep": tuple(shown(scale)),
        }
    )
    recipe = scale.recipe.model_copy(update={"chain": chain, "seed": seed})

    def work(bench: Bench) -> Figures:
        name = f"schedule-{factor}-{updates}-{rate:g}-{seed}"
        folder = bench.run(name, recipe, "chain")
        plan = recipe.chain_plan()
        passes = sum(one.training.num_updates * one.update_cost for one in plan.stages)
        figures: Figures = {"updates": plan.num_updates, "forward_passes": passes}
        for stage in folder.stages()[1:]:
            steps = stage.manifest(verify=False).num_steps
            if steps in shown(scale):
                figures[f"at {steps}"] = bench.measured(stage, steps).frechet
        return figures

    return Trial({"factor": factor, "updates": updates, "rate": rate, "seed": seed}, work)


def _best(rows: Sequence[Finding], steps: int) -> tuple[float | None, list[float]]:
    """Return the learning rate with the smallest mean distance, and the distance with this rate for each seed."""
    at_rate: dict[float, list[float]] = {}
    for row in rows:
        if f"at {steps}" in row.figures:
            at_rate.setdefault(float(row.axes["rate"]), []).append(float(row.figures[f"at {steps}"]))
    return min(sorted(at_rate.items()), key=lambda item: fmean(item[1]), default=(None, []))


@final
@studies.register("schedules")
class Schedules(Study):
    """The fast schedules of the paper: updates per stage, factors 2 and 4, and learning rates, over several seeds."""

    title: ClassVar[str] = "Fast schedules: updates per stage, and factor 2 or 4"
    question: ClassVar[str] = "How many updates does a stage need, and can it quarter the steps?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "seeds", "updates", "rates", "factors")

    def trials(self, scale: Scale) -> list[Trial]:
        return [
            _trial(scale, factor, updates, rate, seed)
            for seed in range(scale.seeds)
            for rate in scale.rates
            for updates in scale.updates
            for factor in scale.factors
        ]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        lines = []
        for factor in scale.factors:
            for updates in scale.updates:
                found = where(rows, factor=factor, updates=updates)
                total = next((row.figures["updates"] for row in found if "updates" in row.figures), None)
                line = [f"{factor}, {updates:,}", number(total)]
                for steps in shown(scale):
                    rate, values = _best(found, steps)
                    line.append(spread(values) + (f" (rate {rate:g})" if rate else ""))
                lines.append(line)
        notes = (
            f"The table shows Frechet distances of {scale.recipe.evaluation.num_samples:,} samples. The data and the "
            f"network are those of the recipe `{scale.recipe.name}`. The study sets the numbers of updates, and its "
            f"chains start from {scale.recipe.chain.start_steps} DDIM steps and end at 1 step. Each entry is the "
            f"mean ± standard deviation over {scale.seeds} seeds with the best of the learning rates "
            f"{', '.join(f'{rate:g}' for rate in scale.rates)}. All seeds share one teacher and the same sampling "
            "noise. Updates are doubled at 2 steps and at 1 step. The values of the paper's ablation are unknown and "
            "therefore not shown.",
        )
        students = (f"student at {steps}" for steps in shown(scale))
        return Table(("factor, updates per stage", "total updates", *students), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        panels = []
        for steps in shown(scale)[-2:]:
            curves = []
            for factor in scale.factors:
                points = []
                for updates in scale.updates:
                    found = where(rows, factor=factor, updates=updates)
                    _, values = _best(found, steps)
                    if values and "updates" in found[0].figures:
                        error = stdev(values) if len(values) > 1 else 0.0
                        points.append((float(found[0].figures["updates"]), fmean(values), error))
                curves.append(Curve.through(f"factor {factor}", points))
            panels.append(Panel(f"ours, student at {steps}", "updates of the whole chain", "Frechet distance", curves))
        return panels
