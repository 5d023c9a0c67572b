"""Opens and checks the training data of the Python API before training starts."""

import functools
import os
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

from halfstep.core.door import got
from halfstep.core.draw import Draw
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data, DataConfig, MemoryData, held_on, open_data, training_batch, warn_of_scale
from halfstep.data.base import Batches, updates_ahead
from halfstep.objectives import Batch

Array = Tensor | np.ndarray
Source = Array | tuple[Array, Mapping[str, Array]] | Data | str | Path | Iterable[Any]
"""The kinds of training data that the Python API accepts (see `distill`)."""

CLASSES: Final = "class_labels"
MOST_CLASSES: Final = 10**6
"""The largest accepted number of classes."""


@final
class StreamedBatches:
    """Batches from an iterable, regrouped to the training batch size. The iterable is restarted at its end.

    Unlike with other data, samples arrive in order, regardless of the update number. Every process must receive
    the same batches and uses only its share of each.

    Raises:
        ValueError: if an item is neither x0 nor (x0, cond), the parts of an item differ in length, or the iterable is
            empty, as a generator is on the second pass. The first item is checked immediately.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self._batches = batches
        self._iterator: Iterator[Any] = iter(batches)
        self._held: list[Batch] = []
        self._seen = 0
        self._cut: tuple[tuple[str, int], Batch] | None = None
        self._held.append(self._next())

    @property
    def first(self) -> Batch:
        """The next batch from the iterable, before it is regrouped."""
        return self._held[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return tuple(self.first.x0.shape[1:])

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """The conditions, each with its per-sample shape."""
        return _forms(self.first.cond)

    def __call__(self, draw: Draw) -> Batch:
        key = (draw.stream, draw.update)
        if self._cut is None or self._cut[0] != key:
            self._cut = key, self._next_update(draw.batch_size)
        x0, cond = self._cut[1]
        mine = slice(draw.places.start, draw.places.stop)
        return Batch(x0[mine], {name: value[mine] for name, value in cond.items()})

    def _next_update(self, wanted: int) -> Batch:
        """Return the next batch of `wanted` samples."""
        while sum(len(batch.x0) for batch in self._held) < wanted:
            self._held.append(self._next())
        names = list(self._held[0].cond)
        x0 = torch.cat([batch.x0 for batch in self._held])
        cond = {name: torch.cat([batch.cond[name] for batch in self._held]) for name in names}
        self._held = [Batch(x0[wanted:], {name: value[wanted:] for name, value in cond.items()})]
        return Batch(x0[:wanted], {name: value[:wanted] for name, value in cond.items()})

    def _next(self) -> Batch:
        try:
            item = next(self._iterator)
        except StopIteration:
            self._iterator = iter(self._batches)
            try:
                item = next(self._iterator)
            except StopIteration:
                raise ValueError(
                    f"the batches ended after {self._seen} samples and cannot be restarted: pass a list, a "
                    "DataLoader or another restartable iterable, not a generator"
                ) from None
        # A DataLoader over a TensorDataset yields lists, which contain a single tensor if the data set has only one.
        x0, cond = (*item, None)[:2] if isinstance(item, tuple | list) and len(item) in (1, 2) else (item, None)
        cond = {} if cond is None else cond
        if isinstance(cond, Tensor):
            raise ValueError(
                "a batch's conditions must have names, got a tensor. Pass (x0, {'class_labels': labels}), for example "
                "((x, {'class_labels': y}) for x, y in loader) from the __iter__ of a class"
            )
        if isinstance(x0, np.ndarray):
            x0 = _numbers("a batch's x0", x0)
        if not isinstance(x0, Tensor) or not isinstance(cond, Mapping):
            raise ValueError(
                f"a batch must be x0 or (x0, cond), where x0 is a tensor [batch, *dims] and cond maps names to tensors "
                f"[batch, ...], got {type(x0).__name__} and {type(cond).__name__}"
            )
        _check_dense("a batch's x0", x0)
        if not x0.is_floating_point():
            raise ValueError(
                f"a batch's x0 must be floats, got {x0.dtype}: scale pixels to [-1, 1] (x / 127.5 - 1), or pass "
                "them as one uint8 tensor [n, channels, height, width]"
            )
        x0 = x0.detach().float()
        if not x0.isfinite().all():
            raise ValueError(
                f"the batch after the first {self._seen} samples contains values that are not finite. Remove or "
                "replace them"
            )
        if x0.ndim < 2:
            raise ValueError(
                f"a batch must have the shape [batch, *dims], got {list(x0.shape)}. Stack single samples: "
                "torch.stack(samples)"
            )
        cond = {name: _condition(name, value) for name, value in cond.items()}
        if CLASSES in cond:
            _check_labels(cond[CLASSES])
        if x0.numel() == 0 or any(value.shape[:1] != x0.shape[:1] for value in cond.values()):
            lengths = ", ".join(f"{name} of {list(value.shape)}" for name, value in cond.items())
            raise ValueError(
                f"the parts of a batch must have the same length, at least 1, got x0 of shape {list(x0.shape)}"
                + (f" and {lengths}" if lengths else "")
            )
        if self._held and _forms(cond) != self.conditions:
            raise ValueError(
                f"every batch needs the same conditions, got {_forms(cond)} after {self.conditions}. Give all "
                "batches the same names and shapes"
            )
        if self._held and x0.shape[1:] != self._held[0].x0.shape[1:]:
            raise ValueError(
                f"every batch needs samples of the same shape, got {list(x0.shape[1:])} after "
                f"{list(self._held[0].x0.shape[1:])}. Resize the samples"
            )
        self._seen += len(x0)
        return Batch(x0, cond)


def _condition(name: str, value: Any) -> Tensor:
    """Return the values of a condition as a tensor. float64 becomes float32, and integers become int64."""
    if not isinstance(value, Tensor | np.ndarray):
        raise ValueError(f"the condition {name} must be a tensor or an array, got {got(value)}. Pass torch.tensor(...)")
    if isinstance(value, np.ndarray):
        value = _numbers(f"the condition {name}", value)
    _check_dense(f"the condition {name}", value)
    tensor = value.detach().cpu()
    if tensor.dtype == torch.float64:
        tensor = tensor.float()
    if not tensor.is_floating_point():
        return tensor if tensor.dtype == torch.bool else tensor.long()
    if not tensor.isfinite().all():
        raise ValueError(f"the condition {name} has values that are not finite. Remove or replace them")
    return tensor


def _forms(cond: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in cond.items()}


def _check_dense(what: str, value: Tensor) -> None:
    forms = {
        "complex": value.is_complex(),
        "nested": value.is_nested,
        "sparse": value.layout != torch.strided,
        "on meta": value.is_meta,
    }
    if found := next((form for form, is_so in forms.items() if is_so), None):
        raise ValueError(f"{what} must be dense real numbers in memory, got a tensor that is {found}. Convert it")


def _numbers(what: str, array: np.ndarray) -> Tensor:
    """Copy a numeric array to a tensor, because torch supports neither negative strides nor foreign byte orders."""
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{what} must be numbers, got an array of {array.dtype}. Pass floats [n, *dims]")
    if isinstance(array, np.ma.MaskedArray) and np.ma.getmaskarray(array).any():
        raise ValueError(f"{what} must not have masked entries. Fill or remove them")
    native = array.dtype.newbyteorder("=")
    if native.itemsize > 8:  # long doubles
        native = np.dtype(np.float64)
    return torch.from_numpy(np.array(array, dtype=native, order="C"))


def _check_labels(labels: Tensor) -> None:
    """Raise ValueError unless the condition class_labels contains classes or one row of numbers per sample."""
    usual = "Pass whole numbers that start at 0, as int64 [n]"
    if labels.ndim == 2 and labels.shape[1] == 1:
        raise ValueError(f"{CLASSES} has the shape {list(labels.shape)}. Pass labels.flatten()")
    if labels.ndim != 1 or not len(labels):
        return
    if labels.dtype != torch.int64:
        raise ValueError(
            f"{CLASSES} must be integer class indices, got {labels.dtype}. {usual}, or give the condition another name"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"{CLASSES} has the label {int(labels.min())}. {usual}")
    number = int(labels.max()) + 1
    if number > MOST_CLASSES:
        raise ValueError(f"{CLASSES} has the label {number - 1:,}, which is presumably an identifier. {usual}")


def _warn_of_gaps(labels: Tensor) -> None:
    number = int(labels.max()) + 1
    if gaps := sorted(set(range(number)) - set(labels.unique().tolist())):
        warnings.warn(
            f"{CLASSES} go up to {number - 1}, but there are no samples of class {gaps[0]}"
            + (f" (and {len(gaps) - 1} more)" if gaps[1:] else "")
            + ", so no model can learn it. Number the classes from 0 without gaps",
            HalfstepWarning,
            stacklevel=2,
        )


def in_memory(x0: Array, cond: Mapping[str, Array] | None = None) -> MemoryData:
    """Return samples and their conditions as data. Floats of any precision become float32; uint8 values become images.

    Raises:
        ValueError: if the samples are integers other than uint8 images, are not finite or have only a batch axis, or if
            a condition does not have one row per sample.
    """
    if isinstance(x0, np.ndarray):
        x0 = _numbers("samples", x0)
    _check_dense("samples", x0)
    x0 = x0.detach().cpu()
    if x0.is_floating_point():
        x0 = x0.float()
    elif x0.dtype != torch.uint8 or x0.ndim != 4:
        raise ValueError(
            f"samples must be floats [n, *dims], or images as uint8 [n, channels, height, width], got {x0.dtype} of "
            f"shape {list(x0.shape)}. Scale pixels to [-1, 1]: x / 127.5 - 1"
        )
    elif x0.shape[1] not in (1, 3, 4) and x0.shape[3] in (1, 3, 4):
        raise ValueError(
            f"images must have the shape [n, channels, height, width], got {list(x0.shape)}. Move the channels: "
            "x.permute(0, 3, 1, 2)"
        )
    if x0.ndim == 1:
        raise ValueError(
            f"samples need an axis besides the batch axis, got the shape {list(x0.shape)}. Pass x[:, None]"
        )
    conditions = {name: _condition(name, value) for name, value in (cond or {}).items()}
    labels, names = None, tuple[str, ...]()
    if (given := conditions.get(CLASSES)) is not None:
        _check_labels(given)
        if given.shape == x0.shape[:1] and len(given):
            labels = conditions.pop(CLASSES)
            _warn_of_gaps(labels)
            names = tuple(map(str, range(int(labels.max()) + 1)))
    return MemoryData("memory", x0, labels, names, conditions)


def as_source(data: Source | StreamedBatches) -> Data | StreamedBatches:
    """Open and check the user's data, and warn if its scale differs greatly from that of the noise.

    Raises:
        ValueError: if the data cannot be used.
    """
    opened = _opened(data)
    warn_of_scale(opened if isinstance(opened, Data) else MemoryData("the first batch", opened.first.x0))
    return opened


def _opened(data: Source | StreamedBatches) -> Data | StreamedBatches:
    if isinstance(data, Data | StreamedBatches):
        return data
    if isinstance(data, str | Path):
        if not str(data):
            raise ValueError("the path of the data is empty. Pass the path of a folder or file")
        # A trailing slash marks a path, so that Path("digits") is a folder, and "digits" is scikit-learn's digits.
        return open_data(DataConfig(source=data if isinstance(data, str) else os.path.join(data, "")))
    if isinstance(data, Tensor | np.ndarray):
        return in_memory(data)
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[0], Tensor | np.ndarray):
        x0, cond = data
        if cond is None or isinstance(cond, Mapping):
            return in_memory(x0, cond)
        if not isinstance(cond, Tensor) or cond.shape != x0.shape:
            raise ValueError(
                f"the conditions of the data must have names, got {got(cond)}. Pass (x0, {{'class_labels': labels}})"
            )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(
            f"the data must be batches, got the Dataset {type(data).__name__} of single samples. Pass "
            "torch.utils.data.DataLoader(dataset, batch_size=128)"
        )
    if isinstance(data, type | nn.Module | Mapping) or not isinstance(data, Iterable):
        raise ValueError(
            f"the data must be a tensor or an array [n, *dims], (x0, {{name: tensor}}), a path or an "
            f"iterable of batches, got {got(data)}. Pass one of them"
        )
    return StreamedBatches(data)


def conditions_of(data: Data | StreamedBatches) -> dict[str, tuple[int, ...]]:
    """Return the data's conditions other than integer class labels, each with its per-sample shape."""
    if isinstance(data, StreamedBatches):
        return data.conditions
    first = data.fetch(torch.zeros(1, dtype=torch.int64)).cond
    known = {CLASSES} if data.num_classes else set()
    return {name: tuple(value.shape[1:]) for name, value in first.items() if name not in known}


def as_batches(
    data: Data | StreamedBatches, device: torch.device, flip: bool = False, shown: Container[str] | None = None
) -> tuple[Batches, int]:
    """Return a function that draws training batches, and how many updates ahead to prepare them.

    If the data is small, batches are drawn from a copy on the device.

    Args:
        flip, shown: as for `training_batch`. They are ignored for streamed batches.
    """
    if isinstance(data, StreamedBatches):
        return data, updates_ahead(device, reads_files=False)
    batches = functools.partial(training_batch, held_on(device, data), flip=flip, shown=shown)
    return batches, updates_ahead(device, reads_files=not isinstance(data, MemoryData))
