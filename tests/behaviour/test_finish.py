"""The finish repairs a distribution, survives interruptions, and can be added to an existing run."""

import dataclasses
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import teams
from halfstep import GaussianDenoiser, NetworkDenoiser, Training, V, VPCosine, distill, sample
from halfstep.cli import main
from halfstep.cli.display import RunDisplay
from halfstep.cli.words import Screen
from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import per_sample
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.data import MemoryData, training_batch
from halfstep.models.folder import load
from halfstep.nets import MLP
from halfstep.objectives import FINISHING, Batch, Finishing, Losses, Models, Plan, Stage
from halfstep.recipes import recipes
from halfstep.run.events import Progress
from halfstep.run.folder import DifferentRecipe
from halfstep.run.runner import run
from halfstep.runs import RunFolder, read_log, read_status
from halfstep.runtime.files import write_sealed
from halfstep.runtime.processes import make_accelerator
from halfstep.runtime.stop import StopSignal
from halfstep.train.engine import StageTrainer
from support_cli import Capture, refused
from support_pipelines import assert_same, quietly
from toys import TINY_ARRAYS, TINY_DIGITS, finish, points, toy_plan, toy_spec, weights

MEAN, STD = 0.3, 0.5


class LearnedGaussian(Denoiser):
    """The exact denoiser of a Gaussian with learned mean and width, and another linear map of x_t.

    It can be exact as a teacher or an auxiliary denoiser. As a one-step student, it can be any linear map of noise.
    """

    def __init__(self, gain: float = 0.0, shift: float = 0.0) -> None:
        super().__init__()
        self.process = VPCosine()
        self.mean, self.log_std = nn.Parameter(torch.tensor(MEAN)), nn.Parameter(torch.tensor(STD).log())
        self.gain, self.shift = nn.Parameter(torch.tensor(gain)), nn.Parameter(torch.tensor(shift))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        amplitudes = self.process.alpha_sigma(t)
        alpha, sigma = (per_sample(value, x_t) for value in amplitudes)
        variance = self.log_std.exp() ** 2
        share = alpha * variance / (alpha**2 * variance + sigma**2)
        x0 = self.mean + share * (x_t - alpha * self.mean) + self.gain * x_t + self.shift
        return Denoised(x0, eps_from_x0(x_t, x0, *amplitudes))


@pytest.mark.parametrize(("gain", "shift"), [(0.3, 0.4), (0.8, -0.2)])
def test_a_finish_brings_mean_and_width_of_a_wrong_student_to_the_teachers(gain: float, shift: float) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = MemoryData("gaussian", MEAN + STD * torch.randn(4096, 1, generator=generator))
    training = dataclasses.replace(FINISHING, num_updates=400, batch_size=128, learning_rate=5e-3)
    student, teacher = LearnedGaussian(gain, shift), LearnedGaussian()

    def moments(model: Denoiser) -> tuple[float, float]:
        """Return mean and width of its samples: one step is an affine map of unit noise."""
        with torch.no_grad():
            at_zero, at_one = sample(model, torch.tensor([[0.0], [1.0]]), 1)
        return float(at_zero), float((at_one - at_zero).abs())

    before = moments(student)
    stage = Stage(Finishing(1, map_weight=0.0, auxiliary_rate=6.0), training)
    trainer = StageTrainer(
        student,
        teacher,
        stage,
        lambda draw: training_batch(data, draw, False),
        data.shape,
        seed=0,
        stream="finish",
        accelerator=make_accelerator(cpu=True),
    )
    for _ in trainer.run():
        pass
    after = moments(trainer.finish())
    assert max(abs(before[0] - MEAN), abs(before[1] - STD)) > 0.15, "the student must start with a wrong distribution"
    # Over eight further seeds the largest error was 0.018.
    assert abs(after[0] - MEAN) < 0.03
    assert abs(after[1] - STD) < 0.03


def _plan() -> Plan:
    students = toy_plan(20, 12)
    return students + Plan.finishes(
        [2, 1], Training(9, 1e-3, 16, ema_decay=0.9), lambda n: Finishing(n, lead_updates=4)
    )


def _spec(**changes: Any) -> Any:
    return toy_spec(plan=_plan(), **changes)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uncut") / "run"
    finish(_spec(), path)
    return path


