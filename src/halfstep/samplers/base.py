"""The interfaces of samplers: one step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.grids import check_num_steps
from halfstep.core.prediction import Denoised
from halfstep.registry import Registry

Time = Tensor | float
"""One time for all samples, in sampling, or clock times `[batch]`, in a target; `as_clock` makes either clock times."""
Noise = Tensor | None
"""Unit normal noise shaped as the samples for a stochastic sampler; None for any other."""
Memory = Any
"""A sampler's state from step to step; None before the first."""


class Sampler(ABC):
    """One step of sampling. Members are frozen and hold no state: their memory is passed in and out."""

    order: ClassVar[int]
    """Global order of convergence, of a stochastic sampler's distribution; the contract tests measure it."""
    stochastic: ClassVar[bool] = False
    """Whether a step draws noise."""
    evals_per_step: ClassVar[int]
    """Network calls of a step that lands at s > 0; the contract tests count them."""
    evals_last_step: ClassVar[int]
    """Network calls of the step that lands on clean data, where no network can be called."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        """Step from t to s < t; return x_s, shaped as `x_t` `[batch, *dims]`, and the memory for the next step.

        At s = 0 the result is clean data. Read no number from a tensor: the host would wait for the device.
        """

    @final
    def num_evals(self, num_steps: int) -> int:
        """Network calls of sampling in `num_steps` steps."""
        check_num_steps(num_steps)
        return (num_steps - 1) * self.evals_per_step + self.evals_last_step


class DataPredictionSampler(Sampler):
    """A deterministic sampler whose step is DDIM's with an (x0, eps) of its own."""

    @abstractmethod
    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) with which a DDIM step from t to s is this method's step, and the memory for the next.

        x_t = alpha x0 + sigma eps holds as it does for the denoiser's own. The arguments are those of `step`.
        """

    @final
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        denoised, memory = self.effective(denoiser, x_t, t, s, cond, memory)
        return ddim_step(denoised, denoiser.process, s), memory


samplers: Registry[type[Sampler]] = Registry("sampler")
