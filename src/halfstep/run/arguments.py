"""Checks the arguments of `fit` and `distill`."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from halfstep.core.denoiser import Clipped, Denoiser, Guided, NetworkDenoiser
from halfstep.core.door import check_denoiser, check_instance, check_whole, got
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction
from halfstep.data import Data
from halfstep.models.model import Model
from halfstep.objectives import Guidance, Plan, Training
from halfstep.run.probe import without
from halfstep.run.sources import CLASSES, StreamedBatches, conditions_of
from halfstep.samplers import Sampler

A_TRAINING: Final = (Training, "halfstep.Training(num_updates=2000, learning_rate=2e-4)")
KINDS: Final[Mapping[str, tuple[type, str]]] = {
    "training": A_TRAINING,
    "matching": A_TRAINING,
    "plan": (Plan, "halfstep.Plan.halvings(64, 4)"),
    "prediction": (Prediction, "halfstep.V()"),
    "process": (NoiseProcess, "halfstep.VPCosine()"),
    "guidance": (Guidance, "halfstep.FixedGuidance(4.0)"),
    "teacher_sampler": (Sampler, "halfstep.Heun()"),
}
"""The types of the `distill` arguments that are objects, each with an example for error messages."""


def check_bare(name: str, denoiser: Any) -> None:
    """Raise ValueError unless training targets can be computed with the denoiser."""
    check_denoiser(name, denoiser, Denoiser)
    for part in denoiser.modules():
        if isinstance(part, Clipped):
            what, remedy = "clips x0", "samples can be clipped later"
        elif isinstance(part, Guided):
            what, remedy = "is guided", "for guidance, pass guidance=halfstep.FixedGuidance(scale) and null to distill"
        elif isinstance(part, Model):
            what, remedy = "may clip x0 and apply guidance", "samples can be clipped later"
        else:
            continue
        holds = "" if part is denoiser else f"contains a {type(part).__name__}, which "
        whose = "its" if part is denoiser else f"the {type(part).__name__}'s"
        raise ValueError(f"{name} {holds}{what}, but training needs the plain output. Pass {whose} .denoiser; {remedy}")


def check_trainable(denoiser: Denoiser, *, as_it_is: bool = False) -> None:
    """Raise ValueError unless a copy of the denoiser (or the denoiser itself, if `as_it_is`) can be trained."""
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
    name = type(network).__name__
    if isinstance(network, nn.DataParallel | DistributedDataParallel):
        raise ValueError(f"the network is wrapped in {name}. Pass its .module; use torchrun for several processes")
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError("the network is a ScriptModule, which cannot be copied. Pass the original module")
    # Importing torch._dynamo takes seconds, and compiling a network has already imported it.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is not None and isinstance(network, dynamo.OptimizedModule):
        raise ValueError(
            "the network is compiled. Pass the module that was compiled, and engine=halfstep.Engine(compile=True)"
        )
    if any(isinstance(parameter, UninitializedParameter) for parameter in network.parameters()):
        raise ValueError(f"the network {name} has lazy layers without weights. Call it once first")
    if not any(True for _ in network.parameters()):
        raise ValueError(
            f"{type(denoiser).__name__} has no weights to train: its network contains no module. Make the "
            "network an nn.Module that contains its layers"
        )
    if as_it_is and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("all weights of the network are frozen. Call network.requires_grad_(True)")


def storable_denoiser(denoiser: Denoiser) -> NetworkDenoiser:
    """Return the denoiser; raise ValueError if a run folder cannot store it."""
    if not isinstance(denoiser, NetworkDenoiser):
        raise ValueError(
            f"a run folder can only store networks, and {type(denoiser).__name__} is a custom denoiser. Pass a "
            "NetworkDenoiser, or remove `out`"
        )
    return denoiser


def check_plan_arguments(
    to: Any, start: Any, finish: Any, teacher_steps: Any, lora_rank: Any, null: Any, **objects: Any
) -> None:
    """Raise ValueError if an argument of `distill` has the wrong type. `objects` are the arguments in `KINDS`."""
    check_whole("to", to)
    check_whole("start", to if start is None else start)
    if isinstance(finish, str) or not isinstance(finish, Plan | Sequence):
        raise ValueError(f"finish must be a list of step counts, got {finish!r}. Pass, for example, finish=[2, 1]")
    for name, value in objects.items():
        if value is not None or name == "training":
            check_instance(name, value, *KINDS[name])
    if lora_rank is not None:
        check_whole("lora_rank", lora_rank, most=2**16)
    if teacher_steps is not None:
        check_whole("teacher_steps", teacher_steps)
    if null is not None and not isinstance(null, Mapping):
        raise ValueError(
            f"null must be a mapping of names to tensors, got {got(null)}. Pass {{'class_labels': torch.tensor(10)}}"
        )


def check_data(model: Model, data: Data | StreamedBatches) -> None:
    """Raise ValueError unless the data has the shape of the model's samples and exactly the model's conditions."""
    if data.shape != model.shape:
        raise ValueError(
            f"the teacher has samples of shape {list(model.shape)}, but the data has shape {list(data.shape)}. "
            "Pass the data that it was trained on"
        )
    classes = data.num_classes if isinstance(data, Data) else 0
    shapes = conditions_of(data)
    held = set(shapes) | ({CLASSES} if classes else set())
    needed = set(model.manifest.conditions) | ({CLASSES} if model.num_classes else set())
    if foreign := sorted(held - needed):
        raise ValueError(f"the data contains {foreign[0]}, which the teacher does not take. {without(data)}")
    if missing := sorted(needed - held):
        raise ValueError(
            f"the teacher is conditioned on {missing[0]}, which the data does not contain. Pass "
            f"(x0, {{{missing[0]!r}: tensor}})"
        )
    for name, shape in model.manifest.conditions.items():
        if shapes.get(name, shape) != shape:
            raise ValueError(
                f"the teacher takes {name} of shape {list(shape)} per sample, but the data contains {name} of shape "
                f"{list(shapes[name])}. Pass the data that it was trained on"
            )
    if model.num_classes and classes > model.num_classes:
        raise ValueError(
            f"the data has the classes 0 to {classes - 1}, but the teacher has the classes 0 to "
            f"{model.num_classes - 1}. Pass the data that it was trained on"
        )
