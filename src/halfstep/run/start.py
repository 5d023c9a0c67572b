"""Builds the trainer of a stage from its parent models."""

import torch
from accelerate import Accelerator

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.draw import generator_for
from halfstep.data import MemoryData
from halfstep.data.base import updates_ahead
from halfstep.models.model import Model
from halfstep.models.students import in_precision, start_student
from halfstep.nets import LoRA, checkpoint_gradients, share_base
from halfstep.objectives import Stage
from halfstep.run.spec import RunSpec
from halfstep.train.engine import StageTrainer


def fresh_denoiser(spec: RunSpec) -> NetworkDenoiser:
    """Return the run's untrained denoiser, with weights that depend only on the seed.

    Raises:
        ValueError: if the spec has no network.
    """
    if spec.network is None:
        raise ValueError("the plan's first stage needs a network or a teacher. Pass one of them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(spec.seed, "weights").initial_seed())
        network = spec.network()
    return NetworkDenoiser(network, spec.process, spec.prediction)


def trainer_for(
    spec: RunSpec,
    stage: Stage,
    stream: str,
    start: Model | None,
    accelerator: Accelerator,
    teacher: Model | None = None,
) -> StageTrainer:
    """Return the trainer of a stage, for an untrained network or a student.

    Args:
        start: the model that the student is initialised from; None for an untrained network.
        teacher: the model that it learns from; `start` if None.
    """
    student: Denoiser
    seen: Denoiser | None
    if start is None:
        student, seen = fresh_denoiser(spec), None
    else:
        teacher = start if teacher is None else teacher
        if isinstance(start.denoiser.network, LoRA) and teacher is not start:
            share_base(teacher.denoiser.network, start.denoiser.network)
        student = start_student(stage.objective.start(start.denoiser), spec.lora_rank)
        called = in_precision(teacher.denoiser, spec.engine.teacher_precision)
        seen = stage.objective.view(called, student, teacher.null)
    if spec.engine.gradient_checkpointing and isinstance(student, NetworkDenoiser):
        checkpoint_gradients(student.network)
    return StageTrainer(
        student,
        seen,
        stage,
        spec.batches(accelerator.device),
        seed=spec.seed,
        stream=stream,
        accelerator=accelerator,
        engine=spec.engine,
        ahead=updates_ahead(accelerator.device, reads_files=not isinstance(spec.data, MemoryData)),
    )
