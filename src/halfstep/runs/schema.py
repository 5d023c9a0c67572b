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
"""The version of the layout. Readers reject any other version."""

RoleName = Literal["teacher", "matched", "student"]
"""A teacher is not distilled, a matched model was converted to another prediction, process or guidance, and a student
was distilled."""


class Pipeline(Record):
    """A diffusers pipeline in a folder or on the Hub."""

    kind: str
    """The class of the pipeline."""
    folder: str
    component: str
    """The part that the model replaces: unet or transformer."""
    averaged: bool = False
    """Whether the weights are the averaged weights that are stored next to the component (unet_ema)."""
    options: dict[str, Any] = Field(default={})
    """The arguments of the pipeline's call that are the same for all samples."""
    guidance: str | None = None
    """The name of the argument of the pipeline's call that sets the guidance scale."""
    off: float | None = None
    """The value of this argument that disables guidance, or None if the network itself takes the scale."""
    scale: float | None = None
    """The scale at which the network was trained, if the network itself takes the scale."""
    end: str | None = None
    """The name of the argument of the pipeline's call that sets the end of a sound in seconds, if each sound can have
    its own end."""


class Outcome(Record):
    """The role of a stage's model and how the model is sampled, as the stage's objective declares."""

    role: RoleName
    num_steps: int | None = None
    """The number of sampler steps that the model was distilled for, or None for any number."""
    sampler: dict[str, Any] = Field(default={"type": "ddim"})
    """The sampler as {"type": its name in the registry of samplers, and its fields}."""

    @property
    def sampler_name(self) -> str:
        """The name of the sampler in the registry of samplers."""
        return str(self.sampler.get("type"))


class PlannedStage(NamedTuple):
    """A row of the plan in recipe.json: a stage before it is trained."""

    name: str
    role: RoleName | None = None
    """The role of the stage's model, or None if the row contains no role."""
    num_steps: int | None = None
    num_updates: int = 0
    """The number of updates, or 0 for a given model."""
    update_cost: float = 1.0
    """The cost of an update in forward passes of one sample."""


