"""Checks before training of everything that would otherwise fail after the teacher is trained."""

import torch

from halfstep.measure.evaluate import check_measurable
from halfstep.models.students import start_student
from halfstep.run.cost import helper_sizes
from halfstep.run.spec import RunSpec
from halfstep.run.start import fresh_denoiser


def preflight(spec: RunSpec) -> None:
    """Make every student and helper of the plan without memory for its weights, and features of two samples.

    Raises:
        ValueError: if low-rank additions or a helper do not fit the network, or the models could not be measured.
    """
    check_measurable(spec.data, spec.evaluation)
    if spec.teacher is None and spec.lora_rank is not None:
        with torch.device("meta"):
            start_student(fresh_denoiser(spec), spec.lora_rank)
    for _, stage in spec.stages:
        if stage is not None:
            helper_sizes(spec, stage)
