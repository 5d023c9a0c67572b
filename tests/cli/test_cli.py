"""The command line from outside: its results, and a clear line with exit code 2 for bad input."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import halfstep
from halfstep import load
from halfstep.cli import main
from halfstep.cli.dry_run import _lines, plan_facts
from halfstep.cli.sampling import write_samples
from halfstep.measure.evaluate import Evaluation
from halfstep.registry import Registry
from halfstep.runs import RunFolder
from halfstep.runtime.files import write_sealed
from support_cli import Capture, refused
from toys import TINY_ARRAYS, TINY_DIGITS, file_size_limit, toy_spec


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rnu", "digits"], "unknown verb 'rnu'; did you mean 'run'?"),
        (["run"], "the recipe is missing"),
        (["run", "digts"], "unknown recipe 'digts'; did you mean 'digits'?"),
        (["run", "digits", "--chain.start-step", "8"], "did you mean '--chain.start-steps'?"),
        (["run", "digits", "--chain.start-steps", "many"], "--chain.start-steps: needs a whole number, got 'many'"),
        (["run", "digits", "--chain.start-steps"], "--chain.start-steps needs a value"),
        (
            ["run", "digits", "--chain.start-steps", "0"],
            "--chain.start-steps must be at least 1, got 0",
        ),
        (
            ["run", "digits", "--teacher.learning-rate", "nan"],
            "--teacher.learning-rate must be a finite number above 0, got nan",
        ),
        (["run", "digits", "--model.prediction", "vv"], "unknown prediction 'vv'; did you mean 'v'?"),
        (["run", "digits", "--model.weighting", "truncated-snr"], "did you mean 'truncated_snr'?"),
        (["run", "digits", "--engine.precision", "bf-16"], "'bf-16' is not one of float32, bf16; did you mean 'bf16'?"),
        (["run", "digits", "--chain.start-steps", "48"], "48 steps cannot be halved to 1"),
        (
            ["run", "digits", "--to", "5"],
            "for example 20 (--chain.students, --chain.start-steps or --to)",
        ),
        (["run", "images", "--data", "nowhere"], "nowhere does not exist: set --data to"),
        (["run", "digits", "--chain.end-steps", "128", "--chain.start-steps", "64"], "the end must be below the start"),
        (["run", "digits", "--network.attention", "True"], "network.attention has 1 entries for"),
        (["run", "arrays", "--data", "nowhere"], "nowhere"),
        (
            ["run", "arrays", "--data", "digits", "--network.wdith", "3"],
            "did you mean '--network.width'?",
        ),
        (["train", "digits", "--out"], "--out needs a value"),
        (["distill"], "the model is missing"),
        (["distill", "nowhere"], "nowhere does not exist"),
        (["sample", "nowhere"], "nowhere does not exist"),
        (["sample"], "is missing"),
        (["run", "digits", "--chain.factor", "1"], "--chain.factor must be at least 2, got 1"),
        (
            ["run", "digits", "--chain.factor", "3"],
            "16 steps cannot be divided repeatedly by 3 to 1. List the students' steps, or start from",
        ),
        (
            ["run", "arrays", "--data", "digits", "--chain.students", "48", "1"],
            "a 48-step student cannot follow a 16-step teacher",
        ),
        (
            ["run", "digits", "--chain.early-end.window", "50"],
            "--chain.early-end.window 50 has no effect while early_end.patience is 0. Set early_end.patience to 1",
        ),
        (
            ["run", "digits", "--engine.log-every", "0"],
            "--engine.log-every must be a whole number of at least 1, got 0",
        ),
        (
            ["run", "digits", "--engine.requeue-code", "300"],
            "--engine.requeue-code must be between 1 and 255, got 300",
        ),
        (["run", "digits", "--chain.keep", "3"], "chain.keep contains a 3-step student"),
        (["study"], "is missing"),
        (["study", "tabel1"], "did you mean 'table1'?"),
        (["study", "table1", "--scale", "smal"], "'smal' is not one of smoke, small, paper; did you mean 'small'?"),
        (["study", "table1", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["study", "table1", "--recipe", "digit"], "did you mean 'digits'?"),
        (["study", "steps", "--data", "nowhere"], "nowhere does not exist"),
        (["report", "nowhere"], "nowhere is not a run"),
        (["ls", "sampler"], "did you mean 'samplers'?"),
    ],
)
def test_bad_commands_get_one_line(
    argv: list[str], said: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(argv, capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_run_leads_to_the_recipe_for_images(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    said = refused(["run", "my photos", "--data", "my photos"], capsys)
    assert said.startswith("my photos is neither a recipe (")
    assert "images_small" in said
    assert said.endswith("halfstep run images --data 'my photos'")


def _image(path: Path, mode: str = "L", size: int = 8) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size, size)).save(path)


@pytest.mark.parametrize("case", ["missing", "empty", "unreadable", "mixed", "nan", "pickled"])
def test_bad_data_is_reported(case: str, tmp_path: Path, capsys: Capture) -> None:
    folder = tmp_path / "data"
    source, said = folder, "data"
    if case != "missing":
        folder.mkdir()
    if case == "unreadable":
        _image(folder / "a.png")
        (folder / "b.png").write_bytes(b"not an image")
        said = "b.png"
    elif case == "mixed":
        _image(folder / "a.png")
        _image(folder / "b.png", "RGB")
        said = "channels"
    elif case == "nan":
        source, said = folder / "x.npy", "finite"
        np.save(source, np.array([[1.0, 2.0], [np.nan, 0.0]]))
    elif case == "pickled":
        source, said = folder / "x.npy", "x.npy"
        np.save(source, np.array([{"a": 1}], dtype=object))
    out = tmp_path / "out"
    assert said in refused(["run", "arrays", "--data", str(source), "--out", str(out)], capsys)
    assert not out.exists()


def test_a_run_ends_with_its_table_and_resumes_where_it_stopped(toy_run: Path, toy_npy: Path, capsys: Capture) -> None:
    before = {path: path.stat().st_mtime_ns for path in toy_run.glob("stages/*/*.*")}
    main(["run", "arrays", "--data", str(toy_npy), "--out", str(toy_run), *TINY_ARRAYS])
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in toy_run.glob("stages/*/*.*")} == before
    assert "00-denoise: complete" in printed
    metrics = [stage.metrics() for stage in RunFolder(toy_run).stages()]
    assert all(metrics)
    for held in metrics:
        assert held is not None
        for result in held.results:
            assert f"{result.frechet:.4g}" in printed
    assert (toy_run / "report" / "index.html").is_file()


def test_another_recipe_in_the_folder_is_refused_with_the_difference(
    toy_run: Path, toy_npy: Path, capsys: Capture
) -> None:
    argv = ["run", "arrays", "--data", str(toy_npy), "--out", str(toy_run), *TINY_ARRAYS, "--seed", "3"]
    assert "seed: 3 (the folder has 0)" in refused(argv, capsys)


def test_the_recorded_recipe_runs_again(toy_run: Path, tmp_path: Path) -> None:
    main(["run", str(toy_run / "recipe.json"), "--out", str(tmp_path / "again")])
    for stage in RunFolder(toy_run).stages():
        assert (
            tmp_path / "again" / "stages" / stage.name / "model.safetensors"
        ).read_bytes() == stage.model.read_bytes()


def test_a_field_unknown_to_recipes_in_a_file_is_named(toy_run: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = json.loads((toy_run / "recipe.json").read_text())["recipe"]
    recipe["chain"]["nmu_updates"] = 3
    (tmp_path / "mine.json").write_text(json.dumps(recipe))
    assert "unknown field 'chain.nmu_updates'" in refused(["run", str(tmp_path / "mine.json")], capsys)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    main(["run", "digits", "--out", str(tmp_path / "x"), "--dry-run", *TINY_DIGITS])
    printed = capsys.readouterr().out
    network = load_parameters(printed)
    assert network > 1000
    for name in ("00-denoise", "01-halve-0002", "02-halve-0001", "04-finish-0001", "estimated time on this machine"):
        assert name in printed
    assert torch.accelerator.is_available() or "a device with" not in printed
    assert not (tmp_path / "x").exists()


def test_a_run_of_more_than_a_day_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and measuring count together, as in the line above the warning."""
    spec = toy_spec(evaluation=Evaluation())
    facts = plan_facts(spec, Path("x"))
    training, measuring = facts["estimated_seconds"], facts["estimated_seconds_of_measuring"]
    assert training > 0
    assert measuring > 0

    def printed(limit: float) -> str:
        monkeypatch.setattr("halfstep.cli.dry_run.LONG_SECONDS", limit)
        return "\n".join(_lines(facts, spec))

    assert "warning: this will take more than a day. Use a GPU, or " in printed(0.999 * (training + measuring))
    assert "a day" not in printed(1.001 * (training + measuring))


