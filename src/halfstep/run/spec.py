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
"""The name of the stage that contains a given teacher."""
FREE_SETTINGS: Final = (
    *(f"evaluation.{setting.name}" for setting in fields(Evaluation)),
    *(f"engine.{name}" for name in IDLE),
)
"""Evaluation and engine settings that may change when a run resumes, because they do not affect the learned weights."""


@final
@dataclass(frozen=True)
class RunSpec:
    """Everything that a run needs, as objects built from a recipe or a Python call."""

    recipe: Mapping[str, Any]
    """The recipe as plain data. It is stored in recipe.json, which identifies the run in a folder."""
    plan: Plan
    data: Data
    process: NoiseProcess
    prediction: Prediction
    network: Callable[[], nn.Module] | None = None
    """A function that builds an untrained network for the first stage. It is not called if `teacher` is given."""
    teacher: Model | None = None
    """The model that the chain starts from, or None if the first stage trains the teacher."""
    own_network: nn.Module | None = None
    """A network of the user's own class. Each model gets a copy, because no manifest can rebuild such a network."""
    own_conditions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The conditions other than the class, each with its per-sample shape, if no teacher is given."""
    start_steps: int | None = None
    """The number of steps of the chain's first teacher."""
    conditional: bool = True
    """Whether models are conditioned on the class, if the data has classes."""
    flip: bool = False
    clip: bool = False
    seed: int = 0
    lora_rank: int | None = None
    """The LoRA rank of the students, or None to train all their weights."""
    engine: Engine = Engine()
    """Settings for how the run uses the machine."""
    keep: tuple[int, ...] | None = None
    """The step counts of the students to keep on disk, or None for all students. The first and the last model of the
    chain are always kept."""
    evaluation: Evaluation = field(default_factory=lambda: Evaluation(enabled=False))
    cache: Path | None = None
    """The folder for the feature classifier's weights."""
    free: tuple[str, ...] = ()
    """The dotted names of the recipe fields that may change when a run resumes."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The defaults of recipe fields, which also apply to recipes written before a field existed."""

    @property
    def stages(self) -> list[tuple[str, Stage | None]]:
        """The stages in order, each with the name of its folder. The stage of a given teacher is None."""
        given: list[tuple[str, Stage | None]] = [] if self.teacher is None else [(GIVEN_TEACHER, None)]
        return [*given, *zip(self.plan.names(len(given)), self.plan.stages, strict=True)]

    @property
    def parents(self) -> list[Parents | None]:
        """The parents of each stage as indices into `stages`, or None for the first stage.

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
        """The number of classes that the models are conditioned on, or 0 for unconditional models."""
        if self.teacher is not None:
            return self.teacher.num_classes
        return self.data.num_classes if self.conditional else 0

    @property
    def conditions(self) -> Mapping[str, tuple[int, ...]]:
        """The models' conditions other than the class, each with its per-sample shape."""
        return self.own_conditions if self.teacher is None else self.teacher.manifest.conditions
