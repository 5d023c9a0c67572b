"""The recipe as validated data, and its conversion to objects.

Every field has a flag on the command line (`--chain.start-steps 256`), and its docstring is the flag's help. Choices
are names here; `build` converts them to objects.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

import torch
import tyro
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from halfstep.core.door import MOST_UPDATES
from halfstep.core.grids import MOST_STEPS
from halfstep.core.noise import NoiseProcess, VPCosine
from halfstep.core.prediction import Prediction, predictions, weightings
from halfstep.data import Data, DataConfig, LatentData, StandIn, open_data, warn_of_scale
from halfstep.measure.evaluate import Evaluation
from halfstep.models.model import Model
from halfstep.nets import MLP, Network, UNet2D, unet2d_config
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
    Stage,
    Training,
    divided,
    objectives,
)
from halfstep.registry import Registry
from halfstep.run.course import IMAGE_RANGE, Match, Start, check_start, cosine_within, course
from halfstep.run.preflight import preflight
from halfstep.run.spec import FREE_SETTINGS, RunSpec
from halfstep.runs import Manifest
from halfstep.runs.schema import shortened
from halfstep.runtime.files import cache_folder, user_path
from halfstep.runtime.terminal import one_line
from halfstep.samplers import samplers
from halfstep.train.settings import Engine

Positive = Annotated[int, Field(ge=1, le=MOST_UPDATES)]
Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Depth = Annotated[int, Field(ge=1, le=256)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Scale = Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)]
LogSNR = Annotated[float, Field(ge=-100, le=100)]


def _member_of(family: Registry[Any]) -> AfterValidator:
    def known(name: str) -> str:
        family[name]
        return name

    return AfterValidator(known)


class Config(BaseModel):
    """Frozen data; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class UNetConfig(Config):
    """diffusers' UNet2DModel."""

    type: Literal["unet2d"] = "unet2d"
    """Kind of network."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=12)] = (64, 128)
    """Channels at each resolution, from the finest; each level halves the image's sides."""
    layers_per_block: Depth = 2
    """Residual blocks at each resolution."""
    attention: tuple[bool, ...] = (False, True)
    """Whether each resolution has self-attention."""
    mid_attention: bool = True
    """Whether the middle block has self-attention."""
    attention_head_dim: Width = 32
    """Channels of an attention head."""
    norm_num_groups: Width = 32
    """Groups of each group normalisation."""
    time_scale_shift: Literal["default", "scale_shift"] = "scale_shift"
    """How the time embedding is applied: added, or as scale and shift after the second normalisation."""
    resample: Literal["conv", "resnet"] = "conv"
    """Down- and upsampling: a convolution, or a residual block as in the paper."""
    norm_eps: Rate = 1e-5
    """Epsilon of the group normalisations."""
    time_embedding_dim: Width | None = None
    """Width of the time embedding; four times the first channels by default."""
    flip_sin_to_cos: bool = True
    """Cosines before sines in the time embedding, as usual in diffusers; the paper has sines first."""
    freq_shift: Literal[0, 1] = 0
    """1 spaces the embedding's frequencies to end on 1/10000, as in the paper."""
    num_train_timesteps: Steps = 1024
    """Timesteps of the network, a power of two; chains of up to this many steps use whole timesteps."""

    @field_validator("num_train_timesteps")
    @classmethod
    def _power_of_two(cls, number: int) -> int:
        if number & (number - 1):
            raise ValueError(f"must be a power of two, so that halved step counts are whole timesteps, got {number}")
        return number


class MLPConfig(Config):
    """A residual multilayer perceptron, for data other than images."""

    type: Literal["mlp"] = "mlp"
    """Kind of network."""
    width: Width = 128
    """Width of the hidden layers."""
    depth: Depth = 3
    """Residual blocks."""


class DataFacts(Config):
    """Known shape and classes of a recipe's data, so that a dry run does not need the data."""

    shape: tuple[Positive, ...]
    """Shape of one sample."""
    num_samples: Positive
    """Samples."""
    num_classes: int = Field(default=0, ge=0)
    """Classes."""


