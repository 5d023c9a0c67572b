"""Checks, before training starts, for errors that would otherwise only appear once the teacher has been trained."""

import torch

from halfstep.measure.evaluate import check_measurable
from halfstep.models.students import start_student
from halfstep.nets import precision_of
from halfstep.run.cost import helper_sizes
from halfstep.run.spec import RunSpec
from halfstep.run.start import fresh_denoiser


def preflight(spec: RunSpec) -> None:
    """Build every student and helper of the plan without allocating weights, and compute the features of two samples.

    Raises:
        ValueError: if the teacher's precision is incompatible with the settings, if LoRA or a helper is incompatible
            with the network, or if the models cannot be measured.
    """
    check_measurable(spec.data, spec.evaluation)
    if spec.teacher is not None and (lowered := precision_of(spec.teacher.denoiser.network)) != "float32":
        if spec.engine.sharding != "none":
            raise ValueError(f"weights in {lowered} cannot be sharded. Remove --engine.sharding")
        if spec.engine.teacher_precision != "float32":
            raise ValueError(f"the teacher's weights are already in {lowered}. Remove --engine.teacher-precision")
        if spec.lora_rank is None:
            raise ValueError(f"the teacher's weights are frozen in {lowered}. Add --chain.lora-rank 16")
    if spec.teacher is None and spec.lora_rank is not None:
        with torch.device("meta"):
            start_student(fresh_denoiser(spec), spec.lora_rank)
    for _, stage in spec.stages:
        if stage is not None:
            helper_sizes(spec, stage)
