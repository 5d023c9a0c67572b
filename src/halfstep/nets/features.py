"""The encoder half of a network, which computes the features for a critic.

The encoder half of a U-Net ends with the middle block. The encoder half of a transformer or MLP is the first half of
its blocks. The decoder is dropped, so it costs neither memory nor time. For a custom network, register a function
with `encoder_half.register(MyNetwork)`.
"""

import contextlib
import functools
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn

from halfstep.nets.base import OnProcess
from halfstep.nets.lora import LoRA, merged
from halfstep.nets.mlp import MLP
from halfstep.nets.replay import LENGTH, Replay
from halfstep.nets.stock import UNet2D


class EncoderHalf(nn.Module, ABC):
    """A callable (x_t, time, **cond) -> features `[batch, channels, ...]` that uses all of its parameters."""

    channels: int

    @abstractmethod
    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the network's deepest features for noisy samples `[batch, *dims]` at times `[batch]` in [0, 1]."""


@functools.singledispatch
def encoder_half(network: Any) -> EncoderHalf:
    """Return the encoder half of a network. The network is modified, so pass a copy.

    Raises:
        ValueError: if no function is registered for networks of this class.
    """
    kind = type(network).__name__
    raise ValueError(
        f"a critic needs the teacher's encoder half, but the encoder half of a {kind} is unknown. Register a function "
        f"that returns it: halfstep.nets.encoder_half.register({kind})"
    )


@final
class _UNetHalf(EncoderHalf):
    """diffusers' U-Net up to and including its middle block."""

    def __init__(self, network: UNet2D | Replay) -> None:
        super().__init__()
        self.network, self.channels = network, network.config["block_out_channels"][-1]
        model = network.model
        model.up_blocks = nn.ModuleList()
        model.conv_norm_out, model.conv_act, model.conv_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.network.raw(x_t, time, **cond)


class _Reached(Exception):
    """Raised when the last kept block has returned."""


@final
class _TransformerHalf(EncoderHalf):
    """The first half of a transformer's blocks. The features are all output tokens of the last of these blocks."""

    def __init__(self, network: Replay) -> None:
        super().__init__()
        self.network = network
        self._blocks, blocks = _blocks_of(network)
        setattr(network.model, self._blocks, _first_half(blocks))
        weight, cond = next(network.parameters()), dict[str, Tensor]()
        for name, node in network.conditions.items():
            dtype = getattr(torch, node["dtype"])
            dtype = weight.dtype if dtype.is_floating_point else dtype
            cond[name] = torch.ones(1, *node["shape"], dtype=dtype, device=weight.device)
            if "list" in node:
                cond[name + LENGTH] = torch.ones(1, dtype=torch.long)
        with torch.enable_grad():
            sample = weight.new_zeros(1, *network.sample["shape"])
            features = self(sample, weight.new_full((1,), 0.5), **cond)
            named = dict(network.named_parameters(remove_duplicate=False))
            grads = torch.autograd.grad(features.sum(), list(named.values()), allow_unused=True)
        self.channels = features.shape[1]
        # Parameters without a gradient are unused and therefore removed.
        for path, grad in zip(named, grads, strict=True):
            if grad is None:
                module, _, leaf = path.rpartition(".")
                setattr(network.get_submodule(module), leaf, None)

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        found: list[Tensor] = []

        def stop(module: nn.Module, arguments: object, output: Any) -> None:
            found.extend(output if isinstance(output, tuple) else [output])
            raise _Reached

        last = getattr(self.network.model, self._blocks)[-1]
        with last.register_forward_hook(stop), contextlib.suppress(_Reached):
            self.network.raw(x_t, time, **cond)
        return torch.cat([part for part in found if part is not None], dim=1).transpose(1, 2)


def _blocks_of(network: Replay) -> tuple[str, nn.ModuleList]:
    """Return the name of a transformer's longest list of blocks, and the list itself."""
    lists = [(name, part) for name, part in network.model.named_children() if isinstance(part, nn.ModuleList) and part]
    if not lists:
        raise ValueError(
            f"a critic needs the teacher's encoder half, but {network.stock} has neither up blocks nor a list of "
            "blocks. Use another teacher, or train without a critic"
        )
    return max(lists, key=lambda found: len(found[1]))


@final
class _MLPHalf(EncoderHalf):
    """The first half of an MLP's residual blocks."""

    def __init__(self, network: MLP) -> None:
        super().__init__()
        self.network, self.channels = network, network.width
        for name in ("norms", "ups", "downs", "shifts"):
            setattr(network, name, _first_half(getattr(network, name)))
        network.leave = nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.network.hidden(x_t, time, **cond)


@final
class _OnProcessHalf(EncoderHalf):
    """The encoder half of a custom network on another noise process."""

    def __init__(self, network: OnProcess) -> None:
        super().__init__()
        # The wrapper converts the input and the time for the half as it did for the whole network.
        network.network = encoder_half(network.network)
        self.network, self.channels = network, network.network.channels

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        features: Tensor = self.network(x_t, time, **cond)
        return features


def _first_half(blocks: nn.ModuleList) -> nn.ModuleList:
    """Return the first half of the blocks, rounded up."""
    return blocks[: -(-len(blocks) // 2)]


encoder_half.register(UNet2D, _UNetHalf)
encoder_half.register(MLP, _MLPHalf)
encoder_half.register(OnProcess, _OnProcessHalf)


@encoder_half.register(Replay)
def _(network: Replay) -> EncoderHalf:
    whole: Any = merged(network)
    return _UNetHalf(whole) if hasattr(whole.model, "up_blocks") else _TransformerHalf(whole)


@encoder_half.register(LoRA)
def _(network: LoRA) -> EncoderHalf:
    return encoder_half(merged(network))
