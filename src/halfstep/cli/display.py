"""Displays a run in progress and prints its results at the end.

On a terminal, the whole plan is shown and updated in place. Any other output gets one line per stage, one line per
result and occasional progress lines.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import final

from rich.live import Live

from halfstep.cli.plan_view import PlanView
from halfstep.cli.words import Screen, print_table
from halfstep.report.quality import quality_groups, text_table
from halfstep.report.reading import StageFacts
from halfstep.run.events import Event, Notice
from halfstep.run.progress import Lines, Stages
from halfstep.runs import RunFolder


@final
class RunDisplay:
    """A display of a run that is updated as events occur.

    Args:
        stages: the stages from `RunSpec.stages`.
    """

    def __init__(self, stages: Stages, screen: Screen) -> None:
        self.screen = screen
        # With FORCE_COLOR, rich considers every stream a terminal.
        self.is_live = screen.on_terminal and not screen.is_dumb_terminal
        self.lines = Lines(stages, (lambda _: None) if self.is_live else screen.say)
        self.status = self.lines.status

    def show(self, events: Iterable[Event]) -> None:
        """Display each event as it occurs."""
        if not self.is_live:
            for event in events:
                self._take(event)
            return
        with Live(get_renderable=lambda: PlanView(self.status), console=self.screen, refresh_per_second=4):
            for event in events:
                self._take(event)
            self.lines.settle()

    def _take(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.screen.note(event.text)
        self.lines.take(event)


def show_results(path: Path, screen: Screen) -> None:
    """Print the results of a run, with one table per evaluation protocol."""
    run = RunFolder(path)
    stages = [StageFacts(one.name, one.manifest(verify=False), one.metrics(), {}) for one in run.stages()]
    start = next((stage for stage in stages if run.start is not None and stage.name == run.start.name), None)
    for group in quality_groups(stages, start):
        metric = "KID" if group.too_few else "Frechet distance"
        title = f"{metric} (features: {group.protocol.get('features', '?')})"
        print_table(text_table(group), title, screen)
    if pictures := sorted(run.stages()[-1].samples.glob("*.png")):
        screen.say(f"samples of the last model: {pictures[-1]}")
