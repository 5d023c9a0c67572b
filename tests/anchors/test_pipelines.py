"""Our samples from an imported pipeline equal those of the pipeline, with the same steps, noise and guidance."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from halfstep.hub.encoding import text_conditions
from halfstep.hub.pipelines import import_pipeline
from halfstep.hub.schedulers import SHIFTED_TABLES, TABLES, read_schedule
from halfstep.hub.stock import stock
from halfstep.models.model import Model
from halfstep.samplers import sample
from support_pipelines import assert_same, noise, quietly, save_ddpm, save_dit, save_sd, save_sd3, times_of


def ours(model: Model, x_1: Tensor, scheduler: Any, num_steps: int, **conditions: Any) -> Tensor:
    """Return our samples at the times of the pipeline's own scheduler."""
    cond = model.cond(range(len(x_1)), **conditions)
    return sample(model, x_1, num_steps, cond=cond, grid=lambda n: times_of(scheduler, n))


def fed(monkeypatch: pytest.MonkeyPatch, module: Any, x_1: Tensor) -> None:
    """Make a pipeline without an argument for latents start from `x_1`."""
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: x_1.clone())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_an_unconditional_image_pipeline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, prediction: str, spacing: str
) -> None:
    from diffusers.pipelines.ddim import pipeline_ddim

    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, timestep_spacing=spacing)
    model = import_pipeline(save_ddpm(tmp_path / "ddim", scheduler, "DDIMPipeline"))
    pipe = quietly(diffusers.DDIMPipeline.from_pretrained(tmp_path / "ddim"))
    x_1 = noise(2, 3, 8, 8)
    fed(monkeypatch, pipeline_ddim, x_1)
    for num_steps in (1, 2, 4, 10):
        found = ours(model, x_1, pipe.scheduler, num_steps)
        images = pipe(2, num_inference_steps=num_steps, use_clipped_model_output=True, output_type="np").images
        assert_same(found.clamp(-1, 1), torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
        {"trained_betas": [0.01 + 0.0001 * k for k in range(200)], "num_train_timesteps": 200},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"clip_sample": False, "set_alpha_to_one": False},
    ],
    ids=["cosine", "scaled-linear", "trained", "zero-snr", "unclipped-alpha-not-one"],
)
def test_every_table_of_betas(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any]) -> None:
    from diffusers.pipelines.ddim import pipeline_ddim

    scheduler = diffusers.DDIMScheduler(**settings)
    model = import_pipeline(save_ddpm(tmp_path / "ddim", scheduler, "DDIMPipeline"))
    pipe = quietly(diffusers.DDIMPipeline.from_pretrained(tmp_path / "ddim"))
    x_1 = noise(2, 3, 8, 8)
    fed(monkeypatch, pipeline_ddim, x_1)
    found = ours(model, x_1, pipe.scheduler, 4)
    images = pipe(2, num_inference_steps=4, use_clipped_model_output=True, output_type="np").images
    assert_same(found.clamp(-1, 1), torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1)


def test_the_channels_of_a_learned_variance_are_left_out(tmp_path: Path) -> None:
    """The network has twice the channels, of which diffusers' own DDIM uses only the first half."""
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range", timestep_spacing="trailing")
    folder = save_ddpm(tmp_path / "ddpm", scheduler, out_channels=6)
    model = import_pipeline(folder)
    assert model.shape == (3, 8, 8)
    assert model.denoiser.network.config["out_channels"] == 3
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet")
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(8)
    x_1 = noise(2, 3, 8, 8)
    x_t = x_1
    with torch.no_grad():
        for timestep in ddim.timesteps:
            eps, _ = unet(x_t, timestep).sample.chunk(2, dim=1)
            x_t = ddim.step(eps, timestep, x_t, use_clipped_model_output=True).prev_sample
        found = ours(model, x_1, ddim, 8)
    assert_same(found, x_t)


