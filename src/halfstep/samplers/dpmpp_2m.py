"""DPM-Solver++(2M): DDIM with x0 extrapolated half a step ahead from the last two predictions.

A DDIM step is exact if x0 is constant during the step. Let lambda = log_snr / 2 and h = lambda_s - lambda_t. If x0 is
linear in lambda, a step of DPM-Solver++(2M) is exact to second order. It is a DDIM step in which x0 is replaced with

    x0 + h / (2 h_last) (x0 - x0_last)

The first step has no previous prediction, and the step onto clean data has h = infinity, so both are plain DDIM steps.
These two steps do not lower the order, because each is only one of N steps. If the grid is uniform in t, the steps
close to pure noise and clean data remain large in lambda for any N (ln 2, ln 3/2, ...). The error from t = 1 to 0
therefore falls as log(N) / N^2.

Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.noise import as_clock, per_sample
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.samplers.base import DataPredictionSampler, Memory, Time, samplers


class Last(NamedTuple):
    """The last prediction of x0, `[batch, *dims]`, and the log-SNR at which it was made, `[batch]`."""

    x0: Tensor
    log_snr: Tensor


@final
@samplers.register("dpmpp_2m")
@dataclass(frozen=True)
class DPMSolverPP2M(DataPredictionSampler):
    """A second-order, deterministic sampler that reuses the last prediction, with one network call per step.

    Source: Lu et al. 2022 (arXiv:2211.01095), algorithm 2.
    """

    order: ClassVar[int] = 2
    multistep: ClassVar[bool] = True
    evals_per_step: ClassVar[int] = 1
    evals_last_step: ClassVar[int] = 1

    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        process = denoiser.process
        denoised = denoiser(x_t, t, cond)
        here = process.log_snr(as_clock(t, x_t))
        last = Last(denoised.x0, here)
        if memory is None:
            return denoised, last
        end = as_clock(s, x_t)
        share = torch.where(end == 0, 0.0, (process.log_snr(end) - here) / (2 * (here - memory.log_snr)))
        ahead = denoised.x0 + per_sample(share, x_t) * (denoised.x0 - memory.x0)
        return Denoised(ahead, eps_from_x0(x_t, ahead, *process.amplitudes(t))), last
