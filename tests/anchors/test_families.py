"""Pipelines that no line of the library names: what they feed their networks is read off their own calls.

Our samples are those of the pipeline itself, from the same noise, prompts, steps and guidance.
"""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import torch
from torch import Tensor

import support_pipelines
from halfstep.cli import main
from halfstep.hub import import_pipeline, text_conditions
from halfstep.hub.card import call_of
from halfstep.hub.pipelines import load_pipeline
from halfstep.hub.recording import grid_of, prompted, record, trace, verify
from halfstep.hub.schedulers import first_order, read_schedule
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import Replay
from halfstep.runs import RunFolder
from halfstep.samplers import sample
from support_pipelines import assert_same

PROMPTS: Final = ["a cat", "b on a mat"]


class Family(NamedTuple):
    """A tiny pipeline, and how it is called."""

    options: dict[str, Any]
    facts: dict[str, Any]
    """What the recording must find."""
    steps: tuple[int, int] = (4, 12)
    """A table of 1000 levels has no 12 steps of one length."""


SQUARE: Final = {"height": 8, "width": 8}
VIDEO: Final = {"height": 16, "width": 16, "num_frames": 5}
PLAIN: Final = {"use_resolution_binning": False}
FAMILIES: Final = {
    "sdxl": Family(SQUARE, {"of": "u", "prediction": "eps"}, (4, 10)),
    "flux": Family({"height": 16, "width": 8}, {"of": "sigma", "scale": 1, "prediction": "flow_velocity"}),
    "flux_schnell": Family(SQUARE, {"of": "sigma", "scale": 1}),
    "pixart": Family(SQUARE | PLAIN, {"part": "first"}, (4, 10)),
    "wan": Family(VIDEO | {"max_sequence_length": 16}, {"of": "sigma", "scale": 1000}),
    "qwen": Family({"height": 16, "width": 16}, {"restores_norm": True}),
    "sana": Family({"height": 32, "width": 32} | PLAIN, {"scale": 1000}),
    "cogvideox": Family(VIDEO, {"of": "u", "prediction": "v"}, (4, 10)),
    "lumina2": Family({"height": 16, "width": 16}, {"scale": -1, "offset": 1, "sign": -1, "restores_norm": True}),
    "z_image": Family({"height": 16, "width": 16, "max_sequence_length": 32}, {"scale": -1, "offset": 1, "sign": -1}),
    "auraflow": Family(SQUARE, {"of": "sigma", "scale": 1}),
    "chroma": Family(SQUARE | {"max_sequence_length": 32}, {"of": "sigma", "scale": 1}),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each family's pipeline as it saves itself, made once."""
    root = tmp_path_factory.mktemp("families")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            getattr(support_pipelines, f"tiny_{name}")(root / f"tokens-{name}").save_pretrained(root / name)
        return root / name

    return folder


def called(pipe: Any, x_1: Tensor, num_steps: int, **options: Any) -> Tensor:
    """The latents that the stock pipeline makes of `x_1`."""
    with torch.no_grad():
        made = pipe(prompt=list(PROMPTS), latents=x_1, num_inference_steps=num_steps, output_type="latent", **options)
    return torch.as_tensor(made[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_our_samples_are_those_of_the_pipeline(name: str, saved: Callable[[str], Path]) -> None:
    family = FAMILIES[name]
    folder = saved(name)
    model = import_pipeline(folder, family.options)
    assert isinstance(model.denoiser.network, Replay)
    found = {**model.denoiser.network.clock, **model.denoiser.network.output}
    found["prediction"] = model.manifest.prediction["type"]
    assert {fact: found[fact] for fact in family.facts} == pytest.approx(family.facts)
    pipeline = model.manifest.pipeline
    assert pipeline is not None
    pipe = load_pipeline(folder, pipeline.kind)
    pipe.scheduler = first_order(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    cond = text_conditions(model.manifest, PROMPTS)
    x_1 = support_pipelines.noise(2, *model.shape)
    scales: list[tuple[dict[str, Any], float | None]] = [({}, None)]
    if pipeline.guidance is not None and pipeline.off is not None:
        taken = inspect.signature(type(pipe).__call__).parameters
        negative = {"negative_prompt": [" ", " "]} if pipeline.guidance == "true_cfg_scale" and "negative_prompt" in taken else {}
        scales = [({pipeline.guidance: scale, **negative}, scale + 1 - pipeline.off) for scale in (pipeline.off, 4.0)]
    made = []
    for options, scale in scales:
        for num_steps in family.steps:
            times = grid_of(model_schedule(model, pipe), trace(pipe, num_steps, **prompted(pipe, PROMPTS), **family.options | options))
            shown = model.cond(range(2), guidance_scale=scale, others=cond)
            ours = sample(model, x_1, num_steps, cond=shown, grid=lambda _, times=times: times)
            assert_same(ours, called(pipe, x_1, num_steps, **family.options | options))
            made.append(ours)
    # Neither the prompt nor the scale is without effect.
    other = model.cond(range(2), guidance_scale=scales[0][1], others={n: v.flip(0) for n, v in cond.items()})
    assert float((sample(model, x_1, 4, cond=other) - sample(model, x_1, 4, cond=model.cond(range(2), guidance_scale=scales[0][1], others=cond))).abs().max()) > 1e-3
    if len(scales) > 1:
        assert float((made[0] - made[2]).abs().max()) > 1e-3


def model_schedule(model: Model, pipe: Any) -> Any:
    read = read_schedule({"_class_name": type(pipe.scheduler).__name__, **pipe.scheduler.config}, mu=1.0)
    return replace(read, process=model.process)


BUDGET: Final = [
    *("--matching.num-updates", "2", "--matching.batch-size", "4", "--chain.num-updates", "2"),
    *("--chain.batch-size", "4", "--chain.start-steps", "8", "--engine.threads", "1", "--evaluation.no-enabled"),
]


def distilled(folder: Path, options: dict[str, Any], out: Path, *words: str) -> Path:
    """A student of four steps, from a teacher of eight and prompts alone."""
    prompts = out.with_suffix(".txt")
    prompts.write_text("a cat\n\nb on a mat\na b c d\nc\n")
    call = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    main(["distill", str(folder), "--prompts", str(prompts), "--to", "4", "--out", str(out), *BUDGET, *words, "--call", *call])
    return out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sdxl", ["--matching.guidance-scale", "3"]),
        ("sdxl", ["--matching.guidance-range", "1", "8"]),
        ("flux", []),
        ("wan", ["--matching.guidance-scale", "3"]),
        ("qwen", ["--matching.guidance-scale", "3"]),
        ("z_image", ["--matching.guidance-scale", "3"]),
        ("cogvideox", ["--matching.guidance-scale", "3"]),
        ("chroma", ["--matching.guidance-scale", "3"]),
    ],
)
def test_a_student_of_prompts_alone_is_exported(
    name: str, words: list[str], saved: Callable[[str], Path], tmp_path: Path
) -> None:
    options = FAMILIES[name].options
    run = distilled(saved(name), options, tmp_path / "run", *words)
    student = load(run)
    assert student.num_steps == 4
    main(["export", str(run), "--out", str(tmp_path / "out")])
    kind = json.loads((tmp_path / "out" / "model_index.json").read_text())["_class_name"]
    pipe = load_pipeline(tmp_path / "out", kind)
    pipe.set_progress_bar_config(disable=True)
    call = call_of(student.manifest, 4)
    if "sigmas" not in call and student.manifest.process["type"] == "flow":
        sigmas = [1.0, 0.75, 0.5, 0.25]
        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=sigmas)
    x_1 = support_pipelines.noise(2, *student.shape)
    cond = student.cond(range(2), others=text_conditions(student.manifest, PROMPTS))
    del call["num_inference_steps"]
    ours = sample(student, x_1, 4, student.sampler, cond)
    assert_same(ours, called(pipe, x_1, 4, **call))
    assert float((ours - sample(load(RunFolder(run).stages()[0].path), x_1, 4, cond=cond)).abs().max()) > 1e-6
