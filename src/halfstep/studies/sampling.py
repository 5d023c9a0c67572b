"""Table 2 and figures 4 and 6 compare the students of a chain with samplers of its undistilled teacher."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import ClassVar, final

from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel
from halfstep.report.words import number
from halfstep.samplers import samplers
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.published import FIGURE_4, TABLE_2
from halfstep.studies.scales import Scale
from halfstep.studies.show import NAMES, curves, figure_of

STEPS_LABEL = "sampler steps"


def _named(*methods: str) -> dict[str, str]:
    return {method: NAMES[method] for method in methods}


def _trial(method: str, axis: str, value: int, num_steps: int) -> Trial:
    def work(bench: Bench) -> Figures:
        stage = bench.chain[num_steps] if method.startswith("student") else bench.teacher
        if method.endswith("ancestral"):
            result = bench.tuned(stage, num_steps)
        else:
            result = bench.measured(stage, num_steps, None if method == "student" else samplers[method]())
        return {
            "distance": result.frechet,
            "kid": result.kid,
            "gamma": result.gamma,
            "steps": result.num_steps,
            "evals": result.num_evals,
            "seconds_per_1000": result.seconds_per_1000,
        }

    return Trial({"method": method, axis: value}, work)


def students_of(scale: Scale) -> list[int]:
    """Return the numbers of steps of the students in the scale's chain, in descending order."""
    return [stage.num_steps for stage in scale.recipe.chain_plan().stages if stage.num_steps is not None]


def most_steps(method: str, num_evals: int) -> int:
    """Return how many steps a sampler can take with `num_evals` network calls, or 0 if a single step needs more."""
    kind = samplers[method]()
    return next(steps for steps in count() if kind.num_evals(steps + 1) > num_evals)


def _distances(rows: Sequence[Finding], methods: Iterable[str], steps: int) -> list[str]:
    """Return the distance of each method as text, along with its best gamma if there is one."""
    texts = []
    for method in methods:
        gamma = figure_of(rows, "gamma", method=method, steps=steps)
        shown = number(figure_of(rows, "distance", method=method, steps=steps))
        texts.append(shown if gamma is None else f"{shown} (gamma {gamma:g})")
    return texts


def _protocol(scale: Scale) -> str:
    return (
        f"Our values are Frechet distances of {scale.recipe.evaluation.num_samples:,} samples. The data and the "
        f"network are those of the recipe `{scale.recipe.name}`. The study sets the numbers of updates, and its chain "
        f"starts from {scale.recipe.chain.start_steps} DDIM steps. Ancestral sampling uses the best of "
        f"{scale.gamma_levels} values of gamma for each number of steps."
    )


