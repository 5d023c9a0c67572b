"""Checks a denoiser with a single call on its data, before training starts."""

import inspect
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from halfstep.core.callable import CallableNetwork
from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import failed_call, form_of
from halfstep.core.draw import generator_for
from halfstep.data import Data
from halfstep.nets import LoRA, StockNetwork
from halfstep.objectives import Batch
from halfstep.run.sources import CLASSES, StreamedBatches
from halfstep.runtime.failures import is_out_of_memory

MOST_WEIGHTS: Final = 10**8
"""A diffusers network with more weights than this is not called, because it may still be on a CPU."""


def _two_of(data: Data | StreamedBatches) -> Batch:
    """Return two samples of the data.

    If the labels are in memory, one sample has the lowest class and the other has the highest class. Otherwise, the
    first and the last sample are returned.
    """
    if isinstance(data, StreamedBatches):
        x0, cond = data.first
        rows = _extremes(cond.get(CLASSES), len(x0))
        return Batch(x0[rows], {name: value[rows] for name, value in cond.items()})
    return data.fetch(_extremes(getattr(data, "labels", None), len(data)))


def _extremes(labels: Any, length: int) -> Tensor:
    if isinstance(labels, Tensor) and labels.ndim == 1 and len(labels) == length:
        return torch.stack([labels.argmin(), labels.argmax()]).cpu()
    return torch.tensor([0, length - 1])


def _parameters_of(network: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters that a network's call takes after x_t and the time, or None if they are unknown."""
    called = network.function if isinstance(network, CallableNetwork) else network
    try:
        found = inspect.signature(called.forward if isinstance(called, nn.Module) else called).parameters
    except (TypeError, ValueError):
        return None
    return dict(list(found.items())[2:])


def _check_names(network: nn.Module, data: Data | StreamedBatches, held: list[str]) -> None:
    """Raise ValueError unless the network takes the conditions in `held` and requires no other conditions."""
    parameters = _parameters_of(network)
    if parameters is None or isinstance(network, StockNetwork | LoRA):
        return
    by_name = {p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    missing = [name for name, p in parameters.items() if name in by_name and p.default is p.empty and name not in held]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    foreign = [] if takes_any else [name for name in held if name not in by_name]
    if missing and foreign:
        raise ValueError(
            f"the network takes the condition {missing[0]}, but the data contains {foreign[0]}. Use one name: "
            f"(x0, {{{missing[0]!r}: tensor}})"
        )
    if missing:
        raise ValueError(
            f"the network needs the condition {missing[0]}, which the data does not contain. Pass "
            f"(x0, {{{missing[0]!r}: tensor}})"
        )
    if foreign:
        raise ValueError(
            f"the data contains {foreign[0]}, which the network does not take. {without(data)}, or add the argument "
            f"{foreign[0]} to the network's forward"
        )


def without(data: Data | StreamedBatches) -> str:
    """Return advice on how to pass the data without labels or other conditions."""
    if isinstance(data, Data) and data.source != "memory":
        return f"Pass halfstep.open_data(halfstep.DataConfig(source={data.source!r}, labels=False))"
    return "Pass x0 alone"


def check_called(denoiser: Denoiser, data: Data | StreamedBatches, null: Cond | None = None) -> None:
    """Call the denoiser once on two samples of the data, in evaluation mode.

    Diffusers networks with more than `MOST_WEIGHTS` weights are not called.

    Args:
        null: the null conditions of one sample, which are used instead of the conditions of the data.

    Raises:
        ValueError: if the denoiser fails, does not take the data's conditions or requires others, or if its estimates
            are not finite, have the wrong shape or have no gradient with respect to its weights.
    """
    network = denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser
    what = "network" if isinstance(denoiser, NetworkDenoiser) else "denoiser"
    x0, cond = _two_of(data)
    if foreign := sorted(set(null or {}) - set(cond)):
        raise ValueError(f"null contains {foreign[0]}, but the data does not. Use only conditions from {sorted(cond)}")
    cond = {name: (null or {}).get(name, value).to(value).expand_as(value) for name, value in cond.items()}
    if isinstance(denoiser, NetworkDenoiser):
        _check_names(network, data, list(cond))
    weight = next(denoiser.parameters())
    is_large = sum(parameter.numel() for parameter in denoiser.parameters()) > MOST_WEIGHTS
    if isinstance(network, StockNetwork | LoRA) and is_large:
        return
    if weight.is_meta:
        raise ValueError(f"the {what}'s weights are on the device meta, which stores no values. Load them first")
    x0, cond = x0.to(weight.device), {name: value.to(weight.device) for name, value in cond.items()}
    t = torch.full((len(x0),), 0.5, dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=generator_for("probe")).to(x0)
    modes = {part: part.training for part in denoiser.modules()}
    denoiser.eval()
    x_t = denoiser.process.mix(x0, noise, t)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            estimate = denoiser(x_t, t, cond).x0
    except Exception as error:
        if is_out_of_memory(error):
            raise
        remedy = f"It must return {form_of(x0)} for such inputs"
        if weight.dtype != x0.dtype:
            remedy = f"Its weights are {weight.dtype}: convert them with .float()"
        raise failed_call(f"the {what}, called on two samples of the data,", x_t, cond, error, remedy) from error
    finally:
        for part, was_training in modes.items():
            part.training = was_training
    if not torch.equal(x_t, denoiser.process.mix(x0, noise, t)):
        raise ValueError(f"the {what} changes its input x_t in place, but x_t is used again. Copy it: x_t.clone()")
    if estimate.shape != x0.shape:
        raise ValueError(
            f"the {what} returned x0 {form_of(estimate)} for x_t {form_of(x_t)}. Return x0 with that shape"
        )
    if not estimate.isfinite().all():
        raise ValueError(f"the {what} returned values that are not finite for x_t {form_of(x_t)}. Check its weights")
    if not estimate.requires_grad and any(parameter.requires_grad for parameter in denoiser.parameters()):
        raise ValueError(
            f"the {what}'s output has no gradient with respect to its weights. Remove torch.no_grad() and "
            "detach() from it"
        )
