"""Latents and text conditions of captioned images and clips, encoded once into a folder and then read from it.

"Images" includes clips below: videos and sounds.

FOLDER/
  index.json                  `Index`: the encoder, the images, and a sha256 of each file below
  null.safetensors            the conditions of the empty caption, one sample without the batch axis
  shard-00000.safetensors     latents [n, *dims] and each condition [n, ...] of the first `shard_size`
  shard-00001.safetensors     images; and so on, in the order of the images

The encoders are callables, independent of the libraries that provide them. Tensors are stored in the dtype of the
encoder; floats are read as float32.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from halfstep.data.base import Data
from halfstep.data.captions import CaptionedImages, Prompts
from halfstep.data.clips import CaptionedClips
from halfstep.objectives.base import Batch
from halfstep.runtime.files import DamagedFile, InUse, read_json, refuse_file, sha256_of, sweep, user_path, write_json
from halfstep.runtime.processes import Processes
from halfstep.runtime.tensors import write_tensors

FORMAT: Final = 1
"""The version of the format; other versions are rejected."""
INDEX: Final = "index.json"
NULL: Final = "null.safetensors"
LATENTS: Final = "latents"


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes images as latents and captions as conditions, on any device."""

    images: Callable[[Tensor], Tensor]
    """float32 images `[n, 3, h, w]`, or clips, in [-1, 1] -> latents `[n, *dims]`, scaled as the network expects."""
    texts: Callable[[list[str]], dict[str, Tensor]]
    """n captions -> the conditions by name, each `[n, ...]` with one shape for all captions."""
    key: str
    """Identifies weights and settings; equal encoders have equal keys."""
    null: Mapping[str, Tensor] | None = None
    """The conditions of one sample without a caption, by name; if None, those of the empty caption."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Record):
    """A tensor stored for each sample."""

    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """Name of the stored torch dtype."""


class Stored(_Record):
    """A written file."""

    sha256: str
    size: int
    """Bytes."""


class Origin(_Record):
    """The encoded images, identified independently of machine and folder."""

    count: int
    names: str
    """The sha256 of their relative paths, in order."""
    contents: str
    """The sha256 of their files' sizes and sha256, in order."""
    captions: str
    """The sha256 of their captions, in order."""
    preparation: dict[str, Any]
    """The fields of their `Preparation`."""


