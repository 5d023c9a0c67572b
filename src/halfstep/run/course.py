"""Builds the plan of a chain that starts from a teacher, for recipes and for `halfstep.distill`.

A teacher that amplifies its errors at t = 1 is matched to v-prediction before halving. If a U-Net with a discrete
noise schedule needs matching, it is also moved to the cosine schedule. On this schedule, each step loses less accuracy,
and the steps of students with power-of-two step counts fall on integer timesteps.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, final

import torch

from halfstep.core.denoiser import output_gain, warn_of_gain
from halfstep.core.noise import NoiseProcess, VPCosine, VPTable
from halfstep.core.prediction import Prediction, V
from halfstep.core.warnings import HalfstepWarning
from halfstep.models.folder import blank_denoiser
from halfstep.models.model import Model
from halfstep.models.students import without_lora
from halfstep.nets import StockNetwork, has_movable_clock
from halfstep.objectives import Guidance, Matching, Objective, Outcome, Plan, Role, Training, parents_of
from halfstep.samplers import DDIM, Sampler

MATCHED_GAIN: Final = 10.0
"""The gain at t = 1 (see `output_gain`) above which a given teacher is matched to v-prediction before halving. With
eps-prediction, the gain is 15 for Stable Diffusion and 160 for DDPM."""
CHANGED_INPUTS: Final = (
    "LoRA needs unchanged network inputs, but a guidance range or a different process changes them. Use a single "
    "--matching.guidance-scale and --matching.process own, or remove --chain.lora-rank"
)
IMAGE_RANGE: Final = (-1.0, 1.0)
"""The range of x0 for images."""


def cosine_within(process: NoiseProcess) -> VPCosine:
    """Return a cosine process with the same range of noise levels as `process`, limited to log-SNRs in [-20, 20]."""
    first = 1 / len(process.betas) if isinstance(process, VPTable) else 0.0
    bounds = process.log_snr(torch.tensor([1.0, first], dtype=torch.float64)).clamp(-20, 20)
    return VPCosine(*bounds.tolist())


@final
@dataclass(frozen=True)
class Start:
    """The teacher that a chain starts from.

    Args:
        given: whether the teacher already exists, as opposed to being trained by the plan.
    """

    process: NoiseProcess
    prediction: Prediction | None
    """The teacher's prediction, or None for a custom denoiser, which can only be halved as it is."""
    name: str = "the teacher"
    role: Role = Role.TEACHER
    num_steps: int | None = None
    guidance: Guidance | None = None
    """The guidance that the teacher has already learned."""
    may_move: bool = False
    """Whether the teacher's network can be converted to another process."""
    sampler: Sampler = DDIM()
    """The sampler for which the teacher was distilled, if it is a student."""
    given: bool = True
    clip: tuple[float, float] | None = None
    """The bounds to which sampling clips the teacher's x0, or None for no clipping. A matched student learns the
    clipped x0."""
    is_clipped: bool = False
    """Whether the teacher is a `Clipped` denoiser. Halving does not support such a teacher, so a student is first
    matched to it."""
    is_embedded: bool = False
    """Whether the network, imported from a pipeline, takes the guidance scale as an input. Its samples are then guided
    although `guidance` is None."""
    is_stock: bool = False
    """Whether the teacher is a diffusers network, so that its students can be exported to diffusers."""

    @classmethod
    def of(cls, model: Model) -> "Start":
        """Return a loaded model as the start of a chain."""
        return cls(
            model.process,
            model.denoiser.prediction,
            model.manifest.stage,
            model.role,
            model.num_steps,
            model.guidance,
            has_movable_clock(model.denoiser.network),
            model.sampler,
            clip=IMAGE_RANGE if model.manifest.clip else None,
            is_embedded=model.manifest.pipeline is not None and model.manifest.pipeline.scale is not None,
            is_stock=isinstance(model.denoiser.network, StockNetwork),
        )

    @property
    def outcome(self) -> Outcome:
        """The outcome of the stage that trained the teacher."""
        return Outcome(self.role, self.num_steps, self.sampler)

    @property
    def is_finished(self) -> bool:
        """Whether the teacher can only be halved, not matched, because it is a student or has learned guidance."""
        return self.role is Role.STUDENT or self.guidance is not None


