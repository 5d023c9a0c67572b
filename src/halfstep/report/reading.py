"""Read a run folder for the report. Damaged and missing files are reported as notices.

The files may be truncated, edited or malicious, so nothing is unpickled, and paths in files are not followed. Weights
are not hashed, because the report does not certify the models.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from halfstep.report.table import Table
from halfstep.report.words import inside
from halfstep.runs import EvaluationResult, Manifest, Metrics, PlannedStage, RunFolder, StageFolder, finite, read_log
from halfstep.runtime.files import DamagedFile, check_files, check_regular, read_arrays, read_json


@dataclass(frozen=True)
class StageFacts:
    """A complete stage."""

    name: str
    manifest: Manifest
    metrics: Metrics | None
    samples: Mapping[int, np.ndarray]
    """Samples from the same seeds, by number of steps: uint8 `[n, h, w, c]` for images, or float `[n, *dims]`."""
    num_parameters: int | None = None
    """Number of values in model.safetensors, or None if the file cannot be read."""
    by_others: Mapping[tuple[str, int], np.ndarray] = field(default_factory=dict)
    """Samples from other samplers, by sampler name and number of steps."""

    @property
    def role(self) -> str:
        """The role: teacher, matched or student."""
        return self.manifest.outcome.role


@dataclass(frozen=True)
class LogPoint:
    """A row of the log."""

    update: int
    loss: float
    samples_per_second: float | None
    learning_rate: float | None


@dataclass(frozen=True)
class NearestFacts:
    """Samples of a model, and the training samples nearest to them."""

    stage: str
    num_steps: int
    samples: np.ndarray
    """Samples `[n, *dims]` in the same format as a stage's samples."""
    neighbours: np.ndarray
    """Nearest training samples `[n, k, *dims]`, in order of increasing distance."""
    distances: np.ndarray
    """Root mean square differences `[m, k]` on the scale of x0, for the first m >= n samples."""
    real: np.ndarray
    """Distances `[r]` from some of the training samples to their nearest other training sample."""
    num_searched: int


@dataclass(frozen=True)
class StudyFacts:
    """The table and the figure of a study."""

    title: str
    question: str
    table: Table
    figure: bytes | None
    """The figure as SVG."""
    seconds: float | None
    scale: str | None


@dataclass(frozen=True)
class RunFacts:
    """Everything that the report shows."""

    name: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    plan: Sequence[PlannedStage]
    """The planned stages, or empty if recipe.json contains no plan."""
    stages: Sequence[StageFacts]
    """Complete and readable stages, in order."""
    damaged: frozenset[str]
    """Names of complete stages that cannot be read."""
    log: Mapping[str, Sequence[LogPoint]]
    """Log rows by stage name, sorted by update."""
    notices: Sequence[str]
    start_name: str | None = None
    """Name of the first stage of the chain, or None if it is unknown."""
    evaluation: EvaluationResult | None = None
    nearest: NearestFacts | None = None
    studies: Sequence[StudyFacts] = ()

    @property
    def start(self) -> StageFacts | None:
        """The first stage of the chain, or None if it is missing or damaged."""
        return next((stage for stage in self.stages if stage.name == self.start_name), None)

    @property
    def others(self) -> list[StageFacts]:
        """All stages except the start of the chain."""
        return [stage for stage in self.stages if stage.name != self.start_name]

    @property
    def students(self) -> list[StageFacts]:
        """All students except the start of the chain."""
        return [stage for stage in self.others if stage.role == "student"]


def read_run(path: Path, studies: Path | None = None) -> RunFacts:
    """Read the run folder `path`.

    Args:
        studies: folder of studies (from `halfstep study`) to show, or None for RUN/studies.

    Raises:
        ValueError: if the folder contains neither a readable stage nor the log of a stage in training.
    """
    folder = RunFolder(path)
    if not path.is_dir():
        raise ValueError(f"{path} is not a run folder. Pass the folder that `halfstep run` wrote")
    notices: list[str] = []
    recipe: dict[str, Any] = {}
    with _noting(notices, "The recipe cannot be shown: ", path):
        recipe = folder.recipe()
    stages, damaged = [], {}
    for stage_folder in folder.stages():
        try:
            stages.append(_stage(stage_folder, notices))
        except (DamagedFile, OSError) as error:
            damaged[stage_folder.name] = inside(path, error)
    log = _log(folder)
    if not stages and not log:
        why = "; ".join(damaged.values()) or "it has no stages/*/manifest.json and no log.jsonl"
        raise ValueError(
            f"{path} contains nothing to report on ({why}). Pass the folder of a run that `halfstep run` started"
        )
    notices += [f"Stage {name} is damaged and was skipped: {why}." for name, why in damaged.items()]
    for what, without in (
        ("metrics (metrics.json)", [s.name for s in stages if s.metrics is None]),
        ("samples", [s.name for s in stages if not s.samples]),
    ):
        if without:
            notices.append(
                f"There are no {what} for {'stage' if len(without) == 1 else 'stages'} {', '.join(without)}."
            )
    evaluation = None
    with _noting(notices, "The evaluation is not shown: ", path):
        evaluation = folder.evaluation()
    nearest = _nearest(folder.nearest_path, notices)
    shown_studies = []
    studies = path / "studies" if studies is None else studies
    for study in sorted(studies.glob("*/study.json")):
        with _noting(notices, f"The study {study.parent.name} is not shown: ", studies):
            shown_studies.append(_study(study.parent))
    environment = recipe.get("environment")
    content = recipe.get("recipe")
    return RunFacts(
        name=path.resolve().name,
        recipe=content if isinstance(content, dict) else {},
        environment=environment if isinstance(environment, dict) else {},
        plan=folder.plan,
        stages=stages,
        damaged=frozenset(damaged),
        log=log,
        notices=notices,
        start_name=None if folder.start is None else folder.start.name,
        evaluation=evaluation,
        nearest=nearest,
        studies=shown_studies,
    )


