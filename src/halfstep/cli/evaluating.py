"""`halfstep evaluate`: the curve of a run, of a pipeline, or the figures of a folder of images."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from halfstep.cli.subjects import Asked, Subject, files_plan, plan_of, subject_of
from halfstep.cli.usage import Switch, UsageError, parse
from halfstep.cli.words import console_for, print_json
from halfstep.data import Data, DataConfig, open_data
from halfstep.measure.curve import CellDone, Curve, CurveSpec
from halfstep.measure.evaluate import Reference
from halfstep.recipes import EvaluationConfig, Recipe
from halfstep.recipes.schema import check_fit
from halfstep.report.evaluation import cells_of, headings_of, protocol_words, title_of, write_evaluation
from halfstep.runs import EvaluationResult, StageFolder
from halfstep.runtime.files import cache_folder, read_json
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal


@dataclass
class EvaluateArguments:
    """Measure every student of a run at its own steps by its own sampler, the teacher by several at all, in one or more
    kinds of features, over one or several sets of seeds. SUBJECT is the folder of a run, of a stage, of a diffusers
    pipeline (or its name on the Hub), or a folder of images or an .npz of samples. The same command goes on where it
    was cut, and draws nothing that is there. It writes evaluation.json, .md, .csv, .svg, and keeps the samples."""

    subject: tyro.conf.Positional[str]
    """What to measure."""
    num_steps: tuple[int, ...] = ()
    """Steps of the --against series, and of a single stage; by default the start of the chain, halved down to 1."""
    against: tuple[str, ...] | None = None
    """Series beside the students: teacher-SAMPLER or student-SAMPLER (see `halfstep ls samplers`); by default the
    teacher by its own sampler."""
    extractors: tuple[str, ...] = ()
    """Where distances are measured: NAME or NAME=WEIGHTS (see `halfstep ls extractors`); the recipe's by default."""
    seeds: int = 1
    """Sets of seeds; with several, figures have a spread."""
    num_samples: int | None = None
    """Samples in a set; as in the recipe by default, and all of a folder's."""
    gamma: float | None = None
    """Of ancestral sampling: its variance, from 0 for the lower bound to 1 for the upper, which is the default."""
    search_gamma: int | None = None
    """Try so many values of gamma from 0 to 1 (the paper: 11) for each ancestral row and show the best."""
    guidance_scale: float | None = None
    """For models that know guidance; each model's own by default."""
    precision: Literal["float32", "bf16"] | None = None
    """bf16 lets the networks compute in bfloat16 while they sample; as in the recipe by default."""
    batch_size: int | None = None
    """Samples drawn at once; the recipe's number by default, or as many as fit if it has none."""
    data: str | None = None
    """Real samples to compare with; those of the recipe by default."""
    image_size: int | None = None
    """Side to which real images of another size are brought; as in the recipe by default."""
    channels: Literal[1, 3] | None = None
    """1 reads real images as grey, 3 in colour; as in the recipe by default."""
    split: str | None = None
    """Their split; the recipe's by default, on which the models were trained."""
    out: Path | None = None
    """Folder of the evaluation; SUBJECT/evaluation by default, evaluation-NAME here for what is no run or stage."""
    json: Switch = False
    """Print the evaluation as one JSON document, as in evaluation.json; progress goes to stderr."""


def evaluate(
    argv: Sequence[str],
    recipe_of: Callable[[StageFolder], Recipe | None],
    device: torch.device,
    processes: Processes,
) -> None:
    """Measures, prints one table for each protocol, and writes the files.

    Args:
        recipe_of: the recipe of a stage's run, None if the stage lies outside one.
        processes: those that do this together; the first prints and writes the tables.
    """
    arguments = parse(EvaluateArguments, argv, "halfstep evaluate")
    console = console_for(arguments.json)
    _check(arguments)
    subject = subject_of(arguments.subject, recipe_of)
    recipe = _recipe(subject, arguments)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    data = open_data(recipe.data)
    for _, manifest, _ in subject.models:
        check_fit(manifest, data)
    settings = recipe.evaluation.model_dump()
    for name in ("num_samples", "batch_size", "precision"):
        if (value := getattr(arguments, name)) is not None:
            settings[name] = value
    evaluation = EvaluationConfig.model_validate(settings).as_object()
    if subject.files is not None:
        _check_files(arguments)
        samples = _samples(subject.files, data)
        rows = files_plan(samples)
        evaluation = replace(evaluation, num_samples=_count(arguments, samples))
    else:
        asked = Asked(
            arguments.num_steps, arguments.against, arguments.gamma, arguments.search_gamma, arguments.guidance_scale,
            evaluation.precision,
        )  # fmt: skip
        rows = plan_of(subject, asked, recipe, data, device)
    features = dict.fromkeys(arguments.extractors or (evaluation.features,))
    references = processes.main_first(
        lambda: [Reference(data, replace(evaluation, features=one), cache_folder(), device) for one in features]
    )
    processes.check_same(
        " and ".join(reference.extractor.name for reference in references),
        "extractors of features",
        "let all of them see the same cache folder (HALFSTEP_CACHE)",
    )
    spec = CurveSpec(
        subject=arguments.subject,
        kind=subject.kind,
        series=rows.series,
        entries=rows.entries,
        references=references,
        reference_split=_split_of(recipe.data),
        num_samples=evaluation.num_samples,
        num_seeds=arguments.seeds,
        batch_size=evaluation.batch_size,
        guidance_scale=arguments.guidance_scale,
        teacher=rows.teacher,
        notices=subject.notices,
    )
    out = arguments.out or subject.out
    with StopSignal() as stop:
        curve = Curve(spec, out, stop)
        if processes.count > 1:
            curve.share(processes)
        if not processes.is_main:
            return
        try:
            for cell in curve.run():
                console.print(_line(cell), highlight=False, markup=False)
        finally:
            # Of a call that was cut, what is there: all files say the same.
            written = [] if curve.result is None else write_evaluation(curve.result, out)
    assert curve.result is not None
    show(curve.result, console)
    if arguments.json:
        print_json(read_json(out / "evaluation.json"))
    names = ", ".join([str(out / "evaluation.json"), *(path.name for path in written)])
    console.print(f"{names}; {curve.result.seconds:.0f} s of work", highlight=False, soft_wrap=True)