@final
@studies.register("table2")
class Table2(Study):
    """Table 2 of the paper: students and fast samplers of the teacher at equal numbers of network calls."""

    title: ClassVar[str] = "Table 2: fast samplers at equal network calls"
    question: ClassVar[str] = "What does distillation gain over the best samplers of the undistilled teacher?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "gamma_levels")
    methods: ClassVar = _named("student", "ddim", "ancestral", "heun", "dpmpp_2m")

    def trials(self, scale: Scale) -> list[Trial]:
        trials = []
        for evals in sorted(students_of(scale)):
            for method in self.methods:
                kind = method if method in samplers else "ddim"
                trials.append(_trial(method, "evals", evals, most_steps(kind, evals)))
        return trials

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        evals = sorted({row.axes["evals"] for row in rows})
        lines = []
        for method, name in self.methods.items():
            line = [name]
            for calls in evals:
                used = figure_of(rows, "evals", method=method, evals=calls)
                shown = number(figure_of(rows, "distance", method=method, evals=calls))
                line.append(shown if used in (None, calls) else f"{shown} ({used:g})")
            lines.append(line)
        for method, published in TABLE_2.items():
            others = ", ".join(f"{value:.2f} at {n}" for n, value in published.items() if n not in evals)
            line = [f"paper: {NAMES.get(method, method)}" + (f" ({others})" if others else "")]
            lines.append(line + [f"{published[n]:.2f}" if n in published else "–" for n in evals])
        notes = (
            _protocol(scale) + " If a method cannot use exactly this number of network calls, brackets show the number "
            "that it uses. The paper's numbers are FIDs on CIFAR-10, which are not comparable with our distances.",
        )
        return Table(("network calls", *map(str, evals)), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        theirs = [Curve.through(NAMES.get(name, name), points.items()) for name, points in TABLE_2.items()]
        return [
            Panel("ours", "network calls", "Frechet distance", curves(rows, self.methods, "evals")),
            Panel("the paper, CIFAR-10", "network calls", "FID", theirs),
        ]


@final
@studies.register("steps")
class Steps(Study):
    """Figure 4 of the paper: quality against steps for students, DDIM and tuned ancestral sampling."""

    title: ClassVar[str] = "Figure 4: quality against steps"
    question: ClassVar[str] = "Down to how many steps do students keep the teacher's quality?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "gamma_levels", "steps")
    methods: ClassVar = _named("student", "ddim", "ancestral")

    def trials(self, scale: Scale) -> list[Trial]:
        trials = [_trial("student", "steps", steps, steps) for steps in students_of(scale)]
        return trials + [
            _trial(method, "steps", steps, steps) for method in ("ddim", "ancestral") for steps in scale.steps[::-1]
        ]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        steps = sorted({row.axes["steps"] for row in rows} | set(scale.steps))
        lines = []
        for num_steps in steps:
            theirs = [
                number(published[method].get(num_steps)) for published in FIGURE_4.values() for method in self.methods
            ]
            lines.append([str(num_steps), *_distances(rows, self.methods, num_steps), *theirs])
        names = list(self.methods.values())
        headings = ["steps", *names, *(f"paper, {data}: {name}" for data in FIGURE_4 for name in names)]
        notes = (
            _protocol(scale)
            + " The paper's numbers are FIDs, read off its figure with an accuracy of 0.5%. A dash marks a value that "
            "is unknown or above 20. The values of the paper's LSUN curves are unknown.",
        )
        return Table(headings, lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        ours = Panel("ours", STEPS_LABEL, "Frechet distance", curves(rows, self.methods, "steps"))
        theirs = {
            data: [Curve.through(NAMES[method], points.items()) for method, points in published.items()]
            for data, published in FIGURE_4.items()
        }
        return [ours, *(Panel(f"the paper, {data}", STEPS_LABEL, "FID", lines) for data, lines in theirs.items())]


@final
@studies.register("stochastic")
class Stochastic(Study):
    """Figure 6 of the paper: ancestral sampling of distilled students."""

    title: ClassVar[str] = "Figure 6: stochastic sampling from distilled students"
    question: ClassVar[str] = "Does noise help a student as much as it helps its teacher?"
    uses: ClassVar[tuple[str, ...]] = ("recipe", "gamma_levels")
    methods: ClassVar[dict[str, str]] = {
        "student": "distilled, DDIM",
        "student, ancestral": "distilled, ancestral",
        "ancestral": "undistilled, ancestral",
    }

    def trials(self, scale: Scale) -> list[Trial]:
        return [_trial(method, "steps", steps, steps) for steps in students_of(scale) for method in self.methods]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        steps = sorted({row.axes["steps"] for row in rows})
        lines = [[str(num_steps), *_distances(rows, self.methods, num_steps)] for num_steps in steps]
        notes = (
            _protocol(scale) + " A single step adds no noise, so with one step, both samplers are equal. "
            "The values in the paper's figure 6 (ImageNet 64x64) are unknown and therefore not shown.",
        )
        return Table(("steps", *self.methods.values()), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        return [Panel("ours", STEPS_LABEL, "Frechet distance", curves(rows, self.methods, "steps"))]
