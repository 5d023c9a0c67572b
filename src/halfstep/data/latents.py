"""Latents and text conditions of captioned images, encoded once into a folder and read from there.

FOLDER/
  index.json                  `Index`: of which encoder and images, and a sha256 of each file below
  null.safetensors            the conditions of the empty caption, one sample without the batch axis
  shard-00000.safetensors     latents [n, channels, height, width] and each condition [n, ...] of the first `shard_size`
  shard-00001.safetensors     images; and so on, in the order of the images

The encoders are callables, independent of the libraries that they come from. Tensors are stored in the dtype of the
encoder and floats are read as float32.
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
from halfstep.objectives.base import Batch
from halfstep.runtime.files import DamagedFile, InUse, read_json, refuse_file, sha256_of, sweep, user_path, write_json
from halfstep.runtime.processes import Processes
from halfstep.runtime.tensors import write_tensors

FORMAT: Final = 1
"""The version of the layout; a reader refuses another."""
INDEX: Final = "index.json"
NULL: Final = "null.safetensors"
LATENTS: Final = "latents"


@final
@dataclass(frozen=True)
class Encoder:
    """Makes latents of images and conditions of captions, on any device."""

    images: Callable[[Tensor], Tensor]
    """float32 images `[n, 3, h, w]` in [-1, 1] -> latents `[n, c, h/8, w/8]`, scaled as the network takes them."""
    texts: Callable[[list[str]], dict[str, Tensor]]
    """n captions -> the conditions by name, each `[n, ...]` with one shape for all captions."""
    key: str
    """Identifies weights and settings: equal if the encoders are."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Entry(_Record):
    """A tensor of each sample."""

    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """The stored torch dtype, by name."""


class Stored(_Record):
    """A written file."""

    sha256: str
    size: int
    """Bytes."""


class Origin(_Record):
    """The encoded images, identified independently of machine and folder."""

    count: int
    names: str
    """A sha256 of their relative paths, in order."""
    contents: str
    """A sha256 of their files' sizes and sha256, in order."""
    captions: str
    """A sha256 of their captions, in order."""
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
    """For images of classes, whose captions are these names and whose conditions are `class_labels`."""
    tensors: dict[str, Entry] = {}
    """The latents and conditions by name; empty until the first are encoded."""
    null: Stored | None = None
    shards: tuple[Stored | None, ...]

    def places(self, number: int) -> range:
        """Return the images of a shard."""
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
            raise IndexError(f"{self.source} has {len(self)} samples, and indices {indices.tolist()} were requested")
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
                # Opened for each batch, in microseconds: kept open, there would be as many files as shards.
                with safe_open(path, "pt") as file:
                    for name, value in found.items():
                        value[places] = file.get_tensor(name)[rows].to(value.dtype)
            except (OSError, SafetensorError) as error:
                raise _damaged(path, self.source) from error
        return Batch(found.pop(LATENTS), found)


def is_latents(path: Path) -> bool:
    """Whether a folder is one that `encode` writes."""
    return (path / INDEX).is_file() and ((path / NULL).is_file() or (path / shard_name(0)).is_file())


def open_latents(folder: Path) -> LatentData:
    """Open a folder that `encode` has finished. Sizes are checked now, contents only by `encode`.

    Raises:
        ValueError: if the folder is missing, is of another format, or is not finished.
        DamagedFile: if a file is missing or has another size than when it was written.
    """
    root = user_path(folder)
    if not (root / INDEX).is_file():
        raise ValueError(f"{folder} holds no latents (it has no {INDEX}): give a folder that was encoded")
    index = _read_index(root)
    if index.null is None or None in index.shards:
        written = sum(shard is not None for shard in index.shards)
        raise ValueError(
            f"{folder} is not finished ({written} of {len(index.shards)} shards): encode the same images into it "
            f"again, which resumes where it stopped"
        )
    for number, stored in enumerate(index.shards):
        if not _has_size(root / shard_name(number), stored):
            raise _damaged(root / shard_name(number), str(folder))
    if not _is_intact(root / NULL, index.null):
        raise _damaged(root / NULL, str(folder))
    null = {name: value.to(_read_as(value.dtype)) for name, value in load((root / NULL).read_bytes()).items()}
    return LatentData(str(folder), index, null, index.class_names)


