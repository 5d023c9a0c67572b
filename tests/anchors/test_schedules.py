"""Our noise levels and predictions equal those of diffusers' schedulers and networks of the same name.

Diffusers stores its tables in float32, so the tolerances are the rounding errors of their construction.
"""

from typing import Any, Final

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

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
from halfstep.core.prediction import EDM, FlowVelocity, V
from support import clock, interior_times, numbers

UNEVEN: Final = tuple((0.02 + 0.3 * numbers(17).abs()).clamp(max=0.9).tolist())

TABLES: Final[dict[str, tuple[tuple[float, ...], dict[str, Any]]]] = {
    "linear": (linear_betas(), {}),
    "linear_of_64": (linear_betas(64, 0.001, 0.2), {"beta_start": 0.001, "beta_end": 0.2}),
    "scaled_linear": (
        scaled_linear_betas(),
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    ),
    "squaredcos_cap_v2": (cosine_betas(), {"beta_schedule": "squaredcos_cap_v2"}),
    "squaredcos_cap_v2_of_50": (cosine_betas(50), {"beta_schedule": "squaredcos_cap_v2"}),
    "trained_betas": (UNEVEN, {"trained_betas": list(UNEVEN)}),
}
every_table = pytest.mark.parametrize(("betas", "settings"), TABLES.values(), ids=TABLES)


def levels(betas: tuple[float, ...]) -> Tensor:
    """Return the times of a table's levels: timestep k is at (k + 1) / T."""
    return torch.arange(1, len(betas) + 1, dtype=torch.float64) / len(betas)


def single_roundings(betas: tuple[float, ...]) -> Tensor:
    """Return the largest possible error of the logarithms of diffusers' products. Each level adds the rounding of beta
    and of 1 - beta, both up to 2^-24 of 1, and that of a product."""
    return (2**-24 * (1 + 2 / (1 - torch.tensor(betas, dtype=torch.float64)))).cumsum(0)


@pytest.mark.parametrize("scheduler", [DDPMScheduler, DDIMScheduler])
@every_table
def test_a_table_has_the_powers_of_signal_of_diffusers_at_its_timesteps(
    betas: tuple[float, ...], settings: dict[str, Any], scheduler: Any
) -> None:
    theirs = scheduler(num_train_timesteps=len(betas), **settings).alphas_cumprod
    assert theirs.dtype == torch.float32
    alpha, sigma = VPTable(betas).alpha_sigma(levels(betas))
    allowed = single_roundings(betas)
    assert bool(((theirs.double() / alpha**2).log().abs() <= allowed).all())
    # Signal and noise power sum to 1, to the precision of diffusers' 1 - alphas_cumprod.
    assert bool(((1 - theirs.double() - sigma**2).abs() <= allowed).all())
    # An error of one timestep would be detected everywhere: the next level is further away than the tolerance.
    assert bool(((alpha[1:] / alpha[:-1]).log().abs() * 2 > 4 * allowed[1:]).all())


@every_table
def test_between_its_levels_a_table_interpolates_the_log_of_diffusers_ratio(
    betas: tuple[float, ...], settings: dict[str, Any]
) -> None:
    """Compare with numpy's interpolation over times and log-SNRs from diffusers' betas, in float64."""
    scheduler = DDPMScheduler(num_train_timesteps=len(betas), **settings)
    power = (1 - scheduler.betas.double()).cumprod(0)
    t = levels(betas)[0] + (1 - levels(betas)[0]) * interior_times(997)
    expected = np.interp(t.numpy(), levels(betas).numpy(), torch.logit(power).numpy())
    # Near the data, 1 - power is 1e-4 with the rounding of 1, so the log-SNR is off by 2^-53 times 1e4 per level.
    found = VPTable(tuple(scheduler.betas.double().tolist())).log_snr(t)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=2e-11)


@every_table
def test_zero_terminal_betas_are_diffusers_rescaled_ones(betas: tuple[float, ...], settings: dict[str, Any]) -> None:
    """Use float64, in which their function computes if it receives float64. The last beta is 1 to the last bit."""
    ours = torch.tensor(zero_terminal_betas(betas), dtype=torch.float64)
    theirs = rescale_zero_terminal_snr(torch.tensor(betas, dtype=torch.float64))
    assert ours[-1] == theirs[-1] == 1
    # The last levels are differences of numbers near 1 that agree up to alpha_T, with an error of 2^-53 relative to
    # them.
    alpha, _ = VPTable(tuple(ours.tolist())).alpha_sigma(levels(betas))
    allowed = 2**-53 * len(betas) * torch.cat([torch.ones(1).double(), 1 / alpha[:-1]])
    assert bool(((ours - theirs).abs() <= allowed + 1e-15).all())
    held = DDIMScheduler(num_train_timesteps=len(betas), rescale_betas_zero_snr=True, **settings)
    # In their float32, the table is accumulated, stretched by at most 1 + 2 alpha_T, and accumulated again.
    allowed = 2 * single_roundings(betas)[:-1] + single_roundings(tuple(ours[:-1].tolist()))
    assert bool(((held.alphas_cumprod.double() - alpha**2)[:-1].abs() <= allowed).all())
    assert float(held.alphas_cumprod[-1]) == pytest.approx(0, abs=2**-24)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5, 12.0])
