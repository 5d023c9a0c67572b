"""Adapters: networks as callables (x_t, time, **cond) -> output. Only this room and hub/ know diffusers."""

from halfstep.nets.base import Network, build_network, describe_network, networks, set_dropout
from halfstep.nets.mlp import MLP
from halfstep.nets.unet2d import UNet2D, unet2d_config

__all__ = ["MLP", "Network", "UNet2D", "build_network", "describe_network", "networks", "set_dropout", "unet2d_config"]
