"""Shows the plan of a run on a terminal: one line per stage and the overall progress."""

import math
import time
from itertools import compress
from typing import final

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from halfstep.report.words import count, distance_words, duration, number
from halfstep.runs import RunStatus, StageStatus

MARKS = {"done": "✓", "training": "▶", "measuring": "▶", "to come": "·", "damaged": "!"}
ASCII_MARKS = {"done": "x", "training": ">", "measuring": ">", "to come": ".", "damaged": "!"}
STYLES = {"done": "green", "training": "bold", "measuring": "bold", "to come": "dim", "damaged": "red"}
BAR_WIDTH = 12
WIDTHS = (78, 92, 110)
"""The minimum terminal widths for losses and distances, for progress bars, and for samples per second."""


@final
class PlanView:
    """A view of a run's status that fits the height of the console. Stages that do not fit are counted, not listed.

    Args:
        reserved: the number of terminal lines that other output needs.
    """

    def __init__(self, status: RunStatus, reserved: int = 3) -> None:
        self.status, self.reserved = status, reserved

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        stages, current = self.status.stages, self.status.current
        # The last line shows the total. The lines above and below the table show how many stages are omitted.
        room = max(1, console.height - self.reserved - 1) if console.is_terminal else len(stages)
        at = len(stages) - 1 if current is None else stages.index(current)
        first, last = shown_range(len(stages), at, room)
        if first:
            yield Text(f"  {count(first, 'stage')} before", style="dim")
        yield self._table(stages[first:last], options)
        if last < len(stages):
            yield Text(f"  {count(len(stages) - last, 'stage')} to come", style="dim")
        yield self._whole()

    def _table(self, stages: list[StageStatus], options: ConsoleOptions) -> Table:
        has_figures, has_bar, has_rate = (options.max_width >= width for width in WIDTHS)
        shown = (True, has_bar, True, has_figures, has_rate, True, has_figures)
        columns = [
            # Names must not be truncated.
            Column(no_wrap=True, min_width=max(len(stage.name) for stage in stages) + 2),
            Column(width=BAR_WIDTH),
            Column(justify="right", no_wrap=True),
            *(Column(no_wrap=True) for _ in range(4)),
        ]
        table = Table.grid(*compress(columns, shown), padding=(0, 2))
        marks = ASCII_MARKS if options.ascii_only else MARKS
        for stage in stages:
            table.add_row(*compress(self._cells(stage, marks[stage.state]), shown))
        return table

    def _cells(self, stage: StageStatus, mark: str) -> list[Text | ProgressBar | str]:
        style = STYLES[stage.state]
        is_given = stage.num_updates == 0
        has_bar = not is_given and stage.state not in ("to come", "damaged")
        has_rate = stage.state == "training" and stage.samples_per_second is not None
        return [
            Text(f"{mark} {stage.name}", style=style),
            ProgressBar(total=stage.num_updates, completed=stage.update, width=BAR_WIDTH) if has_bar else "",
            Text("given", style="dim") if is_given else Text(updates_words(stage), style=style),
            "" if stage.loss is None or is_given else f"loss {number(stage.loss)}",
            f"{stage.samples_per_second:,.0f} samples/s" if has_rate else "",
            Text(self._time(stage), style="dim" if stage.state == "to come" else ""),
            self._distance(stage),
        ]

    def _time(self, stage: StageStatus) -> str:
        if stage.state == "damaged":
            return "the manifest is damaged"
        if stage.is_done:
            return duration(stage.seconds) if stage.num_updates else ""
        left = self.status.seconds_left_of(stage)
        if math.isnan(left):
            return ""
        return f"{duration(left)} left" if stage.state == "training" else f"about {duration(left)}"

    def _distance(self, stage: StageStatus) -> str:
        """Return a model's best distance and its ratio to the teacher's best or, during measuring, the progress."""
        if stage.state == "measuring" and not (stage.results and stage.num_steps):
            return stage.measuring or "measuring ..."
        if not stage.results:
            return ""
        best = min(stage.results, key=lambda result: result.kid if stage.too_few else result.frechet)
        ratio = self.status.ratio(stage, best)
        words = distance_words(best.frechet, best.kid, stage.too_few)
        return words + ("" if ratio is None else f" ({number(ratio)}x)")

    def _whole(self) -> Text:
        status = self.status
        done, total = status.updates
        spent = math.fsum(stage.seconds for stage in status.stages)
        parts = [
            f"{status.share:.0%} of the training",
            f"{done:,}/{count(total, 'update')}",
            f"{duration(spent)} so far",
        ]
        left = status.seconds_left
        if status.current is None:
            parts[0], parts[2] = "all stages trained", f"{duration(spent)} of training"
        if (status.current is not None or left) and not math.isnan(left):
            parts.append(f"{duration(left)} left")
            if status.state == "running" and left < 30 * 86400:
                # If half a day or more is left, also show the date.
                clock = time.strftime("%H:%M" if left < 43200 else "%a %d %b %H:%M", time.localtime(time.time() + left))
                parts.append(f"done about {clock}")
        return Text("  ".join(parts), style="bold")


def updates_words(stage: StageStatus) -> str:
    """Return the planned number of updates of a stage or, during training, progress such as "120/1,500"."""
    done = f"{stage.update:,}/" if stage.state in ("training", "damaged") else ""
    return f"{done}{stage.num_updates:,}"


def shown_range(count: int, at: int, room: int) -> tuple[int, int]:
    """Return the range (first, last + 1) of lines to show: as many of the `count` lines as fit into `room`, including
    line `at`.

    If lines must be omitted, two lines of `room` are reserved to show how many are omitted before and after the range.
    """
    if count <= room:
        return 0, count
    inside = max(1, room - 2)
    first = min(max(0, at - inside // 2), count - inside)
    return first, first + inside
