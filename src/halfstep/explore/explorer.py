"""What the explorer does, without its page: a run's models, asked within bounds, from noise that is the same for all.

Every value that a request brings is checked here and refused in one line; none of them is used as a path. Models are
read from safetensors, one request is served at a time.
"""

import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from torch import Tensor

from halfstep.core.draw import between, step_noise
from halfstep.core.warnings import HalfstepWarning
from halfstep.measure.samples import samples_array
from halfstep.models.folder import find_stage, load
from halfstep.models.model import Model
from halfstep.runs import Manifest, RunFolder, StageFolder
from halfstep.runtime.files import DamagedFile
from halfstep.samplers import trajectory

KEPT_BYTES = 2 * 2**30
"""Of weights that stay in memory; beyond it, the model that was used longest ago goes."""
LARGEST_SEED = 2**53
"""Up to here JSON's numbers are whole."""


class Unreadable(ValueError):
    """The files of a stage cannot be read; the message names it."""


@final
@dataclass(frozen=True)
class Bounds:
    """The most that one request may ask for.

    Raises:
        ValueError: if one of them is below 1, or not a number.
    """

    num_samples: int = 64
    num_steps: int = 1024
    num_frames: int = 32
    num_values: int = 4_000_000
    """Numbers in all samples of a request."""
    seconds: float = 60.0
    """Of sampling."""
    guidance_scale: float = 50.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 1:
                raise ValueError(f"the bound {name} must be at least 1, got {value}")

    def samples(self, shape: Sequence[int]) -> int:
        """Samples of this shape in one request."""
        return max(1, min(self.num_samples, self.num_values // math.prod(shape)))

    def frames(self, shape: Sequence[int]) -> int:
        """Frames of a walk through samples of this shape, at least 2."""
        return max(2, min(self.num_frames, self.num_values // math.prod(shape)))


@final
@dataclass(frozen=True)
class StageChoice:
    """A stage that can be asked, or why it cannot."""

    name: str
    num_steps: int | None
    """Its own; None for any number."""
    role: str | None
    """teacher, matched or student; None if unknown."""
    missing: str | None = None

    @property
    def label(self) -> str:
        """What a list shows."""
        if self.missing is not None:
            return f"{self.name} (missing)"
        return self.name if self.role in (None, "student") else f"{self.name} ({self.role})"


@final
@dataclass(frozen=True)
class Shown:
    """What a model made."""

    stage: str
    role: str | None
    is_start: bool
    """Whether the chain starts from it."""
    num_steps: int
    num_evals: int
    """Network calls for a sample."""
    sampler: str
    seconds: float
    """Wall time of sampling alone."""
    samples: np.ndarray
    """uint8 `[n, h, w, c]` for images, float32 `[n, *dims]` otherwise."""


@final
@dataclass(frozen=True)
class Answer:
    """What was asked for, with what is to be said about it."""

    shown: Sequence[Shown]
    notes: Sequence[str]


@final
class Explorer:
    """A run whose models can be asked.

    Args:
        path: the folder of a run, or of one stage.

    Raises:
        ValueError: if it holds no model that can be asked, or one whose samples are no pictures.
    """

    def __init__(self, path: Path, device: str | torch.device = "cpu", bounds: Bounds | None = None) -> None:
        self.path, self.device, self.bounds = path, torch.device(device), bounds or Bounds()
        self._folders: dict[str, StageFolder] = {}
        self._manifests: dict[str, Manifest] = {}
        self.choices = self._choices()
        present = [choice for choice in self.choices if choice.missing is None]
        if not present:
            why = "; ".join(f"{choice.name}: {choice.missing}" for choice in self.choices)
            raise ValueError(f"{path} holds no model that can be asked ({why})")
        self.present: Sequence[StageChoice] = present
        self.manifest = self._manifests[present[-1].name]
        self.shape = self.manifest.shape
        if self.manifest.conditions:
            raise ValueError(
                f"the models of {path} are shown {', '.join(self.manifest.conditions)}, for which the explorer has no "
                "field: use halfstep sample --prompt"
            )
        if not self.manifest.is_image and self.shape != (2,):
            raise ValueError(
                f"samples of shape {list(self.shape)} are no pictures, and the explorer shows images and points in the "
                "plane only: use halfstep sample --out samples.npz"
            )
        self._models: OrderedDict[str, Model] = OrderedDict()
        self._lock = threading.Lock()
        self._deadline = math.inf
        """Of the request that is served, on the clock of `perf_counter`."""

    @property
    def start(self) -> StageChoice:
        """The model from which the chain starts, which may be missing: the others are compared with it."""
        found = next((choice for choice in self.choices if choice.name == self._start), None)
        return found or StageChoice("the teacher", None, None, "it is not in this folder")

    @property
    def start_steps(self) -> int:
        """Default number of steps of the start of the chain."""
        first = self._manifests.get(self.start.name)
        own = None if first is None else first.num_steps
        return min(self.bounds.num_steps, own or self.manifest.start_steps or 64)

    @property
    def knows_guidance(self) -> bool:
        """Whether a guidance scale can act on one of the models."""
        return any(map(self._guided, self.present))

    def _guided(self, choice: StageChoice) -> bool:
        """Whether a guidance scale can act on its model."""
        manifest, folder = self._manifests[choice.name], self._folders[choice.name]
        learned = manifest.guidance
        return folder.null.name in manifest.files or (learned is not None and learned["type"] == "range")

    def _choices(self) -> list[StageChoice]:
        run = RunFolder(self.path)
        folders = run.stages() if self.path.is_dir() else []
        if not folders:
            folders = [find_stage(self.path)]
        plan = run.plan
        roles = {row.name: row.role for row in plan}
        self._start = None if run.start is None else run.start.name
        choices: dict[str, StageChoice] = {}
        for folder in folders:
            try:
                manifest = folder.manifest(verify=False)
            except (DamagedFile, OSError) as error:
                choices[folder.name] = StageChoice(folder.name, None, roles.get(folder.name), self._inside(error))
                continue
            why = None
            if not manifest.weights_kept:
                why = "its weights were not kept (chain.keep)"
            elif not folder.model.is_file():
                why = "its model.safetensors is gone"
            elif self._manifests and manifest.shape != next(iter(self._manifests.values())).shape:
                why = "its samples have another shape than those of the first stage"
            else:
                self._folders[folder.name], self._manifests[folder.name] = folder, manifest
            choices[folder.name] = StageChoice(folder.name, manifest.num_steps, manifest.outcome.role, why)
            if self._start is None and folder.path == self.path and manifest.outcome.role == "teacher":
                self._start = folder.name
        for row in plan:
            choices.setdefault(row.name, StageChoice(row.name, row.num_steps, row.role, "it has not been trained yet"))
        return [choices[name] for name in dict.fromkeys([*roles, *choices])]

    def _inside(self, error: Exception) -> str:
        return str(error).replace(f"{self.path}/", "")

    # --- The three questions ---

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
        """A stage and the start of the chain beside each other, from the same noise.

        Args:
            num_steps: of the stage; its own if None, for any other those where the chain starts.
            teacher_steps: those where the chain starts if None.
            seed: of the first sample; the others follow it.

        Raises:
            ValueError: in one line, if a value is not possible or beyond the bounds.
        """
        choice = self._stage(stage)
        steps = self._steps("steps", num_steps, choice)
        other = self._steps("teacher's steps", teacher_steps, self.start)
        first = self._whole("seed", seed, 0, LARGEST_SEED)
        number = self._whole("samples", num_samples, 1, self.bounds.samples(self.shape))
        asked = [(choice, steps)]
        with self._one_at_a_time() as notes:
            self._note_start(notes)
            if self.start.missing is None:
                asked.append((self.start, other))
                if choice == self.start:
                    notes.append("The teacher itself was chosen: both are the same model.")
            seeds = range(first, first + number)
            shown = self._all(asked, lambda m: m.noise(seeds), seeds, class_label, guidance_scale, notes)
        return Answer(shown, notes)

    def strip(self, seed: object = 0, class_label: object = None, guidance_scale: object = None) -> Answer:
        """One noise through all stages, each at its own steps, the teacher at those where the chain starts.

        Raises:
            ValueError: in one line, if a value is not possible.
        """
        seeds = [self._whole("seed", seed, 0, LARGEST_SEED)]
        with self._one_at_a_time() as notes:
            asked = [(choice, self._steps("steps", None, choice)) for choice in self.present]
            shown = self._all(asked, lambda m: m.noise(seeds), seeds, class_label, guidance_scale, notes, needed=None)
            notes += [f"{c.name} is missing: {c.missing}." for c in self.choices if c.missing is not None]
        return Answer(shown, notes)

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
        """Samples along the great circle from one noise to another, by a stage and by the start of the chain.

        Where no class is chosen, all frames are of the first seed's.

        Raises:
            ValueError: in one line, if a value is not possible or beyond the bounds.
        """
        choice = self._stage(stage)
        steps = self._steps("steps", num_steps, choice)
        first = self._whole("first seed", seed, 0, LARGEST_SEED)
        last = self._whole("last seed", other_seed, 0, LARGEST_SEED)
        number = self._whole("frames", num_frames, 2, self.bounds.frames(self.shape))
        shares = [index / (number - 1) for index in range(number)]
        asked = [(choice, steps)]
        if self.start.missing is None and choice != self.start:
            asked.append((self.start, self.start_steps))

        def noise(model: Model) -> Tensor:
            ends = model.noise([first, last])
            return between(ends[0], ends[1], shares)

        with self._one_at_a_time() as notes:
            self._note_start(notes)
            seeds = [first] * number
            shown = self._all(asked, noise, seeds, class_label, guidance_scale, notes)
        return Answer(shown, notes)

    def _note_start(self, notes: list[str]) -> None:
        if self.start.missing is not None:
            notes.append(f"There is no teacher to compare with, {self.start.name}: {self.start.missing}.")

    # --- Checks ---

    def _stage(self, name: object) -> StageChoice:
        found = next((choice for choice in self.choices if choice.name == name), None)
        if found is None:
            known = ", ".join(choice.name for choice in self.present)
            raise ValueError(f"there is no stage {_short(name)}: choose one of {known}")
        if found.missing is not None:
            raise ValueError(f"{found.name} is missing: {found.missing}; choose another stage")
        return found

    def _steps(self, what: str, value: object, choice: StageChoice) -> int:
        if value is None:
            return choice.num_steps or self.start_steps
        return self._whole(what, value, 1, self.bounds.num_steps)

    @staticmethod
    def _whole(what: str, value: object, low: int, high: int) -> int:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and low <= value <= high and value == int(value):  # type: ignore[operator, call-overload]
            return int(value)  # type: ignore[call-overload]
        raise ValueError(f"{what} must be a whole number from {low} to {high:,}, got {_short(value)}")

    def _class(self, value: object) -> int | None:
        if value is None:
            return None
        if not self.manifest.num_classes:
            raise ValueError(f"class {_short(value)} was asked for, but these models know no classes: leave it out")
        return self._whole("class", value, 0, self.manifest.num_classes - 1)

    def _scale(self, value: object) -> float | None:
        if value is None:
            return None
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= self.bounds.guidance_scale:
            return float(value)
        raise ValueError(
            f"the guidance scale must be a number from 0 to {self.bounds.guidance_scale:g}, got {_short(value)}"
        )

    # --- Models ---

    @contextmanager
    def _one_at_a_time(self) -> Iterator[list[str]]:
        """Notes that take the warnings of the library; one request holds the models at a time."""
        notes: list[str] = []
        with self._lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HalfstepWarning)
            self._deadline = time.perf_counter() + self.bounds.seconds
            yield notes
        for warning in caught:
            if issubclass(warning.category, HalfstepWarning) and (text := f"{warning.message}.") not in notes:
                notes.append(text[0].upper() + text[1:])

    def _model(self, name: str) -> Model:
        if name in self._models:
            self._models.move_to_end(name)
            return self._models[name]
        try:
            model = load(self._folders[name].path, self.device)
        except (ValueError, OSError) as error:
            raise Unreadable(f"{name} cannot be asked: {self._inside(error)}") from None
        self._models[name] = model
        while len(self._models) > 1 and sum(map(_num_bytes, self._models.values())) > KEPT_BYTES:
            self._models.popitem(last=False)
        model.warm_up()
        return model

    def _all(
        self,
        asked: Sequence[tuple[StageChoice, int]],
        noise: Callable[[Model], Tensor],
        seeds: range | list[int],
        class_label: object,
        guidance_scale: object,
        notes: list[str],
        needed: int | None = 0,
    ) -> list[Shown]:
        """What each makes in its steps. Of stages that cannot be read it is noted, and they are passed over.

        Args:
            needed: the place of the one that must be read; None for any.
        """
        self._scale(guidance_scale)
        shown = []
        for place, (choice, num_steps) in enumerate(asked):
            scale = guidance_scale
            if scale is not None and place != needed and not self._guided(choice):
                scale = None
                notes.append(f"{choice.name} knows no guidance scale, and was asked without.")
            try:
                shown.append(self._ask(choice, num_steps, noise, seeds, class_label, scale))
            except Unreadable as error:
                last = place == len(asked) - 1
                if place == needed or (last and not shown):
                    raise
                notes.append(f"{error}.")
        return shown

    def _ask(
        self,
        choice: StageChoice,
        num_steps: int,
        noise: Callable[[Model], Tensor],
        seeds: range | list[int],
        class_label: object,
        guidance_scale: object,
    ) -> Shown:
        label, scale = self._class(class_label), self._scale(guidance_scale)
        model = self._model(choice.name)
        model.check_steps(num_steps)
        cond: Mapping[str, Tensor] = model.cond(seeds, label, scale)
        x_t, sampler = noise(model), model.sampler
        drawn = step_noise(seeds, model.shape) if sampler.stochastic else None
        start = time.perf_counter()
        with torch.inference_mode():
            for step in trajectory(model, x_t, num_steps, sampler, cond, noise=drawn):
                x_t = step.x_s
                if time.perf_counter() > self._deadline and step.s > 0:
                    raise ValueError(
                        f"{choice.name} was stopped at step {step.number + 1} of {num_steps}, for the request had "
                        f"taken {self.bounds.seconds:g} s: ask for fewer samples or steps"
                    )
            x0 = x_t.cpu()
        seconds = time.perf_counter() - start
        if not bool(torch.isfinite(x0).all()):
            raise ValueError(f"{choice.name} gave samples that are not finite at {num_steps} steps: the model diverged")
        return Shown(
            stage=choice.name,
            role=choice.role,
            is_start=choice == self.start,
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
