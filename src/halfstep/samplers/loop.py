"""The sampling loop: a generator, so that a caller can watch, stop, or record."""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from halfstep.core.clock import as_clock
from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.grids import check_num_steps, uniform_times
from halfstep.samplers.base import Memory, Sampler
from halfstep.samplers.ddim import DDIM


class SamplerStep(NamedTuple):
    """One finished step of a trajectory."""

    number: int
    """0 for the first step."""
    t: float
    """Time at which the step started."""
    s: float
    """Time at which it landed; 0 at the last step."""
    x_s: Tensor
    """The samples there, `[batch, *dims]`; clean data at s = 0."""


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    x_t: Tensor,
    num_steps: int,
    sampler: Sampler | None = None,
    cond: Cond | None = None,
    grid: Callable[[int], Tensor] = uniform_times,
) -> Iterator[SamplerStep]:
    """The steps of sampling from the noise `x_t` `[batch, *dims]` at t = 1 down to clean data, one after the other.

    Args:
        num_steps: steps of the sampler, at least 1.
        sampler: DDIM() if None.
        cond: conditions by name, each `[batch, ...]`.
        grid: from `num_steps` to `num_steps + 1` falling times.

    Raises:
        ValueError: if `num_steps` is not a whole number of at least 1.
    """
    check_num_steps(num_steps)
    method = DDIM() if sampler is None else sampler
    times = grid(num_steps).tolist()
    memory: Memory = None
    for number, (t, s) in enumerate(itertools.pairwise(times)):
        x_t, memory = method.step(denoiser, x_t, as_clock(t, x_t), as_clock(s, x_t), cond, memory)
        yield SamplerStep(number, t, s, x_t)


def sample(
    denoiser: Denoiser,
    x_t: Tensor,
    num_steps: int,
    sampler: Sampler | None = None,
    cond: Cond | None = None,
    grid: Callable[[int], Tensor] = uniform_times,
) -> Tensor:
    """Clean samples x0, `[batch, *dims]`, from the starting noise `x_t`: the end of `trajectory`, same arguments.

    x0 is clipped on the way only if the denoiser does so (`Clipped`; a model from `load` does for images).

    Raises:
        ValueError: if `num_steps` is not a whole number of at least 1.
    """
    x_s = x_t
    for step in trajectory(denoiser, x_t, num_steps, sampler, cond, grid):
        x_s = step.x_s
    return x_s
