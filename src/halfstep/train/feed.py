"""What an update needs beside the networks: its batch and its random numbers, on the device before they are asked for.

All of it is a function of the update's number, so a thread can run ahead: it reads and decodes samples, draws noise,
and sends both to the device while the networks compute. Where nothing is won by that (a CPU with its data in memory),
the same is made when it is asked for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.clock import clock_device
from halfstep.core.draw import Asked, Draw
from halfstep.data import sent
from halfstep.objectives import Batch, Turn

Batches = Callable[[Draw], Batch]
"""From a draw to its batch: `x0` `[len(draw.places), *dims]`, a function of the draw alone."""


UPDATES_AHEAD: Final = 3
"""Enough for the host to ride over a slow read; each costs a batch's memory."""


def updates_ahead(device: torch.device, reads_files: bool) -> int:
    """Updates that are worth making ahead: none where the CPU itself trains on data in its memory."""
    return 0 if device.type == "cpu" and not reads_files else UPDATES_AHEAD


@final
class Place(NamedTuple):
    """A micro batch of a turn: where it lies in the global batch, and its random numbers."""

    number: int
    """Of the turn in its update."""
    turn: Turn
    draw: Draw


@final
class Fed(NamedTuple):
    """What one micro batch needs."""

    place: Place
    batch: Batch


@final
class Feed:
    """The micro batches of consecutive updates, turn by turn, on `device`.

    Args:
        places: from an update's number to the micro batches of its turns.
        ahead: updates that are made ready before they are needed, by one thread; 0 for none.
    """

    def __init__(
        self,
        batches: Batches,
        places: Callable[[int], Iterable[Sequence[Place]]],
        device: torch.device,
        ahead: int = 0,
    ) -> None:
        self._batches, self._places, self._device, self._ahead = batches, places, device, ahead
        self._asked: dict[tuple[int, str], list[Asked]] = {}

    def updates(self, first: int, last: Callable[[], int]) -> Iterator[list[list[Fed]]]:
        """Yield the micro batches of the updates from `first` on, while they are below `last()`, by turn.

        Raises:
            ValueError: if the data cannot be read; as `Batches`.
        """
        if not self._ahead:
            while first < last():
                yield self._made(first)
                first += 1
            return
        waiting: deque[Future[list[list[Fed]]]] = deque()
        thread = ThreadPoolExecutor(1, thread_name_prefix="halfstep-feed")
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
            # What a turn's first micro batch draws is what every later one will.
            place = place._replace(draw=replace(place.draw, asked=[]))
            assert place.draw.asked is not None
            self._asked[key] = place.draw.asked
        elif self._ahead:
            place = place._replace(draw=place.draw.made_ahead(tuple(self._asked[key]), self._send))
        return Fed(place, Batch(self._send(batch.x0), {name: self._send(value) for name, value in batch.cond.items()}))

    def _send(self, value: Tensor) -> Tensor:
        # Clock numbers stay where clock tensors lie, for not every device has float64.
        return sent(value, clock_device(self._device) if value.dtype == torch.float64 else self._device)
