"""The conversions of docs/pages/notation.md agree with diffusers' schedulers and with derivatives of densities."""

import math
from typing import Final

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from halfstep.core.grids import uniform_times
from halfstep.core.noise import VPCosine
from halfstep.core.oracle import GaussianDenoiser
from halfstep.core.prediction import Denoised, Eps, LinearPrediction, V
from halfstep.objectives import halving_target
from support import clock, gaussian, interior_times, numbers, pure_noise, toy_denoiser

TABLE: Final = 1024
PROCESS: Final = VPCosine()
TIMES: Final = torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE


def betas() -> Tensor:
    """Return the cosine process in diffusers' form: the share of signal power lost from one timestep to the next."""
    power = PROCESS.alpha_sigma(torch.cat([clock(0.0), TIMES]))[0] ** 2
    return 1 - power[1:] / power[:-1]


def noisy_rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return x0 and eps `[97, 2]`, and the times of the rows, away from 0 and 1."""
    return 0.5 * numbers(97, 2), numbers(97, 2, seed=1), interior_times(97)


def test_diffusers_cumulates_its_betas_to_alpha_squared_at_timestep_t_times_table_minus_1() -> None:
    """Compare with the betas, which diffusers stores in float32: near the data, their sum is mostly rounding."""
    scheduler = DDPMScheduler(TABLE, trained_betas=betas().tolist())
    alpha, sigma = PROCESS.alpha_sigma(TIMES)
    timestep = (TABLE * TIMES - 1).round().long()
    known = TIMES > 0.1
    theirs = scheduler.alphas_cumprod[timestep].double()
    torch.testing.assert_close(theirs[known][:-1], (alpha**2)[known][:-1], rtol=2e-4, atol=1e-9)
    torch.testing.assert_close(1 - theirs[known], (sigma**2)[known], rtol=1e-4, atol=0)


def test_diffusers_own_cosine_table_puts_time_t_at_timestep_t_times_table_minus_1() -> None:
    """`squaredcos_cap_v2` samples a function of continuous time, so it shows which time a timestep stands for.

    The function is the cosine of Nichol and Dhariwal, shifted by 0.008, not our cosine process.
    """
    theirs = DDPMScheduler(TABLE, beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
    amplitude = torch.cos((TIMES + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)
    torch.testing.assert_close(theirs[:-8], (amplitude**2)[:-8], rtol=1e-3, atol=1e-9)
    assert float((theirs.sqrt() - PROCESS.alpha_sigma(TIMES)[0]).abs().max()) > 3e-3


def test_noise_is_added_and_velocity_defined_as_in_diffusers() -> None:
    scheduler = DDPMScheduler(TABLE)
    scheduler.alphas_cumprod = PROCESS.alpha_sigma(TIMES)[0] ** 2
    x0, eps, timestep = numbers(64, 3), numbers(64, 3, seed=1), torch.arange(15, TABLE, 16)
    t = (timestep + 1) / TABLE
    ours = PROCESS.mix(x0, eps, t.double())
    torch.testing.assert_close(scheduler.add_noise(x0, eps, timestep), ours, rtol=0, atol=1e-12)
    velocity = V().target(x0, eps, *PROCESS.alpha_sigma(t.double()))
    torch.testing.assert_close(scheduler.get_velocity(x0, eps, timestep), velocity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_steps", [2**k for k in range(11)])
def test_the_uniform_grid_is_diffusers_trailing_on_a_table_of_a_power_of_two(num_steps: int) -> None:
    scheduler = DDIMScheduler(TABLE, timestep_spacing="trailing")
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == (TABLE * uniform_times(num_steps)[:-1] - 1).tolist()


@pytest.mark.parametrize(
    ("spacing", "num_steps", "visited"),
    [
        ("leading", 1, [0]),
        ("leading", 4, [750, 500, 250, 0]),
        ("linspace", 1, [0]),
        ("linspace", 4, [999, 666, 333, 0]),
        ("trailing", 1, [999]),
        ("trailing", 4, [999, 749, 499, 249]),
    ],
)
def test_the_other_spacings_of_diffusers_are_what_the_page_says(
    spacing: str, num_steps: int, visited: list[int]
) -> None:
    scheduler = DDIMScheduler(1000, timestep_spacing=spacing)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == visited


def test_trailing_on_a_table_of_1000_lands_beside_the_next_timestep() -> None:
    """With x0 = 0, a DDIM step leaves only the amplitude of its noise, which gives the timestep at which it landed."""
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing", clip_sample=False, prediction_type="sample")
    scheduler.set_timesteps(64)
    levels, visited = scheduler.alphas_cumprod.double(), scheduler.timesteps.tolist()
    landings = []
    for timestep in visited[:-1]:
        noise = (1 - levels[timestep]).sqrt()[None]
        landed = scheduler.step(torch.zeros_like(noise), timestep, noise).prev_sample
        landings.append(int(((1 - levels).sqrt() - landed).abs().argmin()))
    assert landings == [timestep - 15 for timestep in visited[:-1]]
    astray = [landing - asked for landing, asked in zip(landings, visited[1:], strict=True)]
    assert set(astray) == {0, 1}
    assert sum(astray) == 39


def test_euler_s_sigmas_are_ratios_and_its_input_is_scaled_back_to_x_t() -> None:
    x0, eps = numbers(1, 3).float(), numbers(1, 3, seed=1).float()
    for index in range(1, 8):
        scheduler = EulerDiscreteScheduler(TABLE, trained_betas=betas().tolist(), timestep_spacing="trailing")
        scheduler.set_timesteps(8)
        timestep = scheduler.timesteps[index]
        t = (timestep.double() + 1) / TABLE
        alpha, sigma = PROCESS.alpha_sigma(t)
        scaled = scheduler.add_noise(x0, eps, timestep[None])
        torch.testing.assert_close(scaled, x0 + float(sigma / alpha) * eps, rtol=1e-4, atol=1e-5)
        ours = PROCESS.mix(x0, eps, t[None])
        torch.testing.assert_close(scheduler.scale_model_input(scaled, timestep), ours, rtol=1e-4, atol=1e-5)


def test_dpm_solver_s_lambda_is_half_of_log_snr() -> None:
    scheduler = DPMSolverMultistepScheduler(TABLE, trained_betas=betas().tolist())
    known = slice(TABLE // 10, TABLE - 1)
    ours = PROCESS.log_snr(TIMES)[known] / 2
    torch.testing.assert_close(scheduler.lambda_t.double()[known], ours, rtol=0, atol=2e-4)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 1.7])
def test_edm_s_raw_output_is_the_linear_prediction_of_the_page(sigma_data: float) -> None:
    """The page's F, converted with diffusers' preconditioning at ratio sigma / alpha, is x0."""
    scheduler = EDMEulerScheduler(sigma_data=sigma_data)
    x0, eps, times = noisy_rows()
    for row, t in enumerate(times):
        alpha, sigma = PROCESS.alpha_sigma(t)
        x_t = alpha * x0[row] + sigma * eps[row]
        raw = (sigma * x0[row] / sigma_data - alpha * sigma_data * eps[row]) / torch.sqrt(
            sigma**2 + (alpha * sigma_data) ** 2
        )
        ratio = sigma / alpha
        found = scheduler.precondition_outputs(x_t / alpha, raw, ratio)
        torch.testing.assert_close(found, x0[row], rtol=0, atol=1e-12 * float(1 + ratio))
        torch.testing.assert_close(scheduler.precondition_noise(ratio), -PROCESS.log_snr(t) / 8, rtol=0, atol=1e-13)


def test_edm_with_unit_data_is_v_prediction_on_the_circle_up_to_sign() -> None:
    x0, eps, times = noisy_rows()
    for row, t in enumerate(times):
        alpha, sigma = PROCESS.alpha_sigma(t)
        x_t = alpha * x0[row] + sigma * eps[row]
        v = V().target(x0[row : row + 1], eps[row : row + 1], alpha[None], sigma[None])[0]
        for kind, raw in (("epsilon", -v), ("v_prediction", v)):
            scheduler = EDMEulerScheduler(sigma_data=1.0, prediction_type=kind)
            ratio = sigma / alpha
            torch.testing.assert_close(scheduler.precondition_inputs(x_t / alpha, ratio), x_t, rtol=0, atol=1e-13)
            found = scheduler.precondition_outputs(x_t / alpha, raw, ratio)
            torch.testing.assert_close(found, x0[row], rtol=0, atol=1e-12 * float(1 + ratio))


def test_flow_matching_is_x_t_over_alpha_plus_sigma_with_velocity_eps_minus_x0() -> None:
    """On a straight path with the right velocity, diffusers' step from any time to the next stays on the path."""
    scheduler = FlowMatchEulerDiscreteScheduler(TABLE)
    scheduler.set_timesteps(8)
    assert scheduler.timesteps.tolist() == (TABLE * scheduler.sigmas[:-1]).tolist()
    x0, eps = numbers(1, 3).float(), numbers(1, 3, seed=1).float()
    # The first time is 1, which the clipped process does not reach: log_snr would be -infinity there.
    for index in range(1, 8):
        tau = scheduler.sigmas[index].double()
        t = PROCESS.time_at(2 * torch.log((1 - tau) / tau))
        alpha, sigma = PROCESS.alpha_sigma(t)
        x_t = PROCESS.mix(x0, eps, t[None])
        theirs = scheduler.scale_noise(x0, scheduler.timesteps[index][None], eps)
        torch.testing.assert_close(x_t / float(alpha + sigma), theirs, rtol=0, atol=1e-6)
        v = V().target(x0, eps, alpha[None], sigma[None])
        velocity = float(sigma - alpha) * x_t + float(sigma + alpha) * v
        after = float(scheduler.sigmas[index + 1])
        moved = scheduler.step(velocity, scheduler.timesteps[index], theirs).prev_sample
        torch.testing.assert_close(moved, (1 - after) * x0 + after * eps, rtol=0, atol=1e-6)


