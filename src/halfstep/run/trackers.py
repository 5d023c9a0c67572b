"""Logs a run and its images to TensorBoard, Weights & Biases or Trackio, through accelerate's trackers.

Steps count the updates of the whole plan. Names start with the stage's name, as in "01-halve-0512/loss".
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout, suppress
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, final, get_args
from uuid import uuid4

import numpy as np
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from PIL import Image

from halfstep.runtime.files import first_line, write_text
from halfstep.runtime.stop import Interrupted
from halfstep.train.settings import Tracker


def chosen_trackers(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of the trackers without duplicates. None means TensorBoard if it is installed.

    Raises:
        ValueError: if a tracker is unknown or its package is missing.
    """
    if names is None:
        return ("tensorboard",) if find_spec("tensorboard") else ()
    known = get_args(Tracker)
    for name in names:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}. Choose from {', '.join(known)}")
        # Trackers have the same names as their packages and as halfstep's extras.
        if find_spec(name) is None:
            raise ValueError(f"the tracker {name} needs the package {name}: pip install 'halfstep[{name}]'")
    return tuple(dict.fromkeys(names))


@final
class Trackers:
    """The trackers of a run, selected by the names that `chosen_trackers` returns.

    TensorBoard and Weights & Biases write to subfolders of `folder`. Weights & Biases and Trackio store `recipe` as the
    run's settings.
    """

    def __init__(self, names: Sequence[str], folder: Path, name: str, recipe: Mapping[str, Any]) -> None:
        self._names, self._folder, self._name, self._recipe = names, folder, name, recipe
        self._started: list[Any] = []

    def start(self, step: int) -> None:
        """Start the trackers, or resume the same run in them, at update `step` of the plan.

        TensorBoard drops everything that was logged after this update. Other trackers keep these entries, so the
        repeated updates appear twice.
        """
        if self._started or not self._names:
            return
        settings = {key: value for key, value in self._recipe.items() if isinstance(value, str | int | float | bool)}
        identity = self._identity() if set(self._names) - {"tensorboard"} else ""
        for name in self._names:
            tracker: Any
            if name == "tensorboard":
                tracker = TensorBoardTracker("tensorboard", self._folder, purge_step=step + 1)
            elif name == "wandb":
                tracker = WandBTracker(
                    "halfstep", name=self._name, id=identity, resume="allow", dir=str(self._folder), config=settings
                )
            else:
                # Trackio identifies a run by its name.
                unique = f"{self._name}-{identity[:6]}"
                tracker = TrackioTracker("halfstep", name=unique, resume="allow", config=settings)
            # Trackio prints to stdout, which the run uses for its own output.
            try:
                with redirect_stdout(StringIO()):
                    tracker.start()
            except (Interrupted, OSError):
                raise
            except Exception as error:  # each library has its own error types
                remedy = "run `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else "choose another --out"
                raise ValueError(
                    f"the tracker {name} cannot write to {self._folder} ({first_line(error)}). Remove it from "
                    f"--engine.trackers, or {remedy}"
                ) from None
            if isinstance(tracker, WandBTracker):
                tracker.run.define_metric("*", step_metric="update")
            self._started.append(tracker)

    def _identity(self) -> str:
        """Return the run's unique id, which is generated once and stored in the run folder."""
        file = self._folder / "tracking-id"
        held = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        if not re.fullmatch("[0-9a-f]{12}", held):
            held = uuid4().hex[:12]
            write_text(file, held)
        return held

    def log(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Log the values of a stage at update `step` of the plan."""
        named = {f"{stage}/{key}": value for key, value in values.items()}
        for tracker in self._started:
            if isinstance(tracker, WandBTracker):
                # Weights & Biases ignores repeated steps, so the update is logged as a separate value.
                tracker.log(named | {"update": step})
            else:
                tracker.log(named, step=step)

    def picture(self, stage: str, name: str, file: Path, step: int) -> None:
        """Log an image file of a stage. Trackio is skipped, because accelerate cannot log images to it."""
        for tracker in self._started:
            if isinstance(tracker, TrackioTracker):
                continue
            pixels = np.asarray(Image.open(file).convert("RGB"))[None]
            shape = {"dataformats": "NHWC"} if isinstance(tracker, TensorBoardTracker) else {}
            at = None if isinstance(tracker, WandBTracker) else step
            tracker.log_images({f"{stage}/{name}": pixels}, step=at, **shape)

    def finish(self) -> None:
        """Finish the started trackers."""
        while self._started:
            tracker = self._started.pop()
            with redirect_stdout(StringIO()):
                tracker.finish()
                if isinstance(tracker, TrackioTracker):
                    # Otherwise, Trackio would finish the run again and print a message when Python exits.
                    with suppress(RuntimeError):
                        import_module("trackio").finish()
