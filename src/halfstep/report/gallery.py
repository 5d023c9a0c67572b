"""Samples of every model from the same noise, as images for the slider and for the strip of all models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import RunFacts, StageFacts
from halfstep.report.summary import Summary
from halfstep.report.words import count, sampler_label
from halfstep.runs import Best

WALKED_COLUMNS = 5
MODELS = {"student": "the student", "matched": "the matched teacher", "teacher": "the undistilled teacher"}
"""Names of the models in the images' alternative text."""


@dataclass(frozen=True)
class Sizes:
    """Limits on the samples to show."""

    num_seeds: int = 8
    """Number of rows in the strip."""
    num_walked: int = 20
    """Number of seeds in the slider if the images are small."""
    most_pixels: int = 100_000
    """Maximum number of pixels of one image in the slider."""

    def smaller(self) -> "Sizes | None":
        """Return limits that are about half as large, or None if there is only one seed."""
        if self.num_seeds == 1:
            return None
        return Sizes(self.num_seeds // 2, max(1, self.num_walked // 2), self.most_pixels // 2)


class Picture(NamedTuple):
    """Samples of a model with a given number of steps."""

    who: str
    """"student", "matched" or "teacher"."""
    image: Markup
    frechet: float | None


class Column(NamedTuple):
    """A column of the strip."""

    steps: int
    by: str | None = None
    """Sampler of the teacher at its best, or None for the teacher's own sampler."""

    @property
    def label(self) -> str:
        """Description such as "8 steps" or "32 Heun steps"."""
        return count(self.steps, f"{sampler_label(self.by)} step" if self.by else "step")


class Walked(NamedTuple):
    """One position of the slider."""

    column: Column
    student: Picture | None
    """The student with this number of steps. For more steps than any student takes, the first student's teacher: the
    matched model or the start of the chain."""
    teacher: Picture | None


class Gallery(NamedTuple):
    """Samples of every model from the same noise."""

    kind: str
    """The kind of samples shown, "images" or "points", or the reason why nothing is shown."""
    columns: Sequence[Column] = ()
    students: Sequence[Picture | None] = ()
    """`Walked.student` for each column, or empty if there are no students."""
    teachers: Sequence[Picture | None] = ()
    num_seeds: int = 0
    row_height: int = 0
    """Distance in pixels from one seed to the next."""
    width: int = 0
    """Width in pixels of an image in the strip."""
    walk: Sequence[Walked] = ()
    walk_start: int = 0
    reduced_from: str | None = None


def gallery(facts: RunFacts, summary: Summary, sizes: Sizes, best: Best | None = None) -> Gallery | None:
    """Return the gallery, or None if no stage has samples.

    Args:
        best: the teacher at its best, which has a column if its samples were kept.
    """
    held: dict[str, dict[Column, tuple[np.ndarray, float | None]]] = {"teacher": {}, "matched": {}, "student": {}}
    if (first := facts.start) is not None:
        held["teacher"] = _samples(first)
        if best is not None and (at_best := first.by_others.get((best.sampler, best.num_steps))) is not None:
            held["teacher"][Column(best.num_steps, best.sampler)] = at_best, best.frechet
    for stage in facts.others:
        # If several students have the same number of steps, the last one is shown.
        held["student" if stage.role == "student" else "matched"] |= _samples(stage)
    students = held["student"]
    arrays = [array for by_column in held.values() for array, _ in by_column.values()]
    if not arrays:
        return None
    if {array.shape[1:] for array in arrays} != {arrays[0].shape[1:]}:
        return Gallery("The stages have samples of different shapes, so they are not shown side by side.")
    if not (all(map(figures.is_images, arrays)) or all(map(figures.is_points, arrays))):
        shape = " × ".join(str(size) for size in arrays[0].shape[1:])
        return Gallery(f"Samples of shape {shape} and type {arrays[0].dtype} cannot be shown as images.")
    columns = sorted(set().union(*held.values()), key=lambda column: (column.by is None, -column.steps))
    images = figures.is_images(arrays[0])
    fewest = min(len(array) for array in arrays)
    num_seeds = min(sizes.num_seeds, fewest)
    # Only the first model sets the frame, so that outliers of the other models do not shrink all points to a dot.
    box = (0.0, 0.0, 1.0) if images else figures.limits(arrays[0])

    def picture(who: str, column: Column, length: int, columns: int) -> Picture | None:
        if column not in held[who]:
            return None
        array, frechet = held[who][column]
        chosen = array[:length]
        made = f"samples of {MODELS[who]} at {column.label}"
        if images:
            order = "from top to bottom" if columns == 1 else "row by row"
            alt = f"Seeds 0 to {len(chosen) - 1}, {order}: {made}"
            image, _ = figures.image_grid(chosen, columns, alt)
        else:
            alt = f"Scatter plot of {min(len(chosen), figures.MOST_POINTS)} {made}"
            image = figures.scatter(chosen, box, num_seeds, alt)
        return Picture(who, image, frechet)

    most = max((column.steps for column in students), default=0)

    def distilled(column: Column, length: int, columns: int) -> Picture | None:
        """Return `Walked.student`."""
        if column.by is None and column.steps <= most:
            return picture("student", column, length, columns)
        return picture("matched", column, length, columns) or picture("teacher", column, length, columns)

    height, width = figures.tile_size(arrays[0]) if images else (0, 88)
    strip = walked = fewest
    if images:
        strip = num_seeds
        walked = max(num_seeds, min(sizes.num_walked, fewest, sizes.most_pixels // (height * width)))
    walk = [
        Walked(one, distilled(one, walked, WALKED_COLUMNS), picture("teacher", one, walked, WALKED_COLUMNS))
        for one in columns
    ]
    shown = summary.best.steps if summary.best is not None else min(students, default=columns[0]).steps
    start = next((place for place, one in enumerate(columns) if one == Column(shown)), len(columns) - 1)
    size = arrays[0].shape[1:3]
    return Gallery(
        kind="images" if images else "points",
        columns=columns,
        students=[distilled(one, strip, 1) for one in columns] if students or held["matched"] else (),
        teachers=[picture("teacher", one, strip, 1) for one in columns],
        num_seeds=num_seeds,
        row_height=height + figures.GAP,
        width=width,
        walk=walk if len(walk) > 1 else (),
        walk_start=start,
        reduced_from=f"{size[1]} × {size[0]}" if images and max(size) > figures.LARGEST_TILE else None,
    )


def _samples(stage: StageFacts) -> dict[Column, tuple[np.ndarray, float | None]]:
    """Return the samples from a stage's own sampler and their Frechet distances, in descending order of steps."""
    results, own = stage.metrics.results if stage.metrics is not None else (), stage.manifest.outcome.sampler_name
    frechet = {result.num_steps: result.frechet for result in results if result.sampler == own}
    return {Column(steps): (stage.samples[steps], frechet.get(steps)) for steps in sorted(stage.samples, reverse=True)}
