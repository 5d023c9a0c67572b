"""Helpers for the tables of studies: names of methods, and means over seeds."""

import statistics
from collections.abc import Mapping, Sequence

from halfstep.report.figures import Curve
from halfstep.report.words import SAMPLER_LABELS, with_spread
from halfstep.studies.base import Finding

NAMES = SAMPLER_LABELS | {"student": "students", "ancestral": "ancestral, tuned"}
"""Display names of methods."""


def spread(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation if there are several values."""
    if not values:
        return "–"
    return with_spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def where(rows: Sequence[Finding], **axes: object) -> list[Finding]:
    """Return the rows with these axes."""
    return [row for row in rows if all(row.axes.get(key) == value for key, value in axes.items())]


def figure_of(rows: Sequence[Finding], name: str, **axes: object) -> float | None:
    """Return the figure of that name at these axes; None if it does not exist."""
    found = (row.figures.get(name) for row in where(rows, **axes))
    return next((figure for figure in found if figure is not None), None)


def curves(rows: Sequence[Finding], names: Mapping[str, str], x: str, y: str = "distance") -> list[Curve]:
    """Return each method's curve of `y` against `x`, without findings that lack `y`.

    Args:
        names: labels of the curves, by method.
    """
    drawn = []
    for method, label in names.items():
        found = [row.figures for row in where(rows, method=method) if row.figures.get(y) is not None]
        drawn.append(Curve.through(label, sorted((figures[x], figures[y]) for figures in found)))
    return drawn
