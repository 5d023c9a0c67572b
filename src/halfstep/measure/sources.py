"""Where the samples of an evaluation come from: a model with a sampler, or a folder that somebody has filled."""

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data
from halfstep.measure.samples import conditions_for
from halfstep.models.model import Model, samples_at_once
from halfstep.runs import Manifest
from halfstep.runtime.failures import NonFinite, told_when_out_of_memory
from halfstep.runtime.files import json_digest
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import Sampler


class Drawn(NamedTuple):
    """A set of samples."""

    x0: Tensor
    """`[n, *shape]` on the CPU."""
    seconds: float | None
    """What sampling alone took; None for samples that were there."""
    num_evals: int | None
    """Network calls for a sample."""


class Source(ABC):
    """Samples by their seeds, the same ones every time."""

    @property
    @abstractmethod
    def content(self) -> dict[str, Any]:
        """JSON-ready: what the samples of a seed are a function of, beside the number of steps."""

    @property
    def precision(self) -> str:
        """In which networks compute while they sample."""
        return "float32"

    @property
    @abstractmethod
    def at_once(self) -> int:
        """Samples that are drawn together where nothing is said."""

    @abstractmethod
    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None, stop: StopSignal | None) -> Drawn:
        """The samples of `seeds`.

        Args:
            batch_size: samples drawn together; None for `at_once`, and fewer where those do not fit into memory.

        Raises:
            Interrupted: if `stop` was set.
            NonFinite: if one is not finite.
            OutOfMemory: if they do not fit.
        """


@final
class ModelSource(Source):
    """A model with a sampler; loaded only when a sample is missing.

    Args:
        weights: what tells its weights apart from all others.
        device: where `load` puts it.
        conditions: the data whose conditions a model of texts is shown; None for a model that is shown none.
    """

    def __init__(
        self,
        load: Callable[[], Model],
        weights: str,
        sampler: Sampler,
        device: torch.device,
        conditions: Data | None = None,
        guidance_scale: float | None = None,
        precision: str = "float32",
    ) -> None:
        self._load = load
        self.weights, self.sampler, self.conditions = weights, sampler, conditions
        self._device = device
        self.guidance_scale, self._precision = guidance_scale, precision
        self._model: Model | None = None

    @property
    def content(self) -> dict[str, Any]:
        said = {
            "weights": self.weights,
            "sampler": repr(self.sampler),
            "guidance_scale": self.guidance_scale,
            "conditions": None if self.conditions is None else self.conditions.fingerprint,
        }
        return said if self.precision == "float32" else said | {"precision": self.precision}

    @property
    def precision(self) -> str:
        return self._precision

    @property
    def at_once(self) -> int:
        return samples_at_once(self._device)

    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None, stop: StopSignal | None) -> Drawn:
        assert num_steps is not None
        remedy = "lower --batch-size" if batch_size else "leave more of it to this process"
        tried = f"with {batch_size} samples at once" if batch_size else "though fewer samples at once were tried"
        with told_when_out_of_memory(f"out of memory while sampling, {tried}: {remedy}"), warnings.catch_warnings():
            # Teachers and students are asked for other numbers of steps than they are made for on purpose.
            warnings.simplefilter("ignore", HalfstepWarning)
            x0, seconds, evals = self._drawn(num_steps, seeds, batch_size, stop)
        if not bool(torch.isfinite(x0).all()):
            raise NonFinite(f"sampling with {num_steps} steps gave values that are not finite: the model diverged")
        return Drawn(x0, seconds, evals)

    def _drawn(
        self, num_steps: int, seeds: range, batch_size: int | None, stop: StopSignal | None
    ) -> tuple[Tensor, float, int]:
        """Samples, the seconds that they took, and network calls for each."""
        model = self._ready(seeds[0])
        size = batch_size or self.at_once
        chunks, seconds = [], 0.0
        for first in range(0, len(seeds), size):
            if stop is not None:
                stop.check()
            part = list(seeds[first : first + size])
            cond = {} if self.conditions is None else conditions_for(model, self.conditions, part)
            start = time.perf_counter()
            x0 = model.sample(
                part,
                num_steps,
                self.sampler,
                batch_size=batch_size,
                cond=cond,
                guidance_scale=self.guidance_scale,
                precision=self.precision,
            )
            seconds += time.perf_counter() - start
            chunks.append(x0)
        return torch.cat(chunks), seconds, model.num_evals(self.sampler, num_steps, self.guidance_scale)

    def _ready(self, seed: int) -> Model:
        """The model, loaded and asked once: the first call is slower than the others, and would be timed."""
        if self._model is None:
            model = self._load()
            model.warm_up(
                {} if self.conditions is None else conditions_for(model, self.conditions, [seed]), self.precision
            )
            self._model = model
        return self._model


@final
class DataSource(Source):
    """Samples that are there, such as a folder of images; a seed is a place among them."""

    def __init__(self, data: Data) -> None:
        self.data = data

    @property
    def content(self) -> dict[str, Any]:
        return {"samples": self.data.fingerprint}

    @property
    def at_once(self) -> int:
        return 256

    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None, stop: StopSignal | None) -> Drawn:
        return Drawn(self.data.fetch(torch.tensor(list(seeds))).x0, None, None)


def weights_of(manifest: Manifest) -> str:
    """What tells a stage's samples apart from those of all others, without reading its weights: their sha256, and all
    else that the manifest says of the model."""
    said = manifest.model_dump(mode="json", exclude={"seconds", "data"})
    return json_digest(said)