class Manifest(Record):
    """The manifest.json of a stage, which contains everything needed to rebuild the model, and the model's origin."""

    format: int = FORMAT
    run: str | None = None
    """The `run` in recipe.json of the run that trained the model, or None outside a run."""
    stage: str
    objective: str
    parent: str | None
    """The stage from which the model was initialised."""
    teacher: str | None = None
    """The stage from which the model learned."""
    outcome: Outcome
    """The role, number of steps and sampler of the model, which are recorded nowhere else."""
    start_steps: int | None = None
    """The number of steps of the first teacher in the stage's chain."""
    num_updates: int
    seconds: float
    """The training time of the stage, over all its restarts."""
    shape: tuple[int, ...]
    """The shape of one sample."""
    num_classes: int = 0
    """The number of classes that the model is conditioned on, or 0 for an unconditional model."""
    classes_shown: int | None = None
    """The number of classes in the training data, which are always the first classes, or None for all classes. Samples
    cycle through these classes."""
    class_names: tuple[str, ...] = ()
    """The labels or folder names of the model's classes, in order. They are empty if unknown."""
    conditions: dict[str, tuple[int, ...]] = Field(default={})
    """The further conditions of the model, each with its shape for one sample."""
    guidance: dict[str, Any] | None = None
    """The guidance that the network has learned, as {"type": its name in the registry of guidances, and its fields}, or
    None if the network has learned no guidance."""
    guidance_scale: float | None = None
    """The default guidance scale, or None without guidance."""
    is_image: bool
    """Whether samples are images with values in [-1, 1]."""
    clip: bool
    """Whether sampling clips x0 to [-1, 1]."""
    network: dict[str, Any]
    """The network as {"type": its name in the registry of networks, and its arguments}."""
    process: dict[str, Any]
    """The noise process as {"type": its name in the registry of processes, and its fields}."""
    prediction: dict[str, Any]
    """The prediction as {"type": its name in the registry of predictions, and its fields}."""
    base: str | None = None
    """The stage of the same run that contains the base weights of this LoRA, or None if the model is not a LoRA."""
    pipeline: Pipeline | None = None
    """The diffusers pipeline that the model came from. An export copies the other parts of the pipeline."""
    files: dict[str, str]
    """The sha256 of each file."""
    source: str | None = None
    """Where the model, or the teacher of its chain, was imported from."""
    data: str | None = None
    """The training data of the stage: the source and the number of samples."""
    weights_kept: bool = True
    """False once the weights have been removed because `chain.keep` does not include the stage."""

    @property
    def num_steps(self) -> int | None:
        """The number of sampler steps that the model was distilled for, or None for any number."""
        return self.outcome.num_steps

    def guidance_words(self) -> str:
        """Explain `guidance_scale`, the effect of negative prompts, and the number of network calls per step."""
        if not self.num_classes and not self.conditions:
            return "The model is unconditional, so guidance has no effect. Each step takes one network call."
        if self.guidance is None and self.pipeline is not None and self.pipeline.scale is not None:
            return (
                f"The network itself takes the scale as an input and was distilled at scale {self.pipeline.scale:g}: "
                f"pass {self.pipeline.guidance} {self.pipeline.scale:g}. Each step takes one network call."
            )
        if self.guidance is None and self.outcome.role == "teacher":
            return (
                "The model is a teacher. guidance_scale 1 disables guidance, and each step takes one network call. "
                "With any other scale, each step takes two network calls, with and without the condition "
                "(uncond + scale (cond - uncond)), and negative prompts work."
            )
        if self.guidance is None:
            return (
                "The model has learned no guidance: leave guidance_scale at 1, so that each step takes one network "
                "call. A scale above 1 would call the model twice per step, with and without the condition, but the "
                "model was not distilled for that."
            )
        if self.guidance["type"] == "fixed":
            scale = self.guidance["scale"]
            return (
                f"The model has learned the teacher's guidance at scale {scale:g} (uncond + {scale:g} (cond - "
                "uncond)). Pass guidance_scale 1, which disables a pipeline's own guidance. Each step then takes one "
                "network call, while the teacher needed two. With any other scale, guidance would be applied twice. "
                "Negative prompts have no effect."
            )
        low, high = self.guidance["low"], self.guidance["high"]
        return (
            "The model has learned the teacher's guidance (uncond + scale (cond - uncond)) at all scales from "
            f"{low:g} to {high:g} and takes the scale as an input: pass guidance_scale in that range, because the "
            "model was not trained outside it. Each step takes one network call, while the teacher needed two. "
            "Negative prompts have no effect."
        )


class Result(Record):
    """One row of metrics.json: the results of a model with a given sampler and number of steps."""

    sampler: str
    gamma: float | None = None
    """The gamma of ancestral sampling: 0 selects the lower bound of the variance, and 1 the upper bound."""
    num_steps: int
    num_evals: int
    """The number of network calls per sample."""
    frechet: float
    kid: float
    precision: float | None = None
    """Precision, recall and coverage are None if there are too few samples, or in results of an earlier halfstep."""
    recall: float | None = None
    coverage: float | None = None
    teacher_rmse: float | None = None
    """The RMS difference on [-1, 1] from the finest samples of the chain's first model with the same noise, or None for
    those samples themselves."""
    seconds_per_1000: float
    """The wall time for 1,000 samples."""
    samples: str | None = None
    """The path of the .npz with the first samples, relative to the stage's folder."""


class Metrics(Record):
    """The metrics.json of a stage."""

    run: str | None = None
    """The same as `Manifest.run`."""
    stage: str
    protocol: dict[str, Any]
    """The extractor, counts, reference data, seed and device. Results of different protocols must not be compared."""
    results: list[Result]
    files: dict[str, str] = Field(default={})
    """The sha256 of each sample file, keyed by the path of the file in the stage's folder."""
    seconds: float | None = None
    """The wall time of sampling and measuring, excluding results that already existed."""
    note: str | None = None
    """A warning, if there are too few samples for reliable distances."""
    too_few: bool = False
    """Whether there are too few samples for a reliable Frechet distance (`best.too_few`)."""


