"""A residual multilayer perceptron for data that is no image: points, features, actions."""

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
    """Residual blocks on the flattened sample, each shifted by an embedding of time and, if there is one, of the class.

    Args:
        shape: of one sample, `[*dims]`.
        width: of the hidden layers.
        depth: number of residual blocks.
        channels: outputs for each entry of a sample (`Prediction.channels`).
        num_classes: 0 for an unconditional network.
        dropout: probability inside the blocks.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 3,
        channels: int = 1,
        num_classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.shape, self.width, self.depth = tuple(shape), width, depth
        self.channels, self.num_classes, self.dropout = channels, num_classes, dropout
        entries = math.prod(self.shape)
        frequencies = torch.exp(torch.linspace(0, math.log(64.0), 16)) * (math.pi / 2)
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Linear(32, width)
        self.label = nn.Embedding(num_classes, width) if num_classes else None
        self.enter = nn.Linear(entries, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.drop = nn.Dropout(dropout)
        self.leave = nn.Linear(width, entries * channels)

    def arguments(self) -> dict[str, Any]:
        return {
            "shape": list(self.shape),
            "width": self.width,
            "depth": self.depth,
            "channels": self.channels,
            "num_classes": self.num_classes,
            "dropout": self.dropout,
        }

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The output `[batch, channels * C, ...]` for samples `x_t` `[batch, C, ...]` at times `[batch]`.

        Raises:
            ValueError: if labels are given to an unconditional network or missing for a conditional one.
        """
        if (class_labels is None) != (self.label is None):
            needed = "needs class_labels" if self.label is not None else "takes no class_labels"
            raise ValueError(f"this network has {self.num_classes} classes and {needed}")
        angles = time[:, None] * self.frequencies.to(time)
        signal = self.time(torch.cat([torch.sin(angles), torch.cos(angles)], dim=1))
        if self.label is not None:
            signal = signal + self.label(class_labels)
        signal = F.silu(signal)
        hidden = self.enter(x_t.flatten(1))
        for norm, up, down, shift in zip(self.norms, self.ups, self.downs, self.shifts, strict=True):
            hidden = hidden + down(self.drop(F.silu(up(norm(hidden) + shift(signal)))))
        output: Tensor = self.leave(hidden)
        return output.reshape(x_t.shape[0], x_t.shape[1] * self.channels, *x_t.shape[2:])
