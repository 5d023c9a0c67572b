"""The arguments, subjects and rows of `halfstep evaluate`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, final

import pydantic
import torch
import tyro
from pydantic import Field

from halfstep.cli.arguments import recipe_of_stage
from halfstep.cli.usage import Count, Guidance, Share, Side, Steps, Switch, UsageError
from halfstep.core.grids import check_num_steps
from halfstep.data import Data
from halfstep.hub import import_pipeline, is_pipeline
from halfstep.measure.curve import Entry
from halfstep.measure.evaluate import Method, finest, teacher_methods
from halfstep.measure.sources import ModelSource, sampler_of
from halfstep.models.folder import base_of, find_stage, load, model_path, pretrained
from halfstep.models.model import Model
from halfstep.recipes import Recipe
from halfstep.registry import nearest
from halfstep.report.words import sampler_label
from halfstep.runs import Manifest, RunFolder, StageFolder
from halfstep.runs.evaluation import Series
from halfstep.runtime.files import DamagedFile
from halfstep.samplers import Ancestral, Sampler, samplers


@pydantic.dataclasses.dataclass
class EvaluateArguments:
    """Measure each student of a run at its own number of steps, and the teacher at all of these numbers. SUBJECT is a
    run, a stage, a diffusers pipeline (a folder or a name on the Hub), a folder of images, or a .npz file of samples.
    To resume, run the same command again: finished samples are reused. The results are written to evaluation.json, .md,
    .csv and .svg, and the samples are kept.
    """

    subject: tyro.conf.Positional[str]
    """Model, run or samples to evaluate."""
    num_steps: tuple[Steps, ...] = ()
    """Numbers of steps for the --against series or for a stage; by default, those in the recipe or, if it has none, the
    first number of steps in the chain, halved repeatedly."""
    against: tuple[str, ...] | None = None
    """Series to compare with the students: teacher-SAMPLER or student-SAMPLER (see `halfstep ls samplers`). The default
    is teacher-ddim and, without --num-steps, also teacher-heun."""
    extractors: tuple[str, ...] = ()
    """Feature extractors for the distances: NAME or NAME=WEIGHTS (see `halfstep ls extractors`); by default, the
    recipe's extractor.
    """
    seeds: Annotated[int, Field(ge=1, le=1000)] = 1
    """Number of sets of seeds; with several sets, the results include the spread."""
    num_samples: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    """Number of samples per set; by default, the number in the recipe or, for a folder, all of its samples."""
    gamma: Share | None = None
    """Variance of ancestral sampling, from the lower bound (0) to the upper bound (1, the default)."""
    search_gamma: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Number of gammas from 0 to 1 to try for each ancestral row; the best is shown. The paper tries 11."""
    guidance_scale: Guidance | None = None
    """Guidance scale, for models that support guidance; by default, each model's own scale."""
    precision: Literal["float32", "bf16"] | None = None
    """Precision for sampling (bf16 is bfloat16); by default, the precision in the recipe."""
    batch_size: Count | None = None
    """Number of samples drawn at once; by default, the number in the recipe, or as many as fit in memory."""
    data: str | None = None
    """Real samples to compare with; by default, the data of the recipe."""
    image_size: Side | None = None
    """Height and width to resize real images to; by default, the size in the recipe."""
    channels: Literal[1, 3] | None = None
    """Channels of the real images: 1 for grey, 3 for colour; by default, the setting in the recipe."""
    split: str | None = None
    """Split of the real data; by default, the training split."""
    no_labels: Switch = False
    """Ignore the classes of the real data."""
    label_column: str | None = None
    """Table column with the class of each real image; by default, the column in the recipe."""
    skip_broken: Switch = False
    """Skip real images that cannot be read."""
    max_bytes: int | None = None
    """Maximum memory, in bytes, for the pixels of the real images; by default, the limit in the recipe."""
    out: Path | None = None
    """Output folder; by default, SUBJECT/evaluation for a run or stage, otherwise ./evaluation-NAME."""
    json: Switch = False
    """Print the content of evaluation.json; progress goes to stderr."""


class Candidate(NamedTuple):
    """A model that can be measured."""

    name: str
    manifest: Manifest
    load: Callable[[], Model]


@final
@dataclass(frozen=True)
class Subject:
    """The subject of an evaluation."""

    kind: Literal["run", "stage", "pipeline", "images"]
    out: Path
    """The default output folder."""
    recipe: Recipe | None = None
    """The recipe of the run that contains the subject, or None outside a run."""
    teacher: Candidate | None = None
    students: tuple[Candidate, ...] = ()
    files: Path | None = None
    """The folder of images or the file of samples, if the subject is not a model."""
    notices: tuple[str, ...] = ()
    store: Path | None = None
    """The default folder for samples and metrics; `out` if None."""


