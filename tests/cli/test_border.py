"""diffusers pipelines through the command line: each family becomes a stock four-step pipeline.

Unsupported ones give a clear one-line error.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfstep import NetworkDenoiser, load, save
from halfstep.cli import exporting, main
from halfstep.core.prediction import Denoised
from halfstep.data import open_latents
from halfstep.hub import import_pipeline, prompts_of, text_conditions
from halfstep.hub.pipelines import _check_options
from halfstep.models.model import Model
from halfstep.recipes import recipes
from halfstep.runs import Outcome, RunFolder
from halfstep.samplers import Ancestral, samplers
from support_cli import Capture, refused
from support_pipelines import assert_same, save_ddpm, save_dit, save_sd, save_sd3, tiny_unet, tiny_vae
from toys import TINY_ARRAYS, points

BUDGET: Final = [
    *("--matching.num-updates", "4", "--matching.batch-size", "8", "--chain.num-updates", "2"),
    *("--chain.batch-size", "8", "--chain.start-steps", "8", "--engine.threads", "1"),
]
MEASURED: Final = [
    *BUDGET,
    *("--evaluation.num-samples", "8", "--evaluation.num-compared", "4", "--evaluation.num-shown", "4"),
    *("--evaluation.features", "pixels"),
]
UNMEASURED: Final = [*BUDGET, "--evaluation.no-enabled"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return pipelines, images with captions, and images with classes."""
    root = tmp_path_factory.mktemp("border")
    save_ddpm(root / "ddpm", in_channels=1, out_channels=1)
    save_ddpm(root / "classes-ddpm", in_channels=1, out_channels=1, num_class_embeds=11)
    save_dit(root / "dit")
    save_sd(root / "sd", root / "tokens")
    save_sd3(root / "sd3", root / "tokens")
    random = np.random.default_rng(0)
    for index in range(12):
        picture = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        for folder in (root / "captioned", root / "classes" / str(index % 2)):
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{index}.png")
        (root / "captioned" / f"{index}.txt").write_text("a b"[index % 3])
    np.savez(root / "wide.npz", x=random.normal(size=(4, 4, 8, 8)).astype(np.float32), y=np.arange(4) % 2)
    main(["encode", str(root / "sd"), "--data", str(root / "captioned"), "--out", str(root / "latents")])
    main(["encode", str(root / "sd3"), "--data", str(root / "captioned"), "--out", str(root / "latents3")])
    main(["encode", str(root / "dit"), "--data", str(root / "classes"), "--out", str(root / "latents-dit")])
    return root


def distil(model: Path, data: Path | str, out: Path, *words: str, to: int = 4, budget: list[str] = UNMEASURED) -> Path:
    main(["distill", str(model), "--data", str(data), "--to", str(to), "--out", str(out), *budget, *words])
    return out


@pytest.fixture(scope="module")
def ddpm_run(here: Path) -> Path:
    return distil(here / "ddpm", "digits", here / "run-ddpm", budget=MEASURED)


@pytest.fixture(scope="module")
def dit_run(here: Path) -> Path:
    return distil(
        here / "dit", here / "latents-dit", here / "run-dit", "--matching.guidance-scale", "4", budget=MEASURED
    )


@pytest.fixture(scope="module")
def sd_run(here: Path) -> Path:
    return distil(
        here / "sd", here / "latents", here / "run-sd", "--matching.guidance-range", "1", "8", budget=MEASURED
    )


@pytest.fixture(scope="module")
def lora_run(here: Path) -> Path:
    return distil(
        here / "sd", here / "latents", here / "run-lora", "--matching.guidance-scale", "3", "--chain.lora-rank", "2"
    )


@pytest.fixture(scope="module")
def sd3_run(here: Path) -> Path:
    return distil(here / "sd3", here / "latents3", here / "run-sd3", "--matching.guidance-scale", "5")


def stages(run: Path) -> list[str]:
    return [stage.name for stage in RunFolder(run).stages()]


def test_an_eps_teacher_on_linear_betas_goes_to_four_steps_in_one_command(
    ddpm_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert stages(ddpm_run) == ["00-teacher", "01-match", "02-halve-0004"]
    teacher, matched, student = (load(stage.path) for stage in RunFolder(ddpm_run).stages())
    assert teacher.manifest.prediction == {"type": "eps"}
    assert teacher.manifest.process["type"] == "vp_table"
    for model in (matched, student):
        assert model.manifest.prediction == {"type": "v"}
        assert model.manifest.process["type"] == "vp_cosine"
        assert model.manifest.network["num_train_timesteps"] == 1024
    assert student.manifest.process["log_snr_min"] == pytest.approx(float(teacher.process.log_snr(torch.tensor(1.0))))
    assert "digits, 1,797 samples" in str(student.manifest.data)
    main(["export", str(ddpm_run), "--out", str(tmp_path / "out")])
    pipe = diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")
    assert pipe.scheduler.config.num_train_timesteps == 1024
    assert pipe.scheduler.config.timestep_spacing == "trailing"
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        "samples in 4 steps",
        'from_pretrained("out")',
        "use_clipped_model_output=True",
        "digits",
        "Protocol:",
    ):
        assert said in card
    main(["sample", str(ddpm_run), "--num-samples", "4", "--out", str(tmp_path / "grid.png")])
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize("run", ["ddpm_run", "dit_run", "sd_run", "lora_run", "sd3_run"])
def test_the_lines_of_the_card_run_as_printed(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["export", str(request.getfixturevalue(run)), "--out", str(tmp_path / "mine")])
    found = re.search(r"```python\n(.*?)```", (tmp_path / "mine" / "README.md").read_text(), re.DOTALL)
    assert found
    assert len([line for line in found[1].splitlines() if line]) <= 6
    monkeypatch.chdir(tmp_path)
    exec(compile(found[1], "card", "exec"), {})
    assert Image.open(tmp_path / "sample.png").size == (8, 8)


def test_rerunning_a_command_changes_nothing_and_another_continues(ddpm_run: Path, here: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in ddpm_run.glob("stages/*/*.safetensors")}
    distil(here / "ddpm", "digits", ddpm_run, budget=MEASURED)
    assert before == {path: path.read_bytes() for path in ddpm_run.glob("stages/*/*.safetensors")}
    further = tmp_path / "further"
    main(["distill", str(ddpm_run), "--to", "2", "--out", str(further), "--chain.num-updates", "2"])
    assert stages(further) == ["00-teacher", "01-halve-0002"]
    assert load(further).manifest.prediction == {"type": "v"}
    main(["report", str(further)])


