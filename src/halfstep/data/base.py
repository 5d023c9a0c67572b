"""Training data, whose samples are fetched by index. The same index always returns the same sample.

Images consist of uint8 pixels p, and x0 = p / 127.5 - 1, so 0 becomes exactly -1 and 255 becomes exactly 1. All other
arrays are float32 and are used unchanged.
"""

import hashlib
import math
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.draw import Asked, Draw, generator_for
from halfstep.core.noise import clock_device
from halfstep.core.warnings import HalfstepWarning
from halfstep.objectives.base import Batch, Turn


class Data(ABC):
    """A read-only sequence of samples `[*shape]`. Data with equal fingerprints has equal content."""

    source: str
    """The source of the data, as given by the user."""
    class_names: tuple[str, ...]
    """The names of the classes, in the order of `class_labels`; empty for unlabelled data."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample, which is (channels, height, width) for images."""

    @property
    @abstractmethod
    def is_image(self) -> bool:
        """Whether the samples are images, with x0 in [-1, 1] and a last axis that can be mirrored."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hexadecimal sha256 that identifies everything that `fetch` can return."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples, which is at least 1."""

    @abstractmethod
    def fetch(self, indices: Tensor) -> Batch:
        """Return the samples at `indices`, int64 `[n]`.

        In the batch, x0 is float32 `[n, *shape]`. For labelled data, class_labels is int64 `[n]`.

        Raises:
            IndexError: if an index is not in [0, len(self)).
            ValueError: if a file cannot be read.
        """

    @property
    def num_classes(self) -> int:
        """The number of classes, which is 0 for unlabelled data."""
        return len(self.class_names)


@final
@dataclass(frozen=True, eq=False)
class MemoryData(Data):
    """Samples in memory: images as uint8 `[n, channels, height, width]`, and other samples as float32 `[n, *dims]`.

    Raises:
        ValueError: if `x` has an unsupported type or too few axes, is empty or contains non-finite values; or if
            `labels` does not contain one index into `class_names` per sample, as int64 `[n]`.
    """

    source: str
    x: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] = ()
    conditions: Mapping[str, Tensor] = field(default_factory=dict)
    """Additional conditions, keyed by name, each of shape `[n, ...]`."""

    def __post_init__(self) -> None:
        check_samples(self.source, self.x)
        for name, value in self.conditions.items():
            if value.shape[:1] != self.x.shape[:1]:
                raise ValueError(
                    f"the condition {name} has the shape {list(value.shape)}, but {len(self.x)} samples need the shape "
                    f"[{len(self.x)}, ...]. Pass one row per sample"
                )
        check_labels(self.source, self.labels, self.class_names, len(self.x))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.x.shape[1:])

    @property
    def is_image(self) -> bool:
        return self.x.dtype == torch.uint8

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr((str(self.x.dtype), tuple(self.x.shape), self.class_names)).encode())
        digest.update(self.x.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        for name, value in sorted(self.conditions.items()):
            digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, indices: Tensor) -> Batch:
        indices = sent(indices, self.x.device)
        x0, cond = to_batch(self.x.index_select(0, indices), self.labels, indices)
        further = {name: value.index_select(0, indices) for name, value in self.conditions.items()}
        return Batch(x0, {**cond, **further})

    def to(self, device: torch.device | str) -> "MemoryData":
        """Return the data in the memory of `device`, so that `fetch` returns tensors on this device."""
        labels = None if self.labels is None else self.labels.to(device)
        conditions = {name: value.to(device) for name, value in self.conditions.items()}
        moved = replace(self, x=self.x.to(device), labels=labels, conditions=conditions)
        # The fingerprint is computed from the data in CPU memory, because hashlib cannot read device memory.
        vars(moved)["fingerprint"] = self.fingerprint
        return moved


