"""Writes files that are either complete or absent: each file gets a temporary name, is synced, and is then renamed."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from halfstep.runtime.terminal import printable

if TYPE_CHECKING:
    import numpy as np


SEAL: Final = "sha256"
"""The key under which a sealed JSON file stores the digest of all its other entries."""

_CLUTTER: Final = (".DS_Store", "._*", ".nfs*", "lost+found", "Thumbs.db", "desktop.ini")
"""Names of files and folders that operating systems create in any folder."""


class DamagedFile(ValueError):
    """A file is missing, truncated or altered. The message contains the path of the file."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text."""
    return _lines(error)[0]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where torch puts the reason."""
    return _lines(error)[-1].strip()


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file in hex.

    Raises:
        DamagedFile: see `check_regular`.
    """
    check_regular(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any, length: int = 64) -> str:
    """Return the first `length` hex digits of the sha256 of `value` as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:length]


def rounded_digest(value: Any, length: int = 64) -> str:
    """Return the `json_digest` of `value` with all floats rounded to 10 digits.

    The last bits of computed numbers, such as a noise schedule, can differ between machines.
    """

    def rounded(part: Any) -> Any:
        if isinstance(part, float):
            return float(f"{part:.10g}")
        if isinstance(part, Mapping):
            return {name: rounded(each) for name, each in part.items()}
        return [rounded(each) for each in part] if isinstance(part, list | tuple) else part

    return json_digest(rounded(value), length)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _flush(descriptor)
    except OSError as error:
        # Some network and shared file systems cannot flush folders.
        if error.errno != errno.EINVAL or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def _flush(descriptor: int) -> None:
    """Flush a descriptor to the disk itself; on macOS, fsync only reaches the disk's cache."""
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


def contents(folder: Path) -> list[Path]:
    """Return the sorted contents of a folder, without the files that operating systems create in any folder."""
    return sorted(path for path in folder.iterdir() if not any(fnmatch(path.name, name) for name in _CLUTTER))


def remove(path: Path) -> None:
    """Remove a file or a folder. Disk errors are ignored, because the error that is already raised is more useful."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def scratch(path: Path) -> Iterator[Path]:
    """Yield an unused path in the folder of `path`, and remove whatever was written there on exit.

    The name is random, because a process id can be shared by threads, or by processes in different containers.
    """
    # If a scratch folder is missing, its disk was lost. Recreating it would write to the disk under the mount point.
    if not fnmatch(path.parent.name, ".*.tmp"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise DamagedFile(f"{path.parent} cannot be created: a file has that name. Remove that file") from None
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
    finally:
        remove(temporary)


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """Return the temporary files and folders that were left in `folder` when writers of `name` were killed."""
    return list(folder.glob(f".{name}.*.tmp"))


def sweep(*folders: Path) -> None:
    """Remove leftover files from folders that no other process is writing to."""
    for folder in folders:
        for path in leftovers(folder):
            remove(path)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a file or folder that becomes `path` when the block ends.

    The temporary path is synced and then renamed, so `path` is always complete. The old file or folder remains until
    the rename, or permanently if the block raises an exception. Replacing a folder takes two renames, and `path` does
    not exist between them.
    """
    with scratch(path) as temporary:
        yield temporary
        for written in (*temporary.rglob("*"), temporary):
            sync(written)
        _rename(temporary, path)
        sync(path.parent)


def _rename(temporary: Path, path: Path) -> None:
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.ENOTDIR) and path.exists():
            held, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise DamagedFile(f"{path} cannot be written as a {wanted}: a {held} has that name. Remove it") from None
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # A rename can replace a folder only if it is empty.
        with scratch(path) as aside:
            try:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(path, aside)
                _rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.rename(aside, path)
                raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends (see `replacing`)."""
    with replacing(path) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically. File name bytes that are not UTF-8 become "?"."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode(errors="replace"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically.

    Raises:
        ValueError: if `value` contains a number that is not finite.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """Write a JSON object atomically and append the sha256 of its entries, which `read_sealed` checks.

    Raises:
        ValueError: if `body` contains a number that is not finite.
    """
    # JSON turns keys into strings and tuples into lists.
    held = json.loads(json.dumps({name: value for name, value in body.items() if name != SEAL}, allow_nan=False))
    write_json(path, held | {SEAL: json_digest(held)})


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write named arrays atomically to an .npz file, regardless of the suffix of `path`."""
    # numpy is imported here, because most readers of a run folder need no arrays.
    import numpy as np

    # numpy would add a suffix to a path, but not to an open file.
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


