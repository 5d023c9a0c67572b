"""The sampler interfaces. A sampler defines a single step from t to s."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import per_sample
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.registry import Registry

Time = Tensor | float
"""One time for all samples, as during sampling, or clock times `[batch]`, as in a target. `as_clock` accepts both."""
Noise = Tensor | None
"""Standard normal noise, shaped like the samples, for a stochastic sampler, or None for a deterministic one."""
Memory = Any
"""The state that a sampler carries from step to step, or None before the first step."""


class Sampler(ABC):
    """A sampling method, defined by one step. Subclasses are frozen and stateless; each step takes and returns the
    memory."""

    order: ClassVar[int]
    """The global order of convergence (in distribution for stochastic samplers), which the contract tests measure."""
    stochastic: ClassVar[bool] = False
    """Whether each step adds noise."""
    multistep: ClassVar[bool] = False
    """Whether steps reuse the predictions of earlier steps. The first step, which has none to reuse, and the step onto
    clean data are then DDIM steps."""
    evals_per_step: ClassVar[int]
    """The number of network calls in a step that lands at s > 0, which the contract tests count."""
    evals_last_step: ClassVar[int]
    """The number of network calls in the step onto clean data, where the network cannot be called."""

    @abstractmethod
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        """Step from t to s < t, and return x_s, shaped like `x_t` `[batch, *dims]`, and the memory for the next step.

        At s = 0, the result is clean data. Implementations should not read values from tensors, because this blocks the
        host.
        """

    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) for which a DDIM step from t to s lands where this deterministic sampler's step lands,
        and the memory for the next step.

        Solving x_t = alpha_t x0 + sigma_t eps and x_s = alpha_s x0 + sigma_s eps for x0 gives

            x0 = (x_s - q x_t) / (alpha_s - q alpha_t),   q = sigma_s / sigma_t

        At s = 0, this x0 is x_s itself. The step and the quotient are computed in float64, although the denoiser
        computes x0 in its own dtype. An error in the denoiser's x0 shifts x_s in proportion to the step width. The
        division cancels this factor, so the returned x0 is as precise as the denoiser's x0.
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
        """Return the number of network calls needed to sample in `num_steps` steps."""
        check_num_steps(num_steps)
        return (num_steps - 1) * self.evals_per_step + self.evals_last_step


@final
class _InFloat64(Denoiser):
    """A denoiser for float64 samples that calls another denoiser with samples of the dtype and device of `like`.

    This denoiser computes eps from x0 in float64. The float64 samples are on the device of the clock tensors, which is
    the CPU if the device of `like` does not support float64.
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
    """A deterministic sampler whose steps are DDIM steps with an adjusted (x0, eps)."""

    @abstractmethod
    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        """Return the (x0, eps) for which a DDIM step equals a step of this method, and the memory for the next step.

        Like the denoiser's estimates, the returned x0 and eps satisfy x_t = alpha x0 + sigma eps. The arguments are the
        same as those of `step`.
        """

    @final
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        denoised, memory = self.effective(denoiser, x_t, t, s, cond, memory)
        return ddim_step(denoised, denoiser.process, s), memory


samplers: Registry[type[Sampler]] = Registry("sampler")
