"""Multistep consistency distillation: the student learns to step from any time on a fine grid to a segment boundary.

The student takes N steps, so time is divided into N segments, from j / N to (j + 1) / N. The teacher's grid has T
time points, where T is a multiple of N. From a time t = b + n / T in the segment above the boundary b, the teacher
takes one step to s = t - 1 / T, and the student covers the rest of the way to b, without gradients. The target is the
x0 for which one DDIM step from t lands at the same point (see `samplers/ddim.py`):

    target = w x0_teacher(x_t, t) + (1 - w) x0_student(x_s, s),   w = (r_s - r_t) / (r_b - r_t),   r = alpha / sigma

At s = b, the weight w is 1 and the student's x0 is ignored, so the target is the teacher's x0. This anchors the
student, which at all other times is pulled towards its own predictions. Halving is the case T / N = 2, except that the
teacher, not the student, takes the second half of the step. A single stage distils the undistilled teacher to any N. A
chain of students such as 8, 4, 2, 1, in which each student starts from the previous student, is optional.

Other methods are special cases:

* Latent consistency models (LCM): `Consistency(1, 50, 50, guidance=GuidanceRange(low, high), guide_teacher=True,
  self_teacher=0.95, weighting=Constant(), metric=PseudoHuber(1e-3))`. The boundary scaling of LCM, c_skip x_t + c_out
  x0, makes the student return x_s itself at s = 0, where x_s is the teacher's x0. This is the same anchor. At all other
  times of this grid, the scaling is practically the identity, because c_skip is at most 6e-6 (for sigma_data 0.5 and
  1000 timesteps scaled by 10).
* TRACT: `Consistency(32, 1024, 1024, self_teacher=0.5)` is the first phase of TRACT. In later phases of TRACT, the
  teacher is the previous phase's student, on that student's grid. In halfstep, the undistilled teacher teaches every
  stage, on any grid, so no stage inherits errors from the previous stage. To run the phases as in TRACT, start one run
  per phase, and use the previous run's student as the teacher.

The time t is drawn uniformly from the T times of the grid. T grows during the stage, because students learn faster on a
coarse grid, but the teacher's steps have smaller errors on a fine grid.

Source: Heek et al. 2024 (arXiv:2403.06807), algorithm 1, with deterministic teacher steps; Luo et al. 2023
(arXiv:2310.04378) for LCM; Berthelot et al. 2023 (arXiv:2303.04248) for TRACT.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import check_number, check_whole
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import as_clock
from halfstep.core.prediction import Denoised, TruncatedSNR, Weighting
from halfstep.nets import takes_guidance, with_guidance
from halfstep.objectives.base import (
    STUDENT,
    Average,
    Batch,
    Evals,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    check_deterministic,
    check_one_process,
    noisy_student_loss,
    objectives,
)
from halfstep.objectives.guidance import Guidance
from halfstep.objectives.metric import LossMetric, Squared
from halfstep.samplers import DDIM, Sampler
from halfstep.samplers.ddim import Step, landing_x0, steps_of

REFERENCE: Final = "reference"
"""Name of the student's moving average, which is called at x_s instead of the student."""


def consistency_target(
    teacher: Denoiser,
    reference: Denoiser,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    boundary: Tensor | float,
    cond: Cond | None = None,
    sampler: Sampler | None = None,
) -> Tensor:
    """Return the x0 for which one DDIM step from t to the boundary lands where two steps land: the teacher's step from
    t to s, followed by the reference's DDIM step to the boundary.

    Args:
        teacher: an unclipped denoiser.
        reference: the student or its moving average. Where s is the boundary, the output of the reference is ignored,
            even if it is not finite.
        x_t: noisy samples `[batch, *dims]`.
        t, s, boundary: clock times with 0 <= boundary <= s < t, each `[batch]` or one time for all samples.
        cond: conditions, keyed by name, each `[batch, ...]`.
        sampler: the teacher's deterministic sampler; DDIM() if None.

    Returns:
        A tensor of the same shape as `x_t`, without gradients.

    Raises:
        ValueError: if 0 <= boundary <= s < t does not hold, or the sampler is stochastic.
    """
    method = DDIM() if sampler is None else sampler
    check_deterministic(method)
    start, middle, end = (as_clock(time, x_t) for time in (t, s, boundary))
    if not bool(((end >= 0) & (end <= middle) & (middle < start)).all()):
        raise ValueError("the times of a step to a boundary must satisfy 0 <= boundary <= s < t")
    return _target(teacher, reference, x_t, (start, middle, end), cond, method)