@pytest.mark.parametrize("name", ["cifar10_paper", "lsun_church128_paper"])
def test_dry_run_of_a_paper_recipe_needs_none_of_its_data(
    name: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use a reduced network that can be timed in a moment; tests/behaviour counts the full ones."""
    monkeypatch.chdir(tmp_path)
    # Timed with batches of a few samples, whose time is the basis of an estimate.
    monkeypatch.setattr("halfstep.run.cost.FLOPS_OF_A_TRIAL", 1e8)
    monkeypatch.setattr("halfstep.run.cost.SECONDS_OF_A_TRIAL", 0.1)
    monkeypatch.setattr("halfstep.cli.dry_run.LITTLE", 0)
    small = ["--network.block-out-channels", *["32"] * (3 if "cifar" in name else 5), "--network.layers-per-block", "1"]
    small += ["--network.attention-head-dim", "32", "--engine.threads", "1"]
    main(["run", name, "--data", "nowhere", "--dry-run", *small])
    printed = capsys.readouterr().out
    for said in (
        "so random numbers are used instead",
        "samples seen:",
        "GiB",
        "FLOP",
        "extrapolated from updates of",
        "device with",
    ):
        assert said in printed
    assert list(tmp_path.iterdir()) == []


def load_parameters(printed: str) -> int:
    """Return the number after "parameters:"."""
    found = re.search(r"parameters: ([\d,]+)", printed)
    assert found
    return int(found[1].replace(",", ""))


def test_the_teacher_is_measured_at_the_steps_of_its_students_too(digits_run: Path) -> None:
    metrics = RunFolder(digits_run).stage("00-denoise").metrics()
    assert metrics is not None
    assert [(one.sampler, one.num_steps) for one in metrics.results if one.sampler == "ddim"] == [
        ("ddim", 4), ("ddim", 2), ("ddim", 1),
    ]  # fmt: skip


def test_sample_writes_the_same_pixels_in_every_format(digits_run: Path, tmp_path: Path) -> None:
    common = ["--num-samples", "6", "--seed", "3"]
    main(["sample", str(digits_run), *common, "--out", str(tmp_path / "s.npz")])
    main(["sample", str(digits_run), *common, "--out", str(tmp_path / "folder")])
    main(["sample", str(digits_run), *common, "--out", str(tmp_path / "grid.png")])
    array = np.load(tmp_path / "s.npz", allow_pickle=False)["arr_0"]
    assert array.dtype == np.uint8
    assert array.shape == (6, 8, 8, 1)
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{seed:06d}.png" for seed in range(3, 9)]
    for pixels, file in zip(array, files, strict=True):
        assert np.array_equal(np.asarray(Image.open(file)), pixels[..., 0])
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    factor = grid.shape[1] // (3 * 8 + 2)
    assert np.array_equal(grid[: 8 * factor : factor, : 8 * factor : factor], array[0, ..., 0])
    model = load(digits_run)
    x0 = model.sample(range(3, 9))
    assert np.array_equal(((x0[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy(), array[..., 0])


def test_a_sample_depends_on_its_own_seed_only(digits_run: Path) -> None:
    model = load(digits_run)
    together = model.sample(range(10), 1)
    assert torch.allclose(model.sample(range(4, 6), 1), together[4:6], atol=1e-5)
    assert torch.allclose(model.sample(range(10), 1, batch_size=3), together, atol=1e-5)


def test_nothing_is_overwritten_without_the_option(digits_run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "s.npz"
    out.write_text("mine")
    assert "already exists" in refused(["sample", str(digits_run), "--out", str(out)], capsys)
    assert out.read_text() == "mine"
    main(["sample", str(digits_run), "--num-samples", "2", "--out", str(out), "--overwrite"])
    assert np.load(out)["arr_0"].shape[0] == 2


def test_overwriting_a_folder_removes_the_earlier_samples_and_no_other_file(tmp_path: Path) -> None:
    out, model = tmp_path / "s", SimpleNamespace(manifest=SimpleNamespace(is_image=True))
    write_samples(torch.zeros(3, 1, 4, 4), model, range(999999, 1000002), out)  # type: ignore[arg-type]
    assert sorted(path.name for path in out.iterdir()) == ["1000000.png", "1000001.png", "999999.png"]
    others = ["12.png", "0000012.png", "notes.txt", "000012.jpg", "a/000012.png", "000012.png/a"]
    for name in others:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    write_samples(torch.zeros(2, 1, 4, 4), model, range(999998, 1000000), out)  # type: ignore[arg-type]
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"999998.png", "999999.png", *others}
    assert all((out / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("name", ["UP.NPZ", "UP.PNG", "folder"])
def test_samples_are_written_under_their_own_name_or_not_at_all(
    digits_run: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    out = tmp_path / name
    argv = ["sample", str(digits_run), "--num-samples", "2", "--out", str(out), "--overwrite"]

    def held() -> dict[str, bytes]:
        return {str(f.relative_to(tmp_path)): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}

    with file_size_limit(20):
        refused(argv, capsys, code=3)
    assert held() == {}
    main(argv)
    names = [name] if out.suffix else ["folder/000000.png", "folder/000001.png"]
    before = held()
    assert sorted(before) == names
    with file_size_limit(20):
        refused([*argv, "--seed", "7"], capsys, code=3)
    assert held() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--out", "x.jpg"], "is not in a supported format. Choose a .png file"),
        (["--num-samples", "0"], "--num-samples must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--num-steps", "0"], "--num-steps must be at least 1, got 0"),
        (["--sampler", "dim"], "did you mean 'ddim'?"),
        (["--sampler", "ancestral", "--gamma", "1.5"], "--gamma must be at most 1, got 1.5"),
        (["--gamma", "0.5"], "--gamma 0.5 has no effect on the sampler ddim. Remove it, or add --sampler ancestral"),
        (["--class-label", "12"], "Choose a class from 0 to 9"),
        (["--device", "abacus"], "the device 'abacus' does not exist here"),
        (["--num-stesp", "4"], "did you mean '--num-steps'?"),
    ],
)
def test_bad_sampling_options_get_one_line(
    options: list[str], said: str, digits_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(["sample", str(digits_run), *options], capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_needs_a_number_of_steps(digits_run: Path, tmp_path: Path, capsys: Capture) -> None:
    teacher = digits_run / "stages" / "00-denoise"
    assert "--num-steps" in refused(["sample", str(teacher), "--out", str(tmp_path / "x.png")], capsys)


def test_more_steps_than_the_model_was_distilled_for_warn(digits_run: Path, tmp_path: Path, capsys: Capture) -> None:
    main(["sample", str(digits_run), "--num-steps", "4", "--num-samples", "2", "--out", str(tmp_path / "x.png")])
    assert "halfstep: warning: the model was distilled for num_steps=1, not 4" in capsys.readouterr().err
    assert (tmp_path / "x.png").is_file()


def test_vectors_have_no_picture(toy_run: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "are not images. Write a .npz" in refused(["sample", str(toy_run), "--out", str(tmp_path / "x.png")], capsys)
    main(["sample", str(toy_run), "--num-samples", "5", "--out", str(tmp_path / "x.npz")])
    array = np.load(tmp_path / "x.npz")["arr_0"]
    assert array.dtype == np.float32
    assert array.shape == (5, 2)


@pytest.mark.parametrize(
    "damage", ["no model", "cut", "altered", "manifest", "later format", "earlier format", "foreign tensors"]
)
def test_a_file_without_a_model_is_reported(damage: str, toy_run: Path, tmp_path: Path, capsys: Capture) -> None:
    stage = RunFolder(toy_run).stages()[-1]
    folder = tmp_path / "stage"
    folder.mkdir()
    manifest = json.loads(stage.manifest_path.read_text())
    content = stage.model.read_bytes()
    said = "model.safetensors"
    if damage == "cut":
        content = content[:-10]
    elif damage == "altered":
        content = content[:-1] + bytes([content[-1] ^ 1])
    elif damage == "later format":
        manifest["format"], said = 99, "update halfstep"
    elif damage == "earlier format":
        manifest["format"], said = 1, "it was written by an earlier version, so train the run again"
    elif damage == "foreign tensors":
        manifest["network"]["width"], said = 32, "does not match its manifest"
    write_sealed(folder / "manifest.json", manifest)
    if damage == "manifest":
        (folder / "manifest.json").write_text("{")
        said = "manifest.json is not readable JSON"
    if damage != "no model":
        (folder / "model.safetensors").write_bytes(content)
    assert said in refused(["sample", str(folder), "--out", str(tmp_path / "x.npz")], capsys)
    file = tmp_path / "weights.ckpt"
    file.write_bytes(b"\x80\x04")
    assert "is not a model" in refused(["sample", str(file)], capsys)


def test_distill_continues_from_a_stage_to_fewer_steps(toy_run: Path, tmp_path: Path, capsys: Capture) -> None:
    teacher = str(toy_run / "stages" / "00-denoise")
    main(["distill", teacher, "--to", "2", "--start", "8", "--out", str(tmp_path / "d")])
    stages = RunFolder(tmp_path / "d").stages()
    assert [stage.name for stage in stages] == ["00-teacher", "01-halve-0004", "02-halve-0002"]
    assert stages[0].model.read_bytes() == RunFolder(toy_run).stages()[0].model.read_bytes()
    assert load(tmp_path / "d").num_steps == 2
    student = str(toy_run / "stages" / "01-halve-0002")
    assert "Remove --start" in refused(["distill", student, "--to", "1", "--start", "4"], capsys)
    assert "the end must be below the start" in refused(
        ["distill", student, "--to", "2", "--out", str(tmp_path / "e")], capsys
    )
    main(["distill", student, "--to", "1", "--out", str(tmp_path / "e")])
    assert load(tmp_path / "e").num_steps == 1


def test_train_stops_after_the_teacher(toy_npy: Path, tmp_path: Path) -> None:
    main(["train", "arrays", "--data", str(toy_npy), "--out", str(tmp_path / "t"), *TINY_ARRAYS])
    assert [stage.name for stage in RunFolder(tmp_path / "t").stages()] == ["00-denoise"]
    assert load(tmp_path / "t").num_steps is None


@pytest.mark.parametrize("sampler", ["ancestral", "dpmpp_2m", "heun", "rk4"])
def test_every_sampler_draws_samples_that_depend_on_their_own_seeds(
    sampler: str, toy_run: Path, tmp_path: Path
) -> None:
    teacher = str(toy_run / "stages" / "00-denoise")
    for name, seed, count in (("all", "0", "8"), ("some", "5", "3")):
        where = ["--out", str(tmp_path / f"{name}.npz"), "--seed", seed, "--num-samples", count]
        main(["sample", teacher, "--num-steps", "3", "--sampler", sampler, *where])
    together, alone = (np.load(tmp_path / f"{name}.npz")["arr_0"] for name in ("all", "some"))
    np.testing.assert_allclose(together[5:8], alone, rtol=1e-5, atol=1e-5)


def test_a_study_lists_its_cells(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(["study", "table1", "--dry-run", "--seeds", "1"])
    printed = capsys.readouterr().out
    assert "12 cells -> studies/smoke/table1" in printed
    assert "prediction eps, weighting truncated_snr, seed 0" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_study_at_equal_cost_says_what_it_costs(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    passes = {}
    for seeds in (1, 3):
        main(["study", "roads", "--dry-run", "--json", "--seeds", str(seeds)])
        passes[seeds] = json.loads(capsys.readouterr().out)["forward_passes"]
    assert passes[3] == pytest.approx({n: v * (1 if n == "teacher" else 3) for n, v in passes[1].items()})
    main(["study", "roads", "--dry-run"])
    printed = capsys.readouterr().out
    assert f"total: {sum(passes[3].values()):,.0f}; " in printed
    assert "at 4,400 per second" in printed
    # The scale's documented limit: 45 minutes on two cores.
    assert sum(passes[3].values()) < 45 * 60 * 4400
    main(["study", "steps", "--dry-run"])
    assert "total:" not in capsys.readouterr().out


def test_a_student_without_kept_weights_is_skipped(toy_npy: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    main(["run", "arrays", "--data", str(toy_npy), "--out", str(run), *TINY_ARRAYS, "--chain.keep", "1"])
    missing = run / "stages" / "01-halve-0002"
    assert not (missing / "model.safetensors").exists()
    assert "no longer has weights" in refused(["sample", str(missing), "--out", str(tmp_path / "x.npz")], capsys)
    main(["evaluate", str(run), "--num-steps", "2"])
    assert "Stage 01-halve-0002 was skipped: its weights were not kept." in capsys.readouterr().out


def test_ls_lists_every_member(capsys: Capture) -> None:
    from halfstep.core.prediction import predictions, weightings
    from halfstep.recipes import recipes
    from halfstep.samplers import samplers

    main(["ls"])
    printed = capsys.readouterr().out
    families: list[Registry[object]] = [predictions, weightings, recipes, samplers]  # type: ignore[list-item]
    for registry in families:
        for name in registry:
            assert name in printed


@pytest.mark.parametrize("argv", [["--help"], ["run", "digits", "--help"], ["distill", "--help"], ["sample", "--help"]])
def test_help_names_the_options(argv: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    printed = capsys.readouterr().out
    wanted = {"run": "--start", "distill": "--to", "sample": "--num-steps"}
    assert wanted.get(argv[0], "run RECIPE") in printed


def test_ctrl_c_saves_prints_how_to_resume_and_exits_130(toy_npy: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["run", "arrays", "--data", str(toy_npy), "--out", str(out), *TINY_ARRAYS]
    argv += ["--engine.log-every", "1"]
    argv[argv.index("--teacher.num-updates") + 1] = "100000"
    process = subprocess.Popen(
        [sys.executable, "-m", "halfstep", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = out / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
        time.sleep(0.02)
    process.send_signal(2)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "the state is saved. Run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert list(out.glob("stages/00-denoise/checkpoint-*/manifest.json"))


def test_the_recorded_command_can_be_pasted(toy_npy: Path, tmp_path: Path) -> None:
    argv = ["train", "arrays", "--data", str(toy_npy), "--out", str(tmp_path / "a run; 1"), *TINY_ARRAYS]
    main(argv)
    command = RunFolder(tmp_path / "a run; 1").recipe()["environment"]["command"]
    assert shlex.split(command) == ["halfstep", *argv]


def test_the_home_folder_in_an_option_is_expanded(
    toy_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["run", "arrays", "--data", str(toy_npy), "--out=~/deep/run", "--dry-run", "--json", *TINY_ARRAYS])
    assert json.loads(capsys.readouterr().out)["out"] == str(tmp_path / "deep" / "run")


def test_a_run_that_has_the_name_of_a_recipe_is_finished(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    shutil.copytree(toy_run, tmp_path / "images")
    monkeypatch.chdir(tmp_path)
    main(["finish", "images", "--steps", "1", "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["name"] == "arrays"
    assert facts["conflict"] is None


def test_the_command_line_uses_a_run_of_a_python_call_with_one_of_our_networks(
    toy_run: Path, toy_npy: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, data = tmp_path / "python", torch.from_numpy(np.load(toy_npy))
    training = halfstep.Training(2, 1e-3, batch_size=8)
    halfstep.distill(halfstep.load(toy_run / "stages" / "00-denoise"), data, start=4, to=2, training=training, out=run)
    # The arguments of the program that called halfstep would not reproduce the run.
    assert RunFolder(run).recipe()["environment"]["command"] is None
    measured = ["--data", str(toy_npy), "--num-samples", "20", "--out", str(tmp_path / "evaluation"), "--json"]
    capsys.readouterr()
    main(["evaluate", str(run), *measured])
    assert json.loads(capsys.readouterr().out)
    main(["distill", str(run), "--data", str(toy_npy), "--to", "1", "--dry-run", "--out", str(tmp_path / "next")])
    for argv in (["run", str(run)], ["finish", str(run), "--steps", "2"]):
        assert "belongs to a run of halfstep.distill. Repeat the call in Python" in refused(argv, capsys)
