"""Appendix C compares DDIM with standard integrators of the probability-flow ODE."""

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar, Final, final

import torch
from torch import Tensor

from halfstep.metrics import rmse
from halfstep.report.study_figure import Panel
from halfstep.report.words import number
from halfstep.samplers import DDIM, RK4, DPMSolverPP2M, Euler, Heun, LogSNR, Midpoint, Sampler
from halfstep.samplers import sample as draw
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.scales import Scale
from halfstep.studies.show import curves, figure_of

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
"""The number of RK4 steps of the reference solution."""
COMPARED: Final = 128
"""The number of solutions to compare. Each starts from different noise."""


def _solution(bench: Bench, num_steps: int, sampler: Sampler) -> Tensor:
    """Return the teacher's samples without clipping x0, because clipping would change the ODE."""
    teacher, seeds = bench.model(bench.teacher), list(range(COMPARED))
    return draw(teacher.denoiser, teacher.noise(seeds), num_steps, sampler, teacher.cond(seeds))


@lru_cache(maxsize=1)
def _exact(bench: Bench) -> Tensor:
    return _solution(bench, EXACT_STEPS, RK4())


def _trial(name: str, num_steps: int) -> Trial:
    def work(bench: Bench) -> Figures:
        sampler = METHODS[name]
        result = bench.measured(bench.teacher, num_steps, sampler)
        ours = _solution(bench, num_steps, sampler)
        error = rmse(ours, _exact(bench)) if bool(torch.isfinite(ours).all()) else None
        return {"distance": result.frechet, "evals": result.num_evals, "error": error}

    return Trial({"method": name, "steps": num_steps}, work)


@final
@studies.register("integrators")
class Integrators(Study):
    """Appendix C of the paper: DDIM, Euler, midpoint, Heun, RK4 and DPM-Solver++ on one teacher."""

    title: ClassVar[str] = "Appendix C: integrators of the probability-flow ODE"
    question: ClassVar[str] = "Is DDIM just another integrator, or a better one?"
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
            f"Each entry shows the Frechet distance of {scale.recipe.evaluation.num_samples:,} samples, followed by "
            f"the root mean square error relative to the solution of the ODE (RK4 with {EXACT_STEPS} steps) from the "
            f"same {COMPARED} noise samples, without clipping x0. Brackets show the number of network calls if it "
            "differs from the number of steps. The data and the network are those of the recipe "
            f"`{scale.recipe.name}`. The study sets the number of updates of the teacher. The paper's numbers could "
            "not be verified, so they are not shown.",
        )
        return Table(("method", *(f"{count} steps" for count in steps)), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        names = {name: name for name in METHODS}
        quality, error = (curves(rows, names, "evals", figure) for figure in ("distance", "error"))
        return [
            Panel("ours: quality", "network calls", "Frechet distance", quality),
            Panel("ours: error of the solution", "network calls", "rmse to the exact solution", error),
        ]
