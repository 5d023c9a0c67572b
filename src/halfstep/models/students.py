"""Create the student and the teacher of a stage from the model of the previous stage."""

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.nets import InHalf, LoRA, Network, copy_denoiser, merged, with_lora


def without_lora(teacher: Denoiser) -> Denoiser:
    """Return the given teacher of a chain with its LoRA weights merged, or the teacher itself if it has none.

    Otherwise, `start_student` would continue the training of these LoRA weights, whatever `lora_rank` is.
    """
    if not isinstance(teacher, NetworkDenoiser) or not isinstance(teacher.network, LoRA):
        return teacher
    return NetworkDenoiser(merged(teacher.network), teacher.process, teacher.prediction).eval()


def start_student(teacher: Denoiser, lora_rank: int | None = None) -> Denoiser:
    """Return a student that starts with the teacher's weights: a copy, or LoRA on shared weights.

    If the teacher is itself a LoRA student of the chain, the student is a copy of it with the same rank.

    Raises:
        ValueError: if the teacher's network does not support LoRA.
    """
    if lora_rank is None or (isinstance(teacher, NetworkDenoiser) and isinstance(teacher.network, LoRA)):
        return copy_denoiser(teacher)
    if isinstance(teacher, NetworkDenoiser) and not isinstance(teacher.network, Network):
        raise ValueError(
            f"LoRA supports only diffusers networks, but the teacher's network is a {type(teacher.network).__name__}. "
            "Remove lora_rank"
        )
    if not isinstance(teacher, NetworkDenoiser):
        raise ValueError(f"{type(teacher).__name__} has no network for LoRA. Remove lora_rank")
    return NetworkDenoiser(with_lora(teacher.network, lora_rank), teacher.process, teacher.prediction)


def in_precision(teacher: NetworkDenoiser, precision: str) -> NetworkDenoiser:
    """Return the teacher itself for "float32", or a copy in bfloat16 for "bf16"."""
    if precision == "float32":
        return teacher
    return NetworkDenoiser(InHalf(teacher.network), teacher.process, teacher.prediction)
