"""DDIM, ancestral sampling, Heun and DPM-Solver++(2M) equal those of diffusers, step by step.

All use a table of the cosine process's amplitudes, in which timestep k - 1 of diffusers is t = k / TABLE. The
scheduler's alpha^2 and sigma / alpha, which its constructor rounds to float32, are replaced after construction.
"""

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from halfstep.core.denoiser import Clipped
from halfstep.core.grids import uniform_times
from halfstep.core.noise import FlowMatching, NoiseProcess, VPCosine, VPTable, cosine_betas, linear_betas
from halfstep.core.prediction import X0, Eps, FlowVelocity, Prediction, V
from halfstep.samplers import Ancestral, DPMSolverPP2M, Heun, NoiseToSignal, Sampler, sample, trajectory
from support import ToyNetwork, clock, in_turn, numbers, toy_denoiser

TABLE: Final = 1024
PROCESS: Final = VPCosine()

every_prediction = pytest.mark.parametrize(
    ("prediction", "prediction_type"),
    [
        pytest.param(Eps(), "epsilon", id="eps"),
        pytest.param(X0(), "sample", id="x0"),
        pytest.param(V(), "v_prediction", id="v"),
    ],
)
either_clip = pytest.mark.parametrize("clip", [False, True], ids=["raw", "clipped"])


def table_times() -> Tensor:
    return torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE


def scheduler_for(prediction_type: str, clip: bool) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        num_train_timesteps=TABLE,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=clip,
        clip_sample_range=1.0,
    )
    alpha, _ = PROCESS.alpha_sigma(table_times())
    scheduler.alphas_cumprod = alpha**2
    return scheduler


@torch.no_grad()
def diffusers_path(network: ToyNetwork, x_t: Tensor, num_steps: int, prediction_type: str, clip: bool) -> list[Tensor]:
    scheduler = scheduler_for(prediction_type, clip)
    scheduler.set_timesteps(num_steps)
    path = []
    for timestep in scheduler.timesteps.tolist():
        time = torch.full((len(x_t),), (timestep + 1) / TABLE, dtype=torch.float64)
        x_t = scheduler.step(network(x_t, time), timestep, x_t, use_clipped_model_output=clip).prev_sample
        path.append(x_t)
    return path


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 64])
@either_clip
@every_prediction
def test_every_step_of_ddim_is_diffusers(
    prediction: Prediction, prediction_type: str, clip: bool, num_steps: int
) -> None:
    denoiser, x_1 = toy_denoiser(PROCESS, prediction), numbers(16, 3, 2)
    network = denoiser.network
    theirs = diffusers_path(network, x_1, num_steps, prediction_type, clip)
    ours = [step.x_s for step in trajectory(Clipped(denoiser) if clip else denoiser, x_1, num_steps)]
    # Diffusers computes sigma^2 as 1 - alpha^2, with a relative error of up to 1e-12 at the last timesteps.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(sample(Clipped(denoiser) if clip else denoiser, x_1, num_steps), ours[-1])


TRAILING: Final = {"clip_sample_range": 1.0, "timestep_spacing": "trailing", "num_train_timesteps": TABLE}


@torch.no_grad()
def ancestral_by_ddim(
    network: ToyNetwork, x_t: Tensor, noise: Tensor, prediction_type: str, clip: bool
) -> Iterator[Tensor]:
    """Take a step of DDIM with eta = 1, which is the ancestral step with the lower variance."""
    scheduler = scheduler_for(prediction_type, clip)
    scheduler.set_timesteps(len(noise))
    for timestep, drawn in zip(scheduler.timesteps.tolist(), noise, strict=True):
        output = network(x_t, clock((timestep + 1) / TABLE).expand(len(x_t)))
        step = scheduler.step(output, timestep, x_t, eta=1.0, use_clipped_model_output=clip, variance_noise=drawn)
        x_t = step.prev_sample
        yield x_t


@torch.no_grad()
def ancestral_by_ddpm(
    network: ToyNetwork, x_t: Tensor, noise: Tensor, variance_type: str, prediction_type: str, clip: bool
) -> Iterator[Tensor]:
    """Take a step of DDPM with our noise instead of its own.

    DDPM draws noise at each timestep above 0. On a trailing grid that includes the last step, which gets zeros here.
    """
    scheduler = DDPMScheduler(
        variance_type=variance_type, prediction_type=prediction_type, clip_sample=clip, **TRAILING
    )
    alpha, _ = PROCESS.alpha_sigma(table_times())
    scheduler.alphas_cumprod = alpha**2
    scheduler.set_timesteps(len(noise))
    given = torch.cat([noise[:-1], torch.zeros_like(noise[:1])])
    with pytest.MonkeyPatch.context() as patch:
        for timestep, drawn in zip(scheduler.timesteps.tolist(), given, strict=True):
            patch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, drawn=drawn, **__: drawn)
            output = network(x_t, clock((timestep + 1) / TABLE).expand(len(x_t)))
            x_t = scheduler.step(output, timestep, x_t).prev_sample
            yield x_t


