"""Stateless random numbers for training and sampling.

In training, each random number is a function of (seed, stream, update, purpose, position in the global batch). The
noise for a generated sample is a function of that sample's seed and, if a stochastic sampler adds the noise, of the
step number. No number depends on earlier draws, so the numbers stay the same when a run is resumed or when the micro
batch size or the world size changes. Each *shard* of 32 positions has one generator, so seeding takes only microseconds
per update.

All numbers are drawn on the CPU, so they do not depend on the device. Numbers can be drawn in advance and then moved to
the device.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.door import check_shape, check_whole

SHARD: Final = 32
"""The number of positions in the global batch that share a generator."""


def _number(key: tuple[object, ...]) -> int:
    """Return the generator seed for a key."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*key: object) -> torch.Generator:
    """Return a CPU generator seeded with a hash of `key`. Different keys yield independent numbers."""
    return torch.Generator().manual_seed(_number(key))


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Seed torch's global generator with a hash of `key`, and restore the state of the CPU generator on exit.

    The initial weights of new layers then depend only on the key, on every rank and in a resumed run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_number(key))
        yield


def _normal_rows(keys: Sequence[tuple[object, ...]], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return standard normal numbers `[len(keys), *shape]`, where each row is drawn with its own key.

    A single generator is reseeded for each row, because creating a generator takes longer than drawing the numbers.
    """
    rows, generator = torch.empty(len(keys), *shape, dtype=dtype), torch.Generator()
    for row, key in zip(rows.unbind(), keys, strict=True):
        row.normal_(generator=generator.manual_seed(_number(key)))
    return rows


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, stream: str, epoch: int, length: int) -> Tensor:
    return torch.randperm(length, generator=generator_for(seed, stream, "order", epoch))


class Asked(NamedTuple):
    """A recorded call to a method of `Draw`."""

    method: str
    arguments: tuple[Any, ...]


@final
@dataclass(frozen=True)
class Draw:
    """The random numbers that one update uses at some positions in the global batch.

    `stream` distinguishes the stages, and `places` is a contiguous part of `range(batch_size)`.

    An objective makes the same calls at every update. `asked` records these calls, so that a thread can draw the
    numbers in advance with `made_ahead` and move them to a device.

    Raises:
        ValueError: if `places` is empty or not within the batch.
    """

    seed: int
    stream: str
    update: int
    batch_size: int
    places: range
    asked: list[Asked] | None = field(default=None, compare=False, repr=False)
    """The list in which calls are recorded, or None if they are not recorded."""
    _ahead: dict[Asked, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.places.step != 1 or not 0 <= self.places.start < self.places.stop <= self.batch_size:
            raise ValueError(f"the places {self.places} are not within a batch of {self.batch_size} samples")

    def made_ahead(self, asked: Sequence[Asked], place: Callable[[Tensor], Tensor]) -> "Draw":
        """Return a copy of this draw that already contains the results of the calls in `asked`, moved with `place`.

        The copy returns each of these results once. All other numbers are drawn on the CPU on demand.
        """
        return replace(self, _ahead={call: place(getattr(self, call.method)(*call.arguments)) for call in asked})

    def _answer(self, call: Asked, make: Callable[[], Tensor]) -> Tensor:
        if self.asked is not None:
            self.asked.append(call)
        made = self._ahead.pop(call, None)
        return make() if made is None else made

    def _shards(self, purpose: str, draw: "functools.partial[Tensor]") -> Tensor:
        first, last = self.places.start // SHARD, -(-self.places.stop // SHARD)
        key = self.seed, self.stream, self.update, purpose
        drawn = [draw(generator=generator_for(*key, shard)) for shard in range(first, last)]
        offset = first * SHARD
        return torch.cat(drawn)[self.places.start - offset : self.places.stop - offset]

    def normal(self, purpose: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Return standard normal numbers `[len(places), *shape]`."""
        size = tuple(shape)
        draw = functools.partial(torch.randn, SHARD, *size, dtype=dtype)
        return self._answer(Asked("normal", (purpose, size, dtype)), lambda: self._shards(purpose, draw))

    def uniform(self, purpose: str) -> Tensor:
        """Return uniform float64 numbers `[len(places)]` in [0, 1)."""
        draw = functools.partial(torch.rand, SHARD, dtype=torch.float64)
        return self._answer(Asked("uniform", (purpose,)), lambda: self._shards(purpose, draw))

    def integers(self, purpose: str, high: int) -> Tensor:
        """Return uniform int64 numbers `[len(places)]` in [0, high)."""
        draw = functools.partial(torch.randint, high, (SHARD,))
        return self._answer(Asked("integers", (purpose, high)), lambda: self._shards(purpose, draw))

    def order(self, length: int) -> Tensor:
        """Return int64 indices `[len(places)]` into a data set of `length` samples, reshuffled in each epoch."""
        return self._answer(Asked("order", (length,)), lambda: self._order(length))

    def _order(self, length: int) -> Tensor:
        first = self.update * self.batch_size + self.places.start
        last, parts = first + len(self.places), []
        while first < last:
            epoch, start = divmod(first, length)
            part = _permutation(self.seed, self.stream, epoch, length)[start : start + last - first]
            parts.append(part)
            first += len(part)
        return torch.cat(parts)


def as_seed(seed: Any) -> int:
    """Return a seed, which may be a numpy or torch scalar, as an int.

    Raises:
        ValueError: if the seed is not a whole number.
    """
    found = seed.item() if hasattr(seed, "item") and getattr(seed, "shape", None) == () else seed
    if isinstance(found, bool) or not isinstance(found, int):
        raise ValueError(f"seed must be a whole number, got {seed!r}. Pass seed=0")
    return found


def as_seeds(seeds: int | Sequence[int] | Tensor) -> Sequence[int]:
    """Return one or more seeds as a sequence of whole numbers.

    Raises:
        ValueError: if a seed is not a whole number.
    """
    if isinstance(seeds, range):
        return seeds
    if isinstance(seeds, Tensor) or hasattr(seeds, "tolist"):
        seeds = seeds.tolist()
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        return [seeds]
    if isinstance(seeds, str | bool | float) or not isinstance(seeds, Iterable):
        raise ValueError(f"seeds must be whole numbers, got {seeds!r}. Pass seeds=0 or seeds=range(64)")
    found = [seed.item() if hasattr(seed, "item") else seed for seed in seeds]
    for seed in found:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(f"seeds must be whole numbers, but one of them is {seed!r}. Pass seeds=range(64)")
    return found


def sample_noise(seeds: int | Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return standard normal noise `[len(seeds), *shape]`, where each row depends only on its own seed."""
    return _normal_rows([("sample", int(seed)) for seed in as_seeds(seeds)], check_shape(shape), dtype)


def step_noise(
    seeds: int | Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Callable[[int], Tensor]:
    """Return a function that maps a step number to the noise `[len(seeds), *shape]` that the step adds.

    The noise is standard normal, and each row depends only on its own seed and on the number of the step.
    """
    seeds, shape = as_seeds(seeds), check_shape(shape)

    def noise(number: int) -> Tensor:
        return _normal_rows([("sample", int(seed), "step", number) for seed in seeds], shape, dtype)

    return noise


def sample_labels(seeds: int | Sequence[int], num_classes: int) -> Tensor:
    """Return int64 class labels `[len(seeds)]`, where each label is the seed modulo the number of classes.

    Raises:
        ValueError: if there are no classes.
    """
    check_whole("num_classes", num_classes)
    return torch.tensor([seed % num_classes for seed in as_seeds(seeds)])


def between(first: Tensor, second: Tensor, shares: Sequence[float]) -> Tensor:
    """Return noise `[len(shares), *shape]`, interpolated from `first` (share 0) to `second` (share 1), both `[*shape]`.

    The noise has the dtype and the device of `first`.

    Spherical interpolation preserves the norm of the noise, whereas linear interpolation would shrink the norm by a
    factor of sqrt(2) at the midpoint. Parallel noise tensors are interpolated linearly.

    Raises:
        ValueError: if the shapes differ, or if the two noise tensors point in opposite directions.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"cannot interpolate between noise tensors of shapes {list(first.shape)} and {list(second.shape)}"
        )
    # Some devices have no float64.
    a, b = first.cpu().double().flatten(), second.cpu().double().flatten()
    cosine = torch.dot(a, b) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    share = torch.tensor(list(shares), dtype=torch.float64)[:, None]
    if float(angle) > math.pi - 1e-6:
        raise ValueError(
            "the two noise tensors point in opposite directions, so the shortest path between them is not unique. "
            "Change one of them"
        )
    if float(angle) < 1e-6:
        mixed = (1 - share) * a + share * b
    else:
        mixed = (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return mixed.view(-1, *first.shape).to(first)
