"""Everything that a run needs, as objects."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, final

import torch

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction
from halfstep.data import Data, held_on, training_batch
from halfstep.measure.evaluate import Evaluation
from halfstep.models.model import Model
from halfstep.nets import Network
from halfstep.objectives import Batch, Plan
from halfstep.runtime.processes import TIMEOUT_MINUTES
from halfstep.train.feed import Batches

NOT_MEASURED: Final = Evaluation(enabled=False)


@final
@dataclass(frozen=True)
class RunSpec:
    """Everything that a run needs, as objects. Recipes make it."""

    recipe: Mapping[str, Any]
    """The recipe as data: what recipe.json holds, and what decides whether a folder is of this run."""
    plan: Plan
    data: Data
    process: NoiseProcess
    prediction: Prediction
    network: Callable[[], Network] | None = None
    """Makes a fresh network for the first stage; not called when there is a `teacher`."""
    teacher: Model | None = None
    """The model to start the chain from, in the place of a first stage."""
    start_steps: int | None = None
    """Steps of the first teacher of the chain."""
    matched: Callable[[NetworkDenoiser], NetworkDenoiser] | None = None
    """Makes the student of a matching stage from its teacher, as it is before the first update."""
    guidance: tuple[float, float] | None = None
    """Guidance scales that a matching stage takes into the network; equal for one scale."""
    conditional: bool = True
    """Whether models are told the class of a sample, where the data has classes."""
    flip: bool = False
    clip: bool = False
    seed: int = 0
    precision: str = "float32"
    cpu: bool = False
    micro_batch: int | Literal["auto"] | None = None
    """Samples that go through the network at once; None for a process' whole share of the batch, "auto" for the
    largest part of it that fits into memory."""
    lora_rank: int | None = None
    """Rank of the additions that students are; None for students that are trained whole."""
    sharding: str = "none"
    """"full" spreads the weights of teacher and student over the processes."""
    timeout_minutes: float = TIMEOUT_MINUTES
    """Minutes after which a process that does not answer is given up."""
    trackers: tuple[str, ...] = ()
    """Of `trackers.TRACKERS`."""
    optimizer: str = "adamw"
    """One of `engine.OPTIMIZERS`."""
    teacher_precision: str = "float32"
    """"float32", or "bf16" for teachers whose weights are kept and asked in bfloat16."""
    gradient_checkpointing: bool = False
    """Whether the student's activations are computed again in the backward pass in the place of being kept."""
    compiled: bool = False
    """Whether torch compiles the networks."""
    log_every: int = 50
    checkpoint_updates: int = 5000
    checkpoint_minutes: float = 10.0
    keep: tuple[int, ...] | None = None
    """Students, by their steps, whose weights stay on disk; None for all. The first model of the chain and the last
    always stay."""
    evaluation: Evaluation = NOT_MEASURED
    cache: Path | None = None
    """Where the feature classifier's weights are kept."""
    free: tuple[str, ...] = field(default=())
    """Dotted names of recipe fields that may change when a run goes on."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Recipe fields with their defaults: what a run's recipe means that was written before a field was there."""

    @property
    def num_classes(self) -> int:
        """Classes that the models are conditioned on; 0 for none."""
        if self.teacher is not None:
            return self.teacher.num_classes
        return self.data.num_classes if self.conditional else 0

    @property
    def set_micro_batch(self) -> int | None:
        """The micro batch that was asked for; None for the whole share, or as long as it is not known what fits."""
        return None if self.micro_batch == "auto" else self.micro_batch

    def batches(self, device: torch.device) -> Batches:
        """The training batches, with the data held on the device if it is small."""
        data = held_on(device, self.data)
        shown = {"class_labels"} if self.conditional else set()
        if self.teacher is not None:
            shown |= set(self.teacher.manifest.conditions)

        def batch(draw: Draw) -> Batch:
            x0, cond = training_batch(data, draw, self.flip)
            return Batch(x0, {name: value for name, value in cond.items() if name in shown})

        return batch
