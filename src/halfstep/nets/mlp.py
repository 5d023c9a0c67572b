"""A residual multilayer perceptron for points, features and actions."""

import math
from collections.abc import Callable, Sequence
from typing import Self, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.nets.base import Network, moved, networks


@final
@networks.register("mlp")
class MLP(Network):
    """Residual blocks on flattened samples. The embedded time and conditions are added to the input of each block.

    Args:
        shape: the shape of one sample, `[*dims]`.
        width: the width of the hidden layers.
        depth: the number of residual blocks.
        channels: the number of outputs for each entry of a sample (see `Prediction.channels`).
        num_classes: the number of classes, or 0 for an unconditional network.
        dropout: the dropout probability inside the blocks.
        guided: whether the network takes a guidance scale, like a student distilled with guidance.
        cond_width: the width of the condition `observation`, or 0 if the network does not take it.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        channels: int = 1,
        num_classes: int = 0,
        dropout: float = 0.0,
        guided: bool = False,
        cond_width: int = 0,
    ) -> None:
        super().__init__()
        self.shape, self.width, self.depth = tuple(shape), width, depth
        self.channels, self.num_classes, self.dropout = channels, num_classes, dropout
        self.guided, self.cond_width = guided, cond_width
        entries = math.prod(self.shape)
        frequencies = torch.exp(torch.linspace(0, math.log(64.0), 16)) * (math.pi / 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Linear(32, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.scale = nn.Linear(32, width) if guided else None
        self.observed = nn.Linear(cond_width, width) if cond_width else None
        self.enter = nn.Linear(entries, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.drop = nn.Dropout(dropout)
        self.leave: nn.Module = nn.Linear(width, entries * channels)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = self.frequencies
        super()._apply(fn, recurse)
        self.frequencies = moved(fn, exact)
        return self

    def forward(
        self,
        x_t: Tensor,
        time: Tensor,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        observation: Tensor | None = None,
    ) -> Tensor:
        """Return the output `[batch, channels * C, ...]` for samples `x_t` `[batch, C, ...]` at times `[batch]`.

        Args:
            class_labels: `[batch]`.
            guidance_scale: `[batch]`.
            observation: `[batch, cond_width]`.

        Raises:
            ValueError: if a condition is missing or is not supported by the network.
        """
        hidden = self.hidden(
            x_t, time, class_labels=class_labels, guidance_scale=guidance_scale, observation=observation
        )
        return self.leave(hidden).reshape(x_t.shape[0], x_t.shape[1] * self.channels, *x_t.shape[2:])

    def hidden(self, x_t: Tensor, time: Tensor, **cond: Tensor | None) -> Tensor:
        """Return the output of the last block, `[batch, width]`, with the same arguments and errors as `forward`."""
        parts = {"class_labels": self.label, "guidance_scale": self.scale, "observation": self.observed}
        for name, part in parts.items():
            if (cond.get(name) is None) != (part is None):
                raise ValueError(f"this network {'takes no' if part is None else 'needs the condition'} {name}")
        signal = self.time(self._sinusoids(time))
        if self.label is not None:
            signal = signal + self.label(cond["class_labels"])
        if self.scale is not None and (scale := cond["guidance_scale"]) is not None:
            # Typical scales, from 1 to 10, then cover almost the same range as the times, from 0 to 1.
            signal = signal + self.scale(self._sinusoids(scale.to(time) / 10))
        if self.observed is not None:
            signal = signal + self.observed(cond["observation"])
        signal = F.silu(signal)
        hidden = self.enter(x_t.flatten(1))
        for norm, up, down, shift in zip(self.norms, self.ups, self.downs, self.shifts, strict=True):
            hidden = hidden + down(self.drop(F.silu(up(norm(hidden) + shift(signal)))))
        return hidden

    def _sinusoids(self, numbers: Tensor) -> Tensor:
        angles = numbers[:, None] * self.frequencies.to(numbers)
        # The angles need the full precision of the times, even if the layers compute in half precision.
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).to(self.time.weight.dtype)
