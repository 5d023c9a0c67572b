"""The layout of a run folder: the paths of its files, and readers that verify them."""

import contextlib
import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from halfstep.runs.evaluation import EVALUATION_FORMAT, EvaluationResult
from halfstep.runs.record import problem_of
from halfstep.runs.schema import FORMAT, Manifest, Metrics, PlannedStage, RoleName
from halfstep.runtime.files import DamagedFile, check_files, read_json, read_sealed, unsealed


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
        """The file with the null conditions for classifier-free guidance, if the model supports it."""
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
        """How to recover from a damaged or foreign file in the stage."""
        if self.run is None:
            return "restore it from a copy, or import or train the model again"
        return (
            f"restore it from a copy, or remove {self.path} and the stages after it, then rerun the run's command to "
            "train these stages again"
        )

    def is_complete(self) -> bool:
        """Return whether the stage was trained to completion."""
        return self.manifest_path.exists()

    def checkpoints(self) -> list[Path]:
        """Return the checkpoint folders, latest first."""
        # Names have at least eight digits: as text, checkpoint-100000000 would precede checkpoint-99995000.
        return sorted(self.path.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name), reverse=True)

    def manifest(self, verify: bool = True) -> Manifest:
        """Return the manifest, after checking that it belongs to this stage and run and that its files are intact.

        Args:
            verify: whether to also check the listed files and the recipe.json of the run.

        Raises:
            DamagedFile: if the manifest or a file that it lists is missing or altered, if the manifest belongs to
                another stage, run or plan, or if its format is different.
        """
        if verify and self.run is not None and self.run.recipe_path.exists():
            self.run.recipe()
        try:
            manifest = self._manifest()
            self._check_origin(self.manifest_path, manifest.stage, manifest.run)
            made = (manifest.stage, manifest.outcome.role, manifest.num_steps)
            plan = [] if self.run is None else self.run.plan
            if plan and made not in [(row.name, row.role, row.num_steps) for row in plan]:
                raise DamagedFile(f"{self.manifest_path} does not match any stage in the plan of recipe.json")
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
                f"{self.manifest_path} has format {data['format']}, but this version of halfstep reads {FORMAT}: "
                + ("it was written by an earlier version, so train the run again" if earlier else "update halfstep")
            )
        try:
            return Manifest.model_validate(unsealed(data, self.manifest_path))
        except ValidationError as error:
            raise DamagedFile(f"{self.manifest_path} is not a stage's manifest ({problem_of(error)})") from None

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
            raise DamagedFile(f"{self.metrics_path} does not contain metrics ({problem_of(error)})") from None
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
    def own_samples_path(self) -> Path:
        """The file with the samples of the teacher that a run without data is trained on."""
        return self.path / "teacher-samples.safetensors"

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
        """The file with some samples and their nearest training samples, written by `halfstep.report.nearest`."""
        return self.path / "report" / "nearest.npz"

    @property
    def evaluation_path(self) -> Path:
        """The evaluation.json that `halfstep evaluate` writes next to the cells from which it is computed."""
        return self.path / "evaluation" / "evaluation.json"

    def evaluation(self) -> EvaluationResult | None:
        """Return the results of `halfstep evaluate`, or None if the run has not been evaluated.

        Raises:
            DamagedFile: if the file is altered, belongs to another run or has another format.
        """
        path = self.evaluation_path
        if not path.exists():
            return None
        data = read_json(path)
        if isinstance(data, dict) and data.get("format") != EVALUATION_FORMAT:
            raise DamagedFile(
                f"{path} has format {data.get('format')}, but this version of halfstep reads {EVALUATION_FORMAT}: run "
                "`halfstep evaluate` again"
            )
        try:
            result = EvaluationResult.model_validate(unsealed(data, path))
        except ValidationError as error:
            raise DamagedFile(f"{path} does not contain an evaluation ({problem_of(error)})") from None
        if not self.is_own(result.run):
            raise DamagedFile(f"{path} belongs to another run: run `halfstep evaluate` again")
        return result

    def stage(self, name: str) -> StageFolder:
        """Return the folder of the stage called `name`, which need not exist."""
        return StageFolder(self.path / "stages" / name)

    @property
    def plan(self) -> list[PlannedStage]:
        """The rows of the plan in recipe.json, in order. The list is empty if the plan cannot be read."""
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
        return names or sorted(path.name for path in (self.path / "stages").glob("[!.]*") if path.is_dir())

    def check_there(self) -> None:
        """Raise OSError if the folder of a run is gone.

        If its disk was unmounted, a write would recreate the folder on another disk, under the mount point.
        """
        if not self.recipe_path.exists():
            raise OSError(errno.ESTALE, "the run folder no longer exists", str(self.path))

    def recipe(self) -> dict[str, Any]:
        """Return the content of recipe.json: {"run": ..., "recipe": ..., "plan": ..., "environment": ...}.

        Raises:
            DamagedFile: if the file is missing or altered, or does not contain a recipe.
        """
        try:
            data = read_sealed(self.recipe_path)
            if not isinstance(data.get("recipe"), dict):
                raise DamagedFile(f"{self.recipe_path} does not contain a recipe")
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}; restore it from a copy, or remove it and rerun the run's command to write it again"
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
