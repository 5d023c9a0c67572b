"""A folder of images: any formats, any sizes, sub-folders as classes."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch

from halfstep.data.base import Data
from halfstep.data.images import EncodedImages, Preparation, decoded

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@final
@dataclass(frozen=True)
class _Files(EncodedImages):
    folder: Path
    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        return [self.paths[index] for index in indices]

    def sizes(self) -> Iterator[tuple[str, int]]:
        for path in self.paths:
            yield path.relative_to(self.folder).as_posix(), path.stat().st_size


def image_paths(folder: Path) -> list[Path]:
    """All image files under a folder, hidden ones left out, in the order of their names."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    return sorted(found)


def image_folder(
    folder: Path, source: str, prepare: Preparation, labels: bool, limit: int | None, max_bytes: int
) -> Data:
    """The images of a folder; each sub-folder is a class if every image lies in one and there are at least two.

    Raises:
        ValueError: if there are no images, one cannot be read, or they differ in channels or size.
    """
    paths = image_paths(folder)
    if not paths:
        raise ValueError(f"{source} holds no images: looked for {', '.join(SUFFIXES)} in it and its sub-folders")
    parts = [path.relative_to(folder).parts for path in paths]
    names: tuple[str, ...] = ()
    if labels and all(len(part) == 2 for part in parts):
        names = tuple(sorted({part[0] for part in parts}))
    if len(names) < 2:
        names = ()
    if limit is not None and names:
        # The files are sorted by class; a part of them is taken from all classes alike.
        order = sorted(range(len(paths)), key=lambda i: (parts[i][1], parts[i][0]))[:limit]
        paths, parts = [paths[i] for i in order], [parts[i] for i in order]
    paths, parts = paths[:limit], parts[:limit]
    indices = torch.tensor([names.index(part[0]) for part in parts]) if names else None
    return decoded(source, _Files(folder, tuple(paths)), indices, names, prepare, max_bytes)
