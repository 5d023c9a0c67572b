"""Runs the stages of a `halfstep.fit` or `halfstep.distill` call, either in memory or in a run folder."""

import contextlib
import copy
import dataclasses
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, final

import torch

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import check_instance, in_python
from halfstep.core.draw import as_seed
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data
from halfstep.measure.evaluate import Evaluation
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import OWN, describe_network, merged
from halfstep.objectives import Outcome, Plan, Stage, objectives, parents_of
from halfstep.run.events import Event, Notice, Progress, StageEnd, StageStart
from halfstep.run.progress import Stages, shown
from halfstep.run.runner import run
from halfstep.run.sources import Source, StreamedBatches, as_batches, as_source
from halfstep.run.spec import FREE_SETTINGS, RunSpec
from halfstep.run.start import facts_of, student_and_teacher
from halfstep.runs import RunFolder
from halfstep.runtime.devices import existing_device
from halfstep.runtime.files import cache_folder, refuse_file, rounded_digest, user_path
from halfstep.runtime.launch import rank, world_size
from halfstep.runtime.processes import make_accelerator
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.train.engine import StageTrainer
from halfstep.train.memory import fit_micro_batch
from halfstep.train.settings import Engine
from halfstep.train.sharding import check_sharding
from halfstep.train.window import Window

OnWindow = Callable[[str, Window], None]
OnStage = Callable[[str, Any], None]


