"""The progress of a run, for the live display and for any other process that reads the run folder.

The remaining work is counted in forward passes: each stage's remaining updates times the cost of an update, from
recipe.json. The pace is that of the latest updates of the current stage or, before its first update, of the previous
stage. Updates by an earlier process do not count, because that process may have run on another machine.
"""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from halfstep.runs.best import Best, teacher_best
from halfstep.runs.folder import RunFolder, StageFolder
from halfstep.runs.heartbeat import SILENT_SECONDS, this_machine
from halfstep.runs.log import finite, read_log
from halfstep.runs.schema import Result
from halfstep.runtime.files import DamagedFile, read_json

StageState = Literal["to come", "training", "measuring", "done", "damaged"]
RunState = Literal["running", "stopped", "finished", "diverged", "failed"]

PACE_ROWS: Final = 10
"""The number of log rows over which the pace is averaged."""
SHOWN: Final = (
    *("state", "role", "num_steps", "update", "num_updates", "loss", "learning_rate", "samples_per_second"),
    *("seconds", "checkpoint", "too_few"),
)
"""The fields of a stage in the JSON status."""
RESULT: Final = {"sampler", "num_steps", "num_evals", "frechet", "kid"}
"""The fields of a result in the JSON status."""
LOG_BYTES: Final = 2**20
"""The number of bytes to read from the end of the log, which contains the rows of the current stage."""


@dataclass
class StageStatus:
    """The progress of one stage."""

    name: str
    num_steps: int | None
    """The number of sampler steps that the stage's model is distilled for, or None for any number."""
    num_updates: int
    """The planned number of updates, or the actual number once the stage is done."""
    update_cost: float = 1.0
    """The cost of an update, in single-sample forward passes."""
    state: StageState = "to come"
    update: int = 0
    """The number of finished updates."""
    seconds: float = 0.0
    """The training time so far, over all restarts."""
    loss: float | None = None
    """The mean loss over the last log interval."""
    learning_rate: float | None = None
    samples_per_second: float | None = None
    checkpoint: int | None = None
    """The update of the last checkpoint, if the stage is unfinished."""
    results: list[Result] = field(default_factory=list)
    """The results measured so far."""
    protocol: Mapping[str, Any] | None = None
    """The protocol of the results."""
    measuring_seconds: float = 0.0
    """The wall time spent on sampling and measuring."""
    too_few: bool = False
    """Whether there are too few samples for a reliable Frechet distance, so that models are compared by KID."""
    num_unmeasured: int = 1
    """The number of results still to be measured, if known."""
    measuring: str = ""
    """A description of the measurement in progress."""
    role: str | None = None
    """The role of the stage's model: teacher, matched or student, or None if it is unknown."""
    rows: list[tuple[int, float]] = field(default_factory=list)
    """The update and the training time, in seconds, in each of the last log rows."""

    @property
    def is_done(self) -> bool:
        """Whether the training of the stage is complete."""
        return self.state in ("done", "measuring", "damaged")

    @property
    def seconds_an_update(self) -> float:
        """The current pace in seconds per update, or NaN if it is unknown."""
        rows = [row for row in self.rows[-PACE_ROWS:] if row[0] <= self.update]
        if len(rows) > 1:
            return max(0.0, rows[-1][1] - rows[0][1]) / (rows[-1][0] - rows[0][0])
        return self.seconds / self.update if self.update and self.seconds else math.nan

    def take(self, row: Mapping[str, Any]) -> None:
        """Update the progress from a row of the log."""
        update, seconds = row.get("update"), finite(row.get("seconds"))
        if not isinstance(update, int) or finite(update) is None or seconds is None:
            return
        self.update, self.seconds = update, seconds
        while self.rows and self.rows[-1][0] >= update:
            self.rows.pop()
        self.rows.append((update, seconds))
        del self.rows[: -4 * PACE_ROWS]
        self.loss, self.learning_rate = finite(row.get("loss")), finite(row.get("learning_rate"))
        self.samples_per_second = finite(row.get("samples_per_second"))

    def forget(self, lifetime: float) -> None:
        """Drop the rows of earlier processes, given that the current process has run for `lifetime` seconds."""
        # Training starts slightly later than the process, so the first remaining row is about where training resumed.
        self.rows = [row for row in self.rows if row[1] >= self.seconds - lifetime]