def shortened(names: Sequence[str]) -> str:
    """Return the names on one line. If there are more than ten, only the first three and the last are shown."""
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
        """The file with the null conditions of a model that guidance calls twice."""
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
        """The run that contains the stage, or None outside a run."""
        place = self.path.resolve().parent
        return RunFolder(place.parent) if place.name == "stages" else None

    @property
    def remedy(self) -> str:
        """How to recover from a damaged or foreign file of the stage."""
        if self.run is None:
            return "restore a copy of it, or import or train the model again"
        return (
            f"restore a copy of it, or remove {self.path} and the stages after it and rerun the command of the run, "
            "which trains these stages again"
        )

    def is_complete(self) -> bool:
        """Return whether the stage was trained to completion."""
        return self.manifest_path.exists()

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, with the latest first."""
        return sorted(self.path.glob("checkpoint-*"), reverse=True)

    def manifest(self, verify: bool = True) -> Manifest:
        """Return the manifest, after checking that it belongs to this stage and run and that its files are intact.

        Args:
            verify: whether to also check the listed files and the recipe.json of the run.

        Raises:
            DamagedFile: if the manifest or a file that it lists is missing or altered, or belongs to another stage,
                run, plan or format.
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
                + ("it was written by an earlier version, so train the run again" if earlier else "update halfstep")
            )
        try:
            return Manifest.model_validate(unsealed(data, self.manifest_path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DamagedFile(f"{self.manifest_path} is not a stage's manifest ({where}: {first['msg']})") from None

    def metrics(self) -> Metrics | None:
        """Return the stage's metrics, or None if the stage has not been measured.

        Raises:
            DamagedFile: if the metrics are altered, or belong to another stage or run.
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
        """The file with some samples and their nearest training samples, which `halfstep.report.nearest` writes."""
        return self.path / "report" / "nearest.npz"

    @property
    def evaluation_path(self) -> Path:
        """The evaluation.json that `halfstep evaluate` writes, next to the cells from which it is computed."""
        return self.path / "evaluation" / "evaluation.json"

    def evaluation(self) -> EvaluationResult | None:
        """Return the results of `halfstep evaluate`, or None if the run was not evaluated.

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
        """Return the folder of the stage called `name`, which need not exist."""
        return StageFolder(self.path / "stages" / name)

    @property
    def plan(self) -> list[PlannedStage]:
        """The rows of the plan in recipe.json, in order. There are none if the plan cannot be read."""
        rows = self._recipe().get("plan")
        rows = rows if isinstance(rows, list) else []
        return [_planned(row) for row in rows if isinstance(row, dict) and isinstance(row.get("stage"), str)]

    def is_own(self, run: str | None) -> bool:
        """Return whether the `Manifest.run` of a file is that of this run, or True if recipe.json cannot be read."""
        return run == self._recipe().get("run", run)

    def _recipe(self) -> dict[str, Any]:
        """Return the content of recipe.json, or an empty dictionary if it cannot be read."""
        with contextlib.suppress(DamagedFile, OSError):
            return self.recipe()
        return {}

    @property
    def start(self) -> StageFolder | None:
        """The first stage of the chain, which may not exist. Without a plan, this is the first folder if it contains a
        teacher."""
        if plan := self.plan:
            return self.stage(plan[0].name)
        with contextlib.suppress(DamagedFile, OSError):
            for first in self.stages()[:1]:
                return first if first.manifest(verify=False).outcome.role == "teacher" else None
        return None

    def stages(self) -> list[StageFolder]:
        """Return the folders of the plan's complete stages, in order.

        If the plan cannot be read, return the folders of all complete stages, sorted by name.
        """
        return [folder for folder in map(self.stage, self.stage_names()) if folder.is_complete()]

    def stage_names(self) -> list[str]:
        """Return the names of the plan's stages, or of the existing folders if the plan cannot be read."""
        names = [row.name for row in self.plan]
        return names or sorted(path.name for path in (self.path / "stages").glob("[!.]*"))

    def recipe(self) -> dict[str, Any]:
        """Return the content of recipe.json: {"run": ..., "recipe": ..., "plan": ..., "environment": ...}.

        Raises:
            DamagedFile: if the file is missing, altered or contains no recipe.
        """
        try:
            data = read_sealed(self.recipe_path)
            if not isinstance(data.get("recipe"), dict):
                raise DamagedFile(f"{self.recipe_path} does not contain a recipe")
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; restore a copy of it, or remove it and rerun the command of the run, which writes it again"
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
