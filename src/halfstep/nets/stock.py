"""diffusers' own networks as ours: what they share, and the four that are known.

Each is built from its class's config and holds the stock module under the name `model`, so export is a copy of weights.
Time t becomes the timestep that its scheduler would give: T t - 1 on a table of T noise levels, T sigma on the straight
path of flow matching. New networks have a power of two for T, so that the times i / N of every power-of-two grid with
N <= T are whole timesteps.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE
from halfstep.nets.base import Network, networks


class StockNetwork(Network):
    """A module of diffusers, callable as (x_t, time, **cond).

    Args:
        config: arguments of the stock class, JSON-ready.
        num_train_timesteps: T.
    """

    stock: ClassVar[str]
    """Name of the class in diffusers."""
    conditions: ClassVar[tuple[str, ...]] = ()
    """Conditions that are not class labels, by the names under which the stock module takes them."""

    def __init__(self, config: Mapping[str, Any], num_train_timesteps: int) -> None:
        super().__init__()
        # Importing diffusers takes seconds, which those who use other networks need not wait.
        import diffusers

        self.num_train_timesteps = num_train_timesteps
        self.config = {name: value for name, value in config.items() if not name.startswith("_")}
        self.model = getattr(diffusers, self.stock)(**self.config)
        for part in self.model.modules():
            if hasattr(part, "dropout_prob"):
                # DiT drops labels in training, and on dropped ones a student loses the guidance that it has learned.
                part.dropout_prob = 0.0

    def arguments(self) -> dict[str, Any]:
        return {"config": self.config, "num_train_timesteps": self.num_train_timesteps}


class TableNetwork(StockNetwork):
    """A stock network on the clock of a table: its timestep is T u - 1, where u goes over `clock_range`.

    Args:
        clock_range: where the network's clock u stands at t = 0 and at t = 1, for imported networks that were trained
            on another.

    Raises:
        ValueError: if T is not at least 1 or the clock does not run forwards.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        num_train_timesteps: int = 1024,
        clock_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        if num_train_timesteps < 1:
            raise ValueError(f"num_train_timesteps must be at least 1, got {num_train_timesteps}")
        first, last = clock_range
        if not first < last:
            raise ValueError(f"clock_range must rise from t = 0 to t = 1, got {first} and {last}")
        super().__init__(config, num_train_timesteps)
        self.clock_range = (float(first), float(last))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What every move to a device goes through: on a GPU, weights of convolutions then have their channels last.

        On the CPU that costs up to half as much again in bfloat16, and some percent in float32 (benchmarks/step.py).
        """
        super()._apply(fn, recurse)
        if next(self.parameters()).device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)
        return self

    @final
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "clock_range": list(self.clock_range)}

    @final
    def timestep(self, time: Tensor) -> Tensor:
        """The stock module's timestep at times in [0, 1], `[batch]`."""
        first, last = self.clock_range
        return self.num_train_timesteps * (first + (last - first) * time) - 1


@final
@networks.register("unet2d")
class UNet2D(TableNetwork):
    """`UNet2DModel`, for images; class labels are accepted if the config has `num_class_embeds`."""

    stock = "UNet2DModel"

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The network's output `[batch, out_channels, h, w]` for images `x_t` at times in [0, 1] `[batch]`."""
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
    """The arguments of `diffusers.UNet2DModel` for a network that is told level by level, as `recipes.UNetConfig` is.

    A level without attention changes resolution by a residual block of its own kind where `resample` is "resnet".
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
        # Left out, it is the default of another block, and the middle's attention silently loses its norm.
        "attn_norm_num_groups": norm_num_groups,
        "norm_eps": norm_eps,
        "time_embedding_dim": time_embedding_dim,
        "flip_sin_to_cos": flip_sin_to_cos,
        "freq_shift": freq_shift,
        "resnet_time_scale_shift": time_scale_shift,
        "num_class_embeds": num_classes or None,
    }


@final
@networks.register("dit")
class DiT(TableNetwork):
    """`DiTTransformer2DModel`, for latents of classes; the class behind the last stands for none."""

    stock = "DiTTransformer2DModel"

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        """The network's output `[batch, out_channels, h, w]` for latents `x_t` at times in [0, 1] `[batch]`."""
        return self.model(x_t, self.timestep(time), class_labels=class_labels, return_dict=False)[0]


@final
@networks.register("unet2d_condition")
class UNet2DCondition(TableNetwork):
    """`UNet2DConditionModel` of Stable Diffusion 1 and 2, for latents of texts.

    It takes `guidance_scale` `[batch]` if its config has `time_cond_proj_dim`, embedded as stock pipelines do.
    """

    stock = "UNet2DConditionModel"
    conditions = ("encoder_hidden_states",)

    def forward(
        self, x_t: Tensor, time: Tensor, encoder_hidden_states: Tensor, guidance_scale: Tensor | None = None
    ) -> Tensor:
        """The network's output `[batch, out_channels, h, w]` for latents `x_t` at times in [0, 1] `[batch]`.

        Args:
            encoder_hidden_states: of the texts, `[batch, tokens, width]`.

        Raises:
            ValueError: if a scale is given to a network that takes none, or missing for one that does.
        """
        width = self.config.get("time_cond_proj_dim")
        if (width is None) != (guidance_scale is None):
            needed = "takes no" if width is None else "needs a"
            raise ValueError(f"this network {needed} {GUIDANCE} (time_cond_proj_dim is {width})")
        embedded = None
        if guidance_scale is not None:
            from diffusers.models.embeddings import get_timestep_embedding

            # What diffusers' text-to-image pipelines feed.
            sinusoids: Tensor = get_timestep_embedding(1000 * (guidance_scale - 1), width, downscale_freq_shift=1)
            embedded = sinusoids.to(x_t.dtype)
        return self.model(x_t, self.timestep(time), encoder_hidden_states, timestep_cond=embedded, return_dict=False)[0]


@final
@networks.register("sd3")
class SD3(StockNetwork):
    """`SD3Transformer2DModel`, for latents of texts on the straight path; its timestep is T sigma.

    Args:
        shift: of the process; sigma = shift t / (1 + (shift - 1) t).
    """

    stock = "SD3Transformer2DModel"
    conditions = ("encoder_hidden_states", "pooled_projections")

    def __init__(self, config: Mapping[str, Any], shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        super().__init__(config, num_train_timesteps)
        self.shift = float(shift)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "shift": self.shift}

    def forward(self, x_t: Tensor, time: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        """The network's output `[batch, out_channels, h, w]` for latents `x_t` at times in [0, 1] `[batch]`.

        Args:
            encoder_hidden_states: of the texts, `[batch, tokens, width]`.
            pooled_projections: of the texts, `[batch, width]`.
        """
        return self.model(x_t, encoder_hidden_states, pooled_projections, self.timestep(time), return_dict=False)[0]

    def timestep(self, time: Tensor) -> Tensor:
        """The stock module's timestep at times in [0, 1], `[batch]`."""
        return self.num_train_timesteps * self.shift * time / (1 + (self.shift - 1) * time)
