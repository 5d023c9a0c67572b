"""The features (float32) and statistics (float64) of real data, cached for each combination of data and extractor."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from halfstep.metrics.distances import Moments, moments_of
from halfstep.metrics.features import FeatureExtractor
from halfstep.metrics.neighbours import K, radii
from halfstep.runtime.tensors import read_cached, write_cached

FORMAT = 1
"""The version of the cached files. Increment it when their content changes."""


@final
@dataclass(frozen=True)
class RealFeatures:
    """The features of the real data, and their statistics."""

    features: Tensor
    """The features, float32 `[n, d]`."""
    moments: Moments
    radii: Tensor | None
    """The neighbourhood radii, float64 `[n]` (see `neighbours.radii`), or None if there are too few samples."""


def described(features: Tensor) -> RealFeatures:
    """Return features `[n, d]` together with their statistics. Raises the same errors as `moments_of`."""
    return RealFeatures(features, moments_of(features), radii(features) if len(features) >= K + 2 else None)


def real_features(
    extractor: FeatureExtractor, fetch: Callable[[], Tensor], content: object, cache: Path | None
) -> RealFeatures:
    """Return the features of the samples that `fetch` returns, from the cache if possible.

    Args:
        content: identifies the samples (the data's fingerprint and the rows).
        cache: the cache folder, or None for no cache. If a cached file cannot be read, the features are recomputed.
    """
    key = hashlib.sha256(repr((FORMAT, extractor.name, content)).encode()).hexdigest()[:24]
    file = None if cache is None else cache / "reference" / f"{key}.safetensors"
    held = read_cached(file)
    if not {"features", "mean", "covariance"} <= held.keys():
        made = described(extractor.features(fetch()))
        held = {"features": made.features, "mean": made.moments.mean, "covariance": made.moments.covariance}
        if made.radii is not None:
            held["radii"] = made.radii
        write_cached(file, held)
        return made
    moments = Moments(held["mean"], held["covariance"], len(held["features"]))
    return RealFeatures(held["features"], moments, held.get("radii"))


def halves(features: Tensor) -> tuple[Tensor, Tensor]:
    """Split the rows into two halves of equal size. The split is random but fixed."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    middle = len(features) // 2
    return features[order[:middle]], features[order[middle : 2 * middle]]
