"""The interfaces of samplers: one step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import per_sample
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.registry import Registry

Time = Tensor | float
"""One time for all samples (in sampling) or clock times `[batch]` (in a target). `as_clock` accepts both."""
Noise = Tensor | None
"""Unit normal noise, shaped as the samples, for a stochastic sampler; None for any other."""
Memory = Any
"""A sampler's state from step to step; None before the first."""


class Sampler(ABC):
    """One step of sampling. Subclasses are frozen and stateless; their memory is passed in and out."""

    order: ClassVar[int]
    """Global order of convergence, in distribution if the sampler is stochastic. Contract tests measure it."""
    stochastic: ClassVar[bool] = False
    """Whether a step draws noise."""
    evals_per_step: ClassVar[int]
    """Network calls per step that lands at s > 0. Contract tests count them."""
    evals_last_step: ClassVar[int]
    """Network calls in the step onto clean data, where the network cannot be called."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        """Step from t to s < t; return x_s, shaped as `x_t` `[batch, *dims]`, and the memory for the next step.

        At s = 0 the result is clean data. Do not read numbers from a tensor, because the host would wait for the
        device.
        """

    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) with which a DDIM step from t to s lands where this deterministic sampler's step does,
        and the memory for the next step.

        This solves x_s = alpha_s x0 + sigma_s eps for

            x0 = (x_s - q x_t) / (alpha_s - q alpha_t),   q = sigma_s / sigma_t,

        which is x_s itself at s = 0. The step and the quotient are computed in float64, from the denoiser's x0 in its
        own dtype. An error of x0 moves x_s in proportion to the width of the step, and the quotient divides by that
        width, so this x0 keeps the denoiser's precision.
        """
        start = x_t.to(t)
        x_s, memory = self.step(_InFloat64(denoiser, x_t), start, t, s, cond, memory)
        alpha_t, sigma_t = denoiser.process.alpha_sigma(t)
        alpha_s, sigma_s = denoiser.process.landing(s)
        q = sigma_s / sigma_t
        x0 = (x_s - per_sample(q, start) * start) / per_sample(alpha_s - q * alpha_t, start)
        return Denoised(x0.to(x_t), eps_from_x0(start, x0, alpha_t, sigma_t).to(x_t)), memory

    @final
    def num_evals(self, num_steps: int) -> int:
        """Return the number of network calls for sampling in `num_steps` steps."""
        check_num_steps(num_steps)
        return (num_steps - 1) * self.evals_per_step + self.evals_last_step


@final
class _InFloat64(Denoiser):
    """A denoiser for float64 samples that calls another with the dtype and device of `like`; eps is computed from x0.

    The float64 samples are on the device of the clock tensors, which is the CPU if the device has no float64.
    """

    def __init__(self, denoiser: Denoiser, like: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.like = like

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t.to(self.like), t, cond).x0.to(x_t)
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


class DataPredictionSampler(Sampler):
    """A deterministic sampler that takes DDIM steps with its own (x0, eps)."""

    @abstractmethod
    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) with which a DDIM step equals this method's step, and the memory for the next.

        Like the denoiser's own, they satisfy x_t = alpha x0 + sigma eps. The arguments are those of `step`.
        """

    @final
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        denoised, memory = self.effective(denoiser, x_t, t, s, cond, memory)
        return ddim_step(denoised, denoiser.process, s), memory


samplers: Registry[type[Sampler]] = Registry("sampler")
