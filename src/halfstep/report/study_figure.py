"""Draw a study's figure as PNG and SVG, with panels of curves or bars side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

from halfstep.report.figures import COLOURS, STYLE, Curve, log_axis, powers_of_two
from halfstep.runtime.files import replacing

MARKERS: Final = "osD^vPX*"
"""Markers of curves, one for each colour."""
MOST_INSIDE: Final = 5
"""Maximum number of curves for which legends are drawn inside the panels."""


@final
@dataclass(frozen=True)
class Panel:
    """A panel with curves, or with bars whose x values are indices into `categories`."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Curve]
    categories: Sequence[str] = field(default=())
    log_x: bool = True
    log_y: bool = True
    level: tuple[str, float] | None = None
    """Label and height of a horizontal line."""


def draw_panels(panels: Sequence[Panel], path: Path) -> None:
    """Write `path` with the suffixes .png and .svg. The same panels always produce the same files."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [panel for panel in panels if any(len(series.x) for series in panel.series)]
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": path.name, "font.size": 10, "grid.alpha": 0.3}):
        figure = Figure(figsize=(5.6 * max(1, len(shown)), 4.2), layout="constrained")
        for index, panel in enumerate(shown):
            _draw(figure.add_subplot(1, len(shown), index + 1), panel)
        _add_legend(figure, max((len(panel.series) for panel in shown), default=0) > MOST_INSIDE)
        with replacing(path.with_suffix(".png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
        with replacing(path.with_suffix(".svg")) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})


def _draw(axes: Any, panel: Panel) -> None:
    width = 0.8 / len(panel.series)
    for index, series in enumerate(panel.series):
        look = (index if series.colour is None else series.colour) % len(COLOURS)
        style: dict[str, Any] = {"yerr": series.spread or None, "color": COLOURS[look], "label": series.label}
        if panel.categories:
            places = [x + (index - (len(panel.series) - 1) / 2) * width for x in series.x]
            axes.bar(places, series.y, width, capsize=2, **style)
        else:
            style |= {"marker": MARKERS[look], "markersize": 5, "linewidth": 1.6, "capsize": 2}
            axes.errorbar(series.x, series.y, **style)
    if panel.level is not None:
        axes.axhline(panel.level[1], color="#000000", linewidth=1.0, linestyle="--", label=panel.level[0])
    if panel.categories:
        axes.set_xticks(range(len(panel.categories)), panel.categories, rotation=45, ha="right", fontsize=8)
    elif panel.log_x:
        powers_of_two(axes, [x for series in panel.series for x in series.x])
    if panel.log_y:
        axes.set_yscale("log")
        log_axis(axes.yaxis, [y for series in panel.series for y in series.y if y > 0])
    axes.grid(axis="y")
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)


def _add_legend(figure: Any, is_shared: bool) -> None:
    """Add a legend inside each panel, or a shared one below the panels."""
    if not is_shared:
        for axes in figure.axes:
            axes.legend(fontsize=9)
        return
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=3, fontsize=9)
