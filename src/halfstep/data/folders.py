"""Data from folders of image files: any formats and sizes, with sub-folders for splits and for classes."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Final, final

import torch

from halfstep.data.images import EncodedImages, Labelled

IMAGE_SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@final
@dataclass(frozen=True)
class Files(EncodedImages):
    """Image files by their paths below `root`."""

    root: Path
    paths: tuple[PurePath, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.root / self.paths[index])

    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        return [self.root / self.paths[index] for index in indices]

    def sizes(self) -> Iterator[tuple[str, int]]:
        return ((path.as_posix(), (self.root / path).stat().st_size) for path in self.paths)


def image_folder(root: Path, paths: Sequence[PurePath], split: str, labels: bool, limit: int | None) -> Labelled:
    """Return the image files at the sorted `paths` below `root`, or those in its sub-folder `split` if there is one.

    If each image lies in one of two or more sub-folders, their names are the classes and `limit` is balanced across
    them; otherwise it takes the first by name.

    Raises:
        ValueError: if there are no images, or no sub-folder `split`; "train" without one is the whole folder.
    """
    if (root / split).is_dir():
        root, paths = root / split, [path.relative_to(split) for path in paths if path.parts[0] == split]
    elif split != "train":
        raise ValueError(f"{root} has no sub-folder {split!r}: without one there is only --data.split train")
    if not paths:
        raise ValueError(f"{root} holds no images: it and its sub-folders have no file {' '.join(IMAGE_SUFFIXES)}")
    names = tuple(sorted({path.parts[0] for path in paths}))
    if not labels or len(names) < 2 or any(len(path.parts) != 2 for path in paths):
        return Labelled(Files(root, tuple(paths[:limit])))
    classes = [list(group) for _, group in itertools.groupby(paths, key=lambda path: path.parts[0])]
    # The first of each class, then the second of each, and so on.
    in_turn = [path for row in itertools.zip_longest(*classes) for path in row if path is not None]
    paths = sorted(in_turn[:limit], key=lambda path: path.parts)
    numbers = {name: number for number, name in enumerate(names)}
    return Labelled(Files(root, tuple(paths)), torch.tensor([numbers[path.parts[0]] for path in paths]), names)


def files_below(root: Path) -> list[PurePath]:
    """Return the files below `root`, sorted, without hidden ones; follows links to folders, each folder once."""
    found: list[PurePath] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name).relative_to(root) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)
