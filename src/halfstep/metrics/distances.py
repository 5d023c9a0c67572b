"""Distances between two sets of samples, computed from their features.

* The Frechet distance (Heusel et al. 2017, arXiv:1706.08500) between Gaussians fitted to the features,
  |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). It is biased upwards if there are few samples, so compare only
  distances computed from equal numbers of samples.
* The kernel distance, KID (Binkowski et al. 2018, arXiv:1801.01401): the squared maximum mean discrepancy for the
  kernel (x . y / d + 1)^3. It is unbiased, so it may be slightly negative.
* The sliced Wasserstein distance (Bonneel et al. 2015): the mean Wasserstein-1 distance between the features, projected
  onto random directions. It compares all moments and does not assume Gaussians.

torchmetrics computes the KID, and scipy the one-dimensional distances, in float64 and with fixed random seeds. This
module computes the Frechet distance itself, usually from the moments, because those of the real data are cached (see
`reference.py`). If a set has no more samples than dimensions, the distance is computed from the samples instead.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from halfstep.core.draw import generator_for


@final
class Given(nn.Module):
    """A feature network for torchmetrics that returns precomputed features unchanged."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextlib.contextmanager
def importing_torchmetrics() -> Iterator[None]:
    """Raise ValueError if torchmetrics cannot be imported because torch-fidelity is installed without torchvision."""
    try:
        yield
    except ImportError as error:
        raise ValueError(
            f"torchmetrics cannot be imported ({error}) because torch-fidelity is installed without torchvision. "
            "Install the torchvision for your torch version, or remove torch-fidelity"
        ) from None


def check_shapes(a: Tensor, b: Tensor) -> None:
    """Raise ValueError unless both tensors are features `[n, d]` with the same d."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be [n, d] with the same d, got {tuple(a.shape)} and {tuple(b.shape)}")


def _check(a: Tensor, b: Tensor) -> None:
    check_shapes(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"computing a distance between sets requires at least 2 samples in each set, got {len(a)} and {len(b)}"
        )
    if not (bool(torch.isfinite(a).all()) and bool(torch.isfinite(b).all())):
        raise ValueError("some features are not finite, so the samples are invalid. Check the samples")


ALONE: Final[dict[str, Any]] = {"sync_on_compute": False}
"""Prevents torchmetrics from waiting for other ranks, because only one rank calls it."""


def metric_of_features(kind: Callable[..., Any], num_features: int, **settings: Any) -> Any:
    """Return the torchmetrics metric `kind`, such as KID, for features `[n, num_features]` in float64."""
    with warnings.catch_warnings():
        # torchmetrics warns that it keeps all features in memory, where they already are.
        warnings.simplefilter("ignore", UserWarning)
        return kind(feature=Given(num_features), **settings, **ALONE).set_dtype(torch.float64)


def computed(metric: Any) -> float:
    """Return the mean computed by a torchmetrics metric, with a fixed random seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])


@final
@dataclass(frozen=True)
class Moments:
    """The mean, float64 `[d]`, and the covariance with divisor n - 1, float64 `[d, d]`, of `count` feature vectors."""

    mean: Tensor
    covariance: Tensor
    count: int


def moments_of(features: Tensor) -> Moments:
    """Return the moments of features `[n, d]`, in float64.

    Raises:
        ValueError: if there are fewer than 2 samples, or if a feature is not finite.
    """
    _check(features, features)
    x = features.double()
    centred = x - x.mean(0)
    return Moments(x.mean(0), centred.T @ centred / (len(x) - 1), len(x))


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric matrix, treating negative eigenvalues as rounding errors."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet_of_moments(a: Moments, b: Moments) -> float:
    """Return the Frechet distance between two Gaussians.

    tr (C_a C_b)^(1/2) is the sum of the singular values of C_a^(1/2) C_b^(1/2). This form avoids the square
    root of an asymmetric product and its imaginary parts, and is exact for singular covariances.

    Raises:
        ValueError: if the dimensions of the Gaussians differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features must have the same dimension, got {len(a.mean)} and {len(b.mean)}")
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    spread = a.covariance.trace() + b.covariance.trace() - 2 * cross
    # For equal sets, rounding errors can produce a value of about -1e-13.
    return max(0.0, float((a.mean - b.mean).square().sum() + spread))


def frechet_distance(a: Tensor, b: Tensor, moments: Moments | None = None) -> float:
    """Return the Frechet distance between feature sets `[n, d]` and `[m, d]`, computed in float64.

    Let A and B be the centred rows, divided by the square roots of n - 1 and m - 1, so that C_a = A'A. Then
    tr (C_a C_b)^(1/2) is the sum of the singular values of A B'. This form, used if a set has no more samples than
    dimensions, does not need a `[d, d]` matrix.

    Args:
        moments: the moments of `a`, if known.

    Raises:
        ValueError: if the shapes do not match, if a set has fewer than 2 rows, or if a feature is not finite.
    """
    _check(a, b)
    if min(len(a), len(b)) > a.shape[1]:
        return frechet_of_moments(moments_of(a) if moments is None else moments, moments_of(b))
    x, y = a.double(), b.double()
    rows = [(one - one.mean(0)) / (len(one) - 1) ** 0.5 for one in (x, y)]
    cross = torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    spread = rows[0].square().sum() + rows[1].square().sum() - 2 * cross
    return max(0.0, float((x.mean(0) - y.mean(0)).square().sum() + spread))


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 20, subset_size: int = 1000) -> float:
    """Return the KID between feature sets `[n, d]` and `[m, d]`, averaged over fixed random subsets."""
    _check(a, b)
    with importing_torchmetrics():
        from torchmetrics.image.kid import KernelInceptionDistance
    size = min(subset_size, len(a), len(b))
    metric = metric_of_features(KernelInceptionDistance, a.shape[1], subsets=subsets, subset_size=size)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return computed(metric)


def sliced_wasserstein(a: Tensor, b: Tensor, num_directions: int = 128) -> float:
    """Return the sliced Wasserstein-1 distance between feature sets `[n, d]` and `[m, d]`, for fixed directions."""
    from scipy.stats import wasserstein_distance

    _check(a, b)
    generator = generator_for("sliced Wasserstein", a.shape[1])
    directions = torch.randn(a.shape[1], num_directions, generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=0)
    x, y = (a.double() @ directions).T.numpy(), (b.double() @ directions).T.numpy()
    return float(sum(wasserstein_distance(p, q) for p, q in zip(x, y, strict=True)) / num_directions)