def test_a_dit_of_classes_with_guidance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffusers.pipelines.dit import pipeline_dit

    model = import_pipeline(save_dit(tmp_path / "dit"))
    pipe = quietly(diffusers.DiTPipeline.from_pretrained(tmp_path / "dit"))
    x_1 = noise(2, 4, 4, 4)
    fed(monkeypatch, pipeline_dit, x_1)
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, *a, **k: latents.append(z) or decode(z, *a, **k))
    for guidance_scale, num_steps in itertools.product((1.0, 4.0), (1, 4, 10)):
        pipe([3, 3], guidance_scale=guidance_scale, num_inference_steps=num_steps)
        found = ours(model, x_1, pipe.scheduler, num_steps, class_label=3, guidance_scale=guidance_scale)
        assert_same(found, latents.pop() * pipe.vae.config.scaling_factor)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_latent_text_to_image_with_guidance(tmp_path: Path, prediction: str) -> None:
    folder = save_sd(tmp_path / "sd", tmp_path / "tokens", prediction, timestep_spacing="trailing")
    model = import_pipeline(folder)
    pipe = quietly(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    x_1 = noise(2, 4, 4, 4)
    cond = text_conditions(model.manifest, ["a cat", "b"])
    for guidance_scale, num_steps in itertools.product((1.0, 7.5), (2, 4)):
        stock = pipe(
            ["a cat", "b"], latents=x_1, guidance_scale=guidance_scale, num_inference_steps=num_steps,
            output_type="latent", height=8, width=8,
        ).images  # fmt: skip
        found = ours(model, x_1, pipe.scheduler, num_steps, guidance_scale=guidance_scale, others=cond)
        assert_same(found, stock)


def test_a_flow_matching_transformer_with_guidance(tmp_path: Path) -> None:
    folder = save_sd3(tmp_path / "sd3", tmp_path / "tokens")
    model = import_pipeline(folder)
    pipe = quietly(diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None))
    x_1 = noise(2, 4, 4, 4)
    cond = text_conditions(model.manifest, ["a cat", "b"])
    for guidance_scale, num_steps in itertools.product((1.0, 5.0), (1, 4)):
        stock = pipe(
            ["a cat", "b"], latents=x_1, guidance_scale=guidance_scale, num_inference_steps=num_steps,
            output_type="latent", height=8, width=8,
        ).images  # fmt: skip
        found = ours(model, x_1, pipe.scheduler, num_steps, guidance_scale=guidance_scale, others=cond)
        assert_same(found, stock)


@pytest.mark.parametrize(
    ("setting", "bound"), [("clip_sample", "clip_sample_range"), ("thresholding", "sample_max_value")]
)
@pytest.mark.parametrize("kind", [*TABLES, *SHIFTED_TABLES])
def test_samples_are_clipped_only_if_the_scheduler_clips_them(kind: str, setting: str, bound: str) -> None:
    """Configs are passed between schedulers, so they contain settings that a scheduler ignores."""
    config = {"_class_name": kind, "clip_sample": False, "thresholding": False}
    x_t, eps = noise(2, 1, 3, 4, 4)

    def stepped(config: dict[str, Any]) -> Tensor:
        scheduler = stock(kind).from_config(config)
        scheduler.set_timesteps(4)
        named = {"old_pred_original_sample": None, "timestep_back": None} if kind == "CogVideoXDPMScheduler" else {}
        torch.manual_seed(0)
        step = scheduler.step(10 * eps, timestep=scheduler.timesteps[0], sample=x_t, **named, return_dict=False)
        return torch.as_tensor(step[0])

    is_clipped = not torch.equal(stepped(config), stepped(config | {setting: True}))
    assert read_schedule(config | {setting: True}).clip == is_clipped
    expectation = pytest.raises(ValueError, match=f"has {bound} 2.5") if is_clipped else nullcontext()
    with expectation:
        assert not read_schedule(config | {setting: True, bound: 2.5}).clip
