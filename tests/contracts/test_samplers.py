"""Contracts of every sampler: its order, its cost, and results that depend only on its arguments."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep.core.denoiser import Clipped, Denoiser, NetworkDenoiser
from halfstep.core.draw import step_noise
from halfstep.core.grids import uniform_times
from halfstep.core.noise import FlowMatching, NoiseProcess, VPCosine, processes
from halfstep.core.oracle import data_set_denoiser
from halfstep.core.prediction import X0, Prediction, V, predictions
from halfstep.samplers import (
    DDIM,
    Ancestral,
    DPMSolverPP2M,
    Heun,
    NoiseToSignal,
    Sampler,
    StepNoise,
    sample,
    samplers,
    trajectory,
)
from support import (
    Watched,
    clock,
    gaussian,
    in_turn,
    integrated_flow,
    members,
    members_and_further_processes,
    mixture,
    numbers,
    pure_noise,
    toy_denoiser,
    variants,
)


def those(parameters: list[Any], kind: str, *, wanted: bool) -> list[Any]:
    found = [parameter for parameter in parameters if getattr(parameter.values[0], kind) is wanted]
    assert found, "a contract without members would pass silently"
    return found


SAMPLERS: Final = members(samplers)
VARIANTS: Final = variants()

every_process = pytest.mark.parametrize("process", members(processes))
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS)
every_variant = pytest.mark.parametrize("sampler", VARIANTS)
every_deterministic = pytest.mark.parametrize("sampler", those(SAMPLERS, "stochastic", wanted=False))
every_deterministic_variant = pytest.mark.parametrize("sampler", those(VARIANTS, "stochastic", wanted=False))
every_stochastic = pytest.mark.parametrize("sampler", those(SAMPLERS, "stochastic", wanted=True))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))


@every_deterministic_variant
@torch.no_grad()
def test_exactly_multistep_samplers_have_a_memory_and_they_start_and_end_with_ddim(sampler: Sampler) -> None:
    """Otherwise, an objective could not tell when such a sampler has no effect on its target."""
    denoiser, x_t = toy_denoiser(VPCosine(), V()), numbers(4, 2)
    between, memory = sampler.step(denoiser, x_t, 0.9, 0.6, None, None)
    _, later = sampler.step(denoiser, between, 0.6, 0.4, None, memory)
    assert [memory is not None, later is not None] == [sampler.multistep] * 2
    if sampler.multistep:
        for x, t, s, held, is_ddim in (
            (x_t, 0.9, 0.6, None, True),
            (between, 0.6, 0.4, memory, False),
            (between, 0.6, 0.0, memory, True),
        ):
            found, _ = sampler.step(denoiser, x, t, s, None, held)
            wanted, _ = DDIM().step(denoiser, x, t, s, None, None)
            assert torch.equal(found, wanted) == is_ddim, (t, s)


# For data of one point, samplers that hold eps or x0 constant are exact. The others hold a quantity that changes.
HOLD_FAST: Final = (DDIM, Ancestral, DPMSolverPP2M)
every_one_point_exact = pytest.mark.parametrize(
    "sampler",
    [
        parameter
        for parameter in VARIANTS
        if isinstance(parameter.values[0], HOLD_FAST)
        or isinstance(getattr(parameter.values[0], "coordinate", None), NoiseToSignal)
    ],
)

every_one_call_or_heun = pytest.mark.parametrize(
    "sampler",
    [
        parameter
        for parameter in VARIANTS
        if parameter.values[0].evals_per_step == 1 or isinstance(parameter.values[0], Heun)
    ],
)

NARROW: Final = VPCosine(-4.0, 4.0)
"""A process that keeps much noise at t = 0, and much signal at t = 1."""

REACHING_CLEAN_EVENLY: Final = {"vp_cosine": VPCosine(), "flow": FlowMatching()}
"""Processes on whose uniform grid the last step's angle falls as 1 / N, for all N here."""

Grid = Callable[[int], Tensor]

FIRST, LAST = 0.95, 0.05
"""The ends of the interior path, on which no coordinate is near the ends of its axis."""


def interior_times(num_steps: int) -> Tensor:
    return FIRST + (LAST - FIRST) * torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


def noise_for(sampler: Sampler, seeds: Sequence[int], *shape: int) -> StepNoise | None:
    """Return the noise that the sampler needs for samples of these seeds."""
    return step_noise(seeds, shape, torch.float64) if sampler.stochastic else None


