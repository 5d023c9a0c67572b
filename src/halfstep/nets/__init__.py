"""Adapters: networks as callables (x_t, time, **cond) -> output. Only this room and hub/ know diffusers."""

from halfstep.nets.base import Network, build_network, describe_network, networks, set_dropout
from halfstep.nets.features import EncoderHalf, encoder_half
from halfstep.nets.half import InHalf
from halfstep.nets.lora import (
    LoRA,
    checkpoint_gradients,
    checkpoints_gradients,
    copy_denoiser,
    copy_network,
    load_own_state,
    merged,
    own_state,
    share_base,
    trainable,
    with_lora,
)
from halfstep.nets.mlp import MLP
from halfstep.nets.stock import SD3, DiT, StockNetwork, TableNetwork, UNet2D, UNet2DCondition, unet2d_config
from halfstep.nets.surgery import on_clock, takes_guidance, with_guidance
