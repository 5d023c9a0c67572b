"""What an update needs beside the networks: its batch and its random numbers, on the device before they are asked for.

All of it is a function of the update's number, so a thread can run ahead: it reads and decodes samples, draws noise,
and sends both to the device while the networks compute. Where nothing is won by that (a CPU with its data in memory),
the same is made when it is asked for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.clock import clock_device
from halfstep.core.draw import Asked, Draw
from halfstep.data import sent
from halfstep.objectives import Batch

Batches = Callable[[Draw], Batch]
"""From a draw to its batch: `x0` `[len(draw.places), *dims]`, a function of the draw alone."""


UPDATES_AHEAD: Final = 3
"""Enough for the host to ride over a slow read; each costs a batch's memory."""


def updates_ahead(device: torch.device, reads_files: bool) -> int:
    """Updates that are worth making ahead: none where the CPU itself trains on data in its memory."""
    return 0 if device.type == "cpu" and not reads_files else UPDATES_AHEAD


@final
class Fed(NamedTuple):
    """What one micro batch needs."""

    draw: Draw
    batch: Batch


@final
class Feed:
    """The micro batches of consecutive updates, on `device`.

    Args:
        draws: from an update's number to the draws of its micro batches.
        ahead: updates that are made ready before they are asked for, by one thread; 0 for none.
    """

    def __init__(
        self, batches: Batches, draws: Callable[[int], Iterable[Draw]], device: torch.device, ahead: int = 0
    ) -> None:
        self._batches, self._draws, self._device, self._ahead = batches, draws, device, ahead
        self._asked: list[Asked] | None = None

    def updates(self, first: int, last: Callable[[], int]) -> Iterator[list[Fed]]:
        """The micro batches of the updates from `first` on, while they are below `last()`.

        Raises:
            ValueError: if the data cannot be read; as `Batches`.
        """
        if not self._ahead:
            while first < last():
                yield self._made(first)
                first += 1
            return
        waiting: deque[Future[list[Fed]]] = deque()
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

    def _made(self, update: int) -> list[Fed]:
        made = []
        for draw in self._draws(update):
            batch = self._batches(draw)
            if self._asked is None:
                # What the first micro batch's objective asks for is what every later one will.
                draw = replace(draw, asked=[])
                self._asked = draw.asked
            elif self._ahead:
                draw = draw.made_ahead(tuple(self._asked), self._send)
            made.append(
                Fed(draw, Batch(self._send(batch.x0), {name: self._send(value) for name, value in batch.cond.items()}))
            )
        return made

    def _send(self, value: Tensor) -> Tensor:
        # Clock numbers stay where clock tensors lie, for not every device has float64.
        return sent(value, clock_device(self._device) if value.dtype == torch.float64 else self._device)