every_reference = pytest.mark.parametrize("reference", ["ddim eta 1", "fixed_small", "fixed_large"])


@in_turn("num_steps", [1, 2, 4, 8, 64])
@either_clip
@every_prediction
@every_reference
def test_every_step_of_ancestral_sampling_is_diffusers(
    reference: str, prediction: Prediction, prediction_type: str, clip: bool, num_steps: int
) -> None:
    """With the same noise, gamma = 0 is DDIM with eta = 1 and DDPM's "fixed_small", gamma = 1 its "fixed_large"."""
    assert_ancestral_steps_are_diffusers(reference, prediction, prediction_type, clip, num_steps)


@every_reference
def test_every_step_of_ancestral_sampling_through_every_timestep_is_diffusers(reference: str) -> None:
    assert_ancestral_steps_are_diffusers(reference, V(), "v_prediction", True, TABLE)


@pytest.mark.slow
@either_clip
@every_prediction
@every_reference
def test_every_step_of_ancestral_sampling_through_every_timestep_is_diffusers_in_every_prediction(
    reference: str, prediction: Prediction, prediction_type: str, clip: bool
) -> None:
    assert_ancestral_steps_are_diffusers(reference, prediction, prediction_type, clip, TABLE)


def assert_ancestral_steps_are_diffusers(
    reference: str, prediction: Prediction, prediction_type: str, clip: bool, num_steps: int
) -> None:
    denoiser, x_1 = toy_denoiser(PROCESS, prediction), numbers(4, 3, 2)
    noise = numbers(num_steps, 4, 3, 2, seed=1)
    network: Any = denoiser.network
    if reference == "ddim eta 1":
        theirs = ancestral_by_ddim(network, x_1, noise, prediction_type, clip)
    else:
        theirs = ancestral_by_ddpm(network, x_1, noise, reference, prediction_type, clip)
    sampler = Ancestral(1.0 if reference == "fixed_large" else 0.0)
    ours = trajectory(Clipped(denoiser) if clip else denoiser, x_1, num_steps, sampler, noise=noise.__getitem__)
    for step, their_x_s in zip(ours, theirs, strict=True):
        # 1 - alpha^2 costs diffusers up to 1e-12 of sigma^2, and the difference of two such values up to 1e-10 of
        # DDPM's variance for the shortest steps.
        torch.testing.assert_close(step.x_s, their_x_s, rtol=1e-10, atol=1e-10)


LAST_TIMESTEP: Final = 895
"""The timestep of t = 0.875, where the other two samplers start: at zero SNR, diffusers' sigma / alpha would be 2e4."""


def later_times(num_steps: int) -> Tensor:
    """Return decreasing times from 0.875 in whole timesteps, followed by clean data."""
    times = torch.linspace(LAST_TIMESTEP + 1, 0, num_steps + 1, dtype=torch.float64).round() / TABLE
    assert len(times.unique()) == num_steps + 1
    return times


def set_steps(scheduler: Any, times: Tensor) -> None:
    """Set a scheduler's steps to those between our times, with sigma / alpha in float64, in its own layout."""
    timesteps = (times[:-1] * TABLE - 1).round().int().tolist()
    scheduler.set_timesteps(timesteps=timesteps)
    alpha, sigma = PROCESS.landing(times)
    exact = sigma / alpha
    if isinstance(scheduler, HeunDiscreteScheduler):
        exact = torch.cat([exact[:1], exact[1:-1].repeat_interleave(2), exact[-1:]])
    assert scheduler.sigmas.shape == exact.shape  # the old values are another schedule's
    scheduler.sigmas = exact


@torch.no_grad()
def heun_by_diffusers(network: ToyNetwork, x_t: Tensor, times: Tensor, prediction_type: str) -> Iterator[Tensor]:
    """Sample with diffusers' Heun: samples are x_t / alpha, and the network receives `scale_model_input` of them."""
    scheduler = HeunDiscreteScheduler(prediction_type=prediction_type, **TRAILING)
    set_steps(scheduler, times)
    radius = (1 + scheduler.sigmas**2).sqrt()
    y = x_t * radius[0]
    for index, timestep in enumerate(scheduler.timesteps):
        shown = scheduler.scale_model_input(y, timestep)
        time = (clock(float(timestep)) + 1) / TABLE
        y = scheduler.step(network(shown, time.expand(len(y))), timestep, y).prev_sample
        # Compare after the second stage of a step, and after the last, which has only one.
        if scheduler.state_in_first_order or index == len(scheduler.timesteps) - 1:
            yield y / radius[index + 1]


