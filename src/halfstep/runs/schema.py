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
"""The version of the layout; a reader refuses any other."""

RoleName = Literal["teacher", "matched", "student"]
"""teacher: undistilled; matched: carried over to another prediction, process or guidance; student: distilled."""


class Pipeline(Record):
    """A diffusers pipeline in a folder or on the Hub."""

    kind: str
    """Its class."""
    folder: str
    component: str
    """The part that the model replaces: unet or transformer."""
    averaged: bool = False
    """Whether the weights are the averaged ones beside it (unet_ema)."""
    options: dict[str, Any] = Field(default={})
    """Arguments of its call that are the same for all samples."""
    guidance: str | None = None
    """The argument of its call that is the guidance scale."""
    off: float | None = None
    """Its value that disables guidance; None if the network itself takes the scale."""
    scale: float | None = None
    """The scale that a network was trained at which takes it itself."""


class Outcome(Record):
    """Role of a stage's model and how it is sampled, as its objective declares them."""

    role: RoleName
    num_steps: int | None = None
    """Sampler steps that the model is made for; None for any number."""
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
    """None if the row holds none."""
    num_steps: int | None = None
    num_updates: int = 0
    """0 for a model that the run was given."""
    update_cost: float = 1.0
    """Cost of an update in forward passes of one sample."""


class Manifest(Record):
    """manifest.json of a stage: all that is needed to rebuild its model, and where it came from."""

    format: int = FORMAT
    run: str | None = None
    """`run` of the recipe.json of the run that made it; None outside a run."""
    stage: str
    objective: str
    parent: str | None
    """The stage whose weights it started with."""
    teacher: str | None = None
    """The stage that it learned from."""
    outcome: Outcome
    """Role, steps and sampler: nothing else says what the model is."""
    start_steps: int | None = None
    """Steps of the first teacher of the chain that the stage belongs to."""
    num_updates: int
    seconds: float
    """Training time of the stage, over all its restarts."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    num_classes: int = 0
    """Classes that the model is conditioned on; 0 for an unconditional model."""
    classes_shown: int | None = None
    """How many of them, from the first on, the training data had; samples are of these in turn. None for all."""
    class_names: tuple[str, ...] = ()
    """The labels or folders that its classes stand for, in order; empty if they are not known."""
    conditions: dict[str, tuple[int, ...]] = Field(default={})
    """Further conditions of the model, with the shape of each for one sample."""
    guidance: dict[str, Any] | None = None
    """{"type": name in the registry of guidances, and its fields}: what the network has learned; None for none."""
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
    """The stage beside this one that holds the weights to which this one's are low-rank additions."""
    pipeline: Pipeline | None = None
    """The diffusers pipeline that the model came from, whose other parts an export copies."""
    files: dict[str, str]
    """sha256 of each file."""
    source: str | None = None
    """Where the model, or the teacher of its chain, was imported from."""
    data: str | None = None
    """Training data of the stage: its source and the number of samples."""
    weights_kept: bool = True
    """False once the weights were removed because only those of other stages were asked for."""

    @property
    def num_steps(self) -> int | None:
        """Sampler steps that the model is made for; None for any number."""
        return self.outcome.num_steps

    def guidance_words(self) -> str:
        """Meaning of `guidance_scale` for the model, effect of negative prompts, and network calls per step."""
        if not self.num_classes and not self.conditions:
            return "The model is unconditional, so guidance has no effect: one network call a step."
        if self.guidance is None and self.pipeline is not None and self.pipeline.scale is not None:
            return (
                f"The network takes the scale itself and was distilled at {self.pipeline.scale:g}: pass "
                f"{self.pipeline.guidance} {self.pipeline.scale:g}, one network call a step."
            )
        if self.guidance is None and self.outcome.role == "teacher":
            return (
                "A teacher: guidance_scale 1 is no guidance and one network call a step; any other asks it twice, with "
                "and without its condition (uncond + scale (cond - uncond)), and negative prompts act."
            )
        if self.guidance is None:
            return (
                "The model has learned no guidance: leave guidance_scale at 1, one network call a step. A scale above "
                "1 would ask it twice a step, with and without its condition, which a student was not distilled for."
            )
        if self.guidance["type"] == "fixed":
            scale = self.guidance["scale"]
            return (
                f"The model has taken in the teacher's guidance at the scale {scale:g} (uncond + {scale:g} (cond - "
                "uncond)). Pass guidance_scale 1, which turns a pipeline's own guidance off: one network call a step "
                "where the teacher needed two. Another scale would guide a second time; negative prompts do not act."
            )
        low, high = self.guidance["low"], self.guidance["high"]
        return (
            "The model has taken in the teacher's guidance (uncond + scale (cond - uncond)) at all scales from "
            f"{low:g} to {high:g} and is shown the scale: pass guidance_scale in that range. One network call a "
            "step where the teacher needed two; negative prompts do not act; outside the range it guesses."
        )