class ModelConfig(Config):
    """Prediction of the network, and the noise process."""

    prediction: Annotated[str, _member_of(predictions)] = "v"
    """Prediction of the network: eps, x0, v or both (see `halfstep ls`)."""
    weighting: Annotated[str, _member_of(weightings)] = "truncated_snr"
    """Loss weight of the error in x0: constant, snr, truncated_snr or snr_plus_one."""
    conditional: bool = True
    """Condition the network on the class, if the data has classes."""
    log_snr_min: LogSNR = -20.0
    """Log signal-to-noise ratio at t = 1."""
    log_snr_max: LogSNR = 20.0
    """Log signal-to-noise ratio at t = 0."""

    def objects(self) -> tuple[NoiseProcess, Prediction]:
        """Return the process and the prediction."""
        return VPCosine(self.log_snr_min, self.log_snr_max), predictions[self.prediction]()


Flat = Annotated[Training, tyro.conf.arg(name="")]
"""Training hyperparameters without a flag prefix of their own: --chain.num-updates."""


class ChainConfig(Config):
    """How to distil the students."""

    start_steps: Steps = 1024
    """Steps of the first teacher."""
    end_steps: Steps = 1
    """Steps of the last student."""
    factor: Annotated[int, Field(ge=2, le=MOST_STEPS)] = 2
    """Teacher steps that one student step replaces: 2 halves, 4 quarters."""
    teacher_sampler: Annotated[str, _member_of(samplers)] = "ddim"
    """Deterministic sampler of the first teacher; students teach by DDIM."""
    teacher_steps: Steps | None = None
    """Steps of that sampler per step of the first student; the factor by default."""
    students: tuple[Steps, ...] | None = None
    """Steps of all students, instead of end and factor, such as 256 64 16 8 4."""
    training: Flat = HALVING
    """Training of each student."""
    updates_at: dict[int, Positive] | None = None
    """Updates of individual students, by their steps; by default num_updates, doubled at 2 steps and at 1."""
    learning_rate_at: dict[int, Rate] | None = None
    """Learning rates of individual students, by their steps."""
    critic_weight: Rate | None = None
    """Weight of an adversarial term on the students' outputs; none by default."""
    lora_rank: Width | None = None
    """Train LoRA weights of this rank instead of whole students (diffusers networks only). Teacher and students share
    the base weights. Also applies to the matching stage."""
    keep: tuple[Steps, ...] | None = None
    """Step counts of the students to keep on disk; all by default. Teacher and last student are always kept."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> "ChainConfig":
        if self.students is not None:
            if self.end_steps not in (1, *self.students[-1:]):
                raise ValueError(f"the students end at {self.students[-1]} steps: remove end_steps {self.end_steps}")
            if self.factor != 2:
                raise ValueError(f"the students are listed, so a factor of {self.factor} has no effect: remove it")
        if self.critic_weight is not None and self.training.early_end.patience:
            raise ValueError(
                "early_end has no effect with critic_weight: the loss of a student with a critic may rise. Remove one"
            )
        return self

    @field_validator("teacher_sampler")
    @classmethod
    def _deterministic(cls, name: str) -> str:
        if samplers[name].stochastic:
            raise ValueError(f"{name} draws noise, so a student cannot learn its steps. Choose ddim or heun")
        return name


SECOND_ORDER: Final = ChainConfig(start_steps=16, teacher_sampler="heun")
"""The chain 8, 4, 2, 1. Each step of its first student learns from two Heun steps of the teacher. This comes closer to
the teacher at its best than a longer chain, with three stages fewer."""


def _with_critic(plan: Plan, weight: float | None) -> Plan:
    """Return the plan with an adversarial term in every stage, or unchanged if the weight is None."""
    return plan if weight is None else plan.changed(lambda objective: Adversarial(objective, weight))


class MatchingConfig(Config):
    """How to convert a teacher to another prediction, process or guidance before halving. The stage is added if one of
    these settings needs it, or if a given teacher predicts eps at a signal-to-noise ratio near 0.
    """

    prediction: Annotated[str, _member_of(predictions)] | None = None
    """Prediction of the student: x0 or v; by default the teacher's, or v if that is eps near zero SNR."""
    process: Literal["own", "cosine"] | None = None
    """The student's noise process: the teacher's own, or cosine over the teacher's noise levels, with a power of two
    timesteps. By default cosine if a U-Net with a discrete noise schedule is matched anyway and trained whole: its
    steps lose less, and every power of two is exact."""
    guidance_scale: Scale | None = None
    """One guidance scale for the student to learn, which then needs one network call per step; 1 disables guidance."""
    guidance_range: tuple[Scale, Scale] | None = None
    """Lowest and highest guidance scale instead of one; the scale becomes an input of the student."""
    null_class: int | None = Field(default=None, ge=0, le=MOST_UPDATES)
    """The null class, if the teacher's files do not specify it."""
    num_times: Steps = 1024
    """Times at which to compare teacher and student; a teacher with a discrete noise schedule is called at its own."""
    training: Flat = Training(num_updates=10_000, learning_rate=1e-4)
    """Training of the matched student."""

    @model_validator(mode="after")
    def _one_guidance(self) -> "MatchingConfig":
        if self.guidance_scale is not None and self.guidance_range is not None:
            raise ValueError("guidance_scale and guidance_range cannot be combined: remove one")
        if self.guidance_range is not None:
            GuidanceRange(*self.guidance_range)
        return self

    @property
    def guidance(self) -> Guidance | None:
        """Guidance that the student learns; None if disabled."""
        if self.guidance_scale is not None:
            return FixedGuidance(self.guidance_scale)
        return None if self.guidance_range is None else GuidanceRange(*self.guidance_range)

    def match(self) -> Match:
        """Return the settings in the builder's form."""
        return Match(
            self.training,
            None if self.prediction is None else predictions[self.prediction](),
            {None: None, "own": lambda process: process, "cosine": cosine_within}[self.process],
            self.guidance,
            self.num_times,
        )


