"""The progress of a run, as another process reads it from the folder."""

import contextlib
import io
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

from halfstep.cli import main
from halfstep.cli.status import view
from halfstep.cli.words import Screen
from halfstep.runs import Heartbeat, RunStatus, read_status
from halfstep.runs.heartbeat import SILENT_SECONDS, this_machine
from halfstep.runtime.files import write_sealed
from support_cli import Capture, refused
from teams import context
from toys import TINY_ARRAYS, finish, points, toy_spec

PLAN = [
    {"stage": "00-denoise", "num_steps": None, "num_updates": 100, "update_cost": 30.0},
    {"stage": "01-halve-0002", "num_steps": 2, "num_updates": 50, "update_cost": 50.0},
    {"stage": "02-halve-0001", "num_steps": 1, "num_updates": 20, "update_cost": 100.0},
]


def folder_of(path: Path, rows: list[dict[str, Any]], **beat: Any) -> Path:
    """Write the parts of a run folder that a status reads."""
    path.mkdir(parents=True, exist_ok=True)
    write_sealed(path / "recipe.json", {"recipe": {"name": "toy"}, "plan": PLAN})
    (path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if beat:
        now = time.time()
        held = {"message": None, "pid": os.getpid(), "machine": this_machine(), "started": now - 9, "updated": now}
        (path / "heartbeat.json").write_text(json.dumps(held | beat))
    return path


def row(stage: str, update: int, seconds: float) -> dict[str, Any]:
    return {"stage": stage, "update": update, "seconds": seconds, "loss": 0.5, "samples_per_second": 12.0}


def test_time_left_is_the_work_left_at_the_present_pace(tmp_path: Path) -> None:
    # 0.3 s per update of 30 units at first, then 0.15 s: 0.005 s per unit.
    rows = [row("00-denoise", 10, 3.0), *(row("00-denoise", 10 + k, 3.0 + 0.15 * k) for k in range(1, 21))]
    status = read_status(folder_of(tmp_path / "run", rows, state="running"))
    assert status.state == "running"
    assert status.stages[0].update == 30
    assert status.seconds_left_of(status.stages[0]) == pytest.approx(70 * 0.15)
    assert status.seconds_left == pytest.approx(0.005 * (70 * 30 + 50 * 50 + 20 * 100))
    assert status.share == pytest.approx(30 * 30 / (100 * 30 + 50 * 50 + 20 * 100))
    assert status.updates == (30, 170)


@pytest.mark.parametrize(("state", "is_alive"), [("running", True), ("stopped", False)])
def test_ctrl_c_saves_while_the_run_is_alive(state: str, is_alive: bool, tmp_path: Path) -> None:
    printed = io.StringIO()
    status = read_status(folder_of(tmp_path / "run", [row("00-denoise", 10, 3.0)], state=state))
    Screen(file=printed).show(view(status))
    assert "the stage restarts" in printed.getvalue()
    assert ("Ctrl-C saves first" in printed.getvalue()) == is_alive


@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_the_pace_of_an_earlier_process_does_not_count(tmp_path: Path, num_rows: int) -> None:
    """9 s per update until it stopped; 0.25 s for the process that has been running for 9 s."""
    rows = [*(row("00-denoise", 10 * k, 90.0 * k) for k in range(1, 7))]
    rows += [row("00-denoise", 60 + 10 * k, 540 + 2.5 * k) for k in range(1, num_rows + 1)]
    status = read_status(folder_of(tmp_path / "run", rows, state="running"))
    assert status.stages[0].seconds_an_update == pytest.approx(0.25)
    assert status.stages[0].seconds == 540 + 2.5 * num_rows, "the time so far is that of all processes"


def test_a_missing_or_silent_process_counts_as_stopped(tmp_path: Path) -> None:
    rows = [row("00-denoise", 10, 3.0)]
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    gone = read_status(folder_of(tmp_path / "gone", rows, state="running", pid=child.pid))
    assert gone.state == "stopped"
    assert "ended without a message" in str(gone.message)
    # A process on another machine cannot be looked up, so its silence counts.
    elsewhere = folder_of(tmp_path / "far", rows, state="running", pid=child.pid, machine=["far-away"])
    assert read_status(elsewhere).state == "running"
    late = read_status(elsewhere, now=time.time() + SILENT_SECONDS + 5)
    assert late.state == "stopped"
    assert "no heartbeat" in str(late.message)


@pytest.mark.parametrize("state", ["stopped", "diverged", "failed"])
def test_the_end_of_a_run_is_reported(state: str, tmp_path: Path, capsys: Capture) -> None:
    path = folder_of(tmp_path / "run", [row("00-denoise", 10, 3.0)], state=state, message="because")
    checkpoint = path / "stages" / "00-denoise" / "checkpoint-00000008"
    checkpoint.mkdir(parents=True)
    main(["status", str(path)])
    printed = capsys.readouterr().out
    assert state in printed
    assert "because" in printed
    assert "last checkpoint: update 8 of 00-denoise" in printed
    main(["status", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["stages"][0]["checkpoint"] == 8


def test_damage_and_bad_folders(tmp_path: Path, capsys: Capture) -> None:
    assert "nowhere is not a run" in refused(["status", "nowhere"], capsys)
    path = folder_of(tmp_path / "run", [row("00-denoise", 10, 3.0)], state="running")
    (path / "heartbeat.json").write_text("{")
    (path / "log.jsonl").write_text('{"stage": "00-denoise", "update": "x"}\nnoise\n')
    stage = path / "stages" / "00-denoise"
    stage.mkdir(parents=True)
    (stage / "manifest.json").write_text("{")
    status = read_status(path)
    assert (status.state, status.stages[0].state) == ("stopped", "damaged")
    json.dumps(status.as_json(), allow_nan=False)
    (path / "recipe.json").write_text("[]")
    assert "recipe.json has no sha256 of its content" in refused(["status", str(path)], capsys)
    assert "cannot be combined" in refused(["status", str(path), "--watch", "--json"], capsys)


def test_numbers_that_no_float_can_hold_and_endless_nesting_are_passed_over(tmp_path: Path) -> None:
    path = folder_of(tmp_path / "run", [row("00-denoise", 10, 3.0)], state="running")
    huge = '{"stage": "00-denoise", "update": 11, "seconds": 4, "loss": 1' + "0" * 400 + "}"
    (path / "log.jsonl").write_text(f"{'[' * 100_000}\n{huge}\n")
    stage = read_status(path).stages[0]
    assert (stage.update, stage.loss) == (11, None)
    (path / "recipe.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not readable JSON"):
        read_status(path)


def test_ctrl_c_ends_the_watch_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    path = folder_of(tmp_path / "run", [row("00-denoise", 10, 3.0)], state="running")

    def pressed(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("halfstep.cli.status.time.sleep", pressed)
    main(["status", str(path), "--watch"])
    assert capsys.readouterr().err == ""


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row("00-denoise", update, 0.5 * update) for update in range(1, 101)]
    path = folder_of(tmp_path / "run", rows, state="running")
    whole = read_status(path)
    monkeypatch.setattr("halfstep.runs.status.LOG_BYTES", 1500)
    assert read_status(path).as_json() == whole.as_json() | {"process": whole.process}
    assert len(read_status(path).stages[0].rows) < 20


def test_a_run_of_the_engine_is_followed_to_its_end(tmp_path: Path) -> None:
    finish(toy_spec(), tmp_path / "run")
    status = read_status(tmp_path / "run")
    assert status.state == "finished"
    assert [(s.state, s.update, s.num_updates) for s in status.stages] == [("done", 40, 40), *[("done", 30, 30)] * 2]
    assert status.seconds_left == 0.0
    assert status.share == 1.0
    (tmp_path / "run" / "stages" / "02-halve-0001" / "manifest.json").unlink()
    assert read_status(tmp_path / "run").state == "stopped"


def test_ends_are_distinguished(tmp_path: Path) -> None:
    def ended(error: BaseException | None) -> dict[str, Any]:
        with (
            contextlib.suppress(BaseException),
            Heartbeat(tmp_path / "h.json", {ZeroDivisionError: "diverged"}),
        ):
            first = json.loads((tmp_path / "h.json").read_text())
            if error is not None:
                raise error
        assert first["state"] == "running"
        held: dict[str, Any] = json.loads((tmp_path / "h.json").read_text())
        return held

    assert ended(None)["state"] == "finished"
    assert [
        ended(e)["state"] for e in (ZeroDivisionError("x"), GeneratorExit(), KeyboardInterrupt(), OSError("y"))
    ] == [
        "diverged",
        "stopped",
        "stopped",
        "failed",
    ]
    assert ended(OSError("no space"))["message"] == "no space"


def wait_for(path: Path, state: str, seconds: float = 180.0) -> RunStatus:
    """Return the status once it is `state`."""
    end = time.monotonic() + seconds
    while True:
        if (path / "recipe.json").is_file():
            status = read_status(path)
            if status.state == state and (state != "running" or status.updates[0] > 3):
                return status
        assert time.monotonic() < end, f"the run was not {state} after {seconds} s"
        time.sleep(0.05)


def test_another_process_sees_that_a_run_is_running_killed_and_stopped(tmp_path: Path) -> None:
    np.save(tmp_path / "toy.npy", points().numpy())
    out = tmp_path / "run"
    argv = ["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(out), *TINY_ARRAYS]
    argv += ["--engine.log-every", "1"]
    argv[argv.index("--teacher.num-updates") + 1] = "100000"
    for number, said in ((signal.SIGKILL, "ended without a message"), (signal.SIGTERM, "stopped by SIGTERM")):
        process = context().Process(target=main, args=(argv,))
        process.start()
        running = wait_for(out, "running")
        assert running.process is not None
        assert running.process["pid"] == process.pid
        assert running.stages[0].state == "training"
        assert 0 < running.seconds_left < float("inf")
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(60)
        stopped = wait_for(out, "stopped")
        assert said in str(stopped.message)
        assert stopped.process is not None
        assert stopped.process["pid"] == process.pid
