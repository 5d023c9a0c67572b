"""A run that was interrupted anywhere ends with the weights of an uninterrupted run, bit for bit."""

import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from halfstep.run.events import Progress, StageEnd, StageStart
from halfstep.run.folder import DifferentRecipe
from halfstep.run.progress import Lines
from halfstep.run.runner import run
from halfstep.runs import RunFolder, read_log, read_status
from halfstep.runtime import files as run_files
from halfstep.runtime.locks import InUse
from halfstep.runtime.processes import exit_code
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.runtime.storage import NoStorage
from halfstep.train import checkpoint
from toys import finish, toy_spec, weights


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uncut") / "run"
    finish(toy_spec(), path)
    return path


def _cut(path: Path, stage: str, update: int) -> None:
    """Run until an update of a stage has been checkpointed, then exit without any cleanup."""
    events = run(toy_spec(log_every=1), path)
    for event in events:
        if isinstance(event, Progress) and event.name == stage and event.window.update == update:
            break
    events.close()


@pytest.mark.parametrize(("stage", "update"), [("00-denoise", 13), ("01-halve-0002", 1), ("02-halve-0001", 30)])
def test_an_interruption_changes_neither_the_weights_nor_the_log(
    tmp_path: Path, uncut: Path, stage: str, update: int
) -> None:
    _cut(tmp_path / "run", stage, update)
    finish(toy_spec(), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uncut)
    rows = read_log(RunFolder(tmp_path / "run").log_path)
    keys = [(row["stage"], row["update"]) for row in rows]
    assert keys == sorted(set(keys)), "a row was lost, doubled or out of order"


@pytest.mark.parametrize(("until", "done"), [(StageStart, 40), (StageEnd, 70)])
def test_a_removed_stage_has_not_begun_when_an_earlier_one_is_trained_again(
    tmp_path: Path, uncut: Path, until: type[StageStart | StageEnd], done: int
) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    for name in ("01-halve-0002", "02-halve-0001"):
        shutil.rmtree(RunFolder(path).stage(name).path)
    events = run(toy_spec(), path)
    next(event for event in events if isinstance(event, until) and event.name == "01-halve-0002")
    status = read_status(path)
    events.close()
    last = status.stages[-1]
    assert (last.state, last.update, last.seconds, last.loss) == ("to come", 0, 0.0, None)
    assert status.updates == (done, 100)
    assert status.seconds_left_of(last) > 0
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


