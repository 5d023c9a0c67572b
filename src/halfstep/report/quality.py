"""The results of a run's own measurements (metrics.json), with a table and figures for each protocol.

Ratios are relative to the teacher at its best (`teacher_best`), measured with the same protocol.
"""

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import StageFacts
from halfstep.report.table import Table
from halfstep.report.words import flat_words, method_words, number, ratio, sampler_label, times
from halfstep.runs import Best, Metrics, finite, is_finite, teacher_best
from halfstep.runs.schema import Result


@dataclass(frozen=True)
class Pair:
    """A student or matched model, and the teacher with the same number of steps. Either may be missing."""

    steps: int
    sampler: str
    """Label of the student's sampler, and of the teacher's sampler if the two differ."""
    teacher: Result | None
    """Result of the chain's first model with the student's sampler or, if that was not measured, with the first model's
    own sampler."""
    student: Result | None
    student_stage: str | None
    is_matched: bool
    """Whether `student` is a matched teacher."""
    is_earlier: bool
    """Whether a later student with the same number of steps replaces this one."""
    is_repeated: bool
    """Whether another student has the same number of steps."""
    ratio: float | None
    """Ratio of the student's Frechet distance to that of the teacher at its best."""
    measured: Result
    """The student, or the teacher if the row has no student. The row shows the network calls and time of this
    result."""
    speed_up: float | None
    """Ratio of the speed of `measured` to that of the teacher at its best, or None if their times cannot be
    compared."""


@dataclass(frozen=True)
class Group:
    """The results of one protocol."""

    name: str
    protocol: Mapping[str, Any]
    rows: Sequence[Pair]
    best: Best | None
    """The teacher at its best."""
    base: Result | None
    """The teacher's result that is the reference for same-noise comparisons."""
    teacher_sampler: str
    """The teacher's own sampler."""
    stages: Sequence[str]
    note: str | None
    """Warning about the number of samples."""
    too_few: bool
    """Whether there are too few samples for a reliable Frechet distance."""

    @property
    def best_words(self) -> str:
        """Sampling method of the teacher at its best."""
        return "" if self.best is None else method_words(*self.best[:3])

    @property
    def pace_note(self) -> str | None:
        """Sentence about the rows without a speed-up, if times in the table are from different machines."""
        if self.best is None or all(has_same_pace(row.measured, self.best) for row in self.rows):
            return None
        return (
            "Some models have no speed-up, because they and the teacher at its best were timed on different devices or "
            "with different numbers of threads."
        )

    @property
    def base_words(self) -> str:
        """Sampling method of `base`."""
        return "" if self.base is None else method_words(self.base.sampler, self.base.num_steps, self.base.num_evals)

    @property
    def has_shares(self) -> bool:
        """Whether precision, recall and coverage were measured."""
        return any(row.measured.recall is not None for row in self.rows)

    @property
    def has_earlier(self) -> bool:
        """Whether several students have the same number of steps."""
        return any(row.is_earlier for row in self.rows)

    @property
    def students(self) -> list[tuple[str, Result]]:
        """The students' stages and results, without students that were replaced by later students."""
        rows = [row for row in self.rows if not (row.is_matched or row.is_earlier)]
        return [(str(row.student_stage), row.student) for row in rows if row.student is not None]

    def note_of(self, row: Pair) -> str:
        """Return the sampler, role or stage of a row if other rows have the same number of steps, otherwise an empty
        string.
        """
        by = [] if row.sampler == sampler_label(self.teacher_sampler) else [row.sampler]
        of = ["matched"] if row.is_matched else [str(row.student_stage)] if row.is_repeated else []
        return ", ".join([*by, *of])

    @property
    def figure(self) -> Markup | None:
        """The Frechet distances of the teacher and the students against network calls."""
        teacher = [row.teacher for row in self.rows if row.teacher is not None]
        names = sorted({result.sampler for result in teacher}, key=lambda name: name != self.teacher_sampler)
        curves = [
            _curve(f"teacher, {sampler_label(name)}", [result for result in teacher if result.sampler == name])
            for name in names
        ]
        earlier = [row for row in self.rows if row.is_earlier and not row.is_matched]
        curves.append(_curve("teacher, matched", [row.student for row in self.rows if row.is_matched]))
        return figures.steps_figure(
            self.name,
            "Frechet distance (lower is better)",
            curves[0],
            _curve("students", [student for _, student in self.students]),
            [curve for curve in curves[1:] if curve is not None],
            level=None if self.best is None else self.best.frechet,
            earlier=_curve("earlier stages", [row.student for row in earlier], earlier),
        )

    @property
    def shares_figure(self) -> Markup | None:
        """The students' precision, recall and coverage against network calls, with the teacher at its best."""
        at_best = next((r.teacher for r in self.rows if r.teacher and Best.of(r.teacher) == self.best), None)
        curves, levels = [], {}
        for name in ("precision", "recall", "coverage"):
            shares = ((one.num_evals, finite(getattr(one, name))) for _, one in self.students if one.num_evals > 0)
            curves.append(figures.Curve.through(name, sorted((x, y) for x, y in shares if y is not None)))
            if (level := finite(getattr(at_best, name, None))) is not None:
                levels[name] = level
        return figures.shares_figure(f"{self.name}shares", curves, levels)


