"""Networks built from a teacher's network: the same weights with a different clock or an additional input.

A new guidance input has no effect at first, and `on_integers` preserves the outputs. A network from `on_clock` starts
as close to the old network as its weights allow. The matching stage removes the remaining difference.
"""

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from halfstep.nets.base import Network, build_network, describe_network
from halfstep.nets.lora import base_of
from halfstep.nets.lowered import unwrapped
from halfstep.nets.mlp import MLP
from halfstep.nets.replay import Replay, takes_scale
from halfstep.nets.stock import StockNetwork

GUIDANCE_WIDTH: Final = 256
"""The width of the guidance embedding, as in latent consistency models (arXiv:2310.04378)."""
SMALLEST_DIRECTION: Final = 1e-2
"""The smallest singular value that is fitted, relative to the largest. The slow sinusoids are nearly equal, so an exact
fit would need weights of about 1e6 with opposite signs, whose sums have an error of about 0.1 in float32. Such a fit
would reduce the fitting error by less than a tenth."""
TABLE_SIZE: Final = 1024
"""The number of timesteps that `on_integers` uses: a power of two, as for new networks."""


def takes_guidance(network: nn.Module) -> bool:
    """Return whether the network has an input for a guidance scale."""
    network = base_of(unwrapped(network))
    if isinstance(network, MLP):
        return network.guided
    return isinstance(network, Replay) and takes_scale(network.call)


def with_guidance(network: nn.Module) -> Network:
    """Return a network that also takes `guidance_scale`, which has no effect before training.

    Raises:
        ValueError: if networks of this class do not support this input.
    """
    if isinstance(network, MLP):
        changes: dict[str, Any] = {"guided": True}
    elif isinstance(network, Replay) and "timestep_cond" in network.call["items"]:
        shown = {"is": "embedding", "width": GUIDANCE_WIDTH, "default": 1.0}
        changes = {
            "config": network.config | {"time_cond_proj_dim": GUIDANCE_WIDTH},
            "call": network.call | {"items": network.call["items"] | {"timestep_cond": shown}},
        }
    else:
        raise ValueError(
            f"a range of guidance scales needs an input for the scale, but {_name(network)} has no such input. Distil "
            "with a single guidance scale instead of a range"
        )
    grown = build_network(describe_network(network) | changes)
    new = {name: torch.zeros_like(value) for name, value in grown.state_dict().items()}
    grown.load_state_dict(new | network.state_dict())
    return grown.to(next(network.parameters()))


def has_movable_clock(network: nn.Module) -> bool:
    """Return whether `on_clock` supports the network, that is, whether the network embeds a table's timesteps."""
    if isinstance(network, Replay) and network.clock["of"] != "u":
        return False
    return isinstance(network, StockNetwork) and hasattr(network.model, "time_embedding")


def on_clock(network: nn.Module, times: Callable[[Tensor], Tensor], num_train_timesteps: int) -> Network:
    """Return a network in which timestep k of T corresponds to the old network's time `times((k + 1) / T)`.

    The first linear layer of the time embedding is fitted by least squares to match, at each new timestep, the old
    layer's output at the corresponding old timestep. Directions in which the sinusoids hardly vary are ignored (see
    `SMALLEST_DIRECTION`), which keeps the weights as small as in a trained layer.

    Raises:
        ValueError: if the network does not embed a table's timesteps.
    """
    if not isinstance(network, StockNetwork) or not has_movable_clock(network):
        raise ValueError(f"{_name(network)} has no table of timesteps to replace. Keep the network's own process")
    moved = build_network(describe_network(network) | network.on_table(num_train_timesteps))
    moved.load_state_dict(network.state_dict())
    assert isinstance(moved, StockNetwork)
    if next(moved.parameters()).is_meta:
        return moved
    project, layer = moved.model.time_proj, moved.model.time_embedding.linear_1
    grid = torch.arange(1, num_train_timesteps + 1, dtype=torch.float64) / num_train_timesteps
    with torch.no_grad():
        features = project(moved.timestep(grid).float()).double()
        wanted = project(network.timestep(times(grid)).float()).double() @ layer.weight.double().T
        design = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
        found = torch.linalg.lstsq(design, wanted, rcond=SMALLEST_DIRECTION, driver="gelsd").solution
        layer.weight.copy_(found[:-1].T)
        layer.bias.add_(found[-1])
    return moved.to(next(network.parameters()))


def has_fourier_clock(network: nn.Module) -> bool:
    """Return whether `on_integers` supports the network.

    The network's time must be linear in t, and its cosines and sines must be passed to a linear layer, as in Stable
    Audio.
    """
    if not isinstance(network, Replay) or network.clock["of"] != "u":
        return False
    project, layers = (getattr(network.model, name, None) for name in ("time_proj", "timestep_proj"))
    form = [getattr(project, name, None) for name in ("flip_sin_to_cos", "log")]
    return isinstance(layers, nn.Sequential) and form == [True, False]


def on_integers(network: Replay) -> Replay:
    """Return a network with the same outputs, in which the time t corresponds to the timestep `TABLE_SIZE` t - 1.

    The old time is slope * timestep + start, and its cosines and sines have the phases 2 pi frequency time. The slope
    is multiplied into the frequencies. The start rotates each (cosine, sine) pair by an angle that does not depend on
    the time, so this rotation is multiplied into the next linear layer.

    Raises:
        ValueError: if `has_fourier_clock` is false for the network.
    """
    if not has_fourier_clock(network):
        raise ValueError(f"{_name(network)} has no Fourier time embedding. Keep the network's own clock")
    moved = build_network(describe_network(network) | network.on_table(TABLE_SIZE))
    assert isinstance(moved, Replay)
    moved.load_state_dict(network.state_dict())
    slope = network.clock["scale"] / TABLE_SIZE
    frequencies, layer = moved.model.time_proj.weight, moved.model.timestep_proj[0]
    with torch.no_grad():
        phases = 2 * math.pi * frequencies.double() * (slope + network.clock["offset"])
        cosines, sines = layer.weight.double().chunk(2, dim=1)
        turned = (cosines * phases.cos() + sines * phases.sin(), sines * phases.cos() - cosines * phases.sin())
        layer.weight.copy_(torch.cat(turned, dim=1))
        frequencies.mul_(slope)
    return moved.to(next(network.parameters()))


def _name(network: nn.Module) -> str:
    return str(getattr(network, "stock", type(network).__name__))