def test_the_shift_of_flow_matching_lowers_log_snr_by_twice_its_logarithm() -> None:
    plain, shifted = (FlowMatchEulerDiscreteScheduler(TABLE, shift=shift).sigmas.double()[1:] for shift in (1.0, 3.0))

    def log_snr(tau: Tensor) -> Tensor:
        return 2 * torch.log((1 - tau) / tau)

    torch.testing.assert_close(log_snr(shifted), log_snr(plain) - 2 * math.log(3), rtol=0, atol=3e-4)


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_the_score_is_minus_eps_over_sigma(std: float) -> None:
    """Compare also with (x0 - x_t / alpha) / ratio^2 in EDM's scaling: gradients of the log densities, by autograd."""
    x_t, t = numbers(97, 2), interior_times(97)
    alpha, sigma = (a[:, None] for a in PROCESS.alpha_sigma(t))
    x0, eps = GaussianDenoiser(PROCESS, mean=0.3, std=std)(x_t, t)

    def score(at: Tensor, mean: Tensor | float, deviation: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        density = torch.distributions.Normal(mean, deviation).log_prob(at).sum()
        return torch.autograd.grad(density, at)[0]

    ours = score(x_t, 0.3 * alpha, torch.sqrt((alpha * std) ** 2 + sigma**2))
    torch.testing.assert_close(-eps / sigma, ours, rtol=1e-11, atol=1e-11)
    ratio = sigma / alpha
    edm = score(x_t / alpha, 0.3, torch.sqrt(std**2 + ratio**2))
    torch.testing.assert_close((x0 - x_t / alpha) / ratio**2, edm, rtol=1e-9, atol=1e-9)


def test_an_error_in_x0_weighs_in_each_space_as_the_page_says() -> None:
    """Two values of x0 for one x_t. Their differences in other spaces follow from the definitions alone."""
    x0, eps, t = noisy_rows()
    alpha, sigma = (a[:, None] for a in PROCESS.alpha_sigma(t))
    x_t = alpha * x0 + sigma * eps
    other = x0 + numbers(97, 2, seed=2)
    other_eps = (x_t - alpha * other) / sigma
    snr = torch.exp(PROCESS.log_snr(t))[:, None]
    v, other_v = alpha * eps - sigma * x0, alpha * other_eps - sigma * other
    spaces = {
        "eps": (other_eps - eps, snr),
        "v": (other_v - v, 1 + snr),
        "velocity": ((other_eps - other) - (eps - x0), (1 + snr.sqrt()) ** 2),
    }
    for difference, weight in spaces.values():
        torch.testing.assert_close(difference**2, weight * (other - x0) ** 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("prediction", [pytest.param(Eps(), id="eps"), pytest.param(V(), id="v")])
def test_an_error_of_the_output_moves_a_step_as_target_md_says(prediction: LinearPrediction) -> None:
    """The error grows by sin(d) for v and by sin(d) / cos(phi_t) for eps, where d is the step's angle: by 22,026 in one
    step from t = 1."""
    denoiser, x_t = toy_denoiser(PROCESS, prediction), pure_noise(PROCESS, 5, 1)
    for num_steps in (1, 4, 64):
        t, s = clock(1.0), clock(1 - 1 / num_steps)
        alpha_t, sigma_t = PROCESS.alpha_sigma(t)
        alpha_s, sigma_s = PROCESS.alpha_sigma(s)
        output = denoiser.network(x_t, t.expand(5))

        def step(found: Denoised, alpha: Tensor = alpha_s, sigma: Tensor = sigma_s) -> Tensor:
            return alpha * found.x0 + sigma * found.eps

        moved = step(prediction.denoised(output + 1e-3, x_t, alpha_t, sigma_t)) - step(
            prediction.denoised(output, x_t, alpha_t, sigma_t)
        )
        angle = PROCESS.angle(t) - PROCESS.angle(s)
        gain = -torch.sin(angle) / (1 if isinstance(prediction, V) else torch.cos(PROCESS.angle(t)))
        torch.testing.assert_close(moved, (1e-3 * gain).expand(5, 1), rtol=1e-7, atol=1e-10)
        if num_steps == 1 and isinstance(prediction, Eps):
            assert round(-float(gain)) == 22026


def test_the_target_has_the_angle_and_v_forms_of_target_md() -> None:
    """Test the cosine process with an exact Gaussian teacher."""
    for num_steps in (2, 4, 64, 4096):
        index = torch.arange(1, num_steps, dtype=torch.float64)
        t, s = (index + 1) / num_steps, index / num_steps
        m = (t + s) / 2
        teacher, x_t = gaussian(PROCESS), numbers(num_steps - 1, 2)
        phi_t, phi_m, phi_s = (PROCESS.angle(time)[:, None] for time in (t, m, s))
        d = phi_t - phi_s
        first = teacher(x_t, t)
        x_m = torch.cos(phi_m) * first.x0 + torch.sin(phi_m) * first.eps
        second = teacher(x_m, m)
        target = halving_target(teacher, x_t, t, s)
        w = torch.sin(phi_s) / (2 * torch.cos(d / 2) * torch.sin(phi_m))
        torch.testing.assert_close(w * first.x0 + (1 - w) * second.x0, target, rtol=0, atol=1e-13)
        v_first = torch.cos(phi_t) * first.eps - torch.sin(phi_t) * first.x0
        v_second = torch.cos(phi_m) * second.eps - torch.sin(phi_m) * second.x0
        v = v_first / 2 + v_second / (2 * torch.cos(d / 2)) - torch.tan(d / 2) / 2 * x_t
        torch.testing.assert_close(torch.cos(phi_t) * x_t - torch.sin(phi_t) * v, target, rtol=0, atol=1e-13)