def encode(
    images: CaptionedImages | Prompts,
    encoder: Encoder,
    folder: Path,
    batch_size: int = 8,
    shard_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
    class_names: Sequence[str] = (),
    processes: Processes | None = None,
) -> LatentData:
    """Encode all images into `folder`, except those encoded there already, and return their latents and conditions.

    Files are whole or absent, and a recorded shard is encoded again only if its content has changed. Repeat an
    interrupted call to resume it with the first missing shard; given encoders that are functions of their batch, the
    bytes are those of an uninterrupted call. No batch crosses shards.

    Args:
        on_progress: called with the number of images that are done and of all, at the start and after each batch.
        class_names: for images of classes (`read_classes`), in the order of the encoder's `class_labels`.
        processes: that share the batches of each shard; this one alone if None. The first writes.

    Raises:
        ValueError: in one line, if `folder` holds something else, latents of another encoder, of other images or in
            shards of another size, or is being written by another process; if an image cannot be decoded or is not
            RGB; or if the encoder returns other shapes than it should, or numbers that are not finite.
        OSError: if the disk is full; the call may be repeated once it is not.
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
            raise InUse(f"{folder} is being written by another process: wait for it, or give another folder") from None
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
    """Return the file name of a shard."""
    return f"shard-{number:05d}.safetensors"


def _check_folder(root: Path) -> None:
    """Raise ValueError unless the folder is absent, empty or begun by `encode`."""
    refuse_file(root, "Give another folder for the latents")
    if root.is_dir() and not (root / INDEX).exists():
        found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        if found:
            raise ValueError(f"{root} holds other files, such as {found[0]}: give a new or an empty folder for latents")


def _begin(
    images: CaptionedImages | Prompts, encoder: Encoder, root: Path, shard_size: int, class_names: tuple[str, ...]
) -> Index:
    """Return the index of the folder, written now if there is none, or only that of another try that made no shard."""
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
        raise ValueError(f"{root} holds latents of the encoder {index.encoder!r}, not of {encoder.key!r}: {remedy}")
    if index.shard_size != shard_size:
        raise ValueError(
            f"{root} holds shards of {index.shard_size} samples, not of {shard_size}: keep that, or {remedy}"
        )
    if index.images != now.images:
        raise ValueError(
            f"{root} holds latents of other images than {images.source}: {_differs(index.images, now.images)}; {remedy}"
        )
    return index


def _differs(then: Origin, now: Origin) -> str:
    """Return the difference between two sets of images, in words."""
    if then.count != now.count:
        return f"{then.count} then and {now.count} now"
    if then.preparation != now.preparation:
        names = [name for name, value in now.preparation.items() if then.preparation.get(name) != value]
        return ", ".join(f"{name} {then.preparation.get(name)} then and {now.preparation[name]} now" for name in names)
    kinds = {"names": "file names", "contents": "contents of the files", "captions": "captions"}
    return "other " + " and ".join(word for name, word in kinds.items() if getattr(then, name) != getattr(now, name))


def _origin(images: CaptionedImages | Prompts) -> Origin:
    """Identify the images; reads all files."""
    if isinstance(images, Prompts):
        return Origin(
            count=len(images), names="", contents="", captions=_digest(images.captions), preparation={"sampled": True}
        )
    paths = [images.root / path for path in images.files]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(lambda path: [path.stat().st_size, sha256_of(path)], paths))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): list the images again") from error
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
    """Fills a folder, recording each file once it is whole."""

    images: CaptionedImages | Prompts
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
        """Return the index with the conditions of the empty caption, and which shards are intact."""
        if not _is_intact(self.root / NULL, self.index.null):
            self._write_null()
        shards = enumerate(self.index.shards)
        return self.index, [_is_intact(self.root / shard_name(number), shard) for number, shard in shards]

    def _write_null(self) -> None:
        with torch.no_grad():
            conditions = self.encoder.texts([""])
        if LATENTS in conditions:
            raise ValueError(f"the encoder returned a condition called {LATENTS}: give it another name")
        null = self._checked(conditions, ["the empty caption"])
        self._record(null=_write(self.root / NULL, {name: value[0] for name, value in null.items()}))

    def _write_shard(self, number: int, done: int) -> int:
        """Encode a shard; return the number of encoded images, which was `done`."""
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
        x0 = self.images.loaded(part).fetch(torch.arange(len(part))).x0
        names = [str(self.images.files[index]) for index in part]
        if x0.shape[1] != 3:
            raise ValueError(f"{names[0]} has {x0.shape[1]} channels, and encoders take 3: prepare with channels=3")
        with torch.no_grad():
            latents = self.encoder.images(x0)
        if latents.ndim != 4 or not latents.is_floating_point():
            raise ValueError(
                f"the encoder returned {latents.dtype} latents of shape {tuple(latents.shape)} for {names[0]}: floats "
                f"[n, channels, height, width] are needed"
            )
        return self._known({LATENTS: latents, **conditions}, names)

    def _known(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Check as `_checked`, and for the conditions of the empty caption; there may be none of it."""
        conditions, known = tensors.keys() - {LATENTS}, self.index.tensors.keys() - {LATENTS}
        if known and conditions != known:
            raise ValueError(
                f"the encoder returned the conditions {_listed(conditions)} for {names[0]}, and {_listed(known)} for "
                f"the empty caption: all captions need the same"
            )
        return self._checked(tensors, names)

    def _checked(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Check for one finite sample of one form for each name; return them on the CPU, with the form in the index."""
        found = {}
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != len(names):
                raise ValueError(
                    f"the encoder returned {name} of shape {tuple(value.shape)} for a batch of {len(names)}, the first "
                    f"{names[0]}: the first axis is the batch"
                )
            entry = Entry(shape=tuple(value.shape[1:]), dtype=str(value.dtype).removeprefix("torch."))
            known = self.index.tensors.get(name, entry)
            if entry != known:
                remedy = "resize the images to one size" if name == LATENTS else "pad captions to one length"
                raise ValueError(
                    f"the encoder returned {name} {entry.dtype} {entry.shape} for {names[0]}, and {known.dtype} "
                    f"{known.shape} before: {remedy}, or use the encoder that began the folder"
                )
            value = value.detach().cpu()
            if value.is_floating_point() and not (finite := value.isfinite().reshape(len(value), -1).all(1)).all():
                raise ValueError(
                    f"the encoder returned {name} that are not finite for {names[int(finite.int().argmin())]}: "
                    f"encode in float32 if it was a shorter type, or remove the sample"
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
    """Return the dtype in which a stored tensor is read."""
    return torch.float32 if dtype.is_floating_point else dtype


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Stored:
    return Stored(sha256=write_tensors(path, tensors), size=path.stat().st_size)


def _record(root: Path, index: Index) -> None:
    """Write the index, which also reveals a file lost in a power cut."""
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
        raise ValueError(f"{path} has format {data.get('format')}, this halfstep reads {FORMAT}: {remedy}")
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