def rms_errors(
    sampler: Sampler, denoiser: Denoiser, x_t: Tensor, exact: Tensor, steps: Sequence[int], **options: Any
) -> list[float]:
    found = [sample(denoiser, x_t, n, sampler, **options) - exact for n in steps]
    return [float(error.square().mean().sqrt()) for error in found]


def slope(steps: Sequence[int], errors: Sequence[float]) -> float:
    """Return the negative slope of the log of the error against the log of the number of steps."""
    return float(-np.polyfit(np.log(steps), np.log(errors), 1)[0])


STEP_COUNTS: Final = (32, 64, 128)
"""Enough to be near the limit, and few enough for the errors to stay above that of the reference."""


# A table's log-SNR has kinks in t, but the methods only see the times of their steps. In the coordinate in which they
# integrate, the flow of every process is the same smooth curve, and a kink in t only changes a step's length.
@every_deterministic
@every_process
def test_it_follows_the_exact_flow_of_a_gaussian_at_the_order_it_claims(
    process: NoiseProcess, sampler: Sampler
) -> None:
    denoiser = gaussian(process)
    x_t = denoiser.flow(pure_noise(process, 16, 2), 1.0, FIRST)
    errors = rms_errors(sampler, denoiser, x_t, denoiser.flow(x_t, FIRST, LAST), STEP_COUNTS, grid=interior_times)
    assert slope(STEP_COUNTS, errors) == pytest.approx(sampler.order, abs=0.25)


@cache
def interior_way(process: NoiseProcess) -> tuple[Tensor, Tensor]:
    """Return samples at `FIRST`, and the mixture's flow of them at `LAST`."""
    x_t = integrated_flow(mixture(process), pure_noise(process, 16, 2), FIRST)
    return x_t, integrated_flow(mixture(process), x_t, LAST, FIRST)


@every_deterministic_variant
@every_process
def test_it_follows_the_flow_of_a_mixture_at_the_order_it_claims(process: NoiseProcess, sampler: Sampler) -> None:
    """Test every coordinate. (On the Gaussian, some gain an order because of a symmetry.)"""
    x_t, exact = interior_way(process)
    errors = rms_errors(sampler, mixture(process), x_t, exact, STEP_COUNTS, grid=interior_times)
    assert slope(STEP_COUNTS, errors) == pytest.approx(sampler.order, abs=0.25)


def even_angles(process: NoiseProcess) -> Grid:
    """Return grids from t = 1 to 0 on which the angle arctan(sigma / alpha) falls by equal steps to 0."""

    def grid(num_steps: int) -> Tensor:
        alpha, sigma = process.alpha_sigma(clock(1.0))
        angles = torch.atan2(sigma, alpha) * torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps
        inner = process.time_at(-2 * torch.log(torch.tan(angles[1:-1])))
        return torch.cat([clock(1.0), inner, clock(0.0)])

    return grid


def end_of(process: NoiseProcess) -> float:
    """Return the angle of the process's remaining noise at t = 0."""
    alpha, sigma = process.alpha_sigma(clock(0.0))
    return float(torch.atan2(sigma, alpha))


EVERY_WAY: Final = [
    *(pytest.param(process, uniform_times, id=name) for name, process in REACHING_CLEAN_EVENLY.items()),
    *(
        pytest.param(parameter.values[0], even_angles(parameter.values[0]), id=f"{parameter.id}-even_angles")
        for parameter in members(processes)
    ),
]
ALL_THE_WAY: Final = [parameter for parameter in SAMPLERS if not isinstance(parameter.values[0], DPMSolverPP2M)]


@cache
def flow_to_clean_data(process: NoiseProcess) -> Tensor:
    """Return the mixture's flow from pure noise to noise of 1e-6, with an error of its square."""
    straight = FlowMatching()
    start = straight.time_at(process.log_snr(clock(1.0)))
    radii = [torch.hypot(*which.alpha_sigma(t)) for which, t in [(straight, start), (process, clock(1.0))]]
    return integrated_flow(mixture(straight), float(radii[0] / radii[1]) * pure_noise(process, 16, 2), t=float(start))


