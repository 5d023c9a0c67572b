"""DDIM, and the target of halving and consistency: the x0 for which one DDIM step lands where a chain of steps lands.

A DDIM step keeps the predicted x0 and eps but lowers the noise level: x_s = alpha_s x0 + sigma_s eps. For the cosine
process, the step is a rotation of the pair (x, v). DDIM is deterministic, so progressive distillation can replace two
DDIM steps with one.

In terms of x / sigma, the sample divided by its noise amplitude, a DDIM step is linear in x0. With r = alpha / sigma,

    x_s / sigma_s = x_t / sigma_t + (r_s - r_t) x0

Therefore, the steps through the times t = t_0 > t_1 > ... > t_K = s add up, even if they use different denoisers. The
x0 for which a single step lands on the same point is the weighted mean of the steps' x0, with the weights

    w_k = (r_{k+1} - r_k) / (r_s - r_t),   sum w_k = 1, every w_k >= 0

At s = 0, the step lands on clean data, r_s is infinite, and the last x0 receives all the weight without a special case.
Because the target is a mean, it is as precise as the denoisers' x0. Computing x0 from x_s would instead subtract nearly
equal numbers: with 8192 steps in float32, the error would be 2e-3 instead of less than 1e-6.

Any deterministic sampler can take the steps, because `Sampler.effective` turns each step into a DDIM step.

Source: Song et al. 2020 (arXiv:2010.02502) with eta = 0; Salimans & Ho 2022 (arXiv:2202.00512), section 2 and
algorithm 2; the authors' dpm.py for s = 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.noise import NoiseProcess, per_sample
from halfstep.core.prediction import Denoised
from halfstep.samplers.base import DataPredictionSampler, Memory, Sampler, Time, samplers


@final
@samplers.register("ddim")
@dataclass(frozen=True)
class DDIM(DataPredictionSampler):
    """A first-order, deterministic sampler with one network call per step.

    Source: Song et al. 2020 (arXiv:2010.02502) with eta = 0; Salimans & Ho 2022 (arXiv:2202.00512), section 2.
    """

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1
    evals_last_step: ClassVar[int] = 1

    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        return denoiser(x_t, t, cond), None


Step = Callable[[Tensor, Tensor, Tensor], Denoised]
"""A function that maps samples and two clock tensors, (x_t, t, s), to the (x0, eps) of a DDIM step from t to s."""


def steps_of(denoiser: Denoiser, sampler: Sampler, cond: Cond | None) -> Step:
    """Return a function that takes one step of a deterministic sampler each time it is called.

    Each step passes the sampler's memory to the next step.
    """
    memory: Memory = None

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Denoised:
        nonlocal memory
        denoised, memory = sampler.effective(denoiser, x_t, t, s, cond, memory)
        return denoised

    return step


@torch.no_grad()
def landing_x0(process: NoiseProcess, steps: Sequence[Step], x_t: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Return the x0 for which one DDIM step from times[0] to times[-1] lands where all `steps` together land.

    Args:
        x_t: noisy samples `[batch, *dims]`.
        times: `len(steps) + 1` decreasing clock tensors. For some samples, a step may be empty: it starts and ends at
            the last time. The result of an empty step is ignored, even if it is not finite.

    Returns:
        A weighted mean of the steps' x0 with nonnegative weights, shaped like `x_t` and without gradients.
    """
    end = times[-1]
    alpha_t, sigma_t = process.alpha_sigma(times[0])
    alpha_s, sigma_s = process.landing(end)
    # This is 1 / (r_s - r_t), with numerator and denominator multiplied by sigma_s because r_s is infinite at s = 0.
    scale = sigma_s / (alpha_s - sigma_s * alpha_t / sigma_t)

    target = torch.zeros_like(x_t)
    left = torch.ones_like(times[0])
    ratio = alpha_t / sigma_t
    for step, (here, after) in zip(steps, pairwise(times), strict=True):
        denoised = step(x_t, here, after)
        if after is end:
            weight = left
        else:
            alpha, sigma = process.alpha_sigma(after)
            weight = torch.where(after == end, left, (alpha / sigma - ratio) * scale)
            left, ratio = left - weight, alpha / sigma
            x_t = ddim_step(denoised, process, after)
        share = per_sample(weight, target)
        target = target + (share * denoised.x0).masked_fill(share == 0, 0)
    return target
