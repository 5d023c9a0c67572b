"""Networks that compute in half precision behind a full-precision interface."""

import copy
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE
from halfstep.nets.base import Network


@final
class InHalf(nn.Module):
    """A bfloat16 copy of a frozen teacher, with half the weight memory; its calls are those of `called_in_half`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(torch.bfloat16)
        self.restores_norm = bool(getattr(network, "restores_norm", False))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        if isinstance(self.network, Network):
            return called_in_half(self.network, x_t, time, cond)
        # A custom network may not cast its float32 time embedding itself.
        with torch.autocast(x_t.device.type, torch.bfloat16):
            return called_in_half(self.network, x_t, time, cond)


def called_in_half(network: Callable[..., Tensor], x_t: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Call a network in bfloat16, with times and guidance scales in float32; the output has x_t's dtype."""
    shown = {
        name: value.to(torch.bfloat16) if value.is_floating_point() and name != GUIDANCE else value
        for name, value in cond.items()
    }
    return network(x_t.to(torch.bfloat16), time, **shown).to(x_t.dtype)
