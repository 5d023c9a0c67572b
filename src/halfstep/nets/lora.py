"""LoRA: low-rank additions to the frozen weights of a network, for machines without enough memory for a full student.

A layer with weight W becomes W + B A, where A has `rank` rows, B has `rank` columns and B starts at 0. Teacher and
student of a chain share W, so copies of a network with LoRA differ only in A and B.

Source: Hu et al. 2022, LoRA (arXiv:2106.09685). The layers are those of peft.
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
"""Suffixes of the names of the layers that get additions, in transformers and attention blocks."""


@final
@networks.register("lora")
class LoRA(Network):
    """A diffusers network with low-rank additions, which alone are trained and saved.

    Args:
        base: the network to add to, or its description. Its layers are replaced.
        rank: rank of each addition.
        targets: suffixes of the names of the layers.

    Raises:
        ValueError: if peft is not installed, the network is not from diffusers, or no layer name has these suffixes.
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
                f"low-rank additions need a diffusers network, got the class {type(base).__name__}. Train it without "
                "them (remove --chain.lora-rank)"
            )
        if rank < 1:
            raise ValueError(f"the rank must be at least 1, got {rank}")
        self.rank, self.targets = rank, tuple(targets)
        self.description = describe_network(base)
        self.base = base.requires_grad_(False)
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets)), base.model)
        except ValueError:
            names = ", ".join(targets)
            raise ValueError(f"no layer name of {base.stock} ends in {names}. Choose other targets") from None
        for _, parameter in self.own():
            # peft creates them in the dtype of their layer.
            parameter.data = parameter.data.float()

    def arguments(self) -> dict[str, Any]:
        return {"base": self.description, "rank": self.rank, "targets": list(self.targets)}

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.base(x_t, time, **cond)

    @property
    def restores_norm(self) -> bool:
        """Whether guidance restores the norm of the output, as for the base."""
        return bool(getattr(self.base, "restores_norm", False))

    def own(self) -> list[tuple[str, nn.Parameter]]:
        """Return the low-rank additions by name."""
        return [(name, p) for name, p in self.named_parameters() if ".lora_" in name]

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Load the weights of the base from the base's own state.

        Raises:
            RuntimeError: if names or shapes do not match.
        """
        # peft moves each layer with an addition into `base_layer`.
        mine = {name.replace(".base_layer.", "."): name for name in packed_state(self)}
        load_packed(self, {mine.get(f"base.{name}", f"base.{name}"): value for name, value in state.items()})


def with_lora(network: Network, rank: int, targets: Sequence[str] = TARGETS) -> LoRA:
    """Return the network with low-rank additions that are still 0, sharing its weights."""
    twin = copy.deepcopy(network, {id(p): p for p in network.parameters()} | shared_layers(network))
    with torch.random.fork_rng(devices=[]):
        # The random values of A depend only on its shapes.
        torch.manual_seed(0)
        return LoRA(twin, rank, targets)


def share_base(network: nn.Module, lora: LoRA) -> None:
    """Make `network` share all weights that equal those of a LoRA's base, so that they are in memory only once."""

    def plain(name: str) -> str:
        return name.replace(".base_layer.", ".").removeprefix("base.")

    own = {name for name, _ in lora.own()}
    base = {plain(name): value for name, value in lora.named_parameters() if name not in own}
    layers = {plain(f"{path}."): module for path, module in lora.named_modules() if quantised(module)}
    for path, module in list(network.named_modules()):
        if quantised(module):
            if same_layer(module, layers[plain(f"{path}.")]):
                network.set_submodule(path, layers[plain(f"{path}.")])
            continue
        for name, value in module.named_parameters(recurse=False):
            same = base.get(plain(f"{path}.{name}" if path else name))
            if same is not None and same.shape == value.shape and torch.equal(same, value):
                setattr(module, name, same)


def base_of(network: nn.Module) -> nn.Module:
    """Return the network that a `LoRA` adds to; any other itself."""
    return network.base if isinstance(network, LoRA) else network