def are_earlier(keys: Sequence[Hashable]) -> list[bool]:
    """Return, for each key, whether an equal key follows it."""
    return [key in keys[place + 1 :] for place, key in enumerate(keys)]


def quality_groups(stages: Sequence[StageFacts], start: StageFacts | None) -> list[Group]:
    """Return a group for each protocol in the stages' metrics, and compare all stages with `start`."""
    by_protocol: dict[str, list[tuple[StageFacts, Metrics]]] = {}
    for stage in stages:
        if stage.metrics is not None and stage.metrics.results:
            key = json.dumps(stage.metrics.protocol, sort_keys=True)
            by_protocol.setdefault(key, []).append((stage, stage.metrics))
    return [_group(f"quality{index}", start, found) for index, found in enumerate(by_protocol.values())]


def _group(name: str, start: StageFacts | None, stages: Sequence[tuple[StageFacts, Metrics]]) -> Group:
    teacher = {(r.num_steps, r.sampler): r for stage, held in stages if stage == start for r in held.results}
    is_too_few = any(held.too_few for _, held in stages)
    best = teacher_best(map(Best.of, teacher.values()), is_too_few)
    own = start.manifest.outcome.sampler_name if start else ""
    pairs: list[tuple[StageFacts | None, Result | None, Result | None]] = [
        (stage, r, teacher.get((r.num_steps, r.sampler)) or teacher.get((r.num_steps, own)))
        for stage, held in stages
        if stage != start
        for r in held.results
    ]
    beside = [alone for *_, alone in pairs]
    pairs += [(None, None, alone) for alone in teacher.values() if alone not in beside]
    # A matched model is measured with several samplers.
    keys: list[Hashable] = [
        (stage.role, r.num_steps, r.sampler if stage.role == "matched" else None) if stage and r else place
        for place, (stage, r, _) in enumerate(pairs)
    ]
    rows = []
    for (stage, student, alone), key, is_earlier in zip(pairs, keys, are_earlier(keys), strict=True):
        held = [result for result in (student, alone) if result is not None]
        names = list(dict.fromkeys(sampler_label(result.sampler) for result in held))
        rows.append(
            Pair(
                steps=held[0].num_steps,
                sampler=", teacher ".join(names),
                teacher=alone,
                student=student,
                student_stage=stage.name if stage else None,
                is_matched=stage is not None and stage.role == "matched",
                is_earlier=is_earlier,
                is_repeated=keys.count(key) > 1,
                ratio=best.ratio(student.frechet) if best and student else None,
                measured=held[0],
                speed_up=_speed_up(held[0], best),
            )
        )
    # Rows with the same number of steps and the same sampler keep the order of the plan.
    rows.sort(key=lambda row: (row.steps, row.sampler), reverse=True)
    return Group(
        name=name,
        protocol=flat_words(stages[0][1].protocol),
        rows=rows,
        best=best,
        base=next((result for result in teacher.values() if result.teacher_rmse is None), None),
        teacher_sampler=own,
        stages=[stage.name for stage, _ in stages],
        note=next((held.note for _, held in stages if held.note), None),
        too_few=is_too_few,
    )


