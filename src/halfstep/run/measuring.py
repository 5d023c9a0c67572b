"""Measures the stages of a run and writes metrics.json and a few samples from the results in the store."""

import functools
import time
from collections.abc import Container, Iterator
from pathlib import Path
from typing import final

import torch

from halfstep.measure.evaluate import Method, Reference, finest, references_for, teacher_methods
from halfstep.measure.samples import keep_samples
from halfstep.measure.sources import ModelSource
from halfstep.measure.store import Cell, Store
from halfstep.metrics import rmse
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.objectives import Outcome, Role
from halfstep.run.events import Event, Measured, Notice
from halfstep.run.events import Measuring as Started
from halfstep.run.spec import RunSpec
from halfstep.run.trackers import Trackers
from halfstep.runs import Metrics, RunFolder, StageFolder
from halfstep.runs.schema import Result
from halfstep.runtime.failures import told_when_out_of_memory
from halfstep.runtime.files import DamagedFile, check_files, sha256_of, write_sealed
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import samplers


def methods_of(spec: RunSpec, outcome: Outcome, is_first: bool) -> list[Method]:
    """Return the samplers and numbers of steps that a run uses to measure a stage's model.

    Args:
        outcome: the outcome of the stage.
        is_first: whether the stage's model is the first one in the run.
    """
    if not spec.evaluation.enabled:
        return []
    if outcome.num_steps is not None:
        return [Method(outcome.sampler, outcome.num_steps)]
    steps: list[int | None] = [spec.start_steps]
    if outcome.role is not Role.MATCHED or is_first:
        steps += [*spec.evaluation.teacher_steps, *(stage.num_steps for stage in spec.plan.stages)]
    numbers = [number for number in steps if number]
    if outcome.role is Role.STUDENT:
        return [Method(outcome.sampler, number) for number in sorted(set(numbers), reverse=True)]
    return teacher_methods(outcome.sampler, numbers, spec.evaluation)


def calls_of_measuring(spec: RunSpec, complete: Container[str] = ()) -> int:
    """Return the number of network calls per sample that a run uses to measure its models, except those of the stages
    in `complete`."""
    calls = 0
    for place, (name, stage) in enumerate(spec.stages):
        if name in complete:
            continue
        if stage is not None:
            calls += sum(one.num_evals for one in methods_of(spec, stage.objective.outcome, is_first=place == 0))
        elif (teacher := spec.teacher) is not None:
            own = Outcome(teacher.role, teacher.num_steps, teacher.sampler)
            calls += sum(teacher.num_evals(*one) for one in methods_of(spec, own, is_first=True))
    return calls