@dataclass
class RunStatus:
    """The progress of a run."""

    path: Path
    name: str
    stages: list[StageStatus]
    state: RunState = "running"
    message: str | None = None
    """The reason why no process is working on the run, if known."""
    process: Mapping[str, Any] | None = None
    """{"pid", "host", "started", "updated"} of the last process with a heartbeat. Times are in seconds since 1970."""

    @property
    def current(self) -> StageStatus | None:
        """The current or next stage, or None once all stages are done."""
        return next((stage for stage in self.stages if not stage.is_done), None)

    @property
    def teacher_best(self) -> Best | None:
        """The best result of the chain's first model, or None if it has not been measured yet."""
        first = self.stages[0]
        return teacher_best(map(Best.of, first.results), first.too_few)

    def ratio(self, stage: StageStatus, result: Result) -> float | None:
        """Return the ratio of a later stage's Frechet distance to the teacher's best, or None if it is meaningless."""
        best, first = self.teacher_best, self.stages[0]
        if best is None or stage is first or stage.protocol != first.protocol or stage.too_few:
            return None
        return best.ratio(result.frechet)

    @property
    def updates(self) -> tuple[int, int]:
        """The number of finished updates, and the number of updates in the plan."""
        return sum(s.update for s in self.stages), sum(s.num_updates for s in self.stages)

    @property
    def share(self) -> float:
        """The completed fraction of the training, counted in forward passes."""
        done = sum(s.update * s.update_cost for s in self.stages)
        total = sum(s.num_updates * s.update_cost for s in self.stages)
        return done / total if total else 1.0

    @property
    def unit_seconds(self) -> float:
        """The number of seconds per forward pass of one sample at the current pace, or NaN if it is unknown."""
        for stage in reversed(self.stages):
            pace = stage.seconds_an_update
            if stage.update and stage.update_cost and not math.isnan(pace):
                return pace / stage.update_cost
        return math.nan

    def seconds_left_of(self, stage: StageStatus) -> float:
        """Return the training time left for a stage, or NaN if the pace is unknown."""
        if stage.is_done:
            return 0.0
        return (stage.num_updates - stage.update) * stage.update_cost * self.unit_seconds

    @property
    def training_seconds_left(self) -> float:
        """The training time left for the whole plan, or NaN if the pace is unknown."""
        return math.fsum(self.seconds_left_of(stage) for stage in self.stages)

    @property
    def measuring_seconds_left(self) -> float:
        """The time left for measuring, based on the fastest stage so far, or 0 if no stage has been measured yet."""
        known = [stage for stage in self.stages if stage.results and stage.measuring_seconds]
        if not known:
            return 0.0
        # Students take few steps, so the time that the first model takes with many steps does not apply to them.
        each = min(stage.measuring_seconds / len(stage.results) for stage in known)
        waiting = [stage for stage in self.stages if stage.state == "measuring" or not stage.is_done]
        return each * sum(stage.num_unmeasured for stage in waiting)

    @property
    def seconds_left(self) -> float:
        """The time left for training and measuring the whole plan, or NaN if the pace is unknown."""
        return self.training_seconds_left + self.measuring_seconds_left

    def as_json(self) -> dict[str, Any]:
        """Return the status as JSON-ready data. Times are in seconds, and unknown values are None."""
        done, total = self.updates
        return {
            "run": str(self.path),
            "name": self.name,
            "state": self.state,
            "message": self.message,
            "stage": None if self.current is None else self.current.name,
            "updates_done": done,
            "num_updates": total,
            "share_done": self.share,
            "teacher_best": None if self.teacher_best is None else self.teacher_best._asdict(),
            "training_seconds": math.fsum(stage.seconds for stage in self.stages),
            "training_seconds_left": finite(self.training_seconds_left),
            "measuring_seconds_left": finite(self.measuring_seconds_left),
            "process": None if self.process is None else dict(self.process),
            "stages": [
                {
                    "stage": stage.name,
                    **{name: getattr(stage, name) for name in SHOWN},
                    "seconds_left": finite(self.seconds_left_of(stage)),
                    "results": [
                        result.model_dump(mode="json", include=RESULT) | {"ratio": self.ratio(stage, result)}
                        for result in stage.results
                    ],
                }
                for stage in self.stages
            ],
        }


