"""The coordinates of the probability-flow ODE match their definitions, and Euler's step in one of them is DDIM's.

(`test_circle` tests that DDIM on the cosine process rotates x_t against v.)
"""

import itertools
from typing import Final

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.oracle import GaussianDenoiser
from halfstep.core.prediction import Prediction, V, predictions
from halfstep.samplers import DDIM, Angle, Coordinate, Euler, LogSNR, NoiseToSignal, coordinates, trajectory
from halfstep.samplers.runge_kutta import CLASSICAL_4, EULER, HEUN_3, MIDPOINT, TRAPEZOID, Rule, runge_kutta_step
from support import (
    clock,
    in_turn,
    integrated_flow,
    interior_times,
    members,
    mixture,
    numbers,
    pure_noise,
    toy_denoiser,
)

every_process = pytest.mark.parametrize("process", members(processes))
every_coordinate = pytest.mark.parametrize("coordinate", members(coordinates))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))

TIMES: Final = interior_times(97)


def derivative(values: Tensor, t: Tensor) -> Tensor:
    """Return d values / dt for each sample, by automatic differentiation."""
    (found,) = torch.autograd.grad(values.sum(), t, retain_graph=True)
    return found


@every_coordinate
@every_process
def test_the_slope_is_the_derivative_along_the_exact_flow_of_a_gaussian(
    process: NoiseProcess, coordinate: Coordinate
) -> None:
    """dy / dtau, with y = x_t / scale, follows from the flow as a function of time."""
    denoiser = GaussianDenoiser(process, mean=0.3, std=0.5)
    t = TIMES.clone().requires_grad_()
    tau, scale = coordinate.place(*process.alpha_sigma(t))
    x_t = denoiser.flow(pure_noise(process, 97), 1.0, t)
    expected = derivative(x_t / scale, t) / derivative(tau, t)
    alpha, sigma = process.alpha_sigma(TIMES)
    slope = coordinate.slope(denoiser(x_t.detach(), TIMES), alpha, sigma)
    torch.testing.assert_close(slope, expected, rtol=1e-11, atol=1e-11)


@every_coordinate
@every_process
def test_a_place_leads_back_to_the_log_snr(process: NoiseProcess, coordinate: Coordinate) -> None:
    tau, _ = coordinate.place(*process.alpha_sigma(TIMES))
    torch.testing.assert_close(coordinate.log_snr(tau), process.log_snr(TIMES), rtol=1e-12, atol=1e-12)


@every_coordinate
def test_clean_data_is_reached_where_the_coordinate_says_so(coordinate: Coordinate) -> None:
    tau, scale = coordinate.place(*VPCosine().landing(clock(0.0)))
    assert bool(torch.isfinite(tau)) == coordinate.reaches_clean
    assert float(scale) == 1


@every_process
@every_prediction
def test_the_slope_in_log_snr_is_that_in_the_angle_by_the_chain_rule(
    process: NoiseProcess, prediction: Prediction
) -> None:
    t = TIMES.clone().requires_grad_()
    alpha, sigma = process.alpha_sigma(t)
    factor = (derivative(torch.atan2(sigma, alpha), t) / derivative(process.log_snr(t), t))[:, None]
    alpha, sigma = process.alpha_sigma(TIMES)
    with torch.no_grad():
        denoised = toy_denoiser(process, prediction)(numbers(97, 2), TIMES)
    in_angle, in_log_snr = (coordinate.slope(denoised, alpha, sigma) for coordinate in (Angle(), LogSNR()))
    torch.testing.assert_close(in_log_snr, in_angle * factor, rtol=1e-12, atol=1e-12)


@every_prediction
def test_on_the_circle_the_slope_in_the_angle_is_v(prediction: Prediction) -> None:
    process = VPCosine()
    with torch.no_grad():
        denoised = toy_denoiser(process, prediction)(numbers(97, 2), TIMES)
    alpha, sigma = process.alpha_sigma(TIMES)
    v = V().target(*denoised, alpha, sigma)
    torch.testing.assert_close(Angle().slope(denoised, alpha, sigma), v, rtol=1e-14, atol=1e-14)


@every_process
@every_prediction
@in_turn("num_steps", [1, 2, 7, 64])
@torch.no_grad()
def test_euler_s_step_in_noise_to_signal_is_ddim_s(
    process: NoiseProcess, prediction: Prediction, num_steps: int
) -> None:
    """Test any denoiser, including the last step to clean data, and from t = 1 if the process has signal there."""
    denoiser, x_t = toy_denoiser(process, prediction), pure_noise(process, 16, 2)
    first = 1.0 if float(process.alpha_sigma(clock(1.0))[0]) > 0 else 0.95
    for number in range(num_steps):
        t, s = (clock(first * (num_steps - k) / num_steps).expand(16) for k in (number, number + 1))
        ddim, _ = DDIM().step(denoiser, x_t, t, s, None, None)
        euler, _ = Euler(NoiseToSignal()).step(denoiser, x_t, t, s, None, None)
        # Rounding of x_t / alpha is that of x_t, multiplied by alpha_s / alpha_t in x_s: 2e4 at t = 1.
        (alpha_t, _), (alpha_s, _) = process.alpha_sigma(t), process.landing(s)
        tolerance = 1e-15 * float((alpha_s / alpha_t).max()) * float(1 + denoiser(x_t, t).eps.abs().max())
        torch.testing.assert_close(euler, ddim, rtol=1e-13, atol=1e-13 + tolerance)
        x_t = ddim


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        pytest.param(EULER, 1, id="euler"),
        pytest.param(MIDPOINT, 2, id="midpoint"),
        pytest.param(TRAPEZOID, 2, id="trapezoid"),
        pytest.param(HEUN_3, 3, id="heun_3"),
        pytest.param(CLASSICAL_4, 4, id="classical_4"),
    ],
)
@torch.no_grad()
def test_a_rule_has_its_order(rule: Rule, order: int) -> None:
    """Include the last step, which sampling takes only once among many, so that an error would be hidden."""
    process, first, last = VPCosine(), 0.95, 0.05
    denoiser, x_1 = mixture(process), numbers(16, 2)
    start, exact = integrated_flow(denoiser, x_1, first), integrated_flow(denoiser, x_1, last)
    steps, errors = (32, 64, 128, 256), []
    for num_steps in steps:
        x_t = start
        for t, s in itertools.pairwise(torch.linspace(first, last, num_steps + 1, dtype=torch.float64)):
            x_t = runge_kutta_step(rule, Angle(), denoiser, x_t, t.expand(16), s.expand(16), None)
        errors.append(float((x_t - exact).square().mean().sqrt()))
    assert -np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.2)


def test_the_three_coordinates_are_three_samplers() -> None:
    x_1 = numbers(4, 2)
    ends = [list(trajectory(mixture(VPCosine()), x_1, 4, Euler(where())))[-1].x_s for _, where in coordinates.items()]
    for index, end in enumerate(ends):
        for other in ends[:index]:
            assert float((end - other).abs().min()) > 1e-3