@pytest.mark.parametrize("sampler", those(ALL_THE_WAY, "stochastic", wanted=False))
@pytest.mark.parametrize(("process", "grid"), EVERY_WAY)
@pytest.mark.parametrize("flow", ["gaussian", "mixture"])
def test_it_goes_from_pure_noise_to_clean_data_at_the_order_it_claims(
    flow: str, process: NoiseProcess, grid: Grid, sampler: Sampler
) -> None:
    """Test all samplers except dpmpp_2m, which is tested below, in their default coordinate.

    The order refers to the longest step in the angle, so to 1 / N if the angle falls evenly to 0. It does not on the
    uniform grid of VE or of a table: next to the data, a table's sigma^2 falls as t and its angle as the root, so that
    the last step, which loses an order, costs 1 / N by itself. As these processes keep noise at t = 0 (0.007 and
    0.002), the steps must be long enough for the stages of the last step to stay above it.

    The exact flow of the mixture is that of a process with all levels of noise, from the level of t = 1.
    """
    x_1 = pure_noise(process, 16, 2)
    if grid is uniform_times:
        steps = STEP_COUNTS if sampler.order < 3 else (16, 32, 64)
    else:
        steps = STEP_COUNTS if sampler.evals_last_step == 1 else (16, 32, 64)
        last_stage = {1: 1, 2: 1 / 2, 3: 1 / 3}[sampler.evals_last_step]
        assert last_stage * torch.pi / 2 / max(steps) > end_of(process)
    denoiser: Denoiser
    if flow == "gaussian":
        denoiser = gaussian(process)
        exact = denoiser.flow(x_1, 1.0, 0.0)
    else:
        denoiser = mixture(process)
        exact = flow_to_clean_data(process)
    errors = rms_errors(sampler, denoiser, x_1, exact, steps, grid=grid)
    assert slope(steps, errors) == pytest.approx(sampler.order, abs=0.25)


def test_the_error_of_dpmpp_2m_from_pure_noise_to_clean_data_falls_as_log_n_over_n_squared() -> None:
    """error N^2 therefore grows by the same amount with each doubling of N. At order 2 the growth would vanish, and at
    order 1 it would double. The process has ends beyond the finest step."""
    denoiser, x_1 = gaussian(VPCosine(-40.0, 40.0)), numbers(16, 2)
    steps = (256, 512, 1024, 2048, 4096)
    errors = rms_errors(DPMSolverPP2M(), denoiser, x_1, denoiser.flow(x_1, 1.0, 0.0), steps)
    growth = np.diff(np.array(errors) * np.array(steps) ** 2.0)
    assert (growth > 0).all()
    np.testing.assert_allclose(growth[1:] / growth[:-1], 1, rtol=0, atol=0.05)


def first_time(process: NoiseProcess, sampler: Sampler) -> float:
    """Return 1, or 0.95 in the coordinate sigma / alpha, which is infinite at t = 1 without signal."""
    alpha, _ = process.alpha_sigma(clock(1.0))
    at_infinity = isinstance(getattr(sampler, "coordinate", None), NoiseToSignal) and float(alpha) == 0
    return FIRST if at_infinity else 1.0


