"""Stopping in good order: the first Ctrl-C or SIGTERM asks, the second insists."""

import signal
from types import FrameType, TracebackType
from typing import Self, final


class Interrupted(Exception):
    """The run was asked to stop and has saved its state; `signal` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@final
class StopSignal:
    """While entered, SIGINT and SIGTERM set `number` instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)
