"""What every sampler promises: its order, its cost, and results that depend on its arguments alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Denoiser, NetworkDenoiser
from halfstep.core.grids import uniform_times
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.oracle import data_set_denoiser
from halfstep.core.prediction import X0, Prediction, predictions
from halfstep.samplers import DDIM, Sampler, sample, samplers, trajectory
from support import (
    Watched,
    clock,
    gaussian,
    integrated_flow,
    members,
    mixture,
    numbers,
    pure_noise,
    toy_denoiser,
)

every_process = pytest.mark.parametrize("process", members(processes))
every_sampler = pytest.mark.parametrize("sampler", members(samplers))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))

STEPS = (64, 128, 256, 512)


def skip_stochastic(sampler: Sampler) -> None:
    if sampler.stochastic:
        pytest.skip("it draws noise, so it follows no flow")


def measured_order(sampler: Sampler, denoiser: Denoiser, x_1: Tensor, exact: Tensor) -> float:
    """The slope of the log of the error against the log of the number of steps."""
    errors = [float((sample(denoiser, x_1, n, sampler) - exact).square().mean().sqrt()) for n in STEPS]
    return float(-np.polyfit(np.log(STEPS), np.log(errors), 1)[0])


@every_sampler
@every_process
def test_it_converges_to_the_exact_flow_of_a_gaussian_at_the_order_it_claims(
    process: NoiseProcess, sampler: Sampler
) -> None:
    skip_stochastic(sampler)
    denoiser, x_1 = gaussian(process), pure_noise(process, 16, 2)
    order = measured_order(sampler, denoiser, x_1, denoiser.flow(x_1, 1.0, 0.0))
    assert order == pytest.approx(sampler.order, abs=0.25)


@every_sampler
@every_process
def test_it_converges_to_the_flow_of_a_mixture_at_the_order_it_claims(process: NoiseProcess, sampler: Sampler) -> None:
    skip_stochastic(sampler)
    denoiser, x_1 = mixture(process), pure_noise(process, 16, 2)
    order = measured_order(sampler, denoiser, x_1, integrated_flow(denoiser, x_1))
    assert order == pytest.approx(sampler.order, abs=0.25)


@every_sampler
@every_process
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 64])
def test_sampling_is_exact_in_any_number_of_steps_when_the_data_is_one_point(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    point = numbers(1, 3, seed=1)
    x_0 = sample(data_set_denoiser(process, point), pure_noise(process, 8, 3), num_steps, sampler)
    torch.testing.assert_close(x_0, point.expand(8, 3), rtol=0, atol=1e-13)


@every_process
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 64])
def test_ddim_stays_on_the_one_way_from_noise_to_data_of_one_point(process: NoiseProcess, num_steps: int) -> None:
    """The noise of x_t never changes on that way, so each step is the sample that the process mixes there."""
    point, eps = numbers(1, 3, seed=1).expand(8, 3), numbers(8, 3)
    x_1 = process.mix(point, eps, clock(1.0).expand(8))
    for step in trajectory(data_set_denoiser(process, point[:1]), x_1, num_steps, DDIM()):
        expected = process.mix(point, eps, clock(step.s).expand(8)) if step.s else point
        torch.testing.assert_close(step.x_s, expected, rtol=0, atol=1e-13)


@every_sampler
@every_process
def test_a_step_calls_the_network_as_often_as_claimed_and_never_at_time_0(
    process: NoiseProcess, sampler: Sampler
) -> None:
    """The last step may do with fewer calls, for a denoiser has no answer at t = 0."""
    denoiser = Watched(mixture(process))
    seen = 0
    for step in trajectory(denoiser, pure_noise(process, 4, 2), 8, sampler):
        calls, seen = len(denoiser.times) - seen, len(denoiser.times)
        assert calls == sampler.evals_per_step if step.s > 0 else 1 <= calls <= sampler.evals_per_step
    times = torch.cat(denoiser.times)
    assert bool(((times > 0) & (times <= 1)).all())


@every_sampler
@every_process
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_the_last_step_of_a_first_order_sampler_returns_the_last_x0(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    """No trace of the process's own noise at t = 0 is left in the sample, not even one of 4.5e-5."""
    if sampler.order != 1:
        pytest.skip("a higher order may combine several x0")
    denoiser = Watched(mixture(process))
    x_0 = sample(denoiser, pure_noise(process, 16, 2), num_steps, sampler)
    assert torch.equal(x_0, denoiser.answers[-1].x0)


