"""Find the largest micro batch that fits in memory, and compose the error message for updates that do not fit."""

from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache

from halfstep.data.base import Feed
from halfstep.runtime.failures import OutOfMemory, is_out_of_memory
from halfstep.train.player import unchanged_buffers
from halfstep.train.sharding import is_sharded, unsynced

if TYPE_CHECKING:
    from halfstep.train.engine import StageTrainer


def fit_micro_batch(trainer: "StageTrainer", largest: int | None = None) -> list[int]:
    """Split a rank's share into the largest micro batches that fit in memory, and return the sizes that did not fit.

    The search tries the whole share first, and then smaller powers of two. Each try runs the forward and backward
    passes of the next update and, if its turns differ, of the last update, with the optimisers' moments in memory.
    Turns always differ if their loss is a new lambda or partial in each call of `Objective.turns`. Updates between
    these two are not tried, even if their turns need more memory. The search changes no weights, buffers, moments or
    random numbers.

    Args:
        largest: the first size to try, or None to start with the whole share.

    Raises:
        OutOfMemory: if not even a single sample fits.
        ValueError: if the weights are sharded, because the other processes would wait for a process that ran out of
            memory.
    """
    if is_sharded(trainer.student.network):
        raise ValueError("engine.micro_batch auto does not work with sharding full. Set engine.micro_batch to a number")
    top = min(largest or len(trainer.share), len(trainer.share))
    sizes = [top, *(2**k for k in reversed(range((top - 1).bit_length())))]
    refused: list[int] = []
    with unchanged_buffers(trainer.players.values()):
        for size in sizes:
            trainer.split(size)
            (too_large,) = trainer.processes.agree(int(not _passes_fit(trainer)))
            for player in trainer.players.values():
                player.clear()
                player.recent.forget()
            # Free gradients, activations and the memory reserved for moments, so that the next try can use it.
            clear_device_cache(garbage_collection=True)
            if not too_large:
                break
            refused.append(size)
    if len(refused) == len(sizes):
        raise OutOfMemory(does_not_fit(trainer))
    trainer.micro_batch_found = True
    return refused


def _passes_fit(trainer: "StageTrainer") -> bool:
    """Return whether the turns of the next and of the last update fit into memory."""
    turns, last = trainer.stage.objective.turns, trainer.stage.training.num_updates - 1
    try:
        held = [player.place_for_moments() for player in trainer.players.values()]
        _try_update(trainer, trainer.update)
        # Later turns may need more memory, for example once the student learns from a critic.
        if turns(last) != turns(trainer.update):
            _try_update(trainer, last)
        del held
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _try_update(trainer: "StageTrainer", update: int) -> None:
    """Run two micro batches of each turn, the second alongside the gradients of the first.

    As during training, the updates that are prepared in advance are in memory.
    """
    end = trainer.stage.training.num_updates
    first = max(trainer.update, min(update, end - 1 - trainer.ahead))
    feed = Feed(trainer.batches, trainer.places_of, trainer.accelerator.device)
    ahead = list(feed.updates(first, lambda: min(first + 1 + trainer.ahead, end)))
    # The networks run uncompiled, because torch would recompile them for each size and give up after a few sizes. A
    # resumed run, which skips this search, would then behave differently.
    with torch.compiler.set_stance("force_eager"):
        for parts in ahead[update - first]:
            player = trainer.players[parts[0].place.turn.trains]
            with player.alone(trainer.players.values()), unsynced(player.wrapped):
                for part in parts[:2]:
                    trainer.gradient(player, part)
            player.clear()


def does_not_fit(trainer: "StageTrainer") -> str:
    """Return the error message for an update that ran out of memory."""
    size, processes = trainer.micro_batch, trainer.accelerator.num_processes
    if size == 1:
        remedy = (
            "Turn on engine.gradient_checkpointing, use engine.teacher_precision bf16 or chain.lora_rank, or choose a "
            "smaller network"
        )
    else:
        # Compiled networks may need more memory than the uncompiled networks that the search runs.
        auto = "instead of auto" if trainer.micro_batch_found else "or auto, which finds a size that fits"
        remedy = f"Set engine.micro_batch to {size // 2}, {auto}. The batch size and the result stay the same"
    return (
        f"out of memory in stage {trainer.stream} at update {trainer.update} with a micro batch of {size} (batch "
        f"{trainer.stage.training.batch_size}{f' over {processes} processes' if processes > 1 else ''}). {remedy}"
    )
