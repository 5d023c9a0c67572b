"""Nearest training samples: has the model learned its data by heart? The file of them, and how they are shown."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import NearestFacts
from halfstep.report.words import count, number
from halfstep.runs import RunFolder
from halfstep.runtime.files import DamagedFile, read_arrays, write_arrays


def save_nearest(run: RunFolder, facts: NearestFacts, key: str) -> None:
    """Writes report/nearest.npz, whole or not at all.

    Args:
        key: of what the facts were made; `nearest_key` gives it back.
    """
    arrays = {field.name: np.asarray(getattr(facts, field.name)) for field in fields(facts)}
    write_arrays(run.nearest_path, key=np.array(key), **arrays)


def nearest_key(run: RunFolder) -> str | None:
    """The key of the report/nearest.npz that is there; None if there is none, or none that can be read."""
    try:
        return str(read_arrays(run.nearest_path, "key")["key"])
    except DamagedFile:
        return None


@dataclass(frozen=True)
class Neighbour:
    """A training sample beside a sample."""

    image: Markup
    distance: str


@dataclass(frozen=True)
class NearestRow:
    """A sample and the training samples nearest to it."""

    seed: int
    image: Markup
    neighbours: Sequence[Neighbour]


@dataclass(frozen=True)
class Nearest:
    """The section of the page."""

    heading: str
    sentence: str
    rows: Sequence[NearestRow]
    """Empty where samples are no pictures."""
    num_neighbours: int


def shown_nearest(facts: NearestFacts | None) -> Nearest | None:
    """The section; None without facts."""
    if facts is None:
        return None
    closest = facts.distances[:, 0]
    text = (
        f"Of {count(len(closest), 'sample')}, the median distance to the nearest of {facts.num_searched:,} training "
        f"samples is {number(float(np.median(closest)))}, the smallest {number(float(closest.min()))} (root mean "
        "square difference of all values; a copy has 0). "
    )
    if len(facts.real):
        text += (
            f"Training samples themselves are {number(float(np.median(facts.real)))} from the nearest other one "
            f"(median of {len(facts.real):,}), the smallest {number(float(facts.real.min()))}. "
        )
    text += "Smooth samples are nearer to everything, so look at the pictures too." if _drawable(facts) else ""
    rows = []
    if _drawable(facts):
        for seed, (sample, neighbours) in enumerate(zip(facts.samples, facts.neighbours, strict=True)):
            made = Neighbour(_image(sample, f"Sample of seed {seed}"), "")
            near = [
                Neighbour(
                    _image(picture, f"Training image {place} of seed {seed}, distance {number(distance)}"),
                    number(distance),
                )
                for place, (picture, distance) in enumerate(
                    zip(neighbours, facts.distances[seed].tolist(), strict=True), 1
                )
            ]
            rows.append(NearestRow(seed, made.image, near))
    heading = f"samples of {facts.stage} at {count(facts.num_steps, 'step')}"
    return Nearest(heading, text.strip(), rows, facts.neighbours.shape[1])


def _drawable(facts: NearestFacts) -> bool:
    return figures.is_images(facts.samples) and facts.neighbours.dtype == np.uint8


def _image(pixels: np.ndarray, alt: str) -> Markup:
    data, width, height = figures.png_grid(pixels[None], 1)
    source = f"data:image/png;base64,{data}"
    return Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(source, width, height, alt)
