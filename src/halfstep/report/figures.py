"""Draw figures as inline SVG in the page's colours, and samples as images.

matplotlib draws in placeholder colours, which are then replaced by CSS variables, so that one figure suits light mode,
dark mode and print. The colours are from the colour-blind-safe palette of Okabe and Ito.
"""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

STYLE = {"svg.fonttype": "none", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
"""matplotlib settings for every figure."""
INK, FAINT, TEACHER, STUDENT = "#010101", "#020202", "#030303", "#040404"
OTHERS = ("#050505", "#060606", "#070707", "#080808")
"""Placeholder colours for additional series."""
VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    TEACHER: "var(--teacher)",
    STUDENT: "var(--student)",
    **{stand_in: f"var(--other-{index})" for index, stand_in in enumerate(OTHERS)},
}
MARKERS = "D^vP"
"""Markers for additional series, so that these series differ in more than colour."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#7F7F7F")
SMALLEST_TILE, LARGEST_TILE = 64, 96
"""Approximate sizes in pixels to which small images are enlarged and large images are reduced."""
GAP = 4
"""Gap in pixels between images."""
MOST_POINTS = 400
"""Maximum number of points in a curve or scatter plot, which limits the size of the page."""


@dataclass(frozen=True)
class Curve:
    """A line in a figure."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()
    """Half the length of the error bar at each point, or empty for no error bars."""
    colour: int | None = None
    """Index of the colour in a study's figure, or None to use the index of the curve."""
    names: Sequence[str] = ()
    """Labels of the points, or empty for no labels."""

    @classmethod
    def through(cls, label: str, points: Iterable[Sequence[float]], colour: int | None = None) -> "Curve":
        """Return the curve through points (x, y) or (x, y, spread)."""
        x, y, *spread = [list(column) for column in zip(*points, strict=True)] or [[], []]
        return cls(label, x, y, spread[0] if spread and any(spread[0]) else (), colour)


def _figure(name: str, height: float, draw: Any, panels: Sequence[float] = (1.0,)) -> Markup:
    """Return the SVG that `draw` produces, with ids that start with `name`. The same data always produces the same SVG.

    Args:
        draw: function that is called with the axes, which are stacked and share the x-axis.
        panels: relative heights of the axes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    settings = STYLE | {
        "svg.hashsalt": name,
        "font.family": "sans-serif",
        "font.size": 10.5,
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), FAINT),
        **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor", "axes.labelcolor", "text.color"), INK),
        "grid.alpha": 0.35,
        "grid.linewidth": 0.6,
    }
    with matplotlib.rc_context(settings):
        # At a width of 5 inches, the text matches the page's text if a row has two figures, and is legible on a phone.
        figure = Figure(figsize=(5.0, height), layout="constrained")
        draw(*figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=list(panels))[:, 0])
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # A style element would apply to the whole page, and the metadata contains web addresses.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg))
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    # The enclosing element contains the alternative text.
    return Markup(svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1).strip())


def log_axis(axis: Any, values: Sequence[float]) -> None:
    """Set ticks with plain numbers at 1, 2 and 5, or evenly spaced ticks if the range of the values is too small."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    wide = max(values) / min(values)
    subs = (1.0,) if wide > 1e4 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=subs) if wide > 6 else MaxNLocator(5))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def powers_of_two(axes: Any, values: Sequence[float]) -> None:
    """Make the x-axis logarithmic, with ticks at the powers of two around the values."""
    axes.set_xscale("log", base=2)
    powers = range(math.floor(math.log2(min(values))), math.ceil(math.log2(max(values))) + 1)
    axes.set_xticks([2.0**power for power in powers], [f"{2.0**power:g}" for power in powers])
    axes.minorticks_off()


Line = tuple[Curve, str, str]
"""A curve, its colour and its matplotlib format string."""


