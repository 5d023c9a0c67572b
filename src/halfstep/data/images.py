"""Decode images into pixels (see `preparation.py`), either once into memory or at each fetch."""

import hashlib
import io
import os
import re
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, ClassVar, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from halfstep.core.warnings import HalfstepWarning
from halfstep.data.base import Data, MemoryData, check_labels, to_batch
from halfstep.data.preparation import Preparation, TooDeep, deep_mode
from halfstep.objectives.base import Batch
from halfstep.runtime.cpus import usable_cores
from halfstep.runtime.files import first_line
from halfstep.runtime.storage import GONE

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_ENDS: Final = ((b"\xff\xd8\xff", b"\xff\xd9"), (b"\x89PNG\r\n", b"IEND\xaeB`\x82"))
"""The first and last bytes of complete JPEG and PNG files. All other files are decoded to check them."""
_SHOWN: Final = 50
"""The maximum number of images listed in an error; any further images are only counted."""


def _workers() -> int:
    """Return the number of decoding threads: this process's share of the available cores."""
    return max(1, min(16, usable_cores() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))))


_CHUNK: Final = 4096
"""The number of images read at a time, which limits the memory needed for encoded images."""


class EncodedImages(ABC):
    """A sequence of encoded images."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Return the name of an image for error messages."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes | None]:
        """Return each image as the path of a file, as bytes, or as None if a table has no image in its row."""

    @abstractmethod
    def missing(self) -> Sequence[int]:
        """Return the indices of the images that `read` returns as None, without reading the others."""

    @abstractmethod
    def subset(self, indices: Sequence[int]) -> "EncodedImages":
        """Return a sequence that contains only the images at `indices`."""

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int]]:
        """Yield each image's machine-independent name and encoded size in bytes."""


class Labelled(NamedTuple):
    """Encoded images and, if they have classes, the class index of each image, int64 `[n]`, and the class names."""

    images: EncodedImages
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()


@final
@dataclass(frozen=True, eq=False)
class ImageFiles(Data):
    """Images that do not fit into memory. Each fetch decodes the requested images in a few threads.

    The fingerprint covers the names of the images, their sizes in bytes, the labels and the preparation, but not the
    pixels.

    Raises:
        ValueError: if `prepare` does not set the size and the channels, or if `labels` are not indices into
            `class_names`.
    """

    source: str
    images: EncodedImages
    prepare: Preparation
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    is_image: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.prepare.image_size is None or self.prepare.channels is None:
            raise ValueError(
                f"{self.source} is too large for memory, so its {len(self)} images are decoded at each use and need a "
                f"common size: set --data.image-size and --data.channels, or increase --data.max-bytes"
            )
        check_labels(self.source, self.labels, self.class_names, len(self))

    @property
    def shape(self) -> tuple[int, ...]:
        assert self.prepare.channels is not None
        assert self.prepare.image_size is not None
        return self.prepare.channels, self.prepare.image_size, self.prepare.image_size

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.prepare, self.class_names)).encode())
        for entry in self.images.sizes():
            digest.update(repr(entry).encode())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Batch:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(
                f"{self.source} has {len(self)} samples, but the indices {indices.tolist()} were requested"
            )
        pixels = []
        for one in _decode(self.images, indices.tolist(), self.prepare):
            if isinstance(one, ValueError):
                raise one
            pixels.append(one)
        x = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
        return to_batch(torch.from_numpy(x), self.labels, indices)


