"""The exact denoisers, which other tests use, obey Tweedie's formula, and the exact flow agrees with an integrator."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from halfstep.core.denoiser import Denoiser
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser, data_set_denoiser
from support import clock, gaussian, integrated_flow, interior_times, members, mixture, numbers, pure_noise

every_process = pytest.mark.parametrize("process", members(processes))


def tweedie_eps(denoiser: MixtureDenoiser, x_t: Tensor, t: float) -> Tensor:
    """Compare with E[eps | x_t] = -sigma * d log p(x_t) / d x_t, with the density and its derivative from torch."""
    alpha, sigma = (float(a) for a in denoiser.process.alpha_sigma(clock(t)))
    widths = torch.sqrt(alpha**2 * denoiser.stds**2 + sigma**2)
    components = Independent(Normal(alpha * denoiser.means, widths[:, None].expand_as(denoiser.means)), 1)
    density = MixtureSameFamily(Categorical(logits=denoiser.log_weights), components)
    point = x_t.clone().requires_grad_()
    (score,) = torch.autograd.grad(density.log_prob(point).sum(), point)
    return -sigma * score


@every_process
@pytest.mark.parametrize("t", [0.02, 0.3, 0.7, 0.98])
def test_the_mixture_s_eps_is_the_score_of_its_density(process: NoiseProcess, t: float) -> None:
    denoiser, x_t = mixture(process), process.mix(numbers(64, 2), numbers(64, 2, seed=1), clock(t).expand(64))
    torch.testing.assert_close(denoiser(x_t, t).eps, tweedie_eps(denoiser, x_t, t), rtol=1e-10, atol=1e-10)


@every_process
@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_an_oracle_s_x0_and_eps_add_up_to_x_t(process: NoiseProcess, kind: str) -> None:
    t = interior_times()
    x_t = process.mix(numbers(len(t), 2), numbers(len(t), 2, seed=1), t)
    denoiser: Denoiser = gaussian(process) if kind == "gaussian" else mixture(process)
    x0, eps = denoiser(x_t, t)
    torch.testing.assert_close(process.mix(x0, eps, t), x_t, rtol=0, atol=1e-12)


@every_process
def test_a_gaussian_is_a_mixture_of_one(process: NoiseProcess) -> None:
    t = interior_times()
    x_t = process.mix(numbers(len(t), 2, 3), numbers(len(t), 2, 3, seed=1), t)
    mean = numbers(2, 3, seed=2)
    one = MixtureDenoiser(process, mean[None], std=0.7)(x_t, t)
    torch.testing.assert_close(GaussianDenoiser(process, mean, 0.7)(x_t, t), one, rtol=0, atol=1e-11)


@every_process
@pytest.mark.parametrize("s", [0.5, 0.001, 0.0])
def test_the_gaussian_flow_is_where_an_independent_integrator_arrives(process: NoiseProcess, s: float) -> None:
    """The error is at most 1e-11. At s = 0, it is the square of the process's remaining noise, where the integrator
    stops."""
    denoiser, x_1 = gaussian(process), pure_noise(process, 16, 2)
    alpha, sigma = process.alpha_sigma(clock(1e-6))
    error = 1e-11 if s else 1e-11 + 8 * float(sigma / alpha) ** 2
    torch.testing.assert_close(denoiser.flow(x_1, 1.0, s), integrated_flow(denoiser, x_1, s), rtol=0, atol=error)


@every_process
def test_the_gaussian_flow_composes_and_can_be_run_backwards(process: NoiseProcess) -> None:
    denoiser, x_t = gaussian(process), numbers(5, 2)
    t, m, s = clock(1, 0.9, 0.5, 0.3, 0.2), clock(0.7, 0.4, 0.4, 0.2, 0.15), clock(0, 0.3, 0.1, 0, 0.1)
    direct = denoiser.flow(x_t, t, s)
    torch.testing.assert_close(denoiser.flow(denoiser.flow(x_t, t, m), m, s), direct, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(denoiser.flow(denoiser.flow(x_t, t, m), m, t), x_t, rtol=1e-12, atol=1e-13)


def test_the_gaussian_flow_carries_the_law_of_the_noise_to_the_law_of_the_data() -> None:
    """Quantiles map to quantiles: z deviations at t = 1 are z deviations at t = 0."""
    denoiser, deviations = gaussian(VPCosine()), torch.linspace(-3, 3, 13, dtype=torch.float64)[:, None]
    alpha, sigma = VPCosine().alpha_sigma(clock(1.0))
    spread = torch.sqrt(alpha**2 * 0.25 + sigma**2)
    torch.testing.assert_close(
        denoiser.flow(alpha * 0.3 + spread * deviations, 1.0, 0.0),
        0.3 + 0.5 * deviations,
        rtol=1e-13,
        atol=1e-13,
    )


def test_a_data_set_s_x0_is_the_posterior_mean_of_its_points() -> None:
    process, points = VPCosine(), numbers(7, 3, 2)
    x_t, t = numbers(4, 3, 2, seed=1), clock(0.2, 0.5, 0.8, 1.0)
    alpha, sigma = process.alpha_sigma(t)
    for row in range(4):
        log_likelihood = Normal(alpha[row] * points, sigma[row]).log_prob(x_t[row]).flatten(1).sum(1)
        odds = (log_likelihood - log_likelihood.max()).exp()
        mean = torch.einsum("k,kcw->cw", odds / odds.sum(), points)
        torch.testing.assert_close(data_set_denoiser(process, points)(x_t, t).x0[row], mean, rtol=1e-10, atol=1e-12)


@every_process
def test_close_to_the_data_a_data_set_s_x0_is_the_nearest_point(process: NoiseProcess) -> None:
    points = numbers(5, 2)
    x_t = process.mix(points, numbers(5, 2, seed=1), clock(0.001).expand(5))
    torch.testing.assert_close(data_set_denoiser(process, points)(x_t, 0.001).x0, points, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "mixture"])
def test_an_oracle_returns_its_rounded_float64_output_for_float32(kind: str) -> None:
    process = VPCosine()
    denoiser: Denoiser = gaussian(process) if kind == "gaussian" else mixture(process)
    x_t = numbers(64, 2).float()
    t = interior_times(64)
    for single, double in zip(denoiser(x_t, t), denoiser(x_t.double(), t), strict=True):
        assert single.dtype == torch.float32
        assert torch.equal(single, double.float())


@pytest.mark.parametrize(
    ("std", "weights"), [(-0.1, None), (0.1, [1.0, 0.0]), (0.1, [1.0, -1.0]), ([0.1, -1e-9], None)]
)
def test_a_mixture_refuses_negative_widths_and_weights_that_are_not_positive(
    std: float | list[float], weights: list[float] | None
) -> None:
    with pytest.raises(ValueError, match="at least 0, and weights must be above 0"):
        MixtureDenoiser(
            VPCosine(),
            numbers(2, 2),
            torch.tensor(std, dtype=torch.float64),
            None if weights is None else clock(*weights),
        )


def test_a_mixture_s_weights_are_shares() -> None:
    x_t, means = numbers(8, 2), numbers(2, 2, seed=1)
    first, second = (
        MixtureDenoiser(VPCosine(), means, 0.2, weights)(x_t, 0.6).x0
        for weights in (clock(1, 3), clock(math.pi, 3 * math.pi))
    )
    torch.testing.assert_close(first, second, rtol=1e-13, atol=1e-13)
