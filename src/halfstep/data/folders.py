"""Data from folders of image files, which may have sub-folders for splits and classes."""

import contextlib
import errno
import itertools
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, final

import numpy as np
import torch

from halfstep.core.warnings import HalfstepWarning
from halfstep.data.images import EncodedImages, Labelled
from halfstep.data.labels import check_not_identifiers, classes_of
from halfstep.runtime.files import read_json
from halfstep.runtime.storage import GONE

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
VIDEO_SUFFIXES: Final = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi", ".gif")
SOUND_SUFFIXES: Final = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a")
_BESIDE: Final = (
    *(".txt", ".json", ".jsonl", ".csv", ".tsv", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf"),
    *(".py", ".sh", ".log", ".db", ".ini", ".npy", ".npz", ".parquet", ".arrow", ".safetensors"),
)
"""Suffixes of files that often accompany images and are skipped silently."""
_SPLITS: Final = frozenset({"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"})
"""Names of sub-folders that contain a split, not a class."""
_LABELS: Final = "dataset.json"
"""The label file of the EDM and StyleGAN format, {"labels": [[path, class], ...]}. If this file exists, the sub-folders
are shards."""


@final
@dataclass(frozen=True)
class Files(EncodedImages):
    """Image files, given by their paths relative to `root`."""

    root: Path
    paths: tuple[PurePath, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        return [self.root / self.paths[index] for index in indices]

    def missing(self) -> Sequence[int]:
        return ()

    def subset(self, indices: Sequence[int]) -> "Files":
        return Files(self.root, tuple(self.paths[index] for index in indices))

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((path.as_posix(), (self.root / path).stat().st_size) for path in self.paths)


def image_paths(root: Path, files: Sequence[PurePath]) -> list[PurePath]:
    """Return the files with an image suffix; warn about other files that may be images.

    Raises:
        ValueError: if there are no images.
    """
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path.suffix.lower() for path in files if path.suffix.lower() not in (*IMAGE_SUFFIXES, *_BESIDE)]
    counts = sorted(Counter(others).items(), key=lambda item: (-item[1], item[0] == "", item[0]))
    shown = ", ".join(f"{count:,} {suffix or 'without a suffix'}" for suffix, count in counts[:5])
    if not images:
        raise no_images(root, f"; it contains these other files: {shown}" if shown else "")
    if shown:
        warnings.warn(
            f"files in {root} without an image suffix are skipped ({len(others):,} in total: {shown}); rename or "
            "convert those that are images",
            HalfstepWarning,
            stacklevel=2,
        )
    return images


def no_images(root: Path, others: str = "") -> ValueError:
    """Return the error for a folder without images."""
    return ValueError(
        f"{root} contains no images: no file in it or its sub-folders ends in {' '.join(IMAGE_SUFFIXES)}{others}"
    )


def has_folder(root: Path, name: str) -> bool:
    """Return whether a folder contains a folder with exactly this name, also if the file system ignores case."""
    return any(entry.name == name and entry.is_dir() for entry in root.iterdir())


def image_folder(root: Path, paths: Sequence[PurePath], split: str, labels: bool, limit: int | None) -> Labelled:
    """Return the image files at the sorted `paths` below `root`, or only those in the sub-folder `split` if it exists.

    The classes are taken from dataset.json if it exists. Otherwise, if all images are in two or more sub-folders, each
    sub-folder is a class, and `limit` is balanced across the classes. Without classes, `limit` keeps the first files.
    If the folder has no sub-folder called train, the split "train" is the whole folder.

    Raises:
        ValueError: if there are no images, if the sub-folder `split` does not exist or could also be a class, or if
            dataset.json does not match the files.
    """
    tops = {path.parts[0] for path in paths if len(path.parts) > 1}
    if has_folder(root, split):
        if others := sorted(tops - _SPLITS - {split}):
            raise ValueError(
                f"{root} has the sub-folders {split} and {others[0]}, so {split} may be a split or a class: use "
                f"{root / split} as the data folder, or rename {split} if it is a class"
            )
        root, paths = root / split, [path.relative_to(split) for path in paths if path.parts[0] == split]
    elif split != "train":
        raise ValueError(f"{root} has no sub-folder {split!r}: add it, or use --data.split train")
    elif labels and tops and tops <= _SPLITS and all(len(path.parts) > 1 for path in paths):
        raise ValueError(
            f"{root} has no sub-folder train, but {', '.join(sorted(tops))}: choose one of these with --data.split, or "
            "use all of them, without classes, with --data.no-labels"
        )
    if not paths:
        raise no_images(root)
    if labels and (root / _LABELS).is_file():
        return _listed(root, paths, limit)
    names = tuple(sorted({path.parts[0] for path in paths}))
    if not labels or len(names) < 2 or any(len(path.parts) != 2 for path in paths):
        return Labelled(Files(root, tuple(paths[:limit])))
    check_not_identifiers(f"{root}, with a sub-folder for each class,", len(names), len(paths))
    if all(re.fullmatch(r"\d{4,}", name) for name in names):
        warnings.warn(
            f"the sub-folders {names[0]}, {names[1]}, ... of {root} are used as classes: add --data.no-labels if they "
            "are shards",
            HalfstepWarning,
            stacklevel=2,
        )
    classes = [list(group) for _, group in itertools.groupby(paths, key=lambda path: path.parts[0])]
    # The first image of each class, then the second image of each class, and so on.
    in_turn = [path for row in itertools.zip_longest(*classes) for path in row if path is not None]
    paths = sorted(in_turn[:limit], key=lambda path: path.parts)
    numbers = {name: number for number, name in enumerate(names)}
    return Labelled(Files(root, tuple(paths)), torch.tensor([numbers[path.parts[0]] for path in paths]), names)


def _listed(root: Path, paths: Sequence[PurePath], limit: int | None) -> Labelled:
    """Return the images with their classes from dataset.json, or without classes if the file contains none."""
    file = root / _LABELS
    held = read_json(file)
    rows = held.get("labels") if isinstance(held, dict) else None
    if rows is None:
        return Labelled(Files(root, tuple(paths[:limit])))
    remedy = "repair it, or use --data.no-labels"
    try:
        known = {str(name): label for name, label in rows}
        listed = np.array([known[path.as_posix()] for path in paths])
    except KeyError as error:
        raise ValueError(f"{file} has no label for {error.args[0]}: {remedy}") from None
    except (TypeError, ValueError):
        raise ValueError(f"{file} does not contain one [path, class] pair per image: {remedy}") from None
    labels, names = classes_of(str(file), listed, len(paths))
    return Labelled(Files(root, tuple(paths[:limit])), labels[:limit], names)


def changed_since(source: str, moment: float) -> list[Path]:
    """Return the files of a local source (a file or a folder) that changed after `moment`, a value of `time.time()`."""
    root = Path(source).expanduser()
    paths = [root / path for path in files_below(root)] if root.is_dir() else [root]
    found = []
    for path in paths:
        with contextlib.suppress(OSError):
            state = path.stat()
            if max(state.st_mtime, state.st_ctime) > moment:
                found.append(path)
    return found


def files_below(root: Path, first: str = "") -> list[PurePath]:
    """Return the sorted files below `root`, except hidden files, files in `lost+found`, and files in run folders, such
    as generated samples.

    Symbolic links to folders are followed, but each folder is visited only once. A folder that is removed during the
    search counts as empty.

    Args:
        first: the sub-folder of `root` to visit before all others. It is complete even if it and another sub-folder
            are links to the same folder.

    Raises:
        ValueError: if a folder cannot be read.
        OSError: if the disk is gone.
    """

    def unread(error: OSError) -> None:
        folder = os.fsdecode(error.filename)
        if error.errno == errno.ENOENT and folder != str(root):
            return
        if error.errno in GONE:
            raise error
        raise ValueError(f"{folder} cannot be read ({error.strerror}). Make it readable, or move it out of the data")

    found: list[PurePath] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=unread):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if folder != str(root) and "recipe.json" in names and "stages" in folders:
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "lost+found")
        if folder == str(root) and first in folders:
            folders.remove(first)
            folders.insert(0, first)
        found += [Path(folder, name).relative_to(root) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)