class WithoutRounding(DPMSolverMultistepScheduler):
    """Diffusers' scheduler without its rounding of samples to float32. Everything else is diffusers' code, including
    the choice between the two updates."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.unrounded = sample
        return super().step(model_output, timestep, sample, *args, **kwargs)

    def dpm_solver_first_order_update(
        self, *args: Any, sample: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        exact = None if noise is None else noise.to(self.unrounded)
        return super().dpm_solver_first_order_update(*args, sample=self.unrounded, noise=exact, **kwargs)

    def multistep_dpm_solver_second_order_update(self, *args: Any, sample: Tensor, **kwargs: Any) -> Tensor:
        return super().multistep_dpm_solver_second_order_update(*args, sample=self.unrounded, **kwargs)


@torch.no_grad()
def dpmpp_2m_by_diffusers(network: ToyNetwork, x_t: Tensor, times: Tensor, prediction_type: str) -> Iterator[Tensor]:
    scheduler = WithoutRounding(
        num_train_timesteps=TABLE,
        prediction_type=prediction_type,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
        lower_order_final=True,
    )
    set_steps(scheduler, times)
    for timestep in scheduler.timesteps:
        time = (clock(float(timestep)) + 1) / TABLE
        x_t = scheduler.step(network(x_t, time.expand(len(x_t))), timestep, x_t).prev_sample
        yield x_t


@pytest.mark.parametrize("num_steps", [1, 2, 3, 8, 14, 15, 64])
@every_prediction
@pytest.mark.parametrize(
    ("sampler", "reference"),
    [
        pytest.param(Heun(NoiseToSignal()), heun_by_diffusers, id="heun"),
        pytest.param(DPMSolverPP2M(), dpmpp_2m_by_diffusers, id="dpmpp_2m"),
    ],
)
def test_every_step_of_heun_and_of_dpmpp_2m_is_diffusers(
    sampler: Sampler, reference: Any, prediction: Prediction, prediction_type: str, num_steps: int
) -> None:
    denoiser, x_t = toy_denoiser(PROCESS, prediction), numbers(16, 3, 2)
    theirs = reference(denoiser.network, x_t, later_times(num_steps), prediction_type)
    ours = trajectory(denoiser, x_t, num_steps, sampler, grid=later_times)
    for step, their_x_s in zip(ours, theirs, strict=True):
        torch.testing.assert_close(step.x_s, their_x_s, rtol=1e-12, atol=1e-12)


def stock_sde(process: NoiseProcess, times: Tensor) -> Any:
    """Return diffusers' SDE-DPM-Solver++ of order 1 for v or the flow velocity, on our times in float64."""
    settings: dict[str, Any] = {"prediction_type": "v_prediction"}
    if isinstance(process, FlowMatching):
        settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": process.shift}
    scheduler = WithoutRounding(
        algorithm_type="sde-dpmsolver++",
        solver_order=1,
        final_sigmas_type="zero",
        num_train_timesteps=TABLE,
        **settings,
    )
    scheduler.set_timesteps(len(times) - 1)
    alpha, sigma = process.landing(times)
    exact = sigma if isinstance(process, FlowMatching) else sigma / alpha
    assert scheduler.sigmas.shape == exact.shape
    scheduler.sigmas = exact
    return scheduler


@in_turn("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "process",
    [VPCosine(), VPTable(linear_betas(TABLE)), VPTable(cosine_betas(TABLE)), FlowMatching(), FlowMatching(3.0)],
    ids=["cosine", "linear betas", "cosine betas", "flow", "flow of shift 3"],
)
@torch.no_grad()
def test_ancestral_sampling_with_the_lower_variance_is_the_stock_sde_solver(
    process: NoiseProcess, num_steps: int
) -> None:
    """Steps from the same noise are equal, so mean and variance are equal. Without noise, only the means are."""
    prediction = FlowVelocity() if isinstance(process, FlowMatching) else V()
    denoiser, x_t = toy_denoiser(process, prediction), numbers(4, 3, 2)
    # Diffusers rounds the given noise to float32.
    for noise in (numbers(num_steps, 4, 3, 2, seed=1).float().double(), torch.zeros(num_steps, 4, 3, 2).double()):
        scheduler, theirs = stock_sde(process, uniform_times(num_steps)), x_t
        ours = trajectory(denoiser, x_t, num_steps, Ancestral(0.0), noise=noise.__getitem__)
        for step, timestep, drawn in zip(ours, scheduler.timesteps, noise, strict=True):
            output = denoiser.network(theirs, clock(step.t).expand(len(theirs)))
            theirs = scheduler.step(output, timestep, theirs, variance_noise=drawn).prev_sample
            # exp(-2 h) near 1 and sigma / alpha of 2e4 cost diffusers several digits.
            torch.testing.assert_close(step.x_s, theirs, rtol=1e-8, atol=1e-8)
