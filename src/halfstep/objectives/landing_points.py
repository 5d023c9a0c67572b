"""The noised landing point of the student's DDIM step, which several objectives use.

A DDIM step with the student's x0 at (x_t, t) takes x_t to x_s, the landing point. With noise added up to the level
tau >= s, the landing point becomes

    y = k x_s + b eps',   k = alpha_tau / alpha_s,   b^2 = sigma_tau^2 - k^2 sigma_s^2,

which is distributed like data at tau if x_s is distributed like data at s. Objectives use the landing point instead of
x0 itself, because at s > 0 the student's x0 is a mean over samples rather than a sample.

If tau is inside the step, with s < tau < t, the noise levels of different steps never overlap. A network that does not
take the step as an input can therefore still distinguish their landing points. With a larger tau, an objective also
compares coarse properties, such as how often each mode occurs, but the network then sees a mixture of the landing
points of several steps. If all of them are distributed like data, so is the mixture, but errors of different steps can
cancel out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halfstep.core.denoiser import ddim_step
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised
from halfstep.objectives.base import Step


class Landing(NamedTuple):
    """Landing points with added noise, y = k x_s + spread eps `[batch, *dims]`, at the noise level of tau."""

    y: Tensor
    tau: Tensor
    spread: Tensor
    eps: Tensor
    slope: Tensor
    """The derivative of y with respect to the student's x0, `[batch]`."""


def noised_landing(
    denoised: Denoised, process: NoiseProcess, step: Step, draw: Draw, *, until: Tensor | float, purpose: str
) -> Landing:
    """Return the landing points of the steps with noise added up to tau, which is drawn uniformly from s to `until`.

    Args:
        denoised: the student's output at (x_t, t); gradients flow through it.
        purpose: prefix of the purposes for which tau and the noise are drawn (see `Draw`).
    """
    x_s = ddim_step(denoised, process, step.s)
    share = as_clock(draw.uniform(f"{purpose}tau"), x_s)
    tau = step.s + share * (until - step.s)
    (alpha, sigma), (alpha_s, sigma_s) = process.alpha_sigma(tau), process.landing(step.s)
    alpha_t, sigma_t = process.alpha_sigma(step.t)
    added = torch.where(step.s == 0, -torch.inf, process.log_snr(tau) - process.log_snr(step.s))
    # The square root of sigma_tau^2 - k^2 sigma_s^2, computed without subtracting nearly equal numbers.
    spread = sigma * torch.sqrt(-torch.expm1(added))
    eps = draw.normal(f"{purpose}landing", x_s.shape[1:]).to(x_s)
    k = alpha / alpha_s
    y = per_sample(k, x_s) * x_s + per_sample(spread, x_s) * eps
    return Landing(y, tau, spread, eps, k * (alpha_s - sigma_s * alpha_t / sigma_t))
