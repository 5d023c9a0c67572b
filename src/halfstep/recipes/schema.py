"""The recipe as validated data.

Each field is a flag on the command line, such as `--chain.start-steps 256`, and the field's docstring is the flag's
help text. Choices are names, which `build` converts to objects.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

import tyro
from pydantic import AfterValidator, Field, field_validator, model_validator

from halfstep.core.door import MOST_UPDATES
from halfstep.core.grids import MOST_STEPS
from halfstep.core.prediction import predictions, weightings
from halfstep.data import Data, DataConfig
from halfstep.measure.evaluate import Evaluation
from halfstep.nets import Network
from halfstep.objectives import (
    FINISHING,
    HALVING,
    Adversarial,
    Denoising,
    Finishing,
    FixedGuidance,
    Guidance,
    GuidanceRange,
    Plan,
    Training,
    divided,
    objectives,
)
from halfstep.recipes.networks import MLPConfig, Rate, Steps, UNetConfig, Width
from halfstep.registry import Registry
from halfstep.run.course import Match, cosine_within
from halfstep.runs.record import Record
from halfstep.runtime.terminal import one_line
from halfstep.samplers import samplers
from halfstep.train.settings import Engine

Positive = Annotated[int, Field(ge=1, le=MOST_UPDATES)]
Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
LogSNR = Annotated[float, Field(ge=-100, le=100)]


def _member_of(family: Registry[Any]) -> AfterValidator:
    def known(name: str) -> str:
        family[name]
        return name

    return AfterValidator(known)


class DataFacts(Record):
    """The shape and classes of a recipe's data, for a dry run without the data."""

    shape: tuple[Positive, ...]
    """Shape of one sample."""
    num_samples: Positive
    """Number of samples."""
    num_classes: int = Field(default=0, ge=0)
    """Number of classes."""


class ModelConfig(Record):
    """The network's prediction and noise process."""

    prediction: Annotated[str, _member_of(predictions)] = "v"
    """The network's prediction: eps, x0, v or both (see `halfstep ls`)."""
    weighting: Annotated[str, _member_of(weightings)] = "truncated_snr"
    """Weighting of the error in x0: constant, snr, truncated_snr or snr_plus_one."""
    conditional: bool = True
    """Condition the network on the class, if the data has classes."""
    log_snr_min: LogSNR = -20.0
    """Log signal-to-noise ratio at t = 1."""
    log_snr_max: LogSNR = 20.0
    """Log signal-to-noise ratio at t = 0."""


Flat = Annotated[Training, tyro.conf.arg(name="")]
"""Training hyperparameters whose flags have no additional prefix, such as --chain.num-updates."""


class ChainConfig(Record):
    """How to distil the students."""

    start_steps: Steps = 1024
    """Number of steps of the first teacher."""
    end_steps: Steps = 1
    """Number of steps of the last student."""
    factor: Annotated[int, Field(ge=2, le=MOST_STEPS)] = 2
    """Number of teacher steps that one student step replaces: 2 for halving, 4 for quartering."""
    teacher_sampler: Annotated[str, _member_of(samplers)] = "ddim"
    """Deterministic sampler of the first teacher; later teachers use DDIM."""
    teacher_steps: Steps | None = None
    """Number of first-teacher steps per step of the first student; the factor by default."""
    students: tuple[Steps, ...] | None = None
    """Step counts of all students, such as 8 2 1; overrides end_steps and factor."""
    training: Flat = HALVING
    """Training hyperparameters of each student."""
    updates_at: dict[int, Positive] | None = None
    """Number of updates for individual students, keyed by number of steps. By default, the 2-step and 1-step students
    get twice num_updates."""
    learning_rate_at: dict[int, Rate] | None = None
    """Learning rates for individual students, keyed by number of steps."""
    critic_weight: Rate | None = None
    """Weight of an adversarial term on the students' outputs; none by default."""
    lora_rank: Width | None = None
    """Train LoRA weights of this rank instead of whole students, also in the matching stage. Only diffusers networks
    are supported. The teacher and the students share the base weights."""
    keep: tuple[Steps, ...] | None = None
    """Step counts of the students to keep on disk, besides the teacher and the last student; all by default."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> "ChainConfig":
        if self.critic_weight is not None and self.training.early_end.patience:
            raise ValueError(
                "early_end has no effect with critic_weight, because the loss may then rise. Remove one of them"
            )
        return self

    @field_validator("teacher_sampler")
    @classmethod
    def _deterministic(cls, name: str) -> str:
        if samplers[name].stochastic:
            raise ValueError(f"{name} is stochastic, so a student cannot learn its steps. Choose ddim or heun")
        return name


SECOND_ORDER: Final = ChainConfig(start_steps=16, teacher_sampler="heun")
"""The chain of students with 8, 4, 2 and 1 steps. Each step of the first student learns from two Heun steps of the
teacher. This chain comes closer to the teacher's best samples than a longer chain, and saves three stages."""


