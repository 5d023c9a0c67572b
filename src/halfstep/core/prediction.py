"""Predictions define the meaning of a network's output, and weightings weight the x0 error by noise level.

Every common parameterisation is linear, p = a x0 + b eps, with coefficients a and b that depend on the noise level.
Together with x_t = alpha x0 + sigma eps, this is a 2x2 system with determinant d = b alpha - a sigma and the solution

    x0  = ( b x_t - sigma p) / d
    eps = (-a x_t + alpha p) / d

The same solution applies to every linear parameterisation, so no pairwise converters are needed. The four quotients in
the solution are computed in float64 and cast only when they multiply data. For x0 prediction, the factors of x_t and p
in x0 are exactly 0 and 1, so x0 is the network's output itself. The only nonlinear prediction is "both", which blends
separate outputs for the two unknowns.

A weighting maps the log-SNR to the weight of the squared error in x0. If the error is measured in eps or v instead, the
same loss has a different weight: |eps error|^2 = SNR |x0 error|^2 and, for a variance-preserving process,
|v error|^2 = (SNR + 1) |x0 error|^2.

Source: Salimans & Ho 2022 (arXiv:2202.00512), section 4; the authors' dpm.py for "both" and the constant weighting.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.door import check_number
from halfstep.core.noise import per_sample
from halfstep.registry import Registry


class Denoised(NamedTuple):
    """A denoiser's estimates of the clean sample and of the unit-variance noise in x_t, each `[batch, *dims]`."""

    x0: Tensor
    eps: Tensor


