"""What every noise process promises, and what the cosine process refuses."""

import math

import pytest
import torch

from halfstep.core.noise import NoiseProcess, VPCosine, processes
from support import clock, interior_times, members, numbers

every_process = pytest.mark.parametrize("process", members(processes))


@every_process
def test_log_snr_is_the_log_of_the_ratio_of_the_powers(process: NoiseProcess) -> None:
    t = interior_times()
    alpha, sigma = process.alpha_sigma(t)
    torch.testing.assert_close(process.log_snr(t), 2 * (alpha.log() - sigma.log()), rtol=1e-12, atol=1e-12)


@every_process
def test_log_snr_falls_strictly_over_all_of_time(process: NoiseProcess) -> None:
    assert bool((process.log_snr(torch.linspace(0, 1, 8193, dtype=torch.float64)).diff() < 0).all())


@every_process
def test_time_at_inverts_log_snr(process: NoiseProcess) -> None:
    t = interior_times()
    torch.testing.assert_close(process.time_at(process.log_snr(t)), t, rtol=0, atol=1e-13)


@every_process
def test_log_snr_inverts_time_at(process: NoiseProcess) -> None:
    low, high = process.log_snr(clock(0.999)), process.log_snr(clock(0.001))
    wanted = low + (high - low) * interior_times()
    torch.testing.assert_close(process.log_snr(process.time_at(wanted)), wanted, rtol=0, atol=1e-10)


@every_process
def test_clock_tensors_are_float64_and_amplitudes_are_not_negative(process: NoiseProcess) -> None:
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    for amplitude in process.alpha_sigma(t):
        assert amplitude.dtype == torch.float64
        assert amplitude.shape == t.shape
        assert bool((amplitude >= 0).all())


@every_process
def test_a_step_to_time_0_lands_on_clean_data_and_any_other_on_the_process(process: NoiseProcess) -> None:
    s = clock(0.0, 2**-13, 0.5, 1.0)
    alpha, sigma = process.landing(s)
    assert (alpha[0].item(), sigma[0].item()) == (1.0, 0.0)
    for landed, own in zip((alpha, sigma), process.alpha_sigma(s), strict=True):
        assert torch.equal(landed[1:], own[1:])


@every_process
def test_mixing_gives_each_sample_the_moments_of_its_own_time(process: NoiseProcess) -> None:
    """Linear in (x0, eps) with alpha, sigma as its two answers, whatever the axes after the first."""
    t = clock(0.1, 0.5, 0.9)
    ones, zeros = torch.ones(3, 2, 4, dtype=torch.float64), torch.zeros(3, 2, 4, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    for row in range(3):
        assert bool((process.mix(ones, zeros, t)[row] == alpha[row]).all())
        assert bool((process.mix(zeros, ones, t)[row] == sigma[row]).all())
    x0, eps = numbers(3, 2, 4), numbers(3, 2, 4, seed=1)
    parts = process.mix(x0, zeros, t) + process.mix(zeros, eps, t)
    torch.testing.assert_close(process.mix(x0, eps, t), parts, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (-math.inf, 20.0, "must be finite"),
        (-20.0, math.inf, "must be finite"),
        (-20.0, math.nan, "must be finite"),
        (20.0, -20.0, "log_snr_min must be below log_snr_max, got 20.0 and -20.0"),
        (3.0, 3.0, "log_snr_min must be below log_snr_max"),
    ],
)
def test_the_cosine_process_refuses_bounds_that_leave_no_range(low: float, high: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPCosine(low, high)