def _draw_lines(axes: Any, lines: Sequence[Line], x_label: str, y_label: str) -> None:
    """Draw curves with error bars and point labels against steps or calls."""
    for curve, colour, style in lines:
        # A logarithmic axis cannot show an error bar that reaches 0.
        below = [min(spread, 0.9 * y) for spread, y in zip(curve.spread, curve.y, strict=False)]
        error = [below, list(curve.spread)] if curve.spread else None
        look = {"color": colour, "linewidth": 2, "markersize": 6.5, "capsize": 3}
        axes.errorbar(curve.x, curve.y, error, fmt=style, label=curve.label, **look)
        for x, y, named in zip(curve.x, curve.y, curve.names, strict=False):
            place = {"xytext": (7, 3), "textcoords": "offset points", "fontsize": 8, "color": colour}
            axes.annotate(named, (x, y), **place)
    powers_of_two(axes, [x for curve, _, _ in lines for x in curve.x])
    axes.grid(axis="y")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def steps_figure(
    name: str,
    y_label: str,
    teacher: Curve | None,
    student: Curve | None,
    others: Sequence[Curve] = (),
    level: float | None = None,
    earlier: Curve | None = None,
    x_label: str = "network calls",
) -> Markup | None:
    """Draw curves against steps or calls on log-log axes, or return None if there are no points.

    Args:
        others: additional curves, of which only the first `len(OTHERS)` are drawn.
        level: height of a horizontal line for the teacher at its best.
        earlier: points of students that were replaced by later students, drawn faintly.
    """
    lines = [(teacher, TEACHER, "s--"), (student, STUDENT, "o-")]
    lines += [(curve, c, f"{marker}-.") for curve, c, marker in zip(others, OTHERS, MARKERS, strict=False)]
    lines.append((earlier, FAINT, "o"))
    shown: list[Line] = [(curve, colour, style) for curve, colour, style in lines if curve is not None and curve.x]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        axes.set_yscale("log")
        _draw_lines(axes, shown, x_label, y_label)
        if level is not None:
            axes.axhline(level, color=FAINT, linewidth=1.2, linestyle=":", label="teacher at its best", zorder=1)
        log_axis(axes.yaxis, [y for curve, _, _ in shown for y in curve.y])
        if len(shown) + (level is not None) > 1:
            axes.legend()

    return _figure(name, 3.6 + 0.15 * len(others[: len(OTHERS)]), draw)


def shares_figure(name: str, curves: Sequence[Curve], levels: Mapping[str, float]) -> Markup | None:
    """Draw shares from 0 to 1 against network calls on a logarithmic axis, or return None if there are no points.

    Args:
        levels: height of each curve's horizontal line, keyed by the curve's label.
    """
    looks = zip(curves, OTHERS, MARKERS, strict=False)
    shown = [(curve, colour, f"{marker}-") for curve, colour, marker in looks if curve.x]
    if not shown:
        return None

    def draw(axes: Any) -> None:
        _draw_lines(axes, shown, "network calls", "share (higher is better)")
        for curve, colour, _ in shown:
            if curve.label in levels:
                axes.axhline(levels[curve.label], color=colour, linewidth=1.2, linestyle=":", zorder=1)
        axes.set_ylim(min(0.5, *(y for curve, *_ in shown for y in curve.y)), 1.02)
        axes.legend()

    return _figure(name, 3.6, draw)


