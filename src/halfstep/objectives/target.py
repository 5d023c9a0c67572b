"""The target of halving and consistency: the x0 with which one DDIM step lands where a chain of other steps lands.

In x / sigma, the sample divided by its noise amplitude, a DDIM step is linear in x0. With r = alpha / sigma,

    x_s / sigma_s = x_t / sigma_t + (r_s - r_t) x0

Therefore steps through the times t = t_0 > t_1 > ... > t_K = s add up, even if they use different denoisers. The x0
with which a single step lands on the same point is the mean of their x0 with weights

    w_k = (r_{k+1} - r_k) / (r_s - r_t),   sum w_k = 1, every w_k >= 0.

At s = 0 the step lands on clean data, r_s is infinite, and the last x0 has all the weight, without a special case. As a
mean, the target keeps the precision of the denoisers. Solving x_s for x0 would subtract nearly equal numbers (an error
of 2e-3 in float32 at 8192 steps, instead of less than 1e-6).

The steps may use any deterministic sampler. A data-prediction sampler takes a DDIM step with an effective x0. Any other
sampler only has a landing point x_s, where one DDIM step lands with the effective

    x0 = (x_s - q x_t) / (alpha_s - q alpha_t),   q = sigma_s / sigma_t,

which is x_s itself at s = 0. The step and the quotient are computed in float64, from the denoiser's x0 in its own
dtype. An error in x0 moves x_s in proportion to the width of the step, and the quotient divides by that width, so this
x0 has the denoiser's precision too.

Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 2; the authors' dpm.py for s = 0.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, ddim_step
from halfstep.core.noise import NoiseProcess, per_sample
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.samplers import DataPredictionSampler, Memory, Sampler

Step = Callable[[Tensor, Tensor, Tensor], Denoised]
"""Maps samples and two clock tensors (x_t, t, s) to the (x0, eps) with which DDIM steps from t to s."""


def check_deterministic(sampler: Sampler) -> None:
    """Raise ValueError unless the sampler is deterministic."""
    if sampler.stochastic:
        raise ValueError(
            f"{type(sampler).__name__} draws noise, so one step cannot land where its steps land. "
            "Choose a deterministic sampler for the teacher, such as DDIM()"
        )


@torch.no_grad()
def landing_x0(process: NoiseProcess, steps: Sequence[Step], x_t: Tensor, times: Sequence[Tensor]) -> Tensor:
    """Return the x0 with which one DDIM step from times[0] to times[-1] lands where all `steps` together land.

    Args:
        x_t: noisy samples `[batch, *dims]`.
        times: `len(steps) + 1` decreasing clock tensors. For some samples a step may be empty, from the last time
            to itself. Its result is then ignored, even if it is not finite.

    Returns:
        A tensor shaped as `x_t`, without gradient: a weighted mean with weights >= 0.
    """
    end = times[-1]
    alpha_t, sigma_t = process.alpha_sigma(times[0])
    alpha_s, sigma_s = process.landing(end)
    # 1 / (r_s - r_t), with both multiplied by sigma_s to avoid 1 / infinity at s = 0.
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


def steps_of(denoiser: Denoiser, sampler: Sampler, cond: Cond | None) -> Step:
    """Return the steps of a deterministic sampler with this denoiser. Each passes the sampler's memory to the next."""
    memory: Memory = None

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Denoised:
        nonlocal memory
        if isinstance(sampler, DataPredictionSampler):
            denoised, memory = sampler.effective(denoiser, x_t, t, s, cond, memory)
            return denoised
        start = x_t.to(t)
        x_s, memory = sampler.step(_InFloat64(denoiser, x_t), start, t, s, cond, memory)
        alpha_t, sigma_t = denoiser.process.alpha_sigma(t)
        alpha_s, sigma_s = denoiser.process.landing(s)
        q = sigma_s / sigma_t
        x0 = (x_s - per_sample(q, start) * start) / per_sample(alpha_s - q * alpha_t, start)
        return Denoised(x0.to(x_t), eps_from_x0(start, x0, alpha_t, sigma_t).to(x_t))

    return step


@final
class _InFloat64(Denoiser):
    """A denoiser for float64 samples that calls another one in the dtype and on the device of `like`.

    The float64 samples are on the device of the clock tensors, which is the CPU if the device has no float64. eps is
    computed from x0.
    """

    def __init__(self, denoiser: Denoiser, like: Tensor) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.like = like

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t.to(self.like), t, cond).x0.to(x_t)
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))