class FinishConfig(Config):
    """How to finish students: move their outputs onto the teacher's distribution."""

    steps: tuple[Steps, ...] = ()
    """Step counts of the students to finish, such as 4 2 1."""
    training: Flat = FINISHING
    """Training of each finished student."""
    updates_at: dict[int, Positive] | None = None
    """Updates of individual students, by their steps."""
    learning_rate_at: dict[int, Rate] | None = None
    """Learning rates of individual students, by their steps."""
    map_weight: float = Finishing.map_weight
    """Weight of the loss that keeps the map from noise to sample."""
    auxiliary_turns: Positive = Finishing.auxiliary_turns
    """Updates of the auxiliary denoiser before each student update."""
    auxiliary_rate: Rate = Finishing.auxiliary_rate
    """Learning rate of the auxiliary denoiser, relative to the student's."""
    lead_updates: int = Field(default=Finishing.lead_updates, ge=0, le=MOST_UPDATES)
    """Initial updates that train only the auxiliary denoiser."""
    critic_weight: Rate | None = None
    """Weight of an adversarial term on the students' outputs; none by default."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> "FinishConfig":
        if self.critic_weight is not None and not self.steps:
            raise ValueError(f"critic_weight {self.critic_weight} has no effect without finish.steps. Add them")
        for name in ("updates_at", "learning_rate_at"):
            foreign = sorted(set(getattr(self, name) or {}) - set(self.steps))
            if foreign:
                raise ValueError(
                    f"{name} contains a student of {foreign[0]} steps, which is not finished. Add it to finish.steps"
                )
        self.plan()
        return self

    def plan(self) -> Plan:
        """Return the finishing stages.

        Raises:
            ValueError: if they contradict each other.
        """

        def finishing(num_steps: int) -> Finishing:
            return Finishing(num_steps, self.map_weight, self.auxiliary_turns, self.auxiliary_rate, self.lead_updates)

        updates, rates = self.updates_at or {}, self.learning_rate_at or {}
        plan = Plan(
            tuple(
                replace(
                    stage,
                    training=replace(
                        stage.training,
                        num_updates=updates.get(steps, stage.training.num_updates),
                        learning_rate=rates.get(steps, stage.training.learning_rate),
                    ),
                )
                for steps, stage in zip(
                    self.steps, Plan.finishes(self.steps, self.training, finishing).stages, strict=True
                )
            )
        )
        return _with_critic(plan, self.critic_weight)


class StageConfig(Config):
    """A stage of any registered objective, such as one of your own."""

    objective: dict[str, Any]
    """{"type": its name in the registry of objectives, and its fields}, as `objectives.describe` writes it."""
    training: Training
    """Training of its student."""

    @field_validator("objective")
    @classmethod
    def _buildable(cls, objective: dict[str, Any]) -> dict[str, Any]:
        objectives.rebuild(objective)
        return objective


FREE_FIELDS: Final = (
    *("chain.keep", "data.source", "data.skip_broken", "data.accept_changed"),
    *FREE_SETTINGS,
)
"""Fields that may change when a run resumes, because they do not change what it learns. Data is compared by its
samples; models are measured again if their protocol has changed.
"""


TEACHER: Final = Training(num_updates=100_000, learning_rate=2e-4, warmup_updates=1000, anneal=False, ema_decay=0.9999)
"""Training of a teacher as in the paper for CIFAR-10, but without weight decay and dropout, and with fewer updates."""


class Recipe(Config):
    """Everything that a run needs."""

    name: str
    """The recipe's name."""
    seed: Annotated[int, Field(ge=0, le=2**62)] = 0
    """Seed of every random number of the run."""
    data: DataConfig = DataConfig()
    """Training data."""
    facts: DataFacts | None = None
    """Known shape and classes of the data, for a dry run without the data."""
    network: UNetConfig | MLPConfig = Field(default=UNetConfig(), discriminator="type")
    """The network of teacher and students."""
    model: ModelConfig = ModelConfig()
    """Prediction and noise process of the network."""
    teacher: Training = TEACHER
    """Training of the teacher."""
    matching: MatchingConfig = MatchingConfig()
    """Conversion of the teacher before halving."""
    chain: ChainConfig = ChainConfig()
    """The chain of students."""
    further: tuple[StageConfig, ...] = ()
    """Stages after the chain, of any objective."""
    finish: FinishConfig = FinishConfig()
    """Finishing of students, after all other stages."""
    evaluation: Evaluation = Evaluation()
    """Measuring."""
    engine: Engine = Engine()
    """Machine."""

    @field_validator("name")
    @classmethod
    def _file_name(cls, name: str) -> str:
        # It becomes the name of a folder.
        if (
            name.startswith((".", "-"))
            or len(name.encode(errors="replace")) > 100
            or not re.fullmatch(r"[^/\\]+", name)
        ):
            raise ValueError(
                f"must be a plain name of at most 100 bytes, without / and not starting with . or -: {name!r}"
            )
        if one_line(name) != name:
            raise ValueError(f"must not contain control characters or bytes that are not UTF-8: {name!r}")
        return name

    def teacher_plan(self) -> Plan:
        """Return the stage that trains the teacher."""
        return Plan.of(Denoising(weightings[self.model.weighting]()), self.teacher)

    def chain_plan(self, guidance: Guidance | None = None) -> Plan:
        """Return the halving stages.

        Args:
            guidance: what the first teacher has learned.

        Raises:
            ValueError: if the start cannot be halved to the end.
        """
        chain, students = self.chain, self.chain.students
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
                f"chain.keep contains a student of {foreign[0]} steps, but the chain's students have "
                f"{', '.join(map(str, steps))}"
            )
        return _with_critic(plan, chain.critic_weight)

    def fitted(self, given: Collection[str]) -> "Recipe":
        """Return the recipe without its settings for individual students that its chain does not have.

        Args:
            given: dotted names of the fields that the user has set, which are not changed.

        Raises:
            ValueError: as for `chain_plan`.
        """
        plain = self.chain.model_copy(update={"updates_at": None, "learning_rate_at": None})
        made = {stage.num_steps for stage in self.model_copy(update={"chain": plain}).chain_plan().stages}
        changes: dict[str, Any] = {}
        for name, config in (("chain", self.chain), ("finish", self.finish)):
            own: dict[str, Any] = {}
            for field in ("updates_at", "learning_rate_at"):
                exceptions = getattr(config, field)
                if exceptions is not None and f"{name}.{field}" not in given:
                    own[field] = {steps: value for steps, value in exceptions.items() if steps in made}
            if name == "finish" and "finish.steps" not in given:
                own["steps"] = tuple(steps for steps in self.finish.steps if steps in made)
            changes[name] = config.model_copy(update=own)
        return self.model_copy(update=changes)

    def make_network(self, data: Data) -> Network:
        """Return an untrained network for this data.

        Raises:
            ValueError: if the kind of network does not support the data.
        """
        channels = predictions[self.model.prediction].channels
        num_classes = data.num_classes if self.model.conditional else 0
        if isinstance(self.network, UNetConfig):
            return make_unet(self.network, data.shape, num_classes, channels)
        width, depth = self.network.width, self.network.depth
        return MLP(data.shape, width=width, depth=depth, channels=channels, num_classes=num_classes)


