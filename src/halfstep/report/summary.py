"""The first sentence of a report, which states how many network calls the best student saves, and its quality."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from halfstep.report.evaluation import best_of_table, cells_of, is_too_few
from halfstep.report.quality import Group
from halfstep.report.reading import RunFacts
from halfstep.report.words import count, duration, method_words, number, times
from halfstep.runs import Best, finite

KEPT = 1.5
"""A student keeps the teacher's quality if its Frechet distance or KID is at most this multiple of the teacher's."""
NO_GAIN = 1.05
"""A student gains nothing if the undistilled teacher with the same number of network calls is worse by at most this
factor."""
LEARNED = 0.25
"""A teacher counts as having learned the data if its samples cover at least this share of the real data.
Coverage is near 1 if the samples and the data have the same distribution."""


class Rated(NamedTuple):
    """A student compared with the teacher in one protocol."""

    steps: int
    num_evals: int
    quality: float
    """Ratio of the student's Frechet distance to that of the teacher at its best, or the student's KID if the Frechet
    distance is unreliable."""
    alone: float | None
    """The quality of the undistilled teacher with the same number of network calls, or None if it was not measured."""

    @property
    def gains(self) -> bool:
        """Whether the student is closer to the data than the undistilled teacher with the same number of calls."""
        return self.alone is None or self.alone > NO_GAIN * self.quality


class Comparison(NamedTuple):
    """One or more students that can be compared with the teacher."""

    students: Sequence[Rated]
    teacher: Best
    """The teacher at its best."""
    quality: float
    """`Rated.quality` of the teacher: 1, or the teacher's KID."""
    by_kid: bool
    """Whether students are rated by KID, because there are too few samples for a Frechet distance."""

    def words(self, student: Rated) -> str:
        """Describe a student's quality."""
        if self.by_kid:
            alone = "" if student.alone is None else f", {number(student.alone)} without distillation"
            return f"KID {number(student.quality)} ({number(self.quality)} for the teacher at its best{alone})"
        alone = "" if student.alone is None else f" ({times(student.alone)} times without distillation)"
        return f"Frechet distance {times(student.quality)} times that of the teacher at its best{alone}"


class Summary(NamedTuple):
    """The outcome in one or two sentences and a few headline numbers."""

    lead: str
    more: str | None = None
    tiles: Sequence[tuple[str, str]] = ()
    """Numbers with their labels."""
    best: Rated | None = None
    """The student that `lead` describes."""
    choice: str = ""
    """How that student was chosen."""


def summarise(facts: RunFacts, groups: Sequence[Group]) -> Summary:
    """Summarise a run from the first reliable comparison in metrics.json or evaluation.json, or else the first one."""
    tiles = [(duration(sum(stage.manifest.seconds for stage in facts.others)), "training time of all students")]
    comparisons = [found for found in (*map(_of_group, groups), *_of_evaluation(facts)) if found is not None]
    found = min(comparisons, key=lambda one: one.by_kid, default=None)
    if found is None:
        return Summary(_unrated(facts), tiles=tiles if facts.students else [])
    fewest = min(found.students, key=lambda student: student.steps)
    # A KID is unbiased, so it can be negative. It then cannot tell the samples from the data.
    kept = [student for student in found.students if student.quality <= max(0.0, KEPT * found.quality)]
    if kept:
        best = min(kept, key=lambda student: (not student.gains, student.steps))
    else:
        best = min(found.students, key=lambda student: (student.quality, student.steps))
    choice = (
        f"with the fewest steps and a {'KID' if found.by_kid else 'Frechet distance'} of at most {KEPT} times the "
        f"teacher’s best{', or of at most 0' * found.by_kid} (preferably one that gains from distillation), or the "
        "best student if none qualifies"
        + (". It compares KID because there are too few samples for a reliable Frechet distance" * found.by_kid)
    )
    calls, saved = count(best.num_evals, "network call"), found.teacher.num_evals / max(1, best.num_evals)
    fewer = f"{times(saved)} times fewer"
    if best.gains:
        by = f" ({fewer})" if saved > 1 else ""
        lead = f"A student with {calls} instead of {found.teacher.num_evals:,}{by}: {found.words(best)}."
        more = None
    else:
        lead = (
            f"No gain from distillation with {calls}: the undistilled teacher is just as close to the data. "
            f"{found.words(best)}."
        )
        more = "Train the teacher and the students longer, or distil to fewer steps."
    if fewest is not best:
        more = f"At {count(fewest.steps, 'step')}: {found.words(fewest)}."
    covered, how = found.teacher.coverage, method_words(*found.teacher[:3])
    if covered is not None and covered < LEARNED:
        more = f"At its best ({how}), its samples cover {covered:.0%} of the real data. Students cannot learn more."
        return Summary("The teacher has not learned the data yet: train it longer.", more, tiles, best, choice)
    if found.by_kid:
        quality = (number(best.quality), f"KID; {number(found.quality)} for the teacher at its best: {how}")
    else:
        quality = (f"{times(best.quality)}×", f"the Frechet distance of the teacher at its best: {how}")
    tiles = [
        (f"{found.teacher.num_evals:,} → {best.num_evals:,}", f"network calls{f', {fewer}' if saved > 1 else ''}"),
        quality,
        *tiles,
    ]
    if best.alone is not None:
        alone = number(best.alone) if found.by_kid else f"{times(best.alone)}×"
        tiles.insert(2, (alone, f"without distillation, {calls}"))
    return Summary(lead, more, tiles, best, choice)


