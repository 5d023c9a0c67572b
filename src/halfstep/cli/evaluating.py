"""`halfstep evaluate`: measures the quality curve of a run or pipeline, or the quality of a folder of images."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from halfstep.cli.arguments import device_of, processes_of
from halfstep.cli.subjects import EvaluateArguments, Rows, Subject, subject_of
from halfstep.cli.usage import UsageError, in_own_words, parse, refuse_idle
from halfstep.cli.words import Screen, print_json, print_table
from halfstep.data import Data, DataConfig, open_data
from halfstep.measure.curve import CellDone, Curve, CurveSpec, Entry
from halfstep.measure.evaluate import references_for
from halfstep.measure.sources import DataSource
from halfstep.measure.store import Store, seeds_name
from halfstep.recipes import Recipe
from halfstep.recipes.building import check_fit
from halfstep.report.evaluation import protocol_words, text_table, title_of, write_evaluation
from halfstep.report.words import count, duration, number
from halfstep.runs.evaluation import Series
from halfstep.runtime.failures import told_when_out_of_memory
from halfstep.runtime.files import cache_folder, refuse_file, user_path
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal

NEED_MODEL: Final = (
    *("num_steps", "against", "seeds", "gamma", "search_gamma", "guidance_scale", "precision", "batch_size"),
)
"""The options that apply only when models are measured."""


@told_when_out_of_memory("out of memory while measuring. Free some memory, or use fewer samples (--num-samples)")
def evaluate(argv: Sequence[str]) -> None:
    """Measure the subject, print one table per protocol and write the result files."""
    processes = processes_of()
    device = device_of(None, processes)
    arguments = parse(EvaluateArguments, argv, "halfstep evaluate")
    screen = Screen(arguments.json)
    if arguments.search_gamma is not None and arguments.gamma is not None:
        raise UsageError("--search-gamma and --gamma cannot be combined. Remove one of them")
    subject = subject_of(arguments.subject)
    out = arguments.out or subject.out
    # Check this first, because computing the features of the real data can take a long time.
    refuse_file(out)
    spec = _spec(subject, arguments, device, processes)
    with StopSignal() as stop:
        folder = arguments.out or subject.store or out
        store = Store(folder, batch_size=spec.evaluation.batch_size, processes=processes, stop=stop)
        curve = Curve(spec, store, out)
        try:
            for cell in curve.run():
                screen.say(_line(cell, len(curve.cells)))
        finally:
            # Write the files even after an interruption, so that all of them show the same results.
            written = [] if curve.result is None else write_evaluation(curve.result, out)
    if curve.result is None:
        return
    for table in curve.result.tables:
        print_table(text_table(table, curve.result), title_of(table), screen)
        screen.say(protocol_words(table.protocol), style="dim")
    for notice in curve.result.notices:
        screen.note(notice)
    if arguments.json:
        print_json(curve.result.model_dump(mode="json"))
    names = ", ".join([str(out / "evaluation.json"), *(path.name for path in written)])
    screen.say(f"{names}; sampling and measuring took {duration(curve.result.seconds)}")


def _spec(subject: Subject, arguments: EvaluateArguments, device: torch.device, processes: Processes) -> CurveSpec:
    """Return the specification of the quality curve; reject options that do not apply to the subject."""
    recipe = _recipe(subject, arguments)
    if recipe.engine.threads is not None:
        torch.set_num_threads(recipe.engine.threads)
    with in_own_words("image-size", "channels", "split", "no-labels", "label-column", "skip-broken", "max-bytes"):
        data = open_data(recipe.data)
    for model in (subject.teacher, *subject.students):
        if model is not None:
            check_fit(model.manifest, data)
    evaluation = recipe.evaluation
    teacher = None
    if subject.files is not None:
        refuse_idle(arguments, "when the samples are read from files", NEED_MODEL)
        samples = _samples(subject.files, data)
        evaluation = replace(evaluation, num_samples=_count(arguments, samples))
        series = [Series(name="samples", label="samples", role="other")]
        entries = [Entry("samples", None, DataSource(samples), None)]
    else:
        rows = Rows(subject, arguments, recipe, data, device)
        series, entries, teacher = rows.series, rows.entries, rows.teacher()
    features = dict.fromkeys(arguments.extractors or (evaluation.features,))
    references = references_for(data, evaluation, features, cache_folder(), device, processes)
    return CurveSpec(
        subject=arguments.subject,
        kind=subject.kind,
        series=series,
        entries=entries,
        evaluation=evaluation,
        references=references,
        reference_split=_split_of(recipe.data),
        num_seeds=arguments.seeds,
        guidance_scale=arguments.guidance_scale,
        teacher=teacher,
        notices=subject.notices,
        run=next((model.manifest.run for model in (subject.teacher, *subject.students) if model is not None), None),
    )


def _given(arguments: EvaluateArguments, *names: str) -> dict[str, Any]:
    """Return the values of the named options that the user has set, keyed by name."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _recipe(subject: Subject, arguments: EvaluateArguments) -> Recipe:
    """Return the run's recipe, with the data and the protocol overridden by command-line options."""
    if subject.recipe is None and arguments.data is None:
        raise UsageError(f"{arguments.subject} is not part of a run, so its data is unknown. Add --data SOURCE")
    recipe = subject.recipe or Recipe(name="evaluate")
    # These settings of the run apply only to its own data.
    source = {} if arguments.data is None else {"source": arguments.data, "label_column": None, "limit": None}
    settings = _given(arguments, "split", "image_size", "channels", "label_column", "max_bytes")
    settings |= {"labels": False} if arguments.no_labels else {}
    settings |= {"skip_broken": True} if arguments.skip_broken else {}
    data = recipe.data.model_copy(update={**source, **settings})
    evaluation = replace(recipe.evaluation, **_given(arguments, "num_samples", "batch_size", "precision"))
    return recipe.model_copy(update={"data": data, "evaluation": evaluation})