def chain_figure(name: str, stages: Sequence[tuple[Curve, Curve, float]]) -> Markup | None:
    """Draw the loss of consecutive stages, with the learning rate below, or return None if no loss is above 0.

    Args:
        stages: for each stage, the loss and the learning rate over its updates, and its number of updates.
    """
    if not any(loss.x for loss, _, _ in stages):
        return None
    with_rate = any(rate.x for _, rate, _ in stages)

    def draw(axes: Any, *below: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        axes.set_yscale("log")
        start, centres, labels = 0.0, [], []
        for index, (loss, rate, length) in enumerate(stages):
            colour = TEACHER if loss.label == "teacher" else STUDENT
            for panel, curve in zip((axes, *below), (loss, rate), strict=False):
                if curve.x:
                    stride = -(-len(curve.x) // MOST_POINTS)
                    shifted = [start + x for x in curve.x[::-stride]]
                    # A line through a single point is invisible, so the point gets a marker.
                    mark = "o" if len(shifted) == 1 else None
                    panel.plot(shifted, curve.y[::-stride], color=colour, linewidth=1.5, marker=mark, markersize=4)
                if index:
                    panel.axvline(start, color=FAINT, linewidth=0.8)
            centres.append(start + length / 2)
            labels.append(loss.label)
            start += length
        axes.set_xlim(0, start)
        log_axis(axes.yaxis, [y for loss, _, _ in stages for y in loss.y])
        axes.grid(axis="y")
        axes.set_ylabel("loss")
        for panel in below:
            panel.set_ylim(bottom=0)
            panel.grid(axis="y")
            panel.set_ylabel("learning rate")
            panel.yaxis.set_major_locator(MaxNLocator(3))
            panel.yaxis.set_major_formatter("{x:g}")
        lowest = (axes, *below)[-1]
        lowest.set_xlabel("updates, over the whole run")
        lowest.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        lowest.xaxis.set_major_formatter("{x:,.0f}")
        top = axes.secondary_xaxis("top")
        # The axes are about 290 points wide. If a label is wider than its stage, all labels are rotated.
        room = [290 * length / start for _, _, length in stages]
        upright = any(6.5 * len(label) > space for label, space in zip(labels, room, strict=True))
        labels = [label if space > 11 else "" for label, space in zip(labels, room, strict=True)]
        top.set_xticks(centres, labels, fontsize=10, rotation=90 if upright else 0)
        top.tick_params(length=0)
        top.spines["top"].set_visible(False)
        top.set_xlabel("sampler steps of the student", fontsize=10)

    return _figure(name, 4.6 if with_rate else 3.5, draw, (2.6, 1.0) if with_rate else (1.0,))


def is_images(samples: np.ndarray) -> bool:
    """Return whether samples are grey or colour images, that is, a uint8 array of shape `[n, h, w, c]`."""
    return samples.dtype == np.uint8 and samples.ndim == 4 and samples.shape[3] in (1, 3)


def is_points(samples: np.ndarray) -> bool:
    """Return whether samples are 2-D points, as a float array of shape `[n, 2]`."""
    return samples.dtype.kind == "f" and samples.shape[1:] == (2,)


def tile_size(samples: np.ndarray) -> tuple[int, int]:
    """Return the displayed height and width, in CSS pixels, of uint8 images of shape `[n, h, w, c]`."""
    height, width = samples.shape[1:3]
    side = max(height, width)
    if side > LARGEST_TILE:
        return max(1, round(height * LARGEST_TILE / side)), max(1, round(width * LARGEST_TILE / side))
    factor = max(1, round(SMALLEST_TILE / side))
    return height * factor, width * factor


def data_url(content: bytes, kind: str) -> str:
    """Return the content as a data URL with media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def image_grid(samples: np.ndarray, columns: int, alt: str, in_full: bool = False) -> tuple[Markup, str]:
    """Return a grid of uint8 images of shape `[n, h, w, c]` as an <img>, and the URL of its PNG.

    Small images are enlarged by an integer factor without smoothing, and large images are reduced unless `in_full` is
    true.
    """
    large = max(samples.shape[1:3]) > LARGEST_TILE
    height, width = samples.shape[1:3] if in_full and large else tile_size(samples)
    rows = -(-len(samples) // columns)
    canvas = Image.new("RGBA", (columns * (width + GAP) - GAP, rows * (height + GAP) - GAP))
    how = Image.Resampling.LANCZOS if large else Image.Resampling.NEAREST
    for index, pixels in enumerate(samples):
        tile = Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).resize((width, height), how)
        canvas.paste(tile, ((index % columns) * (width + GAP), (index // columns) * (height + GAP)))
    if samples.shape[3] == 1:
        canvas = canvas.convert("LA")
    buffer = io.BytesIO()
    canvas.save(buffer, "PNG", optimize=True)
    url = data_url(buffer.getvalue(), "image/png")
    image = Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(url, canvas.width, canvas.height, alt)
    return image, url


def limits(points: np.ndarray) -> tuple[float, float, float]:
    """Return the centre (x, y) of the square around points `[n, 2]`, and half the square's side length."""
    points = points[np.isfinite(points).all(axis=1)].astype(np.float64)
    if not len(points):
        return 0.0, 0.0, 1.0
    low, high = points.min(axis=0), points.max(axis=0)
    centre = (low + high) / 2
    return float(centre[0]), float(centre[1]), float(max((high - low).max() / 2 * 1.15, 1e-6))


def scatter(points: np.ndarray, box: tuple[float, float, float], num_seeds: int, alt: str) -> Markup:
    """Draw points `[n, 2]` in the square `box` (from `limits`). The first `num_seeds` points are large and coloured."""
    x, y, half = box
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.stack([points[:, 0] - x, y - points[:, 1]], axis=1).astype(np.float64) / half * 50 + 50
    inside = np.asarray((np.isfinite(scaled) & (np.abs(scaled - 50) <= 50)).all(axis=1))

    def dots(chosen: np.ndarray) -> str:
        return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in chosen)

    rest = scaled[num_seeds:MOST_POINTS][inside[num_seeds:MOST_POINTS]]
    parts = [f'<path class="rest" d="{dots(rest)}"/>']
    for index in range(min(num_seeds, len(scaled))):
        if inside[index]:
            colour = COLOURS[index % len(COLOURS)]
            parts.append(f'<path class="seed" stroke="{colour}" d="{dots(scaled[index : index + 1])}"/>')
    svg = Markup(f'<svg class="points" viewBox="0 0 100 100" aria-hidden="true">{"".join(parts)}</svg>')
    return Markup('<span role="img" aria-label="{}">{}</span>').format(alt, svg)