@final
@dataclass(frozen=True)
class Match:
    """How to convert a teacher before halving. `objective` chooses the settings that are None."""

    training: Training
    prediction: Prediction | None = None
    """The student's prediction. If None, the teacher's, or v if the teacher's is unsuitable for few steps."""
    process: Callable[[NoiseProcess], NoiseProcess] | None = None
    """A function that maps the teacher's process to the student's process."""
    guidance: Guidance | None = None
    num_times: int = 1024
    """The number of time points at which the student and the teacher are compared. If the student's process has a
    discrete noise schedule, the time points of this schedule are used instead."""

    def objective(self, start: Start, lora_rank: int | None = None) -> Matching | None:
        """Return the matching objective that `start` needs, or None if it needs no matching.

        Raises:
            ValueError: if the teacher cannot be matched, or LoRA students cannot be matched to it.
        """
        own = start.process
        clock = own if self.process is None else self.process(own)
        meaning = self.prediction or start.prediction
        if start.prediction is None:
            if self.prediction is not None or clock != own:
                raise ValueError(f"{start.name} has no prediction to match: pass a NetworkDenoiser")
        elif self.prediction is None and start.given and not start.is_finished:
            meaning = V() if output_gain(own, start.prediction) > MATCHED_GAIN else meaning
        if (meaning, clock, self.guidance) == (start.prediction, own, None) and not start.is_clipped:
            return None
        if start.is_finished:
            what = (
                "has learned its guidance"
                if start.role is not Role.STUDENT
                else f"is a student of {start.num_steps} steps, which predicts x0 only at the times of these steps"
            )
            raise ValueError(
                f"the matching stage calls a teacher at all times and guides it, but {start.name} {what}. Match its "
                "own teacher instead, with all changes at once"
            )
        if self.guidance is not None and not start.given:
            raise ValueError(
                "matching.guidance_scale and matching.guidance_range need a given teacher with a null class, but this "
                "recipe trains its own teacher, which has no null class. Remove both settings"
            )
        may_move = isinstance(own, VPTable) and start.may_move and lora_rank is None
        if self.process is None and may_move:
            clock = cosine_within(own)
        if lora_rank is not None and (clock != own or (self.guidance is not None and self.guidance.is_shown)):
            raise ValueError(CHANGED_INPUTS)
        # A teacher with a discrete noise schedule was trained only at the levels of its table.
        num_times = len(clock.betas) if isinstance(clock, VPTable) else self.num_times
        return Matching(num_times, guidance=self.guidance, prediction=meaning, process=clock, clip=start.clip)


def course(
    start: Start,
    match: Match,
    halvings: Callable[[Guidance | None], Plan],
    lora_rank: int | None = None,
    after: Plan | None = None,
) -> Plan:
    """Return the stages from a teacher to the last student: matching if needed, halvings, then `after`.

    Warns if the chain's first step from t = 1 amplifies the network's error too much.

    Args:
        halvings: a function that returns the halving stages, given the guidance that the chain's first teacher has
            learned.
        after: stages that follow the halvings, such as finishes. They inherit the guidance of the chain's teacher.

    Raises:
        ValueError: as for `Match.objective`, or if the halvings are impossible, a stage needs a model that does not
            precede it, a teacher would be guided twice, or a student would be refined without its learned guidance.
    """
    matching = match.objective(start, lora_rank)
    process, prediction, guidance = start.process, start.prediction, start.guidance
    if matching is not None:
        process, prediction = matching.process or process, matching.prediction or prediction
        guidance = matching.guidance
    if prediction is not None:
        warn_of_gain(process, prediction, given=start.given)
    plan = halvings(guidance) + (after or Plan()).guided(guidance)
    if guidance is None and start.is_embedded:
        plan = plan.embedded()
    if matching is not None:
        plan = Plan.of(matching, match.training) + plan
    models, learned = [start.outcome], [start.guidance]
    for stage in plan.stages:
        parents = parents_of(stage.objective, models)
        assert parents is not None
        _check_guidance(stage.objective, learned[parents.start], learned[parents.teacher])
        own, before = stage.objective.guidance, learned[parents.start]
        if lora_rank is not None and own is not None and own.is_shown and before is None and not start.is_embedded:
            raise ValueError(CHANGED_INPUTS)
        models.append(stage.objective.outcome)
        learned.append(stage.objective.guidance or learned[parents.start])
    _warn_of_export(start, process, models[-1].num_steps, lora_rank)
    return plan


def _warn_of_export(start: Start, process: NoiseProcess, num_steps: int | None, lora_rank: int | None) -> None:
    """Warn if the last student of a diffusers network needs timesteps that the noise schedule does not have."""
    if not start.given or not start.is_stock:
        return
    if num_steps is None or not isinstance(process, VPTable) or len(process.betas) % num_steps == 0:
        return
    num = len(process.betas)
    exact = [steps for steps in range(1, 65) if num % steps == 0]
    # LoRA students cannot move to another process, nor can networks with another kind of time embedding.
    may_move = start.may_move and lora_rank is None
    match = "Match the teacher to the cosine process (--matching.process cosine), end" if may_move else "End"
    warnings.warn(
        f"a student of {num_steps} steps on the teacher's {num} timesteps cannot be exported to diffusers, which "
        f"only supports {', '.join(map(str, exact))} steps. {match} at one of these numbers of steps (--to), or use "
        "--format onnx later",
        HalfstepWarning,
        stacklevel=3,
    )


def _check_guidance(objective: Objective, of_start: Guidance | None, of_teacher: Guidance | None) -> None:
    """Raise ValueError if a teacher would be guided twice, or a student refined without its learned guidance."""
    if objective.guides_teacher and of_teacher is not None:
        raise ValueError(
            f"the stage {objective.label} guides a teacher that has already learned {of_teacher}. Remove guide_teacher"
        )
    if objective.refines and objective.guidance != of_start:
        raise ValueError(
            f"the stage {objective.label} has {objective.guidance or 'no guidance'}, but its student has learned "
            f"{of_start or 'none'}. Set the same guidance if the stage's teacher has learned it too; otherwise match "
            "the teacher first"
        )


def check_start(teacher: Model, plan: Plan) -> None:
    """Check that the first stage can build its student from the teacher, without allocating weights.

    Raises:
        ValueError: as for `Objective.start`.
    """
    with torch.device("meta"):
        denoiser = without_lora(blank_denoiser(teacher.manifest))
        for stage in plan.stages[:1]:
            stage.objective.start(denoiser)