@pytest.mark.parametrize(("stage", "update"), [("03-finish-0002", 2), ("03-finish-0002", 7), ("04-finish-0001", 2)])
def test_an_interrupted_finish_ends_like_an_uninterrupted_one(
    tmp_path: Path, uncut: Path, stage: str, update: int
) -> None:
    """Interrupt in the lead of the auxiliary denoiser, after it, and between two finishes."""
    events: Iterator[Any] = run(_spec(log_every=1, checkpoint_updates=1), tmp_path / "run")
    for event in events:
        if isinstance(event, Progress) and (event.name, event.window.update) == (stage, update):
            break
    events.close()  # type: ignore[attr-defined]
    assert RunFolder(tmp_path / "run").stage(stage).checkpoints()
    finish(_spec(), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uncut)


@pytest.mark.parametrize("by", ["SIGKILL", "SIGTERM"])
def test_a_finish_killed_between_two_turns_of_an_update_ends_like_an_uninterrupted_one(
    tmp_path: Path, uncut: Path, by: str
) -> None:
    team = teams.start(1, run_cut, tmp_path / "team", str(tmp_path / "run"), by)
    (left,) = teams.ended(team, tmp_path / "team")
    assert left.get("error", "killed").startswith({"SIGKILL": "killed", "SIGTERM": "Interrupted"}[by])
    saved = RunFolder(tmp_path / "run").stage("03-finish-0002").checkpoints()[0]
    update = int(saved.name.removeprefix("checkpoint-"))
    # Checkpoints are written in the background of later updates, so a kill can come before the checkpoint is complete.
    assert update == 7 if by == "SIGTERM" else update in (2, 4, 6)
    assert (saved / "helper-auxiliary.safetensors").exists()
    finish(_spec(), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uncut)


def run_cut(path: str, by: str) -> None:
    """Return a run that receives a signal in the student's turn of update 6, after the auxiliary's two turns."""
    loss = Finishing.loss

    def signalled(self: Finishing, models: Models, batch: Batch, draw: Draw) -> Losses:
        if draw.update == 6:
            os.kill(os.getpid(), signal.Signals[by])
        return loss(self, models, batch, draw)

    Finishing.loss = signalled  # type: ignore[method-assign]
    with StopSignal() as stop:
        finish(_spec(checkpoint_updates=2), Path(path), stop)


def test_the_finished_student_is_another_than_the_one_it_started_from_and_names_both_parents(uncut: Path) -> None:
    halved, finished = (load(uncut / "stages" / name) for name in ("01-halve-0002", "03-finish-0002"))
    assert (finished.manifest.parent, finished.manifest.teacher) == ("01-halve-0002", "00-denoise")
    assert (finished.role, finished.num_steps) == ("student", 2)
    apart = (finished.sample(range(8)) - halved.sample(range(8))).abs().max()
    assert 0 < float(apart) < 1


