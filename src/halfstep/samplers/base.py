"""The interfaces of samplers: one step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.grids import check_num_steps
from halfstep.core.prediction import Denoised
from halfstep.registry import Registry

Time = Tensor | float
"""One time for all samples (in sampling) or clock times `[batch]` (in a target). `as_clock` accepts either."""
Noise = Tensor | None
"""Unit normal noise shaped as the samples for a stochastic sampler; None for any other."""
Memory = Any
"""A sampler's state from step to step; None before the first."""


class Sampler(ABC):
    """One step of sampling. Subclasses are frozen and stateless: their memory is passed in and out."""

    order: ClassVar[int]
    """Global order of convergence (for a stochastic sampler, of its distribution). The contract tests measure it."""
    stochastic: ClassVar[bool] = False
    """Whether a step draws noise."""
    evals_per_step: ClassVar[int]
    """Network calls per step that lands at s > 0. The contract tests count them."""
    evals_last_step: ClassVar[int]
    """Network calls of the step that lands on clean data, where the network cannot be called."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        """Step from t to s < t; return x_s, shaped as `x_t` `[batch, *dims]`, and the memory for the next step.

        At s = 0 the result is clean data. Do not read numbers from a tensor: the host would wait for the device.
        """

    @final
    def num_evals(self, num_steps: int) -> int:
        """Network calls of sampling in `num_steps` steps."""
        check_num_steps(num_steps)
        return (num_steps - 1) * self.evals_per_step + self.evals_last_step


class DataPredictionSampler(Sampler):
    """A deterministic sampler that takes DDIM steps with its own (x0, eps)."""

    @abstractmethod
    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) that turn a DDIM step from t to s into this method's step, and the memory for the next.

        They satisfy x_t = alpha x0 + sigma eps, as the denoiser's own do. The arguments are those of `step`.
        """

    @final
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        denoised, memory = self.effective(denoiser, x_t, t, s, cond, memory)
        return ddim_step(denoised, denoiser.process, s), memory


samplers: Registry[type[Sampler]] = Registry("sampler")
