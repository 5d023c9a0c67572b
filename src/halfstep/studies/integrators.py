"""Appendix C: DDIM against the standard integrators of the probability-flow ODE."""

from collections.abc import Sequence
from typing import ClassVar, Final, final

import torch

from halfstep.metrics import rmse
from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel
from halfstep.report.words import number
from halfstep.samplers import DDIM, RK4, DPMSolverPP2M, Euler, Heun, LogSNR, Midpoint, Sampler
from halfstep.samplers import sample as draw
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.scales import Scale
from halfstep.studies.show import figure_of

METHODS: Final[dict[str, Sampler]] = {
    "DDIM": DDIM(),
    "Euler, in the angle": Euler(),
    "Euler, in log-SNR": Euler(LogSNR()),
    "midpoint": Midpoint(),
    "Heun": Heun(),
    "RK4": RK4(),
    "RK4, in log-SNR": RK4(LogSNR()),
    "DPM-Solver++(2M)": DPMSolverPP2M(),
}
EXACT_STEPS: Final = 256
"""Steps of RK4 whose result stands for the exact solution of the ODE."""
COMPARED: Final = 128
"""Noises from which solutions are compared."""


def _trial(name: str, num_steps: int) -> Trial:
    def work(bench: Bench) -> Figures:
        sampler = METHODS[name]
        result = bench.measured(bench.teacher(), num_steps, sampler)
        teacher = bench.model(bench.teacher())
        # The error against the ODE is that of the bare denoiser: clipping x0 would make another ODE of it.
        seeds = list(range(COMPARED))
        noise, cond = teacher.noise(seeds), teacher.cond(seeds)
        exact = bench.once("exact", lambda: draw(teacher.denoiser, noise, EXACT_STEPS, RK4(), cond))
        ours = draw(teacher.denoiser, noise, num_steps, sampler, cond)
        error = rmse(ours, exact) if bool(torch.isfinite(ours).all()) else None
        return {"distance": result.frechet, "evals": result.num_evals, "error": error}

    return Trial({"method": name, "steps": num_steps}, work)


@final
@studies.register("integrators")
class Integrators(Study):
    """DDIM, Euler, midpoint, Heun, RK4 and DPM-Solver++ on one teacher: the question of the paper's appendix C."""

    title: ClassVar[str] = "Appendix C: integrators of the probability-flow ODE"
    question: ClassVar[str] = "Is DDIM only another integrator, or a better one?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "steps")

    def trials(self, scale: Scale) -> list[Trial]:
        return [_trial(name, steps) for name in METHODS for steps in scale.steps if steps >= 4]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        steps = sorted({row.axes["steps"] for row in rows})
        lines = []
        for name in METHODS:
            line = [name]
            for count in steps:
                distance = number(figure_of(rows, "distance", method=name, steps=count))
                error = number(figure_of(rows, "error", method=name, steps=count))
                evals = figure_of(rows, "evals", method=name, steps=count)
                line.append(f"{distance}; {error}" + ("" if evals in (None, count) else f" [{evals:g}]"))
            lines.append(line)
        notes = (
            f"Each entry: Frechet distance of {scale.recipe.evaluation.num_samples:,} samples; root mean square error "
            f"against the solution of the ODE (RK4 in {EXACT_STEPS} steps) from the same {COMPARED} noises, x0 not "
            "clipped; in brackets the network calls where they are not the steps. Recipe "
            f"`{scale.recipe.name}`. The numbers of the paper's appendix could not be verified, so none are shown.",
        )
        return Table(("method", *(f"{count} steps" for count in steps)), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        def curves(figure: str) -> list[Curve]:
            found = []
            for name in METHODS:
                own = [row for row in rows if row.axes["method"] == name and row.figures.get(figure) is not None]
                found.append(Curve.through(name, sorted((row.figures["evals"], row.figures[figure]) for row in own)))
            return found

        return [
            Panel("ours: quality", "network calls", "Frechet distance", curves("distance")),
            Panel("ours: error of the solution", "network calls", "rmse to the exact solution", curves("error")),
        ]
