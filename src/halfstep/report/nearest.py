"""Nearest training samples, which show whether the model has memorised its data: their file and their section."""

from collections.abc import Sequence
from dataclasses import fields
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import NearestFacts
from halfstep.report.words import count, number
from halfstep.runs import RunFolder
from halfstep.runtime.files import DamagedFile, read_arrays, write_arrays


def save_nearest(run: RunFolder, facts: NearestFacts, key: str) -> None:
    """Write report/nearest.npz atomically, with a `key` that identifies what the facts were computed from."""
    arrays = {field.name: np.asarray(getattr(facts, field.name)) for field in fields(facts)}
    write_arrays(run.nearest_path, key=np.array(key), **arrays)


def nearest_key(run: RunFolder) -> str | None:
    """Return the key in report/nearest.npz; None if the file does not exist or cannot be read."""
    try:
        return str(read_arrays(run.nearest_path, "key")["key"])
    except DamagedFile:
        return None


class Nearest(NamedTuple):
    """The report's section on nearest training samples."""

    heading: str
    sentence: str
    rows: Sequence[tuple[Markup, Sequence[tuple[Markup, str]]]]
    """For each seed, the image of its sample and those of its nearest training samples with their distances; empty if
    samples are not images."""
    num_neighbours: int


def shown_nearest(facts: NearestFacts | None) -> Nearest | None:
    """Return the section; None without facts."""
    if facts is None:
        return None
    closest = facts.distances[:, 0]
    text = (
        f"The distance from {count(len(closest), 'sample')} to the nearest of {facts.num_searched:,} training samples "
        f"has a median of {number(float(np.median(closest)))} and a minimum of {number(float(closest.min()))} (root "
        "mean square difference of all values; a copy has 0). "
    )
    if len(facts.real):
        text += (
            f"From {len(facts.real):,} training samples to the nearest other one, the median is "
            f"{number(float(np.median(facts.real)))} and the minimum {number(float(facts.real.min()))}. "
        )
    rows = []
    if figures.is_images(facts.samples) and facts.neighbours.dtype == np.uint8:
        text += "Smooth samples are nearer to everything, so look at the images too."
        for seed, (sample, neighbours) in enumerate(zip(facts.samples, facts.neighbours, strict=True)):
            near = []
            for place, pixels in enumerate(neighbours):
                distance = number(float(facts.distances[seed, place]))
                alt = f"Training image {place + 1} of seed {seed}, distance {distance}"
                near.append((figures.image_grid(pixels[None], 1, alt)[0], distance))
            rows.append((figures.image_grid(sample[None], 1, f"Sample of seed {seed}")[0], near))
    heading = f"samples of {facts.stage} at {count(facts.num_steps, 'step')}"
    return Nearest(heading, text.strip(), rows, facts.neighbours.shape[1])
