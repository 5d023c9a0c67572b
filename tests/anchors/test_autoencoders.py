"""Images, videos and sounds become the latents that the pipelines' own ways from data to data make of them."""

import inspect
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor

import support_pipelines
from halfstep.cli import main
from halfstep.data import open_latents
from halfstep.hub import autoencoder_of, import_pipeline, text_conditions
from halfstep.hub.clock import grid_of
from halfstep.hub.schedulers import config_of, first_order, read_schedule
from halfstep.hub.stock import stock
from halfstep.hub.trace import trace
from halfstep.models.folder import load
from halfstep.samplers import sample
from support_cli import Capture, refused
from support_pipelines import assert_same, noise, quietly

VIDEO: Final = {"height": 16, "width": 32, "num_frames": 9}
FAMILIES: Final = {
    "wan": ("WanVideoToVideoPipeline", VIDEO | {"max_sequence_length": 16}),
    "cogvideox": ("CogVideoXVideoToVideoPipeline", VIDEO),
    "stable_audio": ("StableAudioPipeline", {}),
    "flux": ("FluxImg2ImgPipeline", {"height": 16, "width": 8}),
    "qwen": ("QwenImageImg2ImgPipeline", {"height": 16, "width": 24}),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", {"height": 8, "width": 16}),
}
"""Each with the pipeline that starts from data, and its arguments."""


def saved(name: str, folder: Path) -> tuple[Any, Path]:
    if name == "stable_audio":
        pytest.importorskip("torchsde")
    encoding = "encoding_" * (name == "stable_audio")
    pipe = getattr(support_pipelines, f"tiny_{encoding}{name}")(folder / "tokens")
    pipe.save_pretrained(folder / name)
    return pipe, folder / name


def prepared(name: str, pipe: Any, x: Tensor) -> Tensor:
    """The noise-free latents with which the family's other pipeline would start from `x`."""
    from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    kind = stock(FAMILIES[name][0])
    other = kind(
        **{part: pipe.components[part] for part in inspect.signature(kind).parameters if part in pipe.components}
    )
    taken = inspect.signature(other.prepare_latents).parameters
    given: dict[str, Any] = {
        "image": x, "video": x, "timestep": torch.tensor([1]), "batch_size": len(x), "num_channels_latents": 4,
        "height": x.shape[-2], "width": x.shape[-1], "dtype": torch.float32, "device": torch.device("cpu"),
        "generator": None, "num_images_per_prompt": 1, "add_noise": False,
    }  # fmt: skip
    if name == "stable_audio":
        given |= {
            "num_channels_vae": 3, "sample_size": 4, "initial_audio_waveforms": x, "num_waveforms_per_prompt": 1,
            "audio_channels": 2, "latents": torch.zeros(len(x), 3, 4),
        }  # fmt: skip
    if name == "wan":
        given["num_channels_latents"] = 16
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        for distribution in (DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution):
            patched.setattr(distribution, "sample", lambda self, generator=None: self.mode())
        for adds in ("add_noise", "scale_noise"):
            patched.setattr(type(other.scheduler), adds, lambda self, latents, *rest: latents, raising=False)
        found = other.prepare_latents(**{argument: value for argument, value in given.items() if argument in taken})
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("name", FAMILIES)
def test_latents_are_those_of_the_pipelines_own_way_from_data(name: str, tmp_path: Path) -> None:
    pipe, folder = saved(name, tmp_path)
    options: Any = FAMILIES[name][1]
    model = import_pipeline(folder, options)
    autoencoder = autoencoder_of(model)
    if "height" in options:
        sides = (options["height"], options["width"])
        assert autoencoder.decoded[-2:] == sides
        assert autoencoder.image_size == (None if "num_frames" in options else sides)
    assert "num_frames" not in options or autoencoder.decoded == (3, 9, 16, 32)
    shape = [length for place, length in enumerate(autoencoder.decoded) if length > 1 or place != 1]
    x = noise(2, *shape).clamp(-1, 1)
    latents = autoencoder.encode(x)
    assert latents.shape[1:] == model.shape
    torch.testing.assert_close(latents, prepared(name, pipe, x), rtol=0, atol=1e-4)


