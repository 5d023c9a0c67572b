"""Latents and text conditions of captioned images, encoded once into a folder and read from there.

FOLDER/
  index.json                  `Index`: of which encoder and images, and a sha256 of each file below
  null.safetensors            the conditions of the empty caption, one sample without the batch axis
  shard-00000.safetensors     latents [n, channels, height, width] and each condition [n, ...] of the first `shard_size`
  shard-00001.safetensors     images; and so on, in the order of the images

The encoders are callables, so that this room knows nothing of the libraries that they come from. Tensors are stored in
the dtype of the encoder and read as float32, but for integers and bools, which are left as they are.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, final

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from halfstep.data.base import Data
from halfstep.data.captions import CaptionedImages
from halfstep.objectives.base import Batch
from halfstep.runtime.files import DamagedFile, InUse, read_json, sha256_of, sweep, write_json
from halfstep.runtime.tensors import write_tensors

FORMAT: Final = 1
"""The version of the layout; a reader refuses another."""
INDEX: Final = "index.json"
NULL: Final = "null.safetensors"
LATENTS: Final = "latents"


@final
@dataclass(frozen=True)
class Encoder:
    """What makes latents of images and conditions of captions; it may return them on any device."""

    images: Callable[[Tensor], Tensor]
    """float32 images `[n, 3, h, w]` in [-1, 1] -> latents `[n, c, h/8, w/8]`, scaled as the network takes them."""
    texts: Callable[[list[str]], dict[str, Tensor]]
    """n captions -> the conditions by name, each `[n, ...]` with one shape for all captions."""
    key: str
    """Says which weights and settings these are: equal if the encoders are."""


class Entry(BaseModel):
    """A tensor of each sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """As it is stored: the name of a torch dtype."""


class Stored(BaseModel):
    """A file that was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    size: int
    """Bytes."""


class Origin(BaseModel):
    """Which images were encoded: the same on every machine, wherever their folder lies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int
    names: str
    """A sha256 of their relative paths, in order."""
    contents: str
    """A sha256 of their files' sizes and sha256, in order."""
    captions: str
    """A sha256 of their captions, in order."""
    preparation: dict[str, Any]
    """The fields of their `Preparation`."""


class Index(BaseModel):
    """index.json: what the folder is to hold, and what of it is there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = FORMAT
    encoder: str
    """Its key."""
    images: Origin
    shard_size: int
    class_names: tuple[str, ...] = ()
    """Of images of classes, whose captions are these names and whose conditions are `class_labels`."""
    tensors: dict[str, Entry] = {}
    """The latents and the conditions by name; they are known once they were encoded for the first time."""
    null: Stored | None = None
    shards: tuple[Stored | None, ...]

    @property
    def written(self) -> int:
        """Number of shards that are there."""
        return sum(shard is not None for shard in self.shards)

    def is_complete(self) -> bool:
        """Whether all was encoded."""
        return self.null is not None and self.written == len(self.shards)

    def places(self, number: int) -> range:
        """The images of a shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.images.count))


@final
@dataclass(frozen=True, eq=False)
class LatentData(Data):
    """The samples of a finished folder, read from its memory-mapped shards as they are fetched.

    The latents are x0, the conditions `Batch.cond`. The fingerprint is of the files' digests.
    """

    source: str
    index: Index
    null: Mapping[str, Tensor]
    """The conditions of the empty caption, as `fetch` returns them but without the batch axis."""
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.index.tensors[LATENTS].shape

    @property
    def is_image(self) -> bool:
        return False

    @cached_property
    def fingerprint(self) -> str:
        return _digest([self.index.model_dump(mode="json", include={"format", "tensors", "null", "shards"})])

    def __len__(self) -> int:
        return self.index.images.count

    def fetch(self, indices: Tensor) -> Batch:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, and indices {indices.tolist()} were asked for")
        found = {
            name: torch.empty(len(indices), *entry.shape, dtype=_read_as(getattr(torch, entry.dtype)))
            for name, entry in self.index.tensors.items()
        }
        shards = indices // self.index.shard_size
        for number in shards.unique().tolist():
            places = (shards == number).nonzero()[:, 0]
            self._read(number, indices[places] % self.index.shard_size, places, found)
        return Batch(found.pop(LATENTS), found)

    def _read(self, number: int, rows: Tensor, places: Tensor, into: Mapping[str, Tensor]) -> None:
        """Copies the rows of a shard to their places in the batch."""
        path = Path(self.source).expanduser() / shard_name(number)
        try:
            # Opened for each batch: that takes microseconds, and open files would be as many as there are shards.
            with safe_open(path, "pt") as file:
                for name, value in into.items():
                    value[places] = file.get_tensor(name)[rows].to(value.dtype)
        except (OSError, SafetensorError) as error:
            raise _damaged(path, self.source) from error