recipes: Registry[Callable[[], Recipe]] = Registry("recipe")


def make_unet(config: UNetConfig, shape: tuple[int, ...], num_classes: int, channels: int) -> UNet2D:
    """Return the U-Net for images `[c, h, w]`.

    Raises:
        ValueError: if samples are not images, their sides cannot be halved that often, lists differ in length, or
            channels are not a multiple of the number of groups or of an attention head's channels.
    """
    widths, levels = config.block_out_channels, len(config.block_out_channels)
    if len(shape) != 3:
        raise ValueError(
            f"a U-Net needs images [c, h, w], but samples have shape {list(shape)}: use the recipe `arrays`"
        )
    if len(config.attention) != levels:
        raise ValueError(
            f"network.attention has {len(config.attention)} entries for {levels} resolutions: give one for each"
        )
    for channels_here, attention in zip(widths, config.attention, strict=True):
        for name in ("norm_num_groups", "attention_head_dim") if attention else ("norm_num_groups",):
            if channels_here % getattr(config, name):
                raise ValueError(
                    f"network.{name} {getattr(config, name)} does not divide {channels_here} channels: change "
                    f"--network.{name.replace('_', '-')} or --network.block-out-channels"
                )
    if config.mid_attention and widths[-1] % config.attention_head_dim:
        raise ValueError(
            f"network.attention_head_dim {config.attention_head_dim} does not divide the middle block's {widths[-1]} "
            "channels: change it, or add --network.no-mid-attention"
        )
    factor = 2 ** (levels - 1)
    if shape[1] % factor or shape[2] % factor:
        raise ValueError(
            f"images of {shape[1]}x{shape[2]} cannot be halved {levels - 1} times: sides must be multiples of {factor} "
            f"(--data.image-size, or fewer network.block_out_channels)"
        )
    described = unet2d_config(
        size=shape[1:],
        in_channels=shape[0],
        out_channels=shape[0] * channels,
        num_classes=num_classes,
        **config.model_dump(exclude={"type", "num_train_timesteps"}),
    )
    return UNet2D(described, num_train_timesteps=config.num_train_timesteps)