def _with_critic(plan: Plan, weight: float | None) -> Plan:
    """Return the plan with an adversarial term in every stage, or the unchanged plan if the weight is None."""
    return plan if weight is None else plan.changed(lambda objective: Adversarial(objective, weight))


class MatchingConfig(Record):
    """How to change a teacher's prediction, process or guidance before halving. The matching stage is added only if a
    setting needs it, or if a given teacher predicts eps near zero SNR.
    """

    prediction: Annotated[str, _member_of(predictions)] | None = None
    """The student's prediction: x0 or v. The default is the teacher's prediction, or v if the teacher predicts eps near
    zero SNR."""
    process: Literal["own", "cosine"] | None = None
    """The student's noise process: own keeps the teacher's process; cosine covers the teacher's noise levels with a
    power of two timesteps. For a U-Net that needs matching, has a discrete noise schedule and is trained without LoRA,
    the default is cosine. Each step then loses less accuracy, and chains with power-of-two step counts use whole
    timesteps."""
    guidance_scale: Scale | None = None
    """Guidance scale for the student to learn, which halves the number of network calls; 1 disables guidance."""
    guidance_range: tuple[Scale, Scale] | None = None
    """Lowest and highest guidance scales to learn; the scale becomes an input of the student."""
    null_class: int | None = Field(default=None, ge=0, le=MOST_UPDATES)
    """The null class, if the teacher's files do not specify it."""
    num_times: Steps = 1024
    """Number of time points at which teacher and student are compared. A teacher with a discrete noise schedule is
    compared at its timesteps instead."""
    training: Flat = Training(num_updates=10_000, learning_rate=1e-4)
    """Training hyperparameters of the matched student."""

    @model_validator(mode="after")
    def _one_guidance(self) -> "MatchingConfig":
        if self.guidance_scale is not None and self.guidance_range is not None:
            raise ValueError("guidance_scale and guidance_range cannot be combined. Remove one of them")
        if self.guidance_range is not None:
            GuidanceRange(*self.guidance_range)
        return self

    @property
    def guidance(self) -> Guidance | None:
        """Guidance for the student to learn, if any."""
        if self.guidance_scale is not None:
            return FixedGuidance(self.guidance_scale)
        return None if self.guidance_range is None else GuidanceRange(*self.guidance_range)

    def match(self) -> Match:
        """Return these settings as objects."""
        return Match(
            self.training,
            None if self.prediction is None else predictions[self.prediction](),
            {None: None, "own": lambda process: process, "cosine": cosine_within}[self.process],
            self.guidance,
            self.num_times,
        )