def is_latents(path: Path) -> bool:
    """Whether a folder is one that `encode` writes."""
    return (path / INDEX).is_file() and ((path / NULL).is_file() or (path / shard_name(0)).is_file())


def open_latents(folder: Path) -> LatentData:
    """The data of a folder that `encode` has finished. Sizes are checked now, contents only by `encode`.

    Raises:
        ValueError: if the folder is missing, is of another format, or is not finished.
        DamagedFile: if a file is missing or has another size than when it was written.
    """
    root = folder.expanduser()
    if not (root / INDEX).is_file():
        raise ValueError(f"{folder} holds no latents (it has no {INDEX}): give a folder that was encoded")
    index = _read_index(root)
    if index.null is None or not index.is_complete():
        raise ValueError(
            f"{folder} is not finished ({index.written} of {len(index.shards)} shards): encode the same images into it "
            f"again, which goes on where it was stopped"
        )
    for number, stored in enumerate(index.shards):
        path = root / shard_name(number)
        if stored is None or not path.is_file() or path.stat().st_size != stored.size:
            raise _damaged(path, str(folder))
    if not _is_intact(root / NULL, index.null):
        raise _damaged(root / NULL, str(folder))
    null = {name: value.to(_read_as(value.dtype)) for name, value in load((root / NULL).read_bytes()).items()}
    return LatentData(str(folder), index, null, index.class_names)


def encode(
    images: CaptionedImages,
    encoder: Encoder,
    folder: Path,
    batch_size: int = 8,
    shard_size: int = 256,
    on_progress: Callable[[int, int], None] | None = None,
    class_names: Sequence[str] = (),
) -> LatentData:
    """The latents and conditions of all images, from `folder` where they are there, else encoded into it.

    Files are whole or absent, and a shard that was recorded is never encoded again unless its content has changed.
    Stopped at any moment, the same call goes on with the first shard that is missing and ends with the same bytes as
    if it had not been stopped, given encoders that are functions of their batch. No batch crosses shards.

    Args:
        on_progress: called with the number of images that are done and of all, at the start and after each batch.
        class_names: of images of classes (`read_classes`), in the order of the `class_labels` that the encoder makes.

    Raises:
        ValueError: in one line, if `folder` holds something else, latents of another encoder, of other images or in
            shards of another size, or is being written by another process; if an image cannot be decoded or is not
            RGB; or if the encoder returns other shapes than it should, or numbers that are not finite.
        OSError: if the disk is full; the call may be repeated once it is not.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more")
    root = folder.expanduser()
    _check_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    lock = FileLock(root / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(f"{folder} is being written by another process: wait for it, or give another folder") from None
    try:
        sweep(root)
        index = _begin(images, encoder, root, shard_size, tuple(class_names))
        _Encoding(images, encoder, root, batch_size, on_progress or (lambda done, total: None), index).run()
    finally:
        lock.release()
    return open_latents(folder)


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"shard-{number:05d}.safetensors"


def _check_folder(root: Path) -> None:
    """Refuses a folder that was not begun by `encode`."""
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file: give a folder for the latents")
    if root.is_dir() and not (root / INDEX).exists():
        found = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        if found:
            raise ValueError(f"{root} holds other files, such as {found[0]}: give a new or an empty folder for latents")


def _begin(
    images: CaptionedImages, encoder: Encoder, root: Path, shard_size: int, class_names: tuple[str, ...]
) -> Index:
    """The index of the folder, written now if there is none."""
    if not (root / INDEX).exists():
        count = -(-len(images) // shard_size)
        index = Index(
            encoder=encoder.key,
            images=_origin(images),
            shard_size=shard_size,
            class_names=class_names,
            shards=(None,) * count,
        )
        _record(root, index)
        return index
    index = _read_index(root)
    remedy = "give another folder, or delete this one to encode anew"
    if index.encoder != encoder.key:
        raise ValueError(f"{root} holds latents of the encoder {index.encoder!r}, not of {encoder.key!r}: {remedy}")
    if index.shard_size != shard_size:
        raise ValueError(
            f"{root} holds shards of {index.shard_size} samples, not of {shard_size}: keep that, or {remedy}"
        )
    now = _origin(images)
    if index.images != now:
        raise ValueError(
            f"{root} holds latents of other images than {images.source}: {_differs(index.images, now)}; {remedy}"
        )
    return index


def _differs(then: Origin, now: Origin) -> str:
    """What tells two sets of images apart, in words."""
    if then.count != now.count:
        return f"{then.count} then and {now.count} now"
    if then.preparation != now.preparation:
        names = [name for name, value in now.preparation.items() if then.preparation.get(name) != value]
        return ", ".join(f"{name} {then.preparation.get(name)} then and {now.preparation[name]} now" for name in names)
    kinds = {"names": "file names", "contents": "contents of the files", "captions": "captions"}
    return "other " + " and ".join(word for name, word in kinds.items() if getattr(then, name) != getattr(now, name))


def _origin(images: CaptionedImages) -> Origin:
    """Which images these are; all files are read."""
    paths = [images.root / path for path in images.files]
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            contents = list(pool.map(lambda path: [path.stat().st_size, sha256_of(path)], paths))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): list the images anew") from error
    return Origin(
        count=len(images),
        names=_digest(path.as_posix() for path in images.files),
        contents=_digest(contents),
        captions=_digest(images.captions),
        preparation=asdict(images.preparation),
    )


def _digest(values: Iterable[Any]) -> str:
    """A sha256 of JSON values in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(json.dumps(value).encode() + b"\n")
    return digest.hexdigest()