@contextlib.contextmanager
def _noting(notices: list[str], what: str, path: Path) -> Iterator[None]:
    """Turn an error about a file in the folder `path` into a notice that starts with `what`."""
    try:
        yield
    except (ValueError, OSError) as error:
        notices.append(f"{what}{inside(path, error)}.")


def _stage(folder: StageFolder, notices: list[str]) -> StageFacts:
    manifest = folder.manifest(verify=False)
    metrics = None
    with _noting(notices, "", folder.path.parent.parent):
        metrics = folder.metrics()
    samples: dict[int, np.ndarray] = {}
    by_others: dict[tuple[str, int], np.ndarray] = {}
    for name, digest in sorted((metrics.files if metrics is not None else {}).items()):
        named = re.fullmatch(r"samples/steps-([0-9]{1,9})(?:-([a-z0-9_]{1,40}))?\.npz", name)
        if not named or int(named[1]) == 0:
            continue
        with _noting(notices, "Samples are not shown: ", folder.path.parent.parent):
            check_files(folder.path, {name: digest}, folder.metrics_path)
            array = read_arrays(folder.path / name, "arr_0")["arr_0"]
            if array.dtype.kind not in "fu" or array.ndim < 2 or not array.size:
                raise DamagedFile(f"{folder.path / name} does not contain samples")
            if named[2]:
                by_others[named[2], int(named[1])] = array
            else:
                samples[int(named[1])] = array
    num_parameters = None
    with contextlib.suppress(OSError, ValueError, SafetensorError):
        check_regular(folder.model)
        with safe_open(folder.model, framework="np") as file:
            num_parameters = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return StageFacts(folder.name, manifest, metrics, samples, num_parameters, by_others)


def _log(folder: RunFolder) -> dict[str, list[LogPoint]]:
    log: dict[str, list[LogPoint]] = {}
    for row in read_log(folder.log_path):
        stage, update, loss = row.get("stage"), row.get("update"), finite(row.get("loss"))
        if isinstance(stage, str) and isinstance(update, int) and loss is not None:
            rates = (finite(row.get(name)) for name in ("samples_per_second", "learning_rate"))
            log.setdefault(stage, []).append(LogPoint(update, loss, *rates))
    return {stage: sorted(points, key=lambda point: point.update) for stage, points in sorted(log.items())}


def _nearest(path: Path, notices: list[str]) -> NearestFacts | None:
    if not path.is_file():
        return None
    try:
        held = read_arrays(path, *(field.name for field in fields(NearestFacts)))
        facts = NearestFacts(
            stage=str(held["stage"]),
            num_steps=int(held["num_steps"]),
            samples=held["samples"],
            neighbours=held["neighbours"],
            distances=held["distances"].astype(np.float64),
            real=held["real"].astype(np.float64),
            num_searched=int(held["num_searched"]),
        )
        n, k = facts.neighbours.shape[:2]
        fitting = facts.samples.shape == (n, *facts.neighbours.shape[2:]) and facts.distances.shape[1:] == (k,)
        if not fitting or facts.distances.shape[0] < n or k < 1 or facts.samples.dtype.kind not in "fu":
            raise ValueError("its arrays do not match")
        return facts
    except (ValueError, TypeError, OverflowError):
        notices.append("report/nearest.npz cannot be read, so the nearest training samples are not shown.")
        return None


def _study(folder: Path) -> StudyFacts:
    data = read_json(folder / "study.json")
    if not isinstance(data, dict):
        raise DamagedFile(f"{folder.name}/study.json does not contain a study")
    try:
        table = Table.from_json(data.get("table"))
    except ValueError as error:
        raise DamagedFile(f"{folder.name}/study.json cannot be shown: {error}") from None
    figure = folder / "figure.svg"
    scale = data.get("scale")
    name = scale.get("name") if isinstance(scale, dict) else scale
    return StudyFacts(
        title=str(data.get("title") or folder.name),
        question=str(data.get("question") or ""),
        table=table,
        figure=figure.read_bytes() if figure.is_file() else None,
        seconds=finite(data.get("seconds")),
        scale=name if isinstance(name, str) else None,
    )