class Index(_Record):
    """index.json: the planned content of the folder, and the files written so far."""

    format: int = FORMAT
    encoder: str
    """Its key."""
    images: Origin
    shard_size: int
    class_names: tuple[str, ...] = ()
    """For images with classes: the captions are these names, and the condition is `class_labels`."""
    tensors: dict[str, Entry] = {}
    """The latents and conditions by name; empty before the first batch is encoded."""
    null: Stored | None = None
    shards: tuple[Stored | None, ...]

    def places(self, number: int) -> range:
        """Return the indices of a shard's images."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.images.count))


@final
@dataclass(frozen=True, eq=False)
class LatentData(Data):
    """The samples of a finished folder, read from memory-mapped shards: latents as x0, conditions as `Batch.cond`."""

    source: str
    index: Index
    null: Mapping[str, Tensor]
    """The conditions of the empty caption, as `fetch` returns them but without the batch axis."""
    class_names: tuple[str, ...] = ()
    is_image: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.tensors[LATENTS].shape

    @cached_property
    def fingerprint(self) -> str:
        return _digest([self.index.model_dump(mode="json", include={"format", "tensors", "null", "shards"})])

    def __len__(self) -> int:
        return self.index.images.count

    def fetch(self, indices: Tensor) -> Batch:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, but indices {indices.tolist()} were requested")
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
                # Opened for each batch, in microseconds, to avoid keeping a file open for every shard.
                with safe_open(path, "pt") as file:
                    for name, value in found.items():
                        value[places] = file.get_tensor(name)[rows].to(value.dtype)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, self.source) from error
        return Batch(found.pop(LATENTS), found)


def is_latents(path: Path) -> bool:
    """Whether a folder was written by `encode`."""
    return (path / INDEX).is_file() and ((path / NULL).is_file() or (path / shard_name(0)).is_file())


def open_latents(folder: Path) -> LatentData:
    """Open a folder that `encode` has finished. File sizes are checked here; only `encode` checks contents.

    Raises:
        ValueError: if the folder is missing, has another format, or is not finished.
        DamagedFile: if a file is missing or its size has changed.
    """
    root = user_path(folder)
    if not (root / INDEX).is_file():
        raise ValueError(f"{folder} contains no latents (no {INDEX}): give a folder written by halfstep encode")
    index = _read_index(root)
    if index.null is None or None in index.shards:
        written = sum(shard is not None for shard in index.shards)
        raise ValueError(
            f"{folder} is not finished ({written} of {len(index.shards)} shards): encode the same images into it "
            f"again, to resume"
        )
    for number, stored in enumerate(index.shards):
        if not _has_size(root / shard_name(number), stored):
            raise _damaged(root / shard_name(number), str(folder))
    if not _is_intact(root / NULL, index.null):
        raise _damaged(root / NULL, str(folder))
    null = {name: value.to(_read_as(value.dtype)) for name, value in load((root / NULL).read_bytes()).items()}
    return LatentData(str(folder), index, null, index.class_names)


def encode(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    folder: Path,
    batch_size: int = 8,
    shard_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
    class_names: Sequence[str] = (),
    processes: Processes | None = None,
) -> LatentData:
    """Encode all images that are not yet encoded in `folder`, and return the latents and conditions of all images.

    Files are written atomically, and a recorded shard is encoded again only if its content has changed. Repeat an
    interrupted call to resume it at the first missing shard. If the encoders are deterministic, the bytes are those of
    an uninterrupted call. No batch crosses a shard boundary.

    Args:
        on_progress: called with the numbers of finished and of all images, at the start and after each batch.
        class_names: for images with classes (`read_classes`), in the order of the encoder's `class_labels`.
        processes: those that share the batches of each shard; only this one if None. Rank 0 writes.

    Raises:
        ValueError: in one line, if `folder` contains other files, or latents of another encoder, other images or
            another shard size; if another process is writing to it; if an image cannot be decoded or is not RGB; or if
            the encoder returns wrong shapes or non-finite values.
        OSError: if the disk is full; the call can then be repeated.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")
    root, lock, processes = user_path(folder), FileLock(user_path(folder) / ".lock"), processes or Processes()

    def begin() -> Index:
        _check_folder(root)
        root.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUse(f"another process is writing to {folder}: wait for it, or give another folder") from None
        sweep(root)
        return _begin(images, encoder, root, shard_size, tuple(class_names))

    try:
        index = processes.on_main(begin)
        report = on_progress or (lambda done, total: None)
        _Encoding(images, encoder, root, batch_size, report, index, processes).run()
    finally:
        lock.release()
    return open_latents(folder)


def shard_name(number: int) -> str:
    """Return a shard's file name."""
    return f"shard-{number:05d}.safetensors"


def _check_folder(root: Path) -> None:
    """Raise ValueError if the folder contains files that `encode` did not write."""
    refuse_file(root, "Give another folder for the latents")
    if root.is_dir() and not (root / INDEX).exists():
        found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        if found:
            raise ValueError(f"{root} contains other files, such as {found[0]}: give a new or empty folder for latents")