def test_the_shift_of_flow_matching_is_diffusers(shift: float) -> None:
    """Allow the five roundings of 2^-24 in their formula. Their timesteps decrease, and the k-th from the end is t = k
    / T."""
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    t = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    alpha, sigma = FlowMatching(shift).alpha_sigma(t)
    torch.testing.assert_close(scheduler.sigmas.double(), sigma, rtol=5 * 2**-24, atol=0)
    x0, eps = numbers(1, 3).float(), numbers(1, 3, seed=1).float()
    for index in (1, 250, 999):
        theirs = scheduler.scale_noise(x0, scheduler.timesteps[index][None], eps)
        ours = FlowMatching(shift).mix(x0, eps, t[index][None])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert float(alpha[index] + sigma[index]) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("num_steps", [2, 18, 256])
@pytest.mark.parametrize(("low", "high", "rho"), [(0.002, 80.0, 7.0), (0.02, 40.0, 3.0)])
def test_the_levels_of_exploding_variance_are_karras_s_of_diffusers(
    low: float, high: float, rho: float, num_steps: int
) -> None:
    """Computed in float64 and rounded once. Their n levels go from sigma_max to sigma_min: ours at t = 1 to t = 0."""
    scheduler = EDMEulerScheduler(sigma_min=low, sigma_max=high, rho=rho)
    scheduler.set_timesteps(num_steps)
    alpha, sigma = VE(low, high, rho).alpha_sigma(torch.linspace(1, 0, num_steps, dtype=torch.float64))
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), sigma, rtol=2**-24 + 1e-14, atol=0)
    assert bool((alpha == 1).all())


def test_the_defaults_are_those_of_karras_and_of_ho() -> None:
    assert (VE().sigma_min, VE().sigma_max, VE().rho) == tuple(
        EDMEulerScheduler().config[name] for name in ("sigma_min", "sigma_max", "rho")
    )
    assert EDM().sigma_data == EDMEulerScheduler().config["sigma_data"]
    config = DDPMScheduler().config
    assert VPTable() == VPTable(linear_betas(config["num_train_timesteps"], config["beta_start"], config["beta_end"]))


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize(
    "process",
    [pytest.param(VE(), id="ve"), pytest.param(VPCosine(), id="vp_cosine"), pytest.param(FlowMatching(), id="flow")],
)
def test_an_output_of_edm_means_the_x0_that_diffusers_makes_of_it(process: NoiseProcess, sigma_data: float) -> None:
    """Test any output, with x_t / alpha as the sample in their scaling."""
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    t, x_t, output = interior_times(97), numbers(97, 2), numbers(97, 2, seed=1)
    alpha, sigma = process.alpha_sigma(t)
    ratio = (sigma / alpha)[:, None]
    theirs = scheduler.precondition_outputs(x_t / alpha[:, None], output, ratio)
    ours = EDM(sigma_data).denoised(output, x_t, alpha, sigma)
    torch.testing.assert_close(ours.x0, theirs, rtol=1e-12, atol=1e-12)
    # The same is true for the output of a perfect network, whose input and output they scale inversely.
    x0, eps = numbers(97, 2, seed=2), numbers(97, 2, seed=3)
    perfect = EDM(sigma_data).target(x0, eps, alpha, sigma)
    back = scheduler.precondition_outputs(x0 + ratio * eps, perfect, ratio)
    assert bool(((back - x0).abs() <= 1e-14 * (1 + ratio)).all())


def test_an_output_of_edm_is_x0_over_sigma_data_where_no_signal_is_left() -> None:
    output, x_t = numbers(1, 2), numbers(1, 2, seed=1)
    found = EDM(0.4).denoised(output, x_t, *FlowMatching().alpha_sigma(clock(1.0)))
    torch.testing.assert_close(found.x0, 0.4 * output, rtol=1e-15, atol=0)
    torch.testing.assert_close(found.eps, x_t, rtol=1e-15, atol=0)


def test_edm_for_unit_data_is_minus_v_on_the_circle() -> None:
    x0, eps = numbers(97, 2), numbers(97, 2, seed=1)
    amplitudes = VPCosine().alpha_sigma(interior_times(97))
    edm, v = (prediction.target(x0, eps, *amplitudes) for prediction in (EDM(1.0), V()))
    torch.testing.assert_close(edm, -v, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_velocity_is_the_derivative_of_x_t_along_the_straight_path(shift: float) -> None:
    """Compare with dx_t / dsigma, with both derivatives in time by autograd; without a shift, sigma is the time."""
    process, t = FlowMatching(shift), interior_times(97).requires_grad_()
    x0, eps = numbers(97), numbers(97, seed=1)
    alpha, sigma = process.alpha_sigma(t)
    (x_slope,) = torch.autograd.grad(process.mix(x0, eps, t).sum(), t)
    (sigma_slope,) = torch.autograd.grad(sigma.sum(), t)
    velocity = FlowVelocity().target(x0, eps, alpha.detach(), sigma.detach())
    torch.testing.assert_close(velocity, x_slope / sigma_slope, rtol=1e-12, atol=1e-12)
    if shift == 1:
        torch.testing.assert_close(velocity, x_slope, rtol=1e-12, atol=1e-12)


def test_diffusers_step_of_flow_matching_with_our_velocity_stays_on_the_path() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    scheduler.set_timesteps(8)
    x0, eps = numbers(1, 3).float(), numbers(1, 3, seed=1).float()
    velocity = FlowVelocity().target(x0, eps, clock(0.5), clock(0.5))
    x_t = eps
    for index, timestep in enumerate(scheduler.timesteps):
        x_t = scheduler.step(velocity, timestep, x_t).prev_sample
        after = scheduler.sigmas[index + 1].double()
        t = FlowMatching().time_at(2 * torch.log((1 - after) / after))[None]
        torch.testing.assert_close(x_t, FlowMatching().mix(x0, eps, t), rtol=0, atol=2e-6)
