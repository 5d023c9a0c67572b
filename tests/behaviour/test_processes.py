"""Several processes form one run, with the same weights, images and files, and a common end."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import teams
from halfstep.cli import main
from halfstep.models.folder import load
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.runs import RunFolder, read_log
from halfstep.runtime.processes import make_accelerator
from teams import all_trainings, engine_cases, finishing, halving, run_with, together
from toys import TINY_ARRAYS, toy_plan, toy_spec


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the relative distance of two vectors."""
    return float(torch.linalg.norm(one - other) / torch.linalg.norm(other))


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {
        "trainings": all_trainings([("none", None, halving(), None)]),
        "finishes": all_trainings([("none", None, finishing(), None)]),
        "early": teams.early(),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return together(2, engine_cases, tmp_path_factory.mktemp("engine"))


def test_two_processes_give_the_weights_of_one_ddp_and_sharded_with_micro_batches_and_clipping(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    expected = alone["trainings"][0]
    # The gradient is clipped in every update, so the norm of one process's share would be detected.
    assert expected["norm"] > 0.05
    for held in pair[0]["trainings"]:
        assert held["updates"] == 24
        assert apart(held["student"], expected["student"]) < 1e-5
        assert apart(held["result"], expected["result"]) < 1e-5
        # The files of a checkpoint are the same as with one process.
        assert held["shapes"] == expected["shapes"]
    whole = pair[0]["trainings"][0]
    assert whole["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert whole["norm"] == pytest.approx(expected["norm"], rel=1e-5)


def test_two_processes_give_the_weights_of_one_in_a_finish_whose_turns_are_of_two_players(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    (expected,) = alone["finishes"]
    assert expected["norm"] > 0.05
    for held in pair[0]["finishes"]:
        assert held["updates"] == 24
        assert apart(held["student"], expected["student"]) < 1e-5
        assert apart(held["auxiliary"], expected["auxiliary"]) < 1e-5
        assert apart(held["result"], expected["result"]) < 1e-5
        assert held["shapes"] == expected["shapes"]
        if held is pair[0]["finishes"][0]:
            # AdamW ignores the scale of a gradient, so that of the auxiliary is compared directly.
            assert [held["loss"], held["norm"]] == pytest.approx([expected["loss"], expected["norm"]], rel=1e-5)
            assert held["helpers"] == pytest.approx(expected["helpers"], rel=1e-5)
    for uncut, cut in (pair[0]["finishes"][:2], pair[0]["finishes"][2:]):
        assert all(torch.equal(uncut[name], cut[name]) for name in ("student", "auxiliary", "result"))


def test_both_processes_end_with_the_same_network_and_one_has_the_state(pair: list[dict[str, Any]]) -> None:
    for first, second in zip(pair[0]["trainings"], pair[1]["trainings"], strict=True):
        assert torch.equal(first["result"], second["result"])
        assert not second["shapes"]


def test_gradients_are_sent_once_an_update_not_with_each_micro_batch(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["sends"] == [1, 1, 1, 1]
    # One message per unit: the blocks of the small network, and the rest.
    counts = pair[0]["sends sharded"]
    assert len(set(counts)) == 1
    assert 1 < counts[0] < 10


def test_sharding_splits_everything_including_teacher_and_moments(pair: list[dict[str, Any]]) -> None:
    for held in pair:
        student, teacher, average, moments = held["shares"]
        # Uneven slices, and a counter for each parameter next to the moments.
        assert student == pytest.approx(0.5, abs=0.05)
        assert teacher == pytest.approx(0.5, abs=0.05)
        assert average == pytest.approx(0.5, abs=0.05)
        assert moments == pytest.approx(0.5, abs=0.05)


def test_a_stage_ends_early_at_the_same_update_on_all_processes_and_on_one(
    alone: dict[str, Any], pair: list[dict[str, Any]]
) -> None:
    assert pair[0]["early"] == pair[1]["early"] == pair[0]["early cut"]
    assert pair[0]["early"][0] == alone["early"][0] < 200
    assert pair[0]["early"][1:] == pytest.approx(alone["early"][1:], rel=1e-5)


def test_three_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    # The sum of more than two numbers depends on the order. The pass that settles it must not use up dropout masks.
    stage = halving(12, dropout=0.3)
    cases = [(kind, None, stage, cut) for kind in ("none", "full") for cut in (None, 5)]
    held = together(3, all_trainings, tmp_path, cases)[0]
    for uncut, cut in ((held[0], held[1]), (held[2], held[3])):
        assert torch.equal(uncut["student"], cut["student"])
        assert torch.equal(uncut["result"], cut["result"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """Return the folders of runs with one process and with two: see `teams.run_cases`."""
    path = tmp_path_factory.mktemp("runs")
    torch.set_num_threads(1)
    evaluation = teams.Evaluation(num_samples=50, num_compared=10, num_shown=4, batch_size=8)
    run_with(str(path / "one"), "none", None, {"evaluation": evaluation})
    events = run(toy_spec(plan=toy_plan(dropout=0.0), checkpoint_updates=10), path / "from one")
    for event in events:
        if isinstance(event, Progress) and (event.name, event.window.update) == ("01-halve-0002", 15):
            break
    events.close()  # type: ignore[attr-defined]
    samples = together(2, teams.run_cases, path / "left", str(path), str(path / "one" / "stages" / "01-halve-0002"))[0]
    run_with(str(path / "for one"), "none", None, {})
    return path, samples


def _weights(path: Path) -> dict[str, torch.Tensor]:
    return {
        file.parent.name: torch.cat([value.flatten() for _, value in sorted(load_file(file).items())])
        for file in sorted(path.glob("stages/*/model.safetensors"))
    }


@pytest.mark.parametrize("name", ["plain", "plain cut", "sharded", "sharded cut", "from one", "for one"])
def test_a_run_of_two_ends_with_the_weights_of_a_run_of_one(
    folders: tuple[Path, list[torch.Tensor]], name: str
) -> None:
    path, _ = folders
    expected, held = _weights(path / "one"), _weights(path / name)
    assert list(held) == list(expected) == ["00-denoise", "01-halve-0002", "02-halve-0001"]
    for stage in held:
        # Each stage learns from the rounding of the previous one.
        assert apart(held[stage], expected[stage]) < 1e-5


def test_a_run_interrupted_and_resumed_on_two_processes_is_bit_for_bit_the_uninterrupted_one(
    folders: tuple[Path, list[torch.Tensor]],
) -> None:
    path, _ = folders
    for name in ("plain", "sharded"):
        assert {k: v.numpy().tobytes() for k, v in _weights(path / name).items()} == {
            k: v.numpy().tobytes() for k, v in _weights(path / f"{name} cut").items()
        }


def test_one_process_writes_the_folder(folders: tuple[Path, list[torch.Tensor]]) -> None:
    path, _ = folders
    for name in ("plain", "plain cut", "sharded cut"):
        rows = [(row["stage"], row["update"]) for row in read_log(RunFolder(path / name).log_path)]
        assert rows == sorted(set(rows)), "a row was lost, doubled or out of order"
        assert len(rows) == (40 + 30 + 30) / 5
    assert {file.name for file in (path / "plain").glob("*")} == {file.name for file in (path / "one").glob("*")}
    assert not list(path.glob("*/stages/*/*checkpoint-*"))


def test_images_are_the_same_on_any_number_of_processes(folders: tuple[Path, list[torch.Tensor]]) -> None:
    path, samples = folders
    model = load(path / "one" / "stages" / "01-halve-0002")
    for drawn, seeds in zip(samples, [[3, 1], [7], [8, 2], [4, 5], [6]], strict=True):
        assert torch.equal(drawn, model.sample(seeds, 2))
    # Its measurements agree too: 7 batches over 2 processes.
    for stage in RunFolder(path / "one").stages():
        one, two = stage.metrics(), RunFolder(path / "plain").stage(stage.name).metrics()
        assert one is not None
        assert two is not None
        for a, b in zip(one.results, two.results, strict=True):
            assert (a.num_steps, a.samples) == (b.num_steps, b.samples)
            assert b.frechet == pytest.approx(a.frechet, rel=1e-3)
            file = np.load(path / "one" / "stages" / stage.name / str(a.samples))["arr_0"]
            other = np.load(path / "plain" / "stages" / stage.name / str(a.samples))["arr_0"]
            assert np.allclose(file, other, atol=1e-4)


def test_one_process_draws_the_samples_of_the_teacher(tmp_path: Path) -> None:
    (one, a), (two, b) = together(2, teams.without_data, tmp_path / "left", str(tmp_path / "run"))
    assert (one, two) == (1, 0)
    assert torch.equal(a, b)
    assert teams.load(tmp_path / "run").num_steps == 1


def test_an_error_of_one_process_ends_all_with_its_code(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letter.txt").write_text("dear")
    first, second = together(2, teams.refusals, tmp_path / "left", str(tmp_path / "folder"))
    assert first[0].startswith("ValueError 2:")
    assert "is not empty, but it is not a run folder" in first[0]
    assert second[0] == first[0].replace("ValueError", "FailedElsewhere")
    assert first[1] == "FailedElsewhere 2: no such item (in process 1 of the run)"
    assert second[1] == "ValueError 2: no such item"
    assert first[2] == second[2]
    assert first[2].startswith("ValueError 2: a batch of 25 cannot be split evenly across 2 processes. Choose")
    assert "the optimizer adamw8bit cannot be sharded" in first[3]
    assert first[4] == second[4]
    assert "processes 0 and 1 of the run read different data from toy" in first[4]
    # The broken samples were in the second process's share. Both report it, and the first records it.
    assert first[5].partition("; the last good")[0] == second[5].partition("; the last good")[0]
    assert "at update 7 (1 of 8 losses were not finite" in first[5]
    held = json.loads((tmp_path / "folder-nan" / "stages" / "00-poisoned" / "non-finite.json").read_text())
    assert [entry["place"] for entry in held["not_finite"]] == [12]
    # One item may take longer than training's time limit.
    assert first[6] == second[6] == "nothing"
    # Both reject settings that would mix two kinds of figures, by name.
    assert first[7] == second[7] == "nothing"
    for index, said in enumerate((first[8], second[8])):
        assert said == (
            "ValueError 2: the processes of the run differ in their classifier "
            f"(this process: classifier-{index}): share the cache"
        )


def test_a_signal_to_one_process_stops_all_at_the_same_update_with_the_state_saved(tmp_path: Path) -> None:
    first, second = together(2, teams.terminated, tmp_path / "left", str(tmp_path / "run"))
    assert first == second
    assert first[0] == signal.SIGTERM
    assert first[1].startswith("checkpoint-")


@pytest.mark.parametrize(("sharding", "victim"), [("none", 1), ("full", 0)])
def test_the_others_stop_with_a_message_when_a_process_is_killed(tmp_path: Path, sharding: str, victim: int) -> None:
    team = teams.start(2, teams.endless, tmp_path / "left", str(tmp_path / "run"), sharding)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("run/stages/*/checkpoint-*")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.05)
    team[victim].kill()
    killed = time.monotonic()
    left = teams.ended(team, tmp_path / "left", 60)
    assert time.monotonic() - killed < 30
    message = left[1 - victim]["error"]
    assert message.startswith("LostProcess: another process of this run has ended or does not respond")
    assert "the last good checkpoint is" in message
    assert left[victim] == {}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ACCELERATE_USE_FSDP", "true", "use --engine.sharding full"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "use --engine.precision bf16"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "use --engine.micro-batch"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "compile with inductor"),
    ],
)
def test_settings_of_a_launcher_that_would_be_ignored_are_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        make_accelerator(cpu=True)


def test_sharding_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"this is the only process\. Start several processes with torchrun"):
        teams.trainer(halving(), "full")


@pytest.mark.slow
def test_networks_of_diffusers_are_sharded_together_with_other_settings(tmp_path: Path) -> None:
    teams.unet_runs(str(tmp_path / "one"), "none")
    together(2, teams.unet_runs, tmp_path / "left", str(tmp_path / "two"), "full")
    for name in teams.UNETS:
        for stage in ("00-denoise", "02-halve-0001"):
            # Outputs are compared, because AdamW turns rounding into full steps where a gradient should be zero.
            one, two = (load(tmp_path / who / name / "stages" / stage).denoiser for who in ("one", "two"))
            x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
            found, expected = (denoiser(x_t, 0.6).x0.detach() for denoiser in (two, one))
            assert apart(found, expected) < (1e-4 if name == "plain" else 1e-2), (name, stage)


def test_one_process_writes_an_evaluation(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", teams.points().numpy())
    main(["run", "arrays", "--data", str(tmp_path / "points.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS])
    out = tmp_path / "evaluation"
    first, second = together(2, teams.evaluated, tmp_path / "left", str(tmp_path / "run"), str(out))
    assert second == []
    # The existing files are those that it wrote, each exactly once except the table.
    figures, cells = ({path.name for path in out.glob(f"{kind}/*")} for kind in ("figures", "cells"))
    assert len(figures) > 4
    assert figures | cells <= set(first)
    assert all(first.count(name) == 1 for name in figures | cells)


def test_an_interrupted_evaluation_on_two_processes_keeps_its_measurements(tmp_path: Path) -> None:
    np.save(tmp_path / "points.npy", teams.points().numpy())
    main(["run", "arrays", "--data", str(tmp_path / "points.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS])
    out = tmp_path / "evaluation"
    words = (str(tmp_path / "run"), str(out), 1)
    team = teams.start(2, teams.evaluated_till, tmp_path / "left", *words)
    teams.ended(team, tmp_path / "left")
    assert [process.exitcode for process in team] == [2, 2]
    assert len(list(out.glob("cells/*"))) == 2
    # One figure of each of the two, from the first round.
    assert len(list(out.glob("figures/*"))) == 2
    # Both ignore a folder that another process is writing.
    with FileLock(out / ".lock"):
        team = teams.start(2, teams.evaluated_till, tmp_path / "left", *words)
        teams.ended(team, tmp_path / "left")
    assert [process.exitcode for process in team] == [75, 75]
    assert len(list(out.glob("figures/*"))) == 2


def test_two_processes_sample_prompts_as_one_does_and_resume(tmp_path: Path) -> None:
    def contents(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.*") if path.name != ".lock"}

    teams.prompted(str(tmp_path / "one"), 2)
    shared = together(2, teams.prompted, tmp_path / "team", str(tmp_path / "two"), 2)
    assert contents("one") == contents("two")
    assert [sorted(itertools.chain(*places)) for places in shared] == [[0, 1, 4, 5, 6, 7, 10], [2, 3, 8, 9]]
    # A failure on the second process ends both. Complete files remain, and the same command resumes.
    team = teams.start(2, teams.prompted, tmp_path / "left", str(tmp_path / "cut"), 2, 9)
    teams.ended(team, tmp_path / "left")
    assert all(process.exitcode for process in team)
    assert len(list((tmp_path / "cut").glob("shard-*"))) == 1
    again = together(2, teams.prompted, tmp_path / "again", str(tmp_path / "cut"), 2)
    assert contents("cut") == contents("one")
    assert [sorted(itertools.chain(*places)) for places in again] == [[6, 7, 10], [8, 9]]


def _launch(launcher: list[str], argv: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HALFSTEP_CACHE": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "halfstep", *argv],
        capture_output=True, text=True, timeout=240, env=environment, check=False,
    )  # fmt: skip


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu it starts one process, whatever number is given.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]


def test_one_of_two_processes_prints_what_their_run_does(tmp_path: Path) -> None:
    """Start processes as a launcher does, but without the launcher, which needs many seconds."""
    points = tmp_path / "points.npy"
    np.save(points, teams.points().numpy())
    argv = ["run", "arrays", "--data", str(points), "--out", str(tmp_path / "run"), *TINY_ARRAYS]
    argv += ["--evaluation.batch-size", "10", "--engine.sharding", "full"]
    first, second = together(2, teams.printed, tmp_path / "left", *argv)
    assert first.count("finished in") == 1
    assert second == ""
    assert (tmp_path / "run" / "report" / "index.html").is_file()


@pytest.mark.slow
def test_torchrun_and_accelerate_launch_run_halfstep(tmp_path: Path) -> None:
    """Both launchers train. A launcher takes many seconds to start, so sampling and evaluating run without one."""
    points = tmp_path / "points.npy"
    np.save(points, teams.points().numpy())
    run_argv = ["run", "arrays", "--data", str(points), "--out", str(tmp_path / "run"), *TINY_ARRAYS]
    run_argv += ["--evaluation.batch-size", "10"]
    done = _launch(TORCHRUN, [*run_argv, "--engine.sharding", "full"], tmp_path)
    assert done.returncode == 0, done.stderr
    # Only one of them prints.
    assert done.stdout.count("finished in") == 1
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    # The other launcher and bad input give one line, and no process hangs.
    refused = _launch(ACCELERATE, [*run_argv, "--seed", "1"], tmp_path)
    assert refused.returncode != 0
    lines = [line for line in refused.stderr.splitlines() if line.startswith("halfstep: error:")]
    assert len(lines) == 1, refused.stderr
    assert "contains a run of a different recipe" in lines[0]
    words = ["sample", str(tmp_path / "run"), "--num-samples", "5", "--batch-size", "2"]
    together(2, teams.printed, tmp_path / "left", *words, "--out", str(tmp_path / "two.npz"))
    asked = ["evaluate", str(tmp_path / "run"), "--num-steps", "4", "2", "1", "--num-samples", "24"]
    together(2, teams.printed, tmp_path / "left", *asked)
    two = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())
    main([*asked, "--out", str(tmp_path / "one")])
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert [[row["figures"] for row in table["rows"]] for table in two["tables"]] == [
        [row["figures"] for row in table["rows"]] for table in one["tables"]
    ]
    # Students of that teacher with the other launcher and without one: the same batches, except for rounding.
    teacher = ["distill", str(tmp_path / "run" / "stages" / "00-denoise"), "--chain.students", "1"]
    teacher += ["--chain.num-updates", "4", "--evaluation.no-enabled", "--engine.sharding", "none"]
    trained = _launch(ACCELERATE, [*teacher, "--out", str(tmp_path / "by two")], tmp_path)
    assert trained.returncode == 0, trained.stderr
    main([*teacher, "--out", str(tmp_path / "by one")])
    ours, theirs = (
        torch.cat([p.detach().flatten() for p in load(tmp_path / name).denoiser.parameters()])
        for name in ("by one", "by two")
    )
    assert apart(theirs, ours) < 1e-5
    expected = load(tmp_path / "run").sample(range(5), batch_size=2).numpy()
    assert np.array_equal(np.load(tmp_path / "two.npz")["arr_0"], expected)
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["recipe"]["engine"]["sharding"] == "full"