def subject_of(text: str) -> Subject:
    """Return the subject with this path or Hub name; raise ValueError if it cannot be measured."""
    path = model_path(text)
    if is_pipeline(path) or (not path.exists() and text.count("/") == 1 and not text.startswith((".", "/", "~"))):
        model = import_pipeline(text)
        name = Path(text).resolve().name if path.exists() else path.name
        return Subject("pipeline", Path(f"evaluation-{name}"), teacher=Candidate(name, model.manifest, lambda: model))
    if path.is_dir() and not any((path / name).exists() for name in ("manifest.json", "recipe.json", "stages")):
        return Subject("images", Path(f"evaluation-{path.resolve().name}"), files=path)
    if path.is_file() and path.suffix.lower() in (".npz", ".npy"):
        return Subject("images", Path(f"evaluation-{path.stem}"), files=path)
    last = find_stage(path)
    return (_stage if last.path == path else _run)(path, recipe_of_stage(last))


def _run(path: Path, recipe: Recipe | None) -> Subject:
    """Return a run as the subject, with a notice for each model that is missing, damaged or not kept."""
    run, notices, teacher = RunFolder(path), [], None
    students: list[Candidate] = []
    held: dict[Path, Model] = {}

    def latest(stage: Path) -> Model:
        """Load a stage, and keep it until another is loaded. The models of all stages may not fit into memory."""
        if stage not in held:
            held.clear()
            held[stage] = load(stage)
        return held[stage]

    for stage in run.stages():
        try:
            manifest = stage.manifest()
            if manifest.base is not None and manifest.weights_kept:
                base_of(stage, manifest)
        except (DamagedFile, OSError) as error:
            notices.append(f"Stage {stage.name} is damaged and was skipped: {error}.")
            continue
        found = Candidate(stage.name, manifest, partial(latest, stage.path))
        if not manifest.weights_kept:
            notices.append(f"Stage {stage.name} was skipped: its weights were not kept.")
        elif stage == run.start:
            teacher = found
        else:
            students.append(found)
    there = {stage.name for stage in run.stages()}
    if missing := [row.name for row in run.plan if row.name not in there]:
        notices.append(
            f"The run is not finished, and {', '.join(missing)} {'does' if len(missing) == 1 else 'do'} not exist yet. "
            "Run the same command again later."
        )
    if teacher is None and not students:
        raise DamagedFile(f"{path} has no stage that can be measured ({'; '.join(notices)})")
    return Subject("run", run.evaluation_path.parent, recipe, teacher, tuple(students), notices=tuple(notices))


def _stage(path: Path, recipe: Recipe | None) -> Subject:
    stage = StageFolder(path)
    manifest = stage.manifest()
    if not manifest.weights_kept:
        raise UsageError(f"the weights of {path} were not kept (see chain.keep). Measure another stage")
    found = Candidate(stage.name, manifest, cache(partial(load, path)))
    teacher, students = (found, ()) if manifest.outcome.role == "teacher" else (None, (found,))
    store = RunFolder(path.parent.parent).evaluation_path.parent if path.parent.name == "stages" else None
    # Never write into the installed package.
    out = Path(f"evaluation-{path.name}") if path in pretrained().values() else path / "evaluation"
    return Subject("stage", out, recipe, teacher, students, store=store)


