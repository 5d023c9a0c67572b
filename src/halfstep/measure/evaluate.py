"""Evaluation settings, and the real data that samples are compared with.

Images are rounded to uint8 before they are measured, as when they are saved. The seeds are 0, 1, 2, ..., so all models
of a chain start from the same noise.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, NamedTuple, final

import torch
from pydantic import ConfigDict
from torch import Tensor

from halfstep.core.door import check_switch, check_whole
from halfstep.core.draw import generator_for
from halfstep.core.grids import MOST_STEPS
from halfstep.data import Data
from halfstep.metrics import (
    LEAST,
    Classifier,
    Figures,
    RealData,
    check_classes,
    extractor_for,
    extractors,
    figures_of,
    real_features,
)
from halfstep.runs import too_few
from halfstep.runtime.failures import told_when_out_of_memory
from halfstep.runtime.files import json_digest
from halfstep.runtime.processes import Processes
from halfstep.samplers import Heun, Sampler

if TYPE_CHECKING:
    from halfstep.measure.store import Cell

MOST_SAMPLES: Final = 1_000_000
"""The maximum number of samples in a set, twenty times the usual 50,000."""
FIGURES_FORMAT: Final = 1
"""The version of the stored metrics. Increment it when a metric changes, so that old results are recomputed."""


@final
@dataclass(frozen=True)
class Evaluation:
    """The settings for evaluating the models of a chain.

    Raises:
        ValueError: if a count is out of range or the features are unknown.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    enabled: bool = True
    """Measure the models."""
    num_samples: int = 2000
    """Number of samples per model."""
    num_reference: int = 10_000
    """Maximum number of real samples to compare with."""
    features: str = "auto"
    """Features for computing distances, as NAME or NAME=WEIGHTS (see `halfstep ls extractors`); auto trains a
    classifier if the data has labels and at least 20 samples, and otherwise uses the pixels."""
    num_compared: int = 256
    """Number of student samples to compare with the teacher's samples from the same noise."""
    num_shown: int = 64
    """Number of samples to store with each stage for viewing."""
    batch_size: int | None = None
    """Samples per batch; by default, a large batch, halved until it fits."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 samples in bfloat16, which is faster, but its metrics form a separate protocol."""
    teacher_steps: tuple[int, ...] = ()
    """Additional step counts for the undistilled teacher."""
    teacher_heun_steps: tuple[int, ...] = (32,)
    """Step counts for the undistilled teacher with Heun's method."""

    def __post_init__(self) -> None:
        check_switch("evaluation.enabled", self.enabled)
        for name, least in {"num_samples": 2, "num_reference": 2, "num_compared": 1, "num_shown": 1}.items():
            check_whole(f"evaluation.{name}", getattr(self, name), least, MOST_SAMPLES)
        if self.batch_size is not None:
            check_whole("evaluation.batch_size", self.batch_size, most=MOST_SAMPLES)
        for name, steps in (("teacher_steps", self.teacher_steps), ("teacher_heun_steps", self.teacher_heun_steps)):
            if isinstance(steps, str) or not isinstance(steps, Sequence):
                raise ValueError(f"evaluation.{name} must be a list of step counts, got {steps!r}. Pass ({steps},)")
            for number in steps:
                check_whole(f"each of evaluation.{name}", number, most=MOST_STEPS)
        if self.precision not in ("float32", "bf16"):
            raise ValueError(f"evaluation.precision must be float32 or bf16, got {self.precision!r}")
        if not isinstance(self.features, str):
            raise ValueError(f"evaluation.features must be a name, got {self.features!r}. Pass 'auto'")
        if self.features != "auto":
            _ = extractors[self.features.partition("=")[0]]


class Method(NamedTuple):
    """A sampler and its number of steps."""

    sampler: Sampler
    num_steps: int

    @property
    def num_evals(self) -> int:
        """The number of network calls per sample, without guidance."""
        return self.sampler.num_evals(self.num_steps)


def teacher_methods(own: Sampler, steps: Iterable[int], evaluation: Evaluation) -> list[Method]:
    """Return the methods for an undistilled model: first `own`, then Heun, each in descending order of steps."""
    methods = [Method(own, number) for number in sorted(set(steps), reverse=True)]
    methods += [Method(Heun(), number) for number in sorted(set(evaluation.teacher_heun_steps), reverse=True)]
    return list(dict.fromkeys(methods))


def finest(methods: Sequence[Method]) -> Method:
    """Return the first method with the most network calls, which is the reference for all other methods."""
    return max(methods, key=lambda method: method.num_evals)


def features_for(data: Data, evaluation: Evaluation) -> str:
    """Return the name of the evaluation's features, with `auto` resolved."""
    if evaluation.features != "auto":
        return evaluation.features
    return "classifier" if data.num_classes > 1 and len(data) >= LEAST else "pixels"


