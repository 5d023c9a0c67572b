"""LoRA: low-rank updates to a network's frozen weights. Training them needs less memory than training a full student.

A layer's weight W becomes W + B A, where A has `rank` rows, B has `rank` columns and B starts at 0. All models of a
chain share W and differ only in A and B.

Source: Hu et al. 2022, LoRA (arXiv:2106.09685). The package peft implements the layers.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.door import check_denoiser
from halfstep.nets.base import Network, build_network, describe_network, networks
from halfstep.nets.lowered import (
    BasePrecision,
    load_packed,
    packed_state,
    quantised,
    same_layer,
    shared_layers,
    weight_bytes,
)
from halfstep.nets.replay import Replay
from halfstep.nets.stock import StockNetwork

TARGETS: Final = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
"""Name suffixes of the transformer and attention layers that receive LoRA weights."""


@final
@networks.register("lora")
class LoRA(Network):
    """A diffusers network with LoRA weights. Only the LoRA weights are trained and saved.

    Args:
        base: the frozen network, which is modified in place, or its description.
        rank: the rank of each low-rank update.
        targets: the name suffixes of the layers that receive LoRA weights.

    Raises:
        ValueError: if peft is not installed, the network is not from diffusers, the rank is less than 1, or no layer
            name has one of the suffixes.
    """

    def __init__(self, base: Network | Mapping[str, Any], rank: int = 16, targets: Sequence[str] = TARGETS) -> None:
        super().__init__()
        base = base if isinstance(base, Network) else build_network(base)
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ValueError("LoRA needs the package peft: pip install 'halfstep[lora]'") from None
        if not isinstance(base, StockNetwork):
            raise ValueError(
                f"LoRA needs a diffusers network, got the class {type(base).__name__}. Train it without LoRA "
                "(remove --chain.lora-rank)"
            )
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self.rank, self.targets = rank, tuple(targets)
        self.description = describe_network(base)
        self.base = base.requires_grad_(False)
        self.restores_norm = bool(getattr(base, "restores_norm", False))
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), base.model)
        except ValueError:
            names = ", ".join(targets)
            raise ValueError(f"no layer of {base.stock} has a name ending in {names}. Choose other targets") from None
        for _, parameter in self.own():
            # peft creates LoRA weights in their layer's dtype, but they are trained in float32.
            parameter.data = parameter.data.float()

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"base": self.description}

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.base(x_t, time, **cond)

    def own(self) -> list[tuple[str, nn.Parameter]]:
        """Return the LoRA weights with their names."""
        return [(name, p) for name, p in self.named_parameters() if ".lora_" in name]

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Load the base network's weights from its state dict.

        Raises:
            RuntimeError: if names or shapes do not match.
        """
        mine = {_plain(name): name for name in packed_state(self)}
        load_packed(self, {mine.get(name, name): value for name, value in state.items()})


def _plain(name: str) -> str:
    """Return the name that a LoRA's tensor had in the base network before peft moved the tensor into `base_layer`."""
    return name.replace(".base_layer.", ".").removeprefix("base.")


def with_lora(network: Network, rank: int, targets: Sequence[str] = TARGETS) -> LoRA:
    """Return a copy of a network that shares its weights and adds LoRA weights, whose update starts at 0."""
    twin = copy.deepcopy(network, {id(p): p for p in network.parameters()} | shared_layers(network))
    with torch.random.fork_rng(devices=[]):
        # With a fixed seed, the initial A matrices depend only on the layers' shapes and the rank.
        torch.manual_seed(0)
        return LoRA(twin, rank, targets)


def share_base(network: nn.Module, lora: LoRA) -> None:
    """Save memory by making `network` share all weights that equal those of a LoRA's base network."""
    own = {name for name, _ in lora.own()}
    base = {_plain(name): value for name, value in lora.named_parameters() if name not in own}
    layers = {_plain(f"{path}."): module for path, module in lora.named_modules() if quantised(module)}
    for path, module in list(network.named_modules()):
        if quantised(module):
            if same_layer(module, layers[_plain(f"{path}.")]):
                network.set_submodule(path, layers[_plain(f"{path}.")])
            continue
        for name, value in module.named_parameters(recurse=False):
            same = base.get(_plain(f"{path}.{name}" if path else name))
            if same is not None and same.shape == value.shape and torch.equal(same, value):
                setattr(module, name, same)


