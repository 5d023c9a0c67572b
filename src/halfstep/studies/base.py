"""A study answers a question with a plan of trials. A table and a figure summarise the results.

When a trial finishes, it writes its metrics to a file in STUDY/cells, so rerunning the command resumes the study.
Trials train in run folders, and each run folder has a store of samples and metrics. Studies with the same teacher
therefore share the teacher's samples and metrics.
"""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.draw import sample_noise
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import open_data
from halfstep.measure.evaluate import Reference
from halfstep.measure.sources import ModelSource, sampler_of
from halfstep.measure.store import Cell, Store
from halfstep.metrics import frechet_distance
from halfstep.models.folder import load
from halfstep.objectives import Plan, objectives
from halfstep.recipes import Recipe, build
from halfstep.recipes.schema import StageConfig
from halfstep.registry import Registry
from halfstep.report.study_figure import Panel, draw_panels
from halfstep.report.table import Table
from halfstep.run.events import Event
from halfstep.run.runner import run as run_spec
from halfstep.run.spec import RunSpec
from halfstep.runs import RunFolder, StageFolder
from halfstep.runs.schema import Result
from halfstep.runtime.devices import default_accelerator
from halfstep.runtime.environment import environment
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import cache_folder, read_json, write_json, write_text
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import Ancestral, Sampler
from halfstep.studies.scales import Scale

Figures = dict[str, Any]
"""The metrics of a trial, as JSON values. For a diverged trial, the only entry is "diverged", with the reason."""


class Finding(NamedTuple):
    """A finished trial."""

    axes: Mapping[str, Any]
    figures: Figures


@final
@dataclass(frozen=True)
class Trial:
    """One entry of a study, identified by its axes, with the function that measures it."""

    axes: Mapping[str, Any]
    work: Callable[["Bench"], Figures]

    @property
    def name(self) -> str:
        """The file name of the trial, without the suffix."""
        return "_".join(f"{key}-{value}" for key, value in self.axes.items())


class Study(ABC):
    """A question, the trials that answer it, and the presentation of the findings."""

    title: ClassVar[str]
    question: ClassVar[str]
    uses: ClassVar[tuple[str, ...]]
    """The scale settings that affect the study's metrics. If they change, the trials must be rerun."""

    @abstractmethod
    def trials(self, scale: Scale) -> list[Trial]:
        """Return the trials in the order in which they run."""

    def costs(self, scale: Scale) -> Mapping[str, float]:
        """Return, for each part of the plan, the number of single-sample forward passes, or {} if not counted."""
        return {}

    @abstractmethod
    def table(self, rows: Sequence[Finding], scale: Scale) -> Table:
        """Return the table of all findings, including the paper's results if these are known."""

    @abstractmethod
    def panels(self, rows: Sequence[Finding], scale: Scale) -> list[Panel]:
        """Return the panels of the figure, with our results first."""


studies: Registry[type[Study]] = Registry("study")


