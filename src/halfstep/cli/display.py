"""What a run looks like while it runs, and the table at its end.

On a terminal: one live display of the stage at work and the time left for the plan. Elsewhere: a line now and then.
"""

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import final

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from halfstep.objectives import Plan, Stage
from halfstep.runs import RunFolder
from halfstep.runs.schema import Result
from halfstep.train import Event, Measured, Notice, StageEnd, StageStart
from halfstep.train import Progress as TrainingProgress
from halfstep.train.cost import update_cost

QUIET_SECONDS = 10.0
"""Time between two lines of progress where the output is no terminal."""


def duration(seconds: float) -> str:
    """ "42 s", "3:05 min", "2:10 h", "12 days"."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} min"
    if seconds >= 100 * 3600:
        return f"{seconds / 86400:,.0f} days"
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h"


@final
class RunDisplay:
    """Shows the events of a run and passes them by."""

    def __init__(self, plan: Plan, console: Console) -> None:
        self.console = console
        self.total = sum(stage.num_updates * update_cost(stage) for stage in plan.stages)
        self.done = 0.0
        self._pace = math.nan
        self._stage: Stage | None = None
        self._stage_done = 0.0
        self._last_line = 0.0
        self._last = (0.0, 0.0)

    def show(self, events: Iterable[Event]) -> None:
        """Runs through the events, showing each."""
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[figures]}"),
        )
        live = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not live) as bar:
            task = bar.add_task("", total=1, figures="", visible=False)
            for event in events:
                self._take(event, bar, task)

    def _take(self, event: Event, bar: Progress, task: TaskID) -> None:
        if isinstance(event, StageStart):
            self._stage, self._stage_done = event.stage, event.resumed_at * update_cost(event.stage)
            self._last = (0.0, self._stage_done)
            at = f", going on at update {event.resumed_at}" if event.resumed_at else ""
            self.console.print(f"{event.name}: {event.stage.num_updates} updates{at}", highlight=False)
            bar.update(
                task,
                description=event.name,
                total=event.stage.num_updates,
                completed=event.resumed_at,
                visible=True,
            )
        elif isinstance(event, TrainingProgress):
            self._progress(event, bar, task)
        elif isinstance(event, StageEnd):
            if self._stage is not None:
                self.done += self._stage.num_updates * update_cost(self._stage)
            self._stage, self._stage_done = None, 0.0
            bar.update(task, visible=False)
            text = "complete" if event.was_there else f"done in {duration(event.seconds)}"
            self.console.print(f"{event.name}: {text}", highlight=False)
        elif isinstance(event, Measured):
            result = event.result
            self.console.print(
                f"{event.name}: {result.num_steps} steps, distance {result.frechet:.4g}, "
                f"{result.seconds_per_1000:.2g} s per 1,000",
                highlight=False,
            )
        elif isinstance(event, Notice):
            self.console.print(f"[yellow]note:[/yellow] {event.text}", highlight=False)

    def seconds_left(self) -> float:
        """Training time left for the whole plan at the present pace; NaN before there is one."""
        return (self.total - self.done - self._stage_done) * self._pace

    def _progress(self, event: TrainingProgress, bar: Progress, task: TaskID) -> None:
        if self._stage is None:
            return
        window = event.window
        self._stage_done = window.update * update_cost(self._stage)
        before_seconds, before_units = self._last
        if before_seconds and self._stage_done > before_units:
            pace = (window.seconds - before_seconds) / (self._stage_done - before_units)
            self._pace = pace if math.isnan(self._pace) else 0.8 * self._pace + 0.2 * pace
        self._last = (window.seconds, self._stage_done)
        left = self.seconds_left()
        figures = (
            f"loss {window.loss:.4g}  {window.samples_per_second:,.0f} samples/s  "
            f"training left {duration(left) if not math.isnan(left) else '...'}"
        )
        bar.update(task, completed=window.update, figures=figures)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._last_line > QUIET_SECONDS):
            self._last_line = now
            self.console.print(
                f"{event.name}: update {window.update}/{event.num_updates}  {figures}",
                highlight=False,
                soft_wrap=True,
            )


def result_rows(folder: RunFolder) -> tuple[list[Result], list[Result]]:
    """The figures of a run: of the undistilled teacher, and of the students."""
    teacher: list[Result] = []
    students: list[Result] = []
    for index, stage in enumerate(folder.stages()):
        metrics = stage.metrics()
        if metrics is not None:
            (teacher if index == 0 else students).extend(metrics.results)
    return teacher, students


def results_table(teacher: Sequence[Result], students: Sequence[Result], title: str = "") -> Table:
    """Steps, distances, times: teacher and students at the same numbers of steps."""
    by_steps = {result.num_steps: result for result in teacher}
    of_students = {result.num_steps: result for result in students}
    most = max(by_steps, default=0)
    base = by_steps.get(64) or by_steps.get(most)
    slowest = by_steps.get(most)
    table = Table(title=title, title_justify="left")
    for heading in ("steps", "teacher's distance", "student's distance"):
        table.add_column(heading, justify="right")
    table.add_column(f"ratio to teacher at {base.num_steps}" if base else "ratio", justify="right")
    for heading in ("student-teacher rmse", "s per 1,000", f"speed-up over {most}" if most else "speed-up"):
        table.add_column(heading, justify="right")
    for steps in sorted(by_steps.keys() | of_students.keys(), reverse=True):
        a, b = by_steps.get(steps), of_students.get(steps)
        shown = b or a
        assert shown is not None
        table.add_row(
            str(steps),
            f"{a.frechet:.4g}" if a else "-",
            f"{b.frechet:.4g}" if b else "-",
            f"{shown.frechet / base.frechet:.2f}" if base and b and base.frechet > 0 else "-",
            f"{b.teacher_rmse:.4f}" if b and b.teacher_rmse is not None else "-",
            f"{shown.seconds_per_1000:.3g}",
            f"{slowest.seconds_per_1000 / shown.seconds_per_1000:.1f}x" if slowest else "-",
        )
    return table


def show_results(path: Path, console: Console) -> None:
    """Prints the table of a run; nothing if it has not been measured."""
    teacher, students = result_rows(RunFolder(path))
    if teacher or students:
        first = RunFolder(path).stages()[0].metrics()
        features = first.protocol.get("features", "?") if first else "?"
        console.print(results_table(teacher, students, f"Frechet distance in {features} features"))
