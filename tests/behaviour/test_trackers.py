"""Trackers receive the numbers of the log, each once, over the updates of the whole plan."""

import errno
import importlib
import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halfstep.cli import main
from halfstep.measure.evaluate import Evaluation
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.run.trackers import Trackers, chosen_trackers
from halfstep.runs import RunFolder, read_log
from toys import TINY_ARRAYS, finish, points, toy_spec, weights

pytest.importorskip("tensorboard")


def _events(path: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held = EventAccumulator(str(path / "tensorboard"))
    held.Reload()
    return {tag: [(event.step, event.value) for event in held.Scalars(tag)] for tag in held.Tags()["scalars"]}


def test_tensorboard_contains_the_log_once_also_after_an_interruption(tmp_path: Path) -> None:
    evaluation = Evaluation(num_samples=20, num_compared=5, num_shown=4)
    spec = toy_spec(trackers=("tensorboard",), evaluation=evaluation)
    events = run(spec, tmp_path)
    for event in events:
        # Rows after the last checkpoint, at update 9, are logged again.
        if isinstance(event, Progress) and (event.name, event.window.update) == ("01-halve-0002", 10):
            break
    events.close()  # type: ignore[attr-defined]
    finish(spec, tmp_path)
    shown = _events(tmp_path)
    rows = read_log(RunFolder(tmp_path).log_path)
    before = {"00-denoise": 0, "01-halve-0002": 40, "02-halve-0001": 70}
    for name in ("loss", "grad_norm", "learning_rate"):
        for stage, first in before.items():
            expected = [(first + row["update"], row[name]) for row in rows if row["stage"] == stage]
            assert [step for step, _ in shown[f"{stage}/{name}"]] == [step for step, _ in expected]
            for (_, value), (_, wanted) in zip(shown[f"{stage}/{name}"], expected, strict=True):
                assert value == pytest.approx(wanted, rel=1e-6)
    metrics = RunFolder(tmp_path).stage("02-halve-0001").metrics()
    assert metrics is not None
    ((step, value),) = shown["02-halve-0001/steps-0001/frechet"]
    assert step == 100
    assert value == pytest.approx(metrics.results[0].frechet, rel=1e-6)


def test_tensorboard_drops_the_curve_of_a_first_stage_that_restarts(tmp_path: Path) -> None:
    for updates in ((1, 2, 3), (1,)):
        trackers = Trackers(("tensorboard",), tmp_path, "toy", {})
        trackers.start(0)
        for update in updates:
            trackers.log("00-denoise", {"loss": float(len(updates))}, update)
        trackers.finish()
    assert _events(tmp_path) == {"00-denoise/loss": [(1, 1.0)]}


def test_a_picture_is_shown_as_it_is_in_the_folder(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "grid.png")
    trackers = Trackers(("tensorboard",), tmp_path, "toy", {})
    trackers.start(0)
    trackers.picture("01-halve-0002", "samples", tmp_path / "grid.png", 70)
    trackers.finish()
    held = EventAccumulator(str(tmp_path / "tensorboard"))
    held.Reload()
    assert held.Tags()["images"] == ["01-halve-0002/samples"]
    (event,) = held.Images("01-halve-0002/samples")
    assert event.step == 70
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), pixels)


def _cut_and_gone_on(path: Path, tracker: str) -> list[dict[str, Any]]:
    """Return the log of a tracked run that was interrupted after update 10 of its second stage and resumed."""
    spec = toy_spec(trackers=(tracker,))
    events = run(spec, path)
    next(e for e in events if isinstance(e, Progress) and (e.name, e.window.update) == ("01-halve-0002", 10))
    events.close()  # type: ignore[attr-defined]
    finish(spec, path)
    return read_log(RunFolder(path).log_path)


