"""From encoded images to pixels, in memory or only when they are fetched.

In this order: turn by the EXIF orientation, lay transparency on white, convert channels, crop and resample. Only the
first of several frames is read. An image that needs none of this keeps its pixels exactly.
"""

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Final, Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from halfstep.data.base import Data, MemoryData, check_labels, to_batch
from halfstep.objectives.base import Batch
from halfstep.runtime.files import first_line
from halfstep.runtime.storage import GONE

Channels = Literal[1, 3]
Resize = Literal["crop", "stretch"]
Resample = Literal["bicubic", "bilinear", "area", "lanczos"]

_FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
_FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GREY: Final = ("1", "L", "LA", "La")


def _workers() -> int:
    """Return the number of decoding threads: the cores that this process may use, shared with other local ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))))


_CHUNK: Final = 4096
"""Images read at a time, which bounds the memory for their encoded bytes."""


@final
@dataclass(frozen=True)
class Preparation:
    """How an image becomes pixels; the fields are those of `DataConfig`."""

    image_size: int | None = None
    resize: Resize = "crop"
    resample: Resample = "bicubic"
    channels: Channels | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Pixels `[channels, height, width]`, both `image_size` if there is one; under "crop" the centre, undistorted.

        Raises:
            ValueError: if the image has more than 8 bits a channel, which Pillow would clip.
        """
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise ValueError(f"it has more than 8 bits a channel, mode {image.mode}: save it with 8")
        ImageOps.exif_transpose(image, in_place=True)
        channels = self.channels or (1 if image.mode in _GREY else 3)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if self.image_size is not None:
            image = image.resize((self.image_size,) * 2, _FILTERS[self.resample], self._box(*image.size))
        pixels = np.asarray(image)
        return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the box (left, upper, right, lower) to keep, in whole pixels so that none is blurred."""
        if self.resize == "stretch":
            return 0, 0, width, height
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side


class EncodedImages(ABC):
    """Encoded images by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of the image in an error."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        """The images as files to open, or as their bytes."""

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int]]:
        """For each image a name that is the same on every machine, and its encoded size in bytes."""


class Labelled(NamedTuple):
    """Encoded images and, if they have classes, the index of each one's class, int64 `[n]`, and the classes' names."""

    images: EncodedImages
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()


@final
@dataclass(frozen=True, eq=False)
class ImageFiles(Data):
    """Images too many for memory, decoded by a few threads at each fetch.

    The fingerprint is that of names, sizes in bytes, labels and preparation, not of pixels.

    Raises:
        ValueError: if `prepare` leaves the size or the channels to the files, or labels are not indices of class_names.
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
                f"{self.source} is too large for memory, so its {len(self)} images are decoded as they are needed and "
                f"must be told a common form: give --data.image-size and --data.channels, or a larger --data.max-bytes"
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
            raise IndexError(f"{self.source} has {len(self)} samples, and indices {indices.tolist()} were asked for")
        pixels = _decode(self.images, indices.tolist(), self.prepare)
        x = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
        return to_batch(torch.from_numpy(x), self.labels, indices)


def decoded(source: str, found: Labelled, prepare: Preparation, max_bytes: int) -> Data:
    """Return the images as data: in memory if their pixels fit into `max_bytes`, else as `ImageFiles`.

    Raises:
        ValueError: if an image cannot be decoded, or differs from the first in channels or size; or as `ImageFiles`.
    """
    images, labels, class_names = found
    first = _decode(images, [0], prepare)[0]
    if first.nbytes * len(images) > max_bytes:
        return ImageFiles(source, images, prepare, labels, class_names)
    x = np.empty((len(images), *first.shape), np.uint8)
    for start in range(0, len(images), _CHUNK):
        indices = range(start, min(start + _CHUNK, len(images)))
        for index, pixels in zip(indices, _decode(images, indices, prepare), strict=True):
            if pixels.shape != first.shape:
                raise _unlike(source, images.name(0), first.shape, images.name(index), pixels.shape)
            x[index] = pixels
    return MemoryData(source, torch.from_numpy(x), labels, class_names)


def _decode(images: EncodedImages, indices: Sequence[int], prepare: Preparation) -> list[NDArray[np.uint8]]:
    """The pixels of the images at `indices`, each thread decoding a share of them."""
    files = images.read(indices)
    workers = _workers()
    share = max(1, -(-len(indices) // workers))

    def work(start: int) -> list[NDArray[np.uint8]]:
        places = range(start, min(start + share, len(indices)))
        return [_open(files[place], images.name(indices[place]), prepare) for place in places]

    with ThreadPoolExecutor(workers) as pool:
        return [pixels for part in pool.map(work, range(0, len(indices), share)) for pixels in part]


def _open(file: Path | bytes, name: str, prepare: Preparation) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_FORMATS) as image:
            return prepare(image)
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        if isinstance(error, OSError) and error.errno in GONE:
            raise OSError(error.errno, f"{error.strerror}: the data are gone; bring them back", name) from None
        if isinstance(error, UnidentifiedImageError):
            raise ValueError(f"{name} is no image ({', '.join(_FORMATS)}): repair or remove it") from error
        raise ValueError(f"{name} cannot be decoded ({first_line(error)}): repair or remove it") from error


def _unlike(source: str, name: str, shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> ValueError:
    """The error for two images (channels, height, width) that do not fit into one array."""
    if shape[0] != other_shape[0]:
        kinds = {1: "grey", 3: "coloured"}
        return ValueError(
            f"{source} mixes grey and coloured images: {name} is {kinds[shape[0]]} and {other} is "
            f"{kinds[other_shape[0]]}; convert them all with --data.channels 3 (or 1)"
        )
    return ValueError(
        f"{source} has images of different sizes (width x height): {name} is {shape[2]}x{shape[1]} and {other} is "
        f"{other_shape[2]}x{other_shape[1]}; resize them all with, for example, --data.image-size 32"
    )