def trainable(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters by name: all of them, or the additions of a `LoRA`."""
    return network.own() if isinstance(network, LoRA) else list(network.named_parameters())


def own_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the tensors to save: a network's state, or the additions of a `LoRA`."""
    if isinstance(network, LoRA):
        return {name: value.detach() for name, value in network.own()}
    return packed_state(network) if precision_of(network) != "float32" else network.state_dict()


def load_own_state(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a result of `own_state`.

    Raises:
        RuntimeError: if names or shapes do not match.
    """
    if not isinstance(network, LoRA):
        if precision_of(network) == "float32":
            network.load_state_dict(state)
        else:
            load_packed(network, state)
        return
    missing = {name for name, _ in network.own()} ^ set(state)
    if missing:
        raise RuntimeError(f"the low-rank additions do not match the network: {min(missing)}")
    network.load_state_dict(state, strict=False)


def bare(network: LoRA) -> LoRA:
    """Return a copy with additions that have no effect; it shares the frozen weights."""
    twin = copy_network(network)
    with torch.no_grad():
        for name, parameter in trainable(twin):
            if ".lora_B." in name:
                parameter.zero_()
    assert isinstance(twin, LoRA)
    return twin


def merged(network: nn.Module) -> nn.Module:
    """Return the base of a `LoRA` in float32 with the additions merged into it; any other network unchanged."""
    is_lowered = precision_of(network) != "float32"
    if not isinstance(network, LoRA) and not is_lowered:
        return network
    twin: Any = copy.deepcopy(base_of(network))
    if is_lowered:
        twin.restore()
    layers: list[tuple[str, Any]] = [part for part in twin.named_modules() if hasattr(part[1], "lora_A")]
    for name, layer in layers:
        layer.merge()
        twin.set_submodule(name, layer.get_base_layer())
    whole: nn.Module = twin
    return whole


def precision_of(network: nn.Module) -> BasePrecision:
    """Return the precision of the frozen weights; float32 if all weights are trainable."""
    stock = base_of(network)
    return stock.precision if isinstance(stock, Replay) else "float32"


def weight_bytes_of(network: nn.Module) -> int:
    """Return the number of bytes of a network's weights, computed from their shapes."""
    stock = base_of(network)
    return weight_bytes(stock.model if isinstance(stock, StockNetwork) else stock, precision_of(network))


def checkpoint_gradients(network: nn.Module) -> None:
    """Make a diffusers network recompute its activations in the backward pass instead of storing them.

    Raises:
        ValueError: if the network does not support it.
    """
    stock = base_of(network)
    if not isinstance(stock, StockNetwork) or not getattr(stock.model, "_supports_gradient_checkpointing", False):
        raise ValueError(
            f"{type(stock).__name__} cannot recompute its activations. Remove --engine.gradient-checkpointing"
        )
    stock.model.enable_gradient_checkpointing()


def checkpoints_gradients(network: nn.Module) -> bool:
    """Return whether `checkpoint_gradients` was called on the network, or on the network that it was copied from."""
    stock = base_of(network)
    return isinstance(stock, StockNetwork) and bool(stock.model.is_gradient_checkpointing)


def copy_network(network: nn.Module) -> nn.Module:
    """Return a copy with its own trainable weights; the frozen weights of a `LoRA` are shared."""
    own = {id(parameter) for _, parameter in trainable(network)}
    shared = shared_layers(network)
    shared |= {id(parameter): parameter for parameter in network.parameters() if id(parameter) not in own}
    twin: nn.Module = copy.deepcopy(network, shared)
    for _, parameter in trainable(twin):
        parameter.requires_grad_(True)
    return twin


def copy_denoiser(denoiser: Denoiser) -> Denoiser:
    """Return a copy of a denoiser with its own trainable weights, for a student or a helper that starts from it."""
    check_denoiser("the model to copy", denoiser, Denoiser)
    if isinstance(denoiser, NetworkDenoiser):
        return NetworkDenoiser(copy_network(denoiser.network), denoiser.process, denoiser.prediction)
    return copy.deepcopy(denoiser).requires_grad_(True)
