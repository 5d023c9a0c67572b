"""Encode captioned images, captioned clips or prompts into a folder of latents and text conditions (see `latents.py`).

In this module, "images" includes clips (videos or sounds). The encoders are callables, independent of the libraries
that provide them.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from halfstep.core.door import check_whole
from halfstep.data.captions import CaptionedImages, Prompts
from halfstep.data.clips import CaptionedClips
from halfstep.data.latents import (
    INDEX,
    LATENTS,
    NULL,
    Entry,
    Index,
    LatentData,
    Origin,
    Stored,
    digest_of,
    is_intact,
    open_latents,
    read_index,
    shard_name,
)
from halfstep.runtime.cpus import usable_cores
from halfstep.runtime.files import contents, refuse_file, sha256_of, sweep, user_path, write_json
from halfstep.runtime.locks import acquire, lock_of
from halfstep.runtime.processes import Processes
from halfstep.runtime.tensors import write_tensors


@final
@dataclass(frozen=True)
class Encoder:
    """Encodes images as latents and captions as conditions, on any device."""

    images: Callable[[Tensor], Tensor]
    """Maps float32 images `[n, 3, h, w]` or clips in [-1, 1] to latents `[n, *dims]` at the network's scale."""
    texts: Callable[[list[str]], dict[str, Tensor]]
    """Maps n captions to conditions, keyed by name, each `[n, ...]`. All captions must yield the same shapes."""
    key: str
    """Identifies the weights and settings of the encoder. Equal encoders have equal keys."""
    null: Mapping[str, Tensor] | None = None
    """One sample's conditions without a caption, keyed by name; all other conditions stay the same. If None, the
    conditions of the empty caption are used."""
    timed: Callable[[list[str], list[float]], dict[str, Tensor]] | None = None
    """Maps n captions and the end times of n sounds, in seconds, to conditions (see `texts`); None if the conditions do
    not depend on the end times."""


def encode(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    folder: Path,
    batch_size: int = 8,
    shard_size: int = 256,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    class_names: Sequence[str] = (),
    processes: Processes | None = None,
) -> LatentData:
    """Encode all images that `folder` does not contain yet, and return the latents and conditions of all images.

    Files are written atomically, and a recorded shard is encoded again only if its file has changed. To resume an
    interrupted call, repeat it. If the encoders are deterministic, the resulting files are identical to those of an
    uninterrupted call. No batch crosses a shard boundary.

    Args:
        on_progress: called with the number of encoded images and the total number, at the start and after each batch.
        class_names: the names of the classes (see `read_classes`), in the order of the encoder's `class_labels`.
        processes: the processes that share the batches of each shard; rank 0 writes the files. By default, this process
            encodes all batches.

    Raises:
        ValueError: if `folder` contains other files, or latents from a different encoder, from different images or in
            shards of a different size; if another process is writing to `folder`; if an image cannot be decoded or is
            not RGB; or if the encoder returns wrong shapes or non-finite values.
        OSError: if the disk is full. The call can be repeated later.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        check_whole(name, value)
    root, lock, processes = user_path(folder), lock_of(user_path(folder)), processes or Processes()

    def begin() -> Index:
        refuse_foreign_files(root)
        root.mkdir(parents=True, exist_ok=True)
        acquire(lock, f"another process is writing to {folder}: wait until it ends, or use another folder")
        sweep(root)
        return _begin(images, encoder, root, shard_size, tuple(class_names))

    try:
        index = processes.on_main(begin)
        Encoding(images, encoder, root, batch_size, on_progress, index, processes).run()
    finally:
        lock.release()
    return open_latents(folder)


def refuse_foreign_files(root: Path) -> None:
    """Raise ValueError if the folder contains files that `encode` did not write."""
    refuse_file(root, "Choose another folder for the latents")
    if root.is_dir() and not (root / INDEX).exists():
        found = [path.name for path in contents(root) if not path.name.startswith(".")]
        if found:
            raise ValueError(
                f"{root} contains other files, such as {found[0]}: choose a new or empty folder for the latents"
            )


def _begin(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    root: Path,
    shard_size: int,
    class_names: tuple[str, ...],
) -> Index:
    """Return the folder's index. Write a new index if none exists, or if no shard exists and the settings differ."""
    index, is_new = planned_index(images, encoder, root, shard_size, class_names)
    if is_new:
        _record(root, index)
    return index


