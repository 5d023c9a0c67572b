"""The layout of a run folder, and the types of its JSON files."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from pydantic import Field, ValidationError

from halfstep.runs.evaluation import EVALUATION_FORMAT, EvaluationResult, Record
from halfstep.runtime.files import DamagedFile, check_files, read_json, read_sealed, unsealed

FORMAT = 4
"""Version of the layout; readers reject any other."""

RoleName = Literal["teacher", "matched", "student"]
"""teacher: undistilled; matched: converted to another prediction, process or guidance; student: distilled."""


class Pipeline(Record):
    """A diffusers pipeline in a folder or on the Hub."""

    kind: str
    """Class of the pipeline."""
    folder: str
    component: str
    """The part that the model replaces: unet or transformer."""
    averaged: bool = False
    """Whether the weights are the averaged ones stored next to it (unet_ema)."""
    options: dict[str, Any] = Field(default={})
    """Arguments of its call that are the same for all samples."""
    guidance: str | None = None
    """Name of its call argument for the guidance scale."""
    off: float | None = None
    """Its value that disables guidance; None if the network itself takes the scale."""
    scale: float | None = None
    """For a network that takes the scale itself: the scale that it was trained at."""
    end: str | None = None
    """Name of its call argument for the end of a sound in seconds, if each sample can have its own."""


class Outcome(Record):
    """Role of a stage's model, and how it is sampled, as its objective declares."""

    role: RoleName
    num_steps: int | None = None
    """Sampler steps that the model was distilled for; None for any number."""
    sampler: dict[str, Any] = Field(default={"type": "ddim"})
    """{"type": name in the registry of samplers, and its fields}."""

    @property
    def sampler_name(self) -> str:
        """Name in the registry of samplers."""
        return str(self.sampler.get("type"))


class PlannedStage(NamedTuple):
    """A row of the plan in recipe.json: a stage before it is trained."""

    name: str
    role: RoleName | None = None
    """None if the row has none."""
    num_steps: int | None = None
    num_updates: int = 0
    """0 for a given model."""
    update_cost: float = 1.0
    """Cost of an update in forward passes of one sample."""


