"""Every example runs, is short and shows its claim: students are closer to their teacher than its own few steps."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile
from torch import Tensor

import support_pipelines
from halfstep.core.noise import VPTable
from halfstep.data import DataConfig, open_data, open_latents
from halfstep.hub import text_conditions
from halfstep.metrics import train_classifier
from halfstep.models.folder import load
from halfstep.samplers import sample
from support_pipelines import assert_same, noise, quietly, save_sd

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
SCRIPTS: Final = sorted(EXAMPLES.glob("*.py"))


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WITH_NETWORK: Final = "someone_elses_teacher.py"
"""The example with another project's network."""
FOREIGN: Final = Path(__file__).parents[3] / "shared" / "data"


def test_there_are_ten_short_examples() -> None:
    assert len(SCRIPTS) == 10
    for script in SCRIPTS:
        assert len(script.read_text().splitlines()) < (80 if script.name == WITH_NETWORK else 60), script.name


@pytest.mark.parametrize(
    ("name", "budget", "share"),
    [
        ("toy_2d", {"teacher_updates": 100, "student_updates": 25}, 0.6),
        pytest.param(
            *("class_conditional_guidance", {"teacher_updates": 120, "student_updates": 70, "start": 16}, 0.9),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("action_policy", {"teacher_updates": 60, "student_updates": 15}, 0.8), marks=pytest.mark.slow),
        pytest.param(
            *("flow_matching_teacher", {"teacher_updates": 100, "student_updates": 25}, 0.6), marks=pytest.mark.slow
        ),
        ("own_network", {"teacher_updates": 200, "student_updates": 40}, 0.6),
    ],
)
def test_the_student_is_nearer_to_its_teacher_than_the_teacher_s_own_few_steps(
    name: str, budget: dict[str, Any], share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    student, teacher = loaded(name).main(**budget)
    assert 0 < student < share * teacher


def test_the_example_of_guidance_trains_and_samples() -> None:
    """Its claim needs two minutes, above. With one update each, a student is as far off as its untrained teacher."""
    student, teacher = loaded("class_conditional_guidance").main(teacher_updates=2, student_updates=1, start=8)
    assert 0 < teacher < 2
    assert 0 < student < 2


@pytest.mark.slow
def test_lora_weights_of_the_latent_example_give_the_same_samples_in_stock_diffusers(tmp_path: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    torch.set_num_threads(1)
    pipeline = save_sd(tmp_path / "sd", tmp_path / "tokens")
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8), (40 * index, 10, 200)).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text("ab"[index % 2])
    budget = (
        *("--matching.num-updates", "40", "--matching.batch-size", "8", "--matching.learning-rate", "1e-2"),
        *("--chain.start-steps", "8", "--chain.num-updates", "20", "--chain.batch-size", "8"),
        *("--chain.lora-rank", "2", "--chain.learning-rate", "1e-2", "--evaluation.no-enabled"),
    )
    example = loaded("latent_text_to_image_lora")
    run, lora = example.main(str(pipeline), str(images), tmp_path / "out", budget)

    pipe = quietly(StableDiffusionPipeline.from_pretrained(pipeline))
    pipe.scheduler = DDIMScheduler.from_pretrained(lora, subfolder="scheduler")
    x_1 = noise(2, 4, 4, 4)
    call: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    before = pipe(["a b", "b"], latents=x_1, height=8, width=8, **call).images
    pipe.load_lora_weights(str(lora))
    after = pipe(["a b", "b"], latents=x_1, height=8, width=8, **call).images
    model = load(run)
    cond = model.cond(range(2), others=text_conditions(model.manifest, ["a b", "b"]))
    assert_same(sample(model, x_1, 4, cond=cond), after)
    assert float((after - before).abs().max()) > 100 * 1e-4

    full = sum(file.stat().st_size for file in (pipeline / "unet").glob("*.safetensors"))
    assert sum(file.stat().st_size for file in lora.glob("*.safetensors")) < 0.05 * full