def _speed_up(result: Result, best: Best | None) -> float | None:
    if best is None or not has_same_pace(result, best):
        return None
    return ratio(best.seconds_per_1000, result.seconds_per_1000)


def has_same_pace(result: Result, best: Best) -> bool:
    """Return whether the times of a result and of the teacher at its best can be compared."""
    return result.pace == best.pace


def _written(result: Result | None, name: str, form: str) -> str:
    value = None if result is None else getattr(result, name)
    return "–" if value is None else format(value, form)


def text_table(group: Group) -> Table:
    """Return the group as a text table, with KID instead of unreliable Frechet distances."""
    metric, form = ("kid", ".3g") if group.too_few else ("frechet", ".4g")
    rows = [
        [
            str(row.steps) + (f" ({note})" if (note := group.note_of(row)) else ""),
            str(row.measured.num_evals),
            _written(row.teacher, metric, form),
            _written(row.student, metric, form),
            "–" if row.ratio is None or group.too_few else f"{row.ratio:.2f}",
            _written(row.measured, "recall", ".3f"),
            _written(row.measured, "coverage", ".3f"),
            _written(row.student, "teacher_rmse", ".4f"),
            number(row.measured.seconds_per_1000),
            "–" if row.speed_up is None else f"{times(row.speed_up)}x",
        ]
        for row in group.rows
    ]
    headings = [
        "steps", "calls", "teacher", "student", "ratio", "recall", "coverage", "rmse",
        "s per 1,000", "speed-up",
    ]  # fmt: skip
    notes = []
    if group.best is not None:
        what = "Speed-up is" if group.too_few else "Ratio and speed-up are"
        notes.append(f"{what} relative to the teacher at its best, {group.best_words}.")
    if group.pace_note is not None:
        notes.append(group.pace_note)
    if group.base is not None:
        notes.append(
            f"RMSE compares the student's samples with the teacher's ({group.base_words}) from the same noise."
        )
    sizes = [group.protocol.get(name, "?") for name in ("num_samples", "num_reference")]
    bias = "are biased upwards, more so with fewer samples. Compare distances only within this table"
    notes.append(group.note or f"Distances between {sizes[0]} samples and {sizes[1]} real samples {bias}.")
    return Table(headings, rows, notes)


def _curve(label: str, results: Sequence[Result | None], named: Sequence[Pair] = ()) -> figures.Curve | None:
    """Return the curve against network calls, without results that a logarithmic axis cannot show.

    Args:
        named: rows of students whose points are labelled with their stages.
    """
    drawn = [r for r in results if r is not None and r.num_evals > 0 and is_finite(r.frechet) and r.frechet > 0]
    held = sorted(dict.fromkeys(drawn), key=lambda result: (result.num_evals, result.frechet))
    if not held:
        return None
    names = [next((row.student_stage or "" for row in named if row.student is result), "") for result in held]
    curve = figures.Curve.through(label, [(result.num_evals, result.frechet) for result in held])
    return replace(curve, names=names) if named else curve


def protocol_notices(groups: Sequence[Group]) -> list[str]:
    """Return notices about too few samples and about several protocols."""
    notes = list(dict.fromkeys(group.note for group in groups if group.note))
    if len(groups) < 2:
        return notes
    names = sorted({name for group in groups for name in group.protocol})
    differing = ", ".join(name for name in names if len({group.protocol.get(name) for group in groups}) > 1)
    return [
        *notes,
        f"Not all stages were measured with the same protocol (they differ in: {differing}). Results from different "
        "protocols are not comparable, so each protocol has its own table and figure.",
    ]