@pytest.mark.parametrize(("update", "logged"), [(13, 12), (None, 30)])
def test_a_later_stage_that_is_not_trained_from_its_beginning_keeps_its_log(
    tmp_path: Path, uncut: Path, update: int | None, logged: int
) -> None:
    """The later stage is complete, or resumes from the checkpoint at update 12."""
    path = tmp_path / "run"
    if update is None:
        shutil.copytree(uncut, path)
    else:
        _cut(path, "02-halve-0001", update)
    shutil.rmtree(RunFolder(path).stage("01-halve-0002").path)
    events = run(toy_spec(), path)
    next(event for event in events if isinstance(event, StageStart) and event.name == "01-halve-0002")
    events.close()
    rows = [row["update"] for row in read_log(RunFolder(path).log_path) if row["stage"] == "02-halve-0001"]
    assert logged in rows
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_the_time_left_does_not_include_later_stages_that_are_complete(tmp_path: Path, uncut: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    shutil.rmtree(RunFolder(path).stage("01-halve-0002").path)
    lines = Lines(toy_spec().stages, lambda _: None)
    shares = []
    for event in run(toy_spec(), path):
        lines.take(event)
        if isinstance(event, Progress):
            shares.append(lines.status.share)
            *_, last = lines.status.stages
            assert (last.state, lines.status.seconds_left_of(last)) == ("done", 0)
    assert shares[-1] == 1
    assert weights(path) == weights(uncut)


@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "manifest cut", "update altered", "file missing"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(tmp_path: Path, uncut: Path, damage: str) -> None:
    path = tmp_path / "run"
    _cut(path, "00-denoise", 25)
    latest, before = RunFolder(path).stage("00-denoise").checkpoints()[:2]
    target = latest / ("manifest.json" if damage in ("manifest cut", "update altered") else "optimizer.safetensors")
    content = bytearray(target.read_bytes())
    if damage == "file missing":
        target.unlink()
    elif damage == "update altered":
        # Flipping one bit gives another digit, so the file remains valid JSON.
        assert b'"update": 24' in content
        content[content.index(b'"update": 24') + len(b'"update": 2')] ^= 1
        target.write_bytes(content)
    else:
        if damage == "bit flipped":
            content[-7] ^= 0x10
        target.write_bytes(content[: len(content) if damage == "bit flipped" else len(content) // 2])
    events = run(toy_spec(), path)
    notice, start = next(events), next(events)
    assert target.name in notice.text  # type: ignore[attr-defined]
    assert str(latest) in notice.text  # type: ignore[attr-defined]
    assert start.resumed_at == int(before.name.rpartition("-")[2])  # type: ignore[attr-defined]
    events.close()
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_a_damaged_model_of_a_complete_stage_is_reported(tmp_path: Path, uncut: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    model = RunFolder(path).stage("01-halve-0002").model
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    with pytest.raises(ValueError, match=r"01-halve-0002/model\.safetensors is truncated or altered"):
        finish(toy_spec(), path)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_the_state_and_the_next_call_resumes(
    tmp_path: Path, uncut: Path, number: int, code: int
) -> None:
    path = tmp_path / "run"
    with StopSignal() as stop, pytest.raises(Interrupted) as stopped:  # noqa: PT012 (the loop is what is stopped)
        for event in run(toy_spec(checkpoint_updates=1000), path, stop):
            if isinstance(event, Progress) and event.window.update == 10:
                os.kill(os.getpid(), number)
    assert 128 + stopped.value.signal == code
    checkpoint = RunFolder(path).stage("00-denoise").checkpoints()[0]
    assert int(checkpoint.name.rpartition("-")[2]) in (10, 11)
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_a_full_disk_names_the_last_good_checkpoint_and_loses_nothing(
    tmp_path: Path, uncut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    synced = run_files.sync
    calls = 0

    def full(file: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > 60:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(run_files, "sync", full)
        with pytest.raises(OSError, match=r"last good checkpoint is .*checkpoint-0000") as error:
            finish(toy_spec(), path)
    assert "\n" not in str(error.value)
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_a_really_full_disk(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        with pytest.raises(OSError, match="no space left for") as error:
            finish(toy_spec(), mount / "run")
        assert error.value.errno == errno.ENOSPC
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_folder_of_another_recipe_is_refused_with_the_difference_and_left_alone(tmp_path: Path, uncut: Path) -> None:
    before = weights(uncut)
    with pytest.raises(DifferentRecipe, match=r"seed: 1 \(the folder has 0\)"):
        finish(toy_spec(recipe={"name": "toy", "seed": 1}), uncut)
    path = Path(shutil.copytree(uncut, tmp_path / "run"))
    finish(toy_spec(recipe={"name": "toy", "seed": 1}, free=("seed",)), path)
    assert weights(path) == weights(uncut) == before
    assert RunFolder(path).recipe()["recipe"]["seed"] == 1


def test_a_folder_of_other_data_is_refused(uncut: Path) -> None:
    spec = toy_spec()
    changed = type(spec.data)("toy", spec.data.fetch(torch.arange(100)).x0)  # type: ignore[call-arg]
    with pytest.raises(DifferentRecipe, match="different data"):
        finish(toy_spec(data=changed), uncut)


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty, but it is not a run folder"):
        finish(toy_spec(), tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_resumed_run_in_either_precision_is_the_uncut_one(tmp_path: Path, precision: str) -> None:
    spec = toy_spec(precision=precision, log_every=1)
    finish(spec, tmp_path / "uncut")
    events = run(spec, tmp_path / "cut")
    next(e for e in events if isinstance(e, Progress) and (e.name, e.window.update) == ("01-halve-0002", 13))
    events.close()
    finish(spec, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "uncut")


def test_an_unreadable_checkpoint_is_skipped_and_kept(
    tmp_path: Path, uncut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    _cut(path, "00-denoise", 25)
    folder = RunFolder(path).stage("00-denoise")
    latest, before = folder.checkpoints()[:2]
    check = checkpoint.check_files
    unread = [latest]

    def failing(held: Path, files: dict[str, str]) -> None:
        if held in unread:
            raise OSError(errno.EIO, "Input/output error", str(held / "ema.safetensors"))
        check(held, files)

    monkeypatch.setattr(checkpoint, "check_files", failing)
    events = run(toy_spec(), path)
    notice, start = next(events), next(events)
    events.close()
    assert notice.text.startswith(f"{latest} cannot be read (Input/output error)")  # type: ignore[attr-defined]
    assert start.resumed_at == int(before.name.rpartition("-")[2])  # type: ignore[attr-defined]
    assert latest.with_name(f"damaged-{latest.name}").is_dir()
    # If none can be read, nothing is trained or removed, because a later attempt may succeed.
    unread += folder.checkpoints()
    with pytest.raises(NoStorage) as error:
        finish(toy_spec(), path)
    assert f"the last good checkpoint is {unread[1]}" in str(error.value)
    assert folder.checkpoints() == unread[1:]
    monkeypatch.undo()
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    first: Iterator[object] = run(toy_spec(), tmp_path / "run")
    next(first)
    with pytest.raises(InUse, match="another halfstep process is writing to") as refused:
        finish(toy_spec(), tmp_path / "run")
    # The previous job may be about to end, so the exit code makes a scheduler retry.
    assert exit_code(refused.value) == 75
    first.close()  # type: ignore[attr-defined]
    finish(toy_spec(), tmp_path / "run")


def test_only_the_last_two_checkpoints_are_kept_and_none_when_the_stage_is_complete(
    tmp_path: Path, uncut: Path
) -> None:
    _cut(tmp_path / "run", "00-denoise", 31)
    kept = RunFolder(tmp_path / "run").stage("00-denoise").checkpoints()
    assert [path.name for path in kept] == ["checkpoint-00000030", "checkpoint-00000027"]
    assert not list(uncut.glob("stages/*/*checkpoint*"))
