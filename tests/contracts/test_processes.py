"""Contracts of every noise process, and the arguments that each rejects."""

import math

import pytest
import torch

from halfstep.core.noise import (
    VE,
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_betas,
)
from support import clock, interior_times, members_and_further_processes, numbers

every_process = pytest.mark.parametrize(
    "process",
    [
        *members_and_further_processes(),
        pytest.param(VE(0.01, 50.0, 3.0), id="ve_rho_3"),
    ],
)
BETAS = {"linear": linear_betas(), "scaled_linear": scaled_linear_betas(), "cosine": cosine_betas()}
every_table = pytest.mark.parametrize("betas", BETAS.values(), ids=BETAS)


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
    """The mix is linear in (x0, eps) with coefficients alpha and sigma, whatever the axes after the first."""
    t = clock(0.1, 0.5, 0.9)
    ones, zeros = torch.ones(3, 2, 4, dtype=torch.float64), torch.zeros(3, 2, 4, dtype=torch.float64)
    alpha, sigma = process.alpha_sigma(t)
    for row in range(3):
        assert bool((process.mix(ones, zeros, t)[row] == alpha[row]).all())
        assert bool((process.mix(zeros, ones, t)[row] == sigma[row]).all())
    x0, eps = numbers(3, 2, 4), numbers(3, 2, 4, seed=1)
    parts = process.mix(x0, zeros, t) + process.mix(zeros, eps, t)
    torch.testing.assert_close(process.mix(x0, eps, t), parts, rtol=1e-14, atol=1e-14)


@every_process
def test_time_at_inverts_log_snr_at_the_last_time_too(process: NoiseProcess) -> None:
    """Without any signal, the log-SNR is -infinity and t = 1."""
    # On the cosine process, an angle of pi / 2 - 4.5e-5 is accurate to 2^-53.
    torch.testing.assert_close(process.time_at(process.log_snr(clock(1.0))), clock(1.0), rtol=0, atol=1e-15)


@every_process
def test_each_time_has_its_own_amplitudes_in_any_order_and_batch(process: NoiseProcess) -> None:
    t = interior_times(64)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    for together, mixed in zip(process.alpha_sigma(t), process.alpha_sigma(t[shuffled]), strict=True):
        torch.testing.assert_close(together[shuffled], mixed, rtol=1e-15, atol=0)
    torch.testing.assert_close(process.log_snr(t)[shuffled], process.log_snr(t[shuffled]), rtol=1e-14, atol=1e-14)
    levels = process.log_snr(t)
    torch.testing.assert_close(process.time_at(levels[shuffled]), t[shuffled], rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("process", "expected"),
    [
        *(pytest.param(VPTable(betas), 1.0, id=f"vp_table_{name}") for name, betas in BETAS.items()),
        *(
            pytest.param(VPTable(zero_terminal_betas(betas)), 1.0, id=f"vp_table_{name}_zero_terminal")
            for name, betas in BETAS.items()
        ),
        pytest.param(VPCosine(), 1.0, id="vp_cosine"),
        pytest.param(VPCosine(-4.0, 4.0), 1.0, id="vp_cosine_narrow"),
        pytest.param(FlowMatching(), 1.0, id="flow"),
        pytest.param(FlowMatching(3.0), 1.0, id="flow_shift_3"),
        pytest.param(VE(), math.sqrt(1 + 80**2), id="ve"),
        pytest.param(VE(0.1, 3.0, 2.0), math.sqrt(10), id="ve_of_3"),
    ],
)
def test_the_start_scale_is_the_spread_of_a_sample_at_time_1(process: NoiseProcess, expected: float) -> None:
    assert process.start_scale == pytest.approx(expected, rel=1e-12)