def read_status(path: Path, now: float | None = None) -> RunStatus:
    """Read the progress of the run in the folder `path`, without writing, locking or hashing anything.

    Args:
        now: the current time in seconds since 1970. Only tests need to set it.

    Raises:
        ValueError: if the folder is not a run.
    """
    folder = RunFolder(path)
    if not folder.recipe_path.is_file():
        raise ValueError(f"{path} is not a run (it has no recipe.json): pass the folder that `halfstep run` writes")
    data = folder.recipe()
    stages = [
        StageStatus(row.name, row.num_steps, row.num_updates, row.update_cost, role=row.role) for row in folder.plan
    ]
    if not stages:
        raise DamagedFile(f"{folder.recipe_path} contains no plan")
    by_name = {stage.name: stage for stage in stages}
    for row in read_log(folder.log_path, LOG_BYTES):
        if (known := by_name.get(str(row.get("stage")))) is not None:
            known.take(row)
    for stage in stages:
        _update_stage(stage, folder.stage(stage.name))
    recipe = data["recipe"]
    name = recipe.get("name") if isinstance(recipe, dict) else None
    status = RunStatus(path, str(name or path.resolve().name), stages)
    _update_run(status, folder, time.time() if now is None else now)
    return status


def _update_stage(stage: StageStatus, folder: StageFolder) -> None:
    for checkpoint in folder.checkpoints():
        with contextlib.suppress(ValueError):
            stage.checkpoint = int(checkpoint.name.removeprefix("checkpoint-"))
            break
    if not folder.is_complete():
        if stage.update or stage.checkpoint:
            stage.state = "training"
            stage.update = max(stage.update, stage.checkpoint or 0)
        return
    stage.checkpoint = None
    try:
        manifest = folder.manifest(verify=False)
    except (DamagedFile, OSError):
        stage.state = "damaged"
        return
    stage.state, stage.role, stage.num_steps = "done", manifest.outcome.role, manifest.num_steps
    # A given teacher's manifest counts the updates of its training outside this run.
    stage.update = min(manifest.num_updates, stage.num_updates)
    stage.num_updates = stage.update
    stage.seconds = manifest.seconds if stage.num_updates else 0.0
    with contextlib.suppress(DamagedFile, OSError):
        metrics = folder.metrics()
        if metrics is not None:
            stage.results, stage.protocol = metrics.results, metrics.protocol
            stage.too_few = metrics.too_few
            stage.measuring_seconds = metrics.seconds or 0.0


def _update_run(status: RunStatus, folder: RunFolder, now: float) -> None:
    beat = None
    with contextlib.suppress(DamagedFile):
        beat = read_json(folder.heartbeat_path)
    current = status.current
    if not isinstance(beat, dict) or beat.get("state") not in get_args(RunState):
        status.state = "finished" if current is None else "stopped"
        status.message = None if current is None else "no process has written a heartbeat"
        return
    pid, machine = beat.get("pid"), beat.get("machine")
    written = [v for v in (beat.get("started"), beat.get("updated")) if isinstance(v, int | float)]
    updated = max(written, default=0.0)
    status.process = {
        "pid": pid,
        "host": str(machine[0]) if isinstance(machine, list) and machine else None,
        "started": written[0] if written else None,
        "updated": updated,
    }
    if current is not None and len(written) == 2:
        current.forget(updated - written[0])
    status.state, status.message = beat["state"], beat.get("message")
    if status.state == "running":
        reason = _gone(pid, machine, now - updated)
        if reason is not None:
            status.state, status.message = "stopped", reason
        elif current is None:
            status.stages[-1].state = "measuring" if status.stages[-1].state == "done" else "damaged"
        elif current.state == "to come" and (before := status.stages.index(current)):
            last = status.stages[before - 1]
            if last.state == "done" and not last.results:
                last.state = "measuring"
    elif status.state == "finished" and current is not None:
        status.state = "stopped"
        status.message = f"stage {current.name} is missing: its training was stopped, or it has been removed"


def _gone(pid: object, machine: object, age: float) -> str | None:
    """Return the reason why the process counts as dead, or None if it does not."""
    if isinstance(pid, int) and pid > 0 and machine == this_machine():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return "its process ended without a message (it was killed, or the machine failed)"
        except PermissionError:
            pass
    return f"no heartbeat for {age:.0f} seconds" if age > SILENT_SECONDS else None