def data_or_stand_in(recipe: Recipe) -> tuple[Data, str | None]:
    """Return the recipe's data; if it is not on this machine, random pixels of its shape and the reason.

    Raises:
        ValueError: if it cannot be opened and the recipe has no `facts`.
    """
    data, facts = recipe.data, recipe.facts
    if facts is None:
        return open_data(data), None
    missing = f"{data.source} is a data set on the Hub, and a dry run downloads nothing"
    if "/" not in data.source or user_path(data.source).exists():
        try:
            return open_data(data), None
        except ValueError as error:
            missing = str(error)
    channels, *sides = facts.shape
    shape = (data.channels or channels, *((data.image_size,) * 2 if data.image_size else sides))
    names = tuple(str(number) for number in range(facts.num_classes if data.labels else 0))
    return StandIn(data.source, shape, min(facts.num_samples, data.limit or facts.num_samples), names), missing


def build(
    recipe: Recipe,
    *,
    what: Literal["all", "teacher", "chain"] = "all",
    teacher: Model | None = None,
    data: Data | None = None,
    parent: Mapping[str, Any] | None = None,
) -> RunSpec:
    """Return the run that a recipe describes: all of it, its teacher only, or a chain from a given teacher.

    Args:
        data: replaces the recipe's own data.
        parent: identity of the given teacher; its own stage, source and files if None.

    Raises:
        ValueError: if the data cannot be opened, the recipe's parts do not fit each other or the data, or the models
            could not be measured.
    """
    process, prediction = recipe.model.objects()
    opened = open_data(recipe.data) if data is None else data
    warn_of_scale(opened)
    origin: dict[str, Any] = {} if what == "all" else {"what": what}
    if teacher is None:
        start = Start(process, prediction, given=False, clip=IMAGE_RANGE if opened.is_image else None)
        # Refuses a network that does not fit the data, without allocating its weights.
        with torch.device("meta"):
            recipe.make_network(opened)
    else:
        start, process, prediction = Start.of(teacher), teacher.process, teacher.denoiser.prediction
        check_fit(teacher.manifest, opened)
        teacher = _with_null(teacher, recipe.matching, opened)
        # Another teacher means another run, even with the same settings.
        imported = {} if teacher.manifest.source is None else {"source": teacher.manifest.source}
        own = {"stage": teacher.manifest.stage, **imported, **teacher.manifest.files}
        origin["parent"] = own if parent is None else dict(parent)
    plan = recipe.teacher_plan() if what in ("all", "teacher") else Plan()
    if what in ("all", "chain"):
        further = [Stage(objectives.rebuild(config.objective), config.training) for config in recipe.further]
        after = Plan(tuple(further)) + recipe.finish.plan()
        chain = course(start, recipe.matching.match(), recipe.chain_plan, recipe.chain.lora_rank, after)
        if teacher is not None:
            check_start(teacher, chain)
        plan = plan + chain
    spec = RunSpec(
        recipe=recipe.model_dump(mode="json") | origin,
        plan=plan,
        data=opened,
        process=process,
        prediction=prediction,
        network=None if teacher is not None else lambda: recipe.make_network(opened),
        teacher=teacher,
        start_steps=recipe.chain.start_steps,
        keep=recipe.chain.keep,
        conditional=recipe.model.conditional if teacher is None else teacher.num_classes > 0,
        flip=recipe.data.flip,
        clip=opened.is_image if teacher is None else teacher.manifest.clip,
        seed=recipe.seed,
        lora_rank=recipe.chain.lora_rank,
        engine=recipe.engine,
        evaluation=recipe.evaluation,
        cache=cache_folder(),
        free=FREE_FIELDS,
        defaults=Recipe(name=recipe.name).model_dump(mode="json"),
    )
    preflight(spec)
    return spec


