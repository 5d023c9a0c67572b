"""The progress of a run: its status, and lines of text for any output that is not a terminal.

The command line and calls from Python print the same lines. On a terminal, calls from Python show one bar per stage.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, final

from rich import progress as rich
from rich.console import Console

from halfstep.objectives import Stage
from halfstep.report.words import count, distance_words, duration, method_words, number
from halfstep.run.events import Event, Measured, Measuring, Progress, StageEnd, StageStart
from halfstep.runs import RunStatus, StageStatus
from halfstep.runtime.terminal import printable

Stages = Sequence[tuple[str, Stage | None]]
"""The stages of a run with their names, in the format of `RunSpec.stages`."""
SECONDS: Final = 10.0
"""The time between two progress lines."""


@final
class Lines:
    """Keeps the status of a run up to date, and describes its events: each stage, each result, and the latest update at
    most every 10 seconds.

    Args:
        say: prints a line.
    """

    def __init__(self, stages: Stages, say: Callable[[str], None]) -> None:
        self._say = say
        rows = [
            StageStatus(name, None, 0, 0.0)
            if stage is None
            else StageStatus(name, stage.num_steps, stage.training.num_updates, stage.update_cost)
            for name, stage in stages
        ]
        self.status = RunStatus(Path(), "", rows)
        self._last_line = -math.inf

    def settle(self, at_work: StageStatus | None = None) -> None:
        """Set the state of every stage that is "measuring" to "done", except for `at_work`."""
        for stage in self.status.stages:
            if stage is not at_work and stage.state == "measuring":
                stage.state = "done"

    def take(self, event: Event) -> None:
        """Record an event, and describe it."""
        if not isinstance(event, StageStart | Progress | StageEnd | Measuring | Measured):
            return
        stage = next(stage for stage in self.status.stages if stage.name == event.name)
        self.settle(stage)
        match event:
            case StageStart(resumed_at=resumed_at):
                stage.state = "training"
                for later in self.status.stages:
                    if later.name in event.complete:
                        later.update, later.state = later.num_updates, "done"
                # Updates made before the run was resumed do not count towards the pace.
                stage.take({"update": resumed_at, "seconds": event.seconds})
                at = f", resuming at update {resumed_at}" if resumed_at else ""
                self._say(f"{stage.name}: {count(event.stage.training.num_updates, 'update')}{at}")
            case Progress():
                stage.num_updates = event.num_updates
                stage.take(dataclasses.asdict(event.window))
                self._now_and_then(self._progress(stage))
            case StageEnd():
                if not event.was_there:
                    stage.num_updates = stage.update or stage.num_updates
                stage.update, stage.state = stage.num_updates, "measuring"
                stage.seconds = event.seconds if stage.num_updates else 0.0
                self._say(f"{stage.name}: {'complete' if event.was_there else f'done in {duration(event.seconds)}'}")
            case Measuring(what=what, number=place, total=total):
                stage.state, stage.num_unmeasured = "measuring", total - max(0, place - 1)
                stage.measuring = f"measuring {place or 1}/{total}"
                text = f"{stage.name}: measuring {f'{place}/{total}, ' if place else ''}{what}"
                # The first measurement of the first stage takes a long time, because it trains a classifier and draws
                # the samples with the most steps.
                (self._say if place == 0 or (place == 1 and total > 1) else self._now_and_then)(text)
            case Measured(result=result, num_left=num_left, seconds=seconds, too_few=too_few):
                stage.results.append(result)
                stage.too_few = too_few
                stage.measuring_seconds, stage.num_unmeasured = seconds, num_left
                pace = f"{number(result.seconds_per_1000)} s per 1,000 samples"
                where = method_words(result.sampler, result.num_steps, result.num_evals)
                self._say(f"{stage.name}: {where}, {distance_words(result.frechet, result.kid, too_few)}, {pace}")

    def _now_and_then(self, text: str) -> None:
        """Print a progress line, unless one has already been printed in the last 10 seconds."""
        now = time.monotonic()
        if now - self._last_line > SECONDS:
            self._last_line = now
            self._say(text)

    def _progress(self, stage: StageStatus) -> str:
        seconds = self.status.seconds_left
        left = "..." if math.isnan(seconds) else duration(seconds)
        # If no update in the window trained the student, there is no student loss.
        loss = "" if stage.loss is None else f"loss {number(stage.loss)}  "
        what = "" if self.status.measuring_seconds_left else " of training"
        return (
            f"{stage.name}: update {stage.update}/{stage.num_updates}  {loss}"
            f"{stage.samples_per_second:,.0f} samples/s  {left}{what} left in this run"
        )


@final
class Bars:
    """The progress bars of all stages, drawn in one display."""

    def __init__(self, display: rich.Progress) -> None:
        self._display = display
        self._tasks: dict[str, rich.TaskID] = {}

    def take(self, event: Event) -> None:
        """Start, move or fill the bar of the event's stage. A stage that was already complete has no bar."""
        match event:
            case StageStart(name=name):
                total, done = event.stage.training.num_updates, event.resumed_at
                self._tasks[name] = self._display.add_task(name, total=total, completed=done, loss="")
            case Progress(name=name, window=window):
                loss = "" if math.isnan(window.loss) else f"loss {window.loss:.4g}"
                self._display.update(self._tasks[name], completed=window.update, loss=loss)
            case StageEnd(name=name) if name in self._tasks:
                task = self._tasks[name]
                self._display.update(task, total=self._display.tasks[task].completed)


def _say(text: str) -> None:
    """Print a line on stderr. Training continues if stderr is closed or its disk is full."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(printable(text), file=sys.stderr, flush=True)


def on_terminal() -> bool:
    """Return whether stderr is a terminal. With FORCE_COLOR, rich considers every stream a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def shown(stages: Stages, wanted: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that shows events on stderr: as bars on a terminal, and otherwise as lines.

    If `wanted` is false, nothing is shown.
    """
    console = Console(stderr=True)
    if not wanted:
        yield lambda event: None
    elif not on_terminal() or console.is_dumb_terminal:
        yield Lines(stages, _say).take
    else:
        columns = (
            rich.TextColumn("{task.description}", markup=False),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TextColumn("{task.fields[loss]}"),
            rich.TimeRemainingColumn(),
        )
        with rich.Progress(*columns, console=console) as display:
            yield Bars(display).take
