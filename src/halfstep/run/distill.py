"""Trains and distils models built in Python, in memory or in a run folder."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from halfstep.core.denoiser import Clipped, Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import check_instance, in_python
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction, TruncatedSNR, Weighting
from halfstep.data import Data, MemoryData
from halfstep.measure.evaluate import Evaluation
from halfstep.models.model import Model
from halfstep.models.students import start_student, without_lora
from halfstep.nets import has_movable_clock, own_state
from halfstep.objectives import Denoising, Guidance, Objective, Outcome, Plan, Role, Training
from halfstep.run.arguments import (
    A_TRAINING,
    check_bare,
    check_data,
    check_plan_arguments,
    check_trainable,
    storable_denoiser,
)
from halfstep.run.call import Call, Chain, OnStage, OnWindow, call_of
from halfstep.run.course import IMAGE_RANGE, Match, Start, course
from halfstep.run.folder import own_samples
from halfstep.run.own_samples import (
    check_can_sample,
    check_guidance_of,
    expected_from,
    key_of,
    read_samples,
    samples_of,
)
from halfstep.run.probe import check_called
from halfstep.run.sources import Source, StreamedBatches, conditions_of
from halfstep.run.spec import RunSpec
from halfstep.runs import RunFolder
from halfstep.runtime.files import DamagedFile
from halfstep.runtime.processes import Processes, make_accelerator
from halfstep.runtime.tensors import digest_of
from halfstep.samplers import DDIM, Sampler
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
    """Train a denoiser in place on the data and return it as a `Model` that can serve as a teacher.

    Args:
        denoiser: a `NetworkDenoiser`, or a custom denoiser, which is itself returned instead of a `Model`. If
            `training` averages the weights, the denoiser ends up with the averaged weights.
        data: as for `distill`.
        weighting: the weight of the squared error in x0. By default, truncated SNR.
        seed, engine, device, out, evaluation, on_window, on_stage, progress: as for `distill`.

    Raises:
        ValueError: if an argument has the wrong type, or the data cannot be used.
        NonFinite: if training diverged.
    """
    denoiser = denoiser.denoiser if isinstance(denoiser, Model) else denoiser
    check_bare("the denoiser", denoiser)
    check_instance("training", training, *A_TRAINING)
    if weighting is not None:
        check_instance("weighting", weighting, Weighting, "halfstep.SNR()")
    call = call_of(seed, engine, device, out, evaluation, on_window, on_stage, progress)
    check_trainable(denoiser, as_it_is=True)
    plan = Plan.of(Denoising(weighting or TruncatedSNR()), training)
    network = None if call.out is None else storable_denoiser(denoiser)
    samples = call.opened(data)
    check_called(denoiser, samples)
    like = _as_model(denoiser, samples)
    if network is None:
        with in_python(), call.placed() as used:
            chain = Chain(call, used, samples, denoiser, None, {}, like)
            return chain.watched(plan, None)
    spec = call.spec(
        "fit",
        plan,
        samples,
        network,
        {},
        # The network is copied, so that an interrupted call does not change the weights that the next call starts from.
        network=lambda: copy.deepcopy(network.network),
        own_conditions=conditions_of(samples),
        clip=isinstance(samples, Data) and samples.is_image,
    )
    model = call.into_folder(spec)
    network.to(model.device).load_state_dict(model.denoiser.state_dict())
    return model


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
    """Distil a teacher of `start` steps into a student of `to` steps through the whole chain, and return the student.

    The plan is the same as for a recipe: a matching stage comes first if `prediction`, `process` or `guidance` needs
    it, or if the teacher is clipped or predicts eps at a signal-to-noise ratio near 0.

    Args:
        teacher: a denoiser or a model, which is not changed. If the teacher is `Clipped`, a student is first matched to
            its clipped x0. The students of a LoRA teacher start from its merged weights.
        data: the clean samples: a tensor or an array `[n, *dims]` (floats are used as they are, uint8 values as
            images), (samples, {name: condition}) with conditions `[n, ...]`, opened data, a path such as a folder of
            images, or an iterable of batches such as a DataLoader. Each batch is x0 `[batch, *dims]` or (x0, {name:
            condition}), and the iterable is restarted at its end. If None, samples of the teacher are
            used (see `samples_of`).
        to: the number of DDIM steps of the student.
        start: the number of DDIM steps of the teacher, which must be `to` times a power of two. By default, the
            teacher's own number of steps if it is itself a student, or 16 times `to` otherwise.
        training: the settings of each halving stage. The stages of the 2-step and 1-step students have twice as many
            updates.
        plan: the halving stages to use instead of `to`, `start` and `training`.
        prediction: what the student's network predicts; by default, the same as the teacher's, or v if the teacher's
            prediction is unsuitable for few steps.
        process: the student's noise process; by default, the teacher's process, or the cosine process for a matched
            U-Net with a discrete noise schedule.
        guidance: the guidance that the student learns: `FixedGuidance` or `GuidanceRange`. With a `GuidanceRange`, the
            scale becomes an input of the student's network, the condition `guidance_scale` `[batch]`.
        null: the null conditions of one sample, keyed by name. They are required for guidance.
        matching: the training settings of the matching stage; by default, `training`.
        finish: the step counts of the students to finish after the chain, or the stages from `Plan.finishes`. The last
            of these students is returned.
        teacher_sampler: the deterministic sampler of the first teacher; DDIM if None. When students act as teachers,
            they are sampled with DDIM.
        teacher_steps: the number of steps of `teacher_sampler` for each step of the first student; 2 if None.
        lora_rank: train LoRA weights of this rank instead of whole students (diffusers networks only). The LoRA weights
            are merged into the returned student, but the stages in `out` store them separately.
        seed: the seed of all random numbers, which also depend on the update number.
        engine: precision, micro batch, compilation and logging interval (`log_every`).
        device: the device to train on; by default, an accelerator if one is available.
        out: a run folder like those of the command line, with a log, checkpoints and the model of every stage. Ctrl-C
            saves the state. To resume the run, repeat the call, on any hardware. If `data` is None, the samples of the
            teacher are stored here before training starts, and a repeated call reads them.
        evaluation: how to measure the stages in `out`. None disables measuring.
        on_window: called every `engine.log_every` updates with a stage's name and its `Window` of statistics.
        on_stage: called with a stage's name and its model when the stage is complete, for example to evaluate it.
        progress: whether to show the progress on stderr: as bars on a terminal, and otherwise as one line at the start
            and the end of each stage and at most one line every 10 seconds in between.

    Returns:
        The last student as a `Model`, which `save` accepts, or as a custom denoiser if the teacher is one.

    Raises:
        ValueError: if `start` cannot be halved to `to`, the data cannot be used, an argument has the wrong type, or
            settings contradict each other.
        DifferentRecipe: if `out` contains the run of a different call. This is a subclass of ValueError.
        NonFinite: if training diverged.
    """
    check_plan_arguments(
        to, start, finish, teacher_steps, lora_rank, null, training=training, matching=matching, plan=plan,
        prediction=prediction, process=process, guidance=guidance, teacher_sampler=teacher_sampler,
    )  # fmt: skip
    call = call_of(seed, engine, device, out, evaluation, on_window, on_stage, progress)
    clip = (teacher.low, teacher.high) if isinstance(teacher, Clipped) else None
    inner = teacher.denoiser if isinstance(teacher, Clipped) else teacher
    like = inner if isinstance(inner, Model) else None
    current: Denoiser = inner if like is None else like.denoiser
    check_bare("the teacher", current)
    if data is None:
        check_can_sample(teacher)
    check_trainable(current)
    known = _start_of(inner) if clip is None else dataclasses.replace(_start_of(inner), clip=clip, is_clipped=True)
    held_null = {name: torch.as_tensor(value) for name, value in (null or (like.null if like else {})).items()}
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
            "plan already contains the halving stages, so teacher_sampler and teacher_steps have no effect. Remove them"
        )
    if plan is not None and not plan.stages:
        raise ValueError("the plan has no stages. Pass halfstep.Plan.halvings(64, 4)")
    after = finish if isinstance(finish, Plan) else Plan.finishes(finish)
    with in_python():
        chain = course(known, wanted, halvings, lora_rank, after)
    if null is not None and not chain.learned:
        raise ValueError("null, the null condition, has no effect without guidance. Pass guidance, or remove null")
    if matching is not None and chain.stages[0].objective.outcome.role is not Role.MATCHED:
        raise ValueError("matching has no effect without prediction, process, guidance or a Clipped teacher. Remove it")
    bare = None if call.out is None else storable_denoiser(current)
    if bare is not None and clip not in (None, IMAGE_RANGE):
        raise ValueError(
            f"a run folder only supports teachers clipped to [-1, 1], got {list(clip or ())}. Remove `out`"
        )

    def model_of(samples: Data | StreamedBatches) -> Model | None:
        made = _as_model(current, samples) if like is None else like
        if made is None or clip != IMAGE_RANGE:
            return made
        return Model(made.denoiser, made.manifest.model_copy(update={"clip": True}), made.null)

    told: dict[str, Any] = {"lora_rank": lora_rank}
    if bare is not None:
        told["teacher"] = digest_of(own_state(bare.network))
    if chain.learned:
        told["null"] = digest_of(held_null)

    def spec_of(samples: Data | StreamedBatches) -> RunSpec:
        made = model_of(samples)
        assert bare is not None
        assert made is not None
        return call.spec(
            "distill",
            chain,
            samples,
            bare,
            told,
            teacher=Model(made.denoiser, made.manifest, held_null),
            start_steps=chain.start_steps,
            conditional=made.num_classes > 0,
            clip=made.manifest.clip,
            lora_rank=lora_rank,
        )

    if data is None:
        _check_first_stage(chain.stages[0].objective, without_lora(current), lora_rank, held_null)
        data = _drawn(teacher, call, None if bare is None else spec_of(expected_from(teacher)))
    samples = call.opened(data)
    if like is not None:
        check_data(like, samples)
        with in_python():
            check_guidance_of(samples, like, chain.learned)
    check_called(current, samples)
    if chain.learned and known.guidance is None and held_null:
        check_called(current, samples, held_null)
    if bare is not None:
        return call.into_folder(spec_of(samples))
    was_training, device_before = current.training, next(current.parameters()).device
    frozen = [parameter.requires_grad for parameter in current.parameters()]
    try:
        with in_python(), call.placed() as used:
            first = without_lora(current)
            trained = Chain(call, used, samples, first, known.outcome, held_null, model_of(samples))
            return trained.watched(chain, lora_rank)
    finally:
        # Stages freeze the teacher, switch it to evaluation mode and move it to their device. Undo all of this, even
        # after an error.
        current.train(was_training)
        for parameter, needed in zip(current.parameters(), frozen, strict=True):
            parameter.requires_grad_(needed)
        current.to(device_before)


def _check_first_stage(objective: Objective, teacher: Denoiser, lora_rank: int | None, null: Cond) -> None:
    """Raise ValueError if the first stage of a chain cannot build its student from the teacher."""
    student = start_student(objective.start(teacher), lora_rank)
    objective.view(teacher, student, null)


def _as_model(denoiser: Denoiser, data: Data | StreamedBatches) -> Model | None:
    """Return the denoiser as a model of the data, or None for a custom denoiser.

    Raises:
        ValueError: if the denoiser's process or prediction is not registered.
    """
    if not isinstance(denoiser, NetworkDenoiser):
        return None
    image = isinstance(data, Data) and data.is_image
    return Model.of(
        denoiser,
        data.shape,
        num_classes=data.num_classes if isinstance(data, Data) else 0,
        conditions=conditions_of(data),
        clip=image,
        made=_outcome_of(denoiser),
        is_image=image,
    )


def _start_of(teacher: Denoiser) -> Start:
    """Return a model, or a denoiser built in Python, as the start of a chain."""
    if isinstance(teacher, Model):
        return Start.of(teacher)
    made = _outcome_of(teacher)._asdict()
    if isinstance(teacher, NetworkDenoiser):
        return Start(teacher.process, teacher.prediction, may_move=has_movable_clock(teacher.network), **made)
    return Start(teacher.process, None, **made)


def _outcome_of(denoiser: Denoiser) -> Outcome:
    """Return the outcome of a denoiser built in Python: a student's if it was distilled for a number of steps."""
    if denoiser.num_steps is None:
        return Outcome(Role.TEACHER)
    return Outcome(Role.STUDENT, denoiser.num_steps, denoiser.sampler or DDIM())


def _drawn(teacher: Denoiser, call: Call, spec: RunSpec | None) -> Data:
    """Return samples of the teacher, generated on the call's device.

    If the call has a run folder, rank 0 stores the samples there, and a repeated call reads them.

    Args:
        spec: the specification of the run in the folder, with other data; None without a folder.
    """
    with in_python(), call.placed() as used:
        accelerator = make_accelerator(used.precision, used.cpu, used.timeout_minutes)

        def draw() -> MemoryData:
            before = next(teacher.parameters()).device
            try:
                return samples_of(teacher.to(accelerator.device), seed=call.seed)
            finally:
                teacher.to(before)

        if spec is None:
            return draw()
        assert call.out is not None
        folder, key, found = RunFolder(call.out), key_of(teacher, spec.recipe), list[MemoryData]()
        processes = Processes(accelerator, used.timeout_minutes)
        processes.on_main(lambda: found.append(own_samples(spec, folder, key, draw)))
        held = found[0] if found else read_samples(folder.own_samples_path, key)
        if held is None:
            raise DamagedFile(
                f"process {processes.index} of the run cannot read {folder.own_samples_path}: make `out` accessible to "
                "all processes"
            )
        return held
