"""The variance-preserving circle: v is a derivative, DDIM is a rotation, and the target consists of two rotations."""

import math

import pytest
import torch
from torch import Tensor

from halfstep.core.denoiser import ddim_step
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.prediction import Prediction, V, predictions
from halfstep.objectives import halving_target
from halfstep.samplers import DDIM
from support import interior_times, members, numbers, toy_denoiser

every_prediction = pytest.mark.parametrize("prediction", members(predictions))

COSINE = VPCosine()


def preserves_variance(process: NoiseProcess) -> bool:
    alpha, sigma = process.alpha_sigma(interior_times())
    return bool(((alpha**2 + sigma**2 - 1).abs() < 1e-12).all())


@pytest.mark.parametrize("process", members(processes))
def test_v_is_the_derivative_of_x_t_along_the_circle(process: NoiseProcess) -> None:
    """Compare with dx_t / dphi, from derivatives in time by autograd: of `mix` and of phi = atan2(sigma, alpha)."""
    if not preserves_variance(process):
        pytest.skip("it does not move on the circle")
    x0, eps, t = numbers(97), numbers(97, seed=1), interior_times(97).requires_grad_()
    alpha, sigma = process.alpha_sigma(t)
    (x_slope,) = torch.autograd.grad(process.mix(x0, eps, t).sum(), t)
    (phi_slope,) = torch.autograd.grad(torch.atan2(sigma, alpha).sum(), t)
    v = V().target(x0, eps, alpha.detach(), sigma.detach())
    torch.testing.assert_close(v, x_slope / phi_slope, rtol=1e-12, atol=1e-12)


def test_the_cosine_process_moves_on_the_circle_at_constant_speed() -> None:
    assert preserves_variance(COSINE)
    t = torch.linspace(0, 1, 4097, dtype=torch.float64)
    alpha, sigma = COSINE.alpha_sigma(t)
    torch.testing.assert_close(torch.atan2(sigma, alpha), COSINE.angle(t), rtol=0, atol=1e-15)
    speed = COSINE.angle(t).diff() * 4096
    torch.testing.assert_close(speed, speed.mean().expand(4096), rtol=0, atol=1e-12)


def test_the_cosine_process_is_the_cosine_but_for_the_clipping_of_its_ends() -> None:
    """Clipping at +-20 turns the angle by at most arctan(e^-10) = 4.5e-5, which happens at the ends; in the middle by
    0."""
    t = torch.linspace(0, 1, 1025, dtype=torch.float64)
    turn = math.atan(math.exp(-10)) * (1 - 2 * t)
    torch.testing.assert_close(COSINE.angle(t), torch.pi / 2 * t + turn, rtol=0, atol=1e-15)
    for ours, plain in zip(
        COSINE.alpha_sigma(t), (torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)), strict=True
    ):
        assert bool(((ours - plain).abs() <= turn.abs() + 1e-15).all())
    # With unreachable bounds, it is the plain cosine.
    for ours, plain in zip(
        VPCosine(-80, 80).alpha_sigma(t),
        (torch.cos(torch.pi / 2 * t), torch.sin(torch.pi / 2 * t)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-15)


@pytest.mark.parametrize(("low", "high"), [(-20.0, 20.0), (-5.0, 8.0), (-10.0, 10.0)])
def test_the_log_snr_of_the_cosine_process_reaches_its_bounds_at_times_0_and_1(low: float, high: float) -> None:
    ends = VPCosine(low, high).log_snr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    # An angle of pi / 2 - 4.5e-5 near 1 is accurate to 1e-16, so the log-SNR is accurate to 5e-12.
    torch.testing.assert_close(ends, torch.tensor([high, low], dtype=torch.float64), rtol=0, atol=2e-11)


def circle_step(num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return t, s and the angle d between them for all steps of the grid that end above 0."""
    index = torch.arange(1, num_steps, dtype=torch.float64)
    t, s = (index + 1) / num_steps, index / num_steps
    return t, s, COSINE.angle(t) - COSINE.angle(s)


@every_prediction
@pytest.mark.parametrize("num_steps", [2, 4, 64, 4096])
@torch.no_grad()
def test_a_ddim_step_rotates_x_t_against_v_by_the_angle_of_the_step(prediction: Prediction, num_steps: int) -> None:
    """Compare with x_s = cos(d) x_t - sin(d) v; Salimans & Ho 2022, appendix on the angular form."""
    t, s, d = circle_step(num_steps)
    denoiser, x_t = toy_denoiser(COSINE, prediction), numbers(len(t), 2)
    x_s, _ = DDIM().step(denoiser, x_t, t, s, None, None)
    v = V().target(*denoiser(x_t, t), *COSINE.alpha_sigma(t))
    rotated = torch.cos(d)[:, None] * x_t - torch.sin(d)[:, None] * v
    # Eps-prediction amplifies rounding by 1 / alpha, so the tolerance is relative to these large numbers.
    torch.testing.assert_close(x_s, rotated, rtol=1e-12, atol=1e-12)


@every_prediction
@pytest.mark.parametrize("num_steps", [2, 4, 64, 4096])
@torch.no_grad()
def test_the_halving_target_as_v_is_a_sum_of_the_teacher_s_two_v(prediction: Prediction, num_steps: int) -> None:
    """Two rotations by d / 2 give v_target = v1 / 2 + v2 / (2 cos(d / 2)) - tan(d / 2) x_t / 2."""
    t, s, d = circle_step(num_steps)
    m = (t + s) / 2
    half = (d / 2)[:, None]
    teacher, x_t = toy_denoiser(COSINE, prediction), numbers(len(t), 2)
    first = teacher(x_t, t)
    x_m = ddim_step(first, COSINE, m)
    v1 = V().target(*first, *COSINE.alpha_sigma(t))
    v2 = V().target(*teacher(x_m, m), *COSINE.alpha_sigma(m))
    expected = v1 / 2 + v2 / (2 * torch.cos(half)) - torch.tan(half) * x_t / 2

    x0 = halving_target(teacher, x_t, t, s)
    alpha, sigma = COSINE.alpha_sigma(t)
    eps = (x_t - alpha[:, None] * x0) / sigma[:, None]
    torch.testing.assert_close(V().target(x0, eps, alpha, sigma), expected, rtol=1e-11, atol=1e-11)
