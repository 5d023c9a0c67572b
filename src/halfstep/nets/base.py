"""A network that can be written into a manifest and built again from it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import nn

from halfstep.registry import Registry


class Network(nn.Module, ABC):
    """A module (x_t, time, **cond) -> output that knows the arguments it was built with."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that build this network again, as JSON-ready data."""


networks: Registry[type[Network]] = Registry("network")


def describe_network(network: Network) -> dict[str, Any]:
    """{"type": registered name, **arguments}: what a manifest holds."""
    return {"type": networks.name_of(network), **network.arguments()}


def build_network(description: Mapping[str, Any]) -> Network:
    """The network that `describe_network` described, with fresh weights.

    Raises:
        ValueError: if the type is unknown or the arguments do not fit it.
    """
    arguments = dict(description)
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