@every_one_point_exact
@pytest.mark.parametrize("process", [*members_and_further_processes(), pytest.param(NARROW, id="narrow")])
@in_turn("num_steps", [1, 2, 3, 7, 64])
def test_sampling_is_exact_in_any_number_of_steps_when_the_data_is_one_point(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    """Compare up to the rounding of x_t / alpha, which at t = 1 is up to 2e4 times that of x_t."""
    point, first = numbers(1, 3, seed=1), first_time(process, sampler)
    denoiser = data_set_denoiser(process, point)
    x_t = float(process.alpha_sigma(clock(first))[1]) * numbers(8, 3)
    noise = noise_for(sampler, range(8), 3)
    x_0 = sample(denoiser, x_t, num_steps, sampler, grid=lambda n: first * uniform_times(n), noise=noise)
    tolerance = 1e-13 if isinstance(sampler, HOLD_FAST) else 5e-11
    torch.testing.assert_close(x_0, point.expand(8, 3), rtol=0, atol=tolerance)


@every_process
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolverPP2M()])
@in_turn("num_steps", [1, 2, 3, 7, 64])
def test_ddim_and_dpmpp_2m_stay_on_the_one_way_from_noise_to_data_of_one_point(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    """The noise of x_t does not change on the way, so each step is the sample that the process mixes there."""
    point, eps = numbers(1, 3, seed=1).expand(8, 3), numbers(8, 3)
    x_1 = process.mix(point, eps, clock(1.0).expand(8))
    for step in trajectory(data_set_denoiser(process, point[:1]), x_1, num_steps, sampler):
        expected = process.mix(point, eps, clock(step.s).expand(8)) if step.s else point
        torch.testing.assert_close(step.x_s, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "sampler",
    [
        parameter
        for parameter in VARIANTS
        if isinstance(getattr(parameter.values[0], "coordinate", None), NoiseToSignal)
    ],
)
@pytest.mark.parametrize("process", [VPCosine(-6.0, 20.0), NARROW], ids=["from_snr_e-6", "narrow"])
@in_turn("num_steps", [1, 2, 7, 64])
def test_every_stage_of_a_step_shows_the_network_a_sample_of_the_time_it_names(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    """The noise of x_t does not change for data of one point, so the network must find the same noise at every call.

    The test does not start at zero SNR, where this coordinate amplifies rounding by (sigma / alpha)^2 = 5e8.
    """
    point, eps = numbers(1, 3, seed=1), numbers(8, 3)
    denoiser = Watched(data_set_denoiser(process, point))
    sample(denoiser, process.mix(point.expand(8, 3), eps, clock(1.0).expand(8)), num_steps, sampler)
    for answer in denoiser.answers:
        torch.testing.assert_close(answer.eps, eps, rtol=0, atol=1e-12)


@every_variant
@pytest.mark.parametrize("process", [*members(processes), pytest.param(NARROW, id="narrow")])
@in_turn("num_steps", [1, 2, 16])
def test_it_calls_the_network_as_often_as_claimed_and_only_at_times_above_0(
    process: NoiseProcess, sampler: Sampler, num_steps: int
) -> None:
    """A denoiser is undefined at t = 0, and below the remaining noise of a process."""
    denoiser = Watched(mixture(process))
    x_1, noise = pure_noise(process, 4, 2), noise_for(sampler, range(4), 2)
    seen = 0
    for step in trajectory(denoiser, x_1, num_steps, sampler, noise=noise):
        calls, seen = len(denoiser.times) - seen, len(denoiser.times)
        assert calls == (sampler.evals_per_step if step.s > 0 else sampler.evals_last_step)
    assert seen == sampler.num_evals(num_steps)
    times = torch.cat(denoiser.times)
    assert bool(((times > 0) & (times <= 1)).all())


@every_one_call_or_heun
@pytest.mark.parametrize("num_steps", [7, 1024])
def test_a_sampler_without_inner_stages_calls_at_the_times_of_the_grid_to_the_last_bit(
    sampler: Sampler, num_steps: int
) -> None:
    """A network with a table of timesteps supports no other times."""
    denoiser = Watched(gaussian(VPCosine()))
    sample(denoiser, numbers(1, 2), num_steps, sampler, noise=noise_for(sampler, range(1), 2))
    assert {float(time) for time in denoiser.times} == set(uniform_times(num_steps)[:-1].tolist())


@every_variant
def test_a_path_that_ends_in_noise_has_no_last_step(sampler: Sampler) -> None:
    denoiser = Watched(mixture(VPCosine()))
    sample(denoiser, numbers(4, 2), 3, sampler, grid=interior_times, noise=noise_for(sampler, range(4), 2))
    assert len(denoiser.times) == 3 * sampler.evals_per_step


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, True])
@every_sampler
def test_the_calls_of_no_steps_are_not_counted(sampler: Sampler, num_steps: int) -> None:
    with pytest.raises(ValueError, match="num_steps must be a whole number of at least 1"):
        sampler.num_evals(num_steps)


@pytest.mark.parametrize("sampler", [parameter for parameter in SAMPLERS if isinstance(parameter.values[0], HOLD_FAST)])
@every_process
@in_turn("num_steps", [1, 2, 5])
def test_the_last_step_returns_the_last_x0(process: NoiseProcess, sampler: Sampler, num_steps: int) -> None:
    """The sample contains no trace of the process's own noise at t = 0, not even of 4.5e-5."""
    denoiser = Watched(mixture(process))
    x_1, noise = pure_noise(process, 16, 2), noise_for(sampler, range(16), 2)
    assert torch.equal(sample(denoiser, x_1, num_steps, sampler, noise=noise), denoiser.answers[-1].x0)


@every_variant
@every_prediction
def test_the_same_noise_gives_the_same_samples_to_the_last_bit(sampler: Sampler, prediction: Prediction) -> None:
    denoiser, x_1 = toy_denoiser(VPCosine(), prediction), numbers(16, 3, 2)
    first = sample(denoiser, x_1, 8, sampler, noise=noise_for(sampler, range(16), 3, 2))
    torch.rand(100)
    assert torch.equal(sample(denoiser, x_1, 8, sampler, noise=noise_for(sampler, range(16), 3, 2)), first)