def _target(
    teacher: Denoiser,
    reference: Denoiser,
    x_t: Tensor,
    times: tuple[Tensor, Tensor, Tensor],
    cond: Cond | None,
    sampler: Sampler,
) -> Tensor:
    """Return `consistency_target` without checking the arguments."""
    return landing_x0(teacher.process, [steps_of(teacher, sampler, cond), _rest(reference, cond)], x_t, times)


def _rest(reference: Denoiser, cond: Cond | None) -> Step:
    """Return a function that performs a DDIM step with the reference.

    For an empty step (t = s), the reference is called at t = 1, because its output may be undefined at t = 0.
    """

    def step(x_t: Tensor, t: Tensor, s: Tensor) -> Denoised:
        return reference(x_t, torch.where(t > s, t, 1.0), cond)

    return step


@contextmanager
def _rewound(device: torch.device) -> Iterator[None]:
    """Restore the state of the random generator on exit, so that the next pass draws the same dropout masks.

    The generator's state is stored on the host, even for a GPU, so the host does not wait for the device.
    """
    generator: Any = torch if device.type == "cpu" else torch.get_device_module(device)
    state = generator.get_rng_state()
    try:
        yield
    finally:
        generator.set_rng_state(state)
        # During a forward pass without gradients, autocast may cache half-precision copies of the weights. The next
        # pass would use these copies and produce no gradients (pytorch #65766, fixed in #165068).
        torch.clear_autocast_cache()


