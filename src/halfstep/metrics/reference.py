"""The features (float32) and statistics (float64) of the real data, cached for each data and extractor."""

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
"""Version of the cached files. Increment it when their content changes."""


@final
@dataclass(frozen=True)
class RealFeatures:
    """The features of the real data, and their statistics."""

    features: Tensor
    """Features, float32 `[n, d]`."""
    moments: Moments
    radii: Tensor | None
    """Neighbourhood radii, float64 `[n]` (`neighbours.radii`); None if there are too few samples."""


def described(features: Tensor) -> RealFeatures:
    """Return features `[n, d]` and their statistics. Raises as `moments_of`."""
    return RealFeatures(features, moments_of(features), radii(features) if len(features) >= K + 2 else None)


def real_features(
    extractor: FeatureExtractor, fetch: Callable[[], Tensor], content: object, cache: Path | None
) -> RealFeatures:
    """Return the features of the samples that `fetch` returns, from the cache if possible.

    Args:
        content: identity of the samples: the fingerprint of the data, and the rows.
        cache: cache folder, or None. If a file in it cannot be read, the features are recomputed.
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
    """Return a fixed random split of the rows into two halves of equal size."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    middle = len(features) // 2
    return features[order[:middle]], features[order[middle : 2 * middle]]
