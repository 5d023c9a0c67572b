"""A weighting is one loss seen from several spaces."""

import pytest
import torch
from torch import Tensor

from halfstep.core.noise import VPCosine
from halfstep.core.prediction import (
    SNR,
    X0,
    Constant,
    Eps,
    Prediction,
    SNRPlusOne,
    TruncatedSNR,
    V,
    Weighting,
    weightings,
)
from halfstep.objectives import weighted_x0_loss
from support import interior_times, members, numbers

every_weighting = pytest.mark.parametrize("weighting", members(weightings))

SHAPE = (3, 2)
TIMES = interior_times(255)
PROCESS = VPCosine()


def two_guesses() -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t at TIMES and two guesses of its x0."""
    count = len(TIMES)
    x0, eps, guess = (numbers(count, *SHAPE, seed=seed) for seed in range(3))
    return PROCESS.mix(x0, eps, TIMES), x0, guess


def squared_error_in(space: Prediction) -> Tensor:
    """Return the mean square difference of the two guesses in the given space, `[batch]`."""
    alpha, sigma = PROCESS.alpha_sigma(TIMES)
    x_t, x0, guess = two_guesses()
    seen = [space.target(x, X0().denoised(x, x_t, alpha, sigma).eps, alpha, sigma) for x in (x0, guess)]
    return (seen[0] - seen[1]).square().flatten(1).mean(1)


def loss_under(weighting: Weighting) -> Tensor:
    _, x0, guess = two_guesses()
    return weighted_x0_loss(x0, guess, PROCESS.log_snr(TIMES), weighting)


@pytest.mark.parametrize(
    ("weighting", "space"),
    [
        pytest.param(Constant(), X0(), id="constant-x0"),
        pytest.param(SNR(), Eps(), id="snr-eps"),
        pytest.param(SNRPlusOne(), V(), id="snr_plus_one-v"),
    ],
)
def test_the_weighted_x0_loss_is_the_squared_error_in_another_space(weighting: Weighting, space: Prediction) -> None:
    torch.testing.assert_close(loss_under(weighting), squared_error_in(space), rtol=1e-10, atol=0)


def test_the_truncated_snr_loss_is_the_larger_of_the_errors_in_x0_and_eps() -> None:
    x0_error, eps_error = squared_error_in(X0()), squared_error_in(Eps())
    assert bool((x0_error > eps_error).any())
    assert bool((x0_error < eps_error).any())
    torch.testing.assert_close(loss_under(TruncatedSNR()), torch.maximum(x0_error, eps_error), rtol=1e-10, atol=0)


@every_weighting
def test_a_weight_is_a_float64_number_of_at_least_0_that_depends_on_its_own_log_snr_only(
    weighting: Weighting,
) -> None:
    log_snr = torch.linspace(-20, 20, 401, dtype=torch.float64)
    weights = weighting(log_snr)
    assert weights.dtype == torch.float64
    assert weights.shape == log_snr.shape
    assert bool(((weights >= 0) & torch.isfinite(weights)).all())
    assert torch.equal(weighting(log_snr.flip(0)), weights.flip(0))
    assert all(float(weighting(level)) == weight for level, weight in zip(log_snr[::40], weights[::40], strict=True))


@every_weighting
def test_a_float32_loss_is_the_float64_one_rounded(weighting: Weighting) -> None:
    """The weight is computed in float64 and multiplied by the loss once, so even e^20 costs only a few roundings."""
    _, x0, guess = two_guesses()
    x0, guess = x0.float(), guess.float()
    log_snr = PROCESS.log_snr(TIMES)
    single = weighted_x0_loss(x0, guess, log_snr, weighting)
    assert single.dtype == torch.float32
    double = weighted_x0_loss(x0.double(), guess.double(), log_snr, weighting)
    torch.testing.assert_close(single.double(), double, rtol=1e-6, atol=0)


def test_the_loss_is_the_mean_over_the_entries_of_a_sample_not_their_sum() -> None:
    log_snr = torch.zeros(4, dtype=torch.float64)
    for shape in [(4,), (4, 1), (4, 3), (4, 3, 5, 2)]:
        zeros = torch.zeros(shape, dtype=torch.float64)
        assert torch.equal(weighted_x0_loss(zeros + 3, zeros, log_snr, Constant()), torch.full((4,), 9.0).double())
