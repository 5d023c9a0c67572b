"""Training and distillation of models that are made in Python, in memory or into a run folder."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from halfstep.core.denoiser import Clipped, Cond, Denoiser, Guided, NetworkDenoiser
from halfstep.core.door import check_denoiser, check_instance, in_python
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction, TruncatedSNR, Weighting
from halfstep.data import Data
from halfstep.measure.evaluate import Evaluation
from halfstep.models.model import Model
from halfstep.nets import has_movable_clock, own_state
from halfstep.objectives import (
    Denoising,
    Guidance,
    Halving,
    Outcome,
    Plan,
    Role,
    Training,
)
from halfstep.objectives.base import check_whole
from halfstep.run.call import Chain, OnStage, OnWindow, call_of, is_image
from halfstep.run.course import Match, Start, course
from halfstep.run.own_samples import samples_of
from halfstep.run.sources import CLASSES, Source, StreamedBatches, conditions_of
from halfstep.runtime.tensors import digest_of
from halfstep.samplers import Sampler
from halfstep.train.settings import Engine

STUDENT_TRAINING: Final = Training(num_updates=1000, learning_rate=2e-4)


def fit(
    denoiser: Denoiser,
    data: Source,
    training: Training,
    *,
    weighting: Weighting | None = None,
    seed: int = 0,
    engine: Engine = Engine(),
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    evaluation: Evaluation | None = None,
    on_window: OnWindow | None = None,
    on_stage: OnStage | None = None,
    progress: bool = True,
) -> Any:
    """Train a denoiser in place to denoise the data, and return it as a teacher: a `Model`.

    Args:
        denoiser: a `NetworkDenoiser`, or a denoiser of one's own, which is returned itself; it keeps its moving average
            if `training` has one.
        data: as for `distill`.
        weighting: of the squared error in x0; truncated SNR if None.
        seed, engine, device, out, evaluation, on_window, on_stage, progress: as for `distill`.

    Raises:
        ValueError: if an argument is of another kind, or the data cannot be used.
        NonFinite: if training diverged.
    """
    denoiser = denoiser.denoiser if isinstance(denoiser, Model) else denoiser
    _check_bare("the denoiser", denoiser)
    check_instance("training", training, Training, "halfstep.Training(num_updates=2000, learning_rate=2e-4)")
    if weighting is not None:
        check_instance("weighting", weighting, Weighting, "halfstep.SNR()")
    call = call_of(data, seed, engine, device, out, evaluation, on_window, on_stage, progress)
    _check_trainable(denoiser)
    plan = Plan.of(Denoising(weighting or TruncatedSNR()), training)
    if call.out is None:
        with in_python(), call.placed() as used:
            chain = Chain(call, used, denoiser, Outcome(Role.TEACHER), {}, None)
            call.watch(chain.run(plan, None), chain.model_of)
            return chain.models[-1]
    network = _network_of(denoiser)
    spec = call.spec(
        "fit",
        plan,
        network,
        {},
        # A copy: an interrupted call must not have moved the weights that the next one starts with.
        network=lambda: copy.deepcopy(network.network),
        own_conditions=conditions_of(call.data),
        clip=is_image(call.data),
    )
    model = call.into_folder(spec)
    network.to(model.device).load_state_dict(model.denoiser.state_dict())
    return model


def _check_bare(name: str, denoiser: Any) -> None:
    """Raise ValueError unless it is a denoiser that targets can be computed with."""
    check_denoiser(name, denoiser, Denoiser)
    if isinstance(denoiser, Clipped | Guided):
        what, remedy = "clips x0", "Pass its .denoiser; samples can be clipped later"
        if isinstance(denoiser, Guided):
            what, remedy = "is guided", "Pass its .denoiser, with guidance=halfstep.FixedGuidance(scale) and null"
        raise ValueError(f"{name} {what}, which targets must not be. {remedy}")


def _check_trainable(denoiser: Denoiser) -> None:
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
    if not any(True for _ in network.parameters()):
        raise ValueError(
            f"{type(denoiser).__name__} has no weights to train: no module was found behind its network. Make the "
            "network an nn.Module that holds its layers"
        )


def _network_of(denoiser: Denoiser) -> NetworkDenoiser:
    if isinstance(denoiser, Clipped):
        raise ValueError("a Clipped teacher is matched in memory only. Leave `out` away, and save the student")
    if not isinstance(denoiser, NetworkDenoiser):
        raise ValueError(
            f"a run folder holds networks, and {type(denoiser).__name__} is a denoiser of your own. Pass a "
            "NetworkDenoiser, or leave `out` away"
        )
    return denoiser


def distill(
    teacher: Denoiser | Model,
    data: Source | None = None,
    *,
    to: int = 4,
    start: int | None = None,
    training: Training = STUDENT_TRAINING,
    plan: Plan | None = None,
    prediction: Prediction | None = None,
    process: NoiseProcess | None = None,
    guidance: Guidance | None = None,
    null: Cond | None = None,
    matching: Training | None = None,
    finish: Sequence[int] | Plan = (),
    teacher_sampler: Sampler | None = None,
    teacher_steps: int | None = None,
    lora_rank: int | None = None,
    seed: int = 0,
    engine: Engine = Engine(),
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    evaluation: Evaluation | None = None,
    on_window: OnWindow | None = None,
    on_stage: OnStage | None = None,
    progress: bool = True,
) -> Any:
    """Return a student that samples in `to` steps what the teacher samples in `start`: a `Model`, by the whole chain.

    The plan is the one that a recipe would make: a matching stage comes first where `prediction`, `process` or
    `guidance` asks for it, or where the teacher is clipped or predicts eps at a signal-to-noise ratio near 0.

    Args:
        teacher: a denoiser, or a model; it is not changed. A student is first matched to the x0 of a `Clipped` one.
        data: clean samples as a tensor or an array `[n, *dims]` (floats as they are; uint8 as images), (samples, {name:
            condition}) with conditions `[n, ...]`, opened data, a path such as a folder of images, or any iterable of
            batches x0 `[batch, *dims]` or (x0, {name: condition}), such as a DataLoader, which is restarted at its end.
            If None, samples of the teacher: see `samples_of`.
        to: DDIM steps of the student.
        start: DDIM steps of the teacher, `to` times a power of two; if None a student's own, or 16 times `to`.
        training: of each halving stage; twice the updates at 2 steps and 1.
        plan: the halving stages instead of `to`, `start` and `training`.
        prediction: what the student's network predicts; as the teacher's if None.
        process: the student's noise process; the teacher's, or the cosine clock for a matched U-Net, if None.
        guidance: what the student learns: `FixedGuidance`, or a `GuidanceRange`, whose scale its network receives as
            the condition `guidance_scale` `[batch]`.
        null: what stands for no condition, for one sample, by the names of the conditions; needed for guidance.
        matching: training of the matching stage; `training` if None.
        finish: students, by their steps, that are finished after the chain, or the stages of `Plan.finishes`; the last
            of them is returned.
        teacher_sampler: deterministic sampler of the first teacher; DDIM if None. Students teach by DDIM.
        teacher_steps: its steps for each step of the first student; 2 if None.
        lora_rank: rank of low-rank additions that are trained instead of whole students (networks of diffusers). The
            returned student has them merged into its weights; the stages of `out` hold them apart.
        seed: with the update, the key of every random number.
        engine: precision, micro batch, compilation and how often statistics are taken (`log_every`).
        device: where training runs; an accelerator, if there is one, if None.
        out: a run folder as the command line writes it, with a log, checkpoints and the model of every stage. The same
            call on it resumes; Ctrl-C saves the state first.
        evaluation: how the stages in `out` are measured; not at all if None.
        on_window: called with a stage's name and its `Window` of statistics at every `engine.log_every`th update.
        on_stage: called with a stage's name and its model when the stage is complete: evaluate it there.
        progress: show progress bars, if stderr is a terminal.

    Returns:
        The last student as a `Model`, which `save` takes; a denoiser of one's own class if the teacher is one.

    Raises:
        ValueError: if `start` cannot be halved to `to`, the data cannot be used, an argument is of another kind, or
            settings contradict each other.
        DifferentRecipe: a ValueError, if `out` holds a run of another call.
        NonFinite: if training diverged.
    """
    _check_plan_arguments(
        to, start, finish, training, plan, prediction, process, guidance, matching, teacher_sampler, lora_rank
    )
    if not isinstance(teacher, Model):
        _check_bare("the teacher", teacher.denoiser if isinstance(teacher, Clipped) else teacher)
    call = call_of(
        samples_of(teacher, seed=seed) if data is None else data,
        seed, engine, device, out, evaluation, on_window, on_stage, progress,
    )  # fmt: skip
    current: Denoiser
    if isinstance(teacher, Model):
        current, known, held_null = teacher.denoiser, Start.of(teacher), dict(null or teacher.null)
        _check_data(teacher, call.data)
    else:
        clipped = isinstance(teacher, Clipped)
        bare = teacher.denoiser if isinstance(teacher, Clipped) else teacher
        known = Start(teacher.process, None, is_clipped=clipped)
        if isinstance(bare, NetworkDenoiser):
            may_move = has_movable_clock(bare.network)
            known = Start(teacher.process, bare.prediction, may_move=may_move, is_clipped=clipped)
        current, held_null = teacher, dict(null or {})
    wanted = Match(matching or training, prediction, None if process is None else lambda _: process, guidance)

    def halvings(learned: Guidance | None) -> Plan:
        if plan is None:
            first = known.num_steps or 16 * to if start is None else start
            return Plan.halvings(
                first, to, training, guidance=learned, teacher_sampler=teacher_sampler, teacher_steps=teacher_steps
            )
        return plan.guided(learned)

    if plan is not None and (teacher_sampler, teacher_steps) != (None, None):
        raise ValueError(
            "plan gives the halving stages, so teacher_sampler and teacher_steps have no effect. Remove them"
        )
    after = finish if isinstance(finish, Plan) else Plan.finishes(finish)
    with in_python():
        chain = course(known, wanted, halvings, lora_rank, after)
    if null is not None and all(stage.objective.guidance is None for stage in chain.stages):
        raise ValueError("null stands for no condition, which only guidance needs. Pass guidance, or leave null out")
    if matching is not None and chain.stages[0].objective.outcome.role is not Role.MATCHED:
        raise ValueError(
            "matching has no effect without prediction, process, guidance or a Clipped teacher. Leave it out"
        )
    _check_trainable(current)
    held_null = {name: torch.as_tensor(value) for name, value in held_null.items()}
    like = teacher if isinstance(teacher, Model) else None
    if call.out is not None:
        bare = _network_of(current)
        if like is None:
            data_, conditions = call.data, conditions_of(call.data)
            assert isinstance(data_, Data)
            like = Model.of(
                bare,
                data_.shape,
                num_classes=data_.num_classes,
                conditions=conditions,
                clip=data_.is_image,
            )
        told = {"teacher": digest_of(own_state(bare.network)), "lora_rank": lora_rank}
        given = Model(like.denoiser, like.manifest, held_null)
        first = next((stage.objective for stage in chain.stages if isinstance(stage.objective, Halving)), None)
        spec = call.spec(
            "distill",
            chain,
            bare,
            told,
            teacher=given,
            start_steps=None if first is None else first.num_steps * first.num_teacher_steps,
            conditional=like.num_classes > 0,
            clip=like.manifest.clip,
            lora_rank=lora_rank,
        )
        return call.into_folder(spec)
    was_training, device_before = current.training, next(current.parameters()).device
    frozen = [parameter.requires_grad for parameter in current.parameters()]
    try:
        with in_python(), call.placed() as used:
            trained = Chain(call, used, current, Outcome(known.role, known.num_steps), held_null, like)
            call.watch(trained.run(chain, lora_rank), trained.model_of)
    finally:
        # The stages run a teacher in evaluation mode, frozen and on their device; it is restored, also if one diverged.
        current.train(was_training)
        for parameter, needed in zip(current.parameters(), frozen, strict=True):
            parameter.requires_grad_(needed)
        current.to(device_before)
    return trained.models[-1]


def _check_plan_arguments(
    to: Any,
    start: Any,
    finish: Any,
    training: Any,
    plan: Any,
    prediction: Any,
    process: Any,
    guidance: Any,
    matching: Any,
    teacher_sampler: Any,
    lora_rank: Any,
) -> None:
    """Raise ValueError if an argument of `distill` is of another kind."""
    check_whole("to", to)
    check_whole("start", to if start is None else start)
    if isinstance(finish, str) or not isinstance(finish, Plan | Sequence):
        raise ValueError(f"finish must be the steps of students, got {finish!r}. Pass a list: finish=[2, 1]")
    made = "halfstep.Training(num_updates=2000, learning_rate=2e-4)"
    kinds: list[tuple[str, Any, type, str]] = [
        ("training", training, Training, made),
        ("matching", matching, Training, made),
        ("plan", plan, Plan, "halfstep.Plan.halvings(64, 4)"),
        ("prediction", prediction, Prediction, "halfstep.V()"),
        ("process", process, NoiseProcess, "halfstep.VPCosine()"),
        ("guidance", guidance, Guidance, "halfstep.FixedGuidance(4.0)"),
        ("teacher_sampler", teacher_sampler, Sampler, "halfstep.Heun()"),
        ("lora_rank", lora_rank, int, "lora_rank=16"),
    ]
    for name, value, kind, example in kinds:
        if value is not None or name == "training":
            check_instance(name, value, kind, example)


def _check_data(model: Model, data: Data | StreamedBatches) -> None:
    """Raise ValueError unless the model makes samples as these and is told what they hold."""
    if data.shape != model.shape:
        raise ValueError(
            f"the teacher makes samples of shape {list(model.shape)}, but the data have {list(data.shape)}. Pass the "
            "data that it was trained on"
        )
    held = set(conditions_of(data)) | ({CLASSES} if isinstance(data, Data) and data.num_classes else set())
    needed = set(model.manifest.conditions) | ({CLASSES} if model.num_classes else set())
    if missing := sorted(needed - held):
        raise ValueError(
            f"the teacher is conditioned on {missing[0]}, which the data do not hold. Pass "
            f"(x0, {{{missing[0]!r}: tensor}})"
        )