class Result(Record):
    """One row of metrics.json: a model sampled with some number of steps."""

    sampler: str
    gamma: float | None = None
    """Gamma of ancestral sampling: 0 is the lower bound of the variance, 1 the upper."""
    num_steps: int
    num_evals: int
    """Network calls for a sample."""
    frechet: float
    kid: float
    precision: float | None = None
    """None, like the next two, where there were too few samples or an earlier halfstep measured."""
    recall: float | None = None
    coverage: float | None = None
    teacher_rmse: float | None = None
    """Root mean square difference, on [-1, 1], from the start's finest samples of the same noise; None for these."""
    seconds_per_1000: float
    """Wall time for 1,000 samples."""
    samples: str | None = None
    """Path in the stage's folder of the .npz with the first samples."""


class Metrics(Record):
    """metrics.json of a stage."""

    run: str | None = None
    """`Manifest.run`."""
    stage: str
    protocol: dict[str, Any]
    """Extractor, counts, reference data, seed, device: figures of different protocols must not be compared."""
    results: list[Result]
    files: dict[str, str] = Field(default={})
    """sha256 of each file with samples, by its path in the stage's folder."""
    seconds: float | None = None
    """Wall time of sampling and measuring, without what was there."""
    note: str | None = None
    """Warning about distances of this few samples."""


