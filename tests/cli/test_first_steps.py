"""The first steps of a new user with a diffusers checkpoint."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep import NetworkDenoiser, Training, V, VPCosine, distill, load
from halfstep.cli import main
from halfstep.cli.dry_run import shorter
from halfstep.cli.exporting import progress_of
from halfstep.cli.importing import imported
from halfstep.cli.words import Screen
from halfstep.core.noise import FlowMatching, processes
from halfstep.hub import import_pipeline
from halfstep.hub.card import lora_card, public
from halfstep.hub.schedulers import StockSchedule
from halfstep.models.model import Model
from halfstep.objectives import Role
from halfstep.runs import Outcome, Pipeline
from halfstep.runtime.files import read_sealed, write_sealed
from support_cli import Capture, refused
from support_pipelines import save_ddpm
from toys import TINY_ARRAYS, points


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_ddpm(tmp_path_factory.mktemp("first") / "my-ddpm")


def default_of(option: str, argv: list[str], capsys: Capture) -> str | None:
    """Return the default of an option in a verb's help."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    text = printed.partition(f" {option} ")[2].partition(" --")[0]
    return text.partition("(default: ")[2].partition(")")[0] or None


def test_the_help_of_distill_needs_no_data_and_shows_the_defaults_of_an_imported_model(
    ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    teacher = import_pipeline(ddpm)
    for model in ([str(ddpm)], ["google/not-here"], []):
        argv = ["distill", *model, "--help"]
        assert default_of("--start", argv, capsys) == str(teacher.manifest.start_steps)
        assert default_of("--data", argv, capsys) is None


def test_the_help_of_distill_shows_the_defaults_of_the_recipe_of_a_run(toy_run: Path, capsys: Capture) -> None:
    student = load(toy_run)
    assert default_of("--start", ["distill", str(toy_run), "--help"], capsys) == str(student.num_steps)
    assert default_of("--data", ["distill", str(toy_run), "--help"], capsys) is not None


def test_distill_parses_its_options_before_it_imports(
    ddpm: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def seen(source: str, call: tuple[str, ...], screen: Screen, *, precision: str) -> None:
        raise ValueError(f"imported with {call} in {precision}")

    monkeypatch.setattr("halfstep.cli.training.imported", seen)
    argv = ["distill", str(ddpm), "--call", "height=8", "width=8", "--base_precision", "bf16"]
    assert "imported with ('height=8', 'width=8') in bf16" in refused(argv, capsys)
    assert "did you mean '--chain.end-steps'?" in refused([*argv, "--chain.end-step", "4"], capsys)


@pytest.mark.parametrize("option", ["--prompts", "--call", "--chain.lora-rank", "--matching.num-updates"])
def test_the_short_help_of_distill_has_what_pipelines_need(option: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    assert f"\n  {option} " in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["sample", "export"])
def test_a_verb_that_needs_a_model_says_how_to_import_a_pipeline(
    verb: str, ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    said = refused([verb, str(ddpm), "--out", str(tmp_path / "x")], capsys)
    assert f"halfstep import diffusers {ddpm}" in said
    assert f"halfstep distill {ddpm}" in said


def test_a_long_estimate_names_the_options_that_a_given_teacher_has(ddpm: Path) -> None:
    teacher = import_pipeline(ddpm)
    outcome = teacher.manifest.outcome.model_copy(update={"role": "student", "num_steps": 8})
    student = Model(teacher.denoiser, teacher.manifest.model_copy(update={"outcome": outcome}))
    roles = [Role.MATCHED, Role.STUDENT]
    advice = [shorter(roles, teacher), shorter(roles[1:], teacher), shorter(roles[1:], student)]
    assert [text.count("--") for text in advice] == [3, 2, 1]
    for option, times in (("--matching.num-updates", 1), ("--start", 2), ("--chain.num-updates", 3)):
        assert sum(option in text for text in advice) == times
    assert "network" not in " ".join(advice)
    assert "network" in shorter([Role.TEACHER, Role.STUDENT], None)


@pytest.mark.parametrize(
    "written", ["my-ddpm/", "./my-ddpm", "PARENT/my-ddpm", "../FOLDER/my-ddpm", "~/my-ddpm", "link"]
)
def test_another_spelling_of_a_folder_is_the_same_teacher(
    written: str, ddpm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise, a run that was started with `my-ddpm` could not be resumed with `my-ddpm/`, as shells complete it."""
    monkeypatch.chdir(ddpm.parent)
    monkeypatch.setenv("HOME", str(ddpm.parent))
    if not Path("link").is_symlink():
        Path("link").symlink_to("my-ddpm")
    written = written.replace("PARENT", str(ddpm.parent)).replace("FOLDER", ddpm.parent.name)
    manifest = import_pipeline("my-ddpm").manifest
    assert import_pipeline(written).manifest == manifest
    assert manifest.stage == "my-ddpm"
    assert str(manifest.source).startswith("my-ddpm (weights sha256 ")


def test_a_copied_folder_is_the_same_teacher_and_one_of_other_weights_is_not(ddpm: Path, tmp_path: Path) -> None:
    """A cluster mounts the same folder under another path."""
    source = import_pipeline(ddpm).manifest.source
    copied = shutil.copytree(ddpm, tmp_path / "my-ddpm")
    assert import_pipeline(copied).manifest.source == source
    assert import_pipeline(save_ddpm(tmp_path / "other" / "my-ddpm", seed=1)).manifest.source != source


def test_a_run_is_not_resumed_from_a_teacher_with_another_scheduler(
    ddpm: Path, tmp_path: Path, capsys: Capture
) -> None:
    """The weights are the same, but their output means something else."""
    teacher, images, run = tmp_path / "my-ddpm", tmp_path / "images.npy", tmp_path / "run"
    shutil.copytree(ddpm, teacher)
    np.save(images, np.zeros((4, 8, 8, 3), np.uint8))
    words = ["distill", str(teacher), "--data", str(images), "--start", "4", "--to", "2", "--out", str(run)]
    words += ["--matching.num-updates", "1", "--matching.batch-size", "2", "--chain.num-updates", "1"]
    words += ["--chain.batch-size", "2", "--evaluation.no-enabled"]
    main(words)
    # Recipes of earlier versions do not describe the scheduler and the network.
    recipe = read_sealed(run / "recipe.json")
    del recipe["recipe"]["parent"]["scheduler"], recipe["recipe"]["parent"]["network"]
    write_sealed(run / "recipe.json", recipe)
    main(words)
    shutil.rmtree(run)
    main(words)
    config = teacher / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"prediction_type": "epsilon"', '"prediction_type": "v_prediction"'))
    assert "parent.scheduler: " in refused(words, capsys)


def test_a_list_of_students_replaces_the_end_of_the_recipe_of_a_run(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "toy.npy", points().numpy())
    words = ["--data", str(tmp_path / "toy.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS]
    main(["run", "arrays", *words, "--to", "2", "--evaluation.no-enabled"])
    again = ["distill", str(tmp_path / "run" / "stages" / "00-denoise"), "--start", "8", "--chain.students", "4", "1"]
    capsys.readouterr()
    main([*again, "--dry-run", "--json"])
    assert [row["num_steps"] for row in json.loads(capsys.readouterr().out)["stages"]] == [4, 1]
    assert "the students end at 1 steps. Remove end_steps 2" in refused([*again, "--to", "2", "--dry-run"], capsys)


def test_a_folder_without_a_name_of_its_own_is_imported_under_the_name_that_it_has(
    ddpm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = shutil.copytree(ddpm, tmp_path / "ddpm-v1.5")
    monkeypatch.chdir(place)
    main(["import", "diffusers", "."])
    assert load(place / "imported" / "ddpm-v1.5").manifest.stage == "ddpm-v1.5"


def test_an_import_prints_a_line_before_it_starts(ddpm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    printed = io.StringIO()
    said: list[str] = []
    monkeypatch.setattr("halfstep.cli.importing.import_pipeline", lambda *_, **__: said.append(printed.getvalue()))
    imported(str(ddpm), (), Screen(file=printed))
    assert said[0].startswith(f"importing {ddpm}")
    imported(f"{ddpm}-missing", (), Screen(file=printed))
    assert said[1] == said[0]


def test_the_time_left_is_that_of_the_samples_left_at_the_pace_of_this_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    printed, now = io.StringIO(), [100.0]
    monkeypatch.setattr("halfstep.cli.exporting.time.monotonic", lambda: now[0])
    progress: Callable[[int, int], None] = progress_of("sampled", Screen(file=printed))
    # 16 samples of an earlier process, then 8 in 4 seconds.
    for done, seconds in ((16, 0.0), (24, 4.0), (32, 8.0)):
        now[0] = 100.0 + seconds
        progress(done, 32)
    assert printed.getvalue().splitlines() == ["sampled 16 of 32", "sampled 24 of 32, 4 s left", "sampled 32 of 32"]


@pytest.mark.parametrize("folder", ["/home/ann/my-sd", "me/my-sd"])
def test_the_card_of_a_lora_contains_no_private_path(folder: str, ddpm: Path) -> None:
    kind = "StableDiffusionPipeline"
    pipeline = Pipeline(kind=kind, folder=folder, component="unet", guidance="guidance_scale", off=1.0)
    manifest = import_pipeline(ddpm).manifest.model_copy(update={"pipeline": pipeline})
    card = lora_card("mine", manifest, pipeline, StockSchedule("DDIMScheduler", {}))
    assert "ann" not in card
    assert f'from_pretrained("{folder.removeprefix("/home/ann/")}")' in card


@pytest.mark.parametrize(("kind", "is_bound"), [("WanPipeline", True), ("SanaPipeline", False)])
def test_the_card_of_a_lora_shows_the_sigmas_of_its_steps(kind: str, is_bound: bool, ddpm: Path) -> None:
    pipeline = Pipeline(kind=kind, folder="me/flow", component="transformer", guidance="guidance_scale", off=1.0)
    facts = {
        "pipeline": pipeline,
        "process": processes.describe(FlowMatching(3.0)),
        "outcome": Outcome(role="student", num_steps=4),
    }
    manifest = import_pipeline(ddpm).manifest.model_copy(update=facts)
    card = lora_card("mine", manifest, pipeline, StockSchedule("FlowMatchEulerDiscreteScheduler", {}))
    bound = "pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=[1, 0.75, 0.5, 0.25])\nmade ="
    assert "sigmas=[1, 0.75, 0.5, 0.25]" in card
    assert (bound in card, "from functools import partial\n" in card) == (is_bound, is_bound)
    assert "The scheduler's default spacing differs from the spacing of the distilled steps." in card


@pytest.mark.parametrize("text", ["/home/ann/sd (weights sha256 0a)", "/home/ann (x)/photos, 64 samples", "~/ann/sd"])
def test_a_source_becomes_public_without_the_folders_around_it(text: str) -> None:
    assert "ann" not in public(text)
    assert text.endswith(public(text))
    assert public("me/sd") == "me/sd"
    assert public("digits, 1,797 samples") == "digits, 1,797 samples"


def test_a_run_of_an_own_network_is_measured_in_python(tmp_path: Path, capsys: Capture) -> None:
    network = torch.nn.Linear(2, 2)
    teacher = NetworkDenoiser(lambda x_t, time: network(x_t), VPCosine(), V())
    distill(teacher, points(), start=2, to=1, training=Training(1, 1e-3, batch_size=4), out=tmp_path / "run")
    for words in (["evaluate", str(tmp_path / "run")], ["distill", str(tmp_path / "run"), "--to", "1"]):
        said = refused(words, capsys)
        assert "a run of your own network" in said
        assert "evaluation=halfstep.Evaluation()" in said
