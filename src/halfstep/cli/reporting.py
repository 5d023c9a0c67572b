"""`halfstep report`: writes the report page of a run, including the training samples nearest to the generated ones."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from halfstep.cli.arguments import recipe_of_run
from halfstep.cli.usage import UsageError, parse
from halfstep.cli.words import Screen
from halfstep.data import Data, open_data
from halfstep.measure.nearest import nearest_samples
from halfstep.measure.samples import samples_array
from halfstep.metrics import from_uint8
from halfstep.report import headline, read_run, save_nearest, write_report
from halfstep.report.nearest import nearest_key
from halfstep.report.reading import NearestFacts, RunFacts
from halfstep.runs import RunFolder

NUM_SHOWN = 8
"""The number of samples shown next to their nearest training images."""
NUM_SEARCHED = 64
"""The number of samples whose distances to the training data are reported."""


@dataclass
class ReportArguments:
    """Write the report of a run to RUN/report/index.html, a single file that works offline."""

    run: tyro.conf.Positional[Path]
    """Folder of a run, which may still be in progress."""
    studies: Path | None = None
    """Folder of studies (from `halfstep study`) to include; RUN/studies by default."""


def report(argv: Sequence[str]) -> None:
    arguments = parse(ReportArguments, argv, "halfstep report")
    if not arguments.run.is_dir():
        raise UsageError(f"{arguments.run} is not a run. Pass the folder of a run")
    if arguments.studies is not None and not any(arguments.studies.glob("*/study.json")):
        raise UsageError(f"{arguments.studies} contains no studies. Pass the folder that `halfstep study` wrote to")
    Screen().say(str(make_report(arguments.run, studies=arguments.studies)))


def make_report(run: Path, data: Data | None = None, studies: Path | None = None) -> Path:
    """Write RUN/report/index.html and return its path. If the data can be opened, the page shows the nearest training
    samples.

    Args:
        data: the training data; by default, the recipe's data.
        studies: a folder of studies to show; by default, RUN/studies.

    Raises:
        ValueError: if the folder contains nothing to report on.
    """
    facts = read_run(run, studies)
    return write_report(run, studies, _look(RunFolder(run), facts, data))


def _look(run: RunFolder, facts: RunFacts, data: Data | None) -> str | None:
    """Write report/nearest.npz unless it is up to date. If it cannot be written, return the reason."""
    shown = headline(facts)
    if shown is None:
        run.nearest_path.unlink(missing_ok=True)
        return "no stage has samples yet"
    name, steps = shown
    stage = next(stage for stage in facts.stages if stage.name == name)
    samples = stage.samples[steps][:NUM_SEARCHED]
    try:
        recipe = recipe_of_run(run)
        digest = hashlib.sha256(samples.tobytes()).hexdigest()
        fingerprint = run.recipe().get("data_fingerprint")
        # The first number is the search version. Increment it to repeat the search in all runs.
        key = f"1 {fingerprint} {recipe.data.flip} {name} {steps} {digest}"
        if fingerprint is not None and facts.nearest is not None and nearest_key(run) == key:
            return None
        # Remove the neighbours of earlier samples.
        run.nearest_path.unlink(missing_ok=True)
        data = open_data(recipe.data) if data is None else data
        if fingerprint not in (None, data.fingerprint):
            return f"{data.source} has changed since the run was trained on it"
        images = samples.dtype == np.uint8
        x0 = torch.from_numpy(samples)
        x0 = from_uint8(x0.permute(0, 3, 1, 2)) if images else x0
        found = nearest_samples(data, x0, 3, recipe.data.flip)
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    neighbours = found.x0[:NUM_SHOWN]
    pictures = samples_array(neighbours.flatten(0, 1), images).reshape(*neighbours.shape[:2], *samples.shape[1:])
    nearest = NearestFacts(
        stage=name,
        num_steps=steps,
        samples=samples[:NUM_SHOWN],
        neighbours=pictures,
        distances=found.distances.numpy(),
        real=found.real.numpy(),
        num_searched=found.num_searched,
    )
    save_nearest(run, nearest, key)
    return None
