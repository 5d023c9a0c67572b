"""The log of a run, whose JSON lines remain readable if the run is killed. A resumed run continues the log."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from halfstep.runtime.files import write_text

Row = dict[str, Any]


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether the value is a number that can be plotted. JSON may contain integers larger than any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def finite(value: object) -> float | None:
    """Return the value as a float if it can be plotted, otherwise None."""
    return float(value) if is_finite(value) else None


def read_log(path: Path, last_bytes: int | None = None) -> list[Row]:
    """Return the rows of a log, skipping truncated lines.

    Args:
        last_bytes: read only rows that start within this many bytes of the end of the file.
    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    with open(path, "rb") as file:
        if last_bytes is not None and file.seek(0, os.SEEK_END) > last_bytes:
            file.seek(-last_bytes - 1, os.SEEK_END)
            file.readline()
        else:
            file.seek(0)
        text = file.read().decode("utf-8", errors="replace")
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class RunLog:
    """A log file to which rows are appended. If the path is None, nothing is written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Append one row with flat keys."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Drop the rows that are not `wanted`, such as rows after the checkpoint from which a run resumes."""
        if self.path is None or not self.path.exists():
            return
        kept = [row for row in read_log(self.path) if wanted(row)]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