class FinishConfig(Record):
    """How to finish students: bring their samples closer to the data."""

    steps: tuple[Steps, ...] = ()
    """Step counts of the students to finish, such as 2 1."""
    training: Flat = FINISHING
    """Training hyperparameters of each finished student."""
    updates_at: dict[int, Positive] | None = None
    """Number of updates for individual students, keyed by number of steps."""
    learning_rate_at: dict[int, Rate] | None = None
    """Learning rates for individual students, keyed by number of steps."""
    map_weight: float | None = Finishing.map_weight
    """Weight of the loss that preserves the map from noise to samples; by default half the number of steps, at least
    1."""
    data_weight: float | None = Finishing.data_weight
    """Weight of the data relative to the teacher, from 0 to 1; by default 1, or 0 with guidance."""
    auxiliary_turns: Positive | None = Finishing.auxiliary_turns
    """Number of updates of the auxiliary denoiser before each student update; by default 1, or 2 with data weight 0."""
    auxiliary_rate: Rate = Finishing.auxiliary_rate
    """Learning rate of the auxiliary denoiser, relative to the student's learning rate."""
    lead_updates: int = Field(default=Finishing.lead_updates, ge=0, le=MOST_UPDATES)
    """Number of initial updates that train only the auxiliary denoiser."""
    critic_weight: Rate | None = None
    """Weight of an adversarial term on the students' outputs; none by default."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> "FinishConfig":
        for name in ("map_weight", "data_weight", "auxiliary_turns", "critic_weight"):
            if getattr(self, name) is not None and not self.steps:
                raise ValueError(f"{name} {getattr(self, name)} has no effect without finish.steps. Add finish.steps")
        # `Recipe.fitted` can still remove settings for students that are not finished, so only `plan` rejects them.
        self._stages()
        return self

    def plan(self) -> Plan:
        """Return the finishing stages, or raise ValueError if the settings contradict each other."""
        if self.steps and self.training.early_end.patience:
            raise ValueError("early_end has no effect on a finish, whose losses may rise. Remove it")
        for name in ("updates_at", "learning_rate_at"):
            foreign = sorted(set(getattr(self, name) or {}) - set(self.steps))
            if foreign:
                raise ValueError(
                    f"finish.{name} contains a {foreign[0]}-step student, which is not finished. Add it to finish.steps"
                )
        return self._stages()

    def _stages(self) -> Plan:
        """Return the finishing stages, without checking for settings of other students."""

        def finishing(num_steps: int) -> Finishing:
            own = (self.map_weight, self.data_weight, self.auxiliary_turns, self.auxiliary_rate, self.lead_updates)
            return Finishing(num_steps, *own)

        updates, rates = self.updates_at or {}, self.learning_rate_at or {}

        def training(steps: int) -> Training:
            num_updates, rate = self.training.num_updates, self.training.learning_rate
            return replace(
                self.training, num_updates=updates.get(steps, num_updates), learning_rate=rates.get(steps, rate)
            )

        stages = zip(self.steps, Plan.finishes(self.steps, self.training, finishing).stages, strict=True)
        plan = Plan(tuple(replace(stage, training=training(steps)) for steps, stage in stages))
        return _with_critic(plan, self.critic_weight)


class StageConfig(Record):
    """A stage with any registered objective."""

    objective: dict[str, Any]
    """The registered objective as data: {"type": name, **fields}, as `objectives.describe` returns it."""
    training: Training
    """Training hyperparameters of the student."""

    @field_validator("objective")
    @classmethod
    def _buildable(cls, objective: dict[str, Any]) -> dict[str, Any]:
        objectives.rebuild(objective)
        return objective


TEACHER: Final = Training(num_updates=100_000, learning_rate=2e-4, warmup_updates=1000, anneal=False, ema_decay=0.9999)
"""The paper's hyperparameters for a CIFAR-10 teacher, but with fewer updates and without weight decay or dropout."""


