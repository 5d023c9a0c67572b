"""Noise processes: how much signal and how much noise a sample holds at each time.

A process maps time t in [0, 1] (0 = data, 1 = noise) to two amplitudes, x_t = alpha(t) x0 + sigma(t) eps, and so to the
log signal-to-noise ratio log_snr(t) = log(alpha^2 / sigma^2), which falls strictly. Everything else in the library
sees a process only through these three functions.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from halfstep.core.clock import per_sample
from halfstep.registry import Registry


class NoiseProcess(ABC):
    """Amplitudes of signal and noise as functions of time. Every tensor here is a float64 clock tensor."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes of signal and noise at `t`, each shaped as `t`."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2) at `t`, strictly falling in `t`."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The time at which `log_snr` is reached: the inverse of `log_snr()`."""

    @final
    def landing(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Amplitudes at which a sampler's step arrives: those of the process, but exactly (1, 0) at s = 0.

        The last step lands on clean data, so it returns x0 itself, whatever small noise the process keeps at time 0.
        (The authors' code does the same, in its sampler and in its target.)
        """
        alpha, sigma = self.alpha_sigma(s)
        clean = s == 0
        return torch.where(clean, torch.ones_like(alpha), alpha), torch.where(clean, torch.zeros_like(sigma), sigma)

    @final
    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x0 + sigma(t) eps, `[batch, *dims]`, for clock times `t` `[batch]`."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


processes: Registry[type[NoiseProcess]] = Registry("noise process")


@final
@processes.register("vp_cosine")
@dataclass(frozen=True)
class VPCosine(NoiseProcess):
    """The variance-preserving cosine process, alpha = cos(phi), sigma = sin(phi), with its log-SNR clipped.

    The angle phi grows linearly in t between the angles of the two log-SNR bounds, so that alpha^2 + sigma^2 = 1 and
    log_snr = -2 log tan(phi). The default bounds of +-20 are those of every model of the paper's authors; at them
    sigma(0) = alpha(1) = 4.5e-5.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), section 4, and the authors' schedules.py.

    Raises:
        ValueError: if the bounds are not finite or log_snr_min >= log_snr_max.
    """

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.log_snr_min) and math.isfinite(self.log_snr_max)):
            raise ValueError(f"log-SNR bounds must be finite, got {self.log_snr_min} and {self.log_snr_max}")
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(f"log_snr_min must be below log_snr_max, got {self.log_snr_min} and {self.log_snr_max}")

    def _angle_bounds(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.log_snr_max / 2)), math.atan(math.exp(-self.log_snr_min / 2))

    def angle(self, t: Tensor) -> Tensor:
        """phi(t) = arctan(sigma / alpha) in radians; DDIM rotates a sample by differences of it."""
        first, last = self._angle_bounds()
        return first + (last - first) * t

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.angle(t)
        return torch.cos(phi), torch.sin(phi)

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * torch.log(torch.tan(self.angle(t)))

    def time_at(self, log_snr: Tensor) -> Tensor:
        first, last = self._angle_bounds()
        return (torch.atan(torch.exp(-log_snr / 2)) - first) / (last - first)