@every_table
def test_a_table_s_log_snr_is_linear_between_its_levels_and_goes_on_below_the_first(betas: tuple[float, ...]) -> None:
    """The middle of each interval is halfway. `anchors` tests the levels themselves."""
    process, num = VPTable(betas), len(betas)
    place = torch.arange(0, num, dtype=torch.float64)
    ends = [process.log_snr((place + share) / num) for share in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(ends[1], (ends[0] + ends[2]) / 2, rtol=0, atol=1e-11)
    first, second = (ends[2] - ends[0])[:2]
    assert float(first) == pytest.approx(float(second), abs=1e-11)


@every_table
def test_the_last_interval_of_a_zero_terminal_table_takes_the_ratio_to_0_in_a_straight_line(
    betas: tuple[float, ...],
) -> None:
    process = VPTable(zero_terminal_betas(betas))
    assert len(process.betas) == len(betas)
    assert process.betas[-1] == 1
    ends = process.alpha_sigma(clock(1.0))
    assert (ends[0].item(), ends[1].item()) == (0.0, 1.0)
    assert process.log_snr(clock(1.0)).item() == -math.inf
    assert process.time_at(clock(-math.inf)).item() == 1.0
    shares = torch.linspace(0, 1, 33, dtype=torch.float64)
    t = 1 - (1 - shares) / len(betas)
    alpha, sigma = process.alpha_sigma(t)
    ratio = alpha / sigma
    # A time of 1 - 1 / 1000 is accurate to 2^-53, so a share of the last interval is accurate to 1000 times that.
    torch.testing.assert_close(ratio, ratio[0] * (1 - shares), rtol=1e-12, atol=float(ratio[0]) * 2e-13)
    inner = t[:-1]
    torch.testing.assert_close(process.time_at(process.log_snr(inner)), inner, rtol=0, atol=1e-15)


@every_table
def test_a_zero_terminal_table_begins_as_the_table_that_it_was_made_of(betas: tuple[float, ...]) -> None:
    zeroed = zero_terminal_betas(betas)
    assert zeroed[0] == pytest.approx(betas[0], rel=1e-11)
    alpha, _ = VPTable(betas).alpha_sigma(torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas))
    shifted, _ = VPTable(zeroed).alpha_sigma(torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas))
    # Shifted and scaled: the amplitudes of the two lie on a straight line through (alpha_T, 0).
    slopes = shifted[:-1] / (alpha - alpha[-1])[:-1]
    torch.testing.assert_close(slopes, slopes[:1].expand_as(slopes), rtol=1e-9, atol=0)
    assert zero_terminal_betas(zeroed) == pytest.approx(zeroed, rel=1e-9)


@pytest.mark.parametrize("first", [1e-4, 1e-3])
@pytest.mark.parametrize("last", [0.02, 0.1])
@pytest.mark.parametrize("num", [2, 10, 1000])
def test_a_table_of_betas_has_the_number_and_the_ends_that_were_asked_for(num: int, first: float, last: float) -> None:
    for betas, power in [(linear_betas(num, first, last), 1.0), (scaled_linear_betas(num, first, last), 0.5)]:
        assert len(betas) == num
        assert (betas[0], betas[-1]) == pytest.approx((first, last), rel=1e-12)
        steps = (torch.tensor(betas, dtype=torch.float64) ** power).diff()
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=0, atol=1e-15)
    assert len(cosine_betas(num)) == num
    assert max(cosine_betas(num, largest=0.3)) == 0.3


def test_a_table_is_told_from_another_by_its_betas_however_they_are_given() -> None:
    assert VPTable([0.1, 0.2]) == VPTable((0.1, 0.2)) != VPTable((0.1, 0.3))  # type: ignore[arg-type]
    assert hash(VPTable([0.1, 0.2])) == hash(VPTable((0.1, 0.2)))  # type: ignore[arg-type]
    assert VPTable().betas == linear_betas()
    assert repr(VPTable()) == "VPTable(1000 betas from 0.0001 to 0.02)"


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ((), "at least 2 betas, got 0"),
        ((0.1,), "at least 2 betas, got 1"),
        ((0.1, 1.0), "at least 3 betas if the last is 1, got 2"),
        ((0.0, 0.1), "beta 0 is 0.0"),
        ((0.1, -0.1, 0.2), "beta 1 is -0.1"),
        ((0.1, 1.0, 0.2), "beta 1 is 1.0"),
        ((0.1, 1.5), "beta 1 is 1.5"),
        ((0.1, math.nan), "beta 1 is nan"),
    ],
)
def test_a_table_refuses_betas_that_are_too_few_or_out_of_range(betas: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VPTable(betas)


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 80.0), (-1.0, 80.0), (80.0, 0.002), (2.0, 2.0), (0.002, math.inf), (math.nan, 80.0)]
)
def test_variance_that_explodes_refuses_bounds_that_leave_no_range(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"0 < sigma_min < sigma_max < infinity, got {low} and {high}"):
        VE(low, high)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_shift_or_a_rho_that_is_not_a_finite_number_above_0_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"rho must be a finite number above 0, got {value}"):
        VE(rho=value)
    with pytest.raises(ValueError, match=f"the shift must be a finite number above 0, got {value}"):
        FlowMatching(value)


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


def test_a_process_caches_its_times_correctly_and_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.core.noise.REMEMBERED", 8)
    process = VPCosine()
    for number in range(100):
        t = number / 100
        alpha, sigma = process.alpha_sigma(torch.tensor([t], dtype=torch.float64))
        assert process.amplitudes(t) == (float(alpha), float(sigma))
        assert len(process._remembered) <= 8
    # An integer is also a time.
    assert process.landing(0) == (1.0, 0.0)
    assert process.amplitudes(1) == process.amplitudes(1.0)
