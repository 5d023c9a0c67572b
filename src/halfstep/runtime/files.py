"""Files that are either whole or absent: written under a temporary name, synced, then renamed."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class DamagedFile(ValueError):
    """A file that is missing, cut short or altered; the message names it."""


class InUse(ValueError):
    """A folder that another process is writing."""


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a message of ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def sha256_of(path: Path) -> str:
    """The sha256 of the file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """`content` in `path`: at any moment the file is the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`text` in `path`, in UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`value` as indented JSON in `path`, atomically.

    Raises:
        ValueError: if it holds a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_arrays(path: Path, **arrays: Any) -> None:
    """Arrays by name in the .npz `path`, atomically."""
    # Here, for most that read a run folder have no use for it.
    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        DamagedFile: if the file is not there or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFile(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not readable JSON ({error})") from None


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """A folder that appears with all its files or not at all.

    `write` fills a temporary folder beside it, whose files are then synced to the disk and which is renamed; a folder
    that was there before is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        write(temporary)
        for path in sorted(temporary.rglob("*")):
            if path.is_file():
                _sync(path)
        _sync(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what writers that were killed have left under their temporary names, in a run folder that no other
    process writes."""
    for path in [path for place in (".", "stages/*", "evaluation/*") for path in folder.glob(f"{place}/.*.tmp")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Passes if every file of `digests` is in `folder` with the sha256 given for it.

    Raises:
        DamagedFile: naming the first that is missing or differs.
    """
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if sha256_of(path) != digest:
            raise DamagedFile(f"{path} is truncated or altered: its sha256 is not the one in manifest.json")


def cache_folder() -> Path:
    """Where what can be made again is kept: $HALFSTEP_CACHE, or ~/.cache/halfstep."""
    return Path(os.environ.get("HALFSTEP_CACHE", Path.home() / ".cache" / "halfstep"))