@final
class Rows:
    """The rows of the curve: each student at its own step count, and each --against series at all of these counts.

    Raises:
        ValueError: if a series is unknown or has no model.
    """

    def __init__(
        self, subject: Subject, arguments: EvaluateArguments, recipe: Recipe, data: Data, device: torch.device
    ) -> None:
        self.subject, self.arguments = subject, arguments
        self._recipe, self._data, self._device = recipe, data, device
        self.series: list[Series] = []
        self.entries: list[Entry] = []
        self._steps = self._baseline_steps()
        for model in subject.students:
            series, manifest = self._own_series(model.manifest), model.manifest
            own = manifest.num_steps or (manifest.start_steps if manifest.outcome.role == "matched" else None)
            asked = arguments.num_steps if subject.kind == "stage" else ()
            for count in asked or ((own,) if own else self._steps):
                self.entries.append(self._entry(series, model, sampler_of(manifest), count))
        against = arguments.against
        if against is None:
            # If the teacher is missing because it is damaged, a notice reports the damage.
            against = () if subject.teacher is None else (f"teacher-{subject.teacher.manifest.outcome.sampler_name}",)
            heun = recipe.evaluation.teacher_heun_steps
            # If the teacher is itself distilled, only its own sampler is used.
            is_whole = subject.teacher is not None and subject.teacher.manifest.num_steps is None
            if is_whole and heun and not arguments.num_steps:
                self._add("teacher-heun", heun)
        for name in dict.fromkeys(against):
            self._add(name, self._steps)
        self._check()

    def _own_series(self, manifest: Manifest) -> str:
        """Return the name of the series for the model's role and sampler, creating the series if needed."""
        role, sampler = manifest.outcome.role, sampler_of(manifest)
        kind = manifest.outcome.sampler_name
        by = sampler_label(kind) if sampler == samplers[kind]() else repr(sampler)
        label = f"{role if role == 'student' else f'{role} model'}, {by}"
        names = {series.label: series.name for series in self.series}
        if label not in names:
            free = (role, *(f"{role}-{number}" for number in range(2, len(names) + 2)))
            names[label] = next(name for name in free if name not in names.values())
            gamma = sampler.gamma if isinstance(sampler, Ancestral) else None
            shown: Literal["student", "other"] = "student" if role == "student" else "other"
            self.series.append(Series(name=names[label], label=label, role=shown, sampler=kind, gamma=gamma))
        return names[label]

    def _add(self, name: str, steps: Sequence[int]) -> None:
        """Add the series `name` from --against. `steps` applies only to teachers."""
        subject, arguments = self.subject, self.arguments
        who, _, sampler = name.partition("-")
        if who not in ("teacher", "student") or not sampler:
            known = [f"teacher-{sampler}" for sampler in samplers]
            raise UsageError(
                f"--against {name} is not a series. Use teacher-SAMPLER or student-SAMPLER{nearest(name, known)}"
            )
        kind = samplers[sampler]
        teachers = () if subject.teacher is None else (subject.teacher,)
        models = teachers if who == "teacher" else subject.students
        if not models:
            if subject.kind != "run":
                raise UsageError(
                    f"--against {name} needs a {who}, but this {subject.kind} has none. Remove it, or use the folder "
                    "of the run instead"
                )
            return
        gamma = None
        levels: list[tuple[Sampler, float | None]]
        if kind is not Ancestral:
            levels = [(kind(), None)]
        elif arguments.search_gamma is None:
            gamma = 1.0 if arguments.gamma is None else arguments.gamma
            levels = [(Ancestral(gamma), None)]
        else:
            tried = [index / (arguments.search_gamma - 1) for index in range(arguments.search_gamma)]
            levels = [(Ancestral(one), one) for one in tried]
        is_foreign = subject.kind == "pipeline"
        label = f"{'model' if is_foreign else who}, {sampler_label(sampler)}"
        if gamma is not None and arguments.gamma is not None:
            label += f", gamma {gamma:g}"
        role: Literal["student", "teacher", "other"]
        role = "other" if is_foreign else "teacher" if who == "teacher" else "student"
        self.series.append(Series(name=name, label=label, role=role, sampler=sampler, gamma=gamma))
        for model in models:
            own = model.manifest.num_steps
            takes_any = who == "teacher" and (arguments.num_steps or not own)
            for count in steps if takes_any else (own,) if own else ():
                self.entries += [self._entry(name, model, method, count, level) for method, level in levels]

    def _check(self) -> None:
        """Reject options that would be ignored."""
        asked = self.arguments
        only_students = asked.against is not None and not any(name.startswith("teacher-") for name in asked.against)
        if asked.num_steps and self.subject.kind != "stage" and only_students:
            raise UsageError(
                "--num-steps applies only to the teacher, because each student has its own number of steps. Add "
                "--against teacher-ddim, or remove --num-steps"
            )
        if not self.entries:
            raise UsageError("no model is left to measure. Choose another series with --against")
        has_gamma = any(e.gamma is not None for e in self.entries) or any(s.gamma is not None for s in self.series)
        if (asked.gamma is not None or asked.search_gamma is not None) and not has_gamma:
            raise UsageError(
                "--gamma and --search-gamma have no effect without --against teacher-ancestral. Add this series"
            )

    def teacher(self) -> Entry | None:
        """Return the teacher at its own number of steps or, if it takes any number, with the run's teacher method that
        makes the most network calls.
        """
        teacher = self.subject.teacher
        if teacher is None or self.subject.kind == "pipeline":
            return None
        sampler, evaluation = sampler_of(teacher.manifest), self._recipe.evaluation
        method = Method(sampler, teacher.manifest.num_steps or 1)
        if teacher.manifest.num_steps is None:
            models = (teacher, *self.subject.students)
            starts = [model.manifest.start_steps for model in models if model.manifest.start_steps]
            steps = (*evaluation.teacher_steps, max(starts, default=max(self._steps)))
            method = finest(teacher_methods(sampler, steps, evaluation))
        series = f"teacher-{samplers.name_of(method.sampler)}"
        return self._entry(series, teacher, method.sampler, method.num_steps)

    def _entry(self, series: str, model: Candidate, sampler: Sampler, steps: int, gamma: float | None = None) -> Entry:
        source = ModelSource(
            model.manifest,
            lambda: model.load().to(self._device),
            sampler,
            self._device,
            self._data,
            self.arguments.guidance_scale,
            self._recipe.evaluation.precision,
            model.name,
        )
        return Entry(series, model.name, source, steps, gamma)

    def _baseline_steps(self) -> tuple[int, ...]:
        """Return the numbers of steps for the baselines, in descending order."""
        for count in self.arguments.num_steps:
            check_num_steps(count)
        wanted = self.arguments.num_steps or self._recipe.evaluation.teacher_steps
        if not wanted and self.subject.kind == "pipeline":
            raise UsageError("this pipeline takes any number of steps. Choose some, such as --num-steps 4 16 64")
        if not wanted:
            teacher = self.subject.teacher
            start = (teacher.manifest.start_steps if teacher else None) or self._recipe.chain.start_steps
            wanted = tuple(start // 2**k for k in range(start.bit_length()) if start % 2**k == 0)
        return tuple(sorted(set(wanted), reverse=True))
