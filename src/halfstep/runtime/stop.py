"""Stopping in good order: on a signal, the run saves its state and ends.

Schedulers send SIGTERM before they kill (Kubernetes, Slurm, spot machines), Slurm's `--signal` sends SIGUSR1 earlier,
a terminal that is closed sends SIGHUP, and SIGINT is Ctrl-C. Launchers often send a signal twice, to a process and to
its group, so only a second Ctrl-C after a moment ends the process at once.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final, Self, final

SAME_PRESS: Final = 0.5
"""Seconds within which a second SIGINT is the same Ctrl-C, passed on by a launcher."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state: the `signal`, and the exit `code` for the process."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.code = 128 + number


@final
class StopSignal:
    """While entered, SIGINT, SIGTERM, SIGHUP and SIGUSR1 set `number` instead of ending the process.

    Within `at_once` they also raise Interrupted.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._since = 0.0
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                # Started by nohup, which lets it run on.
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number == number == signal.SIGINT and now - self._since > SAME_PRESS:
            raise KeyboardInterrupt
        if self.number is None:
            self.number, self._since = number, now
        if self._at_once and not _importing(frame):
            # Only once: what is unwound may wait for a device or close files, and must come to its end.
            self._at_once = False
            raise Interrupted(self.number)

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Interrupted in the main thread as soon as a signal comes, or if one has come already.

        Only for work that may be left at any point. An import, which may swallow exceptions, delays the signal.
        """
        try:
            # In this order no signal is missed: one that comes between the two lines raises by itself.
            self._at_once = True
            self.check()
            yield
            self.check()
        except Exception:
            # A library, such as a compiler, may have turned Interrupted into an error of its own.
            self.check()
            raise
        finally:
            self._at_once = False


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def at_once(stop: StopSignal | None) -> contextlib.AbstractContextManager[None]:
    """Return `stop.at_once()`, or a context that does nothing without a `stop`."""
    return contextlib.nullcontext() if stop is None else stop.at_once()
