"""Stops a run gracefully: after a signal, the run saves its state and ends.

Schedulers (Kubernetes, Slurm, spot instances) send SIGTERM before they kill a process, Slurm's `--signal` sends SIGUSR1
earlier, a closed terminal sends SIGHUP, and Ctrl-C sends SIGINT. Launchers often send a signal both to a process and to
its process group, so a second Ctrl-C is ignored if it directly follows the first. Later, it ends the process, whichever
signal came first.
"""

import contextlib
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final, Self, final

SAME_PRESS: Final = 0.5
"""The number of seconds within which a second SIGINT counts as the same Ctrl-C, forwarded by a launcher."""


class Interrupted(Exception):
    """The run was asked to stop and has saved its state. The exception contains the `signal` and the exit `code`."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
        self.code = 128 + number


@final
class StopSignal:
    """A context in which SIGINT, SIGTERM, SIGHUP and SIGUSR1 set `number` instead of ending the process.

    Within `at_once`, these signals also raise Interrupted.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._pressed: float | None = None
        """When the first SIGINT arrived, in seconds of `time.monotonic`."""
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            handler = signal.getsignal(number)
            if number == signal.SIGHUP and handler == signal.SIG_IGN:
                # The process was started with nohup, so SIGHUP must remain ignored.
                continue
            if handler is None:
                # A host that embeds Python has installed a handler, which Python could not restore.
                continue
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._pressed is None:
                self._pressed = now
            elif now - self._pressed > SAME_PRESS:
                raise KeyboardInterrupt
        if self.number is None:
            self.number = number
        if self._at_once and not _importing(frame):
            # Raise only once, because unwinding may wait for a device or close files, and must not be interrupted.
            self._at_once = False
            raise Interrupted(self.number)

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise Interrupted in the main thread as soon as a signal arrives, or if a signal has already arrived.

        Use this only for work that can be abandoned at any point. During an import, the signal is deferred, because
        imports may swallow exceptions.
        """
        try:
            # With this order, no signal is missed: a signal that arrives between the two lines raises Interrupted
            # itself.
            self._at_once = True
            self.check()
            yield
            self.check()
        except Exception:
            # A library such as a compiler may have replaced Interrupted with an error of its own.
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
    """Return `stop.at_once()`, or a context that does nothing if `stop` is None."""
    return contextlib.nullcontext() if stop is None else stop.at_once()