def test_trackio_contains_the_log_of_an_interrupted_run_as_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The environment is read when the package is imported, which happens here.
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    from trackio import sqlite_storage

    rows = _cut_and_gone_on(tmp_path / "toy", "trackio")
    # A run prints its own lines on stdout, or one document with --json.
    assert "rackio" not in capsys.readouterr().out
    (name,) = sqlite_storage.SQLiteStorage.get_runs("halfstep")
    assert name.startswith("toy-")
    told = {entry["step"]: entry for entry in sqlite_storage.SQLiteStorage.get_logs("halfstep", name)}
    before = {"00-denoise": 0, "01-halve-0002": 40, "02-halve-0001": 70}
    for row in rows:
        entry = told[before[row["stage"]] + row["update"]]
        assert entry[f"{row['stage']}/loss"] == pytest.approx(row["loss"], rel=1e-6)


def test_weights_and_biases_receives_the_log_of_an_interrupted_run_as_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _cut_and_gone_on(tmp_path, "wandb")
    # The service of wandb may write the end of a finished run's file later. It has written it when it ends itself.
    importlib.import_module("wandb").teardown()
    first, second = sorted(tmp_path.glob("wandb/offline-run-*"))
    # The part after the date is the run's name: both later offline runs belong to the same run.
    assert first.name.split("-")[3] == second.name.split("-")[3]
    for folder, stages in ((first, {0, 1}), (second, {1, 2})):
        (file,) = folder.glob("*.wandb")
        content = file.read_bytes()
        for number, stage in enumerate(("00-denoise", "01-halve-0002", "02-halve-0001")):
            assert (f"{stage}/loss".encode() in content) == (number in stages)


def test_weights_and_biases_without_a_login_is_refused_with_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    # An earlier test in this process may have started wandb, which reads its environment once.
    importlib.import_module("wandb").teardown()
    np.save(tmp_path / "points.npy", points(64).numpy())
    command = ["run", "arrays", "--data", str(tmp_path / "points.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS]
    with pytest.raises(SystemExit) as end:
        main([*command, "--engine.trackers", "wandb"])
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 2
    assert "the tracker wandb cannot" in line
    assert "run `wandb login`, or set WANDB_MODE=offline" in line
    # The fallback works in the same folder; another process would read its environment again.
    sys.modules["wandb"].teardown()
    monkeypatch.setenv("WANDB_MODE", "offline")
    main([*command, "--engine.trackers", "wandb", "--evaluation.no-enabled"])
    assert RunFolder(tmp_path / "run").stages()


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.ESTALE])
def test_a_disk_failure_in_tensorboards_thread_is_one_line_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], fault: int
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    np.save(tmp_path / "points.npy", points(64).numpy())
    command = ["run", "arrays", "--data", str(tmp_path / "points.npy"), *TINY_ARRAYS, "--evaluation.no-enabled"]
    command += ["--engine.log-every", "1", "--engine.checkpoint-updates", "1", "--teacher.num-updates", "20"]
    main([*command, "--out", str(tmp_path / "uncut"), "--engine.trackers", "tensorboard"])
    write, written = RecordWriter.write, itertools.count()

    def failing(self: RecordWriter, data: bytes) -> None:
        if next(written) > 30:
            raise OSError(fault, os.strerror(fault))
        write(self, data)

    capfd.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", failing)
        with pytest.raises(SystemExit) as end:
            main([*command, "--out", str(tmp_path / "run"), "--engine.trackers", "tensorboard"])
    (line,) = capfd.readouterr().err.splitlines()
    assert end.value.code == 3
    assert re.search(r"the last good checkpoint is \S+checkpoint-\d+; .* run the same command again$", line)
    main([*command, "--out", str(tmp_path / "run"), "--engine.trackers", "tensorboard"])
    assert "00-denoise: 20 updates, resuming at update" in capfd.readouterr().out
    assert weights(tmp_path / "run") == weights(tmp_path / "uncut")


def test_tensorboard_is_the_default_where_it_is_installed() -> None:
    assert chosen_trackers(None) == ("tensorboard",)


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.run.trackers.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the tracker wandb needs the package wandb: pip install 'halfstep\[wandb\]'"):
        chosen_trackers(("wandb",))
    assert chosen_trackers(None) == ()
    with pytest.raises(ValueError, match="unknown tracker 'mlflow'"):
        chosen_trackers(("mlflow",))
