"""Helper functions for the tables and figures of studies."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from halfstep.report.figures import Curve
from halfstep.report.words import SAMPLER_LABELS, with_spread
from halfstep.studies.base import Finding

NAMES = SAMPLER_LABELS | {"student": "students", "ancestral": "ancestral, tuned"}
"""The display names of the methods."""


def spread(values: Sequence[float]) -> str:
    """Return the mean as text, with the standard deviation if there are several values."""
    if not values:
        return "–"
    return with_spread(fmean(values), stdev(values) if len(values) > 1 else None)


def where(rows: Sequence[Finding], **axes: object) -> list[Finding]:
    """Return the findings whose axes have these values."""
    return [row for row in rows if all(row.axes.get(key) == value for key, value in axes.items())]


def figure_of(rows: Sequence[Finding], name: str, **axes: object) -> float | None:
    """Return the metric `name` of the finding whose axes have these values, or None if it does not exist."""
    found = (row.figures.get(name) for row in where(rows, **axes))
    return next((figure for figure in found if figure is not None), None)


def curves(rows: Sequence[Finding], names: Mapping[str, str], x: str, y: str = "distance") -> list[Curve]:
    """Return a curve of `y` against `x` for each method, with means and standard deviations. Findings without `y` are
    skipped.

    Args:
        names: the labels of the curves, by method.
        x: the name of an axis or of a metric.
    """
    drawn = []
    for method, label in names.items():
        values: dict[float, list[float]] = {}
        for row in where(rows, method=method):
            if row.figures.get(y) is not None:
                values.setdefault({**row.axes, **row.figures}[x], []).append(row.figures[y])
        points = [(at, fmean(all_), stdev(all_) if len(all_) > 1 else 0.0) for at, all_ in sorted(values.items())]
        drawn.append(Curve.through(label, points))
    return drawn