@final
class Measuring:
    """Measures one stage after another, and compares each model with the first one on samples from the same noise.

    For this comparison, the first model uses the most expensive of its measured samplers and step counts.
    """

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        stop: StopSignal | None,
        device: torch.device,
        processes: Processes,
        trackers: Trackers,
    ) -> None:
        self.spec, self.evaluation, self.device = spec, spec.evaluation, device
        self.processes, self.trackers, self._stop = processes, trackers, stop
        place, size = folder.evaluation_path.parent, spec.evaluation.batch_size
        check = self._check = folder.check_there
        self.store = Store(place, batch_size=size, own_device=True, processes=processes, stop=stop, check=check)
        self._base: Cell | None = None
        """The finest samples of the chain's first model, which are the reference for all other models' samples."""

    def measured(self, folder: StageFolder, model: Model, updates_before: int) -> Iterator[Event]:
        """Measure a stage unless its metrics exist. Trackers log the metrics at update `updates_before` of the plan."""
        own = Outcome(model.role, model.num_steps, model.sampler)
        methods = methods_of(self.spec, own, is_first=self._base is None)
        if not methods:
            return
        if self._base is None:
            yield Started(folder.name, "features of the real data", 0, len(methods))
            if note := self._reference.note:
                yield Notice(note)
        protocol = self._reference.protocol | {"device": str(self.device)}
        if model.manifest.conditions:
            # Without this entry, a resumed run would reuse metrics measured with the conditions of the first rows.
            protocol["condition_rows"] = "a fixed random choice"
        if self._base is None:
            # The first model is reloaded on demand, so that it takes no device memory while students are measured.
            self._base = self._cell(model, finest(methods), folder.path)

        damage: list[str] = []

        def is_measured() -> bool:
            wanted = {(samplers.name_of(one.sampler), one.num_steps) for one in methods}
            try:
                held = folder.metrics()
                if held is None or held.protocol != protocol:
                    return False
                check_files(folder.path, held.files, folder.metrics_path)
            except DamagedFile as error:
                damage.append(f"{error}; the stage is measured again")
                return False
            return {(result.sampler, result.num_steps) for result in held.results} >= wanted

        if self.processes.on_main(is_measured):
            return
        yield from map(Notice, damage)
        model = model.to(self.device)
        results, began = [], time.monotonic()
        for number, method in enumerate(methods, 1):
            sampler = samplers.name_of(method.sampler)
            yield Started(folder.name, f"{method.num_steps} steps of {sampler}", number, len(methods))
            by = "" if method.sampler == model.sampler else f"-{sampler}"
            name = f"steps-{method.num_steps:04d}{by}"
            with self.processes.at_once(self._stop):
                self.processes.on_main(self._check)
                result = self._result(folder, self._cell(model, method), name)
            results.append(result)
            self._track(folder, name, result, updates_before)
            seconds, too_few = time.monotonic() - began, self._reference.too_few
            yield Measured(folder.name, result, len(methods) - number, seconds, too_few)
        spent = round(time.monotonic() - began, 3)

        def write() -> None:
            self._check()
            kept = [folder.path / str(result.samples) for result in results]
            files = [file for samples in kept for file in (samples, samples.with_suffix(".png")) if file.is_file()]
            figures = Metrics(
                run=model.manifest.run,
                stage=folder.name,
                protocol=protocol,
                results=results,
                files={str(file.relative_to(folder.path)): sha256_of(file) for file in files},
                seconds=spent,
                note=self._reference.note,
                too_few=self._reference.too_few,
            )
            write_sealed(folder.metrics_path, figures.model_dump(mode="json"))

        self.processes.on_main(write)

    def _cell(self, model: Model, method: Method, path: Path | None = None) -> Cell:
        """Return the cell of a model. If `path` is given, the model is loaded from there on demand."""
        source = ModelSource(
            model.manifest,
            (lambda: model) if path is None else functools.partial(load, path, self.device, self.spec.own_network),
            method.sampler,
            self.device,
            self.spec.data,
            precision=self.evaluation.precision,
        )
        return Cell(source, method.num_steps, range(self.evaluation.num_samples))

    def _result(self, folder: StageFolder, cell: Cell, name: str) -> Result:
        base = self._base
        assert base is not None
        result = self.store.result(cell, self._reference)
        self.store.fill([cell, base])

        def look() -> dict[str, object]:
            """Compare the cell's samples with those of the first model, and save the first few samples of the cell."""
            self._check()
            samples, count = self.store.samples(cell), self.evaluation.num_compared
            apart = None if cell.name == base.name else rmse(samples[:count], self.store.samples(base)[:count])
            shown = samples[: self.evaluation.num_shown]
            kept = keep_samples(folder.path, name, shown, folder.manifest(verify=False).is_image)
            return {"teacher_rmse": apart, "samples": kept}

        return result.model_copy(update=self.processes.on_main(look))

    @functools.cached_property
    def _reference(self) -> Reference:
        remedy = (
            "out of memory while measuring the real data: measure on the CPU (engine.cpu), or choose another --out "
            "with a smaller evaluation.num_reference"
        )
        with self.processes.at_once(self._stop), told_when_out_of_memory(remedy):
            features = [self.evaluation.features]
            (reference,) = references_for(
                self.spec.data, self.evaluation, features, self.spec.cache, self.device, self.processes
            )
        return reference

    def _track(self, folder: StageFolder, name: str, result: Result, updates_before: int) -> None:
        self.trackers.start(updates_before)
        figures = {"frechet": result.frechet, "kid": result.kid, "teacher_rmse": result.teacher_rmse}
        held = {f"{name}/{metric}": value for metric, value in figures.items() if value is not None}
        self.trackers.log(folder.name, held, updates_before)
        picture = (folder.path / str(result.samples)).with_suffix(".png")
        if picture.is_file():
            self.trackers.picture(folder.name, f"{name}/samples", picture, updates_before)