class Manifest(Record):
    """manifest.json of a stage: everything needed to rebuild its model, and its origin."""

    format: int = FORMAT
    run: str | None = None
    """`run` of the recipe.json of the run that trained it; None outside a run."""
    stage: str
    objective: str
    parent: str | None
    """The stage that it was initialised from."""
    teacher: str | None = None
    """The stage that it learned from."""
    outcome: Outcome
    """Role, steps and sampler: the only record of what the model is."""
    start_steps: int | None = None
    """Steps of the first teacher in the stage's chain."""
    num_updates: int
    seconds: float
    """Training time of the stage, over all its restarts."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    num_classes: int = 0
    """Classes that the model is conditioned on; 0 for an unconditional model."""
    classes_shown: int | None = None
    """Number of classes in the training data, always the first ones, which samples cycle through. None for all."""
    class_names: tuple[str, ...] = ()
    """Labels or folder names of its classes, in order; empty if unknown."""
    conditions: dict[str, tuple[int, ...]] = Field(default={})
    """Further conditions of the model, with the shape of each for one sample."""
    guidance: dict[str, Any] | None = None
    """{"type": name in the registry of guidances, and its fields}: guidance learned by the network; None for none."""
    guidance_scale: float | None = None
    """The default scale; None for no guidance."""
    is_image: bool
    """Whether samples are images, in [-1, 1]."""
    clip: bool
    """Whether sampling clips x0 to [-1, 1]."""
    network: dict[str, Any]
    """{"type": name in the registry of networks, and its arguments}."""
    process: dict[str, Any]
    """{"type": name in the registry of processes, and its fields}."""
    prediction: dict[str, Any]
    """{"type": name in the registry of predictions, and its fields}."""
    base: str | None = None
    """The stage of the same run with the base weights of this LoRA; None if the stage is not a LoRA."""
    pipeline: Pipeline | None = None
    """The diffusers pipeline that the model came from; an export copies its other parts."""
    files: dict[str, str]
    """sha256 of each file."""
    source: str | None = None
    """Where the model, or the teacher of its chain, was imported from."""
    data: str | None = None
    """Training data of the stage: its source and the number of samples."""
    weights_kept: bool = True
    """False once the weights were removed because `chain.keep` does not include the stage."""

    @property
    def num_steps(self) -> int | None:
        """Sampler steps that the model was distilled for; None for any number."""
        return self.outcome.num_steps

    def guidance_words(self) -> str:
        """The meaning of `guidance_scale`, the effect of negative prompts, and the network calls per step."""
        if not self.num_classes and not self.conditions:
            return "The model is unconditional, so guidance has no effect: one network call per step."
        if self.guidance is None and self.pipeline is not None and self.pipeline.scale is not None:
            return (
                f"The network takes the scale itself and was distilled at {self.pipeline.scale:g}: pass "
                f"{self.pipeline.guidance} {self.pipeline.scale:g}, one network call per step."
            )
        if self.guidance is None and self.outcome.role == "teacher":
            return (
                "A teacher: guidance_scale 1 disables guidance, with one network call per step. Any other scale needs "
                "two, with and without the condition (uncond + scale (cond - uncond)), and negative prompts work."
            )
        if self.guidance is None:
            return (
                "The model has learned no guidance: leave guidance_scale at 1, one network call per step. A scale "
                "above 1 would call it twice per step, with and without its condition, for which it was not distilled."
            )
        if self.guidance["type"] == "fixed":
            scale = self.guidance["scale"]
            return (
                f"The model has learned the teacher's guidance at scale {scale:g} (uncond + {scale:g} (cond - "
                "uncond)). Pass guidance_scale 1, which disables a pipeline's own guidance: one network call per step, "
                "where the teacher needed two. Any other scale would guide twice. Negative prompts have no effect."
            )
        low, high = self.guidance["low"], self.guidance["high"]
        return (
            "The model has learned the teacher's guidance (uncond + scale (cond - uncond)) at all scales from "
            f"{low:g} to {high:g} and takes the scale as an input: pass guidance_scale in that range, because it was "
            "not trained outside. One network call per step, where the teacher needed two. Negative prompts have no "
            "effect."
        )


class Result(Record):
    """One row of metrics.json: a model sampled with some number of steps."""

    sampler: str
    gamma: float | None = None
    """Gamma of ancestral sampling: 0 is the lower bound of the variance, 1 the upper."""
    num_steps: int
    num_evals: int
    """Network calls per sample."""
    frechet: float
    kid: float
    precision: float | None = None
    """None, as are the next two, for too few samples or in results of an earlier halfstep."""
    recall: float | None = None
    coverage: float | None = None
    teacher_rmse: float | None = None
    """RMS difference on [-1, 1] from the finest same-noise samples of the chain's start; None for those samples."""
    seconds_per_1000: float
    """Wall time for 1,000 samples."""
    samples: str | None = None
    """Path of the .npz with the first samples, relative to the stage's folder."""


class Metrics(Record):
    """metrics.json of a stage."""

    run: str | None = None
    """`Manifest.run`."""
    stage: str
    protocol: dict[str, Any]
    """Extractor, counts, reference data, seed, device: figures of different protocols must not be compared."""
    results: list[Result]
    files: dict[str, str] = Field(default={})
    """sha256 of each sample file, keyed by its path in the stage's folder."""
    seconds: float | None = None
    """Wall time of sampling and measuring, excluding results that already existed."""
    note: str | None = None
    """Warning if the samples are too few for reliable distances."""
    too_few: bool = False
    """Whether the samples are too few for a reliable Frechet distance (`best.too_few`)."""


def shortened(names: Sequence[str]) -> str:
    """Return names on one line: all, or the first three and the last."""
    return ", ".join(names if len(names) <= 10 else (*names[:3], "...", names[-1]))