def sent(value: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device without waiting for work queued on the GPU."""
    if value.device.type == "cpu" and device.type == "cuda":
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def held_on(device: torch.device, data: Data) -> Data:
    """Return the data, moved to the device if it is a GPU with at least eight times the memory that the data needs."""
    if device.type != "cuda" or not isinstance(data, MemoryData):
        return data
    largest = torch.cuda.get_device_properties(device).total_memory / 8
    held = (data.x, *data.conditions.values(), *(() if data.labels is None else (data.labels,)))
    return data.to(device) if sum(value.nbytes for value in held) <= largest else data


def training_batch(data: Data, draw: Draw, flip: bool, shown: Container[str] | None = None) -> Batch:
    """Return the samples for an update, on the data's device. They depend only on `draw`.

    Args:
        flip: whether to mirror a random half of the samples.
        shown: the names of the conditions to return; None returns all conditions.

    Raises:
        ValueError: if `flip` is set, but the samples are not images.
    """
    check_flip(data, flip)
    x0, cond = data.fetch(draw.order(len(data)))
    if flip:
        mirrored = sent(draw.uniform("flip") < 0.5, x0.device)
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)
    return Batch(x0, {name: value for name, value in cond.items() if shown is None or name in shown})


def to_batch(x: Tensor, labels: Tensor | None, indices: Tensor) -> Batch:
    """Return a batch with the samples `x` `[n, *dims]` (uint8 pixels or float32) and the labels at `indices`."""
    x0 = x.float().div_(127.5).sub_(1) if x.dtype == torch.uint8 else x
    return Batch(x0, {} if labels is None else {"class_labels": labels.index_select(0, indices)})


def named(source: str) -> str:
    """Return the name of a data source for messages. Data passed to `fit` or `distill` has the source "memory"."""
    return "the data in memory" if source == "memory" else source


def check_indices(data: Data, indices: Tensor) -> None:
    """Raise IndexError if any index is outside the range [0, len(data))."""
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(data):
        raise IndexError(f"{data.source} has {len(data)} samples, but the indices {indices.tolist()} were requested")


def check_flip(data: Data, flip: bool) -> None:
    """Raise ValueError if `flip` is set, but the samples of `data` are not images."""
    if flip and not data.is_image:
        raise ValueError(
            f"{named(data.source)} contains arrays of shape {data.shape}, but only images can be mirrored: use "
            "--data.no-flip"
        )


UNIT: Final = (0.1, 5.0)
"""The range of the data's root mean square for which training with unit-variance noise works well."""


def warn_of_scale(data: Data) -> None:
    """Warn if arrays (not images) have a very different scale from the noise, because networks train poorly on them."""
    if data.is_image:
        return
    some = generator_for("scale of the data")
    # The number of samples is limited, because a video sample can have millions of values.
    number = max(1, min(1000, 2**26 // math.prod(data.shape)))
    x0 = data.fetch(torch.randperm(len(data), generator=some)[:number].sort().values).x0.double()
    size, top = float(x0.square().mean().sqrt()), float(x0.abs().max())
    if size and not UNIT[0] <= size <= UNIT[1]:
        warnings.warn(
            f"{named(data.source)} has values up to {top:.3g} in magnitude (standard deviation {float(x0.std()):.3g}), "
            "but the noise has unit variance: networks train poorly on such data. Train on (x - mean) / std, "
            "computed for each channel, and undo this scaling in the samples",
            HalfstepWarning,
            stacklevel=2,
        )


def check_samples(source: str, x: Tensor) -> None:
    """Raise ValueError unless the samples are uint8 images or finite float32 arrays."""
    if (x.dtype, x.ndim) != (torch.uint8, 4) and (x.dtype != torch.float32 or x.ndim < 2):
        raise ValueError(
            f"{named(source)} contains a tensor of type {x.dtype} and shape {tuple(x.shape)}: images must be uint8 "
            f"[n, channels, height, width], and other samples must be float32 [n, *dims]"
        )
    if x.numel() == 0:
        raise ValueError(f"{named(source)} contains no samples (shape {tuple(x.shape)}): at least 1 sample is needed")
    if x.is_floating_point() and not (finite := x.isfinite()).all():
        bad = (~finite).nonzero()
        raise ValueError(
            f"{named(source)} contains values that are not finite in float32 ({len(bad)} in total, the first at index "
            f"{bad[0].tolist()}): remove or replace them"
        )


def check_labels(source: str, labels: Tensor | None, class_names: tuple[str, ...], length: int) -> None:
    """Raise ValueError unless the labels, if any, are one class index per sample."""
    if labels is None:
        if class_names:
            raise ValueError(
                f"{source} has {len(class_names)} class names but no labels: pass the labels, or omit the class names"
            )
        return
    if labels.dtype != torch.int64 or tuple(labels.shape) != (length,):
        raise ValueError(
            f"{source} has {labels.dtype} labels of shape {tuple(labels.shape)}: {length} samples need int64 labels "
            f"of shape {(length,)}; use --data.no-labels to ignore the labels"
        )
    outside = ((labels < 0) | (labels >= len(class_names))).nonzero()
    if len(outside):
        index = int(outside[0])
        raise ValueError(
            f"{source} has the label {int(labels[index])} at sample {index}, but its {len(class_names)} classes are "
            f"0..{len(class_names) - 1}; use --data.no-labels to ignore the labels"
        )


Batches = Callable[[Draw], Batch]
"""Maps a draw to a batch whose `x0` has the shape `[len(draw.places), *dims]`. The batch depends only on the draw."""


def updates_ahead(device: torch.device, reads_files: bool) -> int:
    """Return the number of updates to prepare in advance, which is 0 for training on the CPU with data in memory."""
    # Three updates are enough to hide a slow read. More would only use more memory.
    return 0 if device.type == "cpu" and not reads_files else 3


@final
class Place(NamedTuple):
    """A micro batch's position in the global batch, and its random numbers."""

    number: int
    """The index of the turn within the update."""
    turn: Turn
    draw: Draw


@final
class Fed(NamedTuple):
    """A micro batch and its place."""

    place: Place
    batch: Batch


@final
class Feed:
    """The micro batches of consecutive updates, grouped by turn and moved to `device`.

    Args:
        places: maps an update number to the places of its micro batches, grouped by turn.
        ahead: the number of updates that a thread prepares in advance.
    """

    def __init__(
        self, batches: Batches, places: Callable[[int], Iterable[Sequence[Place]]], device: torch.device, ahead: int = 0
    ) -> None:
        self._batches, self._places, self._device, self._ahead = batches, places, device, ahead
        self._asked: dict[tuple[int, str], list[Asked]] = {}

    def updates(self, first: int, last: Callable[[], int]) -> Iterator[list[list[Fed]]]:
        """Yield the micro batches of each update from `first` up to, but not including, `last()`, grouped by turn.

        Raises:
            ValueError: if the data cannot be read.
        """
        if not self._ahead:
            while first < last():
                yield self._made(first)
                first += 1
            return
        waiting: deque[Future[list[list[Fed]]]] = deque()
        # The current device and stream belong to a thread.
        same: dict[str, Any] = {}
        if self._device.type == "cuda":
            same = {"initializer": torch.cuda.set_stream, "initargs": (torch.cuda.current_stream(self._device),)}
        thread = ThreadPoolExecutor(1, thread_name_prefix="halfstep-feed", **same)
        try:
            next_ = first
            while first < last():
                while next_ < last() and len(waiting) <= self._ahead:
                    waiting.append(thread.submit(self._made, next_))
                    next_ += 1
                yield waiting.popleft().result()
                first += 1
        finally:
            thread.shutdown(wait=True, cancel_futures=True)

    def _made(self, update: int) -> list[list[Fed]]:
        return [[self._fed(place) for place in places] for places in self._places(update)]

    def _fed(self, place: Place) -> Fed:
        batch = self._batches(place.draw)
        key = place.number, place.turn.trains
        if key not in self._asked:
            # Later micro batches of a turn make the same draws as the first one.
            asked: list[Asked] = []
            self._asked[key] = asked
            place = place._replace(draw=replace(place.draw, asked=asked))
        elif self._ahead:
            place = place._replace(draw=place.draw.made_ahead(tuple(self._asked[key]), self._send))
        return Fed(place, Batch(self._send(batch.x0), {name: self._send(value) for name, value in batch.cond.items()}))

    def _send(self, value: Tensor) -> Tensor:
        # Clock values, which are float64, go to the clock device, because not every device supports float64.
        return sent(value, clock_device(self._device) if value.dtype == torch.float64 else self._device)
