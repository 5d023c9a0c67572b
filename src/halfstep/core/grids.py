"""Step grids: the times that a sampler visits when it takes a given number of steps."""

from typing import Final

import torch
from torch import Tensor

from halfstep.core.door import check_whole

MOST_STEPS: Final = 2**20
"""The largest allowed number of sampler steps, a thousand times as many as any published sampler takes."""


def check_num_steps(num_steps: int) -> None:
    """Raise ValueError unless `num_steps` is a whole number from 1 to `MOST_STEPS`."""
    check_whole("num_steps", num_steps, most=MOST_STEPS)


def uniform_times(num_steps: int) -> Tensor:
    """Return the paper's *trailing* grid: the `num_steps + 1` float64 times k / num_steps, from 1 down to 0.

    Raises:
        ValueError: if `num_steps` is not a whole number of at least 1.
    """
    check_num_steps(num_steps)
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
