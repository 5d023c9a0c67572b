"""The heartbeat of the process that is writing to a run, for readers in other shells and on other machines.

A file lock would not work: a reader that tests the lock may take it from a run that is starting, and shared disks may
not support locks. A small file that is rewritten every few seconds can be read by anyone.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self, final

from halfstep.runtime.files import DamagedFile, write_json

SECONDS: Final = 5.0
"""The number of seconds between heartbeats."""
SILENT_SECONDS: Final = 60.0
"""The number of seconds without a heartbeat after which a process counts as dead, even if its process id exists."""


def this_machine() -> list[str]:
    """Return the host, boot id and PID namespace. Process ids are comparable only if all of these are equal."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return parts


@final
class Heartbeat:
    """A file that is rewritten every few seconds within a `with` block and finally records how the process ended.

    {"state": "running", "finished", "stopped", "diverged" or "failed"; "message": the error message, or null; "pid";
    "machine": see `this_machine`; "started", "updated": seconds since 1970}. Failed writes are ignored, because a full
    disk is reported when a log row or a checkpoint cannot be written. A folder that was removed is not recreated.

    Args:
        ends: the state for each type of error. Any other error means "failed", and no error means "finished".
    """

    def __init__(self, path: Path, ends: Mapping[type[BaseException], str]) -> None:
        self.path, self.ends = path, ends
        self._started = time.time()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._write("running", None)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None:
            self._write("finished", None)
            return
        # The caller closed the generator, or the user pressed Ctrl-C twice.
        ends: dict[type[BaseException], str] = {GeneratorExit: "stopped", KeyboardInterrupt: "stopped", **self.ends}
        state = next((state for kind, state in ends.items() if isinstance(error, kind)), "failed")
        self._write(state, " ".join(str(error).split()) or type(error).__name__)

    def _beat(self) -> None:
        while not self._over.wait(SECONDS):
            self._write("running", None)

    def _write(self, state: str, message: str | None) -> None:
        if not self.path.parent.is_dir():
            return
        beat = {
            "state": state,
            "message": message,
            "pid": os.getpid(),
            "machine": this_machine(),
            "started": round(self._started, 3),
            "updated": round(time.time(), 3),
        }
        with contextlib.suppress(OSError, DamagedFile):
            write_json(self.path, beat)
