"""Measuring a model: samples from fixed seeds, their distance to the data and to the teacher, and the time they take.

Images are measured as they would be saved: rounded to uint8. The seeds are 0, 1, 2, ..., so every model of a chain is
shown the same noise, and "distance to the teacher" compares samples of the same noise.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from halfstep.core.draw import generator_for
from halfstep.data import Data
from halfstep.measure.samples import _as_measured, conditions_for, keep_samples
from halfstep.metrics import (
    Classifier,
    Measured,
    extractor_for,
    extractors,
    frechet_of_moments,
    kernel_distance,
    moments_of,
    real_features,
    rmse,
)
from halfstep.models.model import Model, check_precision, samples_at_once
from halfstep.runs.schema import Result
from halfstep.runtime.failures import NonFinite, told_when_out_of_memory
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import StopSignal
from halfstep.samplers import Ancestral, Sampler, samplers

CLASSIFIER_ROWS = 10_000
"""Real samples at most on which the classifier is trained, however many there are to compare with: its features must
not depend on that."""


@final
@dataclass(frozen=True)
class Evaluation:
    """How models are measured.

    Raises:
        ValueError: if a count is too small or the features are unknown.
    """

    num_samples: int = 2000
    num_reference: int = 10_000
    """Largest number of real samples to compare with."""
    features: str | None = None
    """An extractor, NAME or NAME=PATH of its weights; None takes the classifier where the data is labelled."""
    num_compared: int = 256
    """Samples over which student and teacher are compared from the same noise."""
    num_shown: int = 64
    """Samples that are kept to be looked at."""
    batch_size: int | None = None
    """Samples drawn at once; None for as many as `Model.sample` draws by itself, but at most an eighth of all."""
    precision: str = "float32"
    """"bf16" for networks that compute in bfloat16 while they sample."""
    teacher_steps: tuple[int, ...] = ()
    """Numbers of steps at which the teacher is measured, besides the start of the chain and those of its students."""

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 2), ("num_reference", 2), ("batch_size", 1), ("num_compared", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"evaluation.{name} must be at least {least}, got {value}")
        check_precision(self.precision)
        if self.features is not None:
            _ = extractors[self.features.partition("=")[0]]

    @property
    def does_not_fit(self) -> str:
        """What is said when memory ran out."""
        if self.batch_size is not None:
            return (
                f"out of memory while measuring, with {self.batch_size} samples at once: lower evaluation.batch_size, "
                "or leave it out"
            )
        return (
            "out of memory while measuring, though fewer samples at once were tried: leave more of it to this process, "
            "or measure on the CPU (engine.cpu)"
        )


@final
class Reference:
    """The real data's features, and the extractor that made them.

    Args:
        cache: folder for the classifier's weights.
    """

    def __init__(
        self,
        data: Data,
        evaluation: Evaluation,
        cache: Path | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        # A folder is sorted by class, so its first rows are of few classes.
        order = torch.randperm(len(data), generator=generator_for("reference"))
        rows = order[: evaluation.num_reference].sort().values

        def labelled() -> tuple[Tensor, Tensor]:
            batch = data.fetch(order[:CLASSIFIER_ROWS].sort().values)
            return batch.x0, batch.cond["class_labels"]

        asked = evaluation.features or ("classifier" if data.num_classes > 1 else "pixels")
        measured = Measured(data.fingerprint, data.num_classes, labelled, cache, torch.device(device))
        self.extractor = extractor_for(asked, measured)
        content = (data.fingerprint, len(data), evaluation.num_reference)
        self.real = real_features(self.extractor, lambda: data.fetch(rows).x0, content, cache)
        self.data = data
        self.is_image = data.is_image
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
        if evaluation.precision != "float32":
            self.protocol["precision"] = evaluation.precision
        if isinstance(self.extractor, Classifier):
            self.protocol["classifier_accuracy"] = round(self.extractor.accuracy, 4)


def measure(
    model: Model,
    num_steps: int,
    evaluation: Evaluation,
    reference: Reference,
    *,
    sampler: Sampler | None = None,
    teacher_samples: Tensor | None = None,
    keep: Path | None = None,
    stop: StopSignal | None = None,
    processes: Processes | None = None,
) -> tuple[Result, Tensor | None]:
    """The figures of a model at a number of steps, and its samples `[num_compared, *shape]` as they were measured.

    Several processes share the samples out, batch by batch, with the same result as one alone: the first has the
    samples, all have the figures.

    Args:
        sampler: the model's own if None.
        teacher_samples: what to compare with from the same noise, at least `num_compared` rows; None for nothing.
        keep: a stage's folder whose samples/ takes the first `num_shown` samples.
        processes: those that call this together; this one alone if None.

    Raises:
        Interrupted: if `stop` was set.
        NonFinite: if a sample is not finite.
        OutOfMemory: if it does not fit.
    """
    method = sampler or model.sampler
    together = processes or Processes()

    def drawn(seeds: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, their features, and the seconds that sampling alone took."""
        cond = conditions_for(model, reference.data, seeds)
        start = time.perf_counter()
        # Said here, so that other processes hear of the remedy as well.
        with told_when_out_of_memory(evaluation.does_not_fit):
            x0 = model.sample(
                seeds, num_steps, method, batch_size=evaluation.batch_size, cond=cond, precision=evaluation.precision
            )
            seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            return x0, reference.extractor.features(_as_measured(x0, reference.is_image)), seconds

    seeds = list(range(evaluation.num_samples))
    # By default there is a part for each of eight processes, however many there are: the batch decides about the last
    # bits on a GPU, and samples must not depend on who draws them.
    size = evaluation.batch_size or max(1, min(samples_at_once(model.device), -(-len(seeds) // 8)))
    parts = together.spread([seeds[first : first + size] for first in range(0, len(seeds), size)], drawn, stop)
    compared: list[Tensor] = []

    def figures() -> dict[str, Any]:
        assert parts is not None
        x0, features, seconds = (torch.cat(column) for column in zip(*parts, strict=True))
        if not bool(torch.isfinite(x0).all()):
            raise NonFinite(f"sampling with {num_steps} steps gave values that are not finite: the model diverged")
        compared.append(_as_measured(x0[: evaluation.num_compared], reference.is_image))
        teacher_rmse = None if teacher_samples is None else rmse(compared[0], teacher_samples[: len(compared[0])])
        shown = x0[: evaluation.num_shown]
        return Result(
            sampler=samplers.name_of(method),
            gamma=method.gamma if isinstance(method, Ancestral) else None,
            num_steps=num_steps,
            num_evals=model.num_evals(method, num_steps),
            frechet=frechet_of_moments(reference.real.moments, moments_of(features)),
            kid=kernel_distance(reference.real.features, features),
            teacher_rmse=teacher_rmse,
            seconds_per_1000=float(seconds.sum()) * 1000 / len(x0),
            samples=None if keep is None else keep_samples(keep, num_steps, shown, reference.is_image),
        ).model_dump()

    return Result.model_validate(together.on_main(figures)), compared[0] if compared else None
