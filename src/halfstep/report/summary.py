"""The first sentence of a report: what was made, how much faster it is, and how much of the quality is left."""

from collections.abc import Sequence
from typing import NamedTuple

from halfstep.report.quality import REFERENCE_STEPS, Group
from halfstep.report.reading import RunFacts
from halfstep.report.words import count, duration, ratio, times
from halfstep.runs.evaluation import Row

KEPT = 1.5
"""Quality counts as kept up to this multiple of the teacher's Frechet distance."""


class Rated(NamedTuple):
    """A student beside the teacher, in figures of one protocol."""

    steps: int
    ratio: float
    """Its Frechet distance over the teacher's at the reference's steps."""
    speed_up: float | None
    """Against the teacher at its most steps."""


class Comparison(NamedTuple):
    """All students that can be compared with the teacher, at least one."""

    students: Sequence[Rated]
    most_steps: int
    """The teacher's steps against which time is compared."""
    reference_steps: int
    """The teacher's steps against which quality is compared."""


class Summary(NamedTuple):
    """The outcome in a sentence or two, and in a few large figures."""

    lead: str
    more: str | None
    tiles: Sequence[tuple[str, str]]
    """Figure, and what it is."""
    best: Rated | None
    """The student that the sentence is about."""


def summarise(facts: RunFacts, groups: Sequence[Group]) -> Summary:
    """Summarise a run by its own measurements, or by its evaluation if they do not compare."""
    tiles = [(duration(sum(stage.manifest.seconds for stage in facts.others)), "training time of all students")]
    found = next(filter(None, map(_of_group, groups)), None) or _of_evaluation(facts)
    if found is None:
        return Summary(_unrated(facts), None, tiles if facts.students else [], None)
    fewest = min(found.students, key=lambda student: student.steps)
    kept = [student for student in found.students if student.ratio <= KEPT]
    if kept:
        best = min(kept, key=lambda student: student.steps)
    else:
        best = min(found.students, key=lambda student: (student.ratio, student.steps))
    lead = (
        f"A student that needs {count(best.steps, 'step')} instead of {found.most_steps:,}: "
        f"{_said(best)} the teacher’s at {count(found.reference_steps, 'step')}."
    )
    more = None
    if fewest is not best:
        more = f"Down to {count(fewest.steps, 'step')}: {_said(fewest)} the teacher’s."
    tiles = [
        (f"{found.most_steps:,} → {best.steps:,}", "sampler steps"),
        *([(f"{times(best.speed_up)}×", "faster per sample")] if best.speed_up is not None else []),
        (f"{times(best.ratio)}×", f"the teacher’s Fréchet distance (at {count(found.reference_steps, 'step')})"),
        *tiles,
    ]
    return Summary(lead, more, tiles, best)


def _of_group(group: Group) -> Comparison | None:
    rated = [
        Rated(row.steps, row.ratio, row.speed_up) for row in group.rows if row.ratio is not None and not row.is_matched
    ]
    if not rated or group.most is None or group.reference is None:
        return None
    return Comparison(rated, group.most.num_steps, group.reference.num_steps)


def _of_evaluation(facts: RunFacts) -> Comparison | None:
    """From the first table that holds the Frechet distance of the students and of the teacher, each by its sampler."""
    if facts.evaluation is None:
        return None
    own = None if facts.start is None else facts.start.manifest.outcome.sampler_name
    for table in facts.evaluation.tables:
        shown: dict[str, dict[int, Row]] = {"student": {}, "teacher": {}}
        for series in facts.evaluation.series:
            if series.role == "student" or (series.role == "teacher" and own in (None, series.sampler)):
                for row in table.rows:
                    if row.series == series.name and row.num_steps is not None:
                        shown[series.role].setdefault(row.num_steps, row)
        students, teacher = ({n: row for n, row in rows.items() if "frechet" in row.figures} for rows in shown.values())
        most = max(teacher, default=0)
        reference = REFERENCE_STEPS if REFERENCE_STEPS in teacher else most
        rated = []
        for steps, row in students.items() if teacher else ():
            quality = ratio(row.figures["frechet"].mean, teacher[reference].figures["frechet"].mean)
            if quality is not None:
                rated.append(Rated(steps, quality, ratio(teacher[most].seconds_per_1000, row.seconds_per_1000)))
        if rated:
            return Comparison(rated, most, reference)
    return None


def _said(student: Rated) -> str:
    speed = ""
    if student.speed_up is not None:
        how = "times faster" if student.speed_up >= 1.05 else "times as fast"
        speed = f"{times(student.speed_up)} {how} per sample, "
    return f"{speed}Fréchet distance {times(student.ratio)} times"


def _unrated(facts: RunFacts) -> str:
    """The sentence where teacher and students cannot be compared."""
    steps = sorted({s.manifest.num_steps for s in facts.students if s.manifest.num_steps is not None}, reverse=True)
    if not facts.stages:
        return "A run that has begun; no stage is complete yet."
    if not facts.students:
        first = facts.stages[0]
        what = "teacher" if first.role == "teacher" else f"{first.role} model"
        return f"A {what}, trained in {duration(first.manifest.seconds)}; no student is complete yet."
    what = count(len(facts.students), "student")
    if steps:
        what += f" of {steps[0]:,} down to {steps[-1]:,} steps" if steps[1:] else f" of {count(steps[0], 'step')}"
    return f"{what}; there are no figures of teacher and students that could be compared."