def shortened(names: Sequence[str]) -> str:
    """Return names in a line: all, or the first three and the last."""
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
        """The conditions that stand for none, for models that can be guided by asking them twice."""
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
        """The run in which the stage lies; None outside one."""
        place = self.path.resolve().parent
        return RunFolder(place.parent) if place.name == "stages" else None

    @property
    def remedy(self) -> str:
        """Remedy for a file of the stage that is damaged or of another stage."""
        if self.run is None:
            return "put a copy of it back, or import or train the model again"
        return (
            f"put a copy of it back, or remove {self.path} and the stages after it and run the command of its run "
            "again, which trains them again"
        )

    def is_complete(self) -> bool:
        """Whether the stage was trained to its end."""
        return self.manifest_path.exists()

    def checkpoints(self) -> list[Path]:
        """Checkpoint folders, the latest first."""
        return sorted(self.path.glob("checkpoint-*"), reverse=True)

    def manifest(self, verify: bool = True) -> Manifest:
        """The stage's manifest, after checking that it is of this stage and run, and the files that it lists.

        Args:
            verify: whether to check the files too, and to insist on the recipe.json of the run in which it lies.

        Raises:
            DamagedFile: if it, or a file that it lists, is missing, altered, of another stage, run, plan or format.
        """
        if verify and self.run is not None and self.run.recipe_path.exists():
            self.run.recipe()
        try:
            manifest = self._manifest()
            self._check_origin(self.manifest_path, manifest.stage, manifest.run)
            made = (manifest.stage, manifest.outcome.role, manifest.num_steps)
            plan = [] if self.run is None else self.run.plan
            if plan and made not in [(row.name, row.role, row.num_steps) for row in plan]:
                raise DamagedFile(f"{self.manifest_path} is of no stage in the plan of recipe.json")
            if verify:
                check_files(self.path, manifest.files)
        except DamagedFile as error:
            raise DamagedFile(f"{error}; {self.remedy}") if verify else error from None
        return manifest

    def _check_origin(self, file: Path, stage: str, run: str | None) -> None:
        """Raise DamagedFile if a file of the stage is of another stage or run than the folder in which it lies."""
        if self.run is None:
            return
        if stage != self.path.resolve().name:
            raise DamagedFile(f"{file} is of stage {stage}: it was moved or copied here")
        if not self.run.is_own(run):
            raise DamagedFile(f"{file} is of another run: its recipe or its data is not that of recipe.json")

    def _manifest(self) -> Manifest:
        data = read_json(self.manifest_path)
        if isinstance(data, dict) and data.get("format", FORMAT) != FORMAT:
            earlier = isinstance(data["format"], int) and data["format"] < FORMAT
            raise DamagedFile(
                f"{self.manifest_path} has format {data['format']}, this halfstep reads {FORMAT}: "
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
            DamagedFile: if they are altered, or of another stage or run.
        """
        if not self.metrics_path.exists():
            return None
        try:
            metrics = Metrics.model_validate(read_sealed(self.metrics_path))
        except ValidationError as error:
            raise DamagedFile(f"{self.metrics_path} does not hold metrics ({error.errors()[0]['msg']})") from None
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
        """Samples beside the training samples nearest to them, which a report shows: `halfstep.report.nearest`."""
        return self.path / "report" / "nearest.npz"

    @property
    def evaluation_path(self) -> Path:
        """Output of `halfstep evaluate`: evaluation.json, beside the cells that it is made of."""
        return self.path / "evaluation" / "evaluation.json"

    def evaluation(self) -> EvaluationResult | None:
        """Results of `halfstep evaluate`, or None if the run was not evaluated.

        Raises:
            DamagedFile: if the file is altered, of another run or of another format.
        """
        path = self.evaluation_path
        if not path.exists():
            return None
        data = read_json(path)
        if isinstance(data, dict) and data.get("format") != EVALUATION_FORMAT:
            raise DamagedFile(
                f"{path} has format {data.get('format')}, this halfstep reads {EVALUATION_FORMAT}: run `halfstep "
                "evaluate` again"
            )
        try:
            result = EvaluationResult.model_validate(unsealed(data, path))
        except ValidationError as error:
            raise DamagedFile(f"{path} does not hold an evaluation ({error.errors()[0]['msg']})") from None
        if not self.is_own(result.run):
            raise DamagedFile(f"{path} is of another run: run `halfstep evaluate` again")
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
        """Whether `Manifest.run` of a file is that of this run; True if recipe.json cannot be read."""
        return run == self._recipe().get("run", run)

    def _recipe(self) -> dict[str, Any]:
        """The content of recipe.json; empty if it cannot be read."""
        with contextlib.suppress(DamagedFile, OSError):
            return self.recipe()
        return {}

    @property
    def start(self) -> StageFolder | None:
        """The stage, which need not exist, from which the run's chain starts; without a plan, a first teacher."""
        if plan := self.plan:
            return self.stage(plan[0].name)
        with contextlib.suppress(DamagedFile, OSError):
            for first in self.stages()[:1]:
                return first if first.manifest(verify=False).outcome.role == "teacher" else None
        return None

    def stages(self) -> list[StageFolder]:
        """The folders of the plan's complete stages, in its order; of all, by name, without a readable plan."""
        names = [row.name for row in self.plan]
        names = names or sorted(path.name for path in (self.path / "stages").glob("[!.]*"))
        return [folder for folder in map(self.stage, names) if folder.is_complete()]

    def recipe(self) -> dict[str, Any]:
        """The content of recipe.json: {"run": ..., "recipe": ..., "plan": ..., "environment": ...}.

        Raises:
            DamagedFile: if it is not there, is altered or does not hold a recipe.
        """
        try:
            data = read_sealed(self.recipe_path)
            if not isinstance(data.get("recipe"), dict):
                raise DamagedFile(f"{self.recipe_path} does not hold a recipe")
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; put a copy of it back, or remove it and run the command of its run again, which writes it"
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
