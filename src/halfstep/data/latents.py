"""Folders of latents and text conditions, which `encoding.py` writes for captioned images, captioned clips and prompts.

In this module, "images" includes clips (videos or sounds).

FOLDER/
  index.json                  `Index`: the encoder, the images, and the sha256 of each file below
  null.safetensors            the conditions of the empty caption, without the batch axis
  shard-00000.safetensors     latents [n, *dims] and conditions [n, ...] of the first images
  shard-00001.safetensors     the same for the next images, and so on

Tensors are stored in the encoder's dtype. When they are read, floats are converted to float32.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from halfstep.data.base import Data, check_indices
from halfstep.objectives.base import Batch
from halfstep.runs.record import Record, problem_of
from halfstep.runtime.files import DamagedFile, read_json, sha256_of, user_path

FORMAT: Final = 1
"""The format version. Folders with any other version are rejected."""
INDEX: Final = "index.json"
NULL: Final = "null.safetensors"
LATENTS: Final = "latents"
CLASSES: Final = "class_labels"


class Entry(Record):
    """A tensor that is stored for each sample."""

    shape: tuple[int, ...]
    """The shape for one sample."""
    dtype: str
    """The name of the torch dtype in which the tensor is stored."""


class Stored(Record):
    """A file that has been written."""

    sha256: str
    size: int
    """The size of the file in bytes."""


class Origin(Record):
    """The encoded images, identified independently of the machine and the folder."""

    count: int
    names: str
    """The sha256 of the images' relative paths, in order."""
    contents: str
    """One sha256 over the size and the sha256 digest of each file, in order."""
    captions: str
    """The sha256 of the captions, in order."""
    preparation: dict[str, Any]
    """The fields of the images' `Preparation`. For latents that a model sampled from prompts, "sampled" is True, and
    "guidance_scale" is as in `Prompts`."""


class Index(Record):
    """index.json: the planned content of the folder, and the files written so far."""

    format: int = FORMAT
    encoder: str
    """The encoder's key."""
    images: Origin
    shard_size: int
    class_names: tuple[str, ...] = ()
    """The names of the classes, if any. The captions are then these names, and the condition is `class_labels`."""
    tensors: dict[str, Entry] = Field(default={})
    """Latents and conditions, keyed by name; empty until the first batch is encoded."""
    null: Stored | None = None
    shards: tuple[Stored | None, ...]

    def places(self, number: int) -> range:
        """Return the indices of the images in a shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.images.count))


@final
@dataclass(frozen=True, eq=False)
class LatentData(Data):
    """The samples of a complete folder, read from memory-mapped shards.

    In a batch, the latents are `x0` and the conditions are `cond`.
    """

    source: str
    index: Index
    null: Mapping[str, Tensor]
    """The conditions of the empty caption, in the form that `fetch` returns, but without the batch axis."""
    class_names: tuple[str, ...] = ()
    is_image: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.tensors[LATENTS].shape

    @cached_property
    def fingerprint(self) -> str:
        return digest_of([self.index.model_dump(mode="json", include={"format", "tensors", "null", "shards"})])

    @property
    def is_sampled(self) -> bool:
        """Whether the latents are samples of a model instead of encoded images."""
        return bool(self.index.images.preparation.get("sampled"))

    @property
    def guidance_scale(self) -> float | None:
        """The guidance scale of sampled latents, or None if they were not sampled or the model cannot be guided."""
        return self.index.images.preparation.get("guidance_scale")

    def __len__(self) -> int:
        return self.index.images.count

    def without_classes(self) -> "LatentData":
        """Return the same latents without their classes. Other conditions are kept."""
        tensors = {name: entry for name, entry in self.index.tensors.items() if name != CLASSES}
        null = {name: value for name, value in self.null.items() if name != CLASSES}
        return LatentData(self.source, self.index.model_copy(update={"tensors": tensors}), null)

    def fetch(self, indices: Tensor) -> Batch:
        check_indices(self, indices)
        found = {
            name: torch.empty(len(indices), *entry.shape, dtype=_read_as(getattr(torch, entry.dtype)))
            for name, entry in self.index.tensors.items()
        }
        shards = indices // self.index.shard_size
        for number in shards.unique().tolist():
            places = (shards == number).nonzero()[:, 0]
            rows = indices[places] % self.index.shard_size
            path = user_path(self.source) / shard_name(number)
            try:
                # Opening a shard takes microseconds, and keeping all shards open could exceed the open-file limit.
                with safe_open(path, "pt") as file:
                    for name, value in found.items():
                        value[places] = file.get_tensor(name)[rows].to(value.dtype)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, self.source) from error
        return Batch(found.pop(LATENTS), found)


def is_latents(path: Path) -> bool:
    """Return whether a folder was written by `encode`."""
    return (path / INDEX).is_file() and ((path / NULL).is_file() or (path / shard_name(0)).is_file())


def open_latents(folder: Path) -> LatentData:
    """Open a folder that `encode` has completed. The shards' sizes are checked, but not their contents.

    Raises:
        ValueError: if the folder is missing or incomplete, or has a different format.
        DamagedFile: if a file is missing or its size has changed.
    """
    root = user_path(folder)
    if not (root / INDEX).is_file():
        raise ValueError(f"{folder} contains no latents (it has no {INDEX}): pass a folder written by halfstep encode")
    index = read_index(root)
    if index.null is None or None in index.shards:
        written = sum(shard is not None for shard in index.shards)
        raise ValueError(
            f"{folder} is incomplete ({written} of {len(index.shards)} shards): encode the same images into it "
            f"again to resume"
        )
    for number, stored in enumerate(index.shards):
        if not _has_size(root / shard_name(number), stored):
            raise _damaged(root / shard_name(number), str(folder))
    if not is_intact(root / NULL, index.null):
        raise _damaged(root / NULL, str(folder))
    null = {name: value.to(_read_as(value.dtype)) for name, value in load((root / NULL).read_bytes()).items()}
    return LatentData(str(folder), index, null, index.class_names)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def digest_of(values: Iterable[Any]) -> str:
    """Return the sha256 of a sequence of JSON values."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


def _read_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to which a stored tensor is converted on reading."""
    return torch.float32 if dtype.is_floating_point else dtype


def _has_size(path: Path, stored: Stored | None) -> bool:
    return stored is not None and path.is_file() and path.stat().st_size == stored.size


def is_intact(path: Path, stored: Stored | None) -> bool:
    """Return whether a file was recorded and has not changed since then."""
    return stored is not None and _has_size(path, stored) and sha256_of(path) == stored.sha256


def read_index(root: Path) -> Index:
    """Load a folder's index; raise ValueError if it is damaged or has a different format."""
    path = root / INDEX
    remedy = "delete the folder and encode again"
    try:
        data = read_json(path)
    except DamagedFile as error:
        raise DamagedFile(f"{error}: {remedy}") from None
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {data.get('format')}, but this version of halfstep reads format {FORMAT}: {remedy}"
        )
    try:
        return Index.model_validate(data)
    except ValidationError as error:
        raise DamagedFile(f"{path} is not an index of latents ({problem_of(error)}): {remedy}") from None


def _damaged(path: Path, folder: str) -> DamagedFile:
    return DamagedFile(
        f"{path} is missing or altered: encode the same images into {folder} again, which rewrites only this file"
    )
