"""Memory of an update: the largest micro batch that fits, and what to do when one does not."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache

from halfstep.data.base import Feed
from halfstep.runtime.failures import OutOfMemory, is_out_of_memory
from halfstep.train.sharding import is_sharded

if TYPE_CHECKING:
    from halfstep.train.engine import StageTrainer


def fit_micro_batch(trainer: "StageTrainer", largest: int | None = None) -> list[int]:
    """Split a rank's share into the largest micro batch that fits into memory; return those that did not.

    Tries the whole share, then powers of two below it, each with the passes of an update of this stage beside the
    optimisers' moments. Weights, buffers, moments and all random numbers stay as they are.

    Args:
        largest: where to begin; the whole share if None.

    Raises:
        OutOfMemory: if not even a single sample fits.
        ValueError: if the weights are spread over processes, which would wait for one that has no memory left.
    """
    if is_sharded(trainer.student.network):
        raise ValueError("micro batches are not tried with sharding full: give engine.micro_batch a number")
    top = min(largest or len(trainer.share), len(trainer.share))
    sizes = [top, *(2**k for k in reversed(range((top - 1).bit_length())))]
    buffers = [(b, b.clone()) for player in trainer.players.values() for b in player.network.buffers()]
    refused: list[int] = []
    for size in sizes:
        trainer.split(size)
        (too_large,) = trainer.processes.agree(int(not _passes_fit(trainer)))
        for player in trainer.players.values():
            player.clear()
            player.recent.forget()
        # Gradients, activations and the place held for moments are free again, for the next try too.
        clear_device_cache(garbage_collection=True)
        if not too_large:
            break
        refused.append(size)
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)
    if len(refused) == len(sizes):
        raise OutOfMemory(does_not_fit(trainer))
    trainer.micro_batch_found = True
    return refused


def _passes_fit(trainer: "StageTrainer") -> bool:
    """Whether two micro batches of each turn go forward and backward: the second finds the gradients of the first
    in memory."""
    try:
        held = [player.place_for_moments() for player in trainer.players.values()]
        first = trainer.update
        feed = Feed(trainer.batches, trainer.places_of, trainer.accelerator.device)
        ahead = list(feed.updates(first, lambda: min(first + 1 + trainer.ahead, trainer.stage.training.num_updates)))
        # Not compiled: torch would recompile for each size and give up after a few, so the size found would then run
        # differently from a resumed run.
        with torch.compiler.set_stance("force_eager"):
            for parts in ahead[0]:
                player = trainer.players[parts[0].place.turn.trains]
                with player.alone(trainer.others(player)), player.unsynced():
                    for part in parts[:2]:
                        trainer.gradient(player, part)
                player.clear()
        del held, ahead
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def does_not_fit(trainer: "StageTrainer") -> str:
    """Return the message for memory that ran out."""
    size, processes = trainer.micro_batch, trainer.accelerator.num_processes
    if size == 1:
        remedy = (
            "turn on engine.gradient_checkpointing, take engine.teacher_precision bf16 or chain.lora_rank, or a "
            "smaller network"
        )
    else:
        # Sizes are looked for without compiling, which may take more.
        auto = "instead of auto" if trainer.micro_batch_found else "or auto, which tries what fits"
        remedy = f"give engine.micro_batch {size // 2}, {auto}; batch and result stay the same"
    return (
        f"out of memory in stage {trainer.stream} at update {trainer.update} with a micro batch of {size} (batch "
        f"{trainer.stage.training.batch_size}{f' over {processes} processes' if processes > 1 else ''}): {remedy}"
    )
