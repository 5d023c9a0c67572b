"""Store the nearest training samples, and present them in the report's section on memorisation."""

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
    """Write report/nearest.npz atomically, with a `key` that identifies the samples and the data."""
    arrays = {field.name: np.asarray(getattr(facts, field.name)) for field in fields(facts)}
    write_arrays(run.nearest_path, key=np.array(key), **arrays)


def nearest_key(run: RunFolder) -> str | None:
    """Return the key in report/nearest.npz, or None if the file cannot be read."""
    try:
        return str(read_arrays(run.nearest_path, "key")["key"])
    except DamagedFile:
        return None


class Nearest(NamedTuple):
    """The report's section on nearest training samples."""

    sentence: str
    rows: Sequence[tuple[Markup, Sequence[tuple[Markup, str]]]]
    """For each seed, the sample and its nearest training samples with distances; empty if they are not images."""


def shown_nearest(facts: NearestFacts | None) -> Nearest | None:
    """Return the section, or None if no search was run."""
    if facts is None:
        return None
    closest = facts.distances[:, 0]
    text = (
        f"The distance from {count(len(closest), 'sample')} to the nearest of {facts.num_searched:,} training samples "
        f"has a median of {number(float(np.median(closest)))} and a minimum of {number(float(closest.min()))} (the "
        "root mean square difference, which is 0 for a copy). "
    )
    if len(facts.real):
        text += (
            f"For comparison, the distance from {len(facts.real):,} training samples to the nearest other training "
            f"sample has a median of {number(float(np.median(facts.real)))} and a minimum of "
            f"{number(float(facts.real.min()))}. "
        )
    rows = []
    if figures.is_images(facts.samples) and facts.neighbours.dtype == np.uint8:
        text += "Smooth samples are close to everything, so look at the images too."
        for seed, (sample, neighbours) in enumerate(zip(facts.samples, facts.neighbours, strict=True)):
            near = []
            for place, pixels in enumerate(neighbours):
                distance = number(float(facts.distances[seed, place]))
                alt = f"Training image {place + 1} of seed {seed}, distance {distance}"
                near.append((figures.image_grid(pixels[None], 1, alt)[0], distance))
            rows.append((figures.image_grid(sample[None], 1, f"Sample of seed {seed}")[0], near))
    return Nearest(text.strip(), rows)