def _with_null(teacher: Model, config: MatchingConfig, data: Data) -> Model:
    """Return the teacher with its null conditions: its own, or those of the recipe or the data."""
    null = dict(teacher.null)
    if config.null_class is not None:
        if not teacher.num_classes:
            raise ValueError(
                f"matching.null_class {config.null_class} needs a teacher with classes, and this one has none"
            )
        last = max(int(null.get("class_labels", 0)), teacher.num_classes - 1)
        if config.null_class > last:
            raise ValueError(
                f"matching.null_class {config.null_class} is not a class of the teacher, which has 0 to {last}"
            )
        null = {"class_labels": torch.tensor(config.null_class)}
    if isinstance(data, LatentData) and not null and teacher.manifest.guidance is None:
        null = dict(data.null)
    if config.guidance is not None:
        if teacher.manifest.guidance is not None:
            raise ValueError("the teacher has already learned its guidance: remove matching.guidance_scale")
        if not null and not teacher.takes_scale:
            raise ValueError(
                "guidance calls the teacher with and without its condition, and its null condition is not "
                + ("known: give --matching.null-class" if teacher.num_classes else "known: the teacher has none")
            )
    return Model(teacher.denoiser, teacher.manifest, null)


def _check_classes(model: Manifest, data: Data) -> None:
    """Raise ValueError if the classes of data and model are numbered differently, as for labels with gaps."""
    names = data.class_names
    known = model.class_names[: len(names)] or tuple(map(str, range(len(names))))
    # Without class names, only the number of classes can be compared.
    if names != known and (model.class_names or all(name.isdecimal() for name in names)):
        raise ValueError(
            f"the model's first classes are {shortened(known)}, but those of {data.source} are {shortened(names)}: "
            "give data with the same classes, in the same order"
        )


def encode_first(model: Manifest, source: str, pipeline: str) -> str:
    """Return why a model of latents cannot be trained on images, and the command that encodes them."""
    return (
        f"the model generates latents {list(model.shape)}, but {source} contains images: encode them first with "
        f"halfstep encode {pipeline} --data {source} --out latents, then use --data latents"
    )


def check_fit(model: Manifest, data: Data) -> None:
    """Raise ValueError if a model cannot be trained or measured on this data: shapes, ranges or conditions differ."""
    kinds = {True: "images in [-1, 1]", False: "plain arrays"}
    if model.pipeline is not None and data.is_image and not model.is_image:
        raise ValueError(encode_first(model, data.source, model.pipeline.folder))
    if model.is_image != data.is_image:
        raise ValueError(
            f"the model makes {kinds[model.is_image]}, but {data.source} has {kinds[data.is_image]}: give the data "
            "that it was trained on (--data)"
        )
    if model.shape != data.shape:
        raise ValueError(
            f"the model has samples of shape {list(model.shape)}, but {data.source} has {list(data.shape)}: "
            "give the data that it was trained on (--data, --data.image-size)"
        )
    if model.num_classes and not 0 < data.num_classes <= model.num_classes:
        raise ValueError(
            f"the model is conditioned on {model.num_classes} classes, but {data.source} has {data.num_classes}"
        )
    if model.num_classes:
        _check_classes(model, data)
    held = data.fetch(torch.zeros(1, dtype=torch.int64)).cond if model.conditions else {}
    for name, shape in model.conditions.items():
        if name not in held:
            raise ValueError(
                f"the model is conditioned on {name}, which {data.source} does not contain: encode images and captions "
                "first (halfstep encode)"
            )
        if tuple(held[name].shape[1:]) != shape:
            raise ValueError(
                f"the model takes {name} of shape {list(shape)}, but {data.source} has {list(held[name].shape[1:])}: "
                "encode the data with the model's own pipeline"
            )
