"""The encoder half of a network: what a critic judges samples by.

A U-Net's half ends with its middle block; that of a transformer or a perceptron with the first half of its blocks. The
decoder is not kept, so it costs neither memory nor time. `encoder_half` dispatches on the kind of network: register a
function for one of your own with `encoder_half.register(MyNetwork)`.
"""

import functools
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn

from halfstep.nets.lora import LoRA, merged
from halfstep.nets.mlp import MLP
from halfstep.nets.stock import SD3, DiT, UNet2D, UNet2DCondition


class EncoderHalf(nn.Module, ABC):
    """A callable (x_t, time, **cond) -> features `[batch, channels, ...]`, all of whose parameters take part."""

    channels: int

    @abstractmethod
    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the network's deepest features for noisy samples `[batch, *dims]` at times in [0, 1] `[batch]`."""


@functools.singledispatch
def encoder_half(network: Any) -> EncoderHalf:
    """Return the encoder half of a network, which is taken apart: pass a copy.

    Raises:
        ValueError: if no function is registered for networks of this kind.
    """
    kind = type(network).__name__
    raise ValueError(
        f"a critic needs the encoder half of the teacher, and that of a {kind} is unknown. Register a function that "
        f"returns it: halfstep.nets.encoder_half.register({kind})"
    )


@final
class _UNetHalf(EncoderHalf):
    """diffusers' U-Net without what follows its middle block."""

    def __init__(self, network: UNet2D | UNet2DCondition) -> None:
        super().__init__()
        self.network, self.channels = network, network.config["block_out_channels"][-1]
        model = network.model
        model.up_blocks = nn.ModuleList()
        model.conv_norm_out, model.conv_act, model.conv_out = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.network(x_t, time, **cond)


@final
class _DiTHalf(EncoderHalf):
    """The first half of a DiT's blocks."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        model, self.timestep = network.model, network.timestep
        self.channels = model.inner_dim
        self.pos_embed, self.blocks = model.pos_embed, _first_half(model.transformer_blocks)

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        tokens, timestep = self.pos_embed(x_t), self.timestep(time)
        for block in self.blocks:
            tokens = block(tokens, timestep=timestep, class_labels=cond["class_labels"])
        return tokens.transpose(1, 2)


@final
class _SD3Half(EncoderHalf):
    """The first half of an SD3's blocks. Its features are the tokens of the latent, then those of the text."""

    def __init__(self, network: SD3) -> None:
        super().__init__()
        model, self.timestep = network.model, network.timestep
        self.channels = model.inner_dim
        self.pos_embed, self.blocks = model.pos_embed, _first_half(model.transformer_blocks)
        self.time_text_embed, self.context_embedder = model.time_text_embed, model.context_embedder

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        tokens = self.pos_embed(x_t).contiguous()
        text = self.context_embedder(cond["encoder_hidden_states"])
        embedded = self.time_text_embed(self.timestep(time), cond["pooled_projections"])
        for block in self.blocks:
            text, tokens = block(hidden_states=tokens, encoder_hidden_states=text, temb=embedded)
        # The last block of a whole network returns no text.
        both = tokens if text is None else torch.cat([tokens, text], dim=1)
        return both.transpose(1, 2)


@final
class _MLPHalf(EncoderHalf):
    """The first half of a perceptron's residual blocks."""

    def __init__(self, network: MLP) -> None:
        super().__init__()
        self.network, self.channels = network, network.width
        for name in ("norms", "ups", "downs", "shifts"):
            setattr(network, name, _first_half(getattr(network, name)))
        network.leave = nn.Identity()

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.network.hidden(x_t, time, **cond)


def _first_half(blocks: nn.ModuleList) -> nn.ModuleList:
    """Return the first half of the blocks, and at least one."""
    return blocks[: -(-len(blocks) // 2)]


@encoder_half.register(UNet2D)
@encoder_half.register(UNet2DCondition)
def _(network: UNet2D | UNet2DCondition) -> EncoderHalf:
    return _UNetHalf(network)


@encoder_half.register(DiT)
def _(network: DiT) -> EncoderHalf:
    return _DiTHalf(network)


@encoder_half.register(SD3)
def _(network: SD3) -> EncoderHalf:
    return _SD3Half(network)


@encoder_half.register(MLP)
def _(network: MLP) -> EncoderHalf:
    return _MLPHalf(network)


@encoder_half.register(LoRA)
def _(network: LoRA) -> EncoderHalf:
    return encoder_half(merged(network))