def read_arrays(path: Path, *names: str) -> "dict[str, np.ndarray]":
    """Load the named arrays of an .npz file, or all arrays if no name is given.

    Raises:
        DamagedFile: if the file cannot be read, is not a complete .npz file or lacks one of the arrays.
    """
    import numpy as np

    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as held:
            return {name: held[name] for name in names or held.files}
    except Exception as error:  # zipfile, zlib and numpy raise all kinds of errors for a damaged archive
        raise DamagedFile(f"{path} cannot be read as .npz ({first_line(error)})") from None


def check_regular(path: Path) -> None:
    """Raise DamagedFile if `path` exists but is not a file, because opening a FIFO would block until a writer opens
    it."""
    if path.exists() and not path.is_file():
        raise DamagedFile(f"{path} is a folder, FIFO, socket or device, not a file: remove it")


def refuse_file(out: Path, remedy: str = "Choose another --out") -> None:
    """Raise ValueError if `out` or one of its parents exists but is not a folder."""
    there = next((part for part in (out, *out.parents) if os.path.lexists(part)), None)
    if there is not None and not there.is_dir():
        kind = "a file" if there.is_file() else "a FIFO, socket, device or broken link"
        raise ValueError(f"{there} is {kind}, so {'it' if there == out else out} cannot be a folder. {remedy}")


def refuse_irreplaceable(out: Path) -> None:
    """Raise ValueError if a complete folder cannot take the place of `out`, such as a mount point."""
    if out.is_dir() and (os.path.ismount(out) or Path.cwd().is_relative_to(out.resolve())):
        kind = "a mount point" if os.path.ismount(out) else "the current folder or contains it"
        raise ValueError(f"{out} cannot be replaced, because it is {kind}: choose a new folder in it")


def refuse_taken(out: Path, is_file: bool = False, remedy: str = "choose another --out") -> None:
    """Raise ValueError if the output file or folder already exists. An output folder may exist if it is empty."""
    if is_file and os.path.lexists(out):
        raise ValueError(f"{out} already exists: {remedy}")
    refuse_file(out.parent if is_file else out)
    if not is_file and out.exists() and contents(out):
        raise ValueError(f"{out} already exists: {remedy}")


def read_json(path: Path) -> Any:
    """Load the JSON value in `path`.

    Raises:
        DamagedFile: if the file does not exist or is not JSON.
    """
    check_regular(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFile(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DamagedFile(f"{path} is a folder, not a file") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFile(f"{path} is not readable JSON ({error})") from None


def read_sealed(path: Path) -> dict[str, Any]:
    """Load the JSON object that `write_sealed` wrote to `path`.

    Raises:
        DamagedFile: if the file does not exist, is not a sealed object or was altered.
    """
    return unsealed(read_json(path), path)


def unsealed(data: Any, path: Path) -> dict[str, Any]:
    """Return the entries of a sealed JSON object that was read from `path`.

    Raises:
        DamagedFile: if the seal is missing or does not match the entries.
    """
    if not isinstance(data, dict) or SEAL not in data:
        raise DamagedFile(
            f"{path} has no sha256 of its content: it was altered, or an earlier version of halfstep wrote it"
        )
    held = {name: value for name, value in data.items() if name != SEAL}
    if data[SEAL] != json_digest(held):
        raise DamagedFile(f"{path} was altered: its content does not match its sha256")
    return held


def check_files(folder: Path, digests: Mapping[str, str], said_by: Path | None = None) -> None:
    """Raise DamagedFile for the first file of `digests` that is missing in `folder` or has a different sha256.

    Args:
        said_by: the file that contains the digests, or None for manifest.json.
    """
    holder = "manifest.json" if said_by is None else said_by.name
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            raise DamagedFile(f"{path} is missing")
        if sha256_of(path) != digest:
            raise DamagedFile(f"{path} is truncated or altered: its sha256 differs from the one in {holder}")


def cache_folder() -> Path:
    """Return the folder for files that can be recreated: $HALFSTEP_CACHE, or ~/.cache/halfstep.

    Raises:
        ValueError: if the home folder that the path starts with is unknown.
    """
    # No shell expands the ~ of a variable that a container or a unit file sets.
    return user_path(os.environ.get("HALFSTEP_CACHE") or "~/.cache/halfstep")


def user_path(text: str | Path) -> Path:
    """Expand ~ to the user's home folder.

    Raises:
        ValueError: if the home folder is unknown.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        # The user has no entry in the user database, as in many containers.
        named = str(text).partition("/")[0]
        raise ValueError(
            f"{printable(str(text))}: the home folder of {named} is unknown. Write the path in full, or set "
            f"{'HOME or HALFSTEP_CACHE' if named == '~' else 'HOME'}"
        ) from None
