"""Helpers for the tables of studies."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from halfstep.report.figures import Curve
from halfstep.report.words import SAMPLER_LABELS, with_spread
from halfstep.studies.base import Finding

NAMES = SAMPLER_LABELS | {"student": "students", "ancestral": "ancestral, tuned"}
"""Display names of methods."""


def spread(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation if there are several values."""
    if not values:
        return "–"
    return with_spread(fmean(values), stdev(values) if len(values) > 1 else None)


def where(rows: Sequence[Finding], **axes: object) -> list[Finding]:
    """Return the findings with these axes."""
    return [row for row in rows if all(row.axes.get(key) == value for key, value in axes.items())]


def figure_of(rows: Sequence[Finding], name: str, **axes: object) -> float | None:
    """Return a figure of the finding with these axes; None if it does not exist."""
    found = (row.figures.get(name) for row in where(rows, **axes))
    return next((figure for figure in found if figure is not None), None)


def curves(rows: Sequence[Finding], names: Mapping[str, str], x: str, y: str = "distance") -> list[Curve]:
    """Return each method's curve of `y` against `x` (mean and standard deviation); findings without `y` are skipped.

    Args:
        names: labels of the curves, by method.
        x: an axis or a figure.
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