def test_a_pipeline_that_mixes_its_latents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("cogvideox", tmp_path)
    model = import_pipeline(folder, VIDEO)
    kind = stock("CogVideoXPipeline")
    own = kind.decode_latents
    for mixed in (lambda z: z + z.roll(1), lambda z: z + 1e-2 * torch.randn_like(z), torch.relu, lambda z: z[:, 1:]):
        monkeypatch.setattr(kind, "decode_latents", lambda self, z, mixed=mixed: own(self, mixed(z)))
        with pytest.raises(ValueError, match=r"are not the reordered .*\. Use --prompts instead of --data"):
            autoencoder_of(model)
    for changed in (lambda z: 3 - 2 * z.flip(2), lambda z: z.roll(1, 4)):
        monkeypatch.setattr(kind, "decode_latents", lambda self, z, changed=changed: own(self, changed(z)))
        other = autoencoder_of(model)
        monkeypatch.setattr(kind, "decode_latents", own)
        x = noise(1, 3, 9, 16, 32).clamp(-1, 1)
        torch.testing.assert_close(changed(other.encode(x)), autoencoder_of(model).encode(x))


BUDGET: Final = [
    *("--matching.num-updates", "2", "--matching.batch-size", "2", "--chain.num-updates", "2"),
    *("--chain.batch-size", "2", "--chain.start-steps", "8", "--engine.threads", "1", "--evaluation.no-enabled"),
]


