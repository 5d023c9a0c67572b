"""The exponential moving average of a model's weights.

The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the average forgets the random start quickly and a
short run is not held back by it. Kept in float32, updated for all tensors at once.
"""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor, nn

from halfstep.nets import own_state, trainable
from halfstep.train.sharding import joined, local, spread_as


@final
class EMA:
    """Averages the trainable parameters of `module`; its buffers are copied.

    Args:
        decay: the decay that is reached in the end, in [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._module = module
        self._names = [name for name, _ in trainable(module)]
        self._weights = [p.detach() for _, p in trainable(module)]
        # Of weights that are spread over processes, this one's slices, which average like any others.
        self._parameters = [local(p) for p in self._weights]
        self._averages = [p.float().clone() for p in self._parameters]

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Moves the average towards the weights as they are after `num_updates` updates."""
        weight = 1 - min(self.decay, (1 + num_updates) / (10 + num_updates))
        current = [p if p.dtype == torch.float32 else p.float() for p in self._parameters]
        torch._foreach_lerp_(self._averages, current, weight)

    def state_dict(self) -> dict[str, Tensor]:
        """The module's own state with averages in the place of parameters."""
        state = own_state(self._module)
        for name, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            state[name] = joined(average.to(weight.dtype), weight)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the averages from what `state_dict` returned, its tensors in one piece."""
        for name, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            average.copy_(local(spread_as(state[name], weight)))
