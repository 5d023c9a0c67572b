"""Matching: the student learns the teacher's x0 at random times, before any steps are distilled.

Matching converts a teacher for halving. It can change the prediction (to x0 or v, because eps does not determine x0 at
zero SNR), change the clock, or build classifier-free guidance into the weights. The guidance uses either one scale or a
range of scales; with a range, the scale becomes an input of the network. The noisy samples follow the student's noise
process. The teacher is called at the same noise levels as the student, twice if the teacher is guided.

An eps-prediction teacher does not determine x0 at zero SNR either. If the process ends there, the teacher is called at
the last noise level with signal instead of t = 1, on the same clean samples and noise. For data of unit scale, this
changes the mean of x0 by about alpha / sigma.

Source: Meng et al. 2023, "On Distillation of Guided Diffusion Models" (arXiv:2210.03142), section 3.1, for guidance;
Salimans & Ho 2022 (arXiv:2202.00512), section 4, for predictions suited to few steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.denoiser import LARGEST_GAIN, Clipped, Denoiser, NetworkDenoiser, Reprocessed, output_gain
from halfstep.core.door import check_real
from halfstep.core.draw import Draw
from halfstep.core.grids import check_num_steps
from halfstep.core.noise import NoiseProcess, VPTable, as_clock
from halfstep.core.prediction import Prediction, SNRPlusOne, Weighting
from halfstep.nets import Network, OnProcess, StockNetwork, on_clock, takes_guidance, with_guidance
from halfstep.objectives.base import (
    STUDENT,
    Batch,
    Evals,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    check_one_process,
    noisy_student_loss,
    objectives,
)
from halfstep.objectives.guidance import Guidance


def _known_times(denoiser: Denoiser, process: NoiseProcess, t: Tensor) -> Tensor:
    """Return the times t of `process`, `[batch]`, or the last time with signal where x0 is undetermined at t.

    Without discrete levels, this is the time at which the gain of eps prediction, sigma / alpha, is `LARGEST_GAIN`.
    """
    if isinstance(process, VPTable):
        last = torch.full_like(t, 1 - 1 / len(process.betas))
    else:
        last = process.time_at(torch.full_like(t, -2 * math.log(LARGEST_GAIN)))
    known = t
    for part in denoiser.modules():
        if isinstance(part, NetworkDenoiser):
            own = part.process
            there = t if own == process else own.time_at(process.log_snr(t)).clamp(0, 1)
            # No value is read on the host, which would wait for the device.
            output = t.new_ones(len(t), part.prediction.channels)
            x0 = part.prediction.denoised(output, t.new_zeros(len(t), 1), *own.alpha_sigma(there)).x0
            known = torch.where(x0.isfinite().squeeze(1), known, last)
    return known


@final
@objectives.register("match")
@dataclass(frozen=True)
class Matching(Objective):
    """The squared error with respect to the teacher's x0 at the times i / num_times, i = 1 ... num_times.

    After guidance, the teacher's x0 is clipped to `clip`. For data in that range, clipping never moves an entry away
    from the true mean E[x0 | x_t]. Clipping also keeps an eps-prediction teacher usable near pure noise, where
    sigma / alpha amplifies the teacher's error. If `num_times` equals the teacher's number of noise levels, the teacher
    is called only at those levels. With the default weighting, the loss is the squared error in v, which is balanced
    across all noise levels.

    If the teacher's output does not determine x0 at t = 1, as with eps prediction at zero SNR, the student is still
    trained at t = 1, but the teacher is called at the last noise level with signal, on the same clean samples and
    noise. This is the second-to-last level of a `VPTable`. For other processes, sigma / alpha is 1000 at this level.

    Source: Meng et al. 2023 (arXiv:2210.03142), section 3.1, for guidance.

    Raises:
        ValueError: if `num_times` is not a whole number of at least 1, or `clip` is not a pair of increasing bounds.
    """

    num_times: int = 1024
    weighting: Weighting = field(default_factory=SNRPlusOne)
    guidance: Guidance | None = None
    """The guidance that the student learns, or None if it learns no guidance."""
    prediction: Prediction | None = None
    """The student's prediction; None keeps the teacher's."""
    process: NoiseProcess | None = None
    """The student's noise process; None keeps the teacher's."""
    num_train_timesteps: int = 1024
    """Number of timesteps of the student's network if `process` differs from the teacher's."""
    clip: tuple[float, float] | None = None
    """The bounds to which the teacher's x0 is clipped; None disables clipping."""
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_num_steps(self.num_times)
        if self.clip is not None:
            if not isinstance(self.clip, tuple | list) or len(self.clip) != 2:
                raise ValueError(f"clip must be two bounds, got {self.clip!r}. Pass (-1, 1)")
            low, high = self.clip
            check_real(low=low, high=high)
            if not low < high:
                raise ValueError(f"the bounds of clip must increase, got {low} and {high}")
            object.__setattr__(self, "clip", (float(low), float(high)))

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.MATCHED)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1), "teacher": Evals(1 if self.guidance is None else 2)}

    def start(self, teacher: Denoiser) -> Denoiser:
        if not isinstance(teacher, NetworkDenoiser):
            raise ValueError(f"{type(teacher).__name__} has no network to match. Pass a NetworkDenoiser")
        meaning = self.prediction or teacher.prediction
        if meaning.channels != teacher.prediction.channels:
            raise ValueError(
                f"the teacher's network has {teacher.prediction.channels} outputs for each channel, but "
                f"{type(meaning).__name__} needs {meaning.channels}. Choose another prediction for the student"
            )
        network, own = teacher.network, teacher.process
        process = self.process or own
        if output_gain(process, meaning) == math.inf:
            raise ValueError(
                f"a student that predicts {type(meaning).__name__} has no x0 at t = 1, where the signal of {process} "
                "is 0. Choose another prediction for the student, such as V()"
            )
        if self.guidance is not None and self.guidance.is_shown and not takes_guidance(network):
            network = with_guidance(network)
        if process != own and isinstance(network, StockNetwork):
            network = on_clock(network, lambda t: own.time_at(process.log_snr(t)).clamp(0, 1), self.num_train_timesteps)
        elif process != own and not isinstance(network, Network):
            network = OnProcess(network, own, process)
        return NetworkDenoiser(network, process, meaning)

    def view(self, teacher: Denoiser, student: Denoiser, null: Mapping[str, Tensor]) -> Denoiser:
        seen = teacher if self.guidance is None else self.guidance.view(teacher, null)
        seen = seen if student.process == teacher.process else Reprocessed(seen, student.process)
        return seen if self.clip is None else Clipped(seen, *self.clip)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        teacher = check_one_process(models)
        cond = batch.cond if self.guidance is None else self.guidance.shown(batch.cond, draw, batch.x0)
        t = as_clock((draw.integers("time", self.num_times) + 1) / self.num_times, batch.x0)
        eps = draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)
        process = models.student.process
        x_t, known = process.mix(batch.x0, eps, t), _known_times(teacher, process, t)
        with torch.no_grad():
            target = teacher(process.mix(batch.x0, eps, known), known, cond).x0
        return noisy_student_loss(models, x_t, t, target, cond, self.weighting)