@final
class Bench:
    """The workspace that trains, loads and measures models for a scale's trials, in one folder."""

    def __init__(self, out: Path, scale: Scale, stop: StopSignal | None, watch: Callable[[Event], None]) -> None:
        self.out, self.scale, self.stop, self.watch = out, scale, stop, watch
        self.device = (None if scale.recipe.engine.cpu else default_accelerator()) or torch.device("cpu")
        self.model = lru_cache(maxsize=8)(lambda stage: load(stage.path, self.device))
        """A function that returns the model of a stage."""
        self.data = cache(open_data)
        """A function that returns the data of a configuration."""

    def run(self, name: str, recipe: Recipe, what: Literal["teacher", "chain"]) -> RunFolder:
        """Train a recipe's teacher, or its chain from the shared teacher, as the run `name`, without evaluation.

        Raises:
            NonFinite: if the training diverged.
            Interrupted: if a signal arrived; the state is saved.
        """
        return self._finished(name, self._spec(recipe, what))

    def distil(self, name: str, plan: Plan, seed: int) -> RunFolder:
        """Train a plan from the shared teacher as the run `name`. Raises the same errors as `run`."""
        spec = self._spec(self.scale.recipe.model_copy(update={"seed": seed}), "chain")
        further = [
            StageConfig(objective=objectives.describe(stage.objective), training=stage.training).model_dump(mode="json")
            for stage in plan.stages
        ]
        # The recipe identifies the run, so it contains the plan.
        return self._finished(name, replace(spec, plan=plan, recipe={**spec.recipe, "further": further}))

    def _spec(self, recipe: Recipe, what: Literal["teacher", "chain"]) -> RunSpec:
        silent = recipe.model_copy(update={"evaluation": replace(recipe.evaluation, enabled=False)})
        teacher = load(self.teacher.path) if what == "chain" else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", HalfstepWarning)
            return build(silent, what=what, teacher=teacher, data=self.data(recipe.data))

    def _finished(self, name: str, spec: RunSpec) -> RunFolder:
        folder = RunFolder(self.out / "runs" / name)
        for event in run_spec(spec, folder.path, self.stop):
            self.watch(event)
        return folder

    @cached_property
    def teacher(self) -> StageFolder:
        """The teacher that is shared by all studies of this scale except table 1."""
        return self.run("teacher", self.scale.recipe, "teacher").stages()[-1]

    @cached_property
    def chain(self) -> dict[int, StageFolder]:
        """The students of the shared teacher, trained with the scale's recipe, by number of steps."""
        stages = self.run("chain", self.scale.recipe, "chain").stages()[1:]
        return {stage.manifest(verify=False).num_steps or 0: stage for stage in stages}

    @cached_property
    def reference(self) -> Reference:
        """The features of the real data."""
        recipe = self.scale.recipe
        return Reference(self.data(recipe.data), recipe.evaluation, cache_folder())

    def _store(self, stage: StageFolder) -> Store:
        """Return the store of a stage's run, which `halfstep evaluate` also uses."""
        folder = RunFolder(stage.path.parent.parent).evaluation_path.parent
        return Store(folder, batch_size=self.scale.recipe.evaluation.batch_size, own_device=True, stop=self.stop)

    def _cell(self, stage: StageFolder, num_steps: int, sampler: Sampler | None, noise: int = 0) -> Cell:
        evaluation, data = self.scale.recipe.evaluation, self.reference.data
        manifest, precision = stage.manifest(verify=False), evaluation.precision
        method = sampler or sampler_of(manifest)
        source = ModelSource(manifest, lambda: self.model(stage), method, self.device, data, precision=precision)
        size = evaluation.num_samples
        return Cell(source, num_steps, range(noise * size, (noise + 1) * size))

    def measured(self, stage: StageFolder, num_steps: int, sampler: Sampler | None = None, noise: int = 0) -> Result:
        """Return the metrics of a stage's model, which are measured only once per protocol.

        Args:
            sampler: the sampler to use; None uses the model's own sampler.
            noise: the index of the set of seeds. The sets do not overlap.

        Raises:
            NonFinite: if a sample is not finite.
        """
        return self._store(stage).result(self._cell(stage, num_steps, sampler, noise), self.reference)

    def samples(self, stage: StageFolder, num_steps: int, sampler: Sampler | None = None, noise: int = 0) -> Tensor:
        """Return the samples `[n, *shape]` that `measured` evaluates."""
        store, cell = self._store(stage), self._cell(stage, num_steps, sampler, noise)
        store.fill([cell])
        return store.samples(cell)

    def tuned(self, stage: StageFolder, num_steps: int, levels: int | None = None) -> Result:
        """Return the best result of ancestral sampling with evenly spaced values of gamma from 0 to 1.

        Args:
            levels: the number of values; None uses the `gamma_levels` of the scale.
        """
        levels = levels or self.scale.gamma_levels
        gammas = [index / (levels - 1) for index in range(levels)]
        found: list[Result] = []
        for gamma in gammas:
            try:
                found.append(self.measured(stage, num_steps, Ancestral(gamma)))
            except NonFinite:
                # The model has diverged only if it diverges at every gamma.
                if gamma == gammas[-1] and not found:
                    raise
        best = min(found, key=lambda result: result.frechet)
        for gamma in gammas:
            if gamma != best.gamma:
                # The samples for other values of gamma are large and no longer needed.
                self._store(stage).drop_samples(self._cell(stage, num_steps, Ancestral(gamma)))
        return best

    def noise_distance(self) -> float:
        """Return the Frechet distance from clipped unit noise to the data, beyond which a model counts as diverged."""
        reference = self.reference
        noise: Tensor = sample_noise(range(self.scale.recipe.evaluation.num_samples), reference.data.shape).clamp(-1, 1)
        return frechet_distance(reference.real.features, reference.extractor.features(noise))


def run_study(
    study: Study,
    scale: Scale,
    out: Path,
    *,
    stop: StopSignal | None = None,
    watch: Callable[[Event], None] = lambda event: None,
    done: Callable[[Trial, Figures, bool], None] = lambda trial, figures, was_there: None,
) -> list[Finding]:
    """Run the missing trials of a study and write study.json. A diverged trial is recorded and does not end the study.

    Args:
        out: the scale's folder, which contains the runs in runs/ and a folder for each study.
        done: a callback that is called after each trial with the trial, its metrics and whether they already existed.

    Raises:
        Interrupted: if a signal arrived. Repeating the call resumes the study.
        ValueError: if a trial in the folder was run with different settings.
    """
    bench = Bench(out, scale, stop, watch)
    folder = out / studies.name_of(study)
    settings = scale.as_data(study.uses)
    rows, seconds = [], 0.0
    for trial in study.trials(scale):
        if stop is not None:
            stop.check()
        file = folder / "cells" / f"{trial.name}.json"
        key = {"axes": dict(trial.axes), "scale": settings}
        was_there = file.is_file()
        if was_there:
            held = read_json(file)
            if not isinstance(held, dict) or held.get("key") != key:
                raise ValueError(f"{file} was written with different settings. Choose another --out")
        else:
            start = time.perf_counter()
            try:
                figures = trial.work(bench)
            except NonFinite as error:
                figures = {"diverged": str(error)}
            held = {"key": key, "figures": figures, "seconds": round(time.perf_counter() - start, 2)}
            write_json(file, held)
        done(trial, held["figures"], was_there)
        rows.append(Finding(trial.axes, held["figures"]))
        seconds += held["seconds"]
    write_json(
        folder / "study.json",
        {
            "study": folder.name,
            "title": study.title,
            "question": study.question,
            "scale": settings,
            "protocol": bench.reference.protocol,
            "environment": environment(),
            "seconds": round(seconds, 1),
            "rows": [{"axes": dict(row.axes), "figures": row.figures} for row in rows],
            "table": study.table(rows, scale)._asdict(),
        },
    )
    return rows


def write_study(study: Study, scale: Scale, rows: Sequence[Finding], out: Path) -> Path:
    """Write table.md, figure.png and figure.svg next to study.json, and return the path of table.md."""
    folder = out / studies.name_of(study)
    head = f"# {study.title}\n\n{study.question}\n\n![{study.title}](figure.svg)\n\n"
    write_text(folder / "table.md", head + study.table(rows, scale).markdown())
    draw_panels(study.panels(rows, scale), folder / "figure")
    return folder / "table.md"
