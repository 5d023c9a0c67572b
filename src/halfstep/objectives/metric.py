"""Loss metrics, which map a sample's weighted mean squared error to its loss."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from halfstep.core.door import check_number
from halfstep.registry import Registry


class LossMetric(ABC):
    """An increasing function of the weighted mean squared error, with the value 0 at 0."""

    @abstractmethod
    def __call__(self, square: Tensor) -> Tensor:
        """Return one loss for each squared error; both are tensors `[batch]`."""


loss_metrics: Registry[type[LossMetric]] = Registry("loss metric")


@final
@loss_metrics.register("squared")
@dataclass(frozen=True)
class Squared(LossMetric):
    """The squared error itself."""

    def __call__(self, square: Tensor) -> Tensor:
        return square


@final
@loss_metrics.register("pseudo_huber")
@dataclass(frozen=True)
class PseudoHuber(LossMetric):
    """The loss sqrt(square + c^2) - c, which is smooth at 0 and close to sqrt(square) if square far exceeds c^2.

    If the weight is large at low noise levels, the root of the squared error has less variance than the squared error.

    Source: Song & Dhariwal 2023 (arXiv:2310.14189), section 3.3.

    Raises:
        ValueError: if c is not a finite number above 0.
    """

    c: float = 1e-4
    """Weighted root mean square error below which the loss is quadratic."""

    def __post_init__(self) -> None:
        check_number("c", self.c, above=True)

    def __call__(self, square: Tensor) -> Tensor:
        # sqrt(square + c^2) - c, without subtracting nearly equal numbers.
        return square / (torch.sqrt(square + self.c**2) + self.c)
