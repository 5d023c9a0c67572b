"""Machines and file systems other than those of the tests, which these tests imitate."""

import errno
import os
import signal
import sys
from pathlib import Path

import pytest
from accelerate import PartialState
from filelock import FileLock

import halfstep
from halfstep.cli import doctor
from halfstep.cli.display import RunDisplay
from halfstep.cli.words import Screen
from halfstep.data.folders import has_folder
from halfstep.hub.export import export_pipeline
from halfstep.hub.web.page import export_web
from halfstep.runtime import cpus, files, locks
from halfstep.runtime.processes import make_accelerator
from halfstep.runtime.stop import StopSignal
from support_cli import refused


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without this, filelock writes a marker that a killed process leaves behind."""
    lock = locks.lock_of(tmp_path)
    assert not lock.fallback_to_soft

    def refused(self: FileLock, timeout: float = -1) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refused)
    with pytest.raises(ValueError, match=rf"^the file system of {tmp_path} does not support file locks"):
        locks.acquire(lock, "busy")


def test_folders_that_cannot_be_flushed_are_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on some shared folders. For a file, the error counts."""
    flushed = os.fsync

    def fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").resolve().is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        flushed(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"

    def broken(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Invalid argument"):
        files.write_text(tmp_path / "b", "x")


def test_a_mount_point_or_the_current_folder_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.refuse_irreplaceable(tmp_path / "new")
    files.refuse_irreplaceable(tmp_path)
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    for held in (Path(), Path(".."), tmp_path, inner):
        with pytest.raises(ValueError, match=r"is the current folder or contains it: choose a new folder in it"):
            files.refuse_irreplaceable(held)
    model = halfstep.load("fashion")
    for export in (lambda: export_pipeline(model, inner), lambda: export_web([(model, None)], inner, "page")):
        with pytest.raises(ValueError, match=r"cannot be replaced"):
            export()
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    with pytest.raises(ValueError, match=r"a mount point: choose a new folder in it"):
        files.refuse_irreplaceable(tmp_path)


def test_files_of_the_operating_system_do_not_fill_a_folder(tmp_path: Path) -> None:
    for name in (".DS_Store", "._a.png", ".nfs0001"):
        (tmp_path / name).write_text("")
    (tmp_path / "lost+found").mkdir()
    assert files.contents(tmp_path) == []
    files.refuse_taken(tmp_path)
    (tmp_path / "a.png").write_text("")
    assert files.contents(tmp_path) == [tmp_path / "a.png"]


def test_names_of_folders_are_compared_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where Path.is_dir ignores case, as on macOS."""
    (tmp_path / "Train").mkdir()
    (tmp_path / "val").write_text("")
    monkeypatch.setattr(Path, "is_dir", lambda path, **_: path.name.lower() == "train")
    assert has_folder(tmp_path, "Train")
    assert not has_folder(tmp_path, "train")
    assert not has_folder(tmp_path, "val")


@pytest.mark.parametrize(
    ("limit", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("max 100000", 8), ("?", 8)]
)
def test_the_cpu_limit_of_a_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, cores: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cpus, "_QUOTA", tmp_path / "cpu.max")
    assert cpus.usable_cores() == 8
    (tmp_path / "cpu.max").write_text(limit + "\n")
    assert cpus.usable_cores() == cores


def test_more_threads_than_cores_are_a_problem() -> None:
    assert doctor.cpu_finding("", 2, 2).verdict == "ok"
    finding = doctor.cpu_finding("", 2, 64)
    assert finding.verdict == "problem"
    assert "OMP_NUM_THREADS=2" in str(finding.advice)


def test_handlers_that_python_cannot_restore_remain(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that embeds Python, such as R, may have installed a handler that Python shows as None."""
    known = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGUSR1 else known(number))
    before = known(signal.SIGUSR1), known(signal.SIGTERM)
    with StopSignal():
        assert known(signal.SIGUSR1) == before[0]
        assert known(signal.SIGTERM) != before[1]
    assert (known(signal.SIGUSR1), known(signal.SIGTERM)) == before


def test_a_state_that_the_user_created_does_not_choose_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with transformers.TrainingArguments in a notebook."""
    make_accelerator()
    PartialState._reset_state()
    monkeypatch.setattr("accelerate.state.AcceleratorState._shared_state", {})
    PartialState()
    PartialState._shared_state["device"] = "not the cpu"
    assert make_accelerator(cpu=True).device.type == "cpu"


def test_colours_in_a_log_do_not_make_it_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not sys.stdout.isatty()
    assert not Screen().on_terminal
    assert Screen(is_terminal=True).on_terminal
    assert not RunDisplay([], Screen()).is_live


def test_windows_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert refused(["doctor"], capsys) == "halfstep needs Linux or macOS. On Windows, use WSL"
