"""Denoising: the student learns E[x0 | x_t] from data. This is how a teacher is trained.

With t ~ U[0, 1] and x_t = alpha x0 + sigma eps, the target is x0. Source: Salimans & Ho 2022 (arXiv:2202.00512),
algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

from halfstep.core.draw import Draw
from halfstep.core.noise import as_clock
from halfstep.core.prediction import TruncatedSNR, Weighting
from halfstep.objectives.base import (
    STUDENT,
    Batch,
    Evals,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    noisy_student_loss,
    objectives,
)


@final
@objectives.register("denoise")
@dataclass(frozen=True)
class Denoising(Objective):
    """The weighted squared error in x0 at uniformly drawn times.

    The default weighting is the one used for the paper's models.

    Source: Salimans & Ho 2022 (arXiv:2202.00512), algorithm 1.
    """

    weighting: Weighting = field(default_factory=TruncatedSNR)
    needs_teacher: ClassVar[bool] = False

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.TEACHER)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1)}

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        t = as_clock(draw.uniform("time"), batch.x0)
        eps = draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)
        x_t = models.student.process.mix(batch.x0, eps, t)
        return noisy_student_loss(models, x_t, t, batch.x0, batch.cond, self.weighting)