@final
@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments that `fit` and `distill` share, apart from the data."""

    seed: int
    engine: Engine
    device: str | torch.device | None
    out: Path | None
    evaluation: Evaluation | None
    on_window: OnWindow | None
    on_stage: OnStage | None
    progress: bool

    def __post_init__(self) -> None:
        check_instance("engine", self.engine, Engine, "halfstep.Engine(precision='bf16')")
        if not isinstance(self.progress, bool):
            raise ValueError(f"progress must be True or False, got {self.progress!r}")
        if self.evaluation is not None:
            check_instance("evaluation", self.evaluation, Evaluation, "halfstep.Evaluation()")
        if self.out is None and self.evaluation is not None:
            raise ValueError("evaluation has no effect without out, the run folder that stores the results. Pass out")
        if self.out is not None:
            refuse_file(self.out, "Choose another path")
        for name, hook in (("on_window", self.on_window), ("on_stage", self.on_stage)):
            if hook is not None and not callable(hook):
                raise ValueError(f"{name} must be a function, got {hook!r}. Pass lambda name, it: ...")
        check_sharding(self.engine, world_size())
        with self.placed():
            pass

    def opened(self, data: Source) -> Data | StreamedBatches:
        """Open and check the data.

        Raises:
            ValueError: if the data cannot be used, or cannot be combined with `out`.
        """
        found = as_source(data)
        if self.out is not None and isinstance(found, StreamedBatches):
            raise ValueError(
                "out needs data that can be resumed, but an iterable of batches cannot be resumed. Pass a tensor, "
                "(x0, {name: tensor}), a path or opened data, or remove out"
            )
        return found

    @contextlib.contextmanager
    def placed(self) -> Iterator[Engine]:
        """Make the requested device current and yield the engine settings for it.

        Raises:
            ValueError: if the device cannot be used.
        """
        if self.device is None:
            yield self.engine
            return
        found = existing_device(self.device)
        if found.type == "cpu":
            yield dataclasses.replace(self.engine, cpu=True)
            return
        here = torch.accelerator.current_accelerator()
        if self.engine.cpu or here is None or here.type != found.type:
            raise ValueError(
                f"device {found} cannot be used, because engine.cpu is set or torch uses {here}. Remove device or "
                "engine.cpu"
            )
        if world_size() > 1 and found.index is not None:
            raise ValueError(
                f"device {found} cannot be used, because the launcher assigns a device to each process. Remove device"
            )
        module = torch.get_device_module(found)
        with module.device(found.index) if found.index is not None else contextlib.nullcontext():
            yield self.engine

    def watch(self, events: Iterator[Event], stages: Stages, model_of: Callable[[str], Any]) -> None:
        """Run the stages to the end, showing their progress and calling the callbacks."""
        with shown(stages, self.progress and rank() == 0) as show:
            for event in events:
                show(event)
                if isinstance(event, Progress) and self.on_window is not None:
                    self.on_window(event.name, event.window)
                elif isinstance(event, StageEnd) and not event.was_there and self.on_stage is not None:
                    self.on_stage(event.name, model_of(event.name))
                elif isinstance(event, Notice):
                    warnings.warn(event.text, HalfstepWarning, stacklevel=4)

    def into_folder(self, spec: RunSpec) -> Model:
        """Run or resume the plan in `out` and return its last model. Ctrl-C saves the state before the call ends."""
        out, folder = self.out, RunFolder(self.out or Path())
        assert out is not None

        def model_of(name: str) -> Model:
            return load(folder.stage(name).path, network=spec.own_network)

        alone = threading.current_thread() is threading.main_thread()
        try:
            with in_python(), self.placed() as engine, StopSignal() if alone else contextlib.nullcontext() as stop:
                made = dataclasses.replace(spec, engine=engine)
                # If a callback fails, its traceback would keep the run, and with it the folder's lock.
                with contextlib.closing(run(made, out, stop)) as events:
                    self.watch(events, made.stages, model_of)
                # Outside `placed`, a device without an index would be another one.
                device = torch.empty(0, device=make_accelerator(engine.precision, engine.cpu).device).device
        except Interrupted as stopped:
            if stopped.code == 130:
                raise KeyboardInterrupt(f"the state is saved in {out}. Repeat the call to resume") from None
            raise SystemExit(stopped.code) from None
        return model_of(spec.stages[-1][0]).merged().to(device)

    def spec(
        self,
        call: str,
        plan: Plan,
        data: Data | StreamedBatches,
        denoiser: NetworkDenoiser,
        told: dict[str, Any],
        **more: Any,
    ) -> RunSpec:
        """Return the specification of the run in `out`."""
        assert isinstance(data, Data)
        assert self.out is not None
        described = describe_network(denoiser.network)
        stages = [
            {"objective": objectives.describe(stage.objective), **dataclasses.asdict(stage.training)}
            for stage in plan.stages
        ]
        evaluation = self.evaluation or Evaluation(enabled=False)
        # The weights do not determine the meaning of the network's output and input.
        process = processes.describe(denoiser.process)
        told = told | {
            "prediction": predictions.describe(denoiser.prediction),
            "process": {"type": process["type"], "digest": rounded_digest(process, 16)},
        }
        recipe = {
            "name": self.out.name,
            "call": f"halfstep.{call}",
            "seed": self.seed,
            "data": {"source": data.source},
            "network": described,
            "stages": stages,
            "evaluation": dataclasses.asdict(evaluation),
            "engine": dataclasses.asdict(self.engine),
        }
        return RunSpec(
            # The recipe as it will be read back from recipe.json, where tuples become lists.
            recipe=json.loads(json.dumps(recipe | told)),
            plan=plan,
            data=data,
            process=denoiser.process,
            prediction=denoiser.prediction,
            own_network=denoiser.network if described["type"] == OWN else None,
            seed=self.seed,
            evaluation=evaluation,
            cache=cache_folder(),
            free=("name", "data.source", *FREE_SETTINGS),
            # Folders of earlier versions lack these fields.
            defaults={name: value for name, value in told.items() if name in ("prediction", "process", "null")},
            **more,
        )


def call_of(seed: int, engine: Engine, device: Any, out: Any, *rest: Any) -> Call:
    """Check the arguments, which are the fields of `Call`, and return the call.

    Raises:
        ValueError: if an argument has the wrong type.
    """
    if device is not None:
        existing_device(device)
    if out is not None and (not isinstance(out, str | Path) or not str(out)):
        raise ValueError(f"out must be the path of a run folder, got {out!r}. Pass out='runs/mine'")
    return Call(as_seed(seed), engine, device, None if out is None else user_path(out), *rest)


@final
class Chain:
    """Runs the stages of one call in memory.

    Args:
        first: the given teacher, or, if `known` is None, the denoiser that the first stage trains in place.
        known: the outcome of the stage that trained the given teacher, or None if no teacher is given.
        like: the model that contains the denoiser `first`, or None for a custom denoiser.
    """

    def __init__(
        self,
        call: Call,
        engine: Engine,
        data: Data | StreamedBatches,
        first: Denoiser,
        known: Outcome | None,
        null: Cond,
        like: Model | None,
    ) -> None:
        self.call, self.engine, self.data, self.null, self.like = call, engine, data, null, like
        self.accelerator = make_accelerator(engine.precision, engine.cpu)
        self.batches, self.ahead = as_batches(data, self.accelerator.device)
        self.first = first
        self.made: list[Denoiser] = [] if known is None else [first]
        """The models that a stage can build on: the given teacher and the results of the earlier stages."""
        self.outcomes = [] if known is None else [known]
        self.number = len(self.made)
        """The number of the first stage. A given teacher takes the number 0."""
        self.models: list[Any] = []
        self.names: list[str] = []

    def stages(self, plan: Plan) -> list[tuple[str, Stage]]:
        """Return the stages of a plan with their names."""
        return list(zip(plan.names(self.number), plan.stages, strict=True))

    def watched(self, plan: Plan, lora_rank: int | None) -> Any:
        """Train the stages in order, show their progress, and return the last result."""
        self.call.watch(self.run(plan, lora_rank), self.stages(plan), self.model_of)
        return self.models[-1]

    def run(self, plan: Plan, lora_rank: int | None) -> Iterator[Event]:
        """Train the stages in order.

        Each stage trains a new student. Only if no teacher is given, the first stage trains the given denoiser itself.
        """
        for index, (name, stage) in enumerate(self.stages(plan)):
            student, seen, like = self.first, None, self.like
            parents = parents_of(stage.objective, self.outcomes)
            if parents is not None:
                start, teacher = self.made[parents.start], self.made[parents.teacher]
                student, seen = student_and_teacher(
                    stage, start, teacher, self.null, lora_rank, self.engine, seed=self.call.seed, stream=name
                )
                # The results of the stages are the last entries of `made`.
                place = parents.start - (len(self.made) - len(self.models))
                like = self.models[place] if place >= 0 else like
            yield StageStart(name, index, stage, 0, 0.0)
            trainer = StageTrainer(
                student,
                seen,
                stage,
                self.batches,
                self.data.shape,
                seed=self.call.seed,
                stream=name,
                accelerator=self.accelerator,
                engine=self.engine,
                ahead=self.ahead,
            )
            if self.engine.micro_batch == "auto":
                fit_micro_batch(trainer)
            for update in trainer.run():
                if update % self.engine.log_every == 0 or update == trainer.last_update:
                    yield Progress(name, trainer.last_update, trainer.window())
            self.made.append(trainer.finish())
            self.outcomes.append(stage.objective.outcome)
            self.names.append(name)
            self.models.append(self._model(trainer, self.made[-1], like))
            seconds = trainer.seconds
            # Free the optimisers' moments before the next trainer is built.
            del trainer, seen
            yield StageEnd(name, seconds, False)

    def model_of(self, name: str) -> Any:
        """Return a copy of a stage's result, so that callbacks cannot change the original."""
        return copy.deepcopy(self.models[self.names.index(name)])

    def _model(self, trainer: StageTrainer, denoiser: Denoiser, like: Any) -> Any:
        """Return the result of a stage: a `Model` with the facts of its parent `like`, or a custom denoiser."""
        if not isinstance(denoiser, NetworkDenoiser):
            outcome = trainer.stage.objective.outcome
            denoiser.num_steps, denoiser.sampler = outcome.num_steps, outcome.sampler
            denoiser.shape = self.data.shape
            return denoiser
        assert like is not None
        return Model.of(
            NetworkDenoiser(merged(denoiser.network), denoiser.process, denoiser.prediction).eval(),
            like.shape,
            num_classes=like.num_classes,
            conditions=like.manifest.conditions,
            clip=like.manifest.clip,
            is_image=like.manifest.is_image,
            pipeline=like.manifest.pipeline,
            source=like.manifest.source,
            class_names=like.manifest.class_names or getattr(self.data, "class_names", ()),
            classes_shown=getattr(self.data, "num_classes", None) if like.num_classes else None,
            **facts_of(trainer, like.manifest),
        )
