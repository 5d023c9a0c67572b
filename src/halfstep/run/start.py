"""The trainer of a stage, made from its parent."""

import torch
from accelerate import Accelerator

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.draw import generator_for
from halfstep.data import MemoryData
from halfstep.models.model import Model
from halfstep.models.students import asked, start_student, viewed
from halfstep.nets import checkpoint_gradients
from halfstep.objectives import Matching, Stage
from halfstep.run.spec import RunSpec
from halfstep.train.engine import StageTrainer
from halfstep.train.feed import updates_ahead


def fresh_denoiser(spec: RunSpec) -> NetworkDenoiser:
    """The run's untrained denoiser: its weights are a function of the seed.

    Raises:
        ValueError: if the spec has no network.
    """
    if spec.network is None:
        raise ValueError("the plan's first stage needs a network or a teacher, and there is neither")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(spec.seed, "weights").initial_seed())
        network = spec.network()
    return NetworkDenoiser(network, spec.process, spec.prediction)


def pair_for(spec: RunSpec, stage: Stage, parent: Model | None) -> tuple[NetworkDenoiser, Denoiser | None]:
    """The student of a stage as it is before the first update, and the denoiser that it learns from."""
    if parent is None:
        return fresh_denoiser(spec), None
    if not isinstance(stage.objective, Matching):
        return start_student(parent.denoiser, spec.lora_rank), asked(parent.denoiser, spec.teacher_precision)
    if spec.matched is None:
        raise ValueError("the plan has a matching stage, but nothing says what its student is")
    student = start_student(spec.matched(parent.denoiser), spec.lora_rank)
    teacher = asked(parent.denoiser, spec.teacher_precision)
    return student, viewed(teacher, student.process, spec.guidance, parent.null)


def trainer_for(
    spec: RunSpec, stage: Stage, stream: str, parent: Model | None, accelerator: Accelerator
) -> StageTrainer:
    """The trainer of a stage: of a fresh network, or of what its parent's is made into."""
    student, teacher = pair_for(spec, stage, parent)
    if spec.gradient_checkpointing:
        checkpoint_gradients(student.network)
    return StageTrainer(
        student,
        teacher,
        stage,
        spec.batches(accelerator.device),
        seed=spec.seed,
        stream=stream,
        accelerator=accelerator,
        micro_batch=spec.set_micro_batch,
        optimizer=spec.optimizer,
        ahead=updates_ahead(accelerator.device, reads_files=not isinstance(spec.data, MemoryData)),
        compiled=spec.compiled,
        sharding=spec.sharding,
        timeout_minutes=spec.timeout_minutes,
    )
