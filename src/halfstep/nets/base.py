"""Networks that can be described in a manifest and rebuilt from it."""

import inspect
from abc import ABC
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from halfstep.core.callable import CallableNetwork
from halfstep.core.noise import NoiseProcess, as_clock, per_sample, processes
from halfstep.registry import Registry


class Network(nn.Module, ABC):
    """A module (x_t, time, **cond) -> output that stores its constructor arguments as attributes of the same names."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments that rebuild this network, as JSON-serialisable values."""
        held = {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in held.items()}


networks: Registry[type[Network]] = Registry("network")

OWN: Final = "own"
"""The type that a manifest records for a user-defined module, which only the user can rebuild."""


@final
class OnProcess(nn.Module):
    """A custom network on a noise process other than its own.

    The network is called at the time of its own process that has the same log-SNR. Its input is scaled to the
    amplitudes of its own process, as in `Reprocessed`.
    """

    def __init__(self, network: Callable[..., Tensor], own: NoiseProcess, process: NoiseProcess) -> None:
        super().__init__()
        self.network: Any = network
        self.own = own
        self.process = process

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        t = as_clock(time, x_t)
        there = self.own.time_at(self.process.log_snr(t)).clamp(0, 1)
        scale = torch.hypot(*self.own.alpha_sigma(there)) / torch.hypot(*self.process.alpha_sigma(t))
        output: Tensor = self.network(per_sample(scale, x_t) * x_t, there.to(time), **cond)
        return output


def describe_network(network: nn.Module) -> dict[str, Any]:
    """Return {"type": registered name, **arguments}, or only the class or function name of a user-defined network.

    The description of a user-defined network in `OnProcess` wrappers also contains their `own` processes, from the
    innermost to the outermost.
    """
    if isinstance(network, OnProcess):
        inner = describe_network(network.network)
        return inner | {"processes": [*inner.get("processes", ()), processes.describe(network.own)]}
    if not isinstance(network, Network) or type(network) not in networks.values():
        named: Any = network.function if isinstance(network, CallableNetwork) else type(network)
        named = named if hasattr(named, "__qualname__") else type(named)
        return {"type": OWN, "class": f"{named.__module__}.{named.__qualname__}"}
    return {"type": networks.name_of(network), **network.arguments()}


def build_network(description: Mapping[str, Any]) -> Network:
    """Build a network with fresh weights from the result of `describe_network`.

    Raises:
        ValueError: if the type is unknown, the arguments do not match the type, or the network is user-defined.
    """
    arguments = dict(description)
    if arguments.get("type") == OWN:
        raise ValueError(
            f"the network is an instance of your own class {arguments.get('class')}. Pass an instance: "
            "halfstep.load(path, network=MyNetwork())"
        )
    kind = networks[str(arguments.pop("type", "")) or "(none)"]
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"the arguments of this network do not match {kind.__name__}: {error}") from None


def rebuild_own(description: Mapping[str, Any], network: nn.Module, process: NoiseProcess) -> nn.Module:
    """Return a user-defined network, with or without its `OnProcess` wrappers, as the network that was described.

    Args:
        description: the result of `describe_network`.
        process: the noise process on which the described network is called.
    """
    while isinstance(network, OnProcess):
        network = network.network
    own = [processes.rebuild(described) for described in description.get("processes", ())]
    for inner, outer in pairwise([*own, process]):
        network = OnProcess(network, inner, outer)
    return network


_DROPOUT: Final = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def set_dropout(network: nn.Module, probability: float) -> None:
    """Set the dropout probability of all layers.

    The probability depends on the stage and is not stored with the weights.
    """
    for module in network.modules():
        if isinstance(module, _DROPOUT):
            module.p = probability
        elif isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            # These layers apply dropout themselves, without a dropout layer.
            module.dropout = probability


def moved(fn: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """Return `fn(value)`, or `value` on the device of the result if `fn` changes the dtype.

    Modules use this function in `_apply` for constants that must keep their precision.
    """
    result = fn(value)
    return result if result.dtype == value.dtype else value.to(result.device)
