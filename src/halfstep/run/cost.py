"""What a run will cost: arithmetic and memory of an update, counted and not run, and time, from a measured rate."""

import dataclasses
import time
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from halfstep.core.denoiser import GUIDANCE
from halfstep.models.folder import blank_denoiser
from halfstep.models.students import start_student
from halfstep.nets import checkpoint_gradients, takes_guidance, trainable
from halfstep.objectives import Stage
from halfstep.run.spec import RunSpec
from halfstep.run.start import trainer_for
from halfstep.runtime.processes import make_accelerator

FLOPS_OF_A_TRIAL = 1e11
"""Arithmetic of an update that is timed: seconds on a CPU, moments on a GPU."""

SECONDS_OF_A_TRIAL = 10.0
"""Time of an update beyond which no larger one is tried."""


@final
class Forward(NamedTuple):
    """One forward pass of the network on one sample, in float32."""

    parameters: int
    trainable: int
    """Parameters that training changes: all, or the additions of a LoRA student."""
    flops: int
    """Multiplications and additions."""
    saved_bytes: int
    """What autograd keeps for the backward pass, beside the parameters."""


def count_forward(spec: RunSpec) -> Forward:
    """Counts a forward pass on the meta device: nothing is computed and no memory taken.

    Raises:
        ValueError: if the spec has neither network nor teacher.
    """
    with torch.device("meta"):
        if spec.network is not None:
            network: torch.nn.Module = spec.network()
        elif spec.teacher is not None:
            denoiser = blank_denoiser(spec.teacher.manifest)
            if spec.matched is not None:
                denoiser = spec.matched(denoiser)
            network = start_student(denoiser, spec.lora_rank).network
        else:
            raise ValueError("the plan's first stage needs a network or a teacher, and there is neither")
        x_t, t = torch.empty(1, *spec.data.shape), torch.empty(1)
        cond = {"class_labels": torch.empty(1, dtype=torch.int64)} if spec.num_classes else {}
        if spec.teacher is not None:
            cond |= {name: torch.empty(1, *shape) for name, shape in spec.teacher.manifest.conditions.items()}
        if takes_guidance(network):
            cond[GUIDANCE] = torch.empty(1)
    if spec.gradient_checkpointing:
        checkpoint_gradients(network)
        network.train()
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            # Held until the end, so that no later storage takes its number.
            kept[storage] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        network(x_t, t, **cond)
    return Forward(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        trainable=sum(parameter.numel() for _, parameter in trainable(network)),
        flops=int(counter.get_total_flops()),
        saved_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    )


@final
class Memory(NamedTuple):
    """Bytes of an update of one stage on one device; bfloat16 autocast about halves the activations."""

    weights: int
    """The student's, in float32."""
    gradients: int
    moments: int
    """AdamW's two, in float32 or in 8 bits."""
    average: int
    """The moving average, if there is one."""
    teacher: int
    """Its weights, as far as the student does not share them."""
    activations: int
    """What the backward pass of one micro batch needs."""


def memory_of_update(
    stage: Stage,
    forward: Forward,
    micro_batch: int | None,
    optimizer: str = "adamw",
    teacher_precision: str = "float32",
) -> Memory:
    """Counted, not measured: an allocator and convolution workspaces come on top."""
    samples = min(micro_batch or stage.batch_size, stage.batch_size)
    own, all_ = forward.trainable, forward.parameters
    # A LoRA student shares the frozen weights with a teacher in its own precision, and only the additions are two.
    teacher = 2 * all_ if teacher_precision == "bf16" else 4 * own
    return Memory(
        weights=4 * all_,
        gradients=4 * own,
        moments=(8 if optimizer == "adamw" else 2) * own,
        average=4 * own if stage.ema_decay else 0,
        teacher=teacher if stage.objective.needs_teacher else 0,
        activations=samples * forward.saved_bytes,
    )


@final
class Rate(NamedTuple):
    """Seconds of an update of a plan's first stage on this machine."""

    seconds: float
    batch_size: int
    """The largest batch that was timed; the time of a larger one is extrapolated from it and one of half the size."""


def time_updates(spec: RunSpec, forward: Forward) -> Rate:
    """The seconds of an update of the plan's first stage: timed, or extrapolated where that would take minutes."""
    stage = spec.plan.stages[0]
    per_sample = stage.update_cost / stage.batch_size * max(1, forward.flops)
    trial = max(1, min(stage.batch_size, int(FLOPS_OF_A_TRIAL / per_sample)))
    if trial == stage.batch_size:
        return Rate(_seconds(spec, stage), trial)
    # An update costs something of its own (the optimiser, the launch of kernels) and something for each sample. The
    # second shows only once a doubled batch takes markedly longer.
    small = _seconds(spec, dataclasses.replace(stage, batch_size=trial))
    most = min(spec.set_micro_batch or stage.batch_size, stage.batch_size)
    while True:
        large = _seconds(spec, dataclasses.replace(stage, batch_size=2 * trial))
        if large > 1.5 * small or large > SECONDS_OF_A_TRIAL or 4 * trial > most:
            break
        trial, small = 2 * trial, large
    each = max(large - small, 0.0) / trial
    return Rate(large + each * (stage.batch_size - 2 * trial), 2 * trial)


def _seconds(spec: RunSpec, stage: Stage, num_updates: int = 3) -> float:
    """The fastest of a few updates, after one to warm up."""
    accelerator = make_accelerator(spec.precision, spec.cpu)
    # One process is timed, which holds all weights.
    trainer = trainer_for(dataclasses.replace(spec, sharding="none"), stage, "timing", spec.teacher, accelerator)
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
