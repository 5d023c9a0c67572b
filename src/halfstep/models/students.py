"""What a matching stage trains, and what it learns from."""

from collections.abc import Callable, Mapping

from torch import Tensor

from halfstep.core.denoiser import Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Prediction
from halfstep.nets import InHalf, LoRA, StockNetwork, copy_network, on_clock, takes_guidance, with_guidance, with_lora


def start_student(teacher: NetworkDenoiser, lora_rank: int | None = None) -> NetworkDenoiser:
    """A student with the teacher's weights: a copy, or additions of that rank to weights that both share."""
    network = teacher.network
    if lora_rank is None or isinstance(network, LoRA):
        return copy_denoiser(teacher)
    return NetworkDenoiser(with_lora(network, lora_rank), teacher.process, teacher.prediction)


def asked(teacher: NetworkDenoiser, precision: str = "float32") -> NetworkDenoiser:
    """The teacher as it is asked: itself, or a copy in bfloat16.

    Raises:
        ValueError: if the precision is neither "float32" nor "bf16".
    """
    if precision == "float32":
        return teacher
    if precision != "bf16":
        raise ValueError(f"a teacher's precision must be float32 or bf16, got {precision!r}")
    return NetworkDenoiser(InHalf(teacher.network), teacher.process, teacher.prediction)


def matched_student(
    prediction: Prediction | None = None,
    process: NoiseProcess | None = None,
    shown_scale: bool = False,
    num_train_timesteps: int = 1024,
) -> Callable[[NetworkDenoiser], NetworkDenoiser]:
    """From a teacher to what its student starts from: the teacher's own network, or one made from it, under another
    meaning.

    Args:
        prediction: what the student's output means; as the teacher's if None.
        process: the student's; the teacher's if None. A network with a clock of timesteps gets one of
            `num_train_timesteps` on it.
        shown_scale: whether the student is shown a guidance scale.

    Raises:
        ValueError: at the call, if the teacher's network cannot be made into such a student.
    """

    def make(teacher: NetworkDenoiser) -> NetworkDenoiser:
        meaning = prediction or teacher.prediction
        if meaning.channels != teacher.prediction.channels:
            raise ValueError(
                f"the teacher's network has {teacher.prediction.channels} outputs for each channel, but "
                f"{type(meaning).__name__} needs {meaning.channels}: choose another prediction for the student"
            )
        network = teacher.network
        if shown_scale and not takes_guidance(network):
            network = with_guidance(network)
        if process is not None and process != teacher.process and isinstance(network, StockNetwork):
            network = on_clock(
                network, lambda t: teacher.process.time_at(process.log_snr(t)).clamp(0, 1), num_train_timesteps
            )
        return NetworkDenoiser(network, process or teacher.process, meaning)

    return make


def viewed(
    teacher: NetworkDenoiser,
    process: NoiseProcess,
    guidance: tuple[float, float] | None,
    null: Mapping[str, Tensor],
) -> Denoiser:
    """What a matching stage's student learns from: the teacher, guided and on the student's process.

    Args:
        guidance: scales; equal for one that the student is not shown; None for no guidance.
        null: the conditions that stand for none, for one sample.

    Raises:
        ValueError: if guidance is asked for and nothing stands for no condition, or the process goes to noise levels
            that the teacher does not know.
    """
    view: Denoiser = teacher
    if guidance is not None:
        low, high = guidance
        view = Guided(view, null, low if low == high else None)
    return view if process == view.process else Reprocessed(view, process)


def copy_denoiser(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """A student: the same process and prediction, and a copy of the network with weights that can be trained."""
    return NetworkDenoiser(copy_network(denoiser.network), denoiser.process, denoiser.prediction)
