"""A study: a question, a plan of cells that answers it, and the table and the figure at its end.

Each cell's figures are a file, written whole when the cell is done, so that the same command goes on where it was cut.
Runs that a cell needs are run folders, resumable in themselves; measurements are kept by what was measured (weights,
sampler, steps, protocol), so that studies that share a teacher share them too.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.draw import sample_noise
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data, open_data
from halfstep.measure.evaluate import Evaluation, Reference, measure
from halfstep.metrics import frechet_distance
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.recipes import Recipe, build
from halfstep.registry import Registry
from halfstep.report.study_figure import Panel
from halfstep.run.events import Event
from halfstep.run.runner import run as run_spec
from halfstep.runs import RunFolder
from halfstep.runs.schema import Result
from halfstep.runtime.environment import environment
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import cache_folder, json_digest, read_json, write_json
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import Ancestral, Sampler
from halfstep.studies.scales import Scale

Figures = dict[str, Any]
"""What a cell found, JSON-ready. A cell that diverged has only "diverged": why."""


class Row(NamedTuple):
    """A finished cell."""

    axes: Mapping[str, Any]
    figures: Figures


@final
@dataclass(frozen=True)
class Cell:
    """One entry of a study: what sets it apart from the others, and the work that fills it."""

    axes: Mapping[str, Any]
    work: Callable[["Bench"], Figures]

    @property
    def name(self) -> str:
        """The cell's axes in one word, for its file."""
        return "_".join(f"{key}-{value}" for key, value in self.axes.items())


class Table(NamedTuple):
    """The table at the end of a study, with what a reader must know to read it."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """The table in Markdown; the first column is text, the others are numbers."""
        lines = [
            "| " + " | ".join(self.headings) + " |",
            "|---" + "|---:" * (len(self.headings) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])


class Study(ABC):
    """A question and its plan. A member says which cells there are and how they are shown."""

    title: ClassVar[str]
    question: ClassVar[str]
    uses: ClassVar[tuple[str, ...]]
    """Settings of the scale on which its figures depend: with others, its cells must be filled anew."""

    @abstractmethod
    def cells(self, scale: Scale) -> list[Cell]:
        """The plan, in the order in which it runs."""

    @abstractmethod
    def table(self, rows: Sequence[Row], scale: Scale) -> Table:
        """The table of all cells, the paper's published figures beside ours where they are known."""

    @abstractmethod
    def panels(self, rows: Sequence[Row], scale: Scale) -> list[Panel]:
        """The figure's panels, ours first."""


studies: Registry[type[Study]] = Registry("study")