def decoded(source: str, found: Labelled, prepare: Preparation, max_bytes: int, skip_broken: bool = False) -> Data:
    """Return the images as data: in memory if their pixels fit into `max_bytes`, otherwise as `ImageFiles`.

    Args:
        skip_broken: whether to skip unreadable images, with a warning that lists them.

    Raises:
        ValueError: if any image (or, with `skip_broken`, every image) cannot be read; if an image differs from the
            first one in channels or size; or as described in `ImageFiles`. The message lists unreadable images.
    """
    images = found.images
    broken: dict[int, ValueError] = {}
    # The size of the first readable image determines whether all images fit into memory.
    for place in range(len(images)):
        (first,) = _decode(images, [place], prepare)
        if isinstance(first, np.ndarray):
            break
        broken[place] = first
    else:
        _whole(source, found, broken, skip_broken)  # always raises
    assert isinstance(first, np.ndarray)
    if first.nbytes * len(images) > max_bytes:
        kept = _whole(source, found, broken | _cut(images, prepare, place), skip_broken)
        return ImageFiles(source, kept.images, prepare, kept.labels, kept.class_names)
    x = np.empty((len(images), *first.shape), np.uint8)
    for start in range(place, len(images), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(images)))
        for index, pixels in zip(indices, _decode(images, indices, prepare), strict=True):
            if isinstance(pixels, ValueError):
                broken[index] = pixels
            elif pixels.shape != first.shape:
                raise _unlike(source, images.name(place), first.shape, images.name(index), pixels.shape)
            else:
                x[index] = pixels
    kept = _whole(source, found, broken, skip_broken)
    if broken:
        x = np.delete(x, list(broken), axis=0)
    return MemoryData(source, torch.from_numpy(x), kept.labels, kept.class_names)


def _whole(source: str, found: Labelled, broken: dict[int, ValueError], skip: bool) -> Labelled:
    """Return the images, excluding broken ones and classes in which all images are broken.

    Raises:
        ValueError: if there are broken images and `skip` is not set, or if no image remains.
    """
    if not broken:
        return found
    images, labels, class_names = found
    reasons = [str(broken[index]) for index in sorted(broken)]
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    count = f"{len(broken):,} of {len(images):,} images in {source} cannot be read"
    if not skip or len(broken) == len(images):
        remedy = "repair or remove" if skip else "skip them with --data.skip-broken, or repair or remove"
        if len(reasons) == 1:
            raise broken.popitem()[1] if skip else ValueError(f"{reasons[0]}; or skip it with --data.skip-broken")
        raise ValueError(f"{count}; {remedy} them: {'; '.join(reasons[:_SHOWN])}{more}")
    warnings.warn(f"{count} and will be skipped: {'; '.join(reasons[:_SHOWN])}{more}", HalfstepWarning, stacklevel=2)
    kept = [index for index in range(len(images)) if index not in broken]
    if labels is None:
        return Labelled(images.subset(kept))
    return numbered(Labelled(images.subset(kept), labels[kept], class_names))


def numbered(found: Labelled) -> Labelled:
    """Return the images without empty classes. The other classes are renumbered from 0 in the same order."""
    if found.labels is None:
        return found
    held, places = found.labels.unique(return_inverse=True)
    if len(held) == len(found.class_names) or int(held[0]) < 0 or int(held[-1]) >= len(found.class_names):
        return found  # no class is empty, or a label is invalid and is rejected later
    return Labelled(found.images, places, tuple(found.class_names[number] for number in held.tolist()))


def _cut(images: EncodedImages, prepare: Preparation, readable: int) -> dict[int, ValueError]:
    """Decode the files with a suspicious header or end, and return the errors of broken files by index.

    Decoding all files would take as long as an epoch, so damage in the middle of a file is not found. In tables of
    bytes, only missing images are found.

    Args:
        readable: the index of an image that can be read.
    """
    broken: dict[int, ValueError] = {}
    if isinstance(images.read([readable])[0], bytes):
        missing = images.missing()
        errors = zip(missing, _decode(images, missing, prepare), strict=True)
        return {index: error for index, error in errors if isinstance(error, ValueError)}
    with ThreadPoolExecutor(_workers()) as pool:
        for start in range(0, len(images), _CHUNK):
            indices = range(start, min(start + _CHUNK, len(images)))
            doubts = pool.map(_is_doubtful, images.read(indices))
            doubtful = [index for index, doubt in zip(indices, doubts, strict=True) if doubt]
            for index, pixels in zip(doubtful, _decode(images, doubtful, prepare), strict=True):
                if isinstance(pixels, ValueError):
                    broken[index] = pixels
    return broken


