"""Ancestral sampling: steps of the reverse Markov chain, with a variance between a lower and an upper bound.

Given x0, the reverse step q(x_s | x_t, x0) is Gaussian. With k = exp((log_snr_t - log_snr_s) / 2) < 1 and the predicted
x0 and eps, its mean is

    alpha_s x0 + sigma_s k eps

The variance of this distribution, (1 - k^2) sigma_s^2, is the lower bound on the variance of the true reverse step
q(x_s | x_t), and is exact if the data is a single point. The upper bound is the variance of the forward step,
(1 - k^2) sigma_t^2, which is exact if the process is variance-preserving and the data is standard normal. `gamma`
interpolates between the logarithms of the two bounds. The last step adds no noise and returns x0.

Source: Ho et al. 2020 (arXiv:2006.11239); Salimans & Ho 2022 (arXiv:2202.00512), equations 3 to 5, and the authors'
dpm.py ("fixed_small", "fixed_large", "fixed_medium:gamma").
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import check_real
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised
from halfstep.samplers.base import Memory, Noise, Sampler, Time, samplers


def ancestral_step(
    denoised: Denoised, process: NoiseProcess, t: Tensor, s: Tensor, noise: Tensor, gamma: float = 0.0
) -> Tensor:
    """Draw x_s `[batch, *dims]` from the reverse step to s <= t, given (x0, eps) at t. At s = 0, x_s is x0 itself.

    Args:
        t, s: clock times `[batch]`.
        noise: standard normal noise, shaped like x0.
        gamma: the weight of the upper bound in the log variance; 0 draws from q(x_s | x_t, x0).
    """
    x0, eps = denoised
    alpha_s, sigma_s = process.landing(s)
    _, sigma_t = process.alpha_sigma(t)
    clean = s == 0
    change = torch.where(clean, -torch.inf, process.log_snr(t) - process.log_snr(s))
    kept = torch.exp(change / 2)
    spread = torch.sqrt(-torch.expm1(change)) * sigma_s ** (1 - gamma) * sigma_t**gamma
    # At gamma = 1, 0 ** 0 = 1 would keep the variance above 0 when the step lands on clean data.
    spread = torch.where(clean, 0.0, spread)
    mean = per_sample(alpha_s, x0) * x0 + per_sample(sigma_s * kept, x0) * eps
    return mean + per_sample(spread, x0) * noise


@final
@samplers.register("ancestral")
@dataclass(frozen=True)
class Ancestral(Sampler):
    """A stochastic sampler with one network call per step. The setting `gamma` moves the variance from its lower bound
    (0) to its upper bound (1, the default).

    All of the authors' configurations use a gamma of 1. With few steps, another gamma may be better: `halfstep evaluate
    --search-gamma` finds one.

    Source: Ho et al. 2020 (arXiv:2006.11239); Salimans & Ho 2022 (arXiv:2202.00512), equations 3 to 5.

    Raises:
        ValueError: if gamma is not in [0, 1], or if no noise is passed to a step.
    """

    gamma: float = 1.0
    """The weight of the upper bound in the log variance."""

    order: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True
    evals_per_step: ClassVar[int] = 1
    evals_last_step: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_real(gamma=self.gamma)
        if not 0 <= self.gamma <= 1:
            raise ValueError(
                f"gamma must be in [0, 1], from the lower to the upper bound of the variance, got {self.gamma}"
            )

    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        if noise is None:
            raise ValueError("ancestral sampling needs noise at each step. Pass noise, such as step_noise(...)")
        start, end = as_clock(t, x_t), as_clock(s, x_t)
        return ancestral_step(denoiser(x_t, start, cond), denoiser.process, start, end, noise, self.gamma), None