@pytest.mark.parametrize("run", ["dit_run", "sd_run", "lora_run"])
def test_a_run_with_baked_in_guidance_resumes(
    run: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: Capture
) -> None:
    path: Path = request.getfixturevalue(run)
    main(["distill", str(path), "--to", "2", "--out", str(tmp_path / "more")])
    assert stages(tmp_path / "more") == ["00-teacher", "01-halve-0002"]
    before, after = load(path), load(tmp_path / "more")
    assert after.manifest.guidance == before.manifest.guidance
    assert after.num_steps == 2
    # Its teacher is the student from which it continues, not a LoRA.
    torch.manual_seed(0)
    cond = {n: torch.randn(3, *shape) for n, shape in before.manifest.conditions.items()}
    given = load(tmp_path / "more" / "stages" / "00-teacher")
    torch.testing.assert_close(
        given.sample(range(3), 4, cond=cond), before.sample(range(3), 4, cond=cond), rtol=0, atol=1e-5
    )
    if run == "lora_run":
        asked = ["export", str(tmp_path / "more"), "--format", "lora", "--out", str(tmp_path / "lora")]
        assert ", not on those of" in refused(asked, capsys)
    matching = ["--matching.prediction", "x0", "--out", str(tmp_path / "third")]
    assert "Match its own teacher" in refused(["distill", str(path), "--to", "2", *matching], capsys)


