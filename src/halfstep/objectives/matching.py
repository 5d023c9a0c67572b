"""Matching: the student learns the teacher's own x0, at random times, before any step is distilled.

It carries a teacher over to what halving needs: another prediction (x0 or v in the place of eps, which says nothing at
zero SNR), another clock, and classifier-free guidance taken into the network, at one scale or at any of a range that
the network is then shown. The noisy samples are those of the student's process; the teacher is asked at the same noise
levels, and twice where it is guided.

Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models" (arXiv:2210.03142), section 3.1, for guidance;
Salimans & Ho 2022 (arXiv:2202.00512), section 4, for the predictions that few steps need.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.clock import as_clock
from halfstep.core.denoiser import GUIDANCE, Cond
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.weighting import SNRPlusOne, Weighting
from halfstep.objectives.base import Batch, Losses, Models, Objective, check_one_process, noisy_student_loss, objectives


@final
@dataclass(frozen=True)
class GuidanceRange:
    """Guidance scales from `low` to `high`, of which each training sample draws one, uniformly.

    A scale is uncond + scale (cond - uncond): 1 is no guidance.

    Raises:
        ValueError: if not 0 <= low < high < infinity. (One fixed scale is no range: it belongs to the teacher.)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high < math.inf:
            raise ValueError(f"a range of guidance scales needs 0 <= low < high, got {self.low} and {self.high}")

    def shown(self, cond: Cond, draw: Draw, like: Tensor) -> Mapping[str, Tensor]:
        """The conditions with a scale for each sample of `like` `[batch, *dims]`."""
        scale = self.low + (self.high - self.low) * draw.uniform("guidance")
        return {**cond, GUIDANCE: scale.to(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))}


@final
@objectives.register("match")
@dataclass(frozen=True)
class Matching(Objective):
    """Squared error against the teacher's x0 at the times i / num_times, i = 1 ... num_times.

    With as many times as the teacher has noise levels it is asked about no other. The default weighting makes it the
    squared error in v, which is even over all noise levels.

    Raises:
        ValueError: if the number of times is not a whole number of at least 1.
    """

    num_times: int = 1024
    weighting: Weighting = field(default_factory=SNRPlusOne)
    guidance: GuidanceRange | None = None
    """Scales that teacher and student are shown; None if they are shown none."""
    guided: bool = False
    """Whether the teacher is guided, and so asked twice; it only counts for the cost."""
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_num_steps(self.num_times)

    @property
    def teacher_evals(self) -> int:
        return 2 if self.guided else 1

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        t = as_clock((draw.integers("time", self.num_times) + 1) / self.num_times, batch.x0)
        eps = draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)
        x_t = models.student.process.mix(batch.x0, eps, t)
        with torch.no_grad():
            target = teacher(x_t, t, cond).x0
        return noisy_student_loss(models, x_t, t, target, cond, self.weighting)
