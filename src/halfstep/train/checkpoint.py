"""Checkpoints of an unfinished stage, which are written atomically, verified before use, and stored as safetensors.

A checkpoint is written to a temporary folder, synced to disk, read back, compared with the state in memory, and then
renamed. Older checkpoints are removed only after that, so a good checkpoint always exists. All this happens in a
background thread. Training pauses only to copy the state and, if necessary, to wait for the previous checkpoint.
"""

import contextlib
import errno
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, final

from halfstep.runs import StageFolder
from halfstep.runtime.files import (
    DamagedFile,
    check_files,
    read_json,
    read_sealed,
    remove,
    replacing_folder,
    write_sealed,
)
from halfstep.runtime.processes import Processes
from halfstep.runtime.tensors import read_tensors, write_tensors
from halfstep.train.engine import StageTrainer, State

KEPT: Final = 2
"""The number of checkpoints to keep per stage: the latest one and the one before it."""


@final
class CheckpointWriter:
    """A background writer for a stage's checkpoints on rank 0. All ranks must call `save` and `wait`.

    Checkpoints are written one at a time. `last` is the latest good checkpoint, which was either written and verified
    or used to resume.
    """

    def __init__(self, folder: StageFolder, run: str, processes: Processes) -> None:
        self.folder, self.run, self._processes = folder, run, processes
        self.last: Path | None = None
        # The thread is not a daemon, so a process that ends with an error still completes the checkpoint it started.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="halfstep-checkpoint")
        self._begun: Future[Path] | None = None

    def save(self, trainer: StageTrainer) -> float:
        """Start writing the trainer's current state, and return how many seconds training had to wait.

        Raises:
            OSError, DamagedFile: if the previous checkpoint could not be written.
        """
        begun = time.perf_counter()
        self.wait()
        state = trainer.state()
        if self._processes.is_main:
            about = {
                "run": self.run,
                "stage": trainer.stream,
                "update": trainer.update,
                "seconds": trainer.seconds,
                "micro_batch": trainer.micro_batch if trainer.micro_batch_found else None,
            }
            # The stage's folder is created here, right after the run has checked the run folder. The thread must not
            # recreate a folder that has been lost.
            self.folder.path.mkdir(parents=True, exist_ok=True)
            self._begun = self._thread.submit(write_checkpoint, state, about, self.folder)
        return time.perf_counter() - begun

    def check(self) -> None:
        """Raise the error of a finished write, without waiting. With several processes, `save` or `wait` raises it
        instead."""
        if self._processes.count == 1 and self._begun is not None and self._begun.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if any, is complete.

        Raises:
            OSError, DamagedFile: if the checkpoint could not be written.
        """
        name = self._processes.on_main(self._written)
        if name is not None:
            self.last = self.folder.path / name

    def _written(self) -> str | None:
        begun, self._begun = self._begun, None
        return None if begun is None else begun.result().name

    def close(self) -> None:
        """Finish writing, ignoring errors, and end the thread."""
        self._thread.shutdown(wait=True)
        if self._begun is not None and self._begun.exception() is None:
            self.last = self._begun.result()
        self._begun = None


def write_checkpoint(state: State, about: dict[str, Any], folder: StageFolder) -> Path:
    """Write and verify a checkpoint of the state, remove checkpoints beyond `KEPT`, and return the new folder.

    Args:
        about: the fields of the manifest except the files; "update" determines the checkpoint's name.

    Raises:
        OSError: if the disk is full or no longer available.
        DamagedFile: if the data read back differs from the data written; the previous checkpoints are kept.
    """
    if not folder.path.is_dir():
        raise OSError(errno.ESTALE, "the run folder no longer exists", str(folder.path))
    path = folder.path / _name(about["update"])

    with replacing_folder(path) as into:
        names = {f"{part}.safetensors": tensors for part, tensors in state.items()}
        files = {name: write_tensors(into / name, tensors) for name, tensors in names.items()}
        write_sealed(into / "manifest.json", about | {"files": files})
    for old in folder.checkpoints()[KEPT:]:
        remove(old)
    return path


def _name(update: int) -> str:
    return f"checkpoint-{update:08d}"


def resume(trainer: StageTrainer, folder: StageFolder, run: str, notice: Callable[[str], None]) -> Path | None:
    """Restore the trainer from the latest good checkpoint and return its path, or None if no good checkpoint exists.

    If a checkpoint is corrupt or unreadable, or belongs to another run, stage or update, this function reports it
    through `notice`, renames it to `damaged-...`, and falls back to the previous checkpoint.

    Raises:
        OSError: if checkpoints exist, but none of them can be read from the disk.
    """
    origin = {"run": run, "stage": trainer.stream}
    found: str | None = trainer.processes.on_main(lambda: _latest_good(folder, origin, notice))
    if found is None:
        return None
    path = folder.path / found
    manifest = read_sealed(path / "manifest.json")
    state = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in manifest["files"]}
    trainer.load_state(state, int(manifest["update"]), float(manifest["seconds"]))
    return path


def _latest_good(folder: StageFolder, origin: dict[str, str], notice: Callable[[str], None]) -> str | None:
    """Return the name of the latest intact checkpoint with this origin, and set all later checkpoints aside."""
    unread: list[tuple[Path, OSError]] = []
    held = folder.checkpoints()
    for path in held:
        try:
            manifest = read_sealed(path / "manifest.json")
            if not {"update", "seconds", "files"} <= manifest.keys():
                raise DamagedFile(f"{path / 'manifest.json'} is not the manifest of a checkpoint")
            if {name: manifest.get(name) for name in origin} != origin or _name(manifest["update"]) != path.name:
                raise DamagedFile(f"{path} belongs to another run, stage or update: it was moved or copied here")
            check_files(path, manifest["files"])
        except DamagedFile as error:
            _set_aside(path)
            last = path == held[-1] and not unread
            then = "no other checkpoint exists, so the stage restarts" if last else "using the previous checkpoint"
            notice(f"{error}; {then}")
            continue
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            unread.append((path, error))
            continue
        for lost, why in unread:
            _set_aside(lost)
            notice(f"{lost} cannot be read ({why.strerror}); using the previous checkpoint")
        return path.name
    if unread:
        # A restarted stage would eventually remove files that might still be recoverable from the disk.
        raise unread[0][1]
    return None


def _set_aside(checkpoint: Path) -> None:
    """Rename a checkpoint so that it is never used to resume, but is kept until the stage is complete."""
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    remove(aside)
    # If a failing disk refuses the rename, the previous checkpoint is still used.
    with contextlib.suppress(OSError):
        checkpoint.rename(aside)


def micro_batch_of(checkpoint: Path | None) -> int | None:
    """Return the micro batch size that the checkpoint's run found to fit, or None if the run did not search for one."""
    return None if checkpoint is None else read_json(checkpoint / "manifest.json").get("micro_batch")


def remove_checkpoints(folder: StageFolder) -> None:
    """Remove the checkpoints of a complete stage."""
    for path in [*folder.path.glob("checkpoint-*"), *folder.path.glob("damaged-checkpoint-*")]:
        remove(path)
