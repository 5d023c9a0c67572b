"""Files and folders of a run are complete or absent, whatever fails and whoever else writes them."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.measure.samples import write_png
from halfstep.runtime import tensors as tensor_files
from halfstep.runtime.files import (
    DamagedFile,
    json_digest,
    leftovers,
    read_arrays,
    refuse_taken,
    replacing,
    replacing_folder,
    rounded_digest,
    sweep,
    write_arrays,
    write_json,
    write_text,
)
from halfstep.runtime.tensors import read_cached, read_tensors, write_cached, write_tensors
from toys import file_size_limit

SIZE = 4096


def test_a_rounded_digest_ignores_the_last_bits_of_computed_numbers_and_nothing_else() -> None:
    schedule = {"type": "vp_table", "betas": [0.1, 0.02, 1 / 3]}
    nearby = schedule | {"betas": [np.nextafter(0.1, 1), np.nextafter(0.02, 0), 0.3333333333333334]}
    assert json_digest(nearby) != json_digest(schedule)
    assert rounded_digest(nearby) == rounded_digest(schedule)
    for other in ({"betas": [0.1, 0.02, 0.333333334]}, {"betas": [0.02, 0.1, 1 / 3]}, {"type": "other"}):
        assert rounded_digest(schedule | other) != rounded_digest(schedule)


def write_folder(path: Path, value: int) -> None:
    with replacing_folder(path) as into:
        write_text(into / "first.txt", str(value) * SIZE)
        (into / "deeper").mkdir()
        (into / "deeper" / "second.txt").write_text(str(value) * SIZE)


def picture(value: int) -> Image.Image:
    return Image.frombytes("L", (64, 64), np.random.default_rng(value).bytes(SIZE))


WRITERS: dict[str, Callable[[Path, int], Any]] = {
    "text": lambda path, value: write_text(path, str(value) * SIZE),
    "json": lambda path, value: write_json(path, [value] * SIZE),
    "arrays": lambda path, value: write_arrays(path, arr_0=np.full(SIZE, value)),
    "tensors": lambda path, value: write_tensors(path, {"x": torch.full((SIZE,), value)}),
    "png": lambda path, value: write_png(
        path, Image.frombytes("L", (64, 64), np.random.default_rng(value).bytes(SIZE))
    ),
    "folder": write_folder,
}


def content(path: Path) -> Any:
    """Return all bytes of a file, or of a folder's files."""
    if path.is_file():
        return path.read_bytes()
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture(params=WRITERS)
def write(request: pytest.FixtureRequest) -> Callable[[Path, int], Any]:
    return WRITERS[request.param]


def test_complete_files_stay_when_the_disk_is_full(write: Callable[[Path, int], Any], tmp_path: Path) -> None:
    path = tmp_path / "held" / "UP.NPZ"
    for room in (0, 1, 1000):
        with file_size_limit(room), pytest.raises(OSError, match="File too large"):
            write(path, 2)
        assert list(path.parent.iterdir()) == []
    write(path, 1)
    before = content(path)
    for room in (0, 1, 1000):
        with file_size_limit(room), pytest.raises(OSError, match="File too large"):
            write(path, 2)
        assert content(path) == before
        assert list(path.parent.iterdir()) == [path]