def check_measurable(data: Data, evaluation: Evaluation) -> None:
    """Raise ValueError if samples cannot be compared with this data. This check does not train a classifier."""
    if not evaluation.enabled:
        return
    if len(data) < 2:
        raise ValueError(
            f"{data.source} contains only 1 sample, but computing a distance requires at least 2 real samples: add "
            "samples, or disable evaluation with --evaluation.no-enabled"
        )
    features = features_for(data, evaluation)
    if features == "classifier":
        check_classes(len(data), data.num_classes)
        return
    x0, cond = data.fetch(torch.arange(2))
    real = RealData(data.fingerprint, data.num_classes, lambda: (x0, cond["class_labels"]))
    extractor_for(features, real).features(x0)


def few_samples(extractor: str, num_samples: int, num_reference: int, size: int) -> str | None:
    """Return a warning if there are too few samples for a Frechet distance in `size` dimensions, otherwise None."""
    where = f"With {extractor}, the Frechet distance from {num_samples:,} samples to {num_reference:,} real samples"
    if too_few(num_samples, num_reference, size):
        needed = f"{size} dimensions need more than {size} samples in each set, preferably {10 * size}"
        return f"{where} is unreliable: {needed}. Use KID instead."
    # By convention, the bias with 50,000 samples is ignored.
    if min(num_samples, num_reference) < 50_000:
        return (
            f"{where} is biased upwards, and more so with fewer samples. Compare it only with distances in the same "
            "table."
        )
    return None


class Against(ABC):
    """The reference that a set of samples is compared with."""

    name: str
    """The part of a metrics file's name that identifies all inputs of the metrics except the samples."""
    needs: Sequence["Cell"] = ()
    """The cells whose samples `figures` needs."""

    @abstractmethod
    def figures(self, samples: Tensor, others: Sequence[Tensor]) -> Figures:
        """Return the metrics of `samples` `[n, *shape]`. `others` contains the samples of the cells in `needs`."""


@final
class Reference(Against):
    """The features of the real data, and their extractor. `cache` is a folder for features and classifiers."""

    def __init__(
        self, data: Data, evaluation: Evaluation, cache: Path | None = None, device: torch.device | str = "cpu"
    ) -> None:
        # Folders are sorted by class, so the first rows would cover only a few classes.
        order = torch.randperm(len(data), generator=generator_for("reference"))
        rows = order[: evaluation.num_reference].sort().values

        def labelled() -> tuple[Tensor, Tensor]:
            # These rows do not depend on `num_reference`, so the classifier's features do not depend on it either.
            batch = data.fetch(order[:10_000].sort().values)
            return batch.x0, batch.cond["class_labels"]

        real_data = RealData(data.fingerprint, data.num_classes, labelled, cache, torch.device(device))
        self.extractor = extractor_for(features_for(data, evaluation), real_data)
        content = (data.fingerprint, len(data), evaluation.num_reference)
        self.real = real_features(self.extractor, lambda: data.fetch(rows).x0, content, cache)
        self.data = data
        self.protocol: dict[str, Any] = {
            "features": self.extractor.name,
            "reference": data.source,
            "reference_fingerprint": data.fingerprint,
            "num_reference": len(rows),
            "reference_rows": "all" if len(rows) == len(data) else "a fixed random choice",
            "num_samples": evaluation.num_samples,
            "num_compared": min(evaluation.num_compared, evaluation.num_samples),
            "seeds": "0, 1, 2, ...",
            "images": "rounded to uint8" if data.is_image else "as they are",
        }
        counts = (evaluation.num_samples, len(rows), self.real.features.shape[1])
        self.note = few_samples(self.extractor.name, *counts)
        """A warning about too few samples, or None (see `few_samples`)."""
        self.too_few = too_few(*counts)
        """Whether there are too few samples for a reliable Frechet distance."""
        if evaluation.precision != "float32":
            self.protocol["precision"] = evaluation.precision
        if isinstance(self.extractor, Classifier):
            self.protocol["classifier_accuracy"] = round(self.extractor.accuracy, 4)
        short = re.sub("[^a-z0-9]+", "-", self.extractor.name.lower())
        self.name = f"{short}-{json_digest((FIGURES_FORMAT, self.extractor.name, data.fingerprint, len(rows)), 10)}"

    def figures(self, samples: Tensor, others: Sequence[Tensor] = ()) -> Figures:
        with told_when_out_of_memory(
            f"out of memory while measuring with {self.extractor.name}: use fewer samples (--num-samples), or an "
            "extractor with fewer features"
        ):
            return figures_of(self.extractor, self.extractor.features(samples), self.real)


def references_for(
    data: Data,
    evaluation: Evaluation,
    features: Iterable[str],
    cache: Path | None,
    device: torch.device,
    processes: Processes,
) -> list[Reference]:
    """Return a reference for each extractor in `features`. All processes must create the same extractors.

    Raises:
        ValueError: if the extractors differ between processes.
    """
    made = processes.main_first(
        lambda: [Reference(data, replace(evaluation, features=one), cache, device) for one in features]
    )
    names = " and ".join(reference.extractor.name for reference in made)
    remedy = "set the same cache folder for all processes (HALFSTEP_CACHE)"
    processes.check_same(names, "their feature extractors", remedy)
    return made