def _of_group(group: Group) -> Comparison | None:
    teacher = [Best.of(row.teacher) for row in group.rows if row.teacher is not None]
    return _comparison(group.best, teacher, [Best.of(student) for _, student in group.students], group.too_few)


def _of_evaluation(facts: RunFacts) -> list[Comparison | None]:
    """Return a comparison for each table.

    If several students have the same number of steps, the last one in the first such series counts.
    """
    result, comparisons = facts.evaluation, []
    for table in result.tables if result is not None else ():
        assert result is not None
        shown: dict[int, Best] = {}
        for series in result.series:
            if series.role == "student":
                shown = {cell.num_steps: cell for cell in cells_of(table, [series])} | shown
        teachers = [series for series in result.series if series.role == "teacher"]
        best = best_of_table(table, result)
        comparisons.append(_comparison(best, cells_of(table, teachers), shown.values(), is_too_few(table)))
    return comparisons


def _comparison(
    best: Best | None, teacher: Iterable[Best], students: Iterable[Best], by_kid: bool
) -> Comparison | None:
    """Compare students with the teacher's cells, which include `best`, or return None if no student can be compared."""
    if best is None:
        return None

    def quality(cell: Best) -> float | None:
        return finite(cell.kid) if by_kid else best.ratio(cell.frechet)

    alone: dict[int, float] = {}
    for cell in teacher:
        if (value := quality(cell)) is not None:
            alone[cell.num_evals] = min(value, alone.get(cell.num_evals, value))
    rated = [
        Rated(cell.num_steps, cell.num_evals, value, alone.get(cell.num_evals))
        for cell in students
        if (value := quality(cell)) is not None
    ]
    own = quality(best)
    return Comparison(rated, best, own, by_kid) if rated and own is not None else None


def _unrated(facts: RunFacts) -> str:
    """Return the sentence for a run without a comparison of teacher and students."""
    steps = sorted({s.manifest.num_steps for s in facts.students if s.manifest.num_steps is not None}, reverse=True)
    if not facts.stages:
        return "The run is in progress; no stage is complete yet."
    if not facts.students:
        first = facts.stages[0]
        what = "teacher" if first.role == "teacher" else f"{first.role} model"
        return f"A {what}, trained in {duration(first.manifest.seconds)}; no student is complete yet."
    what = count(len(facts.students), "student")
    if steps:
        what += f", from {steps[0]:,} steps to {steps[-1]:,}" if steps[1:] else f" with {count(steps[0], 'step')}"
    return f"{what}. There are no comparable results for the teacher and the students."
