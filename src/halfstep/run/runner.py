"""Runs a plan in a run folder as a generator of events, so that the caller decides what to display.

Repeating the call on the same folder resumes the run: complete stages are loaded, an unfinished stage continues from
its latest good checkpoint, and existing metrics are reused.
"""

import contextlib
import functools
import math
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, final

from accelerate import Accelerator

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.data import Data, MemoryData
from halfstep.models.folder import drop_weights, load, save_stage
from halfstep.models.model import Model
from halfstep.models.students import without_lora
from halfstep.nets import LoRA, describe_network
from halfstep.objectives import Role, Stage
from halfstep.run.events import Event, Notice, Progress, StageEnd, StageStart
from halfstep.run.folder import take_folder
from halfstep.run.measuring import Measuring
from halfstep.run.spec import RunSpec
from halfstep.run.start import facts_of, trainer_for
from halfstep.run.trackers import Trackers, chosen_trackers
from halfstep.runs import Heartbeat, Manifest, RunFolder, RunLog, StageFolder
from halfstep.runs.schema import flatten
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import write_json
from halfstep.runtime.locks import lock_of
from halfstep.runtime.processes import Lookout, LostProcess, Processes, is_lost, make_accelerator
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.runtime.storage import last_good, no_storage
from halfstep.train.checkpoint import CheckpointWriter, micro_batch_of, remove_checkpoints, resume
from halfstep.train.engine import StageTrainer
from halfstep.train.memory import fit_micro_batch
from halfstep.train.recent import KEPT
from halfstep.train.window import Window


def run(spec: RunSpec, path: Path, stop: StopSignal | None = None) -> Generator[Event]:
    """Run or resume a plan in the run folder `path`: train, halve and measure.

    With several processes, each of them must call this function and have access to the folder. Only rank 0 writes to
    the folder.

    Raises:
        DifferentRecipe: if the folder contains a run with a different recipe or different data; nothing is changed.
        DamagedFile: if a file is altered or belongs to another run or stage, and cannot be recreated.
        ValueError: if the folder is neither empty nor a run folder.
        InUse: if another process is writing to the folder.
        NonFinite: if training diverged; the last checkpoint is kept, and the stage's non-finite.json describes the
            batch.
        OutOfMemory: if an update, or sampling for an evaluation, does not fit in memory.
        Interrupted: if `stop` was set; the state is saved.
        NoStorage: if the disk is full or unavailable; the message names the last good checkpoint.
        LostProcess: if another process of the run has ended or does not respond; the message names the last good
            checkpoint.
        FailedElsewhere: on the other ranks, if rank 0 raised one of these errors.
    """
    folder = RunFolder(path)
    accelerator = make_accelerator(spec.engine.precision, spec.engine.cpu, spec.engine.timeout_minutes)
    processes = Processes(accelerator, spec.engine.timeout_minutes)
    lock = lock_of(path)
    runner = None
    try:
        own, fingerprint = processes.on_main(lambda: take_folder(spec, folder, lock))
        (odd,) = processes.agree(processes.index if spec.data.fingerprint != fingerprint else 0)
        if odd:
            raise ValueError(
                f"processes 0 and {odd} of the run read different data from {spec.data.source}: make all processes "
                "read the same files"
            )
        runner = _Runner(spec, folder, own, stop, accelerator, processes)
        beat = Heartbeat(folder.heartbeat_path, {Interrupted: "stopped", NonFinite: "diverged"})
        with beat if processes.is_main else contextlib.nullcontext(), contextlib.ExitStack() as ending:
            ending.callback(runner.trackers.finish)
            yield from runner.run()
    except OSError as error:
        raise no_storage(error, path, None if runner is None else runner.last, runner is not None) from None
    except RuntimeError as error:
        if not is_lost(error):
            raise
        reason = " ".join(str(error).split())[:160]
        # Rank 0 may be pruning the checkpoints at the same time.
        saved = (file for name, _ in reversed(spec.stages) for file in folder.stage(name).checkpoints())
        last = next(saved, None if runner is None else runner.last)
        raise LostProcess(
            f"another process of this run has ended or does not respond, so this one stops; {last_good(last)}; "
            f"restart all processes with the same command ({reason})"
        ) from None
    finally:
        lock.release()


STARVED: Final = 0.2
"""The share of time that updates may spend waiting for data before a warning is printed."""

STARVED_WINDOWS: Final = 3
"""The number of consecutive log lines that must exceed `STARVED` before the warning is printed. A single line is not
enough, because a stage's first updates wait for a new thread."""