@every_sampler
@every_prediction
def test_the_same_noise_gives_the_same_samples_to_the_last_bit(sampler: Sampler, prediction: Prediction) -> None:
    skip_stochastic(sampler)
    denoiser, x_1 = toy_denoiser(VPCosine(), prediction), numbers(16, 3, 2)
    first = sample(denoiser, x_1, 8, sampler)
    torch.rand(100)
    assert torch.equal(sample(denoiser, x_1, 8, sampler), first)


@every_sampler
@every_prediction
@pytest.mark.parametrize("rows", [slice(0, 1), slice(3, 8), slice(15, 16), slice(None, None, 5)])
def test_a_sample_does_not_depend_on_its_company(sampler: Sampler, prediction: Prediction, rows: slice) -> None:
    """Up to a few roundings: vectorised and scalar library functions differ in the last bit. Prediction of
    eps divides by alpha(1) = 4.5e-5 and so sees that bit 2e4 times as large, relative to samples as large."""
    skip_stochastic(sampler)
    denoiser, x_1 = toy_denoiser(VPCosine(), prediction), numbers(16, 3, 2)
    together = sample(denoiser, x_1, 8, sampler)
    torch.testing.assert_close(sample(denoiser, x_1[rows], 8, sampler), together[rows], rtol=1e-10, atol=1e-10)


@every_sampler
def test_conditions_reach_the_denoiser_at_every_call(sampler: Sampler) -> None:
    heard: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        heard.append(shift)
        return x_t + shift

    shift = numbers(4, 1)
    sample(NetworkDenoiser(network, VPCosine(), X0()), numbers(4, 2), 3, sampler, cond={"shift": shift})
    assert heard
    assert all(value is shift for value in heard)


@every_sampler
def test_sampling_leaves_no_gradient_and_its_starting_noise_untouched(sampler: Sampler) -> None:
    denoiser, x_1 = toy_denoiser(VPCosine(), X0()), numbers(4, 2).requires_grad_()
    before = x_1.detach().clone()
    assert not sample(denoiser, x_1, 2, sampler).requires_grad
    assert torch.equal(x_1.detach(), before)


@every_sampler
def test_a_trajectory_tells_its_steps_and_ends_on_the_sample(sampler: Sampler) -> None:
    skip_stochastic(sampler)
    denoiser, x_1 = mixture(VPCosine()), numbers(4, 2)
    steps = list(trajectory(denoiser, x_1, 4, sampler))
    assert [(step.number, step.t, step.s) for step in steps] == [
        (0, 1.0, 0.75),
        (1, 0.75, 0.5),
        (2, 0.5, 0.25),
        (3, 0.25, 0.0),
    ]
    assert torch.equal(steps[-1].x_s, sample(denoiser, x_1, 4, sampler))


def squared_times(num_steps: int) -> Tensor:
    return uniform_times(num_steps) ** 2


@every_sampler
def test_another_grid_is_followed_and_leads_to_the_same_flow(sampler: Sampler) -> None:
    skip_stochastic(sampler)
    process = VPCosine()
    denoiser, x_1 = Watched(gaussian(process)), numbers(8, 2)
    exact = gaussian(process).flow(x_1, 1.0, 0.0)
    errors = [float((sample(denoiser, x_1, n, sampler, grid=squared_times) - exact).abs().max()) for n in (256, 512)]
    assert set(squared_times(512)[:-1].tolist()) <= {float(time[0]) for time in denoiser.times}
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 5e-3


@every_prediction
def test_clipped_sampling_ends_within_the_range(prediction: Prediction) -> None:
    denoiser, x_1 = toy_denoiser(VPCosine(), prediction), 2 * numbers(64, 3)
    assert float(sample(denoiser, x_1, 4, DDIM()).abs().max()) > 0.5
    assert float(sample(Clipped(denoiser, -0.5, 0.5), x_1, 4, DDIM()).abs().max()) == 0.5


@pytest.mark.parametrize("num_steps", [0, -3, 1.5])
def test_a_number_of_steps_below_1_is_refused(num_steps: float) -> None:
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1"):
        sample(mixture(VPCosine()), numbers(2, 2), num_steps)  # type: ignore[arg-type]


def test_ddim_is_the_sampler_when_none_is_named() -> None:
    denoiser, x_1 = mixture(VPCosine()), numbers(4, 2)
    assert torch.equal(sample(denoiser, x_1, 5), sample(denoiser, x_1, 5, DDIM()))
