"""Convert the user's labels to a network's classes 0, 1, 2, ..."""

import warnings
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfstep.core.warnings import HalfstepWarning

_REMEDY: Final = "use --data.no-labels to ignore the labels"


def classes_of(source: str, labels: NDArray[Any], length: int) -> tuple[Tensor, tuple[str, ...]]:
    """Return the class of each sample, int64 `[length]`, and the labels of the classes in sorted order.

    Classes are numbered from 0 without gaps. Warns if this changes integer labels.

    Raises:
        ValueError: if `labels` does not contain one non-negative integer or one string per sample, or as described in
            `check_not_identifiers`.
    """
    if labels.dtype.kind not in "iuUS" or labels.shape != (length,):
        raise ValueError(
            f"{source} has {labels.dtype} labels of shape {labels.shape}: {length} samples need integer or string "
            f"labels of shape {(length,)}; {_REMEDY}"
        )
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "backslashreplace")
    held, places = np.unique(labels, return_inverse=True)
    is_number = labels.dtype.kind in "iu"
    if is_number and held[0] < 0:
        raise ValueError(
            f"{source} has negative labels for {int((labels < 0).sum()):,} samples (the lowest is {held[0]}): number "
            f"the classes from 0, or {_REMEDY}"
        )
    check_not_identifiers(source, len(held), length, f" (labels {held[0]} to {held[-1]})")
    names = tuple(map(str, held.tolist()))
    if is_number and int(held[-1]) != len(held) - 1:
        shown = ", ".join(names if len(names) < 5 else (*names[:3], "...", names[-1]))
        warnings.warn(
            f"the labels {shown} of {source} become the classes 0 to {len(held) - 1}, in this order",
            HalfstepWarning,
            stacklevel=2,
        )
    return torch.from_numpy(places.reshape(-1).astype(np.int64)), names


def check_not_identifiers(source: str, classes: int, length: int, shown: str = "") -> None:
    """Raise ValueError if there are more than 10 classes and they average fewer than 2 samples each."""
    if classes > 10 and 2 * classes > length:
        raise ValueError(
            f"{source} has {classes:,} classes for {length:,} samples{shown}, so its labels are presumably "
            f"identifiers: provide at least 2 samples per class, or {_REMEDY}"
        )