class Recipe(Record):
    """Everything that a run needs."""

    name: str
    """The recipe's name."""
    seed: Annotated[int, Field(ge=0, le=2**62)] = 0
    """Seed for all random numbers."""
    data: DataConfig = DataConfig()
    """Training data."""
    facts: DataFacts | None = None
    """The shape and classes of the data, for a dry run without the data."""
    network: UNetConfig | MLPConfig = Field(default=UNetConfig(), discriminator="type")
    """The network of the teacher and the students."""
    model: ModelConfig = ModelConfig()
    """The network's prediction and noise process."""
    teacher: Training = TEACHER
    """Training hyperparameters of the teacher."""
    matching: MatchingConfig = MatchingConfig()
    """How to convert the teacher before halving."""
    chain: ChainConfig = ChainConfig()
    """The chain of students."""
    further: tuple[StageConfig, ...] = ()
    """Additional stages after the chain, with any objective."""
    finish: FinishConfig = FinishConfig()
    """How to finish students after all other stages."""
    evaluation: Evaluation = Evaluation()
    """How to evaluate the models."""
    engine: Engine = Engine()
    """How to use the machine."""

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        # The recipe's name becomes the name of a folder.
        if (
            name.startswith((".", "-"))
            or len(name.encode(errors="replace")) > 100
            or not re.fullmatch(r"[^/\\]+", name)
        ):
            raise ValueError(
                f"must be a plain name of at most 100 bytes, without / or \\, and not starting with . or -: {name!r}"
            )
        if one_line(name) != name:
            raise ValueError(f"must not contain control characters or bytes that are not UTF-8: {name!r}")
        return name

    def teacher_plan(self) -> Plan:
        """Return the stage that trains the teacher."""
        return Plan.of(Denoising(weightings[self.model.weighting]()), self.teacher)

    def chain_plan(self, guidance: Guidance | None = None) -> Plan:
        """Return the halving stages, or raise ValueError if no chain leads from the start to the end.

        Args:
            guidance: the guidance that the first teacher has learned.
        """
        chain, students = self.chain, self.chain.students
        if students:
            # `fitted` can still replace a recipe's end_steps and factor, so only the plan rejects them.
            if chain.end_steps not in (1, students[-1]):
                raise ValueError(f"the students end at {students[-1]} steps. Remove end_steps {chain.end_steps}")
            if chain.factor != 2:
                raise ValueError(f"the students are listed, so a factor of {chain.factor} has no effect. Remove it")
        if students is None:
            try:
                students = tuple(divided(chain.start_steps, chain.end_steps, chain.factor)[1:])
            except ValueError as error:
                options = "--chain.students, --chain.start-steps or --chain.end-steps"
                raise ValueError(f"{error} ({options})") from None
        plan = Plan.halvings(
            chain.start_steps,
            training=chain.training,
            students=students,
            updates_at=chain.updates_at,
            learning_rate_at=chain.learning_rate_at,
            weighting=weightings[self.model.weighting](),
            guidance=guidance,
            teacher_sampler=samplers[chain.teacher_sampler](),
            teacher_steps=chain.teacher_steps,
        )
        steps = [stage.num_steps for stage in plan.stages]
        foreign = [number for number in chain.keep or () if number not in steps]
        if foreign:
            raise ValueError(
                f"chain.keep contains a {foreign[0]}-step student, which is not in the chain. Choose from "
                f"{', '.join(map(str, steps))}"
            )
        return _with_critic(plan, chain.critic_weight)

    def fitted(self, given: Collection[str]) -> "Recipe":
        """Return the recipe without settings for students that are not in the chain, and without the recipe's own end
        and factor if the user lists the students. Raises the same errors as `chain_plan`.

        Args:
            given: dotted names of the fields that the user has set, which are left unchanged.
        """
        chain = self.chain
        if "chain.students" in given and chain.students:
            replaced = {"end_steps": 1, "factor": 2}
            chain = chain.model_copy(
                update={name: value for name, value in replaced.items() if f"chain.{name}" not in given}
            )
        plain = chain.model_copy(update={"updates_at": None, "learning_rate_at": None})
        made = {stage.num_steps for stage in self.model_copy(update={"chain": plain}).chain_plan().stages}
        finished = self.finish.steps
        if "finish.steps" not in given:
            further = {objectives.rebuild(config.objective).outcome.num_steps for config in self.further}
            finished = tuple(steps for steps in finished if steps in made | further)

        def trimmed(name: str, config: Any, students: Collection[int | None]) -> dict[str, Any]:
            own = {}
            for field in ("updates_at", "learning_rate_at"):
                exceptions = getattr(config, field)
                if exceptions is not None and f"{name}.{field}" not in given:
                    own[field] = {steps: value for steps, value in exceptions.items() if steps in students}
            return own

        chain = chain.model_copy(update=trimmed("chain", chain, made))
        changes = {"steps": finished} | trimmed("finish", self.finish, finished)
        return self.model_copy(update={"chain": chain, "finish": self.finish.model_copy(update=changes)})

    def make_network(self, data: Data) -> Network:
        """Return an untrained network for this data, or raise ValueError if the network does not support this data."""
        num_classes = data.num_classes if self.model.conditional else 0
        return self.network.build(data.shape, num_classes, predictions[self.model.prediction].channels)


recipes: Registry[Callable[[], Recipe]] = Registry("recipe")
