"""Separate metrics for quality and diversity, computed from nearest neighbours in feature space.

The neighbourhood of a point extends to its k-th nearest neighbour in its own set.

* Precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991): precision is the share of samples in the
  neighbourhood of at least one real point, and recall is the share of real points in that of at least one sample.
* Density and coverage (Naeem et al. 2020, arXiv:2002.09797): density is the mean number of real neighbourhoods that
  contain a sample, divided by k, and coverage is the share of real points with a sample in their neighbourhood. They
  are more robust to outliers than precision and recall.

scikit-learn computes the distances in blocks, so the required memory grows linearly with the number of samples. The
tests compare the results with `prdc`.
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfstep.metrics.distances import check_shapes

K: Final = 5
"""The number of neighbours that Naeem et al. recommend."""
BLOCK: Final = 1024
"""The number of rows of the distance matrix to compute at a time."""


class PRDC(NamedTuple):
    """Precision, recall, density and coverage."""

    precision: float
    recall: float
    density: float
    coverage: float


def radii(features: Tensor, k: int = K) -> Tensor:
    """Return the distance, float64 `[n]`, from each row of `features` `[n, d]` to its `k`-th nearest other row.

    Raises:
        ValueError: if there are fewer than k + 2 rows.
    """
    from sklearn.metrics import pairwise_distances

    if len(features) < k + 2:
        raise ValueError(f"neighbourhoods with k = {k} need at least {k + 2} samples, got {len(features)}")
    x = features.double().numpy()
    found = []
    for start in range(0, len(x), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(x)))
        distances = pairwise_distances(x[rows], x)
        # Rounding must not change the distance from a row to itself.
        distances[rows - start, rows] = 0.0
        found.append(np.partition(distances, k, axis=1)[:, k])
    return torch.from_numpy(np.concatenate(found))


def precision_recall(real: Tensor, fake: Tensor, real_radii: Tensor | None = None, k: int = K) -> PRDC:
    """Return precision, recall, density and coverage of `fake` `[m, d]` with respect to `real` `[n, d]`, in float64.

    Args:
        real_radii: the result of `radii(real, k)`, if known.

    Raises:
        ValueError: if the dimensions differ, or if a set has fewer than k + 2 rows.
    """
    from sklearn.metrics import pairwise_distances

    check_shapes(real, fake)
    r = (radii(real, k) if real_radii is None else real_radii).numpy()
    f = radii(fake, k).numpy()
    x, y = real.double().numpy(), fake.double().numpy()
    hits: NDArray[np.int64] = np.zeros(len(y), np.int64)
    recalled, covered = 0, 0
    for start in range(0, len(x), BLOCK):
        distances = pairwise_distances(x[start : start + BLOCK], y)
        inside = distances < r[start : start + BLOCK, None]
        hits += inside.sum(0)
        recalled += int((distances < f[None, :]).any(1).sum())
        covered += int(inside.any(1).sum())
    return PRDC(
        precision=float((hits > 0).mean()),
        recall=recalled / len(x),
        density=float(hits.mean() / k),
        coverage=covered / len(x),
    )