def _begin(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    root: Path,
    shard_size: int,
    class_names: tuple[str, ...],
) -> Index:
    """Return the folder's index; write a new one if none exists, or if the existing one has no shards."""
    shards = (None,) * -(-len(images) // shard_size)
    now = Index(
        encoder=encoder.key, images=_origin(images), shard_size=shard_size, class_names=class_names, shards=shards
    )
    index = _read_index(root) if (root / INDEX).exists() else None
    settings = {"encoder", "images", "shard_size", "class_names"}
    if index is None or (
        not any(index.shards) and index.model_dump(include=settings) != now.model_dump(include=settings)
    ):
        _record(root, now)
        return now
    remedy = "give another folder, or delete this one to encode again"
    if index.encoder != encoder.key:
        raise ValueError(f"{root} contains latents of the encoder {index.encoder!r}, not of {encoder.key!r}: {remedy}")
    if index.shard_size != shard_size:
        raise ValueError(
            f"{root} contains shards of {index.shard_size} samples, not of {shard_size}: keep that, or {remedy}"
        )
    if index.images != now.images:
        raise ValueError(
            f"{root} contains latents of images other than {images.source}: {_differs(index.images, now.images)}; "
            f"{remedy}"
        )
    return index


def _differs(then: Origin, now: Origin) -> str:
    """Describe the difference between two sets of images."""
    if then.count != now.count:
        return f"{then.count} then and {now.count} now"
    if then.preparation != now.preparation:
        names = [name for name, value in now.preparation.items() if then.preparation.get(name) != value]
        return ", ".join(f"{name} {then.preparation.get(name)} then and {now.preparation[name]} now" for name in names)
    kinds = {"names": "file names", "contents": "contents of the files", "captions": "captions"}
    return "other " + " and ".join(word for name, word in kinds.items() if getattr(then, name) != getattr(now, name))


def _origin(images: CaptionedImages | CaptionedClips | Prompts) -> Origin:
    """Identify the images; reads all files."""
    if isinstance(images, Prompts):
        return Origin(
            count=len(images), names="", contents="", captions=_digest(images.captions), preparation={"sampled": True}
        )
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(lambda path: [path.stat().st_size, sha256_of(path)], images.contents))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): repeat the command") from error
    return Origin(
        count=len(images),
        names=_digest(path.as_posix() for path in images.files),
        contents=_digest(contents),
        captions=_digest(images.captions),
        preparation=asdict(images.preparation),
    )