@final
class Bench:
    """What the cells of a study work with: runs, models and measurements of one scale, in one folder."""

    def __init__(self, out: Path, scale: Scale, stop: StopSignal | None, watch: Callable[[Event], None]) -> None:
        self.out, self.scale, self.stop, self.watch = out, scale, stop, watch
        self.device = torch.device("cuda" if torch.cuda.is_available() and not scale.recipe.engine.cpu else "cpu")
        self._references: dict[str, tuple[Evaluation, Reference]] = {}
        self._data: dict[str, Data] = {}
        self._made: dict[str, Any] = {}
        self._teacher: Model | None = None
        self._students: dict[int, Model] = {}

    def run(self, name: str, recipe: Recipe, *, what: str = "all", teacher: Model | None = None) -> RunFolder:
        """The finished run `name`: run now, gone on with, or there already. It is not measured.

        Raises:
            NonFinite: if it diverged.
            Interrupted: if a signal came; the state is saved.
        """
        silent = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update={"enabled": False})})
        folder = RunFolder(self.out / "runs" / name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HalfstepWarning)
            spec = build(silent, what=what, teacher=teacher, data=self.data(recipe))  # type: ignore[arg-type]
        for event in run_spec(spec, folder.path, self.stop):
            self.watch(event)
        return folder

    def data(self, recipe: Recipe) -> Data:
        """The recipe's data, opened once."""
        key = recipe.data.model_dump_json()
        if key not in self._data:
            self._data[key] = open_data(recipe.data)
        return self._data[key]

    def teacher(self) -> Model:
        """The teacher that all studies of the scale but the ablation share."""
        if self._teacher is None:
            self._teacher = load(self.run("teacher", self.scale.recipe, what="teacher").path, self.device)
        return self._teacher

    def chain_from_teacher(self, name: str, recipe: Recipe) -> RunFolder:
        """The finished run `name` of a recipe's chain from that teacher."""
        teacher = load(self.run("teacher", self.scale.recipe, what="teacher").path)
        return self.run(name, recipe, what="chain", teacher=teacher)

    def chain(self) -> dict[int, Model]:
        """The students of that teacher, by the scale's own recipe, by their steps."""
        if not self._students:
            folder = self.chain_from_teacher("chain", self.scale.recipe)
            names = [row.name for row in folder.plan[1:] if row.role == "student"]
            models = [load(folder.stage(name).path, self.device) for name in names]
            self._students = {model.num_steps: model for model in models if model.num_steps is not None}
        return self._students

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, made at the first call for this name: for what many cells compare with."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def reference(self, recipe: Recipe) -> tuple[Evaluation, Reference]:
        """The protocol and the real data's features."""
        key = recipe.evaluation.model_dump_json() + recipe.data.model_dump_json()
        if key not in self._references:
            evaluation = recipe.evaluation.as_object()
            self._references[key] = evaluation, Reference(self.data(recipe), evaluation, cache_folder())
        return self._references[key]

    def measured(self, model: Model, num_steps: int, sampler: Sampler | None = None) -> Result:
        """The figures of a model at a number of steps; measured once for each protocol.

        Raises:
            NonFinite: if a sample was not finite.
        """
        evaluation, reference = self.reference(self.scale.recipe)
        what = {
            "weights": model.manifest.files,
            "steps": num_steps,
            "sampler": repr(sampler or model.sampler),
            "protocol": reference.protocol | {"device": str(self.device)},
        }
        name = json_digest(what, length=24)
        file = self.out / "measured" / f"{name}.json"
        if file.is_file():
            return Result.model_validate(read_json(file)["result"])
        with warnings.catch_warnings():
            # A study asks teachers and students for other numbers of steps than they are made for, and knows it.
            warnings.simplefilter("ignore", HalfstepWarning)
            result, _ = measure(model, num_steps, evaluation, reference, sampler=sampler, stop=self.stop)
        write_json(file, what | {"result": result.model_dump()})
        return result

    def tuned(self, model: Model, num_steps: int, levels: int | None = None) -> Result:
        """Ancestral sampling at the best of several levels of gamma, the scale's by default: the paper's baseline."""
        levels = levels or self.scale.gamma_levels
        gammas = [index / (levels - 1) for index in range(levels)]
        found: list[Result] = []
        for gamma in gammas:
            try:
                found.append(self.measured(model, num_steps, Ancestral(gamma)))
            except NonFinite:
                # A level that diverges is not the best one; only all of them together say that the model has.
                if gamma == gammas[-1] and not found:
                    raise
        return min(found, key=lambda result: result.frechet)

    def noise_distance(self) -> float:
        """The distance of unit noise, clipped as samples are: a model that is farther from the data has diverged."""
        evaluation, reference = self.reference(self.scale.recipe)
        noise: Tensor = sample_noise(range(evaluation.num_samples), self.data(self.scale.recipe).shape).clamp(-1, 1)
        return frechet_distance(reference.real.features, reference.extractor.features(noise))


def run_study(
    study: Study,
    scale: Scale,
    out: Path,
    *,
    stop: StopSignal | None = None,
    watch: Callable[[Event], None] = lambda event: None,
    done: Callable[[Cell, Figures, bool], None] = lambda cell, figures, was_there: None,
) -> list[Row]:
    """Fills all cells of a study that are not filled yet; a diverged one says so and does not stop the others.

    Args:
        out: of the scale, shared by its studies: runs/, measured/, and a folder for each study.
        done: told of each cell, with whether it was there before.

    Raises:
        Interrupted: if a signal came; the same call goes on.
        ValueError: if a cell in the folder was made by other settings.
    """
    bench = Bench(out, scale, stop, watch)
    name = studies.name_of(study)
    settings = scale.as_data(study.uses)
    rows = []
    for cell in study.cells(scale):
        if stop is not None:
            stop.check()
        file = out / name / "cells" / f"{cell.name}.json"
        key = {"axes": dict(cell.axes), "scale": settings}
        if file.is_file():
            held = read_json(file)
            if not isinstance(held, dict) or held.get("key") != key:
                raise ValueError(f"{file} was made by other settings of this study: choose another --out")
            done(cell, held["figures"], True)
            rows.append(Row(cell.axes, held["figures"]))
            continue
        start = time.perf_counter()
        try:
            figures = cell.work(bench)
        except NonFinite as error:
            figures = {"diverged": str(error)}
        write_json(file, {"key": key, "figures": figures, "seconds": round(time.perf_counter() - start, 2)})
        done(cell, figures, False)
        rows.append(Row(cell.axes, figures))
    _, reference = bench.reference(scale.recipe)
    write_json(
        out / name / "study.json",
        {
            "study": name,
            "title": study.title,
            "question": study.question,
            "scale": settings,
            "protocol": reference.protocol,
            "environment": environment(),
            "seconds": round(sum(read_json(f)["seconds"] for f in (out / name / "cells").glob("*.json")), 1),
            "rows": [{"axes": dict(row.axes), "figures": row.figures} for row in rows],
        },
    )
    return rows
