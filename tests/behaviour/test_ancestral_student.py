"""A moment-matching stage in a run is sampled, measured and resumed like any other, although it samples with noise."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from halfstep.core.draw import step_noise
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import DataConfig, open_data
from halfstep.measure.evaluate import Evaluation
from halfstep.models.folder import load
from halfstep.nets import LoRA, UNet2D, unet2d_config
from halfstep.objectives import AUXILIARY, Denoising, GuidanceRange, MomentMatching, Plan, Training
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.samplers import DDIM, Ancestral, sample
from halfstep.train.settings import Engine
from toys import finish, toy_plan, toy_spec, weights

LAST = "03-moments-0002"


def spec() -> RunSpec:
    """Return the toy run with a stage of moment matching, with dropout and a moving average."""
    training = Training(8, 1e-3, 16, ema_decay=0.9, dropout=0.1, warmup_updates=2)
    evaluation = Evaluation(num_samples=24, num_reference=24, num_compared=8, num_shown=4, features="pixels")
    plan = toy_plan(12, 6) + Plan.of(MomentMatching(2, auxiliary_rate=2.0), training)
    return toy_spec(plan=plan, evaluation=evaluation)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moments") / "run"
    finish(spec(), path)
    return path


def test_it_is_sampled_and_measured_with_its_own_sampler(uncut: Path) -> None:
    model = load(uncut)
    assert (model.manifest.stage, model.num_steps, model.sampler) == (LAST, 2, Ancestral(gamma=0.0))
    by_hand = sample(model, model.noise(range(5)), 2, Ancestral(gamma=0.0), noise=step_noise(range(5), (2,)))
    found = model.sample(range(5))
    torch.testing.assert_close(found, by_hand)
    # A sample depends only on its own seed, not on its batch.
    torch.testing.assert_close(model.sample(range(3, 5)), found[3:])
    assert float((found - model.sample(range(5), sampler=DDIM())).abs().max()) > 1e-2
    results = json.loads((uncut / "stages" / LAST / "metrics.json").read_text())["results"]
    assert {(result["sampler"], result["num_evals"]) for result in results} == {("ancestral", 2)}
    assert all(result["teacher_rmse"] > 0 for result in results)


def test_the_log_has_the_moment_gap_and_the_auxiliary_s_loss(uncut: Path) -> None:
    rows = [json.loads(line) for line in (uncut / "log.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == LAST][-1]
    assert last["update"] == 8
    assert last["loss"] > 0
    assert last[f"{AUXILIARY}_loss"] > 0


def test_an_interrupted_run_resumes_bit_for_bit(uncut: Path, tmp_path: Path) -> None:
    for event in run(spec(), tmp_path / "cut"):
        if isinstance(event, Progress) and event.name == LAST and event.window.update == 5:
            break
    (checkpoint,) = (tmp_path / "cut" / "stages" / LAST).glob("checkpoint-*")
    assert (checkpoint / f"helper-{AUXILIARY}.safetensors").exists()
    finish(spec(), tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(uncut)


def unet() -> UNet2D:
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        attention=(False, True), attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return UNet2D(config)


def test_a_lora_student_of_a_teacher_in_bfloat16_trains_its_additions_alone(tmp_path: Path) -> None:
    teacher, student = (Training(updates, 1e-3, batch_size=8) for updates in (2, 3))
    settings: dict[str, Any] = {
        "recipe": {"name": "small"}, "plan": Plan.of(Denoising(), teacher) + Plan.of(MomentMatching(2), student),
        "data": open_data(DataConfig(source="digits", labels=False)), "process": VPCosine(), "prediction": V(),
        "network": unet, "start_steps": 2, "lora_rank": 2,
        "engine": Engine(cpu=True, trackers=(), teacher_precision="bf16"),
    }  # fmt: skip
    finish(RunSpec(**settings), tmp_path / "run")
    model = load(tmp_path / "run")
    assert isinstance(model.denoiser.network, LoRA)
    assert model.manifest.base == "00-denoise"
    held = load_file(tmp_path / "run" / "stages" / "01-moments-0002" / "model.safetensors")
    assert all(".lora_" in name for name in held)
    assert any(bool(value.any()) for name, value in held.items() if ".lora_B." in name)


def test_a_plan_passes_on_the_guidance_that_its_teacher_has_learned() -> None:
    plan = Plan.of(MomentMatching(2), Training(1, 1e-3)).guided(GuidanceRange(1.0, 3.0))
    assert plan.stages[0].objective == dataclasses.replace(MomentMatching(2), guidance=GuidanceRange(1.0, 3.0))
