"""The explorer's backend, which samples a run's models from the same noise, subject to limits.

Every value in a request is checked here. Error messages fit on one line, and no value is used as a path. Models are
loaded from safetensors files, and requests are served one at a time.
"""

import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from halfstep.core.draw import between, step_noise
from halfstep.core.warnings import HalfstepWarning
from halfstep.explore.answer import Answer, Shown, StageChoice
from halfstep.measure.samples import samples_array
from halfstep.models.folder import find_stage, load, model_path
from halfstep.models.model import Model
from halfstep.report.words import inside
from halfstep.runs import Manifest, RunFolder, StageFolder, is_finite
from halfstep.runtime.files import DamagedFile
from halfstep.samplers import trajectory

KEPT_BYTES = 2 * 2**30
"""Maximum size in bytes of the weights in memory. If it is exceeded, the least recently used models are unloaded."""
LARGEST_SEED = 2**53
"""The largest seed. JSON numbers are exact for integers up to this value."""


class Unreadable(ValueError):
    """Raised when the files of a stage cannot be read."""


@final
@dataclass(frozen=True)
class Bounds:
    """Limits for one request.

    Raises:
        ValueError: if a limit is less than 1 or is not a number.
    """

    num_samples: int = 64
    num_steps: int = 1024
    num_frames: int = 32
    num_values: int = 4_000_000
    """Maximum total number of values in all samples."""
    seconds: float = 60.0
    """Maximum sampling time in seconds."""
    guidance_scale: float = 50.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 1:
                raise ValueError(f"the limit {name} must be at least 1, got {value}")

    def samples(self, shape: Sequence[int]) -> int:
        """Return the maximum number of samples of this shape per request."""
        return max(1, min(self.num_samples, self.num_values // math.prod(shape)))

    def frames(self, shape: Sequence[int]) -> int:
        """Return the maximum number of frames of this shape in a walk, which is at least 2."""
        return max(2, min(self.num_frames, self.num_values // math.prod(shape)))


@final
class Explorer:
    """A run whose models can be sampled.

    Args:
        path: the folder of a run or of a stage, or the name of a packaged student.

    Raises:
        ValueError: if no model can be sampled, or if the samples are neither grey or colour images nor 2-D points.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", bounds: Bounds | None = None) -> None:
        path = model_path(path)
        self.path, self.device, self.bounds = path, torch.device(device), bounds or Bounds()
        self._folders: dict[str, StageFolder] = {}
        self._manifests: dict[str, Manifest] = {}
        self.choices = self._choices()
        present = [choice for choice in self.choices if choice.missing is None]
        if not present:
            why = "; ".join(f"{choice.name}: {choice.missing}" for choice in self.choices)
            raise ValueError(f"{path} contains no model that can be sampled ({why})")
        self.present: Sequence[StageChoice] = present
        self.manifest = self._manifests[present[-1].name]
        self.shape = self.manifest.shape
        if self.manifest.conditions:
            raise ValueError(
                f"the models of {path} need {', '.join(self.manifest.conditions)}, for which the explorer has no "
                "field. Use halfstep sample --prompt"
            )
        is_picture = self.manifest.is_image and len(self.shape) == 3 and self.shape[0] in (1, 3)
        if not is_picture and self.shape != (2,):
            raise ValueError(
                f"samples of shape {list(self.shape)} are not supported: the explorer only shows grey or colour "
                "images and 2-D points. Use halfstep sample --out samples.npz"
            )
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._deadline = math.inf
        """Value of `perf_counter` at which the current request must end."""

    def stop(self) -> None:
        """Refuse further requests and end the current one at its next step."""
        self._stopped.set()

    @property
    def start(self) -> StageChoice:
        """The first model of the chain, which may be missing."""
        found = next((choice for choice in self.choices if choice.name == self._start), None)
        return found or StageChoice("the teacher", None, None, "it is not in this folder")

    def label(self, choice: StageChoice) -> str:
        """Return the description of a stage, followed by the stage's name if the description is not unique."""
        alone = sum(one.words == choice.words for one in self.choices) == 1
        text = choice.words if alone or choice.role is None else f"{choice.words}, {choice.name}"
        return text[0].upper() + text[1:]

    @property
    def start_steps(self) -> int:
        """Default number of steps for the start of the chain."""
        first = self._manifests.get(self.start.name)
        own = None if first is None else first.num_steps
        return min(self.bounds.num_steps, own or self.manifest.start_steps or 64)

    @property
    def knows_guidance(self) -> bool:
        """Whether any model supports a guidance scale."""
        return any(map(self._guided, self.present))

    def _guided(self, choice: StageChoice) -> bool:
        """Return whether the stage's model supports a guidance scale."""
        manifest, folder = self._manifests[choice.name], self._folders[choice.name]
        learned = manifest.guidance
        return folder.null.name in manifest.files or (learned is not None and learned["type"] == "range")

    def _choices(self) -> list[StageChoice]:
        run = RunFolder(self.path)
        folders = (run.stages() if self.path.is_dir() else []) or [find_stage(self.path)]
        self._start = None if run.start is None else run.start.name
        missing = "it has not been trained yet"
        choices = {row.name: StageChoice(row.name, row.num_steps, row.role, missing) for row in run.plan}
        for folder in folders:
            try:
                manifest = folder.manifest(verify=False)
            except (DamagedFile, OSError) as error:
                role = choices[folder.name].role if folder.name in choices else None
                choices[folder.name] = StageChoice(folder.name, None, role, inside(self.path, error))
                continue
            why = None
            if not manifest.weights_kept:
                why = "its weights were not kept (chain.keep)"
            elif not folder.model.is_file():
                why = "its model.safetensors does not exist"
            elif self._manifests and manifest.shape != next(iter(self._manifests.values())).shape:
                why = "its samples have a different shape from those of the first stage"
            else:
                self._folders[folder.name], self._manifests[folder.name] = folder, manifest
            choices[folder.name] = StageChoice(folder.name, manifest.num_steps, manifest.outcome.role, why)
            if self._start is None and folder.path == self.path and manifest.outcome.role == "teacher":
                self._start = folder.name
        return list(choices.values())

    # --- The three views ---

    def compare(
        self,
        stage: object,
        num_steps: object = None,
        teacher_steps: object = None,
        seed: object = 0,
        num_samples: object = 16,
        class_label: object = None,
        guidance_scale: object = None,
    ) -> Answer:
        """Sample a stage and the start of the chain from the same noise.

        Args:
            num_steps: number of steps of the stage, or None for the number that it was distilled for (`start_steps` if
                it works with any number).
            teacher_steps: number of steps of the start of the chain, or None for `start_steps`.
            seed: seed of the first sample. The other samples use the seeds that follow.

        Raises:
            ValueError: if a value is invalid or exceeds a limit.
        """
        choice = self._stage(stage)
        asked = [(choice, self._steps("steps", num_steps, choice))]
        other = self._steps("teacher's steps", teacher_steps, self.start)
        first = self._whole("seed", seed, 0, LARGEST_SEED)
        seeds = range(first, first + self._whole("samples", num_samples, 1, self.bounds.samples(self.shape)))
        notes = self._start_notes()
        if self.start.missing is None:
            asked.append((self.start, other))
            if choice == self.start:
                notes.append("The chosen stage is the teacher, so both models are the same.")
        return self._answer(asked, seeds, lambda m: m.noise(seeds), class_label, guidance_scale, notes)

    def strip(self, seed: object = 0, class_label: object = None, guidance_scale: object = None) -> Answer:
        """Sample every stage with its own number of steps, and the teacher with `start_steps`, from the same noise.

        Raises:
            ValueError: if a value is invalid.
        """
        seeds = [self._whole("seed", seed, 0, LARGEST_SEED)]
        asked = [(choice, self._steps("steps", None, choice)) for choice in self.present]
        notes = self.missing_notes()
        return self._answer(asked, seeds, lambda m: m.noise(seeds), class_label, guidance_scale, notes, needed=None)

    def walk(
        self,
        stage: object,
        num_steps: object = None,
        seed: object = 0,
        other_seed: object = 1,
        num_frames: object = 8,
        class_label: object = None,
        guidance_scale: object = None,
    ) -> Answer:
        """Sample a stage and the start of the chain along the great circle between the noise of two seeds.

        Without a class, all frames use the class of the first seed.

        Raises:
            ValueError: if a value is invalid or exceeds a limit.
        """
        choice = self._stage(stage)
        asked = [(choice, self._steps("steps", num_steps, choice))]
        first = self._whole("first seed", seed, 0, LARGEST_SEED)
        last = self._whole("last seed", other_seed, 0, LARGEST_SEED)
        number = self._whole("frames", num_frames, 2, self.bounds.frames(self.shape))
        if self.start.missing is None and choice != self.start:
            asked.append((self.start, self.start_steps))

        def noise(model: Model) -> Tensor:
            ends = model.noise([first, last])
            return between(ends[0], ends[1], [index / (number - 1) for index in range(number)])

        return self._answer(asked, [first] * number, noise, class_label, guidance_scale, self._start_notes())

    def missing_notes(self) -> list[str]:
        """Return one sentence for each missing stage."""
        return [f"{choice.name} is missing: {choice.missing}." for choice in self.choices if choice.missing is not None]

    def _start_notes(self) -> list[str]:
        if self.start.missing is None:
            return []
        return [f"Samples are not compared with {self.start.name}: {self.start.missing}."]

    # --- Checks ---

    def _stage(self, name: object) -> StageChoice:
        found = next((choice for choice in self.choices if choice.name == name), None)
        if found is None:
            known = ", ".join(choice.name for choice in self.present)
            raise ValueError(f"stage {_short(name)} does not exist. Choose one of {known}")
        if found.missing is not None:
            raise ValueError(f"{found.name} is missing: {found.missing}. Choose another stage")
        return found

    def _steps(self, what: str, value: object, choice: StageChoice) -> int:
        if value is None:
            return choice.num_steps or self.start_steps
        return self._whole(what, value, 1, self.bounds.num_steps)

    @staticmethod
    def _whole(what: str, value: object, low: int, high: int) -> int:
        if is_finite(value) and low <= value <= high and value == int(value):
            return int(value)
        raise ValueError(f"{what} must be a whole number from {low} to {high:,}, got {_short(value)}")

    def _class(self, value: object) -> int | None:
        if value is None:
            return None
        if not self.manifest.num_classes:
            raise ValueError(f"class {_short(value)} has no effect: these models are not class-conditional. Remove it")
        return self._whole("class", value, 0, self.manifest.num_classes - 1)

    def _scale(self, value: object) -> float | None:
        if value is None:
            return None
        if is_finite(value) and 0 <= value <= self.bounds.guidance_scale:
            return float(value)
        raise ValueError(
            f"the guidance scale must be a number from 0 to {self.bounds.guidance_scale:g}, got {_short(value)}"
        )

    # --- Models ---

    def _model(self, name: str) -> Model:
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name]
        try:
            model = load(self._folders[name].path, self.device)
        except (ValueError, OSError) as error:
            raise Unreadable(f"{name} cannot be sampled: {inside(self.path, error)}") from None
        self._models[name] = model
        while len(self._models) > 1 and sum(map(_num_bytes, self._models.values())) > KEPT_BYTES:
            self._models.popitem(last=False)
        model.warm_up()
        return model

    def _answer(
        self,
        asked: Sequence[tuple[StageChoice, int]],
        seeds: range | list[int],
        noise: Callable[[Model], Tensor],
        class_label: object,
        guidance_scale: object,
        notes: list[str],
        needed: int | None = 0,
    ) -> Answer:
        """Sample each stage with its own number of steps. Warnings and unreadable stages become notes.

        Args:
            needed: index of the stage that must be readable, or None if any stage may be unreadable.
        """
        label, scale = self._class(class_label), self._scale(guidance_scale)
        shown: list[Shown] = []
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HalfstepWarning)
            if self._stopped.is_set():
                raise ValueError("the explorer was stopped")
            self._deadline = time.perf_counter() + self.bounds.seconds
            for place, (choice, num_steps) in enumerate(asked):
                is_guided = place == needed or self._guided(choice)
                if scale is not None and not is_guided:
                    notes.append(f"{choice.name} does not support a guidance scale and was sampled without one.")
                try:
                    shown.append(self._sample(choice, num_steps, seeds, noise, label, scale if is_guided else None))
                except Unreadable as error:
                    if place == needed or (place == len(asked) - 1 and not shown):
                        raise
                    notes.append(f"{error}.")
        for warning in caught:
            if issubclass(warning.category, HalfstepWarning) and (text := f"{warning.message}.") not in notes:
                notes.append(text[0].upper() + text[1:])
        return Answer(shown, notes)

    def _sample(
        self,
        choice: StageChoice,
        num_steps: int,
        seeds: range | list[int],
        noise: Callable[[Model], Tensor],
        label: int | None,
        scale: float | None,
    ) -> Shown:
        model = self._model(choice.name)
        model.check_steps(num_steps)
        cond: Mapping[str, Tensor] = model.cond(seeds, label, scale)
        x_t, sampler = noise(model), model.sampler
        drawn = step_noise(seeds, model.shape) if sampler.stochastic else None
        start = time.perf_counter()
        with torch.inference_mode():
            for step in trajectory(model, x_t, num_steps, sampler, cond, noise=drawn):
                x_t = step.x_s
                if self._stopped.is_set():
                    raise ValueError("the explorer was stopped")
                if time.perf_counter() > self._deadline and step.s > 0:
                    raise ValueError(
                        f"{choice.name} was stopped at step {step.number + 1} of {num_steps} because the request "
                        f"took {self.bounds.seconds:g} s. Choose fewer samples or steps"
                    )
            x0 = x_t.cpu()
        seconds = time.perf_counter() - start
        if not bool(torch.isfinite(x0).all()):
            raise ValueError(
                f"the samples of {choice.name} with {num_steps} steps are not finite. Choose another stage or number "
                "of steps"
            )
        return Shown(
            stage=choice.name,
            is_start=choice == self.start,
            label=self.label(choice),
            num_steps=num_steps,
            num_evals=model.num_evals(sampler, num_steps, scale),
            sampler=model.manifest.outcome.sampler_name,
            seconds=seconds,
            samples=samples_array(x0, self.manifest.is_image),
        )


def _num_bytes(model: Model) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