def _check(arguments: EvaluateArguments) -> None:
    """Refuses what is out of range or contradicts itself."""
    for name, least in (("num_samples", 2), ("seeds", 1), ("search_gamma", 2), ("batch_size", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            reason = ": a search over gamma needs at least 2 levels, from 0 to 1" if name == "search_gamma" else ""
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}{reason}")
    if arguments.search_gamma is not None and arguments.gamma is not None:
        raise UsageError("--search-gamma searches gamma and --gamma sets it: leave one out")


def _recipe(subject: Subject, arguments: EvaluateArguments) -> Recipe:
    """The recipe that says what data and how: the run's, with what the command line says of the data."""
    if subject.recipe is None and arguments.data is None:
        raise UsageError(f"{arguments.subject} lies outside a run, so its data is not known: add --data SOURCE")
    recipe = subject.recipe or Recipe(name="evaluate")
    given = {
        "source": arguments.data,
        "split": arguments.split,
        "image_size": arguments.image_size,
        "channels": arguments.channels,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changes)})


def _split_of(data: DataConfig) -> str | None:
    """The split that was read; None of data that have none."""
    path = Path(data.source)
    whole = path.is_file() or (path.is_dir() and not any(path.glob(f"{data.split}*")))
    return None if whole or data.source == "digits" else data.split


def _samples(path: Path, data: Data) -> Data:
    """The samples in files, in the form of the data that they are compared with.

    Raises:
        UsageError: if they have another size or range.
    """
    channels = data.shape[0] if data.is_image and path.is_dir() and data.shape[0] in (1, 3) else None
    config = {"source": str(path), "labels": False, "channels": channels, "max_bytes": sys.maxsize}
    samples = open_data(DataConfig.model_validate(config))
    if samples.is_image != data.is_image:
        kinds = {True: "uint8 images", False: "arrays of floats"}
        raise UsageError(
            f"{path} holds {kinds[samples.is_image]}, but the reference {data.source} holds {kinds[data.is_image]}: "
            "give samples and reference of one kind"
        )
    if samples.shape != data.shape:
        raise UsageError(
            f"{path} holds samples of shape {list(samples.shape)}, but the reference {data.source} holds "
            f"{list(data.shape)}: give a reference of the same size (--data)"
        )
    return samples


def _check_files(arguments: EvaluateArguments) -> None:
    """Refuses what says nothing to samples that are there."""
    for name, idle in (
        ("num_steps", ()), ("against", None), ("seeds", 1), ("gamma", None), ("search_gamma", None),
        ("guidance_scale", None), ("precision", None), ("batch_size", None),
    ):  # fmt: skip
        if getattr(arguments, name) != idle:
            raise UsageError(f"--{name.replace('_', '-')} says nothing to samples in files: leave it out")


def _count(arguments: EvaluateArguments, samples: Data) -> int:
    """How many of the samples in files are measured."""
    wanted = len(samples) if arguments.num_samples is None else arguments.num_samples
    if not 2 <= wanted <= len(samples):
        raise UsageError(
            f"{samples.source} holds {len(samples)} samples, and {max(wanted, 2)} are needed: a distance between sets "
            "needs at least 2"
        )
    return wanted


def _line(cell: CellDone) -> str:
    """One line for a cell, when its figures are there."""
    at = "" if cell.entry.num_steps is None else f" at {cell.entry.num_steps} steps"
    gamma = "" if cell.entry.gamma is None else f", gamma {cell.entry.gamma:g}"
    shown = ", ".join(
        f"{values['frechet']:.4g} in {_short(name)}" for name, values in cell.figures.items() if "frechet" in values
    )
    there = " (was there)" if cell.was_there else ""
    seeds = f"seeds {cell.seeds[0]}-{cell.seeds[-1]}"
    return f"[{cell.done}/{cell.total}] {cell.entry.series}{at}{gamma}, {seeds}: {shown}{there}"


def _short(extractor: str) -> str:
    """An extractor's name without the digest at its end."""
    head, _, tail = extractor.rpartition("-")
    return head if len(tail) == 12 and head else extractor


def show(result: EvaluationResult, console: Console) -> None:
    """Prints a table for each protocol, and the notices."""
    for table in result.tables:
        shown = Table(title=escape(title_of(table)), title_justify="left")
        for index, heading in enumerate(headings_of(table, result)):
            shown.add_column(escape(heading), justify="right" if index else "left")
        for cells in cells_of(table, result):
            shown.add_row(*(escape(cell) for cell in cells))
        console.print(shown)
        console.print(escape(protocol_words(table.protocol)), highlight=False, style="dim")
    for notice in result.notices:
        console.print(f"[yellow]note:[/yellow] {escape(notice)}", highlight=False)
