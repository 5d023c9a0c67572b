"""A run of one second: points of two clusters, a small MLP, the chain 4 -> 2 -> 1."""

import dataclasses
import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch

from halfstep.core.draw import Draw
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import MemoryData
from halfstep.nets import MLP
from halfstep.objectives import (
    STUDENT,
    Batch,
    Denoising,
    Evals,
    Losses,
    Models,
    Objective,
    Outcome,
    Plan,
    Role,
    Stage,
    Training,
)
from halfstep.run.events import Notice
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.runtime.stop import StopSignal
from halfstep.train.settings import Engine

# Command-line options with which a run of any recipe takes a second.
TINY = [
    *("--engine.threads", "1", "--evaluation.num-samples", "24", "--evaluation.num-compared", "8"),
    *("--teacher.num-updates", "6", "--teacher.warmup-updates", "2", "--teacher.batch-size", "8"),
    *("--chain.start-steps", "4", "--chain.num-updates", "2", "--chain.batch-size", "8"),
    *("--evaluation.num-shown", "4", "--evaluation.teacher-heun-steps", "2"),
]
TINY_ARRAYS = [*TINY, "--network.width", "16", "--network.depth", "1"]
TINY_DIGITS = [
    *TINY,
    *("--chain.updates-at", "None", "--chain.learning-rate-at", "None", "--chain.warmup-updates", "0"),
    *("--network.block-out-channels", "8", "16", "--network.attention-head-dim", "8"),
    *("--network.norm-num-groups", "8", "--network.layers-per-block", "1", "--network.attention", "False", "True"),
    *("--evaluation.teacher-steps", "4", "--model.conditional"),
    *("--finish.num-updates", "4", "--finish.batch-size", "8", "--finish.lead-updates", "1"),
    *("--finish.updates-at", "None"),
]
TINY_DEMO = [*TINY_DIGITS, "--chain.start-steps", "16"]


def points(num: int = 200) -> torch.Tensor:
    """Return two clusters in the plane, float32 [num, 2]."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.7, 0.2], [-0.5, -0.6]])[torch.arange(num) % 2]
    return centres + 0.1 * torch.randn(num, 2, generator=generator)


def toy_plan(teacher_updates: int = 40, student_updates: int = 30, dropout: float = 0.1) -> Plan:
    """Return a teacher with dropout and a moving average, and two students."""
    teacher = Training(teacher_updates, 2e-3, 16, warmup_updates=5, anneal=False, ema_decay=0.9, dropout=dropout)
    return Plan.of(Denoising(), teacher) + Plan.halvings(4, 1, Training(student_updates, 1e-3, 16), updates_at={})


def tuned(stage: Stage, **changes: Any) -> Stage:
    """Return the stage with replaced hyperparameters."""
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, **changes))


def toy_spec(**changes: Any) -> RunSpec:
    """Return the run of `toy_plan`, with replaced settings of the run or of its engine."""
    engine = {field.name: changes.pop(field.name) for field in dataclasses.fields(Engine) if field.name in changes}
    spec = RunSpec(
        recipe={"name": "toy", "seed": 0},
        plan=toy_plan(),
        data=MemoryData("toy", points()),
        process=VPCosine(),
        prediction=V(),
        network=lambda: MLP((2,), width=16, depth=1),
        start_steps=4,
        engine=Engine(**{"log_every": 5, "checkpoint_updates": 3, "cpu": True, "trackers": (), **engine}),
    )
    return dataclasses.replace(spec, **changes)


def finish(spec: RunSpec, path: Path, stop: StopSignal | None = None) -> list[str]:
    """Run to the end and return the notices on the way."""
    torch.set_num_threads(1)
    return [event.text for event in run(spec, path, stop) if isinstance(event, Notice)]


def weights(path: Path) -> dict[str, bytes]:
    """Return the final weights of each stage as bytes."""
    return {file.parent.name: file.read_bytes() for file in sorted(path.glob("stages/*/model.safetensors"))}


def run_toy(path: str) -> None:
    """Run the uninterrupted toy run, as a target for other processes."""
    finish(toy_spec(), Path(path))


def one_stage(objective: Objective, num_updates: int = 20) -> Plan:
    """Return a stage with dropout and a moving average."""
    return Plan((dataclasses.replace(toy_plan(num_updates).stages[0], objective=objective),))


@dataclasses.dataclass(frozen=True)
class Poisoned(Objective):
    """Denoising with two non-finite losses in one update."""

    update: int
    places: tuple[int, ...]
    value: float
    needs_teacher: ClassVar[bool] = False

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.TEACHER)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1)}

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        losses = Denoising().loss(models, batch, draw)
        factor = torch.ones(len(draw.places))
        if draw.update == self.update:
            factor[[place in self.places for place in draw.places]] = self.value
        return Losses(losses.loss * factor, losses.log_snr)


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """Make every write beyond `num_bytes` bytes of a file fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
