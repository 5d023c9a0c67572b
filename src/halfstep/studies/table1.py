"""Table 1 compares parameterisations and weightings of undistilled models, with two samplers."""

from collections.abc import Sequence
from typing import ClassVar, final

from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel
from halfstep.runtime.failures import NonFinite
from halfstep.samplers import DDIM
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.published import TABLE_1
from halfstep.studies.scales import Scale
from halfstep.studies.show import spread, where

SAMPLERS = ("ancestral", "ddim")


def _trial(scale: Scale, prediction: str, weighting: str, seed: int) -> Trial:
    recipe, num_steps = scale.ablation, scale.ablation_steps
    axes = {"prediction": prediction, "weighting": weighting, "seed": seed}
    model = recipe.model.model_copy(update={"prediction": prediction, "weighting": weighting})
    own = recipe.model_copy(update={"model": model, "seed": seed})

    def work(bench: Bench) -> Figures:
        folder = bench.run(f"ablation-{prediction}-{weighting}-{seed}", own, "teacher")
        (trained,) = folder.stages()
        stochastic = bench.tuned(trained, num_steps, scale.ablation_gamma_levels)
        ddim = bench.measured(trained, num_steps, DDIM())
        noise = bench.noise_distance()
        if not min(ddim.frechet, stochastic.frechet) < noise:
            raise NonFinite(
                f"its samples are farther from the data ({ddim.frechet:.3g} with DDIM, {stochastic.frechet:.3g} with "
                f"ancestral sampling) than clipped noise ({noise:.3g})"
            )
        return {"ddim": ddim.frechet, "ancestral": stochastic.frechet, "gamma": stochastic.gamma}

    return Trial(axes, work)


@final
@studies.register("table1")
class Table1(Study):
    """Table 1 of the paper: parameterisation, weighting and sampler, over several seeds."""

    title: ClassVar[str] = "Table 1: parameterisation, weighting, sampler"
    question: ClassVar[str] = "Which output and weighting result in the best undistilled model?"
    uses: ClassVar[tuple[str, ...]] = ("ablation", "evaluation", "seeds", "ablation_gamma_levels", "ablation_steps")

    def trials(self, scale: Scale) -> list[Trial]:
        return [
            _trial(scale, prediction, weighting, seed)
            for seed in range(scale.seeds)
            for prediction, weighting in TABLE_1
        ]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        lines = []
        for (prediction, weighting), published in TABLE_1.items():
            found = where(rows, prediction=prediction, weighting=weighting)
            diverged = [row for row in found if "diverged" in row.figures]
            ours = [spread([row.figures[s] for row in found if s in row.figures]) for s in SAMPLERS]
            if diverged:
                mark = "diverges" if len(diverged) == len(found) else f"diverges in {len(diverged)} of {len(found)}"
                ours = [mark if value == "–" else f"{value} ({mark})" for value in ours]
            theirs = ["diverges"] * 2 if published is None else [f"{value:.2f}" for value in published]
            lines.append([f"{prediction}, {weighting}", ours[0], ours[1], *theirs])
        notes = (
            f"Our values are Frechet distances of {scale.recipe.evaluation.num_samples:,} samples with "
            f"{scale.ablation_steps} steps, as the mean ± standard deviation over {scale.seeds} seeds. Ancestral "
            f"sampling uses the best of {scale.ablation_gamma_levels} values of gamma. The paper's values are FIDs on "
            "unconditional CIFAR-10, as the mean over 3 seeds. Metrics and data differ, so compare rankings and not "
            "numbers.",
            "A cell counts as diverged if the loss or a sample is not finite, or if the samples are farther from the "
            "data than clipped unit noise.",
        )
        return Table(("output, weighting", "ancestral", "DDIM", "paper: stochastic", "paper: DDIM"), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        labels = [f"{prediction}, {weighting}" for prediction, weighting in TABLE_1]
        ours = []
        for name, label in zip(SAMPLERS, ("ancestral, tuned", "DDIM"), strict=True):
            points = []
            for index, (prediction, weighting) in enumerate(TABLE_1):
                found = where(rows, prediction=prediction, weighting=weighting)
                if values := [float(row.figures[name]) for row in found if name in row.figures]:
                    points.append((float(index), sum(values) / len(values)))
            ours.append(Curve.through(label, points))
        theirs = []
        for place, label in enumerate(("stochastic", "DDIM")):
            known = [(float(i), value[place]) for i, value in enumerate(TABLE_1.values()) if value is not None]
            theirs.append(Curve.through(label, known))
        return [
            Panel("ours", "", "Frechet distance", ours, labels, log_y=False),
            Panel("the paper, CIFAR-10", "", "FID", theirs, labels, log_y=False),
        ]
