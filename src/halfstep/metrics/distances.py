"""Distances between two sets of samples, from their features.

* Frechet distance (Heusel et al. 2017, arXiv:1706.08500) of Gaussians fitted to the features,
  |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It is biased upwards for few samples: compare equal counts only.
* Kernel distance, KID (Binkowski et al. 2018, arXiv:1801.01401): the squared maximum mean discrepancy with the kernel
  (x . y / d + 1)^3, unbiased; it may be slightly negative.

Both come from torchmetrics; this room only feeds them features in float64 and fixes their random subsets.
"""

import warnings
from typing import Any, Final, final

import torch
from torch import Tensor, nn


@final
class _Given(nn.Module):
    """torchmetrics asks for a feature network; the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _check(a: Tensor, b: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] with one d, got {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a distance between sets needs at least 2 samples of each, got {len(a)} and {len(b)}")
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise ValueError("features are not finite: the samples are broken")


ALONE: Final[dict[str, Any]] = {"sync_on_compute": False}
"""Keeps torchmetrics from waiting for other processes of the run: one of them has all features, and asks alone."""


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The Frechet distance between feature sets `[n, d]` and `[m, d]`, computed in float64.

    Raises:
        ValueError: if the shapes do not fit, a set has fewer than 2 rows, or a feature is not finite.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    _check(a, b)
    metric = FrechetInceptionDistance(feature=_Given(a.shape[1]), normalize=False, **ALONE).set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    # Rounding can leave a few 1e-13 below zero for equal sets.
    return max(0.0, float(metric.compute()))


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 20, subset_size: int = 1000) -> float:
    """KID between feature sets `[n, d]` and `[m, d]`: the mean over random subsets, drawn with a fixed seed.

    Raises:
        ValueError: if the shapes do not fit, a set has fewer than 2 rows, or a feature is not finite.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    _check(a, b)
    size = min(subset_size, len(a), len(b))
    with warnings.catch_warnings():
        # torchmetrics says that it keeps all features, which are here already.
        warnings.simplefilter("ignore", UserWarning)
        metric = KernelInceptionDistance(
            feature=_Given(a.shape[1]), subsets=subsets, subset_size=size, normalize=False, **ALONE
        )
    metric.set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


def rmse(a: Tensor, b: Tensor) -> float:
    """The root mean square difference of paired samples, both `[n, *dims]`.

    Raises:
        ValueError: if their shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    return float((a.double() - b.double()).square().mean().sqrt())
