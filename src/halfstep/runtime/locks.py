"""File locks, which keep other processes from writing to the same folder."""

import errno
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

_UNSUPPORTED: Final = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class InUse(ValueError):
    """Another process is writing to the folder."""


def lock_of(folder: Path, name: str = ".lock") -> FileLock:
    """Return the lock of a folder, which the operating system releases when the process ends for any reason.

    On a file system without such locks, filelock would otherwise create a marker file, which remains after a kill.
    """
    return FileLock(folder / name, fallback_to_soft=False)


def acquire(lock: FileLock, busy: str) -> None:
    """Acquire a lock without waiting.

    Raises:
        InUse: if another process holds the lock; the message is `busy`.
        ValueError: if the file system has no locks.
    """
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(busy) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        folder = Path(lock.lock_file).parent
        raise ValueError(
            f"the file system of {folder} does not support file locks ({error.strerror}): choose a folder on another "
            "disk, or have locks enabled (Lustre: mount option flock)"
        ) from None