def _is_doubtful(file: Path | bytes | None) -> bool:
    if not isinstance(file, Path):
        return file is None
    try:
        if not file.is_file():
            return True
        with file.open("rb") as stream:
            head = stream.read(8)
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4096))
            tail = stream.read()
            end = next((end for start, end in _ENDS if head.startswith(start)), None)
            return end is None or end not in tail or _has_doubtful_header(stream)
    except OSError:
        return True


def _has_doubtful_header(stream: BinaryIO) -> bool:
    try:
        # Pillow starts at the beginning of the file, and already raises an error here if the image has too many pixels.
        with Image.open(stream, formats=_FORMATS) as image:
            return deep_mode(image) is not None
    except Exception:  # as in `_open`
        return True


def _decode(
    images: EncodedImages, indices: Sequence[int], prepare: Preparation
) -> list[NDArray[np.uint8] | ValueError]:
    """Return the pixels or the error for each image at `indices`. Each thread decodes a share of the images."""
    files = images.read(indices)
    workers = _workers()
    share = max(1, -(-len(indices) // workers))

    def work(start: int) -> list[NDArray[np.uint8] | ValueError]:
        places = range(start, min(start + share, len(indices)))
        return [_open(files[place], images.name(indices[place]), prepare) for place in places]

    with ThreadPoolExecutor(workers) as pool:
        return [pixels for part in pool.map(work, range(0, len(indices), share)) for pixels in part]


def _open(file: Path | bytes | None, name: str, prepare: Preparation) -> NDArray[np.uint8] | ValueError:
    """Return the pixels of an image, or a ValueError with a one-line message if the image cannot be read.

    Raises:
        OSError: if the disk is no longer available.
    """
    if file is None:
        return ValueError(f"{name} is missing: remove the row")
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):
            # Opening a FIFO would block until it has a writer.
            return ValueError(f"{name} is not a file but {_kind_of(file.stat().st_mode)}: remove it")
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            return prepare(image)
    except Exception as error:  # Pillow's decoders raise many exception types for damaged files
        if isinstance(error, OSError) and error.errno in GONE:
            raise OSError(error.errno, f"{error.strerror}: the data is gone. Restore it", name) from None
        if isinstance(error, TooDeep):
            return ValueError(f"{name} {error}")
        if isinstance(error, FileNotFoundError):
            return ValueError(f"{name} is missing: restore it, or remove its entry")
        if isinstance(error, Image.DecompressionBombError):
            pixels = re.search(r"\d+", str(error))
            size = f"{int(pixels[0]):,} pixels" if pixels else "too many pixels"
            return ValueError(f"{name} has {size}, too many to decode at each use: scale it down")
        if isinstance(error, UnidentifiedImageError):
            return ValueError(f"{name} {_unidentified(file)}")
        return ValueError(f"{name} cannot be decoded ({first_line(error)}): repair or remove it")


def _kind_of(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def _unidentified(file: Path | bytes) -> str:
    """Describe the problem with a file that Pillow cannot identify, and suggest a remedy."""
    if isinstance(file, Path):
        with file.open("rb") as stream:
            file = stream.read(64)
    if not file:
        return "is empty: repair or remove it"
    if file.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "is an unsupported kind of TIFF: save it as 8-bit RGB or grey, or remove it"
    if file[4:8] == b"ftyp":
        return "is a HEIC or AVIF image or a video: save it as JPEG or PNG, or remove it"
    if file.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image: run git lfs pull"
    return f"is not an image ({', '.join(_FORMATS)}): repair or remove it"


def _unlike(source: str, name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> ValueError:
    """Return the error for two images with different shapes (channels, height, width)."""
    if shape[0] != other_shape[0]:
        kinds = {1: "grey", 3: "in colour"}
        return ValueError(
            f"{source} mixes grey and colour images: {name} is {kinds[shape[0]]} and {other} is "
            f"{kinds[other_shape[0]]}; convert them all with --data.channels 3 (or 1)"
        )
    return ValueError(
        f"{source} has images of different sizes (width x height): {name} is {shape[2]}x{shape[1]} and {other} is "
        f"{other_shape[2]}x{other_shape[1]}; resize them all with, for example, --data.image-size 32"
    )
