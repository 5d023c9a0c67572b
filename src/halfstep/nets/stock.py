"""diffusers networks as halfstep networks: the base class, and the U-Net for images.

The stock module is stored as `model`, so exporting a network only copies weights. With a table of T noise levels, the
time t becomes the scheduler's timestep T t - 1. New networks use a power of two for T, so that the times i / N of every
power-of-two grid with N <= T correspond to integer timesteps.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from halfstep.nets.base import Network, networks


class StockNetwork(Network):
    """A diffusers module that can be called as (x_t, time, **cond).

    Args:
        stock: the name of the module's class in diffusers.
        config: the JSON-serialisable arguments of this class.
        num_train_timesteps: the scheduler's number of timesteps, T.

    Raises:
        ValueError: if T is not at least 1.
    """

    def __init__(self, stock: str, config: Mapping[str, Any], num_train_timesteps: int) -> None:
        super().__init__()
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        # The import is local, because it takes seconds and other networks do not need diffusers.
        import diffusers

        self.stock = stock
        self.num_train_timesteps = num_train_timesteps
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}
        self.hold(getattr(diffusers, stock)(**self.config))

    @final
    def hold(self, model: Any) -> None:
        """Use `model` as the stock module."""
        self.model = model
        for part in model.modules():
            if hasattr(part, "dropout_prob"):
                # DiT drops labels at random during training. A student would thereby unlearn its distilled guidance.
                part.dropout_prob = 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the weights; on a GPU, store convolution weights in the channels-last format.

        On the CPU, channels-last is up to 50% slower in bfloat16 and a few percent slower in float32
        (benchmarks/step.py).
        """
        super()._apply(fn, recurse)
        if next(self.parameters()).device.type == "cuda":
            to_channels_last(self.model)
        return self

    @abstractmethod
    def timestep(self, time: Tensor) -> Tensor:
        """Return the stock module's timesteps `[batch]` at times `[batch]` in [0, 1]."""

    @abstractmethod
    def on_table(self, num_train_timesteps: int) -> dict[str, Any]:
        """Return the constructor arguments that change if this network switches to the clock T t - 1."""


def to_channels_last(module: nn.Module) -> None:
    """Store the weights of 2-D convolutions in the channels-last format in place.

    `module.to(memory_format=torch.channels_last)` fails for 3-D convolutions, whose weights have 5 axes.
    """
    for parameter in module.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


@final
@networks.register("unet2d")
class UNet2D(StockNetwork):
    """diffusers' `UNet2DModel` for images, which takes class labels if the config has `num_class_embeds`.

    The network's timestep is T u - 1, where u is linear in t and spans `clock_range`.

    Args:
        clock_range: the values of u at t = 0 and t = 1. Imported networks may have been trained on another clock.

    Raises:
        ValueError: if T is not at least 1 or `clock_range` does not increase.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_train_timesteps: int = 1024,
        clock_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        first, last = clock_range
        if not first < last:
            raise ValueError(f"clock_range must increase from t = 0 to t = 1, got {first} and {last}")
        super().__init__("UNet2DModel", config, num_train_timesteps)
        self.clock_range = (float(first), float(last))

    def timestep(self, time: Tensor) -> Tensor:
        first, last = self.clock_range
        return self.num_train_timesteps * (first + (last - first) * time) - 1

    def on_table(self, num_train_timesteps: int) -> dict[str, Any]:
        return {"num_train_timesteps": num_train_timesteps, "clock_range": (0.0, 1.0)}

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the output `[batch, out_channels, h, w]` for images `x_t` at times `[batch]` in [0, 1]."""
        return self.raw(x_t, time, class_labels=class_labels)

    def raw(self, x_t: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Return the stock module's unmodified output."""
        return self.model(x_t, self.timestep(time), class_labels=class_labels, return_dict=False)[0]


def unet2d_config(
    *,
    size: Sequence[int],
    in_channels: int,
    out_channels: int,
    block_out_channels: Sequence[int],
    layers_per_block: int,
    attention: Sequence[bool],
    attention_head_dim: int,
    mid_attention: bool = True,
    norm_num_groups: int = 32,
    norm_eps: float = 1e-5,
    resample: str = "conv",
    time_scale_shift: str = "scale_shift",
    time_embedding_dim: int | None = None,
    flip_sin_to_cos: bool = True,
    freq_shift: int = 0,
    num_classes: int = 0,
) -> dict[str, Any]:
    """Return the config of a `diffusers.UNet2DModel`, built from per-level settings like those of `recipes.UNetConfig`.

    If `resample` is "resnet", levels without attention change the resolution in a residual block.
    """
    plain_down, plain_up = "DownBlock2D", "UpBlock2D"
    if resample == "resnet":
        plain_down, plain_up = "ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"
    return {
        "sample_size": list(size),
        "in_channels": in_channels,
        "out_channels": out_channels,
        "block_out_channels": list(block_out_channels),
        "layers_per_block": layers_per_block,
        "down_block_types": ["AttnDownBlock2D" if here else plain_down for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else plain_up for here in reversed(attention)],
        "downsample_type": resample,
        "upsample_type": resample,
        "add_attention": mid_attention,
        "attention_head_dim": attention_head_dim,
        "norm_num_groups": norm_num_groups,
        # Without this, the middle block's attention would silently lack a norm.
        "attn_norm_num_groups": norm_num_groups,
        "norm_eps": norm_eps,
        "time_embedding_dim": time_embedding_dim,
        "flip_sin_to_cos": flip_sin_to_cos,
        "freq_shift": freq_shift,
        "resnet_time_scale_shift": time_scale_shift,
        "num_class_embeds": num_classes or None,
    }
