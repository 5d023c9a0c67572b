"""Makes text safe for terminals, and handles a stdout or stderr that is closed, full or unable to encode the text."""

import contextlib
import errno
import io
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, Final, TextIO, final

CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""The characters that control a terminal or cannot be shown: control characters except tab and newline, lone surrogates
(bytes of a file name that are not UTF-8), line separators and changes of writing direction.
"""


def printable(text: str) -> str:
    """Escape control characters in the text, and replace lone surrogates."""
    return CONTROL.sub(lambda found: _shown(found[0]), text)


def _shown(character: str) -> str:
    return "\ufffd" if "\ud800" <= character <= "\udfff" else repr(character)[1:-1]


def one_line(text: object) -> str:
    """Return the text on one line, with control characters escaped and white space collapsed."""
    return printable(" ".join(str(text).split()))


def warn(text: object) -> None:
    """Print a warning on stderr."""
    print(f"halfstep: warning: {one_line(text)}", file=sys.stderr)


@final
class Output:
    """The stdout or stderr of a command. A failed write loses text, but does not end the command.

    The first error is kept, and all later output goes to the null device. Characters that the encoding does not support
    become "?".

    Args:
        stream: the stream, or None if it was closed before Python started.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error: OSError | None = None
        self._is_closed = stream is None
        self._stream: Any = stream
        if stream is None:
            self._stream = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 (until the end)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write the text, or record why the write failed."""
        if self._is_closed and self.error is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        try:
            self._stream.write(text)
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, or record why the flush failed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.error = self.error or error
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def safe_outputs() -> Iterator[Output]:
    """Replace `sys.stdout` and `sys.stderr` with an `Output` each, and yield the `Output` of stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Otherwise, the next opened file would get this descriptor, and output from C code would go to that file.
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    try:
        yield out
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
