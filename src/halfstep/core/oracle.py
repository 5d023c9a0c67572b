"""Exact denoisers for data distributions whose E[x0 | x_t] has a closed form.

Exact denoisers need no training, so samplers, targets and losses are tested against them. The probability flow of a
Gaussian has an exact solution, which `GaussianDenoiser.flow` returns. The flow of a mixture is smooth and nonlinear,
and the flow of a finite data set ends at the points of that data set.
"""

from typing import final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import check_instance, check_real
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised, eps_from_x0


@final
class GaussianDenoiser(Denoiser):
    """The exact denoiser for data x0 ~ N(mean, std^2) with independent entries.

    Args:
        mean, std: numbers, or tensors that can be broadcast to `[*dims]`.

    Raises:
        ValueError: if an argument is neither a number nor a tensor, the mean is not finite, or a standard deviation is
            negative.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, process: NoiseProcess, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> None:
        super().__init__()
        check_instance("the process", process, NoiseProcess, "halfstep.VPCosine()")
        self.process = process
        for name, value in {"mean": mean, "std": std}.items():
            if not isinstance(value, Tensor):
                check_real(**{name: value})
            setattr(self, name, nn.Buffer(torch.as_tensor(value, dtype=torch.float64)))
        if not (self.mean.isfinite().all() and (self.std >= 0).all()):
            raise ValueError("the mean must be finite, and the standard deviation must be at least 0")

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        alpha, sigma = (per_sample(a, x_t.double()) for a in self.process.alpha_sigma(t))
        rest = x_t.double() - alpha * self.mean
        variance = alpha**2 * self.std**2 + sigma**2
        x0 = self.mean + alpha * self.std**2 / variance * rest
        return Denoised(x0.to(x_t.dtype), (sigma / variance * rest).to(x_t.dtype))

    def flow(self, x_t: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Return x_s, shaped like `x_t`, by solving the probability-flow ODE exactly from `x_t` at time t to time s."""
        alpha_t, sigma_t = (per_sample(a, x_t) for a in self.process.alpha_sigma(as_clock(t, x_t)))
        alpha_s, sigma_s = (per_sample(a, x_t) for a in self.process.landing(as_clock(s, x_t)))
        mean, std = self.mean.to(x_t), self.std.to(x_t)
        spread = torch.sqrt((alpha_s**2 * std**2 + sigma_s**2) / (alpha_t**2 * std**2 + sigma_t**2))
        return alpha_s * mean + spread * (x_t - alpha_t * mean)


@final
class MixtureDenoiser(Denoiser):
    """The exact denoiser for a mixture of K isotropic Gaussians.

    Args:
        means: `[K, *dims]`.
        std: the standard deviation of each component, a number or `[K]`; 0 makes the mixture a finite data set.
        weights: positive numbers `[K]`, which are normalised; by default, all weights are equal.

    Raises:
        ValueError: if a standard deviation is negative or a weight is not positive.
    """

    def __init__(
        self, process: NoiseProcess, means: Tensor, std: Tensor | float, weights: Tensor | None = None
    ) -> None:
        super().__init__()
        check_instance("the process", process, NoiseProcess, "halfstep.VPCosine()")
        check_instance("the means", means, Tensor, "a tensor [K, *dims]")
        self.process = process
        components = len(means)
        stds = torch.as_tensor(std, dtype=torch.float64).expand(components).clone()
        shares = torch.ones(components, dtype=torch.float64) if weights is None else weights.double()
        if bool((stds < 0).any()) or bool((shares <= 0).any()):
            raise ValueError("standard deviations must be at least 0, and weights must be above 0")
        self.means = nn.Buffer(means.double())
        self.stds = nn.Buffer(stds)
        self.log_weights = nn.Buffer(torch.log(shares / shares.sum()))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        amplitudes = self.process.alpha_sigma(t)
        alpha, sigma = (a[:, None] for a in amplitudes)
        x = x_t.double().flatten(1)[:, None]
        means = self.means.flatten(1)
        rest = x - alpha[..., None] * means
        variance = alpha**2 * self.stds**2 + sigma**2
        log_density = -0.5 * rest.square().sum(-1) / variance - 0.5 * means.shape[1] * torch.log(variance)
        share = torch.softmax(log_density + self.log_weights, dim=1)[..., None]
        gain = (alpha * self.stds**2 / variance)[..., None]
        x0 = (share * (means + gain * rest)).sum(1).reshape(x_t.shape)
        eps = eps_from_x0(x_t.double(), x0, *amplitudes)
        return Denoised(x0.to(x_t.dtype), eps.to(x_t.dtype))


def data_set_denoiser(process: NoiseProcess, points: Tensor) -> MixtureDenoiser:
    """Return the denoiser that an ideal network would learn from the data set `points` `[n, *dims]`."""
    return MixtureDenoiser(process, points, std=0.0)