@final
class _Encoding:
    """Fills a folder, recording each file once it is whole."""

    def __init__(
        self,
        images: CaptionedImages,
        encoder: Encoder,
        root: Path,
        batch_size: int,
        on_progress: Callable[[int, int], None],
        index: Index,
    ) -> None:
        self.images = images
        self.encoder = encoder
        self.root = root
        self.batch_size = batch_size
        self.on_progress = on_progress
        self.index = index

    def run(self) -> None:
        if not _is_intact(self.root / NULL, self.index.null):
            self._write_null()
        intact = [_is_intact(self.root / shard_name(number), shard) for number, shard in enumerate(self.index.shards)]
        done = sum(len(self.index.places(number)) for number, whole in enumerate(intact) if whole)
        self.on_progress(done, len(self.images))
        for number, whole in enumerate(intact):
            if not whole:
                done = self._write_shard(number, done)

    def _write_null(self) -> None:
        with torch.no_grad():
            conditions = self.encoder.texts([""])
        if LATENTS in conditions:
            raise ValueError(f"the encoder returned a condition called {LATENTS}: give it another name")
        null = self._checked(conditions, ["the empty caption"])
        self._record(null=_write(self.root / NULL, {name: value[0] for name, value in null.items()}))

    def _write_shard(self, number: int, done: int) -> int:
        """Encodes a shard, of which all `done` before it are, and returns how many then are."""
        places = self.index.places(number)
        parts = []
        for first in range(places.start, places.stop, self.batch_size):
            part = range(first, min(first + self.batch_size, places.stop))
            parts.append(self._encode(part))
            done += len(part)
            self.on_progress(done, len(self.images))
        joined = {name: torch.cat([tensors[name] for tensors in parts]) for name in parts[0]}
        shard = _write(self.root / shard_name(number), joined)
        self._record(shards=(*self.index.shards[:number], shard, *self.index.shards[number + 1 :]))
        return done

    def _encode(self, part: range) -> dict[str, Tensor]:
        """Latents and conditions of the images of a batch, on the CPU."""
        x0 = self.images.loaded(part).fetch(torch.arange(len(part))).x0
        names = [str(self.images.files[index]) for index in part]
        if x0.shape[1] != 3:
            raise ValueError(f"{names[0]} has {x0.shape[1]} channels, and encoders take 3: prepare with channels=3")
        with torch.no_grad():
            latents = self.encoder.images(x0)
            conditions = self.encoder.texts([self.images.captions[index] for index in part])
        if latents.ndim != 4 or not latents.is_floating_point():
            raise ValueError(
                f"the encoder returned {latents.dtype} latents of shape {tuple(latents.shape)} for {names[0]}: floats "
                f"[n, channels, height, width] are needed"
            )
        known = self.index.tensors.keys() - {LATENTS}
        if conditions.keys() != known:
            raise ValueError(
                f"the encoder returned the conditions {_listed(conditions)} for {names[0]}, and {_listed(known)} for "
                f"the empty caption: all captions need the same"
            )
        return self._checked({LATENTS: latents, **conditions}, names)

    def _checked(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """The tensors on the CPU: one finite sample for each name, all of one form, which the index then knows."""
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
            if name not in self.index.tensors:
                self.index = self.index.model_copy(update={"tensors": {**self.index.tensors, name: entry}})
        return found

    def _record(self, **files: Any) -> None:
        """Puts files that are on the disk into the index."""
        self.index = self.index.model_copy(update=files)
        _record(self.root, self.index)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _read_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a stored tensor is returned."""
    return torch.float32 if dtype.is_floating_point else dtype


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Stored:
    return Stored(sha256=write_tensors(path, tensors), size=path.stat().st_size)


def _record(root: Path, index: Index) -> None:
    """Writes the index. A file that a power cut takes away all the same is found missing by its record."""
    write_json(root / INDEX, index.model_dump(mode="json"))


def _is_intact(path: Path, stored: Stored | None) -> bool:
    """Whether a file was recorded and is what was recorded."""
    if stored is None or not path.is_file() or path.stat().st_size != stored.size:
        return False
    return sha256_of(path) == stored.sha256


def _read_index(root: Path) -> Index:
    path = root / INDEX
    remedy = "delete the folder and encode anew"
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
        f"{path} is missing or altered: encode the same images into {folder} again, which makes only that file anew"
    )
