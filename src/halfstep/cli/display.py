"""Displays a run in progress and prints its results at the end.

On a terminal, the whole plan is shown and updated in place. Any other output gets one line per stage, one line per
result and occasional progress lines.
"""

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import final

from rich.live import Live

from halfstep.cli.plan_view import PlanView
from halfstep.cli.words import Screen, print_table
from halfstep.objectives import Stage
from halfstep.report.quality import quality_groups, text_table
from halfstep.report.reading import StageFacts
from halfstep.report.words import count, distance_words, duration, method_words, number
from halfstep.run.events import Event, Measured, Measuring, Notice, StageEnd, StageStart
from halfstep.run.events import Progress as TrainingProgress
from halfstep.runs import RunFolder, RunStatus, StageStatus


@final
class RunDisplay:
    """A display of a run that is updated as events occur.

    Args:
        stages: the stages from `RunSpec.stages`.
    """

    def __init__(self, stages: Sequence[tuple[str, Stage | None]], screen: Screen) -> None:
        self.screen = screen
        self.is_live = screen.is_terminal and not screen.is_dumb_terminal
        rows = [
            StageStatus(name, None, 0, 0.0)
            if stage is None
            else StageStatus(name, stage.num_steps, stage.training.num_updates, stage.update_cost)
            for name, stage in stages
        ]
        self.status = RunStatus(Path(), "", rows)
        self._last_line = 0.0

    def show(self, events: Iterable[Event]) -> None:
        """Display each event as it occurs."""
        if not self.is_live:
            for event in events:
                self._take(event)
            return
        with Live(get_renderable=lambda: PlanView(self.status), console=self.screen, refresh_per_second=4):
            for event in events:
                self._take(event)
            self._settle(None)

    def _settle(self, at_work: StageStatus | None) -> None:
        """Change the state of every stage except `at_work` from "measuring" to "done"."""
        for stage in self.status.stages:
            if stage is not at_work and stage.state == "measuring":
                stage.state = "done"

    def _take(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.screen.note(event.text)
        if not isinstance(event, StageStart | TrainingProgress | StageEnd | Measuring | Measured):
            return
        stage = next(stage for stage in self.status.stages if stage.name == event.name)
        self._settle(stage)
        match event:
            case StageStart(resumed_at=resumed_at):
                stage.state = "training"
                # Updates made before the run was resumed do not count towards the pace.
                stage.take({"update": resumed_at, "seconds": event.seconds})
                at = f", resuming at update {resumed_at}" if resumed_at else ""
                self._line(f"{stage.name}: {count(event.stage.training.num_updates, 'update')}{at}")
            case TrainingProgress():
                stage.num_updates = event.num_updates
                stage.take(dataclasses.asdict(event.window))
                self._now_and_then(self._progress(stage))
            case StageEnd():
                if not event.was_there:
                    stage.num_updates = stage.update or stage.num_updates
                stage.update, stage.state = stage.num_updates, "measuring"
                stage.seconds = event.seconds if stage.num_updates else 0.0
                self._line(f"{stage.name}: {'complete' if event.was_there else f'done in {duration(event.seconds)}'}")
            case Measuring(what=what, number=place, total=total):
                stage.state, stage.num_unmeasured = "measuring", total - max(0, place - 1)
                stage.measuring = f"measuring {place or 1}/{total}"
                text = f"{stage.name}: measuring {f'{place}/{total}, ' if place else ''}{what}"
                # Always announce the slowest measurements: features of the real data, and samples with the most steps.
                (self._line if place == 0 or (place == 1 and total > 1) else self._now_and_then)(text)
            case Measured(result=result, num_left=num_left, seconds=seconds, too_few=too_few):
                stage.results.append(result)
                stage.too_few = too_few
                stage.measuring_seconds, stage.num_unmeasured = seconds, num_left
                pace = f"{number(result.seconds_per_1000)} s per 1,000 samples"
                where = method_words(result.sampler, result.num_steps, result.num_evals)
                self._line(f"{stage.name}: {where}, {distance_words(result.frechet, result.kid, too_few)}, {pace}")

    def _line(self, text: str) -> None:
        if not self.is_live:
            self.screen.say(text)

    def _now_and_then(self, text: str) -> None:
        """Print a progress line unless one was printed in the last 10 seconds."""
        now = time.monotonic()
        if self.is_live or now - self._last_line <= 10.0:
            return
        self._last_line = now
        self._line(text)

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


def show_results(path: Path, screen: Screen) -> None:
    """Print the results of a run, with one table per evaluation protocol."""
    run = RunFolder(path)
    stages = [StageFacts(one.name, one.manifest(verify=False), one.metrics(), {}) for one in run.stages()]
    start = next((stage for stage in stages if run.start is not None and stage.name == run.start.name), None)
    for group in quality_groups(stages, start):
        metric = "KID" if group.too_few else "Frechet distance"
        title = f"{metric} in {group.protocol.get('features', '?')} features"
        print_table(text_table(group), title, screen)
    if pictures := sorted(run.stages()[-1].samples.glob("*.png")):
        screen.say(f"samples of the last model: {pictures[-1]}")