def test_a_run_on_a_clock_that_was_asked_for_goes_on_without_another_match(
    here: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = distil(here / "ddpm", "digits", tmp_path / "run", "--matching.process", "cosine")
    main(["distill", str(run), "--to", "2", "--out", str(tmp_path / "more")])
    assert stages(tmp_path / "more") == ["00-teacher", "01-halve-0002"]


MATCHED: Final = ["01-match", "02-halve-0004"]


@pytest.mark.parametrize(
    ("model", "data", "words", "planned", "guidance"),
    [
        ("ddpm", "digits", [], MATCHED, None),
        ("dit", "latents-dit", ["--matching.guidance-scale", "4"], MATCHED, {"type": "fixed", "scale": 4}),
        ("sd", "latents", ["--matching.guidance-range", "1", "8"], MATCHED, {"type": "range", "low": 1, "high": 8}),
        (
            "sd", "latents", ["--matching.guidance-scale", "3", "--chain.lora-rank", "2"], MATCHED,
            {"type": "fixed", "scale": 3},
        ),
        ("run-sd", "latents", ["--chain.lora-rank", "2"], ["01-halve-0002"], None),
    ],
)  # fmt: skip
def test_a_dry_run_prints_the_cost_of_a_distillation_and_writes_nothing(
    model: str, data: str, words: list[str], planned: list[str], guidance: dict[str, Any] | None, here: Path,
    sd_run: Path, tmp_path: Path, capsys: Capture,
) -> None:  # fmt: skip
    source = data if data == "digits" else str(here / data)
    more = ["--to", "2"] if sd_run == here / model else ["--to", "4", *UNMEASURED]
    capsys.readouterr()
    argv = ["distill", str(here / model), "--data", source, "--out", str(tmp_path / "run"), *more, *words]
    main([*argv, "--dry-run", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [stage["stage"] for stage in told["stages"]] == planned
    assert not (tmp_path / "run").exists()
    assert (told["trainable_parameters"] < 0.2 * told["parameters"]) == ("--chain.lora-rank" in words)
    # Two float32 moments for each trained parameter.
    assert told["memory_bytes"]["moments"] == 8 * told["trainable_parameters"]
    assert told["guidance"] == guidance
    assert told["estimated_seconds"] > 0


@pytest.mark.parametrize("word", ["--model.prediction", "--network.dropout", "--teacher.num-updates"])
def test_options_of_an_existing_teacher_are_rejected(word: str, ddpm_run: Path, capsys: Capture) -> None:
    assert f"{word} cannot change an existing teacher" in refused(
        ["distill", str(ddpm_run), "--to", "2", f"{word}=1"], capsys
    )


def test_samples_are_of_the_classes_that_the_data_had(here: Path, tmp_path: Path) -> None:
    words = ["--matching.guidance-scale", "2", "--matching.null-class", "10"]
    run = distil(here / "classes-ddpm", "digits", tmp_path / "run", *words)
    for stage in RunFolder(run).stages():
        model = load(stage.path)
        assert model.num_classes == 11
        assert model.cond(range(21))["class_labels"].tolist() == [*range(10), *range(10), 0]
    main(["export", str(run), "--out", str(tmp_path / "out")])


def test_a_pipeline_with_parts_in_its_root_is_read(here: Path, tmp_path: Path) -> None:
    flat = shutil.copytree(here / "ddpm", tmp_path / "flat")
    for part in ("unet", "scheduler"):
        for file in (flat / part).iterdir():
            file.rename(flat / file.name)
        (flat / part).rmdir()
    drawn = []
    for source in (here / "ddpm", flat):
        main(["import", "diffusers", str(source), "--out", str(tmp_path / f"stage-{source.name}")])
        drawn.append(load(tmp_path / f"stage-{source.name}").sample(range(2), 4))
    assert torch.equal(*drawn)
    pipe = diffusers.DDPMPipeline.from_pretrained(flat)
    assert pipe.unet.config.in_channels == 1


def test_latents_of_texts_are_not_clipped_though_their_scheduler_says_nothing(here: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(here / "sd", tmp_path / "sd")
    file = folder / "scheduler" / "scheduler_config.json"
    held = json.loads(file.read_text())
    del held["clip_sample"]
    file.write_text(json.dumps(held))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    assert pipe.scheduler.config.clip_sample is False
    main(["import", "diffusers", str(folder), "--out", str(tmp_path / "stage")])
    assert load(tmp_path / "stage").manifest.clip is False


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_transformer_of_texts_needs_its_second_encoder(
    part: str, here: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = shutil.copytree(here / "sd3", tmp_path / "sd3")
    edit("model_index.json", **{part: [None, None]})(folder)
    asked = ["distill", str(folder), "--data", str(here / "latents3"), "--to", "4", "--out", str(tmp_path / "run")]
    said = refused(asked, capsys)
    assert "sd3 has no" in said
    assert f"{part}, " in said


def test_another_teacher_in_the_same_folder_makes_another_run(here: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(here / "ddpm", tmp_path / "ddpm")
    run = distil(folder, "digits", tmp_path / "run")
    save_ddpm(folder, in_channels=1, out_channels=1, seed=5)
    argv = ["distill", str(folder), "--data", "digits", "--to", "4", "--out", str(run), *UNMEASURED]
    assert "contains a run of a different recipe" in refused(argv, capsys)


def test_other_settings_of_the_network_make_another_teacher(here: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(here / "ddpm", tmp_path / "ddpm")
    run = distil(folder, "digits", tmp_path / "run")
    edit("unet/config.json", norm_eps=1e-2)(folder)
    argv = ["distill", str(folder), "--data", "digits", "--to", "4", "--out", str(run), *UNMEASURED]
    assert "Differences: parent.network" in refused(argv, capsys)


def test_a_dit_with_baked_in_guidance_needs_half_the_calls(dit_run: Path, tmp_path: Path) -> None:
    student = load(dit_run)
    assert student.manifest.guidance == {"type": "fixed", "scale": 4.0}
    assert student.num_classes == 1000
    teacher, *_, last = RunFolder(dit_run).stages()
    of_teacher, of_student = teacher.metrics(), last.metrics()
    assert of_teacher is not None
    assert of_student is not None
    at_four = [result.num_evals for result in of_teacher.results if result.num_steps == 4]
    assert (at_four, of_student.results[0].num_evals) == ([8], 4)
    main(["export", str(dit_run), "--out", str(tmp_path / "out")])
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(class_labels=[1], num_inference_steps=4, guidance_scale=1.0).images[0].size == (8, 8)
    assert "Pass guidance_scale 1, which" in (tmp_path / "out" / "README.md").read_text()
    assert "Pass guidance_scale 1, which" in (dit_run / "report" / "index.html").read_text()
    main(["sample", str(dit_run), "--num-samples", "2", "--class-label", "1", "--out", str(tmp_path / "a.png")])


def test_texts_with_a_range_of_scales(sd_run: Path, tmp_path: Path, capsys: Capture) -> None:
    student = load(sd_run)
    assert student.manifest.guidance == {"type": "range", "low": 1.0, "high": 8.0}
    assert student.manifest.conditions == {"encoder_hidden_states": (7, 16)}
    words = ["sample", str(sd_run), "--num-samples", "2", "--prompt", "a b"]
    main([*words, "--guidance-scale", "3", "--out", str(tmp_path / "a.png")])
    capsys.readouterr()
    main([*words, "--guidance-scale", "9", "--out", str(tmp_path / "b.png")])
    assert "only learned scales from 1 to 8. The model extrapolates" in capsys.readouterr().err
    main(["export", str(sd_run), "--out", str(tmp_path / "out")])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.config.time_cond_proj_dim == 256
    assert pipe.scheduler.config.num_train_timesteps == 1024


def test_lora_weights_are_under_five_percent_and_are_exported_as_such(lora_run: Path, tmp_path: Path) -> None:
    sizes = {stage.name: stage.model.stat().st_size for stage in RunFolder(lora_run).stages()}
    assert sizes["02-halve-0004"] < 0.05 * sizes["00-teacher"]
    main(["export", str(lora_run), "--format", "lora", "--out", str(tmp_path / "lora")])
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == [
        "README.md", "pytorch_lora_weights.safetensors", "scheduler"
    ]  # fmt: skip
    main(["export", str(lora_run), "--out", str(tmp_path / "whole")])
    diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "whole")


def test_a_flow_matching_transformer_needs_no_other_prediction(sd3_run: Path, tmp_path: Path) -> None:
    student = load(sd3_run)
    assert student.manifest.prediction == {"type": "flow_velocity"}
    assert student.manifest.process == {"type": "flow", "shift": 3.0}
    main(["export", str(sd3_run), "--out", str(tmp_path / "out")])
    assert "sigmas=[1, 0.75, 0.5, 0.25]" in (tmp_path / "out" / "README.md").read_text()


def test_an_imported_teacher_is_a_stage_that_samples_with_guidance(here: Path, tmp_path: Path, capsys: Capture) -> None:
    stage = tmp_path / "stage"
    main(["import", "diffusers", str(here / "dit"), "--out", str(stage)])
    assert "a teacher, samples of shape [4, 4, 4], 1,000 classes, predicts eps" in capsys.readouterr().out
    for scale in ("1", "4"):
        words = ["--num-steps", "2", "--num-samples", "2", "--guidance-scale", scale]
        main(["sample", str(stage), *words, "--out", str(tmp_path / f"{scale}.npz")])
    one, four = (np.load(tmp_path / f"{scale}.npz")["arr_0"] for scale in ("1", "4"))
    assert abs(one - four).max() > 1e-3


def test_a_run_interrupted_in_the_matching_stage_ends_like_an_uninterrupted_one(
    here: Path, ddpm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from halfstep.data.base import Fed
    from halfstep.train import engine

    update = engine.StageTrainer._one_update

    def failing(trainer: engine.StageTrainer, fed: list[Fed]) -> None:
        if trainer.stream == "01-match" and trainer.update == 2:
            raise KeyboardInterrupt
        update(trainer, fed)

    words = ["--engine.checkpoint-updates", "1"]
    monkeypatch.setattr(engine.StageTrainer, "_one_update", failing)
    with pytest.raises(SystemExit):
        distil(here / "ddpm", "digits", tmp_path / "run", *words, budget=MEASURED)
    monkeypatch.undo()
    distil(here / "ddpm", "digits", tmp_path / "run", *words, budget=MEASURED)
    for name in stages(ddpm_run):
        found = (tmp_path / "run" / "stages" / name / "model.safetensors").read_bytes()
        assert found == (ddpm_run / "stages" / name / "model.safetensors").read_bytes(), name


def test_only_the_weights_of_a_repositorys_parts_are_fetched(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    held = [
        "README.md", "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors", "v1-5.safetensors",
        "v1-5.ckpt", "pipeline.py", "tokenizer/merges.txt", "text_encoder_3/model.fp16-00001-of-00002.safetensors",
        "text_encoder_3/model-00001-of-00002.safetensors", "tokenizer_3/spiece.model",
    ]  # fmt: skip
    fetched: list[str] = []

    def download(name: str, **patterns: Any) -> str:
        assert name == "owner/ddpm"
        fetched.extend(filter_repo_objects(held, **patterns))
        return str(here / "ddpm")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    main(["import", "diffusers", "owner/ddpm", "--out", str(tmp_path / "stage")])
    assert fetched == [
        "model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/merges.txt",
        "text_encoder_3/model-00001-of-00002.safetensors", "tokenizer_3/spiece.model",
    ]  # fmt: skip
    pipeline = load(tmp_path / "stage").manifest.pipeline
    assert pipeline is not None
    assert pipeline.folder == "owner/ddpm"


def test_pushing_goes_through_the_hub_s_own_client(
    ddpm_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    import huggingface_hub

    said: list[Any] = []
    client = SimpleNamespace(
        create_repo=lambda name, exist_ok: said.append(name) or f"https://huggingface.co/{name}",
        upload_folder=lambda repo_id, folder_path: said.append((repo_id, Path(folder_path))),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: client)
    out = tmp_path / "out"
    main(["export", str(ddpm_run), "--out", str(out), "--push-to-hub", "me/digits"])
    assert said == ["me/digits", ("me/digits", out)]
    assert 'from_pretrained("me/digits")' in (out / "README.md").read_text()
    assert "https://huggingface.co/me/digits" in capsys.readouterr().out


Spoil = Callable[[Path], None]


def edit(file: str, **changes: Any) -> Spoil:
    def spoil(folder: Path) -> None:
        held = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(held | changes))

    return spoil


def pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def cut(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def variant(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.non_ema.safetensors"))


SCHEDULER: Final = "scheduler/scheduler_config.json"
CONTINUOUS: Final = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}
FLOWING: Final = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SOLVED_FLOW: Final = {
    "_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
    "variance_type": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (edit(SCHEDULER, _class_name="MyScheduler"), "the scheduler MyScheduler is not supported (fields: "),
        (
            edit(SCHEDULER, beta_schedule="sigmoid"),
            "has beta_schedule 'sigmoid', which is not one of linear",
        ),
        (edit(SCHEDULER, prediction_type="score"), "has prediction_type 'score', which is not one of epsilon"),
        (edit(SCHEDULER, clip_sample_range=2.0), "has clip_sample_range 2.0, but only 1.0 is supported"),
        (pickled, "has pickled weights (diffusion_pytorch_model.bin)"),
        (cut, "diffusion_pytorch_model.safetensors cannot be read ("),
        (edit("model_index.json", _class_name=["mine", "Pipe"]), "requires custom code"),
        (edit("model_index.json", unet=["mine", "UNet"]), "requires custom code (unet)"),
        (edit("model_index.json", **{"../x": ["diffusers", "UNet2DModel"]}), "requires custom code (../x)"),
        (edit("model_index.json", unet=[]), "requires custom code (unet)"),
        (lambda f: (f / "pipe.py").write_text("boom"), "requires custom code (pipe.py)"),
        (edit("unet/config.json", auto_map={"a": "b"}), "requires custom code (auto_map)"),
        (edit("model_index.json", _class_name="FluxPipeline"), "cannot be read (Pipeline"),
        (edit("model_index.json", _class_name="MyPipeline"), "contains a MyPipeline, which diffusers"),
        (lambda f: (f / "unet" / "config.json").write_text("{}"), "contains the class None, but UNet2DModel is needed"),
        (lambda f: (f / "unet" / "config.json").unlink(), "has no config.json: the pipeline was not saved completely"),
        (
            lambda f: shutil.rmtree(f / "scheduler"),
            "has no scheduler_config.json: the pipeline was not saved",
        ),
        (edit(SCHEDULER, beta_start=None), "the config of the DDPMScheduler is not valid (linspace()"),
        (edit(SCHEDULER, num_train_timesteps="many"), "the config of the DDPMScheduler is not valid (linspace()"),
        (edit(SCHEDULER, trained_betas=[0.1, 0.2]), "has 2 trained_betas, but num_train_timesteps is 1000"),
        (edit(SCHEDULER, prediction_type="flow_prediction"), "on a table of betas. Set use_flow_sigmas to true"),
        (edit(SCHEDULER, **CONTINUOUS), "has timestep_type 'continuous', but only 'discrete' is supported"),
        (edit(SCHEDULER, **FLOWING), "contains a UNet2DModel, but the timesteps that this network expects"),
        (
            edit(SCHEDULER, **SOLVED_FLOW),
            "but the timesteps that this network expects for its scheduler's process",
        ),
        (edit("unet/config.json", class_embed_type="timestep"), "with class_embed_type 'timestep', an input that"),
        (edit("unet/config.json", sample_size=[8]), "has sample_size [8]: set it to the height and width"),
        (
            variant,
            "has only weights of the variant non_ema (diffusion_pytorch_model.non_ema.safetensors): save them",
        ),
        (lambda f: save_ddpm(f, in_channels=3, out_channels=1), "takes 3 channels and returns 1: the two numbers must"),
        (lambda f: save_ddpm(f, in_channels=1, out_channels=2), "variance_type does not declare a learned variance"),
        (lambda f: (f / "model_index.json").write_text('{"_class_name": '), "model_index.json is not readable JSON"),
    ],
)
def test_a_pipeline_that_is_not_understood_is_refused(
    here: Path, tmp_path: Path, capsys: Capture, spoil: Spoil, said: str
) -> None:
    folder = shutil.copytree(here / "ddpm", tmp_path / "a folder ü")
    spoil(folder)
    assert said in refused(["distill", str(folder), "--data", "digits", "--out", str(tmp_path / "run")], capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("part", "said"), [("text_encoder", "has no text_encoder"), ("tokenizer", "has no tokenizer")])
def test_a_text_pipeline_without_a_part_is_refused(
    here: Path, tmp_path: Path, capsys: Capture, part: str, said: str
) -> None:
    folder = shutil.copytree(here / "sd", tmp_path / "sd")
    shutil.rmtree(folder / part)
    assert said in refused(["import", "diffusers", str(folder), "--out", str(tmp_path / "out")], capsys)


def test_a_pipeline_without_a_vae_can_neither_encode_nor_draw(
    here: Path, tmp_path: Path, capsys: Capture, lora_run: Path
) -> None:
    folder = shutil.copytree(here / "sd", tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    words = ["encode", str(folder), "--data", str(here / "captioned"), "--out", str(tmp_path / "latents")]
    assert "has no vae, which is needed to encode and decode images" in refused(words, capsys)


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_text_pipeline_with_a_pickled_part_is_refused_with_the_way_to_convert_it(
    here: Path, tmp_path: Path, capsys: Capture, part: str
) -> None:
    folder = shutil.copytree(here / "sd", tmp_path / "sd")
    (weights,) = (folder / part).glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    words = ["encode", str(folder), "--data", str(here / "captioned"), "--out", str(tmp_path / "latents")]
    said = refused(words, capsys)
    assert f"{part} has pickled weights ({weights.stem}.bin)" in said
    assert ".save_pretrained(FOLDER, safe_serialization=True)" in said
    weights.with_suffix(".bin").rename(weights)
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "cannot be read" in refused(words, capsys)
    assert not (tmp_path / "latents").exists()
    weights.write_bytes(whole)
    main(words)


def test_a_dry_run_of_encode_writes_nothing(here: Path, tmp_path: Path, capsys: Capture) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a\nb\na b\n")
    before, entry = sorted(here.rglob("*")), open_latents(here / "latents").index.tensors
    for words, said in (
        (["--data", str(here / "captioned")], "12 of 12 samples would be encoded"),
        (["--prompts", str(prompts), "--out", str(out)], "3 of 3 samples would be sampled"),
    ):
        capsys.readouterr()
        main(["encode", str(here / "sd"), *words, "--dry-run"])
        told = capsys.readouterr().out
        assert said in told
        assert f"latent: {list(entry['latents'].shape)} float32" in told
        assert f"encoder_hidden_states {list(entry['encoder_hidden_states'].shape)} float32" in told
        assert re.search(r"size of the folder: .* \([\d,]+ bytes\)\nestimated time on this machine: .*timed on", told)
        assert not out.exists()
    assert sorted(here.rglob("*")) == before
    sd, data, other = str(here / "sd"), str(here / "captioned"), str(here / "latents3")
    for words in (
        ["--data", data, "--out", str(out), "--image-size", "16"],
        ["--data", str(here / "wide.npz"), "--out", str(out)],
        ["--data", data, "--out", other], ["--data", data, "--out", data],
        ["--prompts", str(tmp_path / "none.txt"), "--out", str(out)],
    ):  # fmt: skip
        assert refused(["encode", sd, *words, "--dry-run"], capsys) == refused(["encode", sd, *words], capsys)
    assert "--out is missing" in refused(["encode", sd, "--data", data], capsys)


@pytest.mark.parametrize("verb", ["encode", "distill"])
def test_a_wrong_file_of_prompts_is_rejected_before_the_import(
    verb: str, here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def imported(*_: object, **__: object) -> None:
        pytest.fail("the pipeline was imported")

    monkeypatch.setattr("halfstep.cli.exporting.imported", imported)
    monkeypatch.setattr("halfstep.cli.training.imported", imported)
    file = tmp_path / "prompts.txt"
    argv = [verb, str(here / "sd"), "--prompts", str(file), "--out", str(tmp_path / "out")]
    assert f"{file} does not exist: pass a text file with one prompt per line" in refused(argv, capsys)
    file.write_text(" \n\n")
    assert f"{file} contains no prompts" in refused(argv, capsys)
    file.write_bytes(b"\xff\xfe\x00")
    assert f"{file} cannot be read as text" in refused(argv, capsys)
    argv[3] = str(tmp_path)
    assert f"{tmp_path} is not a file: pass a text file with one prompt per line" in refused(argv, capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=a"], "halfstep sets the pipeline argument prompt itself. Remove --call prompt"),
        (["num_inference_steps=4"], "halfstep sets the pipeline argument num_inference_steps"),
        (["num_images_per_prompt=2"], "halfstep sets the pipeline argument num_images_per_prompt"),
        # This pipeline's call takes **kwargs, so it would ignore the typing mistake.
        (["hieght=16"], "does not take the argument 'hieght'; did you mean 'height'?"),
        (["num_steps=4"], "does not take the argument 'num_steps'"),
        # The nearest name, num_inference_steps, is no remedy, because it would be rejected next.
        (["num_inference_step=4"], "does not take the argument 'num_inference_step'. Remove --call num_inference_step"),
        (["height=true", "width=true"], "must be a positive whole number, got True"),
        (["height=16", "width=16", "height=8"], "--call sets height twice"),
        # Stable Diffusion would use its default size in these cases.
        (["height=16"], "--call height=16 also needs the width"),
        (["width=16"], "--call width=16 also needs the height"),
        (["height=0", "width=16"], "--call height must be a positive whole number, got 0"),
        (["height=16", "width=NaN"], "--call width must be a positive whole number, got nan"),
    ],
)
def test_arguments_that_no_call_can_take_are_rejected_before_the_weights_are_loaded(
    words: list[str], said: str, here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("the pipeline was loaded")

    monkeypatch.setattr("halfstep.hub.pipelines.load_pipeline", loaded)
    argv = ["import", "diffusers", str(here / "sd"), "--out", str(tmp_path / "out"), "--call", *words]
    assert said in refused(argv, capsys)


def test_arguments_of_a_call_are_checked_against_its_own_names_and_defaults() -> None:
    _check_options("WanPipeline", {"height": 480})
    with pytest.raises(ValueError, match="did you mean 'num_frames'"):
        _check_options("WanPipeline", {"num_frame": 9})
    with pytest.raises(ValueError, match="needs the width"):
        _check_options("StableDiffusionPipeline", {"height": 480})


def test_a_pipeline_with_text_encoders_names_the_package_that_is_missing(
    here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("halfstep.hub.stock.find_spec", lambda name: None)
    argv = ["encode", str(here / "sd"), "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    (tmp_path / "prompts.txt").write_text("a\n")
    said = "a StableDiffusionPipeline needs the package transformers: pip install 'halfstep[text]'"
    assert said in refused(argv, capsys)


def test_a_guidance_scale_that_the_denoiser_does_not_take_is_rejected(
    here: Path, tmp_path: Path, capsys: Capture
) -> None:
    """A student with this argument could not be exported: its card would turn the pipeline's own guidance on."""
    argv = ["import", "diffusers", str(here / "sd"), "--out", str(tmp_path / "out"), "--call", "guidance_scale=7.5"]
    said = refused(argv, capsys)
    assert "--call guidance_scale has no effect" in said
    assert "use --matching.guidance-scale (distill) or --guidance-scale (encode, sample)" in said
    prompts = ["encode", str(here / "sd"), "--prompts", "prompts.txt", "--out", str(tmp_path / "out")]
    assert "--guidance-scale must be" in refused([*prompts, "--guidance-scale", "nan"], capsys)


def test_samples_of_another_guidance_are_refused_with_the_option_that_fits(
    here: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    sd, out = str(here / "sd"), str(tmp_path / "data")
    drawn = ["--prompts", str(tmp_path / "prompts.txt"), "--num-steps", "1", "--guidance-scale", "5", "--out", out]
    main(["encode", sd, *drawn])
    assert open_latents(Path(out)).guidance_scale == 5.0
    argv = ["distill", sd, "--data", out, "--to", "4", "--out", str(tmp_path / "run"), *UNMEASURED]
    said = refused(argv, capsys)
    assert f"{out} contains samples drawn at guidance scale 5, but the student would learn no guidance. Add" in said
    assert not (tmp_path / "run").exists()
    main([*argv, "--matching.guidance-scale", "5", "--dry-run"])


def test_a_negative_prompt_is_the_condition_of_the_unconditional_branch(here: Path) -> None:
    model = import_pipeline(here / "sd", {"negative_prompt": "b"})
    (negative,) = text_conditions(model.manifest, ["b"])["encoder_hidden_states"]
    assert_same(model.null["encoder_hidden_states"], negative)
    assert_same(text_conditions(model.manifest, ["a", "b"])["encoder_hidden_states"][1], negative)


def test_a_plan_that_cannot_be_carried_out_is_rejected_before_prompts_are_sampled(
    here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(*_: object, **__: object) -> None:
        pytest.fail("prompts were sampled")

    monkeypatch.setattr("halfstep.cli.training.sample_prompts", sampled)
    teacher = import_pipeline(here / "sd3")
    monkeypatch.setattr("halfstep.cli.training.imported", lambda *_, **__: teacher)
    prompts, other = tmp_path / "prompts.txt", tmp_path / "other"
    prompts.write_text("a\n")
    other.mkdir()
    (other / "mine.txt").touch()
    argv = ["distill", str(here / "sd3"), "--prompts", str(prompts), "--to", "4", *UNMEASURED]
    out = ["--out", str(tmp_path / "out")]
    assert "7 steps cannot be halved to 4" in refused([*argv, *out, "--chain.start-steps", "7"], capsys)
    assert "needs an input for the scale" in refused([*argv, *out, "--matching.guidance-range", "1", "8"], capsys)
    assert "is not empty, but it is not a run folder" in refused([*argv, "--out", str(other)], capsys)
    assert "is a file, so it cannot be a folder" in refused([*argv, "--out", str(prompts)], capsys)
    assert "--data and --prompts cannot be combined" in refused([*argv, *out, "--data", "digits"], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "prompts.txt"]
    with pytest.raises(pytest.fail.Exception, match="prompts were sampled"):
        main([*argv, *out])


def test_a_student_draws_the_samples_for_prompts_in_its_own_number_of_steps(
    here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, prompts, times = import_pipeline(here / "sd3"), tmp_path / "prompts.txt", list[float]()
    outcome = Outcome(role="student", num_steps=4, sampler={"type": "ddim"})
    manifest = teacher.manifest.model_copy(update={"outcome": outcome})
    save(Model(teacher.denoiser, manifest, teacher.null), tmp_path / "student")
    prompts.write_text("a\n")
    argv = [
        "distill",
        str(tmp_path / "student"),
        "--prompts",
        str(prompts),
        "--to",
        "2",
        "--evaluation.no-enabled",
        "--dry-run",
    ]
    main([*argv, "--out", str(tmp_path / "out")])
    assert "with 4 network calls each" in re.sub(r"\s+", " ", capsys.readouterr().out)

    def forward(self: NetworkDenoiser, x_t: Tensor, t: float, cond: object = None) -> Denoised:
        times.append(float(torch.as_tensor(t).flatten()[0]))
        return Denoised(x_t, x_t)

    monkeypatch.setattr(NetworkDenoiser, "forward", forward)
    monkeypatch.setattr("halfstep.cli.training._carry_out", lambda *_, **__: None)
    main([*argv[:-1], "--out", str(tmp_path / "out"), "--engine.cpu"])
    assert times == [1.0, 0.75, 0.5, 0.25]


def test_a_student_that_draws_noise_at_each_step_draws_no_samples_for_prompts(
    here: Path, tmp_path: Path, capsys: Capture
) -> None:
    teacher, prompts = import_pipeline(here / "sd3"), tmp_path / "prompts.txt"
    outcome = Outcome(role="student", num_steps=4, sampler=samplers.describe(Ancestral(0.5)))
    save(
        Model(teacher.denoiser, teacher.manifest.model_copy(update={"outcome": outcome}), teacher.null), tmp_path / "s"
    )
    prompts.write_text("a\n")
    argv = ["distill", str(tmp_path / "s"), "--prompts", str(prompts), "--to", "2", "--out", str(tmp_path / "out")]
    for words in ([], ["--dry-run"]):
        said = refused([*argv, *words, "--evaluation.no-enabled"], capsys)
        assert "Ancestral draws noise at each step. Draw the samples from another model" in said


@pytest.mark.parametrize(("words", "calls"), [([], 63), (["--matching.guidance-scale", "3"], 126)])
def test_guided_samples_for_prompts_take_twice_the_calls(
    words: list[str], calls: int, here: Path, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "prompts.txt").write_text("a\n")
    argv = ["distill", str(here / "sd"), "--prompts", str(tmp_path / "prompts.txt"), "--to", "4", *UNMEASURED]
    main([*argv, *words, "--out", str(tmp_path / "out"), "--dry-run"])
    assert f"with {calls} network calls each" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_samples_drawn_with_another_schedule_or_text_encoder_are_not_used_again(here: Path, tmp_path: Path) -> None:
    def changed(file: Path, **changes: object) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    folder = tmp_path / "sd"
    shutil.copytree(here / "sd", folder)
    model = import_pipeline(folder)
    trained = model.manifest.model_copy(update={"files": {"model.safetensors": "0" * 64}})
    keys = [prompts_of(made).key for made in (model, model, Model(model.denoiser, trained))]
    assert keys[0] == keys[1]
    changed(folder / "tokenizer" / "tokenizer_config.json", padding_side="left")
    keys.append(prompts_of(model).key)
    changed(folder / "scheduler" / "scheduler_config.json", beta_end=0.02)
    keys.append(prompts_of(import_pipeline(folder)).key)
    changed(folder / "unet" / "config.json", norm_eps=1e-3)
    keys.append(prompts_of(import_pipeline(folder)).key)
    assert len(set(keys)) == 5


def test_only_files_that_are_read_identify_an_encoder(here: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(here / "sd", tmp_path / "sd")
    model, (encoder,) = import_pipeline(folder), (folder / "text_encoder").glob("*.safetensors")
    before = prompts_of(model).key
    for unread in ("model.fp16.safetensors", "pytorch_model.bin"):
        (encoder.parent / unread).write_bytes(b"0")
    assert prompts_of(model).key == before
    weights = load_file(encoder)
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, encoder, {"format": "pt"})
    assert prompts_of(model).key != before


@pytest.mark.parametrize("where", ["imported", "sample_prompts"])
def test_a_signal_before_training_ends_with_the_requested_code(
    where: str, here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stopped(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)

    monkeypatch.setattr(f"halfstep.cli.training.{where}", stopped)
    (tmp_path / "prompts.txt").write_text("a\n")
    argv = ["distill", str(here / "sd3"), "--prompts", str(tmp_path / "prompts.txt"), "--to", "4", *UNMEASURED]
    with pytest.raises(SystemExit) as end:
        main([*argv, "--out", str(tmp_path / "out"), "--engine.requeue-code", "85"])
    assert end.value.code == 85


def test_only_models_with_conditions_are_measured_again_with_other_rows(sd_run: Path, ddpm_run: Path) -> None:
    """The protocol of metrics.json decides whether a run measures a stage again."""
    for run, is_conditional in ((sd_run, True), (ddpm_run, False)):
        for stage in RunFolder(run).stages():
            metrics = stage.metrics()
            assert metrics is not None
            assert ("condition_rows" in metrics.protocol) == is_conditional


def test_prompts_are_sampled_in_batches_that_fit_into_memory(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    tried: list[int] = []
    encode = exporting.encode_images

    def hungry(texts: Any, encoder: Any, out: Path, batch_size: int, **settings: Any) -> Any:
        tried.append(batch_size)
        if batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return encode(texts, encoder, out, batch_size, **settings)

    monkeypatch.setattr(exporting, "encode_images", hungry)
    (tmp_path / "prompts.txt").write_text("a\nb\na b\nb a\n")
    argv = ["distill", str(here / "sd3"), "--prompts", str(tmp_path / "prompts.txt"), "--to", "4", *UNMEASURED]
    main([*argv, "--out", str(tmp_path / "run")])
    assert tried == [8, 4, 2]
    assert "a batch of 8 prompts does not fit in memory; retrying with a batch size of 4" in capsys.readouterr().out
    assert len(open_latents(tmp_path / "run-data")) == 4


def test_prompts_that_do_not_fit_into_memory_get_one_line(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def hungry(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("halfstep.cli.exporting.encode_images", hungry)
    (tmp_path / "prompts.txt").write_text("a\n")
    argv = ["distill", str(here / "sd3"), "--prompts", str(tmp_path / "prompts.txt"), "--to", "4", *UNMEASURED]
    said = refused([*argv, "--out", str(tmp_path / "out")], capsys, code=1)
    assert "out of memory while sampling 1 prompt at once. Free some memory, or use the CPU (--engine.cpu)" in said
    argv = ["encode", str(here / "sd"), "--data", str(here / "captioned"), "--out", str(tmp_path / "latents")]
    assert "out of memory (CUDA out of memory. Tried to" in refused(argv, capsys, code=1)


def test_a_missing_decoder_is_reported_before_sampling(
    dit_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(Model, "sample", lambda *_, **__: pytest.fail("samples were drawn"))
    monkeypatch.setattr("halfstep.hub.encoding.fetch_pipeline", lambda pipeline: tmp_path)
    argv = ["sample", str(dit_run), "--num-samples", "2", "--out", str(tmp_path / "a.png")]
    assert "has no vae, which is needed to encode and decode images" in refused(argv, capsys)


def test_a_dry_run_from_a_lora_student_counts_the_new_lora(lora_run: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["distill", str(lora_run), "--to", "2", "--evaluation.no-enabled", "--out", str(tmp_path / "out")]
    argv += ["--chain.lora-rank", "3"]
    main([*argv, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    main(argv)
    last = load(RunFolder(tmp_path / "out").stages()[-1].path)
    assert facts["trainable_parameters"] == sum(p.numel() for _, p in last.network.own())
    assert facts["parameters"] == sum(p.numel() for p in last.network.parameters())


def test_a_run_from_a_given_teacher_is_no_recipe(ddpm_run: Path, tmp_path: Path, capsys: Capture) -> None:
    for name in (ddpm_run, ddpm_run / "recipe.json"):
        said = refused(["run", str(name), "--out", str(tmp_path / "out")], capsys)
        assert "was distilled from a given teacher. To resume it, rerun its command" in said
        assert "halfstep distill RUN/stages/00-teacher" in said
    # A recipe that the user has written may have the same name.
    written = tmp_path / "recipe.json"
    written.write_text(json.dumps(recipes["digits"]().model_dump(mode="json")))
    main(["run", str(written), "--dry-run", "--out", str(tmp_path / "out"), "--engine.threads", "1"])


def test_the_data_of_prompts_lies_next_to_a_run_in_the_working_folder(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def sampled(model: object, prompts: Path, folder: Path, *_: object) -> None:
        seen.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.cli.training.sample_prompts", sampled)
    teacher = import_pipeline(here / "sd3")
    monkeypatch.setattr("halfstep.cli.training.imported", lambda *_, **__: teacher)
    (tmp_path / "prompts.txt").write_text("a\n")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        main(["distill", str(here / "sd3"), "--prompts", "../prompts.txt", "--to", "4", "--out", ".", *UNMEASURED])
    assert (end.value.code, seen) == (130, [tmp_path / "run-data"])


def test_a_call_cannot_be_changed_after_the_import(sd3_run: Path, tmp_path: Path, capsys: Capture) -> None:
    argv = ["distill", str(sd3_run), "--to", "2", "--out", str(tmp_path / "out"), "--call", "height=16"]
    said = refused(argv, capsys)
    assert f"--call has no effect with {sd3_run}: only pipelines take call arguments. Remove it" in said
    argv = ["distill", "sdxl", "--dry-run", "--call", "height=512"]
    assert "--call has no effect with sdxl: the estimate is for the listed size" in refused(argv, capsys)


def test_unsupported_input_is_rejected_before_anything_is_written(here: Path, tmp_path: Path, capsys: Capture) -> None:
    def said(model: str, data: str, *words: str) -> str:
        argv = ["encode", str(here / model), "--data", str(here / data), "--out", str(tmp_path / "out"), *words]
        line = refused(argv, capsys)
        assert not (tmp_path / "out").exists()
        return line

    line = said("sd", "captioned", "--image-size", "16")
    assert "0.png has 16 x 16 pixels" in line
    assert "takes 8 x 8: add --image-size 8, or change the pipeline's size" in line
    for option in ("--num-steps", "--guidance-scale", "--seed"):
        assert f"{option} has no effect with --data. Remove it" in said("sd", "captioned", option, "3")
    prompts = ["encode", str(here / "sd"), "--prompts", "prompts.txt", "--out", str(tmp_path / "out")]
    for option in ("--image-size", "--frame-rate"):
        assert f"{option} has no effect with --prompts" in refused([*prompts, option, "8"], capsys)
    assert "--batch-size must be at least 1, got 0" in said("dit", "classes", "--batch-size", "0")
    assert "the device 'banana' does not exist here" in said("sd", "captioned", "--device", "banana")
    assert "does not use latents. Pass the images" in said("ddpm", "captioned")
    assert "has no model_index.json, so it is not a pipeline" in said("captioned", "captioned")
    assert "has no classes: put the images of each class into a separate sub-folder" in said("dit", "captioned")
    folder = shutil.copytree(here / "sd", here / "foreign-vae")
    edit("model_index.json", vae=["mine", "VAE"])(folder)
    assert "requires custom code (vae)" in said("foreign-vae", "captioned")


def test_class_latents_resume_where_they_were_interrupted(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from halfstep.data import encoding

    whole = open_latents(here / "latents-dit")
    assert (whole.class_names, len(whole)) == (("0", "1"), 12)
    assert whole.null["class_labels"] == 1000
    cond = whole.fetch(torch.arange(12)).cond
    assert cond["class_labels"].tolist() == [0] * 6 + [1] * 6
    argv = ["encode", str(here / "dit"), "--data", str(here / "classes"), "--out", str(tmp_path / "out")]
    write = encoding.write_tensors

    def failing(path: Path, tensors: Any) -> str:
        if path.name.startswith("shard"):
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(encoding, "write_tensors", failing)
    with pytest.raises(SystemExit):
        main(argv)
    monkeypatch.undo()
    main(argv)
    for file in ("index.json", "null.safetensors", "shard-00000.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (here / "latents-dit" / file).read_bytes()


def test_a_pipeline_in_half_precision_is_computed_in_full(here: Path, tmp_path: Path) -> None:
    """Its files contain float16, but teachers, texts and latents are float32."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(here / "sd")
    pipe.to(torch.float16).save_pretrained(tmp_path / "half")
    main(["encode", str(tmp_path / "half"), "--data", str(here / "captioned"), "--out", str(tmp_path / "latents")])
    run = distil(tmp_path / "half", tmp_path / "latents", tmp_path / "run", "--matching.guidance-scale", "3")
    assert {p.dtype for p in load(run).parameters()} == {torch.float32}
    main(["sample", str(run), "--num-samples", "1", "--prompt", "a", "--out", str(tmp_path / "a.png")])


def test_a_folder_without_an_index_is_found_by_its_network(here: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(here / "ddpm", tmp_path / "ddpm")
    (folder / "model_index.json").unlink()
    assert stages(distil(folder, "digits", tmp_path / "run"))[0] == "00-teacher"


def test_an_image_student_is_exported_when_its_teacher_is_gone(here: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(here / "ddpm", tmp_path / "ddpm")
    run = distil(folder, "digits", tmp_path / "run")
    shutil.rmtree(folder)
    main(["export", str(run), "--out", str(tmp_path / "out")])
    diffusers.DDIMPipeline.from_pretrained(tmp_path / "out")


def test_the_sampler_of_a_latent_student_is_one_graph(dit_run: Path, tmp_path: Path) -> None:
    """Each is compared with torch to 1e-4 before it is written; one step, because each export takes many seconds."""
    words = ["--format", "onnx", "--num-steps", "1", "--out", str(tmp_path / "sampler.onnx")]
    main(["export", str(dit_run), *words])
    assert (tmp_path / "sampler.onnx").is_file()


def test_a_text_encoder_of_another_width_is_refused(here: Path, tmp_path: Path, capsys: Capture) -> None:
    folder = save_sd(tmp_path / "sd", tmp_path / "tokens", width=24)
    said = refused(["import", "diffusers", str(folder), "--out", str(tmp_path / "out")], capsys)
    assert "calling StableDiffusionPipeline failed (mat1 and mat2 shapes cannot be multiplied" in said


def test_a_network_without_a_pipeline_needs_its_scheduler(tmp_path: Path, capsys: Capture) -> None:
    tiny_unet().save_pretrained(tmp_path / "net")
    words = ["import", "diffusers", str(tmp_path / "net"), "--out", str(tmp_path / "out")]
    assert "has no scheduler_config.json, which defines the process and prediction" in refused(words, capsys)
    diffusers.DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "net" / "scheduler")
    main(words)
    assert load(tmp_path / "out").manifest.prediction == {"type": "v"}
    tiny_vae().save_pretrained(tmp_path / "vae")
    words = ["import", "diffusers", str(tmp_path / "vae")]
    assert "contains a AutoencoderKL, not a UNet2DModel. Pass the whole pipeline" in refused(words, capsys)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("model.ckpt", "is pickled and could run code"),
        ("weights.bin", "is pickled and could run code"),
        ("weights.pt", "is pickled and could run code"),
        ("owner/name", "could not be downloaded from the Hub"),
        ("../x/y", "does not exist"),
        ("nowhere", "does not exist"),
        (__file__, "is a file: pass a folder"),
    ],
)
def test_folders_without_a_pipeline_are_rejected(source: str, said: str, tmp_path: Path, capsys: Capture) -> None:
    assert said in refused(["import", "diffusers", source, "--out", str(tmp_path / "out")], capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "data", "words", "said"),
    [
        ("ddpm", "digits", ["--matching.guidance-scale", "3"], "null condition, which is not known. Remove"),
        ("ddpm", "digits", ["--matching.null-class", "3"], "this teacher has no classes"),
        ("classes-ddpm", "digits", ["--matching.guidance-scale", "3", "--matching.null-class", "11"],
         "matching.null_class 11 is not a class of the teacher. Choose one of 0 to 10"),
        ("classes-ddpm", "digits", ["--matching.guidance-scale", "3"], "Add --matching.null-class"),
        ("ddpm", "digits", ["--matching.prediction", "w"], "unknown prediction 'w'"),
        ("ddpm", "digits", ["--matching.prediction", "both"], "but Both needs 2"),
        ("ddpm", "latents-dit", [], "generates images in [-1, 1], but"),
        ("dit", "wide.npz", [], "has samples of shape [4, 4, 4], but"),
        ("ddpm", "digits", ["--matching.guidance-range", "3", "1"], "must satisfy 0 <= low < high"),
        ("ddpm", "digits", ["--matching.guidance-scale", "nan"], "guidance-scale"),
        ("ddpm", "digits", ["--chain.lora-rank", "2", "--matching.process", "cosine"], "remove --chain.lora-rank"),
        ("dit", "latents-dit", ["--matching.guidance-range", "1", "3"], "DiTTransformer2DModel has no such input"),
        ("dit", "latents-dit", ["--matching.process", "cosine"], "has no table of timesteps to replace"),
        (
            "dit", "latents-dit", ["--matching.guidance-scale", "2", "--matching.guidance-range", "1", "3"],
            "cannot be combined. Remove one of them",
        ),
        ("sd", "latents-dit", [], "conditioned on encoder_hidden_states, which"),
        ("sd", "latents3", [], "takes encoder_hidden_states of shape [7, 16], but"),
        ("sd3", "latents3", ["--matching.guidance-range", "1", "3"], "SD3Transformer2DModel has no such input"),
        (
            "sd", "latents", ["--matching.guidance-range", "1", "3", "--chain.lora-rank", "2"],
            "remove --chain.lora-rank",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_act_are_refused_before_anything_is_done(
    here: Path, tmp_path: Path, capsys: Capture, model: str, data: str, words: list[str], said: str
) -> None:
    source = data if data == "digits" else str(here / data)
    argv = ["distill", str(here / model), "--data", source, "--to", "4", "--out", str(tmp_path / "run"), *BUDGET]
    assert said in refused([*argv, *words], capsys)
    assert not (tmp_path / "run").exists()


def test_an_optimiser_whose_package_is_missing_is_named(
    here: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    argv = ["distill", str(here / "ddpm"), "--data", "digits", "--to", "4", "--out", str(tmp_path / "run"), *UNMEASURED]
    assert "needs the package bitsandbytes" in refused([*argv, "--engine.optimizer", "adamw8bit"], capsys)


def test_impossible_exports_are_rejected(
    here: Path, ddpm_run: Path, dit_run: Path, lora_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    def said(run: Path, *words: str, out: str = "out") -> str:
        return refused(["export", str(run), "--out", str(tmp_path / out), *words], capsys)

    assert "has no effect with --format diffusers" in said(ddpm_run, "--num-steps", "4")
    assert "--push-to-hub has no effect with --format" in said(
        ddpm_run, "--format", "onnx", "--push-to-hub", "a/b", out="o.onnx"
    )
    assert "is not an ONNX file. Choose a name that ends in .onnx" in said(ddpm_run, "--format", "onnx")
    assert "was not trained with LoRA and has no LoRA weights" in said(ddpm_run, "--format", "lora")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "already exists" in said(ddpm_run, out="full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    np.save(tmp_path / "toy.npy", points().numpy())
    toy = tmp_path / "toy"
    main(["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(toy), *TINY_ARRAYS])
    assert "diffusers has no pipeline for a network of type mlp. Use --format onnx" in said(toy)
    sixteen = distil(here / "dit", here / "latents-dit", tmp_path / "sixteen", "--chain.start-steps", "32", to=16)
    message = said(sixteen)
    assert "with 1000 timesteps, the exported grid" in message
    assert "cannot represent 16 steps exactly; it can only represent 1, 2, 4, 5, 8, 10, 20, 25" in message
    assert not (tmp_path / "out").exists()


def test_samples_that_cannot_be_drawn_are_refused(
    dit_run: Path, sd_run: Path, ddpm_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    def said(run: Path, *words: str) -> str:
        return refused(["sample", str(run), "--num-samples", "2", "--out", str(tmp_path / "x.npz"), *words], capsys)

    assert "has only learned 4. Remove the scale, or distil a model" in said(dit_run, "--guidance-scale", "2")
    assert "has no guidance. Remove it" in said(ddpm_run, "--guidance-scale", "2")
    assert "Add --prompt TEXT" in said(sd_run)
    assert "--prompt has no effect: this model is not text-conditioned" in said(ddpm_run, "--prompt", "a")
    assert "Choose a class from 0 to 999" in said(dit_run, "--class-label", "1000")
    assert "is not class-conditional" in said(sd_run, "--class-label", "1", "--prompt", "a")
