"""Builds a stage's trainer from its parent models."""

from typing import Any

from accelerate import Accelerator

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.door import got
from halfstep.core.draw import seeded
from halfstep.models.model import Model
from halfstep.models.students import in_precision, start_student
from halfstep.nets import LoRA, share_base
from halfstep.objectives import Stage, guidances, objectives
from halfstep.run.sources import CLASSES, as_batches
from halfstep.run.spec import RunSpec
from halfstep.runs import Manifest
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine


def fresh_denoiser(spec: RunSpec) -> NetworkDenoiser:
    """Return the run's untrained denoiser, whose weights depend only on the seed.

    Raises:
        ValueError: if the spec has no network.
    """
    if spec.network is None:
        raise ValueError("the plan's first stage needs a network or a teacher. Pass one of them")
    with seeded(spec.seed, "weights"):
        network = spec.network()
    return NetworkDenoiser(network, spec.process, spec.prediction)


def student_and_teacher(
    stage: Stage,
    start: Denoiser,
    teacher: Denoiser,
    null: Cond,
    lora_rank: int | None,
    engine: Engine,
    *,
    seed: int,
    stream: str,
) -> tuple[Denoiser, Denoiser]:
    """Return a stage's student, initialised from `start`, and the teacher, wrapped by `Objective.view`.

    Args:
        seed, stream: the key for the random initial weights of layers that `Objective.start` adds.

    Raises:
        ValueError: if the student cannot be built, or the teacher cannot be stored in the engine's `teacher_precision`.
    """
    with seeded(seed, stream, "start"):
        student = start_student(stage.objective.start(start), lora_rank)
    if isinstance(teacher, NetworkDenoiser):
        teacher = in_precision(teacher, engine.teacher_precision)
    elif engine.teacher_precision != "float32":
        raise ValueError(
            f"only the network of a NetworkDenoiser can be stored in {engine.teacher_precision}, but the teacher is "
            f"{got(teacher)}. Remove --engine.teacher-precision"
        )
    return student, stage.objective.view(teacher, student, null)


def trainer_for(
    spec: RunSpec,
    stage: Stage,
    stream: str,
    start: Model | None,
    accelerator: Accelerator,
    teacher: Model | None = None,
) -> StageTrainer:
    """Return the trainer of a stage's untrained network or student.

    Args:
        start: the model from which the student is initialised, or None to train an untrained network.
        teacher: the model that the student learns from; by default, `start`.
    """
    student: Denoiser
    seen: Denoiser | None
    if start is None:
        student, seen = fresh_denoiser(spec), None
    else:
        teacher = start if teacher is None else teacher
        if isinstance(start.denoiser.network, LoRA) and teacher is not start:
            # Measuring may have moved only one of them to the accelerator.
            teacher.to(start.device)
            share_base(teacher.denoiser.network, start.denoiser.network)
        # The stages of a run do not store the null conditions, which belong to the run's given teacher.
        null = teacher.null or ({} if spec.teacher is None else spec.teacher.null)
        student, seen = student_and_teacher(
            stage,
            start.denoiser,
            teacher.denoiser,
            null,
            spec.lora_rank,
            spec.engine,
            seed=spec.seed,
            stream=stream,
        )
    shown = {*([CLASSES] if spec.conditional else []), *spec.conditions}
    batches, ahead = as_batches(spec.data, accelerator.device, spec.flip, shown)
    return StageTrainer(
        student,
        seen,
        stage,
        batches,
        spec.data.shape,
        seed=spec.seed,
        stream=stream,
        accelerator=accelerator,
        engine=spec.engine,
        ahead=ahead,
    )


def facts_of(trainer: StageTrainer, start: Manifest | None) -> dict[str, Any]:
    """Return the arguments of `Model.of` for the result of a stage.

    `start` is the manifest of the model from which the stage's student was initialised.
    """
    objective = trainer.stage.objective
    guidance = None if start is None else start.guidance
    if objective.guidance is not None:
        guidance = guidances.describe(objective.guidance)
    return {
        "made": objective.outcome,
        "stage": trainer.stream,
        "objective": objectives.name_of(objective),
        "num_updates": trainer.update,
        "seconds": round(trainer.seconds, 3),
        "guidance": guidance,
        "guidance_scale": None if guidance is None else guidances.rebuild(guidance).default_scale,
    }
