"""What a run folder holds, read with suspicion: what is damaged or missing becomes a notice, never a crash.

Texts and numbers come from files that may be cut short, edited or hostile. Nothing is unpickled, no path out of
a file is followed, and the manifests' hashes are not checked: the report shows a run, it does not certify one.
"""

import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from halfstep.runs import DamagedFile, Manifest, Metrics, RunFolder, StageFolder, read_log


@dataclass(frozen=True)
class StageFacts:
    """A complete stage."""

    name: str
    manifest: Manifest
    metrics: Metrics | None
    samples: Mapping[int, np.ndarray]
    """Sampler steps to samples of the same seeds: uint8 `[n, h, w, c]` for images, float `[n, *dims]` otherwise."""

    @property
    def is_teacher(self) -> bool:
        """Whether the chain starts from this model: stage 0, trained here or given."""
        return re.match("0+-", self.name) is not None


@dataclass(frozen=True)
class PlannedStage:
    """A row of the plan in recipe.json."""

    name: str
    num_steps: int | None
    num_updates: int


@dataclass(frozen=True)
class LogPoint:
    """A row of the log."""

    update: int
    loss: float
    samples_per_second: float | None


@dataclass(frozen=True)
class RunFacts:
    """All that the report shows."""

    name: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: Sequence[PlannedStage]
    """Empty if recipe.json holds none."""
    stages: Sequence[StageFacts]
    """At least one, in order."""
    damaged: frozenset[str]
    """Names of complete stages that cannot be read."""
    log: Mapping[str, Sequence[LogPoint]]
    """Stage names to rows, in the order of the updates."""
    notices: Sequence[str]

    @property
    def teacher(self) -> StageFacts | None:
        """The undistilled model, None if its stage is missing or damaged."""
        return next((stage for stage in self.stages if stage.is_teacher), None)

    @property
    def students(self) -> list[StageFacts]:
        """All other stages."""
        return [stage for stage in self.stages if not stage.is_teacher]


def read_run(path: Path) -> RunFacts:
    """The facts of the run folder `path`.

    Raises:
        ValueError: if it holds no stage that is complete and can be read.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a run folder: give the folder that `halfstep run` wrote")
    notices: list[str] = []
    recipe = _recipe(folder, notices)
    stages, damaged = [], {}
    for stage_folder in folder.stages():
        try:
            stages.append(_stage(stage_folder, notices))
        except (DamagedFile, OSError) as error:
            damaged[stage_folder.name] = _inside(error, path)
    if not stages:
        why = "; ".join(damaged.values()) or "no stages/*/manifest.json"
        raise ValueError(f"{path} has no complete stage to report on ({why}): let `halfstep run` finish one")
    notices += [f"Stage {name} is damaged and left out: {why}." for name, why in damaged.items()]
    for what, without in (
        ("figures (metrics.json)", [s.name for s in stages if s.metrics is None]),
        ("samples to look at", [s.name for s in stages if not s.samples]),
    ):
        if without:
            notices.append(f"No {what} for {'stage' if len(without) == 1 else 'stages'} {', '.join(without)}.")
    environment = recipe.get("environment")
    content = recipe.get("recipe")
    return RunFacts(
        name=path.resolve().name,
        recipe=content if isinstance(content, dict) else {},
        environment=environment if isinstance(environment, dict) else {},
        plan=_plan(recipe.get("plan")),
        stages=stages,
        damaged=frozenset(damaged),
        log=_log(folder),
        notices=notices,
    )


def _inside(error: Exception, path: Path) -> str:
    """The error's message with paths as they are inside the run: a report tells nothing of the machine."""
    return str(error).replace(f"{path}/", "")


def _recipe(folder: RunFolder, notices: list[str]) -> dict[str, Any]:
    try:
        return folder.recipe()
    except (DamagedFile, OSError) as error:
        notices.append(f"The recipe cannot be shown: {_inside(error, folder.path)}.")
        return {}


def _stage(folder: StageFolder, notices: list[str]) -> StageFacts:
    manifest = folder.manifest(verify=False)
    metrics = None
    try:
        metrics = folder.metrics()
    except (DamagedFile, OSError) as error:
        notices.append(f"{_inside(error, folder.path.parent.parent)}.")
    samples = {}
    for path in sorted(folder.samples.glob("steps-*.npz")):
        named = re.fullmatch("steps-([0-9]{1,9})", path.stem)
        if not named or int(named[1]) == 0:
            continue
        try:
            samples[int(named[1])] = _array(path)
        except (
            OSError,
            ValueError,
            LookupError,
            TypeError,
            EOFError,
            RuntimeError,
            zipfile.BadZipFile,
            zlib.error,
        ):
            notices.append(f"The samples in stages/{folder.name}/samples/{path.name} cannot be read and are not shown.")
    return StageFacts(folder.name, manifest, metrics, samples)


def _array(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as file:
        array = file["arr_0"]
    if array.dtype.kind not in "fu" or array.ndim < 2 or array.size == 0:
        raise ValueError(f"no samples, but {array.dtype} {array.shape}")
    return np.asarray(array)


def _plan(rows: object) -> list[PlannedStage]:
    planned = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, dict) and isinstance(row.get("stage"), str):
            steps, updates = row.get("num_steps"), row.get("num_updates")
            planned.append(
                PlannedStage(
                    row["stage"],
                    steps if isinstance(steps, int) else None,
                    updates if isinstance(updates, int) else 0,
                )
            )
    return planned


def _log(folder: RunFolder) -> dict[str, list[LogPoint]]:
    log: dict[str, list[LogPoint]] = {}
    for row in read_log(folder.log_path):
        stage, update, loss = row.get("stage"), row.get("update"), row.get("loss")
        if isinstance(stage, str) and isinstance(update, int) and is_finite(loss):
            rate = row.get("samples_per_second")
            log.setdefault(stage, []).append(LogPoint(update, float(loss), float(rate) if is_finite(rate) else None))
    return {stage: sorted(points, key=lambda point: point.update) for stage, points in sorted(log.items())}


def is_finite(value: object) -> TypeGuard[int | float]:
    """Whether it is a number that a figure can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