def test_a_failed_sync_or_rename_leaves_the_old_or_the_new(
    write: Callable[[Path, int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call of a write fails in turn, until all have failed once."""
    path = tmp_path / "held" / "file"
    write(path, 1)
    old = content(path)
    write(tmp_path / "other", 2)
    new = content(tmp_path / "other")
    left = [0]

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "Input/output error")
            return call(*arguments)

        return made

    for name in ("fsync", "replace", "rename"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    found = []
    for failed in range(1, 100):
        left[0] = failed
        with suppress(OSError):
            write(path, 2)
        if left[0] > 0:
            break
        found.append(content(path))
        assert list(path.parent.iterdir()) == [path]
        left[0] = 0
        write(path, 1)
    whole = [old] * found.count(old) + [new] * found.count(new)
    # The new file only exists if nothing but the folder's sync was left to do.
    assert found == whole
    assert len(found) >= 3
    assert found.count(new) == 1


def test_what_was_written_is_on_the_disk_before_it_gets_its_name_and_the_name_after_it(
    write: Callable[[Path, int], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the files of a folder, each of which a power cut could otherwise leave empty under its name."""
    sync, replace = os.fsync, os.replace
    synced: list[int] = []
    names = [0]

    def noted(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= set(synced)
        names.append(len(synced))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", renamed)
    write(tmp_path / "file", 1)
    assert names[-1], "nothing was renamed"
    assert synced[names[-1] :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_in_the_middle_leaves_the_old(tmp_path: Path, exception: type[BaseException]) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    write_text(path, "old")
    write_folder(folder, 1)
    before = content(tmp_path)

    def interrupted(writer: AbstractContextManager[Path], half: str) -> None:
        with writer as temporary:
            (temporary / half).write_text("half")
            raise exception

    for writer, half in ((replacing(path), ""), (replacing_folder(folder), "half")):
        with pytest.raises(exception):
            interrupted(writer, half)
    assert content(tmp_path) == before


def test_concurrent_writers_of_one_path_all_complete(write: Callable[[Path, int], Any], tmp_path: Path) -> None:
    """Threads share a process id, like processes in two containers."""
    path, failed = tmp_path / "held" / "file", []
    for value in (1, 2):
        write(tmp_path / str(value), value)
    wholes = [content(tmp_path / str(value)) for value in (1, 2)]

    def often(value: int) -> None:
        try:
            for _ in range(20):
                write(path, value)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=often, args=(value,)) for value in (1, 2, 1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert content(path) in wholes
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_that_end_together_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with replacing(path) as one, replacing(path) as two:
        one.write_text("one")
        two.write_text("two")
        assert one.read_text() == "one"
    assert content(tmp_path) == {"file": b"one"}


def test_the_leftovers_of_a_killed_writer_are_recognised_by_name(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "whole")
    (tmp_path / ".hidden").write_text("of the user")
    (tmp_path / "my.tmp").write_text("of the user")
    before = content(tmp_path)
    killed = [replacing(tmp_path / "a.json"), replacing(tmp_path / "b"), replacing_folder(tmp_path / "c")]
    places = [writer.__enter__() for writer in killed]
    for place in places[:2]:
        place.write_text("half")
    (places[2] / "d").write_text("half")
    assert leftovers(tmp_path, "a.json") == places[:1]
    sweep(tmp_path, tmp_path / "absent")
    assert content(tmp_path) == before
    assert not any(place.exists() for place in places)


def test_arrays_are_read_completely_or_reported_as_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    write_arrays(path, x=np.arange(5), y=np.ones((2, 2)))
    assert {name: value.tolist() for name, value in read_arrays(path).items()} == {
        "x": [0, 1, 2, 3, 4],
        "y": [[1, 1], [1, 1]],
    }
    assert list(read_arrays(path, "y")) == ["y"]
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile, match=r"a\.npz"):
            read_arrays(path)
    path.write_bytes(whole)
    for wrong, name in ((path, "z"), (tmp_path / "absent.npz", "x"), (tmp_path, "x")):
        with pytest.raises(DamagedFile):
            read_arrays(wrong, name)
    np.save(tmp_path / "array.npy", np.arange(3))
    with pytest.raises(DamagedFile):
        read_arrays(tmp_path / "array.npy", "x")
    np.savez(path, x=np.array([{}], dtype=object))
    with pytest.raises(DamagedFile, match="pickle"):
        read_arrays(path)


def test_tensors_that_the_disk_returns_changed_replace_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, save = tmp_path / "a.safetensors", tensor_files.save_file
    assert write_tensors(path, {"x": torch.eye(3).T}) == hashlib.sha256(path.read_bytes()).hexdigest()
    before = content(tmp_path)

    def unsound(tensors: Any, file: Path) -> None:
        save(tensors, file)
        file.write_bytes(file.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(tensor_files, "save_file", unsound)
    with pytest.raises(DamagedFile, match="was written, but x reads back differently"):
        write_tensors(path, {"x": torch.ones(3)})
    assert content(tmp_path) == before


def test_a_failing_cache_is_ignored(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "a.safetensors"
    write_cached(None, {"x": torch.ones(1)})
    assert read_cached(None) == read_cached(file) == {}
    write_cached(file, {"x": torch.ones(1)})
    assert torch.equal(read_cached(file)["x"], torch.ones(1))
    with file_size_limit(10):
        write_cached(file, {"x": torch.zeros(1)})
    assert torch.equal(read_cached(file)["x"], torch.ones(1))
    file.write_bytes(file.read_bytes()[:-1])
    assert read_cached(file) == {}
    write_cached(file / "in" / "a" / "file", {"x": torch.ones(1)})


def test_a_digest_is_of_the_json_with_sorted_keys() -> None:
    spelled = hashlib.sha256(b'{"a": 1, "b": [2, null, "\\u00e9"]}').hexdigest()
    assert json_digest({"b": (2, None, "é"), "a": 1}) == spelled
    assert json_digest({"a": 1, "b": [2, None, "é"]}, length=10) == spelled[:10]


def test_an_output_is_free_where_nothing_would_be_lost(tmp_path: Path) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "full" / "file"
    full.mkdir()
    empty.mkdir()
    file.write_text("mine")
    refuse_taken(tmp_path / "absent")
    refuse_taken(tmp_path / "absent", is_file=True)
    refuse_taken(empty)
    for out, is_file in ((full, False), (file, True), (empty, True)):
        with pytest.raises(ValueError, match=f"^{out} already exists: choose another --out$"):
            refuse_taken(out, is_file)


@pytest.mark.parametrize("is_file", [False, True])
def test_nothing_can_be_written_inside_a_file(is_file: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("nowhere")
    for name, kind in (("file", "a file"), ("fifo", "a FIFO, socket"), ("link", "a FIFO, socket")):
        there = tmp_path / name
        for out in (there / "x", there / "x" / "y"):
            folder = out.parent if is_file else out
            what = "it" if folder == there else folder
            with pytest.raises(ValueError, match=f"^{there} is {kind}.*, so {what} cannot be a folder. Choose another"):
                refuse_taken(out, is_file)
        with pytest.raises(ValueError, match=f"^{there} (is {kind}|already exists).*[Cc]hoose another --out$"):
            refuse_taken(there, is_file)


def test_tensors_are_read_from_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    held = {"x": torch.randn(3)}
    write_tensors(folder / "x.safetensors", held)
    torch.testing.assert_close(read_tensors(folder / "x.safetensors"), held, rtol=0, atol=0)
    (folder / "cut").write_bytes((folder / "x.safetensors").read_bytes()[:-1])
    with pytest.raises(DamagedFile, match="is not a complete safetensors file"):
        read_tensors(folder / "cut")