@every_variant
@every_prediction
def test_a_sample_does_not_depend_on_its_batch(sampler: Sampler, prediction: Prediction) -> None:
    """Compare up to a few roundings, because vectorised and scalar library functions differ in the last bit.
    Eps-prediction divides by alpha(1) = 4.5e-5 and amplifies that bit by 2e4, relative to equally large samples."""
    denoiser, x_1, seeds = toy_denoiser(VPCosine(), prediction), numbers(16, 3, 2), range(100, 116)
    together = sample(denoiser, x_1, 8, sampler, noise=noise_for(sampler, seeds, 3, 2))
    for rows in (slice(0, 1), slice(3, 8), slice(15, 16), slice(None, None, 5)):
        alone = sample(denoiser, x_1[rows], 8, sampler, noise=noise_for(sampler, seeds[rows], 3, 2))
        torch.testing.assert_close(alone, together[rows], rtol=1e-10, atol=1e-10)


@every_variant
@pytest.mark.parametrize("process", [pytest.param(VPCosine(), id="vp_cosine"), pytest.param(NARROW, id="narrow")])
def test_a_step_takes_each_sample_between_its_own_times(process: NoiseProcess, sampler: Sampler) -> None:
    """Some samples of a batch may land on clean data and others not, each with its own condition and memory."""

    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        return torch.sin(2 * x_t + 3 * time[:, None]) + shift

    denoiser = NetworkDenoiser(network, process, X0())
    first, then, last = clock(1.0, 0.9, 0.5, 0.3), clock(0.7, 0.5, 0.25, 0.2), clock(0.1, 0.0, 0.0, 0.15)

    def taken(rows: slice) -> Tensor:
        x_t, memory, cond = numbers(4, 2)[rows], None, {"shift": numbers(4, 1, seed=3)[rows]}
        for number, (t, s) in enumerate([(first, then), (then, last)]):
            noise = noise_for(sampler, range(4)[rows], 2)
            drawn = None if noise is None else noise(number)
            x_t, memory = sampler.step(denoiser, x_t, t[rows], s[rows], cond, memory, drawn)
        return x_t

    alone = torch.cat([taken(slice(row, row + 1)) for row in range(4)])
    torch.testing.assert_close(taken(slice(None)), alone, rtol=1e-12, atol=1e-12)


@every_stochastic
def test_other_noise_gives_other_samples(sampler: Sampler) -> None:
    denoiser, x_1 = toy_denoiser(VPCosine(), X0()), numbers(4, 2)
    one, other = (
        sample(denoiser, x_1, 8, sampler, noise=noise_for(sampler, seeds, 2)) for seeds in (range(4), range(4, 8))
    )
    assert bool((one != other).all())


@every_stochastic
def test_a_stochastic_sampler_without_noise_is_refused(sampler: Sampler) -> None:
    denoiser, x_1 = Watched(mixture(VPCosine())), numbers(4, 2)
    with pytest.raises(ValueError, match=r"needs noise at each step\. Pass noise=step_noise\("):
        sample(denoiser, x_1, 2, sampler)
    assert not denoiser.times
    with pytest.raises(ValueError, match="step_noise"):
        sampler.step(denoiser, x_1, clock(1.0).expand(4), clock(0.5).expand(4), None, None)


@every_deterministic
def test_noise_that_would_not_be_used_is_refused(sampler: Sampler) -> None:
    denoiser, x_1 = mixture(VPCosine()), numbers(4, 2)
    with pytest.raises(ValueError, match=r"does not use noise\. Remove the argument `noise`"):
        sample(denoiser, x_1, 2, sampler, noise=step_noise(range(4), (2,), torch.float64))


@every_sampler
def test_conditions_reach_the_denoiser_at_every_call(sampler: Sampler) -> None:
    heard: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        heard.append(shift)
        return x_t + shift

    shift, noise = numbers(4, 1), noise_for(sampler, range(4), 2)
    sample(NetworkDenoiser(network, VPCosine(), X0()), numbers(4, 2), 3, sampler, {"shift": shift}, noise=noise)
    assert heard
    assert all(value is shift for value in heard)


@every_sampler
def test_sampling_leaves_no_gradient_and_its_starting_noise_untouched(sampler: Sampler) -> None:
    denoiser, x_1 = toy_denoiser(VPCosine(), X0()), numbers(4, 2).requires_grad_()
    before, noise = x_1.detach().clone(), noise_for(sampler, range(4), 2)
    assert not sample(denoiser, x_1, 2, sampler, noise=noise).requires_grad
    assert torch.equal(x_1.detach(), before)


