"""What `halfstep evaluate` measures: models of a run, one stage, a pipeline of diffusers, or samples in files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

import torch

from halfstep.cli.usage import UsageError
from halfstep.core.grids import check_num_steps
from halfstep.data import Data
from halfstep.hub import import_pipeline, is_pipeline
from halfstep.measure.curve import Entry
from halfstep.measure.sources import DataSource, ModelSource, weights_of
from halfstep.models.folder import base_of, find_stage, load
from halfstep.models.model import Model
from halfstep.recipes import Recipe
from halfstep.registry import nearest
from halfstep.runs import Manifest, RunFolder, StageFolder
from halfstep.runs.evaluation import Series
from halfstep.runtime.files import DamagedFile
from halfstep.samplers import Ancestral, Sampler, samplers

LABELS = {"ddim": "DDIM", "ancestral": "ancestral", "heun": "Heun", "euler": "Euler", "dpmpp_2m": "DPM-Solver++(2M)"}
"""How samplers are written in a table; others by their names."""


@final
@dataclass(frozen=True)
class Subject:
    """What is measured."""

    kind: Literal["run", "stage", "pipeline", "images"]
    out: Path
    """Where its evaluation is written if nothing is said."""
    recipe: Recipe | None = None
    """Of its run; None outside one."""
    teacher: tuple[str, Manifest, Callable[[], Model]] | None = None
    """Name, manifest and loader of the model from which the chain starts: what the others are compared with."""
    students: tuple[tuple[str, Manifest, Callable[[], Model]], ...] = ()
    files: Path | None = None
    """A folder of images, or a file of samples."""
    notices: tuple[str, ...] = field(default=())

    @property
    def models(self) -> list[tuple[str, Manifest, Callable[[], Model]]]:
        """All of them, the teacher first."""
        return [*([] if self.teacher is None else [self.teacher]), *self.students]


def subject_of(text: str, recipe_of: Callable[[StageFolder], Recipe | None]) -> Subject:
    """What `text` names.

    Raises:
        ValueError: if it names nothing that can be measured.
    """
    path = Path(text)
    if is_pipeline(path) or (not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~"))):
        model = import_pipeline(text)
        name = Path(text).resolve().name if path.exists() else path.name
        return Subject("pipeline", Path(f"evaluation-{name}"), teacher=(name, model.manifest, lambda: model))
    if path.is_dir() and not any((path / name).exists() for name in ("manifest.json", "recipe.json", "stages")):
        return Subject("images", Path(f"evaluation-{path.resolve().name}"), files=path)
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return Subject("images", Path(f"evaluation-{path.stem}"), files=path)
    last = find_stage(path)
    recipe = recipe_of(last)
    if last.path == path:
        return _stage(last, recipe)
    return _run(RunFolder(path), recipe)


def _run(run: RunFolder, recipe: Recipe | None) -> Subject:
    """The models of a run: what is not there, not kept or damaged is left out, and said."""
    notices = []
    found: list[tuple[str, Manifest, Callable[[], Model]]] = []
    teacher = None
    for stage in run.stages():
        try:
            manifest = stage.manifest()
            if manifest.base is not None and manifest.weights_kept:
                base_of(stage, manifest)
        except (DamagedFile, OSError) as error:
            notices.append(f"Stage {stage.name} is damaged and left out: {error}.")
            continue
        if not manifest.weights_kept:
            notices.append(f"Stage {stage.name} is left out: its weights were not kept.")
        elif stage == run.start:
            teacher = (stage.name, manifest, _loader(stage))
        else:
            found.append((stage.name, manifest, _loader(stage)))
    there = {stage.name for stage in run.stages()}
    if missing := [row.name for row in run.plan if row.name not in there]:
        notices.append(
            f"The run is not at its end: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not there yet; "
            "run the same command again later."
        )
    if teacher is None and not found:
        raise DamagedFile(f"{run.path} has no stage that can be measured ({'; '.join(notices)})")
    return Subject("run", run.path / "evaluation", recipe, teacher, tuple(found), notices=tuple(notices))


def _stage(stage: StageFolder, recipe: Recipe | None) -> Subject:
    manifest = stage.manifest()
    if not manifest.weights_kept:
        raise UsageError(f"{stage.path} has no weights any more (chain.keep): measure another stage")
    entry = (stage.name, manifest, _loader(stage))
    teacher, students = (entry, ()) if manifest.outcome.role == "teacher" else (None, (entry,))
    return Subject("stage", stage.path / "evaluation", recipe, teacher, students)


def _loader(stage: StageFolder) -> Callable[[], Model]:
    return lambda: load(stage.path)


@final
@dataclass(frozen=True)
class Asked:
    """What the command line says of the curve."""

    num_steps: tuple[int, ...]
    against: tuple[str, ...] | None
    """None for the teacher by its own sampler, where there is a teacher."""
    gamma: float | None
    search_gamma: int | None
    guidance_scale: float | None
    precision: str


@final
@dataclass(frozen=True)
class Plan:
    """The rows of the curve."""

    series: list[Series]
    entries: list[Entry]
    teacher: Entry | None
    """What the others are compared with from the same noise."""


def plan_of(subject: Subject, asked: Asked, recipe: Recipe, data: Data, device: torch.device) -> Plan:
    """The rows that `asked` means: students at their own steps by their own samplers, and the series of
    `asked.against`.

    Raises:
        ValueError: if a series is unknown, or there is nothing that it could be of.
    """
    if subject.kind == "images":
        raise ValueError("samples in files have no curve")
    rows = _Rows(asked, data, device)
    steps = _steps(subject, asked, recipe)
    for model in subject.students:
        name = rows.begin_own(model[1])
        own = model[1].num_steps or (model[1].start_steps if model[1].outcome.role == "matched" else None)
        wanted = asked.num_steps if subject.kind == "stage" and asked.num_steps else (own,) if own else steps
        for count in wanted:
            rows.add(name, model, _own(model[1]), count)
    against = asked.against
    if against is None:
        # A run whose teacher is damaged has said so.
        against = () if subject.teacher is None else (f"teacher-{subject.teacher[1].outcome.sampler_name}",)
    for name in dict.fromkeys(against):
        who, sampler = _series(name)
        if subject.kind != "run" and not (subject.teacher if who == "teacher" else subject.students):
            raise UsageError(f"--against {name}: there is no {who} here; leave it out, or give the run's folder")
        if who == "teacher" and subject.teacher is not None:
            is_other, own = subject.kind == "pipeline", subject.teacher[1].num_steps
            role: Literal["other", "teacher"] = "other" if is_other else "teacher"
            rows.begin(name, sampler, role, "model" if is_other else "teacher", subject.teacher[1])
            for count in (own,) if own and not asked.num_steps else steps:
                rows.sampled(name, subject.teacher, sampler, count)
        elif who == "student" and subject.students:
            rows.begin(name, sampler, "student", "student", subject.students[0][1])
            for model in subject.students:
                if own := model[1].num_steps:
                    rows.sampled(name, model, sampler, own)
    only_students = asked.against is not None and not any(name.startswith("teacher-") for name in against)
    if asked.num_steps and subject.kind != "stage" and only_students:
        raise UsageError(
            "--num-steps says at how many steps a teacher is measured; students have their own: add --against "
            "teacher-ddim, or leave it out"
        )
    if not rows.entries:
        raise UsageError("nothing is left to be measured: name a series that there is with --against")
    searched = any(entry.gamma is not None for entry in rows.entries)
    if (asked.gamma is not None or asked.search_gamma is not None) and not (
        searched or any(series.gamma is not None for series in rows.series)
    ):
        raise UsageError("--gamma and --search-gamma say nothing without --against teacher-ancestral: add it")
    return Plan(rows.series, rows.entries, _base(subject, asked, steps, rows))


def files_plan(data: Data) -> Plan:
    """The one row of samples in files."""
    series = Series(name="samples", label="samples", role="other")
    return Plan([series], [Entry("samples", None, DataSource(data), None)], None)


class _Rows:
    """Collects the rows."""

    def __init__(self, asked: Asked, data: Data, device: torch.device) -> None:
        self.asked, self.data, self.device = asked, data, device
        self.series: list[Series] = []
        self.entries: list[Entry] = []
        self._loaded: dict[str, Callable[[], Model]] = {}

    def begin_own(self, manifest: Manifest) -> str:
        """Return the series of models of this role and sampler, begun at the first of them."""
        role, sampler = manifest.outcome.role, _own(manifest)
        kind = manifest.outcome.sampler_name
        by = LABELS.get(kind, kind) if sampler == samplers[kind]() else repr(sampler)
        label = f"{role if role == 'student' else f'{role} model'}, {by}"
        known = next((series for series in self.series if series.label == label), None)
        if known is not None:
            return known.name
        names = [role, *(f"{role}-{number}" for number in range(2, len(self.series) + 2))]
        name = next(name for name in names if name not in [series.name for series in self.series])
        gamma = sampler.gamma if isinstance(sampler, Ancestral) else None
        shown: Literal["student", "other"] = "student" if role == "student" else "other"
        self.series.append(Series(name=name, label=label, role=shown, sampler=kind, gamma=gamma))
        return name

    def begin(
        self, name: str, sampler: str, role: Literal["student", "teacher", "other"], who: str, manifest: Manifest
    ) -> None:
        gamma = None
        if samplers[sampler] is Ancestral and self.asked.search_gamma is None:
            gamma = self._gamma(manifest)
        label = f"{who}, {LABELS.get(sampler, sampler)}"
        self.series.append(Series(name=name, label=label, role=role, sampler=sampler, gamma=gamma))

    def sampled(self, name: str, model: tuple[str, Manifest, Callable[[], Model]], sampler: str, steps: int) -> None:
        """Adds a row, or one for each gamma that is tried."""
        is_own = sampler == model[1].outcome.sampler_name
        if samplers[sampler] is not Ancestral:
            self.add(name, model, _own(model[1]) if is_own else samplers[sampler](), steps)
            return
        levels = self.asked.search_gamma
        if levels is None:
            self.add(name, model, Ancestral(self._gamma(model[1])), steps)
            return
        for index in range(levels):
            self.add(name, model, Ancestral(index / (levels - 1)), steps, gamma=index / (levels - 1))

    def _gamma(self, manifest: Manifest) -> float:
        own = _own(manifest)
        known = own.gamma if isinstance(own, Ancestral) else 1.0
        return known if self.asked.gamma is None else self.asked.gamma

    def add(
        self,
        name: str,
        model: tuple[str, Manifest, Callable[[], Model]],
        sampler: Sampler,
        steps: int,
        gamma: float | None = None,
    ) -> None:
        self.entries.append(self.entry(name, model, sampler, steps, gamma))

    def entry(
        self,
        name: str,
        model: tuple[str, Manifest, Callable[[], Model]],
        sampler: Sampler,
        steps: int,
        gamma: float | None = None,
    ) -> Entry:
        stage, manifest, loader = model
        source = ModelSource(
            self._once(stage, loader),
            weights_of(manifest),
            sampler,
            self.device,
            self.data if manifest.conditions else None,
            self.asked.guidance_scale,
            self.asked.precision,
        )
        return Entry(name, stage, source, steps, gamma)

    def _once(self, stage: str, loader: Callable[[], Model]) -> Callable[[], Model]:
        """A loader that all rows of a stage share, so that it is read once."""
        if stage not in self._loaded:
            held: list[Model] = []

            def once() -> Model:
                if not held:
                    held.append(loader().to(self.device))
                return held[0]

            self._loaded[stage] = once
        return self._loaded[stage]


def _series(name: str) -> tuple[str, str]:
    who, _, sampler = name.partition("-")
    if who not in ("teacher", "student") or not sampler:
        known = [f"teacher-{sampler}" for sampler in samplers]
        raise UsageError(f"--against {name}: give teacher-SAMPLER or student-SAMPLER{nearest(name, known)}")
    _ = samplers[sampler]
    return who, sampler


def _steps(subject: Subject, asked: Asked, recipe: Recipe) -> tuple[int, ...]:
    """Steps of the baselines, the most first."""
    for count in asked.num_steps:
        check_num_steps(count)
    wanted = asked.num_steps or recipe.evaluation.teacher_steps
    if not wanted and subject.kind == "pipeline":
        raise UsageError("this pipeline takes any number of steps: say how many, for example --num-steps 4 16 64")
    if not wanted:
        start = recipe.chain.start_steps
        if subject.teacher is not None and subject.teacher[1].start_steps:
            start = subject.teacher[1].start_steps
        wanted = tuple(start // 2**k for k in range(start.bit_length()) if start % 2**k == 0)
    return tuple(sorted(set(wanted), reverse=True))


def _base(subject: Subject, asked: Asked, steps: tuple[int, ...], rows: _Rows) -> Entry | None:
    """The model where the chain starts at its own steps, by its own sampler: what its students learned to land on."""
    if subject.teacher is None or subject.kind == "pipeline":
        return None
    manifest = subject.teacher[1]
    start = manifest.num_steps or manifest.start_steps
    starts = [manifest.start_steps for _, manifest, _ in subject.students if manifest.start_steps]
    name = f"teacher-{manifest.outcome.sampler_name}"
    return rows.entry(name, subject.teacher, _own(manifest), start or max(starts, default=max(steps)))


def _own(manifest: Manifest) -> Sampler:
    sampler: Sampler = samplers.rebuild(manifest.outcome.sampler)
    return sampler
