"""What the tables of studies have in common: means over seeds, and numbers as text."""

import math
import statistics
from collections.abc import Sequence

from halfstep.studies.base import Row

NAMES = {
    "student": "students",
    "ddim": "DDIM",
    "ancestral": "ancestral, tuned",
    "euler": "Euler",
    "midpoint": "midpoint",
    "heun": "Heun",
    "rk4": "RK4",
    "dpmpp_2m": "DPM-Solver++(2M)",
}
"""Methods as they are shown."""


def number(value: float | None) -> str:
    """Three significant digits; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation where there are several."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return number(mean)
    return f"{number(mean)} ± {number(statistics.stdev(values))}"


def where(rows: Sequence[Row], **axes: object) -> list[Row]:
    """The rows with these axes."""
    return [row for row in rows if all(row.axes.get(key) == value for key, value in axes.items())]


def figure_of(rows: Sequence[Row], name: str, **axes: object) -> float | None:
    """The one figure of that name at these axes; None if it is not there."""
    found = [row.figures[name] for row in where(rows, **axes) if row.figures.get(name) is not None]
    return float(found[0]) if found else None
