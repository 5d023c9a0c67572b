"""The config of diffusers' UNet2DModel, told level by level."""

from collections.abc import Sequence
from typing import Any


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
