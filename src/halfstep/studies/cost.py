"""The cost of distillation relative to training the teacher, in updates, network calls and seconds."""

from collections.abc import Sequence
from typing import ClassVar, final

from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel
from halfstep.report.words import number
from halfstep.studies.base import Bench, Figures, Finding, Study, Table, Trial, studies
from halfstep.studies.published import COST
from halfstep.studies.sampling import students_of
from halfstep.studies.scales import Scale
from halfstep.studies.show import figure_of

TEACHER = "base training"


def _trial(scale: Scale, part: str, end: int | None) -> Trial:
    def work(bench: Bench) -> Figures:
        if end is None:
            done = [(bench.teacher.manifest(verify=False), scale.recipe.teacher_plan().stages[0].update_cost)]
        else:
            costs = {stage.num_steps: stage.update_cost for stage in scale.recipe.chain_plan().stages}
            students = {steps: stage for steps, stage in bench.chain.items() if steps >= end}
            done = [(stage.manifest(verify=False), costs[steps]) for steps, stage in students.items()]
        return {
            "updates": sum(manifest.num_updates for manifest, _ in done),
            "forward_passes": sum(manifest.num_updates * cost for manifest, cost in done),
            "seconds": sum(manifest.seconds for manifest, _ in done),
        }

    return Trial({"part": part}, work)


def _parts(scale: Scale) -> dict[str, int | None]:
    students = students_of(scale)
    ends = sorted({min((n for n in students if n >= 4), default=students[-1]), students[-1]}, reverse=True)
    return {TEACHER: None} | {f"distillation to {end}": end for end in ends}


@final
@studies.register("cost")
class Cost(Study):
    """Section 5.2 of the paper: the updates, network calls and seconds of distillation and of base training."""

    title: ClassVar[str] = "The cost of distillation"
    question: ClassVar[str] = "Does distilling to four steps cost no more than training the teacher?"
    uses: ClassVar[tuple[str, ...]] = ("recipe",)

    def trials(self, scale: Scale) -> list[Trial]:
        return [_trial(scale, part, end) for part, end in _parts(scale).items()]

    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        lines = []
        base = {name: figure_of(rows, name, part=TEACHER) for name in ("updates", "forward_passes", "seconds")}
        for part in _parts(scale):
            line = [f"ours: {part}"]
            for name, whole in base.items():
                value = figure_of(rows, name, part=part)
                share = "" if not whole or value is None or part == TEACHER else f" ({value / whole:.2f})"
                line.append(f"{number(value)}{share}")
            lines.append(line)
        for data, (train, to_4, to_1) in COST.items():
            lines.append([f"paper, {data}: {TEACHER}", f"{train:,}", "–", "–"])
            for end, updates in ((4, to_4), (1, to_1)):
                told = f"{updates:,} ({updates / train:.2f})"
                lines.append([f"paper, {data}: distillation to {end}", told, "–", "–"])
        notes = (
            "Brackets show the ratio to base training. Network calls are counted per sample, with a backward pass as "
            "two calls and a teacher step as one call. The data and the network are those of the recipe "
            f"`{scale.recipe.name}`. The study sets the numbers of updates for base training and distillation, and "
            f"therefore their ratio. Its chain starts from {scale.recipe.chain.start_steps} DDIM steps. The second "
            "line for each data set is the paper's claim.",
        )
        return Table(("part", "updates", "network calls", "seconds"), lines, notes)

    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        parts = list(_parts(scale))
        series = []
        for name, label in (("updates", "updates"), ("forward_passes", "network calls"), ("seconds", "seconds")):
            whole = figure_of(rows, name, part=TEACHER)
            values = [value for part in parts if (value := figure_of(rows, name, part=part)) is not None]
            if whole and len(values) == len(parts):
                series.append(Curve.through(label, enumerate(value / whole for value in values)))
        theirs = [
            Curve.through(data, enumerate((1.0, to_4 / train, to_1 / train)))
            for data, (train, to_4, to_1) in COST.items()
        ]
        labels = [TEACHER, "to 4", "to 1"]
        return [
            Panel("ours", "", "ratio to base training", series, parts, log_y=False),
            Panel("the paper, updates", "", "ratio to base training", theirs, labels, log_y=False),
        ]
