"""Progress bars for the Python API, with one line per stage. They are only shown on a terminal."""

import contextlib
import math
from collections.abc import Iterator
from typing import final

from rich import progress as rich
from rich.console import Console


@final
class Bars:
    """The progress bars of all stages, drawn in one display."""

    def __init__(self, display: rich.Progress) -> None:
        self._display = display
        self._tasks: dict[str, rich.TaskID] = {}

    def start(self, name: str, num_updates: int, done: int) -> None:
        """Start a stage's bar at `done` updates."""
        self._tasks[name] = self._display.add_task(name, total=num_updates, completed=done, loss="")

    def at(self, name: str, update: int, loss: float) -> None:
        """Move the bar to `update`."""
        self._display.update(self._tasks[name], completed=update, loss="" if math.isnan(loss) else f"loss {loss:.4g}")

    def end(self, name: str) -> None:
        """Fill the bar, even if the stage ended early."""
        task = self._tasks[name]
        self._display.update(task, total=self._display.tasks[task].completed)


@contextlib.contextmanager
def bars(wanted: bool) -> Iterator[Bars]:
    """Yield progress bars that are only drawn if `wanted` is true and stderr is a terminal."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        console.quiet = True
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[loss]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console, disable=console.quiet) as display:
        yield Bars(display)