@pytest.mark.parametrize(
    ("name", "family", "call"),
    [
        ("sdxl_from_prompts", "sdxl", {"height": 8, "width": 8}),
        ("wan_video", "wan", {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}),
    ],
)
def test_an_example_of_prompts_alone_samples_in_stock_diffusers_as_here(
    name: str, family: str, call: dict[str, Any], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    pipeline, prompts, example = tmp_path / family, tmp_path / "prompts.txt", loaded(name)
    getattr(support_pipelines, f"tiny_{family}")(tmp_path / "tokens").save_pretrained(pipeline)
    prompts.write_text("a b\nb\n")
    budget = (
        *("--matching.num-updates", "2", "--matching.batch-size", "2", "--chain.start-steps", "8"),
        *("--chain.num-updates", "2", "--chain.batch-size", "2", "--chain.lora-rank", "2", "--evaluation.no-enabled"),
        *("--base-precision", "bf16", "--call", *(f"{key}={value}" for key, value in call.items())),
    )
    # The export compares the stock pipeline's samples with ours.
    run, exported = example.main(str(pipeline), str(prompts), tmp_path / "out", budget)
    assert load(run).num_steps == 4
    assert (exported / "model_index.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("has_recordings", [True, False])
def test_the_sounds_of_the_audio_example_are_decoded_samples_of_its_student(
    has_recordings: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sounds of 1.25 s at 8 Hz, from a student of sounds of at most 1.5 s."""
    pytest.importorskip("torchsde")
    from diffusers import StableAudioDiTModel

    torch.set_num_threads(1)
    pipe, pipeline = support_pipelines.tiny_encoding_stable_audio(tmp_path / "tokens"), tmp_path / "audio"
    pipe.save_pretrained(pipeline)
    example, sounds, prompts = loaded("stable_audio"), tmp_path / "sounds", ["a cat", "b on a mat"]
    if has_recordings:
        sounds.mkdir()
        for number, prompt in enumerate(prompts):
            wave = np.random.default_rng(number).normal(size=(9 + 4 * number, 2)) / 4
            wavfile.write(sounds / f"{number}.wav", 8, wave.astype(np.float32))
            (sounds / f"{number}.txt").write_text(prompt)
    else:
        sounds.write_text("\n".join(prompts))
    budget = (
        *("--matching.num-updates", "2", "--matching.batch-size", "2", "--chain.start-steps", "8"),
        *("--chain.num-updates", "2", "--chain.batch-size", "2", "--chain.lora-rank", "2", "--evaluation.no-enabled"),
        *("--base-precision", "bf16", "--chain.learning-rate", "0.01"),
    )
    run, exported = example.main(str(pipeline), str(sounds), tmp_path / "out", budget, 1.5)
    student = load(run).merged()
    assert student.num_steps == 4
    if has_recordings:
        batch = open_latents(tmp_path / "out" / "latents").fetch(torch.arange(2))
        for name, value in text_conditions(student.manifest, prompts, [9 / 8, 1.5]).items():
            assert_same(batch.cond[name], value)

    rows, forward = list[int](), StableAudioDiTModel.forward

    def counted(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        rows.append(len(hidden_states))
        return forward(self, hidden_states, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StableAudioDiTModel, "forward", counted)
        example.use(exported, prompts, tmp_path, 1.25)
    assert rows == [2] * 4

    x_1 = torch.randn(2, *student.shape, generator=torch.manual_seed(0))
    cond = student.cond(range(2), others=text_conditions(student.manifest, prompts, [1.25] * 2))
    with torch.no_grad():
        ours = pipe.vae.decode(sample(student, x_1, 4, cond=cond)).sample[..., :10].clamp(-1, 1)
    assert float(ours.std()) > 0.01
    for number, sound in enumerate(ours):
        rate, values = wavfile.read(tmp_path / f"{number}.wav")
        assert (rate, values.dtype, values.shape) == (8, np.int16, (10, 2))
        assert_same(torch.from_numpy(values.T) / 32767, sound)


@pytest.mark.parametrize(
    ("name", "usage"),
    [
        ("latent_text_to_image_lora", "PIPELINE IMAGES OUT"),
        ("sdxl_from_prompts", "PIPELINE PROMPTS OUT"),
        ("wan_video", "PIPELINE PROMPTS OUT"),
        ("stable_audio", "PIPELINE SOUNDS OUT"),
    ],
)
def test_an_example_of_pipelines_prints_its_usage(name: str, usage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match=usage):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def foreign_weights(file: Path) -> dict[str, torch.Tensor]:
    """Write random weights with the other project's names and shapes, and return them."""
    torch.manual_seed(0)
    skeleton = loaded("someone_elses_teacher").Theirs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "load_state_dict", lambda *_, **__: None)
        patch.setitem(skeleton.__init__.__globals__, "load_file", lambda _: {})
        network = skeleton("none")
    held = {f"network.{name}": value for name, value in network.state_dict().items()}
    save_file(held | {"network.b_out.2.ln.weight": torch.ones(10, 28, 28)}, file)
    return held


def test_a_network_of_another_project_becomes_students_of_8_4_and_1_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, images = tmp_path / "weights.safetensors", tmp_path / "images.npz"
    held = foreign_weights(weights)
    example = loaded("someone_elses_teacher")
    network = example.Theirs(str(weights))
    assert all(torch.equal(value, held[f"network.{name}"]) for name, value in network.state_dict().items())
    # Level k is at time (k + 1) / 1000: each embeds its own row, also in float32.
    levels = torch.arange(1000)
    seen: list[torch.Tensor] = []
    network.time_embed.register_forward_pre_hook(lambda _, rows: seen.append(rows[0]))
    for part in levels.split(250):
        network(torch.zeros(len(part), 1, 28, 28), ((part.double() + 1) / 1000).float())
    assert torch.equal(torch.cat(seen), levels)

    pixels = torch.randint(256, (40, 28, 28, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    np.savez(images, x=pixels.numpy(), labels=np.arange(40) % 2)
    monkeypatch.setattr(example, "train_classifier", functools.partial(train_classifier, num_updates=2))
    found = example.main(str(weights), str(images), updates=1, batch=2, number=2)
    assert list(found) == ["teacher, 50", "teacher, 8", "student, 8", "student, 4", "student, 1"]
    assert all(0 < distance < float("inf") for distance in found.values())


@pytest.mark.skipif(not FOREIGN.is_dir(), reason=f"the published weights are not in {FOREIGN}")
@torch.no_grad()
def test_the_published_weights_tell_noise_from_clothes_at_their_own_levels() -> None:
    """Compare with eps = sigma x_t, the best estimate for unit normal data."""
    example = loaded("someone_elses_teacher")
    network = example.Theirs(str(FOREIGN / "foreign" / "ddpm_fashion.safetensors")).eval()
    process = VPTable()
    x0 = open_data(DataConfig(source=str(FOREIGN / "fashion-mnist"), split="test")).fetch(torch.arange(16)).x0
    eps = torch.randn(16, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    for level in (100, 201, 400):
        t = torch.full((16,), (level + 1) / 1000, dtype=torch.float64)
        x_t, sigma = process.mix(x0, eps, t), float(process.alpha_sigma(t)[1][0])
        error, guess = ((found - eps).square().mean() for found in (network(x_t, t.float()), sigma * x_t))
        assert float(error) < 0.3 * float(guess)
