"""Handles disks and mounts that become full or unavailable during a run."""

import errno
import os
from pathlib import Path
from typing import Final

from halfstep.runtime.files import DamagedFile
from halfstep.runtime.locks import InUse

FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The error numbers for full disks."""
GONE: Final = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENODEV, errno.ETIMEDOUT)
"""The error numbers for lost disks and network mounts."""
LOST: Final = (errno.EROFS, errno.ENXIO, errno.ENOENT, errno.EACCES)
"""Additional error numbers for a disk that is lost during a run. At the start of a run, they indicate bad input."""
TAKEN: Final = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST)
"""The error numbers for a folder where a file is expected, or vice versa."""


class NoStorage(OSError):
    """The disk of the run folder is full or gone, so the run cannot continue. The message contains the path of the
    last good checkpoint or stage, if any."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error.

    This is 2 for bad input, 3 for a disk that is full or gone, 75 for a folder that another process is writing to, and
    1 for any other error.
    """
    if isinstance(error, NoStorage) or (isinstance(error, OSError) and error.errno in (*FULL, *GONE)):
        return 3
    if isinstance(error, InUse):
        # This is EX_TEMPFAIL of sysexits.h, which means that a later attempt may succeed.
        return 75
    return 2 if isinstance(error, ValueError | OSError) else 1


def last_good(last: Path | None) -> str:
    """Return a description of the latest good checkpoint or complete stage."""
    if last is None:
        return "no checkpoint has been written yet"
    kind = "good checkpoint" if last.name.startswith("checkpoint-") else "complete stage"
    return f"the last {kind} is {last}"


def _is_within(file: str, folder: Path) -> bool:
    """Return whether a file is in a folder, even if a library reported its resolved path."""
    if Path(file).is_relative_to(folder):
        return True
    try:
        return Path(file).is_relative_to(os.path.realpath(folder))
    except OSError:
        # The working folder is gone.
        return False


def no_storage(error: OSError, path: Path, last: Path | None, has_begun: bool = True) -> Exception:
    """Return NoStorage with the last good state if the run folder caused the error, otherwise the error itself.

    If a folder was found where a file is expected, or vice versa, return DamagedFile. No file of the run folder is
    read, because it may be gone.

    Args:
        has_begun: whether this process has already written to the run folder.
    """
    within = error.filename is not None and _is_within(os.fsdecode(error.filename), path)
    if within and error.errno in TAKEN:
        return DamagedFile(
            f"{os.fsdecode(error.filename)} cannot be used ({error.strerror}): something else has that name. Remove it "
            "and run the same command again"
        )
    if error.errno in FULL:
        full = path if within or error.filename is None else os.fsdecode(error.filename)
        what, then = f"no space left for {full}", "free some space"
    elif (within or error.filename is None) and error.errno in ((*GONE, *LOST) if has_begun else GONE):
        what, then = f"{path} can no longer be written or read ({error.strerror})", "restore it"
    else:
        return error
    return NoStorage(error.errno, f"{what}: {last_good(last)}; {then} and run the same command again")
