"""(x0, eps) survive every prediction and every pair of predictions, on every process."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.noise import VE, NoiseProcess, VPCosine, processes
from halfstep.core.prediction import EDM, X0, Both, Prediction, eps_from_x0, predictions
from support import clock, interior_times, members, numbers

every_process = pytest.mark.parametrize("process", members(processes))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))

# With three channels, a two-output prediction that is split along another axis or unevenly fails.
SHAPE = (3, 2, 2)


@every_process
@every_prediction
@pytest.mark.parametrize("second", members(predictions))
def test_x0_and_eps_survive_every_pair_of_predictions(
    process: NoiseProcess, prediction: Prediction, second: Prediction
) -> None:
    t = interior_times(999)
    alpha, sigma = process.alpha_sigma(t)
    x0, eps = numbers(len(t), *SHAPE), numbers(len(t), *SHAPE, seed=1)
    x_t = process.mix(x0, eps, t)
    first = prediction.denoised(prediction.target(x0, eps, alpha, sigma), x_t, alpha, sigma)
    again = second.denoised(second.target(first.x0, first.eps, alpha, sigma), x_t, alpha, sigma)
    # A conversion amplifies a rounding error of 2^-53 by at most 1 / alpha or 1 / sigma, below 10^3 at these times.
    for kept in (first, again):
        torch.testing.assert_close(kept.x0, x0, rtol=0, atol=2e-11)
        torch.testing.assert_close(kept.eps, eps, rtol=0, atol=2e-11)


@every_process
@every_prediction
def test_an_output_survives_denoising_and_conversion_back_to_a_target(
    process: NoiseProcess, prediction: Prediction
) -> None:
    """Test the inverse in the other order: for one output, denoised() loses and adds nothing."""
    if prediction.channels != 1:
        pytest.skip("two outputs are blended for two unknowns: several outputs mean the same (x0, eps)")
    t = interior_times(999)
    alpha, sigma = process.alpha_sigma(t)
    output, x_t = numbers(len(t), *SHAPE), numbers(len(t), *SHAPE, seed=1)
    x0, eps = prediction.denoised(output, x_t, alpha, sigma)
    torch.testing.assert_close(prediction.target(x0, eps, alpha, sigma), output, rtol=0, atol=2e-11)


@every_process
@every_prediction
def test_x0_and_eps_of_any_output_add_up_to_x_t(process: NoiseProcess, prediction: Prediction) -> None:
    """An imperfect network also splits x_t into alpha x0 + sigma eps; otherwise DDIM would leave the trajectory."""
    t = interior_times(999)
    alpha, sigma = process.alpha_sigma(t)
    x_t = numbers(len(t), *SHAPE)
    output = numbers(len(t), prediction.channels * SHAPE[0], *SHAPE[1:], seed=1)
    x0, eps = prediction.denoised(output, x_t, alpha, sigma)
    torch.testing.assert_close(process.mix(x0, eps, t), x_t, rtol=0, atol=1e-12)


@every_prediction
def test_channels_says_how_many_outputs_a_channel_of_data_has(prediction: Prediction) -> None:
    x0 = numbers(5, *SHAPE)
    target = prediction.target(x0, x0, *VPCosine().alpha_sigma(interior_times(5)))
    assert target.shape == (5, prediction.channels * SHAPE[0], *SHAPE[1:])


@every_prediction
@given(row=st.integers(0, 7), scale=st.floats(0.1, 10))
def test_each_sample_is_denoised_at_its_own_time(prediction: Prediction, row: int, scale: float) -> None:
    t = interior_times(8)
    alpha, sigma = VPCosine().alpha_sigma(t)
    x_t = scale * numbers(8, *SHAPE)
    output = scale * numbers(8, prediction.channels * SHAPE[0], *SHAPE[1:], seed=1)
    batch, one = prediction.denoised(output, x_t, alpha, sigma), slice(row, row + 1)
    alone = prediction.denoised(output[one], x_t[one], alpha[one], sigma[one])
    for together, apart in zip(batch, alone, strict=True):
        torch.testing.assert_close(together[one], apart, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_predicted_x0_is_the_output_itself_to_the_last_bit(dtype: torch.dtype) -> None:
    t = torch.linspace(0, 1, 8193, dtype=torch.float64)
    output, x_t = numbers(8193, 2).to(dtype), numbers(8193, 2, seed=1).to(dtype)
    assert torch.equal(X0().denoised(output, x_t, *VPCosine().alpha_sigma(t)).x0, output)


def test_both_trusts_its_eps_head_near_the_data_and_its_x0_head_near_the_noise() -> None:
    """Each head counts where it is better conditioned: an error of 1 in a head moves x0 by at most 1/2, and by almost
    nothing at the end where it is worse conditioned."""
    process, both = VPCosine(), Both()
    alpha, sigma = process.alpha_sigma(clock(0.001, 0.5, 0.999))
    x0, eps = numbers(3, *SHAPE), numbers(3, *SHAPE, seed=1)
    x_t = process.mix(x0, eps, clock(0.001, 0.5, 0.999))
    wrong_x0 = both.denoised(torch.cat([x0 + 1, eps], 1), x_t, alpha, sigma).x0 - x0
    wrong_eps = both.denoised(torch.cat([x0, eps + 1], 1), x_t, alpha, sigma).x0 - x0
    near_data, middle, near_noise = wrong_x0.abs().flatten(1).amax(1)
    assert near_data < 1e-5
    assert abs(middle - 0.5) < 1e-9
    assert abs(near_noise - 1) < 1e-5
    assert bool((wrong_eps.abs() <= 0.5 + 1e-12).all())


@every_process
def test_eps_from_x0_is_the_noise_that_was_mixed_in(process: NoiseProcess) -> None:
    t = interior_times(999)
    x0, eps = numbers(len(t), *SHAPE), numbers(len(t), *SHAPE, seed=1)
    found = eps_from_x0(process.mix(x0, eps, t), x0, *process.alpha_sigma(t))
    torch.testing.assert_close(found, eps, rtol=0, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, -0.5, math.inf, math.nan])
def test_edm_refuses_data_whose_deviation_is_not_a_finite_number_above_0(value: float) -> None:
    with pytest.raises(ValueError, match=f"sigma_data must be a finite number above 0, got {value}"):
        EDM(value)


@pytest.mark.parametrize("sigma_data", [0.1, 0.5, 1.0, 3.0])
def test_what_edm_s_network_puts_out_has_unit_spread_for_data_of_its_deviation(sigma_data: float) -> None:
    """v does not depend on x_t: the two conditions that define its coefficients, for independent x0 and eps."""
    for process in (VPCosine(), VE()):
        alpha, sigma = process.alpha_sigma(interior_times())
        ones = torch.ones(97, 1, dtype=torch.float64)
        a = EDM(sigma_data).target(ones, 0 * ones, alpha, sigma)
        b = EDM(sigma_data).target(0 * ones, ones, alpha, sigma)
        torch.testing.assert_close((sigma_data * a) ** 2 + b**2, ones, rtol=0, atol=1e-14)
        correlation = a[:, 0] * alpha * sigma_data**2 + b[:, 0] * sigma
        assert float((correlation / torch.hypot(alpha * sigma_data, sigma)).abs().max()) < 1e-15
