"""The auxiliary denoiser, which starts from the teacher and is trained on the student's samples."""

from typing import Any, Final

from halfstep.core.denoiser import Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.nets import (
    InHalf,
    LoRA,
    bare,
    checkpoint_gradients,
    checkpoints_gradients,
    copy_denoiser,
    copy_network,
    load_own_state,
    own_state,
    takes_guidance,
    unwrapped,
    with_guidance,
)
from halfstep.objectives.base import Models

AUXILIARY: Final = "auxiliary"
"""The name of the auxiliary denoiser among an objective's helpers."""


def auxiliary_denoiser(models: Models) -> Denoiser:
    """Return a trainable denoiser that starts as an unguided copy of the teacher.

    The copy has the dtypes of the teacher's network, even if the teacher runs in bfloat16. If the student has an input
    for the guidance scale, the copy gets one too, which has no effect at first. For a LoRA student, the denoiser is a
    second adapter on the student's base, so only one base is in memory. This adapter starts as a copy of the teacher's
    adapter, or at 0 if the teacher has no adapter. A custom denoiser is copied as is.

    Raises:
        ValueError: if no teacher is given, or the student takes a guidance scale and the teacher's network cannot.
    """
    if models.teacher is None:
        raise ValueError("an auxiliary denoiser starts as a copy of the teacher, but no teacher is given. Pass one")
    return _copied(models.teacher, models.student)


def _copied(teacher: Denoiser, student: Denoiser) -> Denoiser:
    """Return a trainable, unguided copy of the teacher that keeps the noise process of the teacher's view."""
    if isinstance(teacher, Guided):
        return _copied(teacher.denoiser, student)
    if isinstance(teacher, Reprocessed):
        return Reprocessed(_copied(teacher.denoiser, student), teacher.process)
    if not isinstance(teacher, NetworkDenoiser):
        return copy_denoiser(teacher)
    network = unwrapped(teacher.network)
    beside = student.network if isinstance(student, NetworkDenoiser) else None
    if isinstance(beside, LoRA):
        twin: Any = bare(beside)
        if isinstance(network, LoRA):
            load_own_state(twin, own_state(network))
    else:
        twin = copy_network(network)
        if isinstance(teacher.network, InHalf):
            teacher.network.restore_dtypes(twin)
        if beside is not None and takes_guidance(beside) and not takes_guidance(twin):
            twin = with_guidance(twin)
        if beside is not None and checkpoints_gradients(beside):
            checkpoint_gradients(twin)
    return NetworkDenoiser(twin, teacher.process, teacher.prediction)