def _of_starving(progress: Progress, data: Data) -> Notice:
    images = "resize the image files to --data.image-size, keep the images in memory (--data.max-bytes), or "
    return Notice(
        f"{progress.name}: updates wait for data {progress.window.data_share:.0%} of the time: "
        f"{images if data.is_image else ''}give the run more CPU cores or a faster disk"
    )


def _is_before(row: Mapping[str, Any], resumed: int) -> bool:
    """Return whether a log row is intact and belongs to update `resumed` or an earlier one."""
    update = row.get("update")
    return isinstance(update, int) and update <= resumed


def _statistics_path(folder: StageFolder) -> Path:
    return folder.path / "non-finite.json"


@final
class _Runner:
    """The state of one call of `run`."""

    def __init__(
        self,
        spec: RunSpec,
        folder: RunFolder,
        own: str,
        stop: StopSignal | None,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self.spec, self.folder, self.stop = spec, folder, stop
        self.own = own
        """The `Manifest.run` that all stages of this run share."""
        self.accelerator, self.processes = accelerator, processes
        self.log = RunLog(folder.log_path if processes.is_main else None)
        name = str(spec.recipe.get("name", folder.path.name))
        trackers = chosen_trackers(spec.engine.trackers) if processes.is_main else ()
        self.trackers = Trackers(trackers, folder.path, name, flatten(spec.recipe))
        self.measuring = Measuring(spec, folder, stop, accelerator.device, processes, self.trackers)
        self._models: dict[Path, Model] = {}
        self._updates_before = 0
        """The number of updates in the plan before the current stage."""
        self.last: Path | None = None
        """The latest good checkpoint or complete stage."""

    def run(self) -> Iterator[Event]:
        stages = [(self.folder.stage(name), stage) for name, stage in self.spec.stages]
        parents = self.spec.parents
        for index, (folder, stage) in enumerate(stages):
            needed = [stages[place][0] for place in parents[index] or ()]
            found = self.processes.on_main(functools.partial(self._found, folder, stage, needed))
            if found == "dropped":
                yield StageEnd(folder.name, folder.manifest(verify=False).seconds, was_there=True)
                self._updates_before += stage.training.num_updates if stage is not None else 0
                continue
            if found == "absent" and stage is not None:
                yield from self._trained(index, folder, stage, self._loaded(needed))
            (model,) = self._loaded([folder])
            self.last = folder.path
            yield StageEnd(folder.name, model.manifest.seconds, found != "absent")
            self._updates_before += model.manifest.num_updates if stage is not None else 0
            yield from self.measuring.measured(folder, model, self._updates_before)
            later = {place for kin in parents[index + 1 :] for place in kin or ()}
            done = [stages[place] for place in range(1, index) if place not in later]
            self.processes.on_main(functools.partial(self._prune, done))

    def _loaded(self, folders: list[StageFolder]) -> list[Model]:
        """Return the models of complete stages, loading each once, and release all other models."""
        held = {folder.path: self._models[folder.path] for folder in folders if folder.path in self._models}
        self._models = held
        for folder in folders:
            if folder.path not in held:
                held[folder.path] = load(folder.path, network=self.spec.own_network)
        return [held[folder.path] for folder in folders]

    def _found(self, folder: StageFolder, stage: Stage | None, needed: list[StageFolder]) -> str:
        """Return "complete" or "absent" for a stage, or "dropped" if its weights were removed."""
        self.folder.check_there()
        if folder.is_complete() and not folder.manifest().weights_kept:
            # The stage was measured before its weights were dropped. Complete the removal if it was interrupted.
            drop_weights(folder)
            return "dropped"
        if folder.is_complete():
            remove_checkpoints(folder)
        elif stage is None:
            self._keep_teacher(folder)
        else:
            for parent in needed:
                if not parent.manifest(verify=False).weights_kept:
                    raise ValueError(
                        f"{folder.path} must be trained, but the weights of {parent.name}, which it starts or learns "
                        "from, were not kept (chain.keep): start a new run, or remove the stages after the last stage "
                        "that still has its weights"
                    )
            return "absent"
        return "complete"

    def _keep_teacher(self, folder: StageFolder) -> None:
        """Save the given teacher as the first stage of the run."""
        teacher = self.spec.teacher
        assert teacher is not None
        changes: dict[str, Any] = {"run": self.own, "stage": folder.name, "start_steps": self.spec.start_steps}
        learned = self.spec.plan.learned
        if learned and teacher.guidance is None:
            # Students learn from the guided teacher, so they are compared with it.
            changes["guidance_scale"] = learned[0].default_scale
        if teacher.num_classes:
            changes["classes_shown"] = self.spec.data.num_classes
            changes["class_names"] = self._class_names(teacher.manifest)
        # The base weights of the teacher's LoRA are in another run.
        denoiser = without_lora(teacher.denoiser)
        assert isinstance(denoiser, NetworkDenoiser)
        if denoiser is not teacher.denoiser:
            changes |= {"network": describe_network(denoiser.network), "base": None}
        save_stage(folder, denoiser, teacher.manifest.model_copy(update=changes), teacher.null)

    def _prune(self, students: list[tuple[StageFolder, Stage | None]]) -> None:
        """Remove the weights of measured students that are no longer needed and should not be kept."""
        for folder, stage in students:
            is_student = stage is not None and stage.objective.outcome.role is Role.STUDENT
            if (
                self.spec.keep is not None
                and stage is not None
                and is_student
                and stage.num_steps not in self.spec.keep
            ):
                drop_weights(folder)

    def _trained(self, index: int, folder: StageFolder, stage: Stage, parents: list[Model]) -> Iterator[Event]:
        spec, notices = self.spec, list[str]()
        if spec.engine.sharding != "none":
            # Measuring left the parents on the device, which may not have memory for two whole networks.
            parents = [parent.to("cpu") for parent in parents]
        start, teacher = parents or (None, None)
        with self.processes.at_once(self.stop):
            trainer = trainer_for(spec, stage, folder.name, start, self.accelerator, teacher)
            # Only the parents' manifests are needed now, because the networks in training are copies or share weights.
            if teacher is not None and spec.engine.teacher_precision != "float32":
                # The teacher is now a bfloat16 copy, and the student is another copy, so free the original. A LoRA
                # keeps the weights that it shares with the original.
                teacher.to("meta")
                self._models.clear()
            try:
                held = resume(trainer, folder, self.own, notices.append)
            except OSError:
                # The disk failed while a checkpoint was read, so the message names the latest checkpoint.
                self.last = next(iter(folder.checkpoints()), self.last)
                raise
        yield from map(Notice, notices)
        resumed = trainer.update

        def keep_rows() -> list[str]:
            later = [self.folder.stage(name) for name, _ in spec.stages[index + 1 :]]
            # These stages will start from the beginning, so rows of an earlier attempt would show false progress.
            absent = [one.name for one in later if not one.is_complete() and not one.checkpoints()]

            def wanted(row: Mapping[str, Any]) -> bool:
                name = row.get("stage")
                return _is_before(row, resumed) if name == folder.name else name not in absent

            self.log.keep(wanted)
            return [one.name for one in later if one.is_complete()]

        complete = tuple(self.processes.on_main(keep_rows))
        self.trackers.start(self._updates_before + resumed)
        yield StageStart(folder.name, index, stage, resumed, trainer.seconds, complete)
        if spec.engine.micro_batch == "auto":
            with self.processes.at_once(self.stop):
                refused = fit_micro_batch(trainer, micro_batch_of(held))
            if refused:
                did_not = f"{' and '.join(map(str, refused))} did not fit into memory"
                yield Notice(f"{folder.name}: the micro batch is {trainer.micro_batch} samples, because {did_not}")
        writer = CheckpointWriter(folder, self.own, self.processes)
        writer.last = held
        try:
            yield from self._updates(trainer, writer)
        except NonFinite as error:
            writer.close()
            self._keep_statistics(folder, error, writer.last or self.last)
        finally:
            # However the stage ends, nothing is written to the folder after its lock is released.
            writer.close()
            self.last = writer.last or self.last
        if trainer.update < stage.training.num_updates:
            yield Notice(
                f"{folder.name} ended at update {trainer.update} of {stage.training.num_updates}: its loss had stopped "
                "falling"
            )
        denoiser = trainer.finish()
        assert isinstance(denoiser, NetworkDenoiser)

        def write() -> None:
            self.folder.check_there()
            save_stage(folder, denoiser, self._manifest(trainer, denoiser, start, teacher))
            remove_checkpoints(folder)
            _statistics_path(folder).unlink(missing_ok=True)

        self.processes.on_main(write)

    def _updates(self, trainer: StageTrainer, writer: CheckpointWriter) -> Iterator[Event]:
        """Train a stage to completion, writing log lines and checkpoints.

        Raises:
            Interrupted: if `stop` was set; the state is saved.
        """
        spec = self.spec
        lookout = Lookout(self.processes, self.stop, spec.engine.checkpoint_minutes * 60)
        saved = logged = trainer.update
        starved = 0
        for update in trainer.run(self.stop):
            writer.check()
            done = update == trainer.last_update
            stopping, late = lookout.look(update)
            due = update % spec.engine.checkpoint_updates == 0 or late or stopping
            if update % spec.engine.log_every == 0 or done or due:
                progress = self._logged(trainer)
                yield progress
                logged = update
                if starved < STARVED_WINDOWS:
                    starved = starved + 1 if progress.window.data_share > STARVED else 0
                    if starved == STARVED_WINDOWS and not isinstance(spec.data, MemoryData):
                        yield _of_starving(progress, spec.data)
            elif update % KEPT == 0:
                # Check while the batch that caused a non-finite value is still available.
                trainer.check_finite()
            if due and not done:
                trainer.pause(writer.save(trainer))
                lookout.saved()
                saved = update
                if stopping:
                    break
        # A signal during an update also ends the loop; a resumed run repeats that update.
        if trainer.update < trainer.last_update:
            if trainer.update > logged:
                yield self._logged(trainer)
            if trainer.update > saved:
                writer.save(trainer)
        trainer.check_finite()
        writer.wait()
        if self.stop is not None and trainer.update < trainer.last_update:
            self.stop.check()

    def _logged(self, trainer: StageTrainer) -> Progress:
        """Log the statistics of the updates since the last log line."""
        window = trainer.window()
        self.processes.on_main(lambda: self._write_log(trainer.stream, window))
        return Progress(trainer.stream, trainer.last_update, window)

    def _keep_statistics(self, folder: StageFolder, error: NonFinite, last: Path | None) -> NoReturn:
        """Write the batch's statistics to the stage's folder, and raise the error with the last good state."""
        kept, file, statistics = "", _statistics_path(folder), error.statistics
        if statistics is not None:
            self.processes.on_main(lambda: write_json(file, dict(statistics)))
            kept = f"; the batch's statistics are in {file}"
        raise NonFinite(
            f"{error}; the same recipe would diverge again. Use another --out for the changed recipe{kept}; "
            f"{last_good(last)}",
            error.statistics,
        ) from None

    def _write_log(self, stage: str, window: Window) -> None:
        self.folder.check_there()
        figures = {
            "loss": window.loss,
            "learning_rate": window.learning_rate,
            "grad_norm": window.grad_norm,
            "seconds": round(window.seconds, 3),
            "samples_per_second": round(window.samples_per_second, 1),
            "data_share": round(window.data_share, 3),
        }
        for name, helper in window.helpers.items():
            figures |= {f"{name}_loss": helper.loss, f"{name}_grad_norm": helper.grad_norm}
        # A network that was not updated in this window has no statistics.
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        self.log.append({"stage": stage, "update": window.update, **figures})
        self.trackers.log(stage, figures, self._updates_before + window.update)

    def _class_names(self, origin: Manifest | None) -> tuple[str, ...]:
        """Return the class names of a model: its parent's or, if the parent has none, the data's."""
        spec = self.spec
        if not spec.num_classes:
            return ()
        return (origin.class_names if origin else ()) or spec.data.class_names

    def _manifest(
        self, trainer: StageTrainer, denoiser: NetworkDenoiser, start: Model | None, teacher: Model | None
    ) -> Manifest:
        spec, origin, inherited = self.spec, None, dict[str, Any]()
        if start is not None:
            origin = start.manifest
            inherited = {"parent": origin.stage, "pipeline": origin.pipeline, "source": origin.source}
            if isinstance(denoiser.network, LoRA):
                # The base weights are those of the model that the student started from, or of that model's base.
                inherited["base"] = origin.base or origin.stage
        return Model.of(
            denoiser,
            spec.data.shape,
            num_classes=spec.num_classes,
            conditions=spec.conditions,
            clip=spec.clip,
            run=self.own,
            teacher=None if teacher is None else teacher.manifest.stage,
            start_steps=spec.start_steps,
            classes_shown=spec.data.num_classes if spec.num_classes else None,
            class_names=self._class_names(origin),
            # Samples of an image model are floats.
            is_image=spec.data.is_image if origin is None else origin.is_image,
            data=f"{spec.data.source}, {len(spec.data):,} samples",
            **inherited,
            **facts_of(trainer, origin),
        ).manifest