def planned_index(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    root: Path | None,
    shard_size: int,
    class_names: tuple[str, ...],
) -> tuple[Index, bool]:
    """Return the folder's index, or a new one as described in `_begin`, and whether the index is new.

    Raises:
        ValueError: if the folder contains shards from a different encoder, from different images or of a different
            size.
    """
    shards = (None,) * -(-len(images) // shard_size)
    now = Index(
        encoder=encoder.key, images=_origin(images), shard_size=shard_size, class_names=class_names, shards=shards
    )
    index = None if root is None or not (root / INDEX).exists() else read_index(root)
    settings = {"encoder", "images", "shard_size", "class_names"}
    if index is None or (
        not any(index.shards) and index.model_dump(include=settings) != now.model_dump(include=settings)
    ):
        return now, True
    remedy = "use another folder, or delete this one to encode again"
    if index.encoder != encoder.key:
        raise ValueError(
            f"{root} contains latents from the encoder {index.encoder!r}, not from {encoder.key!r}: {remedy}"
        )
    if index.shard_size != shard_size:
        raise ValueError(
            f"{root} contains shards of {index.shard_size} samples, not {shard_size}: keep that size, or {remedy}"
        )
    if index.images != now.images:
        raise ValueError(
            f"{root} contains latents of images other than those in {images.source}: "
            f"{_differs(index.images, now.images)}; {remedy}"
        )
    return index, False


def _differs(then: Origin, now: Origin) -> str:
    """Describe how two sets of images differ."""
    if then.count != now.count:
        return f"their number was {then.count} and is now {now.count}"
    if then.preparation != now.preparation:
        names = [name for name, value in now.preparation.items() if then.preparation.get(name) != value]
        old = then.preparation
        return ", ".join(f"{name} was {old.get(name)} and is now {now.preparation[name]}" for name in names)
    kinds = {"names": "file names", "contents": "file contents", "captions": "captions"}
    changed = (word for name, word in kinds.items() if getattr(then, name) != getattr(now, name))
    return "different " + " and ".join(changed)


def _origin(images: CaptionedImages | CaptionedClips | Prompts) -> Origin:
    """Return hashes that identify the images, which requires reading all files."""
    if isinstance(images, Prompts):
        sampling = {"sampled": True, "guidance_scale": images.guidance_scale}
        return Origin(
            count=len(images), names="", contents="", captions=digest_of(images.captions), preparation=sampling
        )
    try:
        with ThreadPoolExecutor(usable_cores()) as pool:
            contents = list(pool.map(lambda path: [path.stat().st_size, sha256_of(path)], images.contents))
    except OSError as error:
        raise ValueError(f"{error.filename} cannot be read ({error.strerror}): run the command again") from error
    return Origin(
        count=len(images),
        names=digest_of(path.as_posix() for path in images.files),
        contents=digest_of(contents),
        captions=digest_of(images.captions),
        preparation=asdict(images.preparation),
    )


@final
@dataclass
class Encoding:
    """Encodes images into a folder, and records each file in the index once it is complete."""

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
        """Write the empty caption's conditions if necessary; return the index, and whether each shard is intact."""
        if not is_intact(self.root / NULL, self.index.null):
            self._record(null=_write(self.root / NULL, self.null()))
        shards = enumerate(self.index.shards)
        return self.index, [is_intact(self.root / shard_name(number), shard) for number, shard in shards]

    def null(self) -> dict[str, Tensor]:
        """Return the conditions of the empty caption, without the batch axis."""
        with torch.no_grad():
            null = self.encoder.null
            conditions = self.encoder.texts([""]) if null is None else {name: null[name][None] for name in null}
        if LATENTS in conditions:
            raise ValueError(f"the encoder returned a condition called {LATENTS}: give it another name")
        checked = self._checked(conditions, ["the empty caption"])
        return {name: value[0] for name, value in checked.items()}

    def time(self, part: range, repeats: float) -> float:
        """Return the time to encode a batch, in seconds, with the measured sampling time multiplied by `repeats`."""
        start = time.perf_counter()
        self._encode(part)
        whole = time.perf_counter() - start
        if repeats == 1:
            return whole
        with torch.no_grad():
            self.encoder.texts([self.images.captions[index] for index in part])
        texts = min(whole, time.perf_counter() - start - whole)
        return texts + (whole - texts) * repeats

    def _write_shard(self, number: int, done: int) -> int:
        """Encode a shard. `done` is the number of images encoded so far; return the new number."""
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
        """Return the latents and conditions of a batch of images or prompts, on the CPU."""
        captions = [self.images.captions[index] for index in part]
        ends = self.images.ends(part) if isinstance(self.images, CaptionedClips) else None
        with torch.no_grad():
            if ends is not None and self.encoder.timed is not None:
                conditions = self.encoder.timed(captions, ends)
            else:
                conditions = self.encoder.texts(captions)
        if isinstance(self.images, Prompts):
            return self._known({LATENTS: self.images.sampled(part, conditions), **conditions}, captions)
        x0 = self.images.x0(part)
        names = [str(self.images.files[index]) for index in part]
        with torch.no_grad():
            latents = self.encoder.images(x0)
        if latents.ndim < 3 or not latents.is_floating_point():
            raise ValueError(
                f"the encoder returned {latents.dtype} latents of shape {tuple(latents.shape)} for {names[0]}: latents "
                f"must be floats with two or more axes after the batch axis"
            )
        return self._known({LATENTS: latents, **conditions}, names)

    def _known(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Check the tensors, and that their condition names match those of the empty caption, if these are known."""
        conditions, known = tensors.keys() - {LATENTS}, self.index.tensors.keys() - {LATENTS}
        keeps_some = self.encoder.null is not None and LATENTS not in self.index.tensors
        if known and not (known <= conditions if keeps_some else known == conditions):
            raise ValueError(
                f"the encoder returned the conditions {_listed(conditions)} for {names[0]}, but {_listed(known)} for "
                f"the empty caption: return the same conditions for all captions"
            )
        return self._checked(tensors, names)

    def _checked(self, tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
        """Check that each tensor has one finite sample of the known shape and dtype per name; return CPU tensors."""
        found = {}
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != len(names):
                raise ValueError(
                    f"the encoder returned {name} of shape {tuple(value.shape)} for a batch of {len(names)} that "
                    f"starts with {names[0]}: the first axis must be the batch axis"
                )
            entry = Entry(shape=tuple(value.shape[1:]), dtype=str(value.dtype).removeprefix("torch."))
            known = self.index.tensors.get(name, entry)
            if entry != known:
                remedy = "resize all images to one size" if name == LATENTS else "pad all captions to one length"
                raise ValueError(
                    f"the encoder returned {entry.dtype} {name} of shape {entry.shape} for {names[0]}, but it returned "
                    f"{known.dtype} of shape {known.shape} before: {remedy}, or use the encoder that the folder was "
                    f"started with"
                )
            value = value.detach().cpu()
            if value.is_floating_point() and not (finite := value.isfinite().reshape(len(value), -1).all(1)).all():
                raise ValueError(
                    f"the encoder returned non-finite {name} for {names[int(finite.int().argmin())]}: encode in "
                    f"float32, or remove the sample"
                )
            found[name] = value
            self.index = self.index.model_copy(update={"tensors": {**self.index.tensors, name: entry}})
        return found

    def _record(self, **files: Any) -> None:
        """Record the written files in the index."""
        self.index = self.index.model_copy(update=files)
        _record(self.root, self.index)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _write(path: Path, tensors: Mapping[str, Tensor]) -> Stored:
    return Stored(sha256=write_tensors(path, tensors), size=path.stat().st_size)


def _record(root: Path, index: Index) -> None:
    """Write the index, whose digests reveal files that were lost in a power failure."""
    write_json(root / INDEX, index.model_dump(mode="json"))
