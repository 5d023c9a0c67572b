"""The exponential moving average of a network's weights.

The decay is min(decay, (1 + n) / (10 + n)) after n steps, so that the average forgets the random start quickly and does
not hold a short run back. Kept in float32, updated for all tensors at once.
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
        decay: reached in the end, in [0, 1).
        into: a copy of the module, in float32 and spread over processes like it, whose parameters become the averages,
            so that they can be called; None keeps them beside the module.
    """

    def __init__(self, module: nn.Module, decay: float, into: nn.Module | None = None) -> None:
        self.decay = decay
        self._module, self._into = module, into
        self._names = [name for name, _ in trainable(module)]
        self._weights = [p.detach() for _, p in trainable(module)]
        # For weights that are spread over processes: this one's slices, which average like any others.
        self._parameters = [local(p) for p in self._weights]
        if into is None:
            self._averages = [p.float().clone() for p in self._parameters]
        else:
            self._averages = [local(p.detach()) for _, p in trainable(into)]

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Move the average towards the weights as they are after `num_steps` steps."""
        weight = 1 - min(self.decay, (1 + num_steps) / (10 + num_steps))
        current = [p if p.dtype == torch.float32 else p.float() for p in self._parameters]
        torch._foreach_lerp_(self._averages, current, weight)
        if self._into is not None:
            for own, buffer in zip(self._into.buffers(), self._module.buffers(), strict=True):
                own.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the module's own state with averages instead of parameters."""
        state = own_state(self._module)
        for name, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            state[name] = joined(average.to(weight.dtype), weight)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the averages from what `state_dict` returned, its tensors in one piece."""
        for name, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            average.copy_(local(spread_as(state[name], weight)))
