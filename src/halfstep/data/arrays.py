"""Data from NumPy files, and scikit-learn's handwritten digits."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from halfstep.data.base import MemoryData
from halfstep.data.labels import classes_of
from halfstep.data.preparation import Preparation
from halfstep.runtime.files import first_line, user_path

DATA_KEYS: Final = ("x", "arr_0")
LABEL_KEYS: Final = ("y", "labels", "arr_1")


def digits(prepare: Preparation, labels: bool, limit: int | None) -> MemoryData:
    """Return scikit-learn's digits: 1,797 images `[1, 8, 8]` in 10 classes, with pixels scaled from 0..16 to 0..255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    return from_arrays("digits", images, bunch.target if labels else None, prepare, limit)


def array_file(source: str, prepare: Preparation, labels: bool, limit: int | None) -> MemoryData:
    """Load the samples from a .npy file, or the samples and labels from a .npz file.

    Raises:
        ValueError: if the file is missing, is damaged or contains Python objects; if a .npz file has no array with a
            known name; or as described in `from_arrays`.
    """
    x, y = _load(user_path(source))
    return from_arrays(source, x, y if labels else None, prepare, limit)


def from_arrays(
    source: str, x: NDArray[Any], labels: NDArray[Any] | None, prepare: Preparation, limit: int | None
) -> MemoryData:
    """Return `MemoryData` with the samples in `x`.

    `x` contains uint8 images `[n, height, width]` or `[n, height, width, 1 | 3 | 4]`, or floats `[n, *dims]`. The
    classes are the distinct labels in sorted order (see `classes_of`). `limit` keeps only the first samples, but
    does not change the classes.

    Raises:
        ValueError: if `x` has an unsupported type or shape, is empty or contains non-finite values; if `prepare` has
            image settings but `x` contains floats; or as described in `classes_of`.
    """
    if x.ndim == 0:
        raise ValueError(f"{source} contains a single number instead of samples: save an array of shape [n, *dims]")
    if x.size == 0:
        raise ValueError(f"{source} contains no samples (shape {x.shape}): at least 1 sample is needed")
    numbers, names = (None, ()) if labels is None else classes_of(source, labels, len(x))
    kept = (_pixels if x.dtype == np.uint8 else _floats)(source, x[:limit], prepare)
    return MemoryData(source, torch.from_numpy(kept), None if numbers is None else numbers[:limit], names)


def _load(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass the path of an existing {path.suffix} file")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded, None
            names = loaded.files
            wanted = names if len(names) == 1 else [name for name in names if name in DATA_KEYS + LABEL_KEYS]
            arrays = {name: loaded[name] for name in wanted}
            # If a member is not an array, numpy returns its raw bytes.
            if foreign := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"its member {foreign[0]} is not an array")
            if len(names) == 1:
                return arrays[names[0]], None
    except Exception as error:  # reading a damaged archive can raise any error from zipfile, zlib or numpy
        # numpy mistakes unknown files for pickles, and suggests loading them unsafely.
        why = first_line(error)
        if "pickle" in str(error):
            why = "it is not a NumPy file, or it contains Python objects"
        raise ValueError(
            f"{path} cannot be read ({why}): save the data again as plain arrays, without Python objects, using "
            f"numpy.save or numpy.savez"
        ) from error
    x = next((arrays[name] for name in DATA_KEYS if name in arrays), None)
    if x is None:
        raise ValueError(
            f"{path} has no array of samples (its arrays: {', '.join(names) or 'none'}): rename the samples to "
            f"{' or '.join(DATA_KEYS)}, and the labels, if any, to {' or '.join(LABEL_KEYS)}"
        )
    return x, next((arrays[name] for name in LABEL_KEYS if name in arrays), None)


def _pixels(source: str, x: NDArray[np.uint8], prepare: Preparation) -> NDArray[np.uint8]:
    """Return the prepared pixels `[n, channels, height, width]` of channels-last images."""
    images = x[..., None] if x.ndim == 3 else x
    if images.ndim != 4 or images.shape[3] not in (1, 3, 4):
        hint = "save other data as floats"
        if x.ndim == 4 and x.shape[1] in (1, 3, 4):
            hint = "move the channels to the last axis"
        raise ValueError(
            f"{source} contains a uint8 array of shape {x.shape}: images must have the shape [n, height, width] or "
            f"[n, height, width, 1, 3 or 4 channels]; {hint}"
        )
    channels = images.shape[3]
    if prepare.image_size is None and prepare.channels in (None, channels) and channels != 4:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return np.stack([prepare(Image.fromarray(image[..., 0] if channels == 1 else image)) for image in images])


def _floats(source: str, x: NDArray[Any], prepare: Preparation) -> NDArray[np.float32]:
    if x.dtype.kind != "f" or x.ndim < 2:
        raise ValueError(
            f"{source} contains an array of type {x.dtype} and shape {x.shape}: save images as uint8 "
            f"[n, height, width] or [n, height, width, channels], and other samples as floats [n, *dims]"
        )
    if prepare != Preparation():
        raise ValueError(
            f"{source} contains {x.dtype} arrays, which are used unchanged: remove --data.image-size, "
            f"--data.channels and similar options, or, if the samples are images, save them as uint8"
        )
    with np.errstate(over="ignore"):  # the check for finite values detects overflow
        return np.ascontiguousarray(x, dtype=np.float32)