class Prediction(ABC):
    """The meaning of a network's output. `alpha` and `sigma` are clock tensors; `denoised` also accepts numbers."""

    channels: ClassVar[int]
    """The number of output channels for each channel of the data."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return the output of an ideal network, `[batch, channels * C, ...]`."""

    @abstractmethod
    def denoised(self, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Denoised:
        """Return x0 and eps, each shaped like `x_t`, computed from the network's output at `x_t`."""


predictions: Registry[type[Prediction]] = Registry("prediction")


class LinearPrediction(Prediction):
    """A linear prediction p = a x0 + b eps, for which subclasses define a and b."""

    channels: ClassVar[int] = 1

    @abstractmethod
    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clock tensors (a, b)."""

    @final
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        a, b = self.coefficients(alpha, sigma)
        return per_sample(a, x0) * x0 + per_sample(b, x0) * eps

    @final
    def denoised(self, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Denoised:
        solved: Sequence[Tensor | float]
        if isinstance(alpha, Tensor) and isinstance(sigma, Tensor):
            solved = self._solved(alpha, sigma)
        else:
            solved = _solved_once(self, float(alpha), float(sigma))
        x0_x, x0_p, eps_x, eps_p = (per_sample(number, x_t) for number in solved)
        return Denoised(x0=x0_x * x_t + x0_p * output, eps=eps_x * x_t + eps_p * output)

    def _solved(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the factors of x_t and p in the solution for x0, followed by those in the solution for eps."""
        a, b = self.coefficients(alpha, sigma)
        d = b * alpha - a * sigma
        return b / d, -sigma / d, -a / d, alpha / d


@lru_cache(maxsize=4096)
def _solved_once(prediction: LinearPrediction, alpha: float, sigma: float) -> tuple[float, ...]:
    """Return the four factors of the solution for one pair of amplitudes. Sampling uses only a few pairs, so they are
    cached."""
    alphas, sigmas = (torch.tensor([number], dtype=torch.float64) for number in (alpha, sigma))
    return tuple(float(number) for number in prediction._solved(alphas, sigmas))


@final
@predictions.register("eps")
@dataclass(frozen=True)
class Eps(LinearPrediction):
    """The network predicts the noise. Noise prediction is unsuitable for few steps, because x0 = (x_t - sigma eps) /
    alpha grows without bound as alpha approaches 0."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(alpha), torch.ones_like(sigma)


@final
@predictions.register("x0")
@dataclass(frozen=True)
class X0(LinearPrediction):
    """The network predicts the clean sample."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(alpha), torch.zeros_like(sigma)


@final
@predictions.register("v")
@dataclass(frozen=True)
class V(LinearPrediction):
    """The network predicts v = alpha eps - sigma x0, the derivative of x_t along the variance-preserving circle."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -sigma, alpha


@final
@predictions.register("flow_velocity")
@dataclass(frozen=True)
class FlowVelocity(LinearPrediction):
    """The network predicts u = eps - x0, the derivative of x_t along the straight path of flow matching."""

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(alpha), torch.ones_like(sigma)


@final
@predictions.register("edm")
@dataclass(frozen=True)
class EDM(LinearPrediction):
    """The network predicts EDM's residual F, which gives x0 = c_skip y + c_out F with y = x_t / alpha.

    With the noise-to-signal ratio s = sigma / alpha and rho = sqrt(s^2 + sigma_data^2), c_skip is sigma_data^2 / rho^2
    and c_out is s sigma_data / rho, so F = (s x0 - sigma_data^2 eps) / (sigma_data rho). The network's adapter computes
    the network's inputs, y / rho and log(s) / 4.

    Source: Karras et al. 2022, EDM (arXiv:2206.00364), table 1.

    Raises:
        ValueError: if sigma_data is not a finite number above 0.
    """

    sigma_data: float = 0.5
    """The standard deviation of the data."""

    def __post_init__(self) -> None:
        check_number("sigma_data", self.sigma_data, above=True)

    def coefficients(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        # Numerators and denominators are multiplied by alpha, so that alpha = 0 needs no special case.
        rho = torch.sqrt(sigma**2 + (alpha * self.sigma_data) ** 2)
        return sigma / rho / self.sigma_data, -alpha * self.sigma_data / rho


@final
@predictions.register("both")
@dataclass(frozen=True)
class Both(Prediction):
    """The network predicts x0 in the first half of its channels and eps in the second half, and the two are blended.

    The clean sample is sigma^2 x0_head + alpha^2 (x_t - sigma eps_head) / alpha, so each head dominates where it is
    better conditioned. If the process does not preserve variance, the weights are normalised to sum to one.
    """

    channels: ClassVar[int] = 2

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.cat([x0, eps], dim=1)

    def denoised(self, output: Tensor, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Denoised:
        x0_head, eps_head = output.chunk(2, dim=1)
        power = alpha**2 + sigma**2
        x0 = (
            per_sample(sigma**2 / power, x_t) * x0_head
            + per_sample(alpha / power, x_t) * x_t
            - per_sample(alpha * sigma / power, x_t) * eps_head
        )
        return Denoised(x0, eps_from_x0(x_t, x0, alpha, sigma))


def eps_from_x0(x_t: Tensor, x0: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return eps = (x_t - alpha x0) / sigma, `[batch, *dims]`, which is the noise in x_t for a given clean sample."""
    return (x_t - per_sample(alpha, x_t) * x0) / per_sample(sigma, x_t)


class Weighting(ABC):
    """The weight of the squared x0 error as a function of the log-SNR."""

    @abstractmethod
    def __call__(self, log_snr: Tensor) -> Tensor:
        """Return float64 weights, shaped like `log_snr`."""


weightings: Registry[type[Weighting]] = Registry("weighting")


@final
@weightings.register("constant")
@dataclass(frozen=True)
class Constant(Weighting):
    """A weight of 1, which gives the plain squared error in x0."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@final
@weightings.register("snr")
@dataclass(frozen=True)
class SNR(Weighting):
    """A weight equal to the SNR, which gives the squared error in eps."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr)


@final
@weightings.register("truncated_snr")
@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """A weight of max(SNR, 1), which gives the larger of the squared errors in x0 and eps, as in all of the paper's
    models."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr.clamp(min=0))


@final
@weightings.register("snr_plus_one")
@dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """A weight of SNR + 1, which gives the squared error in v."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr) + 1