def base_of(network: nn.Module) -> nn.Module:
    """Return the base network of a `LoRA`, or any other network unchanged."""
    return network.base if isinstance(network, LoRA) else network


def trainable(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters with their names: the LoRA weights of a `LoRA`, else all floating-point
    parameters."""
    if isinstance(network, LoRA):
        return network.own()
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.is_floating_point()]


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to save: the LoRA weights of a `LoRA`, or the state dict of any other network."""
    if isinstance(network, LoRA):
        return {name: value.detach() for name, value in network.own()}
    return packed_state(network) if precision_of(network) != "float32" else network.state_dict()


def load_own_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors that `own_state` returned.

    Raises:
        RuntimeError: if names or shapes do not match.
    """
    if isinstance(network, LoRA):
        if odd := {name for name, _ in network.own()} ^ set(state):
            raise RuntimeError(f"the LoRA weights do not match the network: {min(odd)}")
        network.load_state_dict(state, strict=False)
    elif precision_of(network) == "float32":
        network.load_state_dict(state)
    else:
        load_packed(network, state)


def bare(network: LoRA) -> LoRA:
    """Return a copy that shares the frozen weights and whose low-rank updates are 0."""
    twin = copy_network(network)
    assert isinstance(twin, LoRA)
    with torch.no_grad():
        for name, parameter in twin.own():
            if ".lora_B." in name:
                parameter.zero_()
    return twin


def merged(network: nn.Module) -> nn.Module:
    """Return a network in float32 with its LoRA weights merged, or the network itself if no change is needed."""
    is_lowered = precision_of(network) != "float32"
    if not isinstance(network, LoRA) and not is_lowered:
        return network
    twin: Any = copy.deepcopy(base_of(network))
    if is_lowered:
        twin.restore()
    for name, layer in list(twin.named_modules()):
        if hasattr(layer, "lora_A"):
            layer.merge()
            twin.set_submodule(name, layer.get_base_layer())
    whole: nn.Module = twin
    return whole


def precision_of(network: nn.Module) -> BasePrecision:
    """Return the precision of a network's frozen weights, or float32 if no weights are frozen."""
    stock = base_of(network)
    return stock.precision if isinstance(stock, Replay) else "float32"


def weight_bytes_of(network: nn.Module) -> int:
    """Return the size of a network's weights in bytes, computed from their shapes."""
    stock = base_of(network)
    return weight_bytes(stock.model if isinstance(stock, StockNetwork) else stock, precision_of(network))


def checkpoint_gradients(network: nn.Module) -> None:
    """Make a diffusers network recompute its activations in the backward pass.

    Raises:
        ValueError: if the network does not support gradient checkpointing.
    """
    stock = base_of(network)
    if not isinstance(stock, StockNetwork) or not getattr(stock.model, "_supports_gradient_checkpointing", False):
        name = type(stock).__name__
        raise ValueError(f"{name} does not support gradient checkpointing. Remove --engine.gradient-checkpointing")
    stock.model.enable_gradient_checkpointing()


def checkpoints_gradients(network: nn.Module) -> bool:
    """Return whether the network recomputes its activations (see `checkpoint_gradients`)."""
    stock = base_of(network)
    return isinstance(stock, StockNetwork) and bool(stock.model.is_gradient_checkpointing)


def copy_network(network: nn.Module) -> nn.Module:
    """Return a copy of a network with its own trainable weights. A copy of a `LoRA` shares the frozen weights."""
    shared = shared_layers(network)
    if isinstance(network, LoRA):
        own = {id(parameter) for _, parameter in network.own()}
        shared |= {id(parameter): parameter for parameter in network.parameters() if id(parameter) not in own}
    return _thawed(copy.deepcopy(network, shared))


def _thawed(network: nn.Module) -> nn.Module:
    """Make the weights of a network require gradients, in place: the LoRA weights of a `LoRA`, else all weights."""
    weights = [p for _, p in network.own()] if isinstance(network, LoRA) else list(network.parameters())
    for parameter in weights:
        # Integers cannot require gradients.
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    return network


def copy_denoiser(denoiser: Denoiser) -> Denoiser:
    """Return a copy of a denoiser with its own trainable weights, as the starting point of a student or helper."""
    check_denoiser("the model to copy", denoiser, Denoiser)
    if isinstance(denoiser, NetworkDenoiser):
        return NetworkDenoiser(copy_network(denoiser.network), denoiser.process, denoiser.prediction)
    twin = copy.deepcopy(denoiser)
    _thawed(twin)
    return twin
