"""From encoded images to pixels, in memory or only when they are fetched.

The order is: turn by the EXIF orientation, lay transparency on white, convert to the channels that are wanted, crop and
resample. Of a file with several frames the first is read. An image that needs none of this keeps its pixels exactly.
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
from typing import Final, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from halfstep.data.base import Data, MemoryData, check_labels, first_line, to_batch
from halfstep.objectives.base import Batch

Channels = Literal[1, 3]
Resize = Literal["crop", "stretch"]
Resample = Literal["bicubic", "bilinear", "area", "lanczos"]

_FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
_GREY: Final = ("1", "L", "LA", "La")
_WORKERS: Final = min(8, os.cpu_count() or 1)
_CHUNK: Final = 4096
"""Images that are read at a time to be decoded, which bounds the memory for their encoded bytes."""


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
        """The part (left, upper, right, lower) of the image that is kept, in whole pixels so that none is blurred."""
        if self.resize == "stretch":
            return 0, 0, width, height
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side


class EncodedImages(ABC):
    """Image files, or what is like them, by index."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call the image in an error."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        """The images as files to open, or as their bytes."""

    @abstractmethod
    def sizes(self) -> Iterator[tuple[str, int]]:
        """For each image a name that is the same on every machine, and its encoded size in bytes."""


@final
@dataclass(frozen=True, eq=False)
class ImageFiles(Data):
    """Images too many for memory: decoded by a few threads each time they are fetched.

    Its fingerprint is of names, sizes in bytes, labels and preparation, not of pixels.

    Raises:
        ValueError: if `prepare` leaves the size or the channels to the files, or labels are not indices of class_names.
    """

    source: str
    images: EncodedImages
    prepare: Preparation
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()

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

    @property
    def is_image(self) -> bool:
        return True

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((self.prepare, self.class_names)).encode())
        for entry in self.images.sizes():
            digest.update(repr(entry).encode())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, indices: Tensor) -> Batch:
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(self):
            raise IndexError(f"{self.source} has {len(self)} samples, and indices {indices.tolist()} were asked for")
        pixels = list(_decode(self.images, indices.tolist(), self.prepare))
        x = np.stack(pixels) if pixels else np.empty((0, *self.shape), np.uint8)
        return to_batch(torch.from_numpy(x), self.labels, indices)


def decoded(
    source: str,
    images: EncodedImages,
    labels: Tensor | None,
    class_names: tuple[str, ...],
    prepare: Preparation,
    max_bytes: int,
) -> Data:
    """The images as data: in memory if their pixels fit into `max_bytes`, else as `ImageFiles`.

    Raises:
        ValueError: if an image cannot be decoded, or differs from the first in channels or size; or as `ImageFiles`.
    """
    first = next(_decode(images, [0], prepare))
    if first.nbytes * len(images) > max_bytes:
        return ImageFiles(source, images, prepare, labels, class_names)
    x = np.empty((len(images), *first.shape), np.uint8)
    for index, pixels in enumerate(_decode(images, range(len(images)), prepare)):
        if pixels.shape != first.shape:
            raise _unlike(images.name(0), first.shape, images.name(index), pixels.shape)
        x[index] = pixels
    return MemoryData(source, torch.from_numpy(x), labels, class_names)


def _decode(images: EncodedImages, indices: Sequence[int], prepare: Preparation) -> Iterator[NDArray[np.uint8]]:
    """The pixels of the images at `indices`, in their order, decoded by a few threads."""
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            files = images.read(part)
            yield from pool.map(lambda file, index: _open(file, images.name(index), prepare), files, part)


def _open(file: Path | bytes, name: str, prepare: Preparation) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            return prepare(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it is no image that Pillow reads" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise ValueError(f"the image {name} cannot be read ({reason}): repair or remove it") from None


def _unlike(first: str, first_shape: tuple[int, ...], other: str, other_shape: tuple[int, ...]) -> ValueError:
    if first_shape[0] != other_shape[0]:
        kinds = {1: "grey (1 channel)", 3: "colour (3 channels)"}
        return ValueError(
            f"images of mixed channels: {first} is {kinds[first_shape[0]]} but {other} is {kinds[other_shape[0]]}: "
            "give --data.channels 1 or --data.channels 3"
        )
    return ValueError(
        f"images of different sizes: {first} is {first_shape[1]}x{first_shape[2]} but {other} is "
        f"{other_shape[1]}x{other_shape[2]} (height x width): give --data.image-size, for example "
        f"--data.image-size {min(*first_shape[1:], *other_shape[1:])}"
    )
