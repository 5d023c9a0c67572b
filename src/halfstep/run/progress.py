"""A progress bar for calls from Python: one line a stage, on a terminal only."""

import contextlib
import math
from collections.abc import Iterator
from typing import final

from rich import progress as rich
from rich.console import Console


@final
class Bars:
    """The bars of the stages.

    Args:
        shown: where they are drawn; None for nowhere.
    """

    def __init__(self, shown: rich.Progress | None = None) -> None:
        self._shown = shown
        self._tasks: dict[str, rich.TaskID] = {}

    def start(self, name: str, num_updates: int, done: int) -> None:
        """Begin a stage's bar at `done` updates."""
        if self._shown is not None:
            self._tasks[name] = self._shown.add_task(name, total=num_updates, completed=done, loss="")

    def at(self, name: str, update: int, loss: float) -> None:
        """Move it to `update`."""
        if self._shown is not None:
            self._shown.update(self._tasks[name], completed=update, loss="" if math.isnan(loss) else f"loss {loss:.4g}")

    def end(self, name: str) -> None:
        """Fill it, also if the stage ended early."""
        if self._shown is not None and name in self._tasks:
            task = self._tasks[name]
            self._shown.update(task, total=self._shown.tasks[task].completed)


@contextlib.contextmanager
def bars(wanted: bool) -> Iterator[Bars]:
    """Return bars that are drawn if they are wanted and stderr is a terminal."""
    console = Console(stderr=True)
    if not wanted or not console.is_terminal or console.is_dumb_terminal:
        yield Bars()
        return
    columns = (
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        rich.MofNCompleteColumn(),
        rich.TextColumn("{task.fields[loss]}"),
        rich.TimeRemainingColumn(),
    )
    with rich.Progress(*columns, console=console) as shown:
        yield Bars(shown)
