"""DDIM on the cosine process is diffusers' DDIMScheduler on the table of its amplitudes."""

from typing import Final

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from halfstep.core.denoiser import Clipped
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import X0, Eps, Prediction, V
from halfstep.samplers import sample, trajectory
from support import ToyNetwork, numbers, toy_denoiser

TABLE: Final = 1024
PROCESS: Final = VPCosine()


def scheduler_for(prediction_type: str, clip: bool) -> DDIMScheduler:
    """Timestep k - 1 of diffusers is our t = k / TABLE. Its table is set after construction, where it would
    be rounded to float32."""
    scheduler = DDIMScheduler(
        num_train_timesteps=TABLE,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=clip,
        clip_sample_range=1.0,
    )
    alpha, _ = PROCESS.alpha_sigma(torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE)
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
@pytest.mark.parametrize("clip", [False, True], ids=["raw", "clipped"])
@pytest.mark.parametrize(
    ("prediction", "prediction_type"),
    [
        pytest.param(Eps(), "epsilon", id="eps"),
        pytest.param(X0(), "sample", id="x0"),
        pytest.param(V(), "v_prediction", id="v"),
    ],
)
def test_every_step_of_ddim_is_diffusers(
    prediction: Prediction, prediction_type: str, clip: bool, num_steps: int
) -> None:
    denoiser, x_1 = toy_denoiser(PROCESS, prediction), numbers(16, 3, 2)
    network = denoiser.network
    theirs = diffusers_path(network, x_1, num_steps, prediction_type, clip)
    ours = [step.x_s for step in trajectory(Clipped(denoiser) if clip else denoiser, x_1, num_steps)]
    # Diffusers forms sigma^2 as 1 - alpha^2, which leaves it a relative error of up to 1e-12 at the last
    # timesteps.
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert torch.equal(sample(Clipped(denoiser) if clip else denoiser, x_1, num_steps), ours[-1])
