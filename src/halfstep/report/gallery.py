"""The same noise through every model: the pictures behind the slider, and the strip of all models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.quality import Group
from halfstep.report.reading import RunFacts
from halfstep.report.summary import Summary
from halfstep.report.words import count
from halfstep.runs.schema import Result

WALKED_COLUMNS = 5
MODELS = {
    "student": "the student",
    "matched": "the matched teacher",
    "teacher": "the teacher, not distilled,",
}
"""How the text of a picture calls its model."""


@dataclass(frozen=True)
class Sizes:
    """How much of the samples is shown."""

    num_seeds: int = 8
    """Rows of the strip."""
    num_walked: int = 20
    """Seeds behind the slider, for small images."""
    most_pixels: int = 100_000
    """Pixels of one picture behind the slider."""

    def smaller(self) -> "Sizes | None":
        """About half as much; None where there is no less."""
        if self.num_seeds == 1:
            return None
        return Sizes(self.num_seeds // 2, max(1, self.num_walked // 2), self.most_pixels // 2)


@dataclass(frozen=True)
class Picture:
    """What a model makes of the seeds at one number of steps."""

    who: str
    """"student", "matched" or "teacher"."""
    alt: str
    image: Markup
    """An <img> or <svg> of ours."""
    frechet: float | None


@dataclass(frozen=True)
class Walked:
    """One place of the slider."""

    steps: int
    student: Picture | None
    """Above the first student's steps the teacher that it learns from: the matched model, or the start of the chain."""
    teacher: Picture | None


@dataclass(frozen=True)
class Gallery:
    """The same noise through every model."""

    kind: str
    """"images", "points", or why there is no picture."""
    steps: Sequence[int] = ()
    students: Sequence[Picture | None] = ()
    """For each of `steps`, with their teacher above the first student's steps; empty if there is no student."""
    teachers: Sequence[Picture | None] = ()
    num_seeds: int = 0
    row_height: int = 0
    """Pixels from one seed to the next."""
    width: int = 0
    """Pixels of a picture of the strip."""
    walk: Sequence[Walked] = ()
    walk_start: int = 0
    reduced_from: str | None = None


def gallery(facts: RunFacts, groups: Sequence[Group], summary: Summary, sizes: Sizes) -> Gallery | None:
    """The pictures, None if no stage has samples."""
    teacher = dict(facts.start.samples) if facts.start else {}
    matched: dict[int, np.ndarray] = {}
    students: dict[int, np.ndarray] = {}
    for stage in facts.others:
        (students if stage.role == "student" else matched).update(stage.samples)
    arrays = [
        *(array for _, array in sorted(teacher.items(), reverse=True)),
        *matched.values(),
        *students.values(),
    ]
    if not arrays:
        return None
    if {array.shape[1:] for array in arrays} != {arrays[0].shape[1:]}:
        return Gallery("The stages hold samples of different shapes, so they are not shown side by side.")
    if not (all(map(figures.is_images, arrays)) or all(map(figures.is_points, arrays))):
        shape = " × ".join(str(size) for size in arrays[0].shape[1:])
        return Gallery(f"There is no picture for this modality: samples of shape {shape}, {arrays[0].dtype}.")
    images = figures.is_images(arrays[0])
    fewest = min(len(array) for array in arrays)
    num_seeds = min(sizes.num_seeds, fewest)
    measured = _measured(groups)
    box = (0.0, 0.0, 1.0) if images else figures.limits(arrays)

    def picture(who: str, steps: int, chosen: np.ndarray | None, columns: int) -> Picture | None:
        if chosen is None:
            return None
        result = measured.get((steps, who))
        model = MODELS[who]
        if images:
            data, width, height = figures.png_grid(chosen, columns)
            order = "from top to bottom" if columns == 1 else "row by row"
            alt = f"Seeds 0 to {len(chosen) - 1}, {order}: samples of {model} at {count(steps, 'step')}"
            source = f"data:image/png;base64,{data}"
            image = Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(source, width, height, alt)
        else:
            shown = min(len(chosen), figures.MOST_POINTS)
            alt = f"Scatter plot of {shown} samples of {model} at {count(steps, 'step')}"
            image = Markup('<span role="img" aria-label="{}">{}</span>').format(
                alt, figures.scatter(chosen, box, num_seeds)
            )
        return Picture(who, alt, image, result.frechet if result else None)

    def distilled(steps: int, length: int, columns: int) -> Picture | None:
        """The student, or above the first one's steps the teacher that it learns from."""
        made = picture("student", steps, _head(students.get(steps), length), columns)
        if made is not None or steps <= max(students, default=0):
            return made
        return picture("matched", steps, _head(matched.get(steps), length), columns) or picture(
            "teacher", steps, _head(teacher.get(steps), length), columns
        )

    steps = sorted(teacher.keys() | matched.keys() | students.keys(), reverse=True)
    walked = fewest
    if images:
        walked = max(
            min(num_seeds, fewest),
            min(sizes.num_walked, fewest, sizes.most_pixels // math.prod(figures.tile_size(arrays[0]))),
        )
    strip = num_seeds if images else fewest
    alone = [picture("teacher", n, _head(teacher.get(n), strip), 1) for n in steps]
    made = [distilled(n, strip, 1) for n in steps]
    walk = []
    for n in steps:
        undistilled = picture("teacher", n, _head(teacher.get(n), walked), WALKED_COLUMNS)
        walk.append(Walked(n, distilled(n, walked, WALKED_COLUMNS), undistilled))
    start = summary.best.steps if summary.best and summary.best.steps in steps else min(students, default=steps[0])
    height, width = figures.tile_size(arrays[0]) if images else (0, 88)
    size = arrays[0].shape[1:3]
    return Gallery(
        kind="images" if images else "points",
        steps=steps,
        students=made if students or matched else (),
        teachers=alone,
        num_seeds=num_seeds,
        row_height=height + figures.GAP,
        width=width,
        walk=walk if len(walk) > 1 else (),
        walk_start=steps.index(start),
        reduced_from=f"{size[1]} × {size[0]}" if images and max(size) > figures.LARGEST_TILE else None,
    )


def _measured(groups: Sequence[Group]) -> dict[tuple[int, str], Result]:
    """The figures to put below a picture, by its steps and "student", "matched" or "teacher"."""
    rows = [row for group in groups for row in group.rows]
    pairs = [(row.steps, "matched" if row.is_matched else "student", row.student) for row in rows] + [
        (row.steps, "teacher", row.teacher) for row in rows
    ]
    return {(steps, who): result for steps, who, result in pairs if result is not None}


def _head(array: np.ndarray | None, length: int) -> np.ndarray | None:
    return None if array is None else array[:length]