def _digest(values: Iterable[Any]) -> str:
    """Return the sha256 of JSON values in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


@final
@dataclass
class _Encoding:
    """Fills a folder, and records each file when it is complete."""

    images: CaptionedImages | CaptionedClips | Prompts
    encoder: Encoder
    root: Path
    batch_size: int
    on_progress: Callable[[int, int], None]
    index: Index
    processes: Processes

    def run(self) -> None:
        self.index, intact = self.processes.on_main(self._begun)
        done = sum(len(self.index.places(number)) for number, whole in enumerate(intact) if whole)
        self.on_progress(done, len(self.images))
        for number, whole in enumerate(intact):
            if not whole:
                done = self._write_shard(number, done)

    def _begun(self) -> tuple[Index, list[bool]]:
        """Return the index, with the conditions of the empty caption, and which shards are intact."""
        if not _is_intact(self.root / NULL, self.index.null):
            self._write_null()
        shards = enumerate(self.index.shards)
        return self.index, [_is_intact(self.root / shard_name(number), shard) for number, shard in shards]

    def _write_null(self) -> None:
        with torch.no_grad():
            null = self.encoder.null
            conditions = self.encoder.texts([""]) if null is None else {name: null[name][None] for name in null}
        if LATENTS in conditions:
            raise ValueError(f"the encoder returned a condition called {LATENTS}: give it another name")
        checked = self._checked(conditions, ["the empty caption"])
        self._record(null=_write(self.root / NULL, {name: value[0] for name, value in checked.items()}))

    def _write_shard(self, number: int, done: int) -> int:
        """Encode a shard; return the number of images encoded so far, which was `done` before."""
        places = self.index.places(number)
        size = self.batch_size
        batches = [range(first, min(first + size, places.stop)) for first in range(places.start, places.stop, size)]

        def encoded(part: range) -> tuple[Tensor, ...]:
            tensors = self._encode(part)
            self.on_progress(done + part.stop - places.start, len(self.images))
            return tuple(tensors[name] for name in sorted(tensors))

        parts = self.processes.spread(batches, encoded)

        def write() -> None:
            assert parts is not None
            columns = zip(sorted(self.index.tensors), zip(*parts, strict=True), strict=True)
            shard = _write(self.root / shard_name(number), {name: torch.cat(column) for name, column in columns})
            self._record(shards=(*self.index.shards[:number], shard, *self.index.shards[number + 1 :]))

        self.processes.on_main(write)
        return done + len(places)

    def _encode(self, part: range) -> dict[str, Tensor]:
        """Return latents and conditions of a batch of images or prompts, on the CPU."""
        captions = [self.images.captions[index] for index in part]
        with torch.no_grad():
            conditions = self.encoder.texts(captions)
        if isinstance(self.images, Prompts):
            return self._known({LATENTS: self.images.sampled(part, conditions), **conditions}, captions)
        x0 = self.images.x0(part)
        names = [str(self.images.files[index]) for index in part]
        with torch.no_grad():
            latents = self.encoder.images(x0)
        if latents.ndim < 3 or not latents.is_floating_point():
            raise ValueError(
                f"the encoder returned {latents.dtype} latents of shape {tuple(latents.shape)} for {names[0]}: floats "
                f"with two or more axes after the batch are needed"
            )
        return self._known({LATENTS: latents, **conditions}, names)

    def _known(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Apply `_checked`, and check for the same conditions as those of the empty caption, if it has any."""
        conditions, known = tensors.keys() - {LATENTS}, self.index.tensors.keys() - {LATENTS}
        if known and conditions != known:
            raise ValueError(
                f"the encoder returned the conditions {_listed(conditions)} for {names[0]}, but {_listed(known)} for "
                f"the empty caption: all captions need the same conditions"
            )
        return self._checked(tensors, names)

    def _checked(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Check that each name has a finite sample of the same shape and dtype; return all on the CPU."""
        found = {}
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != len(names):
                raise ValueError(
                    f"the encoder returned {name} of shape {tuple(value.shape)} for a batch of {len(names)} that "
                    f"starts with {names[0]}: the first axis must be the batch"
                )
            entry = Entry(shape=tuple(value.shape[1:]), dtype=str(value.dtype).removeprefix("torch."))
            known = self.index.tensors.get(name, entry)
            if entry != known:
                remedy = "resize the images to one size" if name == LATENTS else "pad captions to one length"
                raise ValueError(
                    f"the encoder returned {name} {entry.dtype} {entry.shape} for {names[0]}, but {known.dtype} "
                    f"{known.shape} before: {remedy}, or use the encoder that started the folder"
                )
            value = value.detach().cpu()
            if value.is_floating_point() and not (finite := value.isfinite().reshape(len(value), -1).all(1)).all():
                raise ValueError(
                    f"the encoder returned {name} that are not finite for {names[int(finite.int().argmin())]}: "
                    f"encode in float32, or remove the sample"
                )
            found[name] = value
            self.index = self.index.model_copy(update={"tensors": {**self.index.tensors, name: entry}})
        return found

    def _record(self, **files: Any) -> None:
        """Add written files to the index."""
        self.index = self.index.model_copy(update=files)
        _record(self.root, self.index)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _read_as(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to which a stored tensor is converted when read."""
    return torch.float32 if dtype.is_floating_point else dtype


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Stored:
    return Stored(sha256=write_tensors(path, tensors), size=path.stat().st_size)


def _record(root: Path, index: Index) -> None:
    """Write the index, so that files lost in a power cut can be detected."""
    write_json(root / INDEX, index.model_dump(mode="json"))


def _has_size(path: Path, stored: Stored | None) -> bool:
    return stored is not None and path.is_file() and path.stat().st_size == stored.size


def _is_intact(path: Path, stored: Stored | None) -> bool:
    """Whether a file was recorded and is unchanged."""
    return stored is not None and _has_size(path, stored) and sha256_of(path) == stored.sha256


def _read_index(root: Path) -> Index:
    path = root / INDEX
    remedy = "delete the folder and encode again"
    try:
        data = read_json(path)
    except DamagedFile as error:
        raise DamagedFile(f"{error}: {remedy}") from None
    if isinstance(data, dict) and data.get("format") != FORMAT:
        raise ValueError(f"{path} has format {data.get('format')}, but this halfstep reads {FORMAT}: {remedy}")
    try:
        return Index.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DamagedFile(f"{path} is not an index of latents ({where}: {first['msg']}): {remedy}") from None


def _damaged(path: Path, folder: str) -> DamagedFile:
    return DamagedFile(
        f"{path} is missing or altered: encode the same images into {folder} again, which rewrites only that file"
    )
