"""Ancestral sampling keeps the distributions for which its two variances are exact, and interpolates between them.

For Gaussian data, a step is affine in x_t and in its noise. The mean and the variance of the samples are therefore
propagated without drawing any, with coefficients read from the step.
"""

import itertools
import math
from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.core.grids import uniform_times
from halfstep.core.noise import VPCosine
from halfstep.core.oracle import GaussianDenoiser, data_set_denoiser
from halfstep.core.prediction import X0
from halfstep.samplers import Ancestral, sample
from support import clock, numbers, toy_denoiser

PROCESS: Final = VPCosine()


class Affine(NamedTuple):
    """Coefficients of x_s = offset + scale x_t + spread noise."""

    offset: float
    scale: float
    spread: float


def read_off(sampler: Ancestral, denoiser: GaussianDenoiser, t: float, s: float) -> Affine:
    x_t, noise = clock(0.0, 1.0, 0.0, 2.0), clock(0.0, 0.0, 1.0, -3.0)
    x_s, _ = sampler.step(denoiser, x_t, clock(t).expand(4), clock(s).expand(4), None, None, noise)
    offset, scaled, spread, both = x_s.tolist()
    step = Affine(offset, scaled - offset, spread - offset)
    assert both == pytest.approx(step.offset + 2 * step.scale - 3 * step.spread, abs=1e-12)
    return step


class Moments(NamedTuple):
    time: float
    mean: float
    variance: float


def exact_moments(denoiser: GaussianDenoiser, t: float) -> Moments:
    alpha, sigma = (float(a) for a in denoiser.process.alpha_sigma(clock(t)))
    mean, std = float(denoiser.mean), float(denoiser.std)
    return Moments(t, alpha * mean, (alpha * std) ** 2 + sigma**2)


def propagated(sampler: Ancestral, denoiser: GaussianDenoiser, times: Tensor) -> list[Moments]:
    """Return the mean and variance of the samples at each time after the first, and of the correct distribution."""
    here = exact_moments(denoiser, float(times[0]))
    found = []
    for t, s in itertools.pairwise(times.tolist()):
        step = read_off(sampler, denoiser, t, s)
        here = Moments(s, step.offset + step.scale * here.mean, step.scale**2 * here.variance + step.spread**2)
        found.append(here)
    return found


def uneven_times(num_steps: int) -> Tensor:
    """Return times from 1 to above 0, with steps of random length."""
    inner = torch.rand(num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return torch.cat([clock(1.0), inner.sort(descending=True).values])


GRIDS: Final[dict[str, Callable[[int], Tensor]]] = {
    "uniform": lambda num_steps: uniform_times(num_steps)[:-1],
    "squared": lambda num_steps: uniform_times(num_steps)[:-1] ** 2,
    "uneven": uneven_times,
}


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("num_steps", [2, 3, 16, 128])
def test_the_upper_variance_keeps_unit_normal_data_exactly_on_any_grid(
    grid: Callable[[int], Tensor], num_steps: int
) -> None:
    denoiser = GaussianDenoiser(PROCESS, 0.0, 1.0)
    for moments in propagated(Ancestral(1.0), denoiser, grid(num_steps)):
        assert moments.mean == 0
        assert moments.variance == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("num_steps", [2, 3, 16, 128])
def test_the_lower_variance_keeps_data_of_one_point_exactly_on_any_grid(
    grid: Callable[[int], Tensor], num_steps: int
) -> None:
    denoiser = GaussianDenoiser(PROCESS, 0.7, 0.0)
    for moments in propagated(Ancestral(0.0), denoiser, grid(num_steps)):
        exact = exact_moments(denoiser, moments.time)
        assert moments.mean == pytest.approx(exact.mean, abs=1e-12)
        assert moments.variance == pytest.approx(exact.variance, rel=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_the_variance_converges_at_first_order_whatever_the_share(std: float, gamma: float) -> None:
    """Test times in the middle; the mean of a Gaussian is exact at every step."""
    denoiser, sampler = GaussianDenoiser(PROCESS, 0.3, std), Ancestral(gamma)
    steps = (64, 128, 256, 512)
    for middle in (0.75, 0.5, 0.25):
        errors = []
        for num_steps in steps:
            times = uniform_times(num_steps)
            moments = propagated(sampler, denoiser, times[times >= middle])[-1]
            exact = exact_moments(denoiser, middle)
            assert moments.mean == pytest.approx(exact.mean, abs=1e-12)
            errors.append(abs(moments.variance - exact.variance))
        order = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
        assert order == pytest.approx(Ancestral.order, abs=0.1)


@pytest.mark.parametrize(("t", "s"), [(1.0, 0.5), (0.75, 0.7), (0.5, 0.001), (0.01, 0.005)])
def test_the_share_interpolates_the_log_variance(t: float, s: float) -> None:
    """The variance of a step lies between its bounds at shares of 0 and 1. The mean does not depend on the share."""
    denoiser = GaussianDenoiser(PROCESS, 0.3, 0.5)
    steps = {gamma: read_off(Ancestral(gamma), denoiser, t, s) for gamma in (0.0, 0.25, 0.5, 0.8, 1.0)}
    low, high = (math.log(steps[gamma].spread ** 2) for gamma in (0.0, 1.0))
    assert low < high
    for gamma, step in steps.items():
        assert math.log(step.spread**2) == pytest.approx(low + gamma * (high - low), abs=1e-11)
        assert (step.offset, step.scale) == pytest.approx((steps[0.0].offset, steps[0.0].scale), abs=1e-14)
    assert steps[0.5].spread ** 2 == pytest.approx(steps[0.0].spread * steps[1.0].spread, rel=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("t", [1.0, 0.5, 1 / 8192])
def test_the_last_step_adds_no_noise(t: float, gamma: float) -> None:
    denoiser, x_t = toy_denoiser(PROCESS, X0()), numbers(8, 2)
    with torch.no_grad():
        x_0, _ = Ancestral(gamma).step(
            denoiser, x_t, clock(t).expand(8), clock(0.0).expand(8), None, None, numbers(8, 2)
        )
        assert torch.equal(x_0, denoiser(x_t, t).x0)


def test_the_noise_of_each_sample_is_its_own() -> None:
    """Samples from one point at a middle time differ from the mean only by that noise."""
    denoiser, x_t, noise = data_set_denoiser(PROCESS, numbers(1, 3, seed=1)), numbers(8, 3), numbers(8, 3, seed=2)
    t, s = clock(0.8).expand(8), clock(0.6).expand(8)
    quiet, _ = Ancestral().step(denoiser, x_t, t, s, None, None, torch.zeros_like(noise))
    loud, _ = Ancestral().step(denoiser, x_t, t, s, None, None, noise)
    spread = (loud - quiet) / noise
    torch.testing.assert_close(spread, spread[:1, :1].expand(8, 3), rtol=1e-12, atol=0)
    assert float(spread.min()) > 0


def test_the_default_is_the_upper_variance() -> None:
    denoiser, x_1 = toy_denoiser(PROCESS, X0()), numbers(8, 2)
    stored = numbers(4, 8, 2, seed=1)
    default, upper = (
        sample(denoiser, x_1, 4, sampler, noise=stored.__getitem__) for sampler in (Ancestral(), Ancestral(1.0))
    )
    assert torch.equal(default, upper)


@pytest.mark.parametrize("gamma", [-1e-9, 1.0000001, math.nan, math.inf])
def test_a_share_outside_0_and_1_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\]"):
        Ancestral(gamma)
