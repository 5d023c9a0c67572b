"""The variables in which the probability-flow ODE is integrated.

The ODE is dy / dtau = slope(x0, eps), where y = x_t / scale is a scaled sample and tau is a coordinate of the noise
level. All three coordinates are functions of (alpha, sigma) alone, so they work with every process:

    Angle          tau = phi = arctan(sigma / alpha)  y = x_t / hypot(alpha, sigma)  slope = cos(phi) eps - sin(phi) x0
    LogSNR         tau = log_snr                      y as above                     slope = -sin(2 phi) / 4 * the above
    NoiseToSignal  tau = sigma / alpha                y = x_t / alpha                slope = eps

For a variance-preserving process, the slope of `Angle` is v. Only for `Angle`, the default, are both the coordinate and
the slope finite from pure noise to clean data. The paper uses `LogSNR`, and Karras et al. use `NoiseToSignal`.

Source: Salimans & Ho 2022 (arXiv:2202.00512), appendix A; Karras et al. 2022 (arXiv:2206.00364).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.noise import per_sample
from halfstep.core.prediction import Denoised
from halfstep.registry import Registry


class Coordinate(ABC):
    """A variable in which the probability-flow ODE is integrated. Clock tensors are `[batch]`."""

    reaches_clean: ClassVar[bool]
    """Whether tau is finite on clean data."""

    @abstractmethod
    def place(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clock tensors (tau, scale)."""

    @abstractmethod
    def log_snr(self, tau: Tensor) -> Tensor:
        """Return the log-SNR at tau. This method inverts `place`."""

    @abstractmethod
    def slope(self, denoised: Denoised, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return dy / dtau, `[batch, *dims]`."""


coordinates: Registry[type[Coordinate]] = Registry("coordinate")


@final
@coordinates.register("angle")
@dataclass(frozen=True)
class Angle(Coordinate):
    """The angle tau = arctan(sigma / alpha), in radians."""

    reaches_clean: ClassVar[bool] = True

    def place(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.atan2(sigma, alpha), torch.hypot(alpha, sigma)

    def log_snr(self, tau: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(tau))

    def slope(self, denoised: Denoised, alpha: Tensor, sigma: Tensor) -> Tensor:
        radius = torch.hypot(alpha, sigma)
        x0, eps = denoised
        return per_sample(alpha / radius, x0) * eps - per_sample(sigma / radius, x0) * x0


@final
@coordinates.register("log_snr")
@dataclass(frozen=True)
class LogSNR(Coordinate):
    """The log-SNR tau = log(alpha^2 / sigma^2), which is infinite on clean data."""

    reaches_clean: ClassVar[bool] = False

    def place(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * torch.log(alpha / sigma), torch.hypot(alpha, sigma)

    def log_snr(self, tau: Tensor) -> Tensor:
        return tau

    def slope(self, denoised: Denoised, alpha: Tensor, sigma: Tensor) -> Tensor:
        power = alpha**2 + sigma**2
        half = alpha * sigma / (2 * power * torch.sqrt(power))
        x0, eps = denoised
        return per_sample(half * sigma, x0) * x0 - per_sample(half * alpha, x0) * eps


@final
@coordinates.register("noise_to_signal")
@dataclass(frozen=True)
class NoiseToSignal(Coordinate):
    """The noise-to-signal ratio tau = sigma / alpha, which Karras et al. and diffusers call sigma."""

    reaches_clean: ClassVar[bool] = True

    def place(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return sigma / alpha, alpha

    def log_snr(self, tau: Tensor) -> Tensor:
        return -2 * torch.log(tau)

    def slope(self, denoised: Denoised, alpha: Tensor, sigma: Tensor) -> Tensor:
        return denoised.eps
