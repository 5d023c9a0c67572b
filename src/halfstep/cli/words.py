"""Output for people (durations, tables) and for machines (JSON)."""

import json
import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from halfstep.report.table import Table


def duration(seconds: float) -> str:
    """ "42 s", "3:05 min", "2:10 h", "12 days"."""
    if not math.isfinite(seconds):
        return "unknown"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60}:{seconds % 60:02d} min"
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.0f} days"
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d} h"


def console_for(json: bool = False) -> Console:
    """Return the console of progress and tables: stdout, or stderr with --json; quiet except on rank 0."""
    stream = sys.stderr if json else sys.stdout
    is_main = not int(os.environ.get("RANK", "0") or "0")
    return Console(stderr=json, width=None if stream.isatty() else 160, quiet=not is_main)


def print_json(value: Any) -> None:
    """Write the one document of a command with --json to stdout.

    Raises:
        ValueError: if it holds a number that is not finite.
    """
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(table: Table, title: str, console: Console) -> None:
    """Print a table and its notes."""
    shown = RichTable(title=escape(title), title_justify="left")
    for index, heading in enumerate(table.headings):
        shown.add_column(escape(heading), justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    for note in table.notes:
        console.print(escape(note), highlight=False)
