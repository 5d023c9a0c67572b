"""The figures that a run's own measurements hold (metrics.json): one table and one curve for each protocol.

Ratios are taken between figures of one protocol only. The teacher at 64 steps (or at its most, if it was not
measured there) is the measure of quality, the teacher at its most steps that of time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import RunFacts, StageFacts
from halfstep.report.words import count, flatten, ratio
from halfstep.runs import is_finite
from halfstep.runs.schema import Result

REFERENCE_STEPS = 64
"""Steps of the teacher whose quality is called 1."""


@dataclass(frozen=True)
class Pair:
    """One number of steps, with one student or none."""

    steps: int
    sampler: str
    teacher: Result | None
    student: Result | None
    student_stage: str | None
    ratio: float | None
    """The student's Frechet distance over the reference's."""
    speed_up: float | None
    """Of the student, or of the teacher where there is no student, against the teacher at its most steps."""

    @property
    def measured(self) -> Result:
        """Whose network calls and time the row gives."""
        found = self.student or self.teacher
        assert found is not None
        return found


@dataclass(frozen=True)
class Group:
    """Figures of one protocol."""

    protocol: Mapping[str, str]
    rows: Sequence[Pair]
    most: Result | None
    """The teacher at its most steps."""
    reference: Result | None
    stages: Sequence[str]
    samplers: Sequence[str]
    figure: Markup | None


def quality_groups(facts: RunFacts) -> list[Group]:
    """One group for each protocol that the stages were measured under, in the order of the stages."""
    by_protocol: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        if stage.metrics is not None and stage.metrics.results:
            by_protocol.setdefault(json.dumps(stage.metrics.protocol, sort_keys=True), []).append(stage)
    return [_group(f"quality{index}", stages) for index, stages in enumerate(by_protocol.values())]


def _results(stage: StageFacts) -> Sequence[Result]:
    return stage.metrics.results if stage.metrics is not None else ()


def _group(name: str, stages: Sequence[StageFacts]) -> Group:
    teacher = {(r.num_steps, r.sampler): r for stage in stages if stage.is_teacher for r in _results(stage)}
    students = [(stage.name, r) for stage in stages if not stage.is_teacher for r in _results(stage)]
    most = max(teacher.values(), key=lambda r: r.num_steps, default=None)
    reference = next((r for r in teacher.values() if r.num_steps == REFERENCE_STEPS), most)
    rows = []
    for steps, sampler in sorted({*teacher, *((r.num_steps, r.sampler) for _, r in students)}, reverse=True):
        alone = teacher.get((steps, sampler))
        here: list[tuple[str | None, Result | None]] = [
            *((s, r) for s, r in students if (r.num_steps, r.sampler) == (steps, sampler))
        ]
        for stage_name, student in here or [(None, None)]:
            measured = student or alone
            rows.append(
                Pair(
                    steps=steps,
                    sampler=sampler,
                    teacher=alone,
                    student=student,
                    student_stage=stage_name,
                    ratio=ratio(student.frechet if student else None, reference.frechet if reference else None),
                    speed_up=ratio(
                        most.seconds_per_1000 if most else None, measured.seconds_per_1000 if measured else None
                    ),
                )
            )
    figure = figures.quality_figure(
        name,
        _curve("the teacher, not distilled", list(teacher.values())),
        _curve("students, each at its own steps", [r for _, r in students]),
        _curve(f"the teacher at {count(reference.num_steps, 'step')}", [reference]) if reference else None,
    )
    return Group(
        protocol=flatten(next(stage.metrics.protocol for stage in stages if stage.metrics is not None)),
        rows=rows,
        most=most,
        reference=reference,
        stages=[stage.name for stage in stages],
        samplers=sorted({row.sampler for row in rows}),
        figure=figure,
    )


def _curve(label: str, results: Sequence[Result]) -> figures.Curve | None:
    """What of the results a logarithmic axis can show."""
    points = sorted(
        (r.num_steps, r.frechet) for r in results if r.num_steps > 0 and is_finite(r.frechet) and r.frechet > 0
    )
    return figures.Curve(label, [x for x, _ in points], [y for _, y in points]) if points else None


def protocol_notices(groups: Sequence[Group]) -> list[str]:
    """What a reader must know where there are several protocols."""
    if len(groups) < 2:
        return []
    names = sorted({name for group in groups for name in group.protocol})
    differing = [name for name in names if len({group.protocol.get(name) for group in groups}) > 1]
    return [
        f"Not all stages were measured under the same protocol (different: {', '.join(differing)}). Figures "
        "of different protocols cannot be compared, so each protocol has its own table and figure."
    ]