def _split_of(data: DataConfig) -> str | None:
    """Return the name of the split to read, or None if the data has no splits."""
    path = user_path(data.source)
    whole = path.is_file() or (path.is_dir() and not any(path.glob(f"{data.split}*")))
    return None if whole or data.source == "digits" else data.split


def _samples(path: Path, data: Data) -> Data:
    """Load samples from files; reject them if their shape or kind differs from that of the reference data."""
    channels = data.shape[0] if data.is_image and path.is_dir() and data.shape[0] in (1, 3) else None
    # A trailing slash marks a path, so that a folder named digits is not replaced by scikit-learn's digits.
    source = os.path.join(path, "")
    config = {"source": source, "labels": False, "channels": channels, "max_bytes": sys.maxsize}
    with in_own_words():
        samples = open_data(DataConfig.model_validate(config))
    if samples.is_image != data.is_image:
        kinds = {True: "uint8 images", False: "arrays of floats"}
        raise UsageError(
            f"{path} contains {kinds[samples.is_image]}, but the reference {data.source} contains "
            f"{kinds[data.is_image]}. Use samples and a reference of the same kind"
        )
    if samples.shape != data.shape:
        raise UsageError(
            f"{path} contains samples of shape {list(samples.shape)}, but the samples in the reference {data.source} "
            f"have shape {list(data.shape)}. Use a reference of the same size (--data, --image-size, --channels)"
        )
    return samples


def _count(arguments: EvaluateArguments, samples: Data) -> int:
    """Return the number of samples to measure."""
    wanted = len(samples) if arguments.num_samples is None else arguments.num_samples
    if not 2 <= wanted <= len(samples):
        raise UsageError(
            f"{samples.source} contains {count(len(samples), 'sample')}, but {max(wanted, 2)} are needed (the minimum "
            "is 2). Add samples, or change --num-samples"
        )
    return wanted


def _line(cell: CellDone, total: int) -> str:
    """Return a one-line description of a finished cell."""
    gamma = "" if cell.entry.gamma is None else f", gamma {cell.entry.gamma:g}"
    # Extractor names are shown without the digest at the end.
    shown = ", ".join(
        f"{number(values['frechet'])} in {re.sub('(?<=.)-[^-]{12}$', '', name)}"
        for name, values in cell.figures.items()
        if "frechet" in values
    )
    there = " (reused)" if cell.was_there else ""
    return f"[{cell.done}/{total}] {cell.entry.words()}{gamma}, seeds {seeds_name(cell.cell.seeds)}: {shown}{there}"
