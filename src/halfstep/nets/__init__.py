"""Networks that can be called as (x_t, time, **cond) -> output. Only this package and hub/ depend on diffusers."""

from halfstep.nets.base import (
    OWN,
    Network,
    OnProcess,
    build_network,
    describe_network,
    networks,
    rebuild_own,
    set_dropout,
)
from halfstep.nets.features import EncoderHalf, encoder_half
from halfstep.nets.lora import (
    LoRA,
    bare,
    checkpoint_gradients,
    checkpoints_gradients,
    copy_denoiser,
    copy_network,
    load_own_state,
    merged,
    own_state,
    precision_of,
    share_base,
    trainable,
    weight_bytes_of,
    with_lora,
)
from halfstep.nets.lowered import CONFIGS, BasePrecision, InHalf, unwrapped
from halfstep.nets.mlp import MLP
from halfstep.nets.replay import LENGTH, Replay, conditions_of, nodes_of, read_output, takes_scale
from halfstep.nets.stock import StockNetwork, UNet2D, unet2d_config
from halfstep.nets.surgery import (
    has_fourier_clock,
    has_movable_clock,
    on_clock,
    on_integers,
    takes_guidance,
    with_guidance,
)
