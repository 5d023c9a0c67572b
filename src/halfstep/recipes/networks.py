"""The network configurations of recipes, as validated data."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from halfstep.core.grids import MOST_STEPS
from halfstep.nets import MLP, UNet2D, unet2d_config
from halfstep.runs.record import Record

Steps = Annotated[int, Field(ge=1, le=MOST_STEPS)]
Width = Annotated[int, Field(ge=1, le=2**16)]
Depth = Annotated[int, Field(ge=1, le=256)]
Rate = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]


class UNetConfig(Record):
    """The UNet2DModel of diffusers."""

    type: Literal["unet2d"] = "unet2d"
    """Kind of network."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=1, max_length=12)] = (64, 128)
    """Number of channels at each resolution, finest first; each level halves the height and width."""
    layers_per_block: Depth = 2
    """Number of residual blocks at each resolution."""
    attention: tuple[bool, ...] = (False, True)
    """Whether each resolution has self-attention."""
    mid_attention: bool = True
    """Whether the middle block has self-attention."""
    attention_head_dim: Width = 32
    """Number of channels per attention head."""
    norm_num_groups: Width = 32
    """Number of groups in each group normalisation."""
    time_scale_shift: Literal["default", "scale_shift"] = "scale_shift"
    """How to use the time embedding: default adds it, scale_shift scales and shifts after the second normalisation."""
    resample: Literal["conv", "resnet"] = "conv"
    """How to change the resolution: conv uses a convolution; resnet uses a residual block, as in the paper."""
    norm_eps: Rate = 1e-5
    """Epsilon of the group normalisations."""
    time_embedding_dim: Width | None = None
    """Width of the time embedding; by default, four times the number of channels at the finest resolution."""
    flip_sin_to_cos: bool = True
    """Put cosines before sines in the time embedding, as in most diffusers models; the paper puts sines first."""
    freq_shift: Literal[0, 1] = 0
    """With 1, the frequencies of the time embedding end at 1/10000, as in the paper."""
    num_train_timesteps: Steps = 1024
    """The network's number of timesteps, a power of two; chains up to this length use whole timesteps."""

    @field_validator("num_train_timesteps")
    @classmethod
    def _power_of_two(cls, number: int) -> int:
        if number & (number - 1):
            raise ValueError(f"must be a power of two, so that halved chains use whole timesteps, got {number}")
        return number

    def build(self, shape: tuple[int, ...], num_classes: int, channels: int) -> UNet2D:
        """Return an untrained U-Net for images whose `shape` is `[c, h, w]`, with `channels` outputs per channel of
        x_t.

        Raises:
            ValueError: if the samples are not images, or the sides, levels, channels, groups or attention heads are
                incompatible.
        """
        widths, levels = self.block_out_channels, len(self.block_out_channels)
        if len(shape) != 3:
            raise ValueError(
                f"a U-Net needs images [c, h, w], but the samples have shape {list(shape)}. Use the recipe `arrays`"
            )
        if len(self.attention) != levels:
            raise ValueError(
                f"network.attention has {len(self.attention)} entries for {levels} resolutions. Use one entry for each"
            )
        for channels_here, attention in zip(widths, self.attention, strict=True):
            for name in ("norm_num_groups", "attention_head_dim") if attention else ("norm_num_groups",):
                if channels_here % getattr(self, name):
                    raise ValueError(
                        f"network.{name} {getattr(self, name)} does not divide {channels_here} channels. Change "
                        f"--network.{name.replace('_', '-')} or --network.block-out-channels"
                    )
        if self.mid_attention and widths[-1] % self.attention_head_dim:
            raise ValueError(
                f"network.attention_head_dim {self.attention_head_dim} does not divide the middle block's {widths[-1]} "
                "channels. Change the dimension, or add --network.no-mid-attention"
            )
        factor = 2 ** (levels - 1)
        if shape[1] % factor or shape[2] % factor:
            raise ValueError(
                f"images of {shape[1]}x{shape[2]} cannot be halved {levels - 1} times. Make their sides multiples "
                f"of {factor} (--data.image-size), or use fewer entries in network.block_out_channels"
            )
        described = unet2d_config(
            size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0] * channels,
            num_classes=num_classes,
            **self.model_dump(exclude={"type", "num_train_timesteps"}),
        )
        return UNet2D(described, num_train_timesteps=self.num_train_timesteps)


class MLPConfig(Record):
    """A residual multilayer perceptron, for data other than images."""

    type: Literal["mlp"] = "mlp"
    """Kind of network."""
    width: Width = 128
    """Width of the hidden layers."""
    depth: Depth = 3
    """Number of residual blocks."""

    def build(self, shape: tuple[int, ...], num_classes: int, channels: int) -> MLP:
        """Return an untrained network for samples of `shape`, with `channels` outputs per element of x_t."""
        return MLP(shape, width=self.width, depth=self.depth, channels=channels, num_classes=num_classes)
