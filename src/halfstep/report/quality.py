"""The figures that a run's own measurements hold (metrics.json): one table and one curve for each protocol.

Ratios are taken between figures of one protocol only. The teacher at 64 steps (or at its most, if it was not
measured there) is the measure of quality, the teacher at its most steps that of time.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import StageFacts
from halfstep.report.table import Table
from halfstep.report.words import count, flatten, number, ratio, times
from halfstep.runs import Metrics, is_finite
from halfstep.runs.schema import Result

REFERENCE_STEPS = 64
"""Steps of the teacher whose quality is called 1."""


@dataclass(frozen=True)
class Pair:
    """One number of steps, with one student (or matched model) or none."""

    steps: int
    sampler: str
    """The student's, and the teacher's if it is another."""
    teacher: Result | None
    """The model where the chain starts, by its own sampler if it was not measured by the student's."""
    student: Result | None
    student_stage: str | None
    is_matched: bool
    """Whether the student is a matched teacher instead."""
    ratio: float | None
    """The student's Frechet distance over the reference's."""
    measured: Result
    """The student, else the teacher, with whose network calls and time the row is shown."""
    speed_up: float | None
    """Of `measured` against the teacher at its most steps."""


@dataclass(frozen=True)
class Group:
    """Figures of one protocol."""

    name: str
    protocol: Mapping[str, Any]
    rows: Sequence[Pair]
    most: Result | None
    """The teacher at its most steps."""
    reference: Result | None
    stages: Sequence[str]
    samplers: Sequence[str]

    @property
    def figure(self) -> Markup | None:
        """The curves of teacher and students."""
        level = self.reference
        return figures.steps_figure(
            self.name,
            "Fréchet distance (lower is better)",
            _curve("the teacher, not distilled", [row.teacher for row in self.rows]),
            _curve("students, each at its own steps", [row.student for row in self.rows]),
            level=_curve(f"the teacher at {count(level.num_steps, 'step')}", [level]) if level else None,
        )


def quality_groups(stages: Sequence[StageFacts], start: StageFacts | None) -> list[Group]:
    """Return one group for each protocol of the stages' metrics, in order; all are compared with `start`."""
    by_protocol: dict[str, list[tuple[StageFacts, Metrics]]] = {}
    for stage in stages:
        if stage.metrics is not None and stage.metrics.results:
            key = json.dumps(stage.metrics.protocol, sort_keys=True)
            by_protocol.setdefault(key, []).append((stage, stage.metrics))
    return [_group(f"quality{index}", start, found) for index, found in enumerate(by_protocol.values())]


def _value(result: Result | None, name: str) -> float | None:
    return None if result is None else getattr(result, name)


def _group(name: str, start: StageFacts | None, stages: Sequence[tuple[StageFacts, Metrics]]) -> Group:
    teacher = {(r.num_steps, r.sampler): r for stage, held in stages if stage == start for r in held.results}
    others = [(stage, r) for stage, held in stages if stage != start for r in held.results]
    most = max(teacher.values(), key=lambda r: r.num_steps, default=None)
    reference = next((r for r in teacher.values() if r.num_steps == REFERENCE_STEPS), most)
    pairs: list[tuple[StageFacts | None, Result | None, Result | None]] = []
    for other, result in others:
        own = (result.num_steps, start.manifest.outcome.sampler_name if start else "")
        pairs.append((other, result, teacher.get((result.num_steps, result.sampler)) or teacher.get(own)))
    beside = [alone for _, _, alone in pairs]
    pairs += [(None, None, alone) for alone in teacher.values() if alone not in beside]
    rows = []
    for stage, student, alone in pairs:
        held = [result for result in (student, alone) if result is not None]
        names = list(dict.fromkeys(result.sampler for result in held))
        rows.append(
            Pair(
                steps=held[0].num_steps,
                sampler=", teacher ".join(names),
                teacher=alone,
                student=student,
                student_stage=stage.name if stage else None,
                is_matched=stage is not None and stage.role == "matched",
                ratio=ratio(_value(student, "frechet"), _value(reference, "frechet")),
                measured=held[0],
                speed_up=ratio(_value(most, "seconds_per_1000"), held[0].seconds_per_1000),
            )
        )
    # At equal steps and sampler, the plan's order stays.
    rows.sort(key=lambda row: (row.steps, row.sampler), reverse=True)
    samplers = sorted({row.sampler for row in rows})
    return Group(name, flatten(stages[0][1].protocol), rows, most, reference, [s.name for s, _ in stages], samplers)


def _written(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def text_table(group: Group) -> Table:
    """Return the group as texts, for a terminal."""
    rows = [
        [
            str(row.steps),
            _written(_value(row.teacher, "frechet"), ".4g"),
            _written(_value(row.student, "frechet"), ".4g"),
            _written(row.ratio, ".2f"),
            _written(_value(row.student, "teacher_rmse"), ".4f"),
            number(row.measured.seconds_per_1000),
            "–" if row.speed_up is None else f"{times(row.speed_up)}x",
        ]
        for row in group.rows
    ]
    headings = [
        "steps", "teacher's distance", "student's distance",
        f"ratio to teacher at {group.reference.num_steps}" if group.reference else "ratio",
        "student-teacher rmse", "s per 1,000", f"speed-up over {group.most.num_steps}" if group.most else "speed-up",
    ]  # fmt: skip
    note = (
        f"Of {group.protocol.get('num_samples', '?')} samples to {group.protocol.get('num_reference', '?')} real ones: "
        "biased upwards, the more the fewer they are, so compare within this table."
    )
    return Table(headings, rows, [note])


def _curve(label: str, results: Sequence[Result | None]) -> figures.Curve | None:
    """Return the curve of those results that a logarithmic axis can show."""
    held = [r for r in results if r is not None and r.num_steps > 0]
    points = sorted({(r.num_steps, r.frechet) for r in held if is_finite(r.frechet) and r.frechet > 0})
    return figures.Curve.through(label, points) if points else None


def protocol_notices(groups: Sequence[Group]) -> list[str]:
    """What a reader must know where there are several protocols."""
    if len(groups) < 2:
        return []
    names = sorted({name for group in groups for name in group.protocol})
    differing = ", ".join(name for name in names if len({group.protocol.get(name) for group in groups}) > 1)
    return [
        f"Not all stages were measured under the same protocol (different: {differing}). Figures of different "
        "protocols cannot be compared, so each protocol has its own table and figure."
    ]
