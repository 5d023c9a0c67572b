"""Classifier-free guidance that a network learns, either with one fixed scale or with the scale as an input.

The guided prediction is uncond + scale (cond - uncond), so scale 1 disables guidance.

Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models" (arXiv:2210.03142), section 3.1.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE, Cond, Denoiser, Guided, NetworkDenoiser
from halfstep.core.door import check_number, check_real
from halfstep.core.draw import Draw
from halfstep.core.warnings import HalfstepWarning
from halfstep.nets import takes_guidance
from halfstep.registry import Registry


class Guidance(ABC):
    """The guidance scales that a network learns."""

    is_shown: ClassVar[bool]
    """Whether the scale is an input of the network, passed as the condition `guidance_scale`."""

    @property
    @abstractmethod
    def default_scale(self) -> float:
        """The default scale for sampling."""

    @abstractmethod
    def scale_for(self, scale: float | None) -> float | None:
        """Return the scale to pass to the network when `scale` is requested, or None to pass no scale.

        If `scale` is None, the default scale is used.

        Warns if the network has not learned the scale.

        Raises:
            ValueError: if the network cannot apply the scale.
        """

    @abstractmethod
    def covers(self, scale: float) -> bool:
        """Return whether the network has learned this scale."""

    @abstractmethod
    def view(self, teacher: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        """Return the guided teacher that a student learns from.

        Args:
            null: the values for one sample that represent "no condition", keyed by name.

        Raises:
            ValueError: if `null` is empty.
        """

    @abstractmethod
    def shown(self, cond: Cond, draw: Draw, like: Tensor) -> Cond:
        """Return the conditions of the samples `like` `[batch, *dims]`, with a scale for each sample if the network
        takes one."""


def _takes_scale(teacher: Denoiser) -> bool:
    return isinstance(teacher, NetworkDenoiser) and takes_guidance(teacher.network)


guidances: Registry[type[Guidance]] = Registry("guidance")


@final
@guidances.register("fixed")
@dataclass(frozen=True)
class FixedGuidance(Guidance):
    """One fixed scale, which is not an input of the network.

    Raises:
        ValueError: if the scale is not a finite number of at least 0.
    """

    scale: float
    is_shown: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("a guidance scale", self.scale)

    @property
    def default_scale(self) -> float:
        return self.scale

    def scale_for(self, scale: float | None) -> float | None:
        if scale not in (None, self.scale):
            raise ValueError(
                f"a guidance scale of {scale:g} was requested, but this model has only learned {self.scale:g}. Remove "
                "the scale, or distil a model with a range of scales"
            )
        return None

    def covers(self, scale: float) -> bool:
        return scale == self.scale

    def view(self, teacher: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        if _takes_scale(teacher):
            raise ValueError(
                f"a fixed scale of {self.scale:g} cannot be matched, because the teacher's network takes the scale as "
                f"an input and was recorded at one scale. Import it with --call guidance_scale={self.scale:g}, or "
                "match a range of scales"
            )
        return Guided(teacher, null, self.scale)

    def shown(self, cond: Cond, draw: Draw, like: Tensor) -> Cond:
        return cond


@final
@guidances.register("range")
@dataclass(frozen=True)
class GuidanceRange(Guidance):
    """Guidance scales from `low` to `high`, which the network takes as an input. In training, each sample's scale is
    drawn uniformly from this range.

    Raises:
        ValueError: if not 0 <= low < high < infinity.
    """

    low: float
    high: float
    is_shown: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_real(low=self.low, high=self.high)
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"a range of guidance scales must satisfy 0 <= low < high, got {self.low} and {self.high}")

    @property
    def default_scale(self) -> float:
        return (self.low + self.high) / 2

    def scale_for(self, scale: float | None) -> float | None:
        if scale is not None and not self.low <= scale <= self.high:
            warnings.warn(
                f"a guidance scale of {scale:g} was requested, but this model has only learned scales from "
                f"{self.low:g} to {self.high:g}. The model extrapolates",
                HalfstepWarning,
                stacklevel=5,
            )
        return self.default_scale if scale is None else scale

    def covers(self, scale: float) -> bool:
        return self.low <= scale <= self.high

    def view(self, teacher: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        return teacher if _takes_scale(teacher) else Guided(teacher, null)

    def shown(self, cond: Cond, draw: Draw, like: Tensor) -> Cond:
        scale = self.low + (self.high - self.low) * draw.uniform("guidance")
        return {**cond, GUIDANCE: scale.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))}
