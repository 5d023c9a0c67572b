"""What the tables of studies have in common: names of methods, and means over seeds."""

import statistics
from collections.abc import Sequence

from halfstep.report.words import SAMPLER_LABELS, with_spread
from halfstep.studies.base import Finding

NAMES = SAMPLER_LABELS | {"student": "students", "ancestral": "ancestral, tuned"}
"""Methods as they are shown."""


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    return with_spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def where(rows: Sequence[Finding], **axes: object) -> list[Finding]:
    """The rows with these axes."""
    return [row for row in rows if all(row.axes.get(key) == value for key, value in axes.items())]


def figure_of(rows: Sequence[Finding], name: str, **axes: object) -> float | None:
    """The one figure of that name at these axes; None if it is not there."""
    found = [row.figures[name] for row in where(rows, **axes) if row.figures.get(name) is not None]
    return found[0] if found else None