@final
@objectives.register("consistency")
@dataclass(frozen=True)
class Consistency(Objective):
    """The student's error with respect to `consistency_target` at times drawn uniformly from the teacher's grid.

    The default grid is from the paper, which trains each stage for 200,000 updates. For a shorter stage, set
    `anneal_updates` to half the number of updates in the stage. The loss is small from the first update on and need not
    fall, so `EarlyEnd` ignores it.

    Source: Heek et al. 2024 (arXiv:2403.06807), algorithm 1.

    Raises:
        ValueError: if a count is not a whole number in its range, `grid_start` or `grid_end` is not a multiple of
            num_steps and at least twice as large, `self_teacher` is not in [0, 1), the teacher's sampler is stochastic
            or multistep, or a setting has no effect.
    """

    num_steps: int
    grid_start: int = 64
    """Number of time points in the teacher's grid at the first update."""
    grid_end: int = 1280
    """Number of time points in the teacher's grid after `anneal_updates` updates."""
    anneal_updates: int = 100_000
    """Number of updates over which the grid grows from `grid_start` to `grid_end`, linearly in log(T)."""
    weighting: Weighting = field(default_factory=TruncatedSNR)
    metric: LossMetric = field(default_factory=Squared)
    """The loss as a function of the weighted squared error."""
    guidance: Guidance | None = None
    """The guidance that the student learns or keeps, or None if it has no guidance."""
    guide_teacher: bool = False
    """Whether to apply guidance to the teacher, which doubles the number of teacher calls. Leave this False if the
    teacher has already learned guidance."""
    teacher_sampler: Sampler = field(default_factory=DDIM)
    """The deterministic sampler for the teacher's single step, not multistep; the student uses DDIM."""
    self_teacher: float = 0.0
    """Decay of the student's moving average, which is called at x_s. With 0, the student itself is called instead, with
    the same dropout masks as in the pass with gradients."""
    needs_teacher: ClassVar[bool] = True
    learns_from_undistilled: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_num_steps(self.num_steps)
        for name in ("grid_start", "grid_end"):
            check_whole(name, getattr(self, name), 2 * self.num_steps)
            if getattr(self, name) % self.num_steps:
                raise ValueError(
                    f"{name} {getattr(self, name)} is not a multiple of num_steps {self.num_steps}. Choose "
                    f"{-(-getattr(self, name) // self.num_steps) * self.num_steps}"
                )
        check_whole("anneal_updates", self.anneal_updates)
        default = next(each.default for each in fields(self) if each.name == "anneal_updates")
        if self.grid_start == self.grid_end and self.anneal_updates != default:
            raise ValueError(
                f"anneal_updates {self.anneal_updates} has no effect if grid_start and grid_end are both "
                f"{self.grid_end}. Remove it"
            )
        if self.guide_teacher and self.guidance is None:
            raise ValueError("guide_teacher has no effect without guidance. Add guidance")
        check_deterministic(self.teacher_sampler)
        if self.teacher_sampler.multistep:
            raise ValueError(
                f"{type(self.teacher_sampler).__name__} needs several steps in a row to differ from DDIM, but the "
                "teacher takes one. Choose a sampler without memory, such as Heun()"
            )
        check_number("self_teacher", self.self_teacher, below=1)

    def grid_steps(self, update: int) -> int:
        """Return T, the number of time points in the teacher's grid at an update, which is a multiple of num_steps."""
        done = min(update / self.anneal_updates, 1.0)
        grid: float = self.grid_start ** (1 - done) * self.grid_end**done
        return self.num_steps * round(grid / self.num_steps)

    @property
    def guides_teacher(self) -> bool:
        return self.guide_teacher

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, DDIM())

    @property
    def evals(self) -> Mapping[str, Evals]:
        sampler = self.teacher_sampler
        # A batch may contain steps that land on clean data, and all samples of a batch need the same number of calls.
        calls = max(sampler.evals_per_step, sampler.evals_last_step) * (2 if self.guide_teacher else 1)
        own = {STUDENT: Evals(1, 1), REFERENCE: Evals(1)} if self.self_teacher else {STUDENT: Evals(2, 1)}
        return {**own, "teacher": Evals(calls)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {REFERENCE: Average(self.self_teacher)} if self.self_teacher else {}

    def start(self, teacher: Denoiser) -> Denoiser:
        if self.guidance is None or not self.guidance.is_shown or not isinstance(teacher, NetworkDenoiser):
            return teacher
        if takes_guidance(teacher.network):
            return teacher
        return NetworkDenoiser(with_guidance(teacher.network), teacher.process, teacher.prediction)

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        if not self.guide_teacher:
            return teacher
        assert self.guidance is not None
        return self.guidance.view(teacher, null)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        # Only calls that are the same at every update can be drawn in advance. T changes during the stage, so a uniform
        # number is drawn instead of an integer below T.
        grid = self.grid_steps(draw.update)
        index = (as_clock(draw.uniform("time"), batch.x0) * grid).floor().clamp(max=grid - 1)
        # All three times are quotients of integers, so that s can be exactly equal to the boundary.
        boundary = torch.floor(index / (grid // self.num_steps)) / self.num_steps
        t, s = (index + 1) / grid, index / grid
        eps = draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)
        x_t = models.student.process.mix(batch.x0, eps, t)
        if self.self_teacher:
            reference = models.helpers[REFERENCE]
            assert isinstance(reference, Denoiser)
            target = _target(teacher, reference, x_t, (t, s, boundary), cond, self.teacher_sampler)
        else:
            with _rewound(batch.x0.device):
                target = _target(teacher, models.student, x_t, (t, s, boundary), cond, self.teacher_sampler)
        losses = noisy_student_loss(models, x_t, t, target, cond, self.weighting)
        return Losses(self.metric(losses.loss), losses.log_snr)
