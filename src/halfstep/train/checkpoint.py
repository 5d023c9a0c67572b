"""Checkpoints of an unfinished stage: whole or absent, checked before use, safetensors only.

A checkpoint is written into a temporary folder, synced to the disk and renamed. The one before it is removed only after
the new one has been read back and found right, so at any moment a good one exists.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from halfstep.runs import (
    DamagedFile,
    StageFolder,
    check_files,
    read_json,
    sha256_of,
    write_folder,
    write_json,
)
from halfstep.train.engine import StageTrainer, State
from halfstep.train.tensors import read_tensors, write_tensors

KEPT = 2
"""Checkpoints of a stage that are kept: the latest, and the one before it."""


def save_checkpoint(trainer: StageTrainer, folder: StageFolder) -> Path:
    """The checkpoint of the trainer's present state, for which every process must ask; older ones beyond `KEPT` are
    pruned after it was verified."""
    path = folder.path / f"checkpoint-{trainer.update:08d}"
    state = trainer.state()
    trainer.processes.on_main(lambda: _write(trainer, state, folder, path))
    return path


def _write(trainer: StageTrainer, state: State, folder: StageFolder, path: Path) -> None:
    def write(into: Path) -> None:
        for part, tensors in state.items():
            write_tensors(tensors, into / f"{part}.safetensors")
        digests = {file.name: sha256_of(file) for file in sorted(into.iterdir())}
        write_json(
            into / "manifest.json",
            {"stage": trainer.stream, "update": trainer.update, "seconds": trainer.seconds, "files": digests},
        )

    write_folder(path, write)
    check_files(path, read_json(path / "manifest.json")["files"])
    for old in folder.checkpoints()[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def resume(trainer: StageTrainer, folder: StageFolder, notice: Callable[[str], None]) -> int:
    """Puts the trainer into the state of the latest good checkpoint and returns its update; 0 if there is none.

    A damaged checkpoint is named through `notice`, set aside under the name `damaged-...`, and the one before it used.
    """
    found = trainer.processes.on_main(lambda: _latest_good(folder, notice))
    if found is None:
        return 0
    path = folder.path / found
    manifest = read_json(path / "manifest.json")
    state = {name.removesuffix(".safetensors"): read_tensors(path / name) for name in manifest["files"]}
    trainer.load_state(state, int(manifest["update"]), float(manifest["seconds"]))
    return trainer.update


def _latest_good(folder: StageFolder, notice: Callable[[str], None]) -> str | None:
    """Name of the latest checkpoint whose files are whole; those after it are set aside."""
    for path in folder.checkpoints():
        try:
            manifest = read_json(path / "manifest.json")
            if not isinstance(manifest, dict) or not {"update", "seconds", "files"} <= manifest.keys():
                raise DamagedFile(f"{path / 'manifest.json'} is not a checkpoint's manifest")
            check_files(path, manifest["files"])
        except DamagedFile as error:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            notice(f"{error}; using the checkpoint before it")
            continue
        return path.name
    return None


def remove_checkpoints(folder: StageFolder) -> None:
    """Removes the checkpoints of a stage that is complete."""
    for path in [*folder.path.glob("checkpoint-*"), *folder.path.glob("damaged-checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.path.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
