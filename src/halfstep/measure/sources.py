"""Sources of samples: a model with a sampler, or existing files."""

import functools
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.draw import generator_for
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data
from halfstep.models.model import Model, samples_at_once
from halfstep.runs import Manifest
from halfstep.runtime.files import json_digest
from halfstep.samplers import Sampler, samplers

CONDITIONS_FORMAT: Final = 1
"""The version of the rule that chooses the conditions of a seed. Increment it when the rule changes, so that samples
with other conditions are redrawn."""
SAMPLES_FORMAT: Final = 1
"""The version of the rule that chooses the file of a seed. Increment it when the rule changes, so that cells with other
files are measured again."""


@functools.lru_cache(maxsize=2)
def _order(stream: str, length: int) -> Tensor:
    """Return the order in which seeds use `length` data samples, int64 `[length]`. Each stream has its own order."""
    # Folders are sorted by class, so the first samples would cover only a few classes.
    return torch.randperm(length, generator=generator_for(stream))


def weights_of(manifest: Manifest) -> str:
    """Return a hash of the manifest's description of a model, which includes the sha256 of its weights."""
    return json_digest(manifest.model_dump(mode="json", exclude={"run", "seconds", "data", "class_names"}))


def sampler_of(manifest: Manifest) -> Sampler:
    """Return the sampler that a model was distilled for, which is also the default for its evaluation."""
    sampler: Sampler = samplers.rebuild(manifest.outcome.sampler)
    return sampler


class Drawn(NamedTuple):
    """A batch of samples."""

    x0: Tensor
    """The samples `[n, *shape]`, on the CPU."""
    seconds: float = 0.0
    """The sampling time in seconds."""
    num_evals: int | None = None
    """The number of network calls per sample, or None for samples in files."""


class Source(ABC):
    """A source of samples. The same seed always produces the same sample."""

    name: str
    """The prefix of the source's cell names."""
    is_image: bool
    at_once: int
    """The default batch size."""

    @property
    @abstractmethod
    def content(self) -> dict[str, Any]:
        """The inputs other than the seed and the number of steps that determine a sample, as JSON values."""

    @abstractmethod
    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None) -> Drawn:
        """Return the samples for `seeds`.

        Args:
            batch_size: the number of samples per batch. If None, batches are halved until they fit into memory.
        """

    @abstractmethod
    def release(self) -> None:
        """Release what `draw` has loaded. The next call of `draw` loads it again."""


@final
class ModelSource(Source):
    """A model with a sampler. The model is loaded only when a sample is missing.

    Args:
        load: loads the model onto `device`, once for each cell.
        data: the source of the model's conditions (captions, latents), if the model takes any. If it also takes
            classes, they come from the same data samples.
        name: the model's name; by default, its stage.
    """

    def __init__(
        self,
        manifest: Manifest,
        load: Callable[[], Model],
        sampler: Sampler,
        device: torch.device,
        data: Data,
        guidance_scale: float | None = None,
        precision: str = "float32",
        name: str | None = None,
    ) -> None:
        self.weights, self.sampler, self.is_image = weights_of(manifest), sampler, manifest.is_image
        self.name = f"{name or manifest.stage}-{samplers.name_of(sampler)}"
        self.at_once = samples_at_once(device)
        self._conditions = data if manifest.conditions else None
        self._guidance_scale, self._precision = guidance_scale, precision
        self._load = load
        self._model: Model | None = None

    @property
    def content(self) -> dict[str, Any]:
        said = {
            "weights": self.weights,
            "sampler": repr(self.sampler),
            "guidance_scale": self._guidance_scale,
            "conditions": None if self._conditions is None else [self._conditions.fingerprint, CONDITIONS_FORMAT],
        }
        return said if self._precision == "float32" else said | {"precision": self._precision}

    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None) -> Drawn:
        model = self._ready(seeds[:1])
        with warnings.catch_warnings():
            # Models are also measured at step counts that they were not distilled for.
            warnings.simplefilter("ignore", HalfstepWarning)
            cond, labels = self._cond(model, seeds)
            start = time.perf_counter()
            x0 = model.sample(
                list(seeds),
                num_steps,
                self.sampler,
                class_label=labels,
                batch_size=batch_size,
                cond=cond,
                guidance_scale=self._guidance_scale,
                precision=self._precision,
            )
            seconds = time.perf_counter() - start
        assert num_steps is not None
        return Drawn(x0, seconds, model.num_evals(self.sampler, num_steps, self._guidance_scale))

    def release(self) -> None:
        self._model = None

    def _cond(self, model: Model, seeds: range) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the conditions and the classes `[len(seeds)]` of one data sample for each seed.

        If the model takes no conditions other than classes, return ({}, None), because its classes then depend only on
        the seeds.
        """
        data = self._conditions
        if data is None:
            return {}, None
        places = torch.tensor([seed % len(data) for seed in seeds])
        found = data.fetch(_order("conditions", len(data))[places]).cond
        classes = ["class_labels"] if model.num_classes else []
        for name in (*model.manifest.conditions, *classes):
            if name not in found:
                raise ValueError(f"the model is conditioned on {name}, which {data.source} lacks. Use data with {name}")
        return {name: found[name] for name in model.manifest.conditions}, found["class_labels"] if classes else None

    def _ready(self, seeds: range) -> Model:
        """Return the model, loaded and warmed up on first use so that the slower first call is not timed."""
        if self._model is None:
            self._model = self._load()
            self._model.warm_up(self._cond(self._model, seeds)[0], self._precision)
        return self._model


@final
class DataSource(Source):
    """Samples in files. A seed is a position in a fixed random order of the samples."""

    name = "samples"
    at_once = 256

    def __init__(self, data: Data) -> None:
        self.data, self.is_image = data, data.is_image

    @property
    def content(self) -> dict[str, Any]:
        return {"samples": [self.data.fingerprint, SAMPLES_FORMAT]}

    def draw(self, num_steps: int | None, seeds: range, batch_size: int | None) -> Drawn:
        places = _order("samples", len(self.data))[list(seeds)]
        return Drawn(self.data.fetch(places).x0)

    def release(self) -> None:
        pass
