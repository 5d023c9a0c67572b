"""The exported folder gives our samples in plain diffusers."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import FlowMatching, VPCosine, processes
from halfstep.core.prediction import FlowVelocity, V, predictions
from halfstep.hub import export_pipeline, import_pipeline, text_conditions
from halfstep.models.model import Model
from halfstep.nets import describe_network, with_guidance
from halfstep.objectives import guidances
from halfstep.recipes import UNetConfig
from halfstep.runs import Manifest, Metrics, Outcome
from halfstep.samplers import sample
from support_pipelines import assert_same, noise, quietly, save_ddpm, save_dit, save_sd, save_sd3, wake

STEPS = (1, 2, 4, 8)


def fixed(scale: float) -> dict[str, Any]:
    """Return fixed guidance as a manifest stores it."""
    return {"type": "fixed", "scale": scale}


def as_student(model: Model, **changes: Any) -> Model:
    """Return the model as after a matching stage: predicting v, with a null condition."""
    prediction: Any = changes.pop("keep", None) or V()
    manifest = model.manifest.model_copy(update={"prediction": predictions.describe(prediction), **changes})
    denoiser = NetworkDenoiser(model.denoiser.network, model.process, prediction)
    return Model(denoiser, manifest)


def digits_student(clip: bool, num_classes: int) -> Model:
    """Return a network like those of our recipes, on the cosine process with a power of two of timesteps."""
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(16, 32), layers_per_block=1, attention_head_dim=8, norm_num_groups=8,
        attention=(False, True),
    )  # fmt: skip
    network = config.build((3, 8, 8), num_classes, 1)
    wake(network)
    manifest = Manifest(
        stage="04-halve-0004", objective="halve", parent="03-halve-0008", outcome=Outcome(role="student"),
        num_updates=1, seconds=1.0, shape=(3, 8, 8), num_classes=num_classes, is_image=True, clip=clip,
        network=describe_network(network), process=processes.describe(VPCosine()), prediction={"type": "v"}, files={},
    )  # fmt: skip
    return Model(NetworkDenoiser(network, VPCosine(), V()), manifest)


def ddim_images(
    folder: Path, x_1: Tensor, monkeypatch: pytest.MonkeyPatch, steps: Sequence[int] = STEPS
) -> Iterator[tuple[int, Tensor]]:
    """Return each number of steps, with the samples of the stock pipeline in the folder from `x_1`."""
    from diffusers.pipelines.ddim import pipeline_ddim

    pipe = quietly(diffusers.DDIMPipeline.from_pretrained(folder))
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: x_1.clone())
    options = {"use_clipped_model_output": True, "output_type": "np"}
    for num_steps in steps:
        images = pipe(len(x_1), num_inference_steps=num_steps, **options).images
        yield num_steps, torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("clip", [True, False])
def test_an_image_model_on_the_cosine_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: bool) -> None:
    model = digits_student(clip, 0)
    folder = export_pipeline(model, tmp_path / "out")
    x_1 = noise(2, 3, 8, 8)
    for num_steps, images in ddim_images(folder, x_1, monkeypatch):
        assert_same(sample(model, x_1, num_steps).clamp(-1, 1), images)


def test_a_student_of_many_steps_is_exported_if_they_divide_the_timesteps(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = as_student(digits_student(False, 0), outcome=Outcome(role="student", num_steps=128))
    folder = export_pipeline(model, tmp_path / "out")
    x_1 = noise(1, 3, 8, 8)
    ((_, images),) = ddim_images(folder, x_1, monkeypatch, [128])
    assert_same(sample(model, x_1, 128).clamp(-1, 1), images)
    # The card does not say that 64 steps are the most.
    assert "32, 64, ... steps, the exported scheduler uses the exact times" in (folder / "README.md").read_text()
    odd = as_student(digits_student(False, 0), outcome=Outcome(role="student", num_steps=96))
    with pytest.raises(
        ValueError, match=r"96 steps exactly; it can only represent 1, .*, 64 and some larger numbers\."
    ):
        export_pipeline(odd, tmp_path / "odd")


@pytest.mark.parametrize("num_classes", [0, 5])
def test_an_image_model_on_the_flow_matching_path_is_refused(tmp_path: Path, num_classes: int) -> None:
    """Its pipeline would replace the scheduler by a `DDIMScheduler` with default settings."""
    model = digits_student(False, num_classes)
    changes = {"process": processes.describe(FlowMatching()), "prediction": predictions.describe(FlowVelocity())}
    manifest = model.manifest.model_copy(update=changes)
    flow = Model(NetworkDenoiser(model.denoiser.network, FlowMatching(), FlowVelocity()), manifest)
    with pytest.raises(ValueError, match=r"no pipeline for a UNet2DModel on the flow-matching path\. Use"):
        export_pipeline(flow, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_contains_no_path_of_the_machine(tmp_path: Path) -> None:
    model = digits_student(False, 0)
    row = {"sampler": "ddim", "num_steps": 4, "num_evals": 4, "frechet": 1.0, "kid": 0.1, "seconds_per_1000": 1.0}
    protocol = {"features": "pixels", "reference": "/home/me/private/photos", "num_samples": 50}
    metrics = Metrics.model_validate({"stage": "s", "protocol": protocol, "results": [row]})
    card = (export_pipeline(model, tmp_path / "out", metrics) / "README.md").read_text()
    assert "features: pixels; reference: photos; num samples: 50." in card
    assert "/home/me" not in card


@pytest.mark.parametrize("settings", [{}, {"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}])
def test_an_image_model_on_a_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: dict[str, Any]) -> None:
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **settings)
    model = as_student(import_pipeline(save_ddpm(tmp_path / "teacher", scheduler, "DDIMPipeline")))
    folder = export_pipeline(model, tmp_path / "out")
    x_1 = noise(2, 3, 8, 8)
    for num_steps, images in ddim_images(folder, x_1, monkeypatch):
        assert_same(sample(model, x_1, num_steps).clamp(-1, 1), images)


@pytest.mark.parametrize("clip", [True, False])
def test_an_image_model_of_classes(tmp_path: Path, clip: bool) -> None:
    """Its pipeline has no argument for clipping: the scheduler alone recomputes the noise."""
    model = digits_student(clip, 5)
    folder = export_pipeline(model, tmp_path / "out")
    pipe = quietly(diffusers.ConsistencyModelPipeline.from_pretrained(folder))
    x_1 = noise(3, 3, 8, 8)
    for num_steps in STEPS:
        images = pipe(3, class_labels=[0, 4, 2], num_inference_steps=num_steps, latents=x_1, output_type="np").images
        found = sample(model, x_1, num_steps, cond={"class_labels": torch.tensor([0, 4, 2])})
        assert_same(found.clamp(-1, 1), torch.as_tensor(images).permute(0, 3, 1, 2) * 2 - 1)


@pytest.mark.parametrize("clip", [False, True])
def test_a_dit_with_baked_in_guidance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: bool) -> None:
    """If x0 is clipped, its pipeline does not pass use_clipped_model_output: the scheduler alone must do it."""
    from diffusers.pipelines.dit import pipeline_dit

    model = as_student(import_pipeline(save_dit(tmp_path / "dit")), guidance=fixed(4.0), clip=clip)
    folder = export_pipeline(model, tmp_path / "out")
    pipe = quietly(diffusers.DiTPipeline.from_pretrained(folder))
    x_1 = noise(2, 4, 4, 4)
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *args, **kwargs: x_1.clone())
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda z, *a, **k: latents.append(z) or decode(z, *a, **k))
    for num_steps in STEPS:
        pipe([3, 3], guidance_scale=1.0, num_inference_steps=num_steps)
        made = latents.pop()
        assert not clip or float(made.abs().max()) <= pipe.vae.config.scaling_factor**-1
        found = sample(model, x_1, num_steps, cond=model.cond(range(2), class_label=3))
        assert_same(found, made * pipe.vae.config.scaling_factor)
    assert pipe.labels["cat"] == 1


@pytest.mark.parametrize("guidance", [fixed(7.5), {"type": "range", "low": 1.0, "high": 8.0}], ids=["fixed", "range"])
def test_latent_text_to_image(tmp_path: Path, guidance: dict[str, Any]) -> None:
    usual = guidances.rebuild(guidance).default_scale
    teacher = import_pipeline(save_sd(tmp_path / "sd", tmp_path / "tokens"))
    model = as_student(teacher, guidance=guidance, guidance_scale=usual)
    if guidance["type"] == "range":
        network = with_guidance(model.denoiser.network)
        wake(network)
        model = Model(NetworkDenoiser(network, model.process, V()), model.manifest)
    folder = export_pipeline(model, tmp_path / "out")
    pipe = quietly(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    x_1 = noise(2, 4, 4, 4)
    asked = 1.0 if guidance["type"] == "fixed" else 3.0
    own = None if guidance["type"] == "fixed" else asked
    texts = text_conditions(model.manifest, ["a cat", "b"])
    for num_steps in STEPS:
        stock = pipe(
            ["a cat", "b"], latents=x_1, guidance_scale=asked, num_inference_steps=num_steps, output_type="latent",
            height=8, width=8,
        ).images  # fmt: skip
        cond = model.cond(range(2), guidance_scale=own, others=texts)
        assert_same(sample(model, x_1, num_steps, cond=cond), stock)
        if own is not None:
            other = model.cond(range(2), guidance_scale=6.0, others=texts)
            assert float((sample(model, x_1, num_steps, cond=other) - stock).abs().max()) > 1e-2


def test_a_flow_matching_transformer(tmp_path: Path) -> None:
    teacher = import_pipeline(save_sd3(tmp_path / "sd3", tmp_path / "tokens"))
    model = as_student(teacher, keep=teacher.denoiser.prediction, guidance=fixed(5.0))
    folder = export_pipeline(model, tmp_path / "out")
    pipe = quietly(diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None))
    x_1 = noise(2, 4, 4, 4)
    cond = model.cond(range(2), others=text_conditions(model.manifest, ["a cat", "b"]))
    for num_steps in STEPS:
        stock = pipe(
            ["a cat", "b"], latents=x_1, guidance_scale=1.0, num_inference_steps=num_steps, output_type="latent",
            sigmas=[1 - k / num_steps for k in range(num_steps)], height=8, width=8,
        ).images  # fmt: skip
        assert_same(sample(model, x_1, num_steps, cond=cond), stock)
