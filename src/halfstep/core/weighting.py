"""Weightings: how much an error in x0 counts at each noise level.

A weighting is a function of log_snr, the weight of the squared error in x0. In other spaces the same loss has another
weight: |eps error|^2 = SNR |x0 error|^2 and, on a variance-preserving process, |v error|^2 = (SNR + 1) |x0 error|^2.

Source: Salimans & Ho 2022 (arXiv:2202.00512), section 4; "constant" from the authors' dpm.py.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from halfstep.registry import Registry


class Weighting(ABC):
    """The weight of the squared x0 error as a function of log_snr."""

    @abstractmethod
    def __call__(self, log_snr: Tensor) -> Tensor:
        """Weights, float64 and shaped as `log_snr`."""


weightings: Registry[type[Weighting]] = Registry("weighting")


@final
@weightings.register("constant")
@dataclass(frozen=True)
class Constant(Weighting):
    """1: the plain squared error in x0."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.ones_like(log_snr)


@final
@weightings.register("snr")
@dataclass(frozen=True)
class SNR(Weighting):
    """SNR: the squared error in eps."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr)


@final
@weightings.register("truncated_snr")
@dataclass(frozen=True)
class TruncatedSNR(Weighting):
    """max(SNR, 1): the larger of the squared errors in x0 and eps. The weighting of every model of the paper."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr.clamp(min=0))


@final
@weightings.register("snr_plus_one")
@dataclass(frozen=True)
class SNRPlusOne(Weighting):
    """SNR + 1: the squared error in v."""

    def __call__(self, log_snr: Tensor) -> Tensor:
        return torch.exp(log_snr) + 1
