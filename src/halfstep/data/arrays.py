"""Data from NumPy files, and scikit-learn's digits.

The digits' 1,797 images of 8x8 have the values v = 0..16; they become the pixels round(v * 255 / 16).
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from halfstep.data.base import MemoryData
from halfstep.data.images import Preparation

DATA_KEYS = ("x", "arr_0")
LABEL_KEYS = ("y", "labels", "arr_1")
MAX_CLASSES = 100_000


def digits(prepare: Preparation, labels: bool, limit: int | None) -> MemoryData:
    """Scikit-learn's handwritten digits: 1,797 images `[1, 8, 8]` of 10 classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return from_arrays("digits", images, bunch.target if labels else None, prepare, limit)


def array_file(path: Path, source: str, prepare: Preparation, labels: bool, limit: int | None) -> MemoryData:
    """The samples of a .npy file, or those and the labels of a .npz file.

    Raises:
        ValueError: if the file is missing, damaged or holds Python objects, has no array under a known name, or what it
            holds are not samples.
    """
    x, y = _load(path, source)
    return from_arrays(source, x, y if labels else None, prepare, limit)


def from_arrays(
    source: str, x: NDArray, labels: NDArray | None, prepare: Preparation, limit: int | None
) -> MemoryData:
    """Data of uint8 images `[n, height, width]` or `[n, height, width, channels]`, or of float arrays `[n, *dims]`.

    Raises:
        ValueError: if the arrays are of another kind, or labels are not one integer from 0 up for each sample.
    """
    if x.dtype == np.uint8:
        x = _pixels(source, x[:limit], prepare) if len(x) else x
    else:
        if x.dtype.kind != "f" or x.ndim < 2:
            raise ValueError(
                f"{source} holds {x.dtype} of shape {x.shape}: give images as uint8 [n, height, width] or "
                f"[n, height, width, channels], other samples as floats [n, *dims]"
            )
        if prepare.image_size or prepare.channels:
            raise ValueError(
                f"{source} holds {x.dtype} arrays, which are taken as they are: leave out --data.image-size and "
                f"--data.channels, or save images as uint8"
            )
        x = x[:limit].astype(np.float32)
    names: tuple[str, ...] = ()
    if labels is not None:
        labels, names = _labels(source, labels, len(x) if limit is None else None)
        labels = labels[:limit]
    return MemoryData(source, torch.from_numpy(x), None if labels is None else torch.from_numpy(labels), names)
