"""What a run looks like while it runs, and the table at its end.

On a terminal: one live display of the whole plan. Elsewhere: a line for each stage and figure, and one now and then.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from halfstep.cli.plan_view import PlanView
from halfstep.cli.words import duration
from halfstep.objectives import Stage
from halfstep.run.events import Event, Measured, Notice, StageEnd, StageStart
from halfstep.run.events import Progress as TrainingProgress
from halfstep.runs import RunFolder, RunStatus, StageStatus
from halfstep.runs.schema import Result

QUIET_SECONDS = 10.0
"""Time between two lines of progress where the output is no terminal."""


@final
class RunDisplay:
    """Shows the events of a run.

    Args:
        stages: as `RunSpec.stages`.
    """

    def __init__(self, stages: Sequence[tuple[str, Stage | None]], console: Console, name: str = "") -> None:
        self.console = console
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        rows = [
            StageStatus(stage_name, None, 0, 0.0)
            if stage is None
            else StageStatus(stage_name, stage.num_steps, stage.training.num_updates, stage.update_cost)
            for stage_name, stage in stages
        ]
        self.status = RunStatus(Path(), name, rows)
        self._last_line = 0.0

    def show(self, events: Iterable[Event]) -> None:
        """Runs through the events, showing each."""
        if not self.is_live:
            for event in events:
                self._take(event)
            return
        with Live(get_renderable=lambda: PlanView(self.status), console=self.console, refresh_per_second=4):
            for event in events:
                self._take(event)
            self._settle(None)

    def _settle(self, at_work: StageStatus | None) -> None:
        """Once another is at work, or has a figure of its own, those before are measured."""
        for stage in self.status.stages:
            if stage is not at_work and stage.state == "measuring":
                stage.state = "done"

    def _take(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.console.print(f"[yellow]note:[/yellow] {escape(event.text)}", highlight=False)
        if not isinstance(event, StageStart | TrainingProgress | StageEnd | Measured):
            return
        stage = next(stage for stage in self.status.stages if stage.name == event.name)
        self._settle(stage)
        if isinstance(event, StageStart):
            stage.state, stage.update = "training", event.resumed_at
            at = f", going on at update {event.resumed_at}" if event.resumed_at else ""
            self._line(f"{event.name}: {event.stage.training.num_updates} updates{at}")
        elif isinstance(event, TrainingProgress):
            stage.num_updates = event.num_updates
            stage.take(dataclasses.asdict(event.window))
            self._now_and_then(stage)
        elif isinstance(event, StageEnd):
            if not event.was_there:
                stage.num_updates = stage.update or stage.num_updates
            stage.update, stage.state = stage.num_updates, "measuring"
            stage.seconds = event.seconds if stage.num_updates else 0.0
            self._line(f"{event.name}: {'complete' if event.was_there else f'done in {duration(event.seconds)}'}")
        else:
            result = event.result
            stage.results.append((result.num_steps, result.frechet))
            self._line(
                f"{event.name}: {result.num_steps} steps, distance {result.frechet:.4g}, "
                f"{result.seconds_per_1000:.2g} s per 1,000"
            )

    def _line(self, text: str) -> None:
        if not self.is_live:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _now_and_then(self, stage: StageStatus) -> None:
        now = time.monotonic()
        if self.is_live or now - self._last_line <= QUIET_SECONDS:
            return
        self._last_line = now
        left = self.seconds_left()
        self._line(
            f"{stage.name}: update {stage.update}/{stage.num_updates}  loss {stage.loss:.4g}  "
            f"{stage.samples_per_second:,.0f} samples/s  "
            f"training left {duration(left) if not math.isnan(left) else '...'}"
        )

    def seconds_left(self) -> float:
        """Training time left for the whole plan at the present pace; NaN before there is one."""
        return self.status.seconds_left


def result_rows(folder: RunFolder) -> tuple[list[Result], list[Result]]:
    """Return the figures of a run: of the model where its chain starts, and of the students."""
    teacher: list[Result] = []
    students: list[Result] = []
    for stage in folder.stages():
        metrics = stage.metrics()
        if metrics is not None and stage == folder.start:
            teacher.extend(metrics.results)
        elif metrics is not None and stage.manifest(verify=False).outcome.role == "student":
            students.extend(metrics.results)
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
        measured = (stage.metrics() for stage in RunFolder(path).stages())
        protocol = next((metrics.protocol for metrics in measured if metrics), {})
        features = protocol.get("features", "?")
        console.print(results_table(teacher, students, f"Frechet distance in {features} features"))
        console.print(
            f"Of {protocol.get('num_samples', '?')} samples to {protocol.get('num_reference', '?')} real ones: biased "
            "upwards, the more the fewer they are, so compare within this table.",
            style="dim",
            highlight=False,
        )
