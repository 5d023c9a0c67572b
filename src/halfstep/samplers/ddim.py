"""DDIM: keep the predicted x0 and eps, and lower the noise level.

x_s = alpha_s x0 + sigma_s eps. On the cosine process this is a rotation of the pair (x, v). It is deterministic, so
progressive distillation can replace two of its steps with one.

Source: Song et al. 2020 (arXiv:2010.02502) with eta = 0; Salimans & Ho 2022 (arXiv:2202.00512), section 2.
"""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.prediction import Denoised
from halfstep.samplers.base import DataPredictionSampler, Memory, Time, samplers


@final
@samplers.register("ddim")
@dataclass(frozen=True)
class DDIM(DataPredictionSampler):
    """First order, deterministic, one network call per step.

    Source: Song et al. 2020 (arXiv:2010.02502) with eta = 0; Salimans & Ho 2022 (arXiv:2202.00512), section 2.
    """

    order: ClassVar[int] = 1
    evals_per_step: ClassVar[int] = 1
    evals_last_step: ClassVar[int] = 1

    def effective(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory
    ) -> tuple[Denoised, Memory]:
        return denoiser(x_t, t, cond), None
