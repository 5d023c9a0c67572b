"""`halfstep study`: reproduces the paper's tables and figures and compares methods."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from pydantic import Field
from pydantic.dataclasses import dataclass

from halfstep.cli.usage import Switch, UsageError, parse
from halfstep.cli.words import Screen, print_json, print_table
from halfstep.recipes import recipes
from halfstep.report.words import count, duration, number
from halfstep.run.events import Event, Notice, StageStart
from halfstep.runtime.files import read_json, refuse_file
from halfstep.runtime.stop import StopSignal
from halfstep.studies import SCALES, Scale, Trial, run_study, studies, write_study

if TYPE_CHECKING:
    RecipeName = str
    StudyName = str
else:
    RecipeName = tyro.extras.literal_type_from_choices(recipes)
    StudyName = tyro.extras.literal_type_from_choices(studies)


@dataclass
class StudyArguments:
    """Run a study: a set of runs, summarised in a table and a figure. To resume, run the same command again."""

    name: tyro.conf.Positional[StudyName]
    """Name of the study (see `halfstep ls studies`)."""
    scale: Literal["smoke", "small", "paper"] = "smoke"
    """smoke: digits, minutes on two CPU cores. small: Fashion-MNIST, hours on a GPU. paper: CIFAR-10, as published."""
    recipe: RecipeName | None = None
    """Recipe for the teacher and the chain, such as imagenet64_paper; by default, the scale's own recipe."""
    data: str | None = None
    """Data source, such as a folder; by default, the scale's data."""
    seeds: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Number of training seeds; by default, the scale's number."""
    threads: Annotated[int, Field(ge=1, le=512)] | None = None
    """Number of CPU threads for torch; by default, torch chooses."""
    out: Path | None = None
    """Folder shared by all studies of a scale; studies/SCALE by default."""
    dry_run: Switch = False
    """List the cells and, if known, their cost; write nothing."""
    json: Switch = False
    """Print the table or, with --dry-run, the cells as one JSON document; progress goes to stderr."""


def study(argv: Sequence[str]) -> None:
    arguments = parse(StudyArguments, argv, "halfstep study")
    screen = Screen(arguments.json)
    chosen = studies[arguments.name]()
    scale = scale_of(arguments)
    out = arguments.out or Path("studies") / scale.name
    refuse_file(out / arguments.name)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    trials = chosen.trials(scale)
    described = {"study": arguments.name, "scale": scale.name, "out": str(out / arguments.name)}
    if arguments.dry_run:
        costs = chosen.costs(scale)
        if arguments.json:
            counted = {"forward_passes": costs} if costs else {}
            print_json({**described, "cells": [dict(trial.axes) for trial in trials], **counted})
            return
        screen.say(f"{chosen.title}: {count(len(trials), 'cell')} -> {out / arguments.name}")
        for trial in trials:
            screen.say("  " + describe(trial))
        if costs:
            parts = ", ".join(f"{part} {round(passes):,}" for part, passes in costs.items())
            screen.say(f"single-sample forward passes: {parts}")
            total = sum(costs.values())
            pace = scale.passes_per_second
            time = f"; {duration(total / pace)} at {pace:,} per second" if pace else ""
            screen.say(f"total: {round(total):,}{time}")
        return
    numbers = itertools.count(1)

    def watch(event: Event) -> None:
        if isinstance(event, StageStart):
            screen.say(f"  {event.name}: {count(event.stage.training.num_updates, 'update')}", style="dim")
        elif isinstance(event, Notice):
            screen.note(event.text, indent="  ")

    def done(trial: Trial, figures: dict[str, object], was_there: bool) -> None:
        shown = ", ".join(
            f"{k} {number(v)}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items() if v is not None
        )
        there = " (reused)" if was_there else ""
        screen.say(f"[{next(numbers)}/{len(trials)}] {describe(trial)}: {shown}{there}")

    with StopSignal() as stop:
        rows = run_study(chosen, scale, out, stop=stop, watch=watch, done=done)
    path = write_study(chosen, scale, rows, out)
    table = chosen.table(rows, scale)
    if arguments.json:
        print_json({**described, "title": chosen.title, **table._asdict()})
        return
    print_table(table, chosen.title, screen)
    seconds = duration(float(read_json(path.with_name("study.json"))["seconds"]))
    screen.say(f"{path}, {path.with_name('figure.png').name}; cells took {seconds}")


def scale_of(arguments: StudyArguments) -> Scale:
    """Return the selected scale, with command-line overrides applied."""
    scale = SCALES[arguments.scale]()
    if arguments.recipe is not None:
        # The evaluation settings always come from the scale, not from the recipe.
        recipe = recipes[arguments.recipe]().model_copy(update={"evaluation": scale.recipe.evaluation})
        scale = dataclasses.replace(scale, recipe=recipe, ablation=recipe)
    if arguments.data is not None:
        recipe, ablation = (
            recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": arguments.data})})
            for recipe in (scale.recipe, scale.ablation)
        )
        scale = dataclasses.replace(scale, recipe=recipe, ablation=ablation)
    if arguments.seeds is None:
        return scale
    counts = [name for name in ("seeds", "road_seeds") if name in studies[arguments.name].uses]
    if not counts:
        raise UsageError(f"--seeds has no effect on the study {arguments.name}, which uses one seed. Remove it")
    changes: dict[str, Any] = dict.fromkeys(counts, arguments.seeds)
    return dataclasses.replace(scale, **changes)


def describe(trial: Trial) -> str:
    """Return the axes of a trial and their values on one line."""
    return ", ".join(f"{key} {value}" for key, value in trial.axes.items())
