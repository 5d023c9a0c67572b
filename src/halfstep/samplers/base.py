"""The interface of a sampler: one step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.registry import Registry

Memory = Any
"""What a sampler carries from step to step; None before the first. Samplers keep no state of their own."""


class Sampler(ABC):
    """One step of sampling. Members are frozen and hold no state: what they remember is passed in and out."""

    order: ClassVar[int]
    """The global order of convergence as the steps shrink; the contract tests measure it."""
    stochastic: ClassVar[bool]
    """Whether a step draws noise."""
    evals_per_step: ClassVar[int]
    """Network calls of a step; the contract tests count them."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """x_s, shaped as `x_t` `[batch, *dims]`, and the memory for the next step.

        Args:
            t: clock times `[batch]` at which the step starts.
            s: clock times `[batch]` at which it lands, s < t; at s = 0 the result is clean data.
        """


samplers: Registry[type[Sampler]] = Registry("sampler")