def test_micro_batches_give_the_same_finish_to_rounding(tmp_path: Path) -> None:
    plan = Plan((*toy_plan(5, 5, dropout=0.0).stages, *_plan().stages[-1:]))
    results = []
    for micro in (16, 5):
        finish(toy_spec(plan=plan, micro_batch=micro), tmp_path / str(micro))
        results.append(load(tmp_path / str(micro)).sample(range(32)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


def test_weights_that_a_later_finish_needs_are_kept_until_then(tmp_path: Path) -> None:
    finish(_spec(keep=(1,)), tmp_path / "run")
    kept = {stage.name: stage.manifest().weights_kept for stage in RunFolder(tmp_path / "run").stages()}
    assert kept == {
        "00-denoise": True,
        "01-halve-0002": False,
        "02-halve-0001": True,
        "03-finish-0002": False,
        "04-finish-0001": True,
    }


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose students have no finish. No test may change it."""
    folder = tmp_path_factory.mktemp("verb")
    np.save(folder / "points.npy", points(64).numpy())
    data = str(folder / "points.npy")
    main(["run", "arrays", "--data", data, "--out", str(folder / "run"), *TINY_ARRAYS])
    return folder / "run"


@pytest.fixture
def trained(halved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run for one test."""
    return Path(shutil.copytree(halved, tmp_path_factory.mktemp("copy") / "run"))


BRIEF = ["--finish.num-updates", "4", "--finish.batch-size", "8", "--finish.lead-updates", "2"]


def test_a_finish_is_added_to_a_run_and_further_ones_after_it(trained: Path, capsys: Capture) -> None:
    before = weights(trained)
    main(["finish", str(trained), "--steps", "2", *BRIEF])
    assert weights(trained).items() > before.items()
    assert "other settings" not in capsys.readouterr().err
    asked = refused(["finish", str(trained), "--steps", "2", *BRIEF, "--finish.map-weight", "3"], capsys)
    assert "Differences: finish.map_weight: 3.0 (the folder has None)" in asked
    # Only new options need to be passed.
    main(["finish", str(trained), "--steps", "1", *BRIEF])
    stages = [stage.name for stage in RunFolder(trained).stages()]
    assert stages == ["00-denoise", "01-halve-0002", "02-halve-0001", "03-finish-0002", "04-finish-0001"]
    assert weights(trained).items() > before.items(), "no earlier stage may change"
    held = json.loads((trained / "recipe.json").read_text())
    assert held["recipe"]["finish"]["steps"] == [2, 1]
    assert [row["stage"] for row in held["plan"]] == stages
    capsys.readouterr()
    main(["finish", str(trained), *BRIEF])
    assert "04-finish-0001: complete" in capsys.readouterr().out


def test_the_command_of_a_run_accepts_the_folder_that_has_grown(trained: Path, capsys: Capture) -> None:
    main(["finish", str(trained), "--steps", "2", *BRIEF])
    main(["finish", str(trained), "--steps", "1", *BRIEF])
    before, held = weights(trained), json.loads((trained / "recipe.json").read_text())
    again = ["run", "arrays", "--data", held["recipe"]["data"]["source"], "--out", str(trained), *TINY_ARRAYS]
    capsys.readouterr()
    # A run without finishes, with the first of them, and with another evaluation.
    for more in ([], ["--finish.steps", "2", *BRIEF], ["--evaluation.num-samples", "25"]):
        main([*again, *more])
        said = capsys.readouterr()
        further = "04-finish-0001" if "2" in more else "03-finish-0002, 04-finish-0001"
        assert f"{trained} contains further stages ({further}), which this run does not change" in said.err
        assert "02-halve-0001: complete" in said.out
        now = json.loads((trained / "recipe.json").read_text())
        assert (now["plan"], now["recipe"]["finish"]) == (held["plan"], held["recipe"]["finish"])
        assert weights(trained) == before
    assert now["recipe"]["evaluation"]["num_samples"] == 25
    assert read_status(trained).state == "finished"
    # Another order is another plan. A command trains missing stages of its own plan again, but no others.
    assert "Differences: finish.steps" in refused([*again, "--finish.steps", "1", *BRIEF], capsys)
    for stage in ("02-halve-0001", "04-finish-0001"):
        shutil.rmtree(trained / "stages" / stage)
    main(again)
    assert weights(trained).items() < before.items()
    assert before.keys() - weights(trained).keys() == {"04-finish-0001"}
    assert "stage 04-finish-0001 is missing" in str(read_status(trained).message)
    main(["finish", str(trained), *BRIEF])
    assert weights(trained) == before


def test_a_finish_keeps_the_students_that_the_resumed_run_keeps(trained: Path) -> None:
    folder = RunFolder(trained)
    held = folder.recipe()
    # As if the run had been started with other settings, and then interrupted.
    held["recipe"]["chain"]["keep"] = [1]
    write_sealed(folder.recipe_path, held)
    before = weights(trained)
    changed = ["--chain.keep", "2", "1", "--engine.checkpoint-minutes", "7"]
    main(["run", "arrays", "--data", held["recipe"]["data"]["source"], "--out", str(trained), *TINY_ARRAYS, *changed])
    now = folder.recipe()["recipe"]
    assert now["chain"]["keep"] == [2, 1]
    assert now["engine"]["checkpoint_minutes"] == 7
    main(["finish", str(trained), "--steps", "1", *BRIEF])
    assert weights(trained).items() > before.items()


def test_a_further_finish_has_settings_of_its_own(trained: Path, capsys: Capture) -> None:
    main(["finish", str(trained), "--steps", "2", *BRIEF, "--finish.updates-at", "2", "3"])
    before = weights(trained)
    own = ["--finish.updates-at", "1", "5", "--finish.learning-rate-at", "1", "1e-5"]
    main(["finish", str(trained), "--steps", "1", *BRIEF, *own])
    assert weights(trained).items() > before.items()
    held = RunFolder(trained).recipe()["recipe"]["finish"]
    assert (held["updates_at"], held["learning_rate_at"]) == ({"1": 5, "2": 3}, {"1": 1e-5})
    assert [row.num_updates for row in RunFolder(trained).plan[-2:]] == [3, 5]
    # The settings of a stage that is there cannot change.
    both = ["finish", str(trained), "--steps", "2", "1", *BRIEF]
    other = "finish.learning_rate_at.2: 0.001 (the folder has nothing)"
    assert other in refused([*both, "--finish.learning-rate-at", "2", "1e-3"], capsys)
    other = "finish.learning_rate_at.1: 0.001 (the folder has 1e-05)"
    assert other in refused([*both, "--finish.learning-rate-at", "1", "1e-3"], capsys)
    assert "finish.updates_at.2: 9 (the folder has 3)" in refused([*both, "--finish.updates-at", "2", "9"], capsys)


def test_unsupported_finishes_are_rejected_in_one_line(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "refines a 3-step student" in refused(["finish", str(trained), "--steps", "3"], capsys)
    assert "finished only once, got 1, 1" in refused(["finish", str(trained), "--steps", "1", "1"], capsys)
    assert "is not a run (it has no recipe.json)" in refused(["finish", str(tmp_path), "--steps", "1"], capsys)
    assert "the run is missing" in refused(["finish", "--steps", "1"], capsys)
    other = ["finish", str(trained), "--steps", "1", *BRIEF, "--chain.learning-rate", "0.5"]
    assert "Differences: chain.training.learning_rate" in refused(other, capsys)
    ahead = ["finish", str(trained), "--steps", "1", "--finish.updates-at", "2", "5"]
    assert "finish.updates_at contains a 2-step student, which is not finished" in refused(ahead, capsys)


def test_a_run_without_students_cannot_be_finished(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    data = json.loads((trained / "recipe.json").read_text())["recipe"]["data"]["source"]
    main(["train", "arrays", "--data", data, "--out", str(tmp_path / "teacher"), *TINY_ARRAYS])
    assert "Add --steps" in refused(["finish", str(tmp_path / "teacher")], capsys)
    assert "contains only a teacher" in refused(["finish", str(tmp_path / "teacher"), "--steps", "1"], capsys)


def test_a_chain_from_a_given_teacher_is_finished_in_its_own_folder(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "chain"
    teacher = str(trained / "stages" / "00-denoise")
    main(["distill", teacher, "--to", "2", "--out", str(out), "--chain.num-updates", "2"])
    main(["finish", str(out), "--steps", "2", *BRIEF])
    assert [stage.name for stage in RunFolder(out).stages()][-1] == "02-finish-0002"
    assert load(out).manifest.teacher == "00-teacher"


def test_a_finish_cannot_change_existing_stages(tmp_path: Path) -> None:
    recipe = {"name": "toy", "seed": 0, "finish": {"steps": []}}
    finish(toy_spec(recipe=recipe), tmp_path / "run")
    other = dataclasses.replace(_spec(), recipe={**recipe, "finish": {"steps": [2, 1]}})
    with pytest.raises(DifferentRecipe, match=r"finish\.steps"):
        finish(other, tmp_path / "run")


def test_a_recipe_finishes_the_students_that_its_chain_has(tmp_path: Path, capsys: Capture) -> None:
    """The demo finishes all its students. A chain that ends earlier skips the students that it lacks, unless they are
    requested."""

    def planned(*words: str) -> list[str]:
        capsys.readouterr()
        main(["run", "digits", "--dry-run", "--json", "--out", str(tmp_path / "x"), "--engine.threads", "1", *words])
        return [row["stage"] for row in json.loads(capsys.readouterr().out)["stages"]]

    assert planned()[-4:] == ["05-finish-0008", "06-finish-0004", "07-finish-0002", "08-finish-0001"]
    assert planned("--to", "4")[-3:] == ["02-halve-0004", "03-finish-0008", "04-finish-0004"]
    assert planned("--to", "2", "--finish.steps", "4", "2")[-2:] == ["04-finish-0004", "05-finish-0002"]
    asked = ["run", "digits", "--dry-run", "--to", "2", "--finish.steps", "1", "--out", str(tmp_path / "x")]
    assert "refines a 1-step student, but the students before it take 8, 4, 2" in refused(asked, capsys)
    # The recipe's number of updates for the student with 2 steps does not prevent finishing only the one with 1 step.
    assert planned("--finish.steps", "1")[-2:] == ["04-halve-0001", "05-finish-0001"]
    # In a recipe file, the same setting is a mistake.
    mistaken = tmp_path / "mistaken.json"
    recipe = recipes["digits"]().model_dump(mode="json")
    recipe["finish"]["updates_at"] = {"3": 100}
    mistaken.write_text(json.dumps(recipe))
    assert "finish.updates_at contains a 3-step student" in refused(["run", str(mistaken), "--dry-run"], capsys)


@pytest.mark.parametrize("setting", [("data-weight", "0.5"), ("map-weight", "2.0"), ("auxiliary-turns", "3")])
def test_a_setting_of_the_finish_without_students_to_finish_is_refused(
    setting: tuple[str, str], tmp_path: Path, capsys: Capture
) -> None:
    name, value = setting
    asked = ["run", "images", "--data", str(tmp_path), "--out", str(tmp_path / "x"), f"--finish.{name}", value]
    assert f"{value} has no effect without finish.steps. Add finish.steps" in refused(asked, capsys)


def test_distill_finishes_in_memory_and_runs_its_teacher_with_another_sampler() -> None:
    from halfstep.samplers import Heun

    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1), VPCosine(), V())
    training = Training(3, 1e-3, batch_size=16)
    names: list[str] = []
    finished = distill(
        teacher,
        points(),
        start=8,
        to=2,
        training=training,
        teacher_sampler=Heun(),
        finish=Plan.finishes([4, 2], training, lambda n: Finishing(n, lead_updates=1)),
        on_window=lambda name, _: names.append(name),
    )
    assert list(dict.fromkeys(names)) == ["01-halve-0004", "02-halve-0002", "03-finish-0004", "04-finish-0002"]
    assert sample(finished, torch.randn(4, 2), 2).isfinite().all()
    with pytest.raises(ValueError, match="refines a 1-step student, but the students before it take 4, 2"):
        distill(teacher, points(), start=8, to=2, training=training, finish=[1])
    with pytest.raises(ValueError, match="teacher_sampler and teacher_steps have no effect"):
        distill(teacher, points(), plan=Plan.halvings(4, 2, training, updates_at={}), teacher_steps=3)


def test_the_exact_gaussian_teacher_is_what_the_learned_one_starts_as() -> None:
    x_t, t = torch.linspace(-2, 2, 9)[:, None], torch.linspace(0.1, 1, 9, dtype=torch.float64)
    exact = GaussianDenoiser(VPCosine(), MEAN, STD)
    torch.testing.assert_close(LearnedGaussian()(x_t, t).x0, exact(x_t, t).x0)


def test_a_dry_run_counts_every_call_and_copy_of_a_finish(trained: Path, capsys: Capture) -> None:
    capsys.readouterr()
    settings = ["--finish.auxiliary-turns", "3", "--finish.updates-at", "1", "7"]
    main(["finish", str(trained), "--steps", "2", "1", *BRIEF, *settings, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    rows, weights_ = facts["stages"][-2:], 4 * facts["parameters"]
    assert [(row["stage"], row["num_steps"], row["num_updates"]) for row in rows] == [
        ("03-finish-0002", 2, 4),
        ("04-finish-0001", 1, 7),
    ]
    for row in rows:
        # The student and the teacher are called four times each, the auxiliary seven times (three of them on data) and
        # the start once. A backward pass costs two.
        assert row["update_flops"] == (4 + 2 * 1 + 4 + 7 + 2 * 6 + 1) * 8 * facts["forward_flops"]
        assert row["samples_seen"] == row["num_updates"] * 8
    # The stages of the run are complete and take no more time.
    assert [(row["complete"], row["estimated_seconds"] == 0) for row in facts["stages"]] == [
        *[(True, True)] * 3,
        *[(False, False)] * 2,
    ]
    memory = facts["memory_bytes"]
    assert (memory["weights"], memory["teacher"], memory["helpers"]) == (weights_, weights_, 2 * weights_)
    assert (memory["gradients"], memory["moments"], memory["average"]) == (2 * weights_, 4 * weights_, weights_)


def test_a_dry_run_says_that_the_folder_contains_a_run_with_other_settings(trained: Path, capsys: Capture) -> None:
    main(["finish", str(trained), "--steps", "1", *BRIEF])
    other = ["finish", str(trained), "--steps", "1", *BRIEF, "--finish.map-weight", "3"]
    message = refused(other, capsys)
    assert "Differences: finish.map_weight" in message
    main([*other, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["conflict"] in message
    assert not any(row["complete"] for row in facts["stages"])
    main([*other, "--dry-run"])
    assert f"warning: without --dry-run, this command is refused: {facts['conflict']}" in capsys.readouterr().out
    main(["finish", str(trained), "--steps", "1", *BRIEF, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["conflict"] is None
    assert all(row["complete"] for row in facts["stages"])


def test_a_finish_whose_student_has_had_no_turn_yet_is_shown_without_a_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("halfstep.run.progress.time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__))
    events: Iterator[Any] = run(_spec(log_every=1, checkpoint_updates=1), tmp_path / "run")

    def until_the_lead() -> Iterator[Any]:
        for event in events:
            yield event
            if isinstance(event, Progress) and (event.name, event.window.update) == ("03-finish-0002", 3):
                return

    RunDisplay(_spec().stages, Screen()).show(until_the_lead())
    events.close()  # type: ignore[attr-defined]
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("03-finish-0002: update")]
    assert len(said) == 3
    assert not any("loss" in line for line in said)
    main(["status", str(tmp_path / "run")])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "03-finish-0002" in line and "3/9" in line]
    assert "loss" not in line
    main(["status", str(tmp_path / "run"), "--json"])
    stage = json.loads(capsys.readouterr().out)["stages"][3]
    assert (stage["update"], stage["loss"], stage["state"]) == (3, None, "training")
    assert stage["learning_rate"] > 0
    last = read_log(RunFolder(tmp_path / "run").log_path)[-1]
    assert "loss" not in last
    assert math.isfinite(last["auxiliary_loss"])
    # The report contains no placeholder for the unknown loss.
    main(["report", str(tmp_path / "run")])
    page = (tmp_path / "run" / "report" / "index.html").read_text()
    assert not re.search(r">\s*(None|nan)\s*<", page)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with students of 8, 4, 2 and 1 steps on images, all finished."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("digits") / "run"
    chain = ["--chain.start-steps", "16", "--finish.steps", "8", "4", "2", "1", "--finish.learning-rate", "1e-3"]
    tiny = [word for word in TINY_DIGITS if word != "--model.conditional"]
    # A graph contains the network once a step, so a network of one level makes graphs that are fast to export.
    small = ["--network.block-out-channels", "8", "--network.attention", "False", "--network.no-mid-attention"]
    main(["run", "digits", "--out", str(path), *tiny, *chain, *small, "--evaluation.no-enabled", *BRIEF])
    return path


@pytest.mark.parametrize("num_steps", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_finished_students_sample_in_stock_diffusers_and_in_onnx_as_here(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """A graph contains the network once a step, so those of many steps are slow to export: one and two steps do."""
    import diffusers
    import onnxruntime
    from diffusers.pipelines.ddim import pipeline_ddim

    (stage,) = digits.glob(f"stages/*-finish-{num_steps:04d}")
    model = load(stage)
    x_1 = model.noise(range(3))
    expected = sample(model, x_1, num_steps)
    started = load(digits / "stages" / str(model.manifest.parent))
    assert float((sample(started, x_1, num_steps) - expected).abs().max()) > 1e-3, "nothing was finished"
    main(["export", str(stage), "--out", str(tmp_path / "stock")])
    pipe = quietly(diffusers.DDIMPipeline.from_pretrained(tmp_path / "stock"))
    monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *args, **kwargs: x_1.clone())
    images = pipe(3, num_inference_steps=num_steps, use_clipped_model_output=True, output_type="np").images
    assert_same(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1, expected)
    if num_steps <= 2:
        main(["export", str(stage), "--format", "onnx", "--out", str(tmp_path / "finished.onnx")])
        graph = onnxruntime.InferenceSession(str(tmp_path / "finished.onnx"))
        (found,) = graph.run(None, {graph.get_inputs()[0].name: x_1.numpy()})
        assert_same(torch.from_numpy(found), expected)
    card = (tmp_path / "stock" / "README.md").read_text()
    assert f"started from `{model.manifest.parent}`" in card
    assert "learned from `00-denoise`" in card
