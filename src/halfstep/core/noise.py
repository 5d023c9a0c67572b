"""Noise processes define how much signal and noise a sample contains at each time.

A process maps the time t in [0, 1], from data at 0 to noise at 1, to the two amplitudes in x_t = alpha(t) x0 +
sigma(t) eps. The amplitudes define the log signal-to-noise ratio log_snr(t) = log(alpha^2 / sigma^2), which is strictly
decreasing. The rest of the library uses a process only through alpha, sigma, log_snr and the inverse of log_snr.

Times and amplitudes are *clock* tensors, which are float64 and contain one number per sample. Data may have any
floating-point dtype and any shape `[batch, *dims]`. With 8192 steps, amplitudes at neighbouring times near 0 and 1 can
differ by only a few parts in 10^8, so the clock is never computed in the data's precision. Clock tensors are cast only
once, in `per_sample`, when they multiply data. During sampling, all samples share one time, which remains a Python
float, because a hundred small tensor operations would take as long as one step of a small network.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, final, overload

import torch
from torch import Tensor

from halfstep.core.door import check_number, check_real, check_whole, got
from halfstep.registry import Registry


def clock_device(device: torch.device) -> torch.device:
    """Return the device for the clock tensors of data on `device`: the CPU if `device` does not support float64."""
    return torch.device("cpu") if device.type == "mps" else device


def as_clock(times: Tensor | float, like: Tensor) -> Tensor:
    """Return times as a float64 clock tensor `[batch]` for the batch `like` `[batch, *dims]`.

    Raises:
        ValueError: if `times` is neither a scalar nor a tensor of shape `[batch]`.
    """
    device = clock_device(like.device)
    if not isinstance(times, Tensor):
        # The tensor is filled on the device, because a copy would block the host.
        return torch.full(like.shape[:1], times, dtype=torch.float64, device=device)
    values = times.to(device=device, dtype=torch.float64)
    if values.ndim == 0:
        values = values.expand(like.shape[0])
    if values.shape != like.shape[:1]:
        raise ValueError(
            f"the times have shape {tuple(values.shape)}, but the batch has {like.shape[0]} samples. "
            "Pass one time for all samples, or one time per sample"
        )
    return values


@overload
def per_sample(clock: Tensor, like: Tensor) -> Tensor: ...
@overload
def per_sample(clock: Tensor | float, like: Tensor) -> Tensor | float: ...
def per_sample(clock: Tensor | float, like: Tensor) -> Tensor | float:
    """Return a clock tensor `[batch]` as `[batch, 1, ...]`, with the dtype and device of `like`.

    A plain number is returned unchanged.
    """
    if isinstance(clock, float):
        return clock
    return clock.to(device=like.device, dtype=like.dtype).reshape(-1, *[1] * (like.ndim - 1))


REMEMBERED: Final = 4096
"""The maximum number of time points whose amplitudes a process caches. Sampling grids are rarely this long."""


class NoiseProcess(ABC):
    """The amplitudes of signal and noise as functions of time. Times and amplitudes are float64 clock tensors."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the amplitudes of signal and noise at `t`, each shaped like `t`."""

    @abstractmethod
    def log_snr(self, t: Tensor) -> Tensor:
        """Return log(alpha^2 / sigma^2) at `t`, which is strictly decreasing in `t`."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """Return the time at which the log-SNR equals `log_snr`. This method inverts `log_snr()`."""

    @final
    def amplitudes(self, t: Tensor | float) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Return `alpha_sigma` at clock times `[batch]`, or two cached numbers for a single time."""
        if isinstance(t, Tensor):
            return self.alpha_sigma(t)
        if t not in self._remembered:
            if len(self._remembered) >= REMEMBERED:
                self._remembered.clear()
            # Networks may be built on the meta device, which computes no numbers.
            alpha, sigma = self.alpha_sigma(torch.tensor([t], dtype=torch.float64, device="cpu"))
            self._remembered[t] = float(alpha), float(sigma)
        return self._remembered[t]

    @final
    @cached_property
    def _remembered(self) -> dict[float, tuple[float, float]]:
        return {}

    @overload
    def landing(self, s: Tensor) -> tuple[Tensor, Tensor]: ...
    @overload
    def landing(self, s: Tensor | float) -> tuple[Tensor, Tensor] | tuple[float, float]: ...
    @final
    def landing(self, s: Tensor | float) -> tuple[Tensor, Tensor] | tuple[float, float]:
        """Return the amplitudes at the time s at which a sampler's step lands: exactly (1, 0) at s = 0.

        As in the code of Salimans & Ho 2022, the last step returns x0 itself, even if the process keeps a little noise
        at time 0.
        """
        if not isinstance(s, Tensor):
            return (1.0, 0.0) if s == 0 else self.amplitudes(s)
        alpha, sigma = self.alpha_sigma(s)
        clean = s == 0
        return torch.where(clean, torch.ones_like(alpha), alpha), torch.where(clean, torch.zeros_like(sigma), sigma)

    @final
    @cached_property
    def start_scale(self) -> float:
        """Return the standard deviation of x_1 for unit-variance data, which is 1 for variance-preserving processes."""
        alpha, sigma = self.alpha_sigma(torch.ones(1, dtype=torch.float64))
        return math.hypot(float(alpha), float(sigma))

    @final
    def mix(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t = alpha(t) x0 + sigma(t) eps, `[batch, *dims]`, at clock times `t` `[batch]`."""
        alpha, sigma = self.alpha_sigma(t)
        return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * eps


processes: Registry[type[NoiseProcess]] = Registry("noise process")


@final
@processes.register("vp_cosine")
@dataclass(frozen=True)
class VPCosine(NoiseProcess):
    """The variance-preserving cosine process, alpha = cos(phi) and sigma = sin(phi), with a bounded log-SNR.

    The angle phi grows linearly in t between the angles that correspond to the two log-SNR bounds. For every angle,
    alpha^2 + sigma^2 = 1 and log_snr = -2 log tan(phi). The default bounds, -20 and 20, are those of the authors and
    give sigma(0) = alpha(1) = 4.5e-5.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), section 4, and the authors' schedules.py.

    Raises:
        ValueError: if the bounds are not finite or log_snr_min >= log_snr_max.
    """

    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    def __post_init__(self) -> None:
        check_real(log_snr_min=self.log_snr_min, log_snr_max=self.log_snr_max)
        if not (math.isfinite(self.log_snr_min) and math.isfinite(self.log_snr_max)):
            raise ValueError(f"log-SNR bounds must be finite, got {self.log_snr_min} and {self.log_snr_max}")
        if self.log_snr_min >= self.log_snr_max:
            raise ValueError(f"log_snr_min must be below log_snr_max, got {self.log_snr_min} and {self.log_snr_max}")

    def _angle_bounds(self) -> tuple[float, float]:
        return math.atan(math.exp(-self.log_snr_max / 2)), math.atan(math.exp(-self.log_snr_min / 2))

    def angle(self, t: Tensor) -> Tensor:
        """Return phi(t) = arctan(sigma / alpha) in radians.

        A DDIM step rotates a sample by the difference between two angles.
        """
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


@final
@processes.register("vp_table")
@dataclass(frozen=True)
class VPTable(NoiseProcess):
    """The discrete process of DDPM, whose log-SNR is interpolated linearly between its T noise levels.

    Level k (timestep k in diffusers) is at t = (k + 1) / T. At this level, alpha^2 is the product of 1 - beta_i over
    all i <= k. Below the first level, the log-SNR has the same slope as in the first interval. If the last level has no
    signal, the ratio alpha / sigma itself, rather than its logarithm, is interpolated linearly in the last interval.

    Args:
        betas: T numbers in (0, 1); if there are at least 3, the last may be 1.

    Source: Ho et al. 2020 (arXiv:2006.11239), section 2; Lin et al. 2023 (arXiv:2305.08891) for zero terminal SNR.

    Raises:
        ValueError: if there are too few betas or one of them is out of range.
    """

    betas: tuple[float, ...] = field(default_factory=lambda: linear_betas(), repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.betas, str) or not isinstance(self.betas, Iterable):
            raise ValueError(
                f"betas must be a sequence of numbers, got {got(self.betas)}. Pass, for example, linear_betas(1000)"
            )
        betas = tuple(beta.item() if hasattr(beta, "item") else beta for beta in self.betas)
        for beta in betas:
            check_real(betas=beta)
        object.__setattr__(self, "betas", tuple(map(float, betas)))
        # The first interval defines the slope below the first level, so it must not end at zero signal.
        least = 3 if self.betas and self.betas[-1] == 1 else 2
        if len(self.betas) < least:
            ending = " if the last is 1" if least == 3 else ""
            raise ValueError(f"a table of noise levels needs at least {least} betas{ending}, got {len(self.betas)}")
        for level, beta in enumerate(self.betas):
            if not (0 < beta < 1 or (beta == 1 and level == len(self.betas) - 1)):
                raise ValueError(f"betas must be above 0 and below 1 (the last may be 1), but beta {level} is {beta}")

    def __repr__(self) -> str:
        return f"VPTable({len(self.betas)} betas from {self.betas[0]:.4g} to {self.betas[-1]:.4g})"

    @cached_property
    def _nodes(self) -> dict[torch.device, Tensor]:
        """The log-SNR at the times 0, 1 / T, ..., 1, as one tensor per device."""
        log_power = torch.log1p(-torch.tensor(self.betas, dtype=torch.float64, device="cpu")).cumsum(0)
        levels = log_power - torch.log(-torch.expm1(log_power))
        return {levels.device: torch.cat([2 * levels[:1] - levels[1:2], levels])}

    def _nodes_on(self, device: torch.device) -> Tensor:
        """Return the tensor of `_nodes` for a device. It is copied only once, because each copy blocks the host."""
        if device not in self._nodes:
            self._nodes[device] = self._nodes[torch.device("cpu")].to(device)
        return self._nodes[device]

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_snr = self.log_snr(t)
        return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        nodes = self._nodes_on(t.device)
        place = t * len(self.betas)
        left = place.floor().clamp(0, len(self.betas) - 1).long()
        share = place - left
        here, there = nodes[left], nodes[left + 1]
        return torch.where(
            there.isfinite(), here + share * (there - here).nan_to_num(neginf=0.0), here + 2 * torch.log1p(-share)
        )

    def time_at(self, log_snr: Tensor) -> Tensor:
        nodes = self._nodes_on(log_snr.device)
        left = (torch.searchsorted(-nodes, -log_snr, right=True) - 1).clamp(0, len(self.betas) - 1)
        here, there = nodes[left], nodes[left + 1]
        share = torch.where(
            there.isfinite(),
            (log_snr - here) / (there - here).nan_to_num(neginf=-1.0),
            -torch.expm1((log_snr - here) / 2),
        )
        return (left + share) / len(self.betas)


def linear_betas(num: int = 1000, first: float = 1e-4, last: float = 0.02) -> tuple[float, ...]:
    """Return `num` equally spaced betas. The defaults are those of Ho et al. 2020 (arXiv:2006.11239)."""
    check_whole("the number of noise levels", num, 2)
    check_real(first=first, last=last)
    return tuple(torch.linspace(first, last, num, dtype=torch.float64).tolist())


def scaled_linear_betas(num: int = 1000, first: float = 0.00085, last: float = 0.012) -> tuple[float, ...]:
    """Return `num` betas with equally spaced square roots. Source: Rombach et al. 2022 (arXiv:2112.10752)."""
    check_whole("the number of noise levels", num, 2)
    check_real(first=first, last=last)
    return tuple(torch.linspace(first**0.5, last**0.5, num, dtype=torch.float64).square().tolist())


def cosine_betas(num: int = 1000, largest: float = 0.999) -> tuple[float, ...]:
    """Return `num` betas, each at most `largest`, for which alpha^2 follows a squared cosine.

    Source: Nichol & Dhariwal 2021 (arXiv:2102.09672), equation 17.
    """
    check_whole("the number of noise levels", num, 2)
    check_real(largest=largest)

    def power(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    return tuple(min(1 - power((k + 1) / num) / power(k / num), largest) for k in range(num))


def zero_terminal_betas(betas: Sequence[float]) -> tuple[float, ...]:
    """Return betas whose signal amplitudes are shifted to end at 0 and rescaled to keep the first amplitude.

    Source: Lin et al. 2023 (arXiv:2305.08891), algorithm 1.
    """
    if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) < 2:
        raise ValueError(
            f"betas must be a sequence of at least 2 numbers, got {betas!r}. Pass, for example, linear_betas(1000)"
        )
    alpha = torch.log1p(-torch.tensor(betas, dtype=torch.float64)).cumsum(0).div(2).exp()
    shifted = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    power = shifted.square()
    return tuple((1 - power / torch.cat([torch.ones_like(power[:1]), power[:-1]])).tolist())


@final
@processes.register("ve")
@dataclass(frozen=True)
class VE(NoiseProcess):
    """The variance-exploding process: alpha = 1, and sigma grows from sigma_min to sigma_max.

    The amplitude sigma, which is also the noise-to-signal ratio, grows such that sigma^(1 / rho) is linear in t.

    Source: Karras et al. 2022, EDM (arXiv:2206.00364), equation 5 and its default values.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max < infinity, or if rho is not above 0.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_real(sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max < infinity, got "
                f"{self.sigma_min} and {self.sigma_max}"
            )
        check_number("rho", self.rho, above=True)

    def _root_bounds(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        first, last = self._root_bounds()
        return torch.ones_like(t), (first + (last - first) * t) ** self.rho

    def log_snr(self, t: Tensor) -> Tensor:
        first, last = self._root_bounds()
        return -2 * self.rho * torch.log(first + (last - first) * t)

    def time_at(self, log_snr: Tensor) -> Tensor:
        first, last = self._root_bounds()
        return (torch.exp(-log_snr / (2 * self.rho)) - first) / (last - first)


@final
@processes.register("flow")
@dataclass(frozen=True)
class FlowMatching(NoiseProcess):
    """The straight path from data to noise: alpha = 1 - sigma, with sigma = shift t / (1 + (shift - 1) t).

    A shift above 1, as used by high-resolution models, spends more time near pure noise. A shift of 1 gives sigma = t.

    Source: Lipman et al. 2023 (arXiv:2210.02747) and, for the shift, Esser et al. 2024 (arXiv:2403.03206), equation 23.

    Raises:
        ValueError: if the shift is not a finite number above 0.
    """

    shift: float = 1.0

    def __post_init__(self) -> None:
        check_number("the shift", self.shift, above=True)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        scale = 1 + (self.shift - 1) * t
        return (1 - t) / scale, self.shift * t / scale

    def log_snr(self, t: Tensor) -> Tensor:
        return 2 * torch.log((1 - t) / (self.shift * t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-log_snr / 2 - math.log(self.shift))
