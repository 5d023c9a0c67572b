"""Step grids: the times that a sampler visits for a number of steps."""

from typing import Final

import torch
from torch import Tensor

from halfstep.core.door import check_whole

MOST_STEPS: Final = 2**20
"""Largest allowed number of sampler steps: a thousand times that of any published sampler."""


def check_num_steps(num_steps: int) -> None:
    """Raise ValueError unless `num_steps` is a whole number from 1 to `MOST_STEPS`."""
    check_whole("num_steps", num_steps, most=MOST_STEPS)


def uniform_times(num_steps: int) -> Tensor:
    """Return the `num_steps + 1` times k / num_steps from 1 down to 0, float64: the paper's grid, a *trailing* one.

    Raises:
        ValueError: if `num_steps` is not a whole number of at least 1.
    """
    check_num_steps(num_steps)
    return torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