@every_sampler
def test_a_trajectory_yields_its_steps_and_ends_at_the_sample(sampler: Sampler) -> None:
    denoiser, x_1, noise = mixture(VPCosine()), numbers(4, 2), noise_for(sampler, range(4), 2)
    steps = list(trajectory(denoiser, x_1, 4, sampler, noise=noise))
    assert [(step.number, step.t, step.s) for step in steps] == [
        (0, 1.0, 0.75),
        (1, 0.75, 0.5),
        (2, 0.5, 0.25),
        (3, 0.25, 0.0),
    ]
    assert torch.equal(steps[-1].x_s, sample(denoiser, x_1, 4, sampler, noise=noise))


def squared_times(num_steps: int) -> Tensor:
    return uniform_times(num_steps) ** 2


@every_deterministic
def test_another_grid_is_followed_and_leads_to_the_same_flow(sampler: Sampler) -> None:
    process = VPCosine()
    denoiser, x_1 = Watched(gaussian(process)), numbers(8, 2)
    exact = gaussian(process).flow(x_1, 1.0, 0.0)
    # A high order needs steps that stay above the angle of the process's own end, 4.5e-5, whose square remains.
    few, many = (256, 512) if sampler.order < 3 else (64, 128)
    errors = [float((sample(denoiser, x_1, n, sampler, grid=squared_times) - exact).abs().max()) for n in (few, many)]
    assert set(squared_times(many)[:-1].tolist()) <= {float(time[0]) for time in denoiser.times}
    assert errors[1] < 0.6 * errors[0]
    assert errors[1] < 5e-3


def grid_of(*times: float) -> Grid:
    """Return a grid that ignores the number of steps."""
    return lambda _: clock(*times)


@every_sampler
@every_process
@in_turn("kind", ["mixture", "x0", "clipped"])
@in_turn(
    "grids",
    [
        ((1.0, 0.7, 0.4, 0.0, 0.0), (1.0, 0.7, 0.4, 0.0)),
        ((1.0, 0.7, 0.7, 0.4, 0.0), (1.0, 0.7, 0.4, 0.0)),
        ((1.0, 1.0, 0.7, 0.4, 0.0), (1.0, 0.7, 0.4, 0.0)),
        ((1.0 + 1e-7, 0.7, 0.4, -1e-7), (1.0, 0.7, 0.4, 0.0)),
        # The scheduler of Stable Audio ends with a small noise level, which is rounded to a time below 0, and with 0.
        ((1.0 + 1e-6, 1.0, 0.7, 0.4, -1e-7, -1e-6), (1.0, 0.7, 0.4, 1e-7, 0.0)),
    ],
)
def test_steps_of_length_0_and_times_just_outside_the_clock_change_no_sample(
    process: NoiseProcess, sampler: Sampler, kind: str, grids: tuple[tuple[float, ...], tuple[float, ...]]
) -> None:
    times, clean = grids
    toy = toy_denoiser(process, X0())
    denoisers: dict[str, Denoiser] = {"mixture": mixture(process), "x0": toy, "clipped": Clipped(toy, -0.5, 0.5)}
    x_1 = pure_noise(process, 4, 2)

    def sampled(*path: float) -> Tensor:
        noise = noise_for(sampler, range(4), 2)
        return sample(denoisers[kind], x_1, len(path) - 1, sampler, grid=grid_of(*path), noise=noise)

    expected = sampled(*clean)
    assert bool(expected.isfinite().all())
    assert torch.equal(sampled(*times), expected)


@every_sampler
def test_a_step_of_length_0_is_yielded_without_a_call(sampler: Sampler) -> None:
    denoiser, x_1, times = Watched(mixture(FlowMatching())), numbers(4, 2), (1.0, 1.0, 0.7, 0.7, 0.4, 0.0, 0.0)
    noise = noise_for(sampler, range(4), 2)
    steps = list(trajectory(denoiser, x_1, 6, sampler, grid=grid_of(*times), noise=noise))
    assert [(step.number, step.t, step.s) for step in steps] == list(zip(range(6), times, times[1:], strict=False))
    assert torch.equal(steps[0].x_s, x_1)
    assert torch.equal(steps[2].x_s, steps[1].x_s)
    assert torch.equal(steps[5].x_s, steps[4].x_s)
    assert len(denoiser.times) == sampler.num_evals(3)


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
