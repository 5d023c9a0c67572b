"""A network that can be written into a manifest and built again from it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from halfstep.core.callable import CallableNetwork
from halfstep.registry import Registry


class Network(nn.Module, ABC):
    """A module (x_t, time, **cond) -> output that knows the arguments it was built with."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that build this network again, as JSON-ready data."""


networks: Registry[type[Network]] = Registry("network")


OWN: Final = "own"
"""The type, in a manifest, of a user's own module, which only the user can build again."""


def describe_network(network: nn.Module) -> dict[str, Any]:
    """{"type": registered name, **arguments}: what a manifest holds; of a user's own network the name of its class or
    function alone."""
    if not isinstance(network, Network) or type(network) not in networks.values():
        named: Any = network.function if isinstance(network, CallableNetwork) else type(network)
        named = named if hasattr(named, "__qualname__") else type(named)
        return {"type": OWN, "class": f"{named.__module__}.{named.__qualname__}"}
    return {"type": networks.name_of(network), **network.arguments()}


def build_network(description: Mapping[str, Any]) -> Network:
    """The network that `describe_network` described, with fresh weights.

    Raises:
        ValueError: if the type is unknown, the arguments do not fit it, or the network is a user's own.
    """
    arguments = dict(description)
    if arguments.get("type") == OWN:
        raise ValueError(
            f"the model's network is of your own class {arguments.get('class')}, which its folder cannot build. Pass "
            "one: halfstep.load(path, network=MyNetwork())"
        )
    kind = networks[str(arguments.pop("type", "")) or "(none)"]
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"the arguments of this network do not fit {kind.__name__}: {error}") from None


def set_dropout(network: nn.Module, probability: float) -> None:
    """Sets every dropout layer's probability: dropout belongs to a stage, not to the weights that it hands on."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability
