"""The interfaces of samplers: one step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.grids import check_num_steps
from halfstep.core.prediction import Denoised
from halfstep.registry import Registry

Memory = Any
"""What a sampler carries from step to step; None before the first. Samplers keep no state of their own."""


class Sampler(ABC):
    """One step of sampling. Members are frozen and hold no state: what they remember is passed in and out."""

    order: ClassVar[int]
    """The global order of convergence as the steps shrink; the contract tests measure it. For a stochastic sampler: of
    its distribution."""
    stochastic: ClassVar[bool]
    """Whether a step draws noise."""
    evals_per_step: ClassVar[int]
    """Network calls of a step that lands at s > 0; the contract tests count them."""
    evals_last_step: ClassVar[int]
    """Network calls of the step that lands on clean data, where no network can be asked."""

    @abstractmethod
    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        cond: Cond | None,
        memory: Memory,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        """Return x_s, shaped as `x_t` `[batch, *dims]`, and the memory for the next step.

        Args:
            t: time at which the step starts: in sampling one float for all samples, in a target clock times `[batch]`.
                `as_clock` turns either into clock times. Read no number from a tensor: the host would wait for the
                device.
            s: time at which it lands, likewise, s < t; at s = 0 the result is clean data.
            noise: unit normal numbers shaped as `x_t` for a stochastic sampler; None for any other.
        """

    @final
    def num_evals(self, num_steps: int) -> int:
        """Network calls of sampling in `num_steps` steps."""
        check_num_steps(num_steps)
        return (num_steps - 1) * self.evals_per_step + self.evals_last_step


class DataPredictionSampler(Sampler):
    """A deterministic sampler whose step is DDIM's with an (x0, eps) of its own."""

    stochastic: ClassVar[bool] = False

    @abstractmethod
    def effective(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        cond: Cond | None,
        memory: Memory,
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) with which a DDIM step from t to s is this method's step, and the memory for the next.

        x_t = alpha x0 + sigma eps holds as it does for the denoiser's own. The arguments are those of `step`.
        """

    @final
    def step(
        self,
        denoiser: Denoiser,
        x_t: Tensor,
        t: Tensor | float,
        s: Tensor | float,
        cond: Cond | None,
        memory: Memory,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Memory]:
        denoised, memory = self.effective(denoiser, x_t, t, s, cond, memory)
        return ddim_step(denoised, denoiser.process, s), memory


samplers: Registry[type[Sampler]] = Registry("sampler")
