"""`halfstep status`: shows the progress of a run, from any shell or machine."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Group
from rich.live import Live
from rich.text import Text

from halfstep.cli.plan_view import PlanView
from halfstep.cli.usage import Switch, UsageError, parse
from halfstep.cli.words import Screen, print_json
from halfstep.report.words import distance_words, duration, method_words
from halfstep.runs import RunStatus, read_status

STYLES = {"running": "bold green", "finished": "green", "stopped": "yellow", "diverged": "red", "failed": "red"}


@dataclass
class StatusArguments:
    """Show the progress of a run, from any shell or machine. The run's folder is neither locked nor changed. The state
    of a run is running, finished, stopped (run the same command again), diverged or failed."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    watch: Switch = False
    """Refresh the output every two seconds until the run ends or you press Ctrl-C."""
    json: Switch = False
    """Print the status as one JSON document."""


def status(argv: Sequence[str]) -> None:
    arguments = parse(StatusArguments, argv, "halfstep status")
    if arguments.watch and arguments.json:
        raise UsageError("--watch and --json cannot be combined. Remove one of them")
    found = read_status(arguments.run)
    if arguments.json:
        print_json(found.as_json())
        return
    screen = Screen()
    if not arguments.watch:
        screen.show(view(found))
        return
    # Ctrl-C is the normal way to stop watching.
    with contextlib.suppress(KeyboardInterrupt), Live(view(found), console=screen, auto_refresh=False) as live:
        while found.state == "running":
            time.sleep(2.0)
            found = read_status(arguments.run)
            live.update(view(found), refresh=True)


def view(status: RunStatus) -> Group:
    """Return the status of a run, formatted for a terminal."""
    head = Text.assemble(f"{status.path}: ", (status.state, STYLES[status.state]))
    process = status.process or {}
    if process and status.state == "running":
        silent = duration(max(0.0, time.time() - process["updated"]))
        head.append(f", process {process['pid']} on {process['host']}, last heartbeat {silent} ago")
    elif process:
        head.append(f" {time.strftime('%Y-%m-%d %H:%M', time.localtime(process['updated']))}")
    if status.message:
        head.append(f" ({status.message})")
    lines: list[Text | PlanView] = [head, PlanView(status, reserved=6)]
    if (best := status.teacher_best) is not None:
        where = method_words(best.sampler, best.num_steps, best.num_evals)
        by_kid = status.stages[0].too_few
        distance, ratio = distance_words(best.frechet, best.kid, by_kid), "; 2x means twice this distance"
        lines.append(Text(f"teacher's best: {where}, {distance}{'' if by_kid else ratio}", style="dim"))
    if status.state != "finished" and (stage := status.current) is not None:
        if stage.checkpoint is not None:
            lines.append(Text(f"last checkpoint: update {stage.checkpoint:,} of {stage.name}"))
        elif stage.update:
            killed = "if the run is killed now, the stage restarts; Ctrl-C saves first"
            lost = killed if status.state == "running" else "the stage restarts"
            lines.append(Text(f"no checkpoint of {stage.name} yet: {lost}"))
    if status.state == "stopped":
        lines.append(Text("Run the same command again to resume"))
    return Group(*lines)
