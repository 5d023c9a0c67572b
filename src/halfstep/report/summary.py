"""The first sentence of a report: how many network calls a student saves, and how its quality compares."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from halfstep.report.evaluation import best_of_table
from halfstep.report.quality import Group
from halfstep.report.reading import RunFacts
from halfstep.report.words import count, duration, method_words, times
from halfstep.runs import Best
from halfstep.runs.evaluation import Row

KEPT = 1.5
"""Quality counts as kept up to this multiple of the teacher's Frechet distance."""
NO_GAIN = 1.05
"""A student has gained nothing if the undistilled teacher, with as many network calls, has at most this multiple of its
Frechet distance."""
LEARNED = 0.25
"""Minimum coverage of the real data by the samples of a teacher that has learned them. (Coverage is near 1 if samples
and real data have the same distribution.)"""


class Rated(NamedTuple):
    """A student compared with the teacher in one protocol."""

    steps: int
    num_evals: int
    ratio: float
    """Ratio of its Frechet distance to that of the teacher at its best."""
    alone: float | None
    """The same ratio of the undistilled teacher, with as many network calls; None if not measured."""

    @property
    def gains(self) -> bool:
        """Whether the student is closer to the data than the undistilled teacher with as many network calls."""
        return self.alone is None or self.alone > NO_GAIN * self.ratio


class Comparison(NamedTuple):
    """All students that can be compared with the teacher, at least one."""

    students: Sequence[Rated]
    teacher: Best
    """The teacher at its best."""


class Summary(NamedTuple):
    """The outcome in a sentence or two, and in a few large numbers."""

    lead: str
    more: str | None
    tiles: Sequence[tuple[str, str]]
    """Numbers with their labels."""
    best: Rated | None
    """The student that the sentence is about."""


def summarise(facts: RunFacts, groups: Sequence[Group]) -> Summary:
    """Summarise a run by its own measurements, or by its evaluation if those have no comparison."""
    tiles = [(duration(sum(stage.manifest.seconds for stage in facts.others)), "training time of all students")]
    found = next(filter(None, map(_of_group, groups)), None) or _of_evaluation(facts)
    if found is None:
        return Summary(_unrated(facts), None, tiles if facts.students else [], None)
    fewest = min(found.students, key=lambda student: student.steps)
    kept = [student for student in found.students if student.ratio <= KEPT]
    if kept:
        best = min(kept, key=lambda student: (not student.gains, student.steps))
    else:
        best = min(found.students, key=lambda student: (student.ratio, student.steps))
    calls, saved = count(best.num_evals, "network call"), found.teacher.num_evals / max(1, best.num_evals)
    fewer = f"{times(saved)} times fewer"
    if best.gains:
        by = f" ({fewer})" if saved > 1 else ""
        lead = f"A student with {calls} instead of {found.teacher.num_evals:,}{by}: {_said(best)}."
    else:
        lead = (
            f"No gain from distillation with {calls}: the undistilled teacher is as close to the data with as many. "
            f"{_said(best)}."
        )
    more = None if best.gains else "Train the teacher and the students longer, or distil to fewer steps."
    if fewest is not best:
        more = f"At {count(fewest.steps, 'step')}: {_said(fewest)}."
    covered, how = found.teacher.coverage, method_words(*found.teacher[:3])
    if covered is not None and covered < LEARNED:
        more = f"At its best ({how}) its samples cover {covered:.0%} of the real data, and no student can learn more."
        return Summary("The teacher has not learned the data yet: train it longer.", more, tiles, best)
    tiles = [
        (f"{found.teacher.num_evals:,} → {best.num_evals:,}", f"network calls{f', {fewer}' if saved > 1 else ''}"),
        (f"{times(best.ratio)}×", f"the Fréchet distance of the teacher at its best: {how}"),
        *([(f"{times(best.alone)}×", f"the same without distillation, {calls}")] if best.alone is not None else []),
        *tiles,
    ]
    return Summary(lead, more, tiles, best)


def _of_group(group: Group) -> Comparison | None:
    if group.best is None:
        return None
    alone = _alone(group.best, ((row.teacher.num_evals, row.teacher.frechet) for row in group.rows if row.teacher))
    rated = [
        Rated(row.steps, row.measured.num_evals, row.ratio, alone.get(row.measured.num_evals))
        for row in group.rows
        if row.ratio is not None and not row.is_matched and not row.is_earlier
    ]
    return Comparison(rated, group.best) if rated else None


def _alone(best: Best, cells: Iterable[tuple[int | None, float]]) -> dict[int, float]:
    """Return by network calls the smallest ratio of the undistilled teacher; `cells` are calls and distances."""
    ratios: dict[int, float] = {}
    for calls, frechet in cells:
        quality = best.ratio(frechet)
        if calls is not None and quality is not None:
            ratios[calls] = min(quality, ratios.get(calls, quality))
    return ratios


def _of_evaluation(facts: RunFacts) -> Comparison | None:
    """Return the comparison in the first table with the Frechet distances of both students and teacher."""
    if facts.evaluation is None:
        return None
    for table in facts.evaluation.tables:
        best = best_of_table(table, facts.evaluation)
        if best is None:
            continue
        teachers = [series.name for series in facts.evaluation.series if series.role == "teacher"]
        measured = [row for row in table.rows if "frechet" in row.figures]
        undistilled = (row for row in measured if row.series in teachers)
        alone = _alone(best, ((row.num_evals, row.figures["frechet"].mean) for row in undistilled))
        shown: dict[int, Row] = {}
        for series in facts.evaluation.series:
            if series.role == "student":
                # If several students have equal steps, the last one is used, in its first series.
                rows = [row for row in measured if row.series == series.name]
                shown = {row.num_steps: row for row in rows if row.num_steps is not None} | shown
        rated = []
        for steps, row in shown.items():
            if (quality := best.ratio(row.figures["frechet"].mean)) is not None:
                calls = row.num_evals or steps
                rated.append(Rated(steps, calls, quality, alone.get(calls)))
        if rated:
            return Comparison(rated, best)
    return None


def _said(student: Rated) -> str:
    without = "" if student.alone is None else f" ({times(student.alone)} times without distillation)"
    return f"Fréchet distance {times(student.ratio)} times that of the teacher at its best{without}"


def _unrated(facts: RunFacts) -> str:
    """Return the sentence for a run in which teacher and students cannot be compared."""
    steps = sorted({s.manifest.num_steps for s in facts.students if s.manifest.num_steps is not None}, reverse=True)
    if not facts.stages:
        return "A run in progress; no stage is complete yet."
    if not facts.students:
        first = facts.stages[0]
        what = "teacher" if first.role == "teacher" else f"{first.role} model"
        return f"A {what}, trained in {duration(first.manifest.seconds)}; no student is complete yet."
    what = count(len(facts.students), "student")
    if steps:
        what += f" of {steps[0]:,} down to {steps[-1]:,} steps" if steps[1:] else f" of {count(steps[0], 'step')}"
    return f"{what}; the results of teacher and students cannot be compared."
