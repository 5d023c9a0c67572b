"""Create the student and the teacher of a stage from the model of the previous stage."""

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.nets import InHalf, LoRA, Network, copy_denoiser, with_lora


def start_student(teacher: Denoiser, lora_rank: int | None = None) -> Denoiser:
    """Return a student that starts with the teacher's weights: a copy, or LoRA on shared weights.

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