@dataclass(frozen=True)
class StageFolder:
    """The folder of one stage."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def model(self) -> Path:
        return self.path / "model.safetensors"

    @property
    def null(self) -> Path:
        """Null conditions, for models that guidance calls twice."""
        return self.path / "null.safetensors"

    @property
    def manifest_path(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.json"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def run(self) -> "RunFolder | None":
        """The run that contains the stage; None outside a run."""
        place = self.path.resolve().parent
        return RunFolder(place.parent) if place.name == "stages" else None

    @property
    def remedy(self) -> str:
        """Remedy for a damaged or foreign file of the stage."""
        if self.run is None:
            return "restore a copy of it, or import or train the model again"
        return (
            f"restore a copy of it, or remove {self.path} and the stages after it and rerun the command of its run, "
            "which trains them again"
        )

    def is_complete(self) -> bool:
        """Whether the stage was trained to its end."""
        return self.manifest_path.exists()

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, the latest first."""
        return sorted(self.path.glob("checkpoint-*"), reverse=True)

    def manifest(self, verify: bool = True) -> Manifest:
        """The stage's manifest, after checking that it belongs to this stage and run and that its files are intact.

        Args:
            verify: whether to also check the listed files and the recipe.json of the run.

        Raises:
            DamagedFile: if it or a file that it lists is missing or altered, or belongs to another stage, run, plan or
                format.
        """
        if verify and self.run is not None and self.run.recipe_path.exists():
            self.run.recipe()
        try:
            manifest = self._manifest()
            self._check_origin(self.manifest_path, manifest.stage, manifest.run)
            made = (manifest.stage, manifest.outcome.role, manifest.num_steps)
            plan = [] if self.run is None else self.run.plan
            if plan and made not in [(row.name, row.role, row.num_steps) for row in plan]:
                raise DamagedFile(f"{self.manifest_path} belongs to no stage in the plan of recipe.json")
            if verify:
                check_files(self.path, manifest.files)
        except DamagedFile as error:
            raise DamagedFile(f"{error}; {self.remedy}") if verify else error from None
        return manifest

    def _check_origin(self, file: Path, stage: str, run: str | None) -> None:
        """Raise DamagedFile if a file belongs to a different stage or run than its folder."""
        if self.run is None:
            return
        if stage != self.path.resolve().name:
            raise DamagedFile(f"{file} belongs to stage {stage}: it was moved or copied here")
        if not self.run.is_own(run):
            raise DamagedFile(f"{file} belongs to another run: its recipe or data differs from recipe.json")

    def _manifest(self) -> Manifest:
        data = read_json(self.manifest_path)
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            earlier = isinstance(data["format"], int) and data["format"] < FORMAT
            raise DamagedFile(
                f"{self.manifest_path} has format {data['format']}, but this halfstep reads {FORMAT}: "
                + ("it was written by an earlier one, so train the run again" if earlier else "update halfstep")
            )
        try:
            return Manifest.model_validate(unsealed(data, self.manifest_path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DamagedFile(f"{self.manifest_path} is not a stage's manifest ({where}: {first['msg']})") from None

    def metrics(self) -> Metrics | None:
        """The stage's metrics, or None if it has not been measured.

        Raises:
            DamagedFile: if they are altered, or belong to another stage or run.
        """
        if not self.metrics_path.exists():
            return None
        try:
            metrics = Metrics.model_validate(read_sealed(self.metrics_path))
        except ValidationError as error:
            raise DamagedFile(f"{self.metrics_path} does not contain metrics ({error.errors()[0]['msg']})") from None
        self._check_origin(self.metrics_path, metrics.stage, metrics.run)
        return metrics


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run."""

    path: Path

    @property
    def recipe_path(self) -> Path:
        return self.path / "recipe.json"

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def heartbeat_path(self) -> Path:
        return self.path / "heartbeat.json"

    @property
    def report_path(self) -> Path:
        return self.path / "report" / "index.html"

    @property
    def nearest_path(self) -> Path:
        """Samples and the training samples nearest to them, for the report: `halfstep.report.nearest`."""
        return self.path / "report" / "nearest.npz"

    @property
    def evaluation_path(self) -> Path:
        """Output of `halfstep evaluate`: evaluation.json, next to the cells that it was computed from."""
        return self.path / "evaluation" / "evaluation.json"

    def evaluation(self) -> EvaluationResult | None:
        """Results of `halfstep evaluate`, or None if the run was not evaluated.

        Raises:
            DamagedFile: if the file is altered, or belongs to another run or format.
        """
        path = self.evaluation_path
        if not path.exists():
            return None
        data = read_json(path)
        if isinstance(data, dict) and data.get("format") != EVALUATION_FORMAT:
            raise DamagedFile(
                f"{path} has format {data.get('format')}, but this halfstep reads {EVALUATION_FORMAT}: run "
                "`halfstep evaluate` again"
            )
        try:
            result = EvaluationResult.model_validate(unsealed(data, path))
        except ValidationError as error:
            raise DamagedFile(f"{path} does not contain an evaluation ({error.errors()[0]['msg']})") from None
        if not self.is_own(result.run):
            raise DamagedFile(f"{path} belongs to another run: run `halfstep evaluate` again")
        return result

    def stage(self, name: str) -> StageFolder:
        """The folder of the stage called `name`, which need not exist."""
        return StageFolder(self.path / "stages" / name)

    @property
    def plan(self) -> list[PlannedStage]:
        """The rows of recipe.json's plan, in order; empty without a readable plan."""
        rows = self._recipe().get("plan")
        rows = rows if isinstance(rows, list) else []
        return [_planned(row) for row in rows if isinstance(row, dict) and isinstance(row.get("stage"), str)]

    def is_own(self, run: str | None) -> bool:
        """Whether the `Manifest.run` of a file is this run's; True if recipe.json cannot be read."""
        return run == self._recipe().get("run", run)

    def _recipe(self) -> dict[str, Any]:
        """The content of recipe.json; empty if it cannot be read."""
        with contextlib.suppress(DamagedFile, OSError):
            return self.recipe()
        return {}

    @property
    def start(self) -> StageFolder | None:
        """The first stage of the chain, which may not exist; without a plan, the first folder if it is a teacher."""
        if plan := self.plan:
            return self.stage(plan[0].name)
        with contextlib.suppress(DamagedFile, OSError):
            for first in self.stages()[:1]:
                return first if first.manifest(verify=False).outcome.role == "teacher" else None
        return None

    def stages(self) -> list[StageFolder]:
        """Folders of the plan's complete stages, in order; without a readable plan, of all complete stages by name."""
        names = [row.name for row in self.plan]
        names = names or sorted(path.name for path in (self.path / "stages").glob("[!.]*"))
        return [folder for folder in map(self.stage, names) if folder.is_complete()]

    def recipe(self) -> dict[str, Any]:
        """The content of recipe.json: {"run": ..., "recipe": ..., "plan": ..., "environment": ...}.

        Raises:
            DamagedFile: if it is missing, altered or contains no recipe.
        """
        try:
            data = read_sealed(self.recipe_path)
            if not isinstance(data.get("recipe"), dict):
                raise DamagedFile(f"{self.recipe_path} does not contain a recipe")
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; restore a copy of it, or remove it and rerun the command of its run, which writes it again"
            ) from None
        return data


def _planned(row: dict[str, Any]) -> PlannedStage:
    role, steps, updates, cost = (row.get(name) for name in ("role", "num_steps", "num_updates", "update_cost"))
    return PlannedStage(
        name=row["stage"],
        role=role if role in get_args(RoleName) else None,
        num_steps=steps if isinstance(steps, int) else None,
        num_updates=updates if isinstance(updates, int) else 0,
        update_cost=float(cost) if isinstance(cost, int | float) else 1.0,
    )