def clips(folder: Path, is_video: bool) -> Path:
    folder.mkdir()
    random = np.random.default_rng(0)
    for number, caption in enumerate(("a cat", "b on a mat", "")):
        (folder / f"{number}.txt").write_text(caption)
        if is_video:
            frames = [Image.fromarray(x) for x in random.integers(0, 256, (7 + number, 20, 30, 3), dtype=np.uint8)]
            frames[0].save(folder / f"{number}.gif", save_all=True, append_images=frames[1:], duration=100)
        else:
            wavfile.write(folder / f"{number}.wav", 8, random.normal(size=(9 + number, 2)).astype(np.float32) / 4)
    return folder


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("wan", ["height=16", "width=16", "num_frames=5", "max_sequence_length=16"]),
        ("stable_audio", ["audio_end_in_s=1.5"]),
        pytest.param("cogvideox", ["height=16", "width=16", "num_frames=9"], marks=pytest.mark.slow),
    ],
)
def test_a_student_of_clips(name: str, call: list[str], tmp_path: Path) -> None:
    _, folder = saved(name, tmp_path)
    data, latents, run = clips(tmp_path / "clips", name != "stable_audio"), tmp_path / "latents", tmp_path / "run"
    words = ["encode", str(folder), "--data", str(data), "--out", str(latents), "--batch-size", "2", "--call", *call]
    main(words + ["--frame-rate", "20"] * (name != "stable_audio"))
    batch = open_latents(latents).fetch(torch.arange(3))
    guided = ["--matching.guidance-scale", "3"] if name == "stable_audio" else []
    words = ["--data", str(latents), "--to", "4", "--out", str(run), *BUDGET, *guided]
    main(["distill", str(folder), *words, "--call", *call])
    student = load(run)
    assert (student.num_steps, student.shape) == (4, batch.x0.shape[1:])
    ends = [9 / 8, 10 / 8, 11 / 8] if name == "stable_audio" else None
    conditions = text_conditions(student.manifest, ["a cat", "b on a mat", ""], ends)
    for condition, value in conditions.items():
        torch.testing.assert_close(batch.cond[condition], value)
    if name == "stable_audio":
        # Its unguided branch gets zeros, an empty caption does not.
        null = open_latents(latents).null
        assert set(null) == {"encoder_hidden_states"}
        assert not null["encoder_hidden_states"].any()
        assert conditions["encoder_hidden_states"][2].any()
        return
    main(["export", str(run), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_sounds_of_two_lengths_are_those_that_the_pipeline_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each starts from its own latents and ends after its own seconds, with and without guidance."""
    from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution

    pipe, folder = saved("stable_audio", tmp_path)
    # From little noise, the latents matter.
    pipe.scheduler = type(pipe.scheduler).from_config(dict(pipe.scheduler.config) | {"sigma_max": 2.0})
    pipe.save_pretrained(folder)
    lengths, rate = (9, 20), 8
    data, latents = tmp_path / "sounds", tmp_path / "latents"
    data.mkdir()
    waves = [noise(2, length).clamp(-1, 1) for length in lengths]
    for number, wave in enumerate(waves):
        wavfile.write(data / f"{number}.wav", rate, wave.T.numpy())
        (data / f"{number}.txt").write_text("a cat")
    main(["encode", str(folder), "--data", str(data), "--out", str(latents)])
    model, batch = import_pipeline(folder), open_latents(latents).fetch(torch.arange(2))
    assert set(batch.cond) == set(model.manifest.conditions) == {"encoder_hidden_states", "global_hidden_states"}
    assert all(not torch.equal(*value) for value in batch.cond.values())

    monkeypatch.setattr(OobleckDiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    pipe.scheduler = first_order(quietly(pipe).scheduler)
    schedule = replace(read_schedule(config_of(pipe.scheduler)), process=model.process)
    unit, made = noise(2, *model.shape), list[Tensor]()
    for scale in (1.0, 4.0):
        call: dict[str, Any] = {"guidance_scale": scale, "initial_audio_sampling_rate": rate}
        times = grid_of(schedule, trace(pipe, 4, prompt=["a cat"], guidance_scale=scale))
        x_1 = unit + float(model.process.alpha_sigma(times[:1])[0]) * batch.x0
        cond = model.cond(range(2), guidance_scale=scale, others=batch.cond)
        ours = sample(model, x_1, 4, cond=cond, grid=lambda _, times=times: times)
        for row, wave in enumerate(waves):
            # The pipeline's 16 values last 2 seconds.
            call |= {"audio_end_in_s": min(lengths[row], 16) / rate, "initial_audio_waveforms": wave[None]}
            call |= {"num_inference_steps": 4, "output_type": "latent", "latents": unit[row : row + 1]}
            assert_same(ours[row : row + 1], pipe("a cat", **call).audios)
        made.append(ours)
    assert float((made[0] - made[1]).abs().max()) > 1e-2


def test_what_cannot_be_encoded_is_refused(tmp_path: Path, capsys: Capture) -> None:
    _, folder = saved("wan", tmp_path)
    data = clips(tmp_path / "clips", True)

    def said(*words: str, size: str = "num_frames=9", of: Path = folder) -> str:
        call = ["--call", "height=16", "width=16", size, "max_sequence_length=16"]
        out = tmp_path / "out"
        line = refused(["encode", str(of), "--data", str(data), "--out", str(out), *words, *call], capsys)
        assert not out.exists()
        return line

    assert "0.gif has only 7 of the 9 frames that the pipeline needs: remove it, or lower --call num_frames" in said()
    assert "--image-size has no effect on this pipeline" in said("--image-size", "8", size="num_frames=5")
    assert "--frame-rate has no effect on this pipeline" in said("--frame-rate", "8", size="num_frames=1")
    for frame in range(3):
        Image.new("RGB", (8, 8)).save(data / f"{frame}.png")
        (data / f"{frame}.gif").unlink()
    assert "contains no clips" in said(size="num_frames=5")
    assert "0.png has 8 x 8 pixels" in said(size="num_frames=1")
    other = shutil.copytree(folder, tmp_path / "other", ignore=shutil.ignore_patterns("vae"))
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    assert "has no vae" in (line := said(of=other))
    assert "or use --prompts instead of --data" in line
