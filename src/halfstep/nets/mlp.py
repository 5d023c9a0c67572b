"""A residual multilayer perceptron for data that is not an image: points, features, actions."""

import math
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.nets.base import Network, networks


@final
@networks.register("mlp")
class MLP(Network):
    """Residual blocks on the flattened sample, each shifted by an embedding of the time and of the class, if any.

    Args:
        shape: shape of one sample, `[*dims]`.
        width: width of the hidden layers.
        depth: number of residual blocks.
        channels: number of outputs for each entry of a sample (`Prediction.channels`).
        num_classes: number of classes; 0 for an unconditional network.
        dropout: dropout probability inside the blocks.
        guided: whether the network takes a guidance scale, as distilled networks do.
        cond_width: width of the condition `observation`; 0 for none.
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

    def arguments(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "width": self.width,
            "depth": self.depth,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "dropout": self.dropout,
            "guided": self.guided,
            "cond_width": self.cond_width,
        }

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
            ValueError: if a condition is passed to a network that does not take it, or is missing for one that does.
        """
        hidden = self.hidden(x_t, time, class_labels, guidance_scale, observation)
        return self.leave(hidden).reshape(x_t.shape[0], x_t.shape[1] * self.channels, *x_t.shape[2:])

    def hidden(
        self,
        x_t: Tensor,
        time: Tensor,
        class_labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
        observation: Tensor | None = None,
    ) -> Tensor:
        """Return the output of the last block, `[batch, width]`.

        Args:
            class_labels: `[batch]`.
            guidance_scale: `[batch]`.
            observation: `[batch, cond_width]`.

        Raises:
            ValueError: if a condition is given to a network that takes none, or missing for one that does.
        """
        if (class_labels is None) != (self.label is None):
            needed = "needs class_labels" if self.label is not None else "takes no class_labels"
            raise ValueError(f"this network has {self.num_classes} classes and {needed}")
        for name, value, part in (
            ("guidance_scale", guidance_scale, self.scale),
            ("observation", observation, self.observed),
        ):
            if (value is None) != (part is None):
                raise ValueError(f"this network {'takes no' if part is None else 'needs the condition'} {name}")
        signal = self.time(self._sinusoids(time))
        if self.label is not None:
            signal = signal + self.label(class_labels)
        if self.scale is not None and guidance_scale is not None:
            # Scales from 1 to 10 then cover the range of frequencies that times from 0 to 1 do.
            signal = signal + self.scale(self._sinusoids(guidance_scale.to(time) / 10))
        if self.observed is not None:
            signal = signal + self.observed(observation)
        signal = F.silu(signal)
        hidden = self.enter(x_t.flatten(1))
        for norm, up, down, shift in zip(self.norms, self.ups, self.downs, self.shifts, strict=True):
            hidden = hidden + down(self.drop(F.silu(up(norm(hidden) + shift(signal)))))
        return hidden

    def _sinusoids(self, numbers: Tensor) -> Tensor:
        angles = numbers[:, None] * self.frequencies.to(numbers)
        # Angles need the precision of the times; the layers after this may compute in half precision.
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1).to(self.time.weight.dtype)
