"""Estimates the cost of a run.

The FLOPs and the memory of an update are counted without running it. The time of an update is measured.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from halfstep.core.denoiser import GUIDANCE, Denoiser
from halfstep.models.folder import blank_denoiser
from halfstep.models.students import start_student, without_lora
from halfstep.nets import LoRA, checkpoint_gradients, copy_denoiser, takes_guidance, trainable, weight_bytes_of
from halfstep.objectives import Evals, Models, Stage
from halfstep.run.spec import RunSpec
from halfstep.run.start import fresh_denoiser, trainer_for
from halfstep.runtime.processes import make_accelerator
from halfstep.train.helpers import make_helpers
from halfstep.train.player import network_of
from halfstep.train.settings import Engine

FLOPS_OF_A_TRIAL = 1e11
"""The maximum number of FLOPs in the first timed update, which takes seconds on a CPU and a fraction of a second on a
GPU."""

SECONDS_OF_A_TRIAL = 10.0
"""Once an update takes longer than this, no larger batch is timed."""


@final
class Size(NamedTuple):
    """The parameter counts of a network."""

    parameters: int
    trainable: int
    """The number of trained parameters: all of them, or only the LoRA weights of a LoRA student."""
    held: int
    """The number of parameters that are not shared with the student."""


@final
class Forward(NamedTuple):
    """The cost of a forward pass on one sample in float32, or in bfloat16 if the weights have a lower precision."""

    parameters: int
    trainable: int
    """The number of trained parameters, as in `Size`."""
    flops: int
    """The number of multiplications and additions."""
    saved_bytes: int
    """The number of bytes that autograd saves for the backward pass, in addition to the parameters."""
    weight_bytes: int
    """The size of the parameters in bytes. Frozen parameters are counted in their stored precision."""


def count_forward(spec: RunSpec) -> Forward:
    """Count the cost of a forward pass on the meta device, without computing anything or allocating memory.

    Raises:
        ValueError: if the spec has neither a network nor a teacher.
    """
    with torch.device("meta"):
        network = network_of(_student(spec))
        x_t, t = torch.empty(1, *spec.data.shape), torch.empty(1)
        cond = {"class_labels": torch.empty(1, dtype=torch.int64)} if spec.num_classes else {}
        if spec.teacher is not None:
            cond |= {name: torch.empty(1, *shape) for name, shape in spec.teacher.manifest.conditions.items()}
        if takes_guidance(network):
            cond[GUIDANCE] = torch.empty(1)
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept, largest = dict[int, Tensor](), 0

    def kept_in(held: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in own and storage not in kept:
                # The tensor is kept alive so that no later storage reuses its address.
                held[storage] = tensor
            return tensor

        return keep

    def recomputed(block: nn.Module, *args: Any) -> Any:
        """Call a block and keep only its inputs, since the backward pass recomputes the activations block by block."""
        nonlocal largest
        for value in args:
            if isinstance(value, Tensor):
                kept_in(kept)(value)
        inner: dict[int, Tensor] = {}
        with torch.autograd.graph.saved_tensors_hooks(kept_in(inner), lambda t: t):
            output = block(*args)
        largest = max(largest, _bytes(inner))
        return output

    if spec.engine.gradient_checkpointing:
        checkpoint_gradients(network)
        network.train()
        blocks: list[Any] = [part for part in network.modules() if hasattr(part, "_gradient_checkpointing_func")]
        for block in blocks:
            block._gradient_checkpointing_func = recomputed
    hooks = torch.autograd.graph.saved_tensors_hooks(kept_in(kept), lambda t: t)
    with FlopCounterMode(display=False) as counter, hooks, _Fused():
        network(x_t, t, **cond)
    return Forward(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        trainable=sum(parameter.numel() for _, parameter in trainable(network)),
        flops=int(counter.get_total_flops()),
        saved_bytes=_bytes(kept) + largest,
        weight_bytes=weight_bytes_of(network),
    )


def _bytes(held: Mapping[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


@final
class _Fused(TorchFunctionMode):
    """Computes attention on the meta device as fused kernels do, without storing the attention matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_fused if func is scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _fused(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Any:
    if kwargs.get("enable_gqa") or query.ndim != 4:
        return scaled_dot_product_attention(query, key, value, attn_mask, **kwargs)
    bias = None if attn_mask is None else attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


def _student(spec: RunSpec) -> Denoiser:
    """Return a student of the plan on the current device."""
    if spec.teacher is None:
        return fresh_denoiser(spec)
    # A run merges the LoRA weights of its teacher.
    denoiser = without_lora(blank_denoiser(spec.teacher.manifest))
    for stage in spec.plan.stages:
        started = stage.objective.start(denoiser)
        denoiser = started
    return start_student(denoiser, spec.lora_rank)


def helper_sizes(spec: RunSpec, stage: Stage) -> dict[str, Size]:
    """Count the parameters of a stage's helper networks on the meta device."""
    if not stage.objective.helpers:
        return {}
    with torch.device("meta"):
        student = _student(spec)
        models = Models(student, copy_denoiser(student))
        auxiliaries, followers = make_helpers(stage, models, spec.data.shape, 0, "cost")
    beside = {id(parameter) for parameter in network_of(student).parameters()}
    networks = {name: network_of(model) for name, (model, _) in auxiliaries.items()}
    averaged = {name: follower.network for name, follower in followers.items()}
    return {
        name: Size(
            sum(p.numel() for p in network.parameters()),
            sum(p.numel() for _, p in trainable(network)) if name in networks else 0,
            sum(p.numel() for p in network.parameters() if id(p) not in beside),
        )
        for name, network in {**networks, **averaged}.items()
    }


@final
class Memory(NamedTuple):
    """The memory that an update of one stage needs on one device, in bytes.

    With bfloat16 autocast, the activations need about half as much memory.
    """

    weights: int
    """The student's weights. Frozen weights are counted in their stored precision."""
    gradients: int
    """The gradients of all trained parameters."""
    moments: int
    """AdamW's two moments for each trained network, in float32 or in 8 bits."""
    average: int
    """The moving average of the student's weights, if enabled."""
    teacher: int
    """The teacher's weights that are not shared with the student."""
    helpers: int
    """The weights of the objective's auxiliary networks, excluding weights that are shared with the student."""
    activations: int
    """The activations saved for the backward pass of one micro batch, in the turn that saves the most."""


def memory_of_update(stage: Stage, forward: Forward, engine: Engine, helpers: Mapping[str, Size]) -> Memory:
    """Count the memory that an update needs, excluding allocator overhead and convolution workspaces."""
    training = stage.training
    samples = min(engine.set_micro_batch or training.batch_size, training.batch_size)
    own, all_ = forward.trainable, forward.parameters
    # A LoRA student shares its frozen weights with a teacher of the same precision; only the LoRA weights exist twice.
    teacher = 2 * all_ if engine.teacher_precision == "bf16" else 4 * own
    trained = own + sum(size.trainable for size in helpers.values())
    return Memory(
        weights=forward.weight_bytes,
        gradients=4 * trained,
        moments=(8 if engine.optimizer == "adamw" else 2) * trained,
        average=4 * own if training.ema_decay else 0,
        teacher=teacher if stage.objective.needs_teacher else 0,
        helpers=4 * sum(size.held for size in helpers.values()),
        activations=round(samples * forward.saved_bytes * _calls_kept(stage, forward, helpers)),
    )


def _calls_kept(stage: Stage, forward: Forward, helpers: Mapping[str, Size]) -> float:
    """Return the peak size of the activations saved in a turn, relative to one student call."""
    trained = [turn.trains for turn in stage.objective.turns(stage.training.num_updates - 1)]
    evals = stage.objective.evals
    return max(
        evals.get(name, Evals(1, 1)).backward / trained.count(name) * _relative_size(name, forward, helpers)
        for name in trained
    )


def _relative_size(name: str, forward: Forward, helpers: Mapping[str, Size]) -> float:
    """Return a network's parameter count relative to the student's, as an estimate of its relative cost."""
    return helpers[name].parameters / forward.parameters if name in helpers else 1


def update_flops(stage: Stage, forward: Forward, helpers: Mapping[str, Size]) -> float:
    """Return the FLOPs of an update.

    The cost of a helper call is scaled by the helper's parameter count relative to the student's.
    """
    each = sum(evals.cost * _relative_size(name, forward, helpers) for name, evals in stage.objective.evals.items())
    return each * stage.training.batch_size * forward.flops


@final
class Rate(NamedTuple):
    """The time of an update in the plan's first stage on this machine, measured or extrapolated."""

    seconds: float
    batch_size: int
    """The size of the largest batch that was timed.

    If the stage uses larger batches, the time is extrapolated from this batch and one of half its size.
    """


def time_updates(spec: RunSpec, forward: Forward) -> Rate:
    """Return how long an update in the plan's first stage takes, or an estimate if measuring it would take minutes."""
    stage = spec.plan.stages[0]
    batch_size = stage.training.batch_size
    per_sample = stage.update_cost / batch_size * max(1, forward.flops)
    trial = max(1, min(batch_size, int(FLOPS_OF_A_TRIAL / per_sample)))
    if trial == batch_size:
        return Rate(_seconds(spec, stage), trial)
    # An update has a fixed cost (optimiser, kernel launches) and a cost per sample. The cost per sample can only be
    # measured once doubling the batch makes the update markedly slower.
    small = _seconds(spec, _of_batch(stage, trial))
    most = min(spec.engine.set_micro_batch or batch_size, batch_size)
    while True:
        large = _seconds(spec, _of_batch(stage, 2 * trial))
        if large > 1.5 * small or large > SECONDS_OF_A_TRIAL or 4 * trial > most:
            break
        trial, small = 2 * trial, large
    each = max(large - small, 0.0) / trial
    return Rate(large + each * (batch_size - 2 * trial), 2 * trial)


def _of_batch(stage: Stage, batch_size: int) -> Stage:
    return replace(stage, training=replace(stage.training, batch_size=batch_size))


def _seconds(spec: RunSpec, stage: Stage, num_updates: int = 3) -> float:
    """Time a few updates after one warm-up update and return the duration of the fastest in seconds."""
    accelerator = make_accelerator(spec.engine.precision, spec.engine.cpu)
    # A single process is timed, so weights are not sharded.
    alone = replace(spec, engine=replace(spec.engine, sharding="none"))
    teacher = spec.teacher
    if teacher is not None and isinstance(teacher.network, LoRA):
        teacher = teacher.merged()
    trainer = trainer_for(alone, stage, "timing", teacher, accelerator)
    times = []
    start = time.perf_counter()
    for update in trainer.run():
        trainer.check_finite()
        now = time.perf_counter()
        times.append(now - start)
        start = now
        if update > num_updates or (update > 1 and sum(times) > 30):
            break
    return min(times[1:] or times)
