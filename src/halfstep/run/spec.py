"""The specification of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, final

from torch import nn

from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction
from halfstep.data import Data
from halfstep.measure.evaluate import Evaluation
from halfstep.models.model import Model
from halfstep.objectives import Outcome, Parents, Plan, Stage, parents_of
from halfstep.train.settings import IDLE, Engine

GIVEN_TEACHER: Final = "00-teacher"
"""Name of the stage of a given teacher."""
FREE_SETTINGS: Final = (
    *(f"evaluation.{setting.name}" for setting in fields(Evaluation)),
    *(f"engine.{name}" for name in IDLE),
)
"""Settings of evaluation and engine that may change when a run resumes: they do not change what is learned."""


@final
@dataclass(frozen=True)
class RunSpec:
    """Everything that a run needs, as objects; built from a recipe or a Python call."""

    recipe: Mapping[str, Any]
    """The recipe as data: stored in recipe.json, and compared to decide whether a folder belongs to this run."""
    plan: Plan
    data: Data
    process: NoiseProcess
    prediction: Prediction
    network: Callable[[], nn.Module] | None = None
    """Builds an untrained network for the first stage; not called if `teacher` is given."""
    teacher: Model | None = None
    """The model to start the chain from, instead of a first stage."""
    own_network: nn.Module | None = None
    """Network of a user's own class, which no manifest can rebuild: each model gets a copy."""
    own_conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Conditions other than the class, with the shape of one sample, if no teacher is given."""
    start_steps: int | None = None
    """Steps of the chain's first teacher."""
    conditional: bool = True
    """Whether models are conditioned on the class, if the data has classes."""
    flip: bool = False
    clip: bool = False
    seed: int = 0
    lora_rank: int | None = None
    """LoRA rank of the students; None trains all their weights."""
    engine: Engine = Engine()
    """How the run uses the machine."""
    keep: tuple[int, ...] | None = None
    """Step counts of the students to keep on disk; None for all. The chain's first and last models are always kept."""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(enabled=False))
    cache: Path | None = None
    """Folder for the feature classifier's weights."""
    free: tuple[str, ...] = ()
    """Dotted names of recipe fields that may change when a run resumes."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Recipe fields with their defaults, which also apply to recipes written before a field existed."""

    @property
    def stages(self) -> list[tuple[str, Stage | None]]:
        """Folder names and stages in order; the stage of a given teacher is None."""
        given: list[tuple[str, Stage | None]] = [] if self.teacher is None else [(GIVEN_TEACHER, None)]
        return [*given, *zip(self.plan.names(len(given)), self.plan.stages, strict=True)]

    @property
    def parents(self) -> list[Parents | None]:
        """Parents of each stage, as indices into `stages`; None for the first.

        Raises:
            ValueError: if a stage needs a model that does not precede it.
        """
        models: list[Outcome] = []
        found: list[Parents | None] = []
        for _, stage in self.stages:
            if stage is None:
                assert self.teacher is not None
                found.append(None)
                models.append(Outcome(self.teacher.role, self.teacher.num_steps, self.teacher.sampler))
            else:
                found.append(parents_of(stage.objective, models))
                models.append(stage.objective.outcome)
        return found

    @property
    def num_classes(self) -> int:
        """Classes that the models are conditioned on; 0 for none."""
        if self.teacher is not None:
            return self.teacher.num_classes
        return self.data.num_classes if self.conditional else 0

    @property
    def conditions(self) -> Mapping[str, tuple[int, ...]]:
        """Conditions of the models other than the class, with the shape of one sample."""
        return self.own_conditions if self.teacher is None else self.teacher.manifest.conditions
