"""The engine, which trains the players of one stage, one update at a time.

The engine does not depend on the objective. An update consists of the objective's turns, in order. Each turn trains one
player. The turn splits the global batch into contiguous parts for processes and micro batches, computes the losses, and
runs one backward pass per micro batch. It then clips the gradient to a global norm, takes one AdamW step and updates
the moving averages. Updates do not wait for the device: statistics are fetched when `window` is called, and a thread
can prepare batches and random numbers (see `Feed`). Networks are compiled once for the whole chain, because the
networks of all stages have the same architecture.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import final

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.door import got
from halfstep.core.draw import Draw, generator_for
from halfstep.data.base import Batches, Fed, Feed, Place
from halfstep.nets import checkpoint_gradients
from halfstep.objectives import STUDENT, Models, Stage
from halfstep.runtime.failures import NonFinite, OutOfMemory, is_out_of_memory
from halfstep.runtime.processes import Processes
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.train.helpers import make_helpers
from halfstep.train.memory import does_not_fit
from halfstep.train.player import EMA, KeptBuffers, Player, compile_networks, network_of, unchanged_buffers
from halfstep.train.recent import in_words
from halfstep.train.settings import Engine
from halfstep.train.sharding import check_sharding, is_sharded, shard, unsynced, whole
from halfstep.train.window import PlayerWindow, Window

State = dict[str, dict[str, Tensor]]
"""The contents of a checkpoint, keyed by file and then by tensor name. The files are "student", "optimizer", "ema" and
"early_end", and, for each helper, "helper-NAME" and "helper-NAME-optimizer"."""


@final
class StageTrainer:
    """The training state of one stage.

    Args:
        student: the model, which is trained in place.
        teacher: the denoiser to learn from, whose weights do not change, or None.
        batches: see `Batches`.
        shape: the shape of one sample.
        seed, stream: with the update and the turn, these form the key of every random number.
        engine: how to use the machine. The micro batch size affects only rounding and dropout masks.
        ahead: number of updates that a thread prepares in advance, as in `Feed`.

    Raises:
        ValueError: if the objective needs a teacher but none is given, a helper contradicts the stage, the global batch
            cannot be split evenly across the processes, a weight is complex, or the networks do not support sharding,
            compilation or gradient checkpointing.
    """

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser | None,
        stage: Stage,
        batches: Batches,
        shape: tuple[int, ...],
        *,
        seed: int,
        stream: str,
        accelerator: Accelerator,
        engine: Engine = Engine(),
        ahead: int = 0,
    ) -> None:
        # The trainer of the previous stage is part of reference cycles, which would keep its memory.
        clear_device_cache(garbage_collection=True)
        training, objective = stage.training, stage.objective
        if objective.needs_teacher and teacher is None:
            raise ValueError(f"stage {stream} learns from a teacher, but none is given. Pass one")
        if training.batch_size % accelerator.num_processes:
            raise ValueError(
                f"a batch of {training.batch_size} cannot be split evenly across {accelerator.num_processes} "
                f"processes. Choose a batch_size that is a multiple of {accelerator.num_processes}"
            )
        check_sharding(engine, accelerator.num_processes)
        self.stage, self.seed, self.stream = stage, seed, stream
        self.accelerator = accelerator
        self.processes = Processes(accelerator, engine.timeout_minutes)
        self.update = 0
        """Number of finished updates."""
        if teacher is not None:
            teacher = teacher.eval().requires_grad_(False)
        if engine.gradient_checkpointing:
            checkpoint_gradients(network_of(student))
        if engine.compile and not any(isinstance(part, NetworkDenoiser) for part in student.modules()):
            raise ValueError(
                f"only the network of a NetworkDenoiser can be compiled, got {got(student)}. Remove --engine.compile"
            )
        sharded = engine.sharding == "full"
        auxiliaries, followers = make_helpers(stage, Models(student, teacher), shape, seed, stream)
        if teacher is not None:
            networks = [part.network for part in teacher.modules() if isinstance(part, NetworkDenoiser)]
            if sharded and networks:
                for network in networks:
                    shard(network, accelerator.device, accelerator.num_processes)
            else:
                teacher = teacher.to(accelerator.device)
        self.players = {
            name: Player(name, model, own, accelerator, engine.optimizer, sharded)
            for name, (model, own) in {STUDENT: (student, training), **auxiliaries}.items()
        }
        for name, follower in followers.items():
            if sharded:
                shard(follower.network, accelerator.device, accelerator.num_processes)
            else:
                follower.network.to(accelerator.device)
            if follower.decay is not None:
                player = self.players[objective.helpers[name].of]  # type: ignore[union-attr]
                player.followed_by.append(EMA(player.network, follower.decay, follower.network))
        if engine.compile:
            for model in (*(player.model for player in self.players.values()), *([] if teacher is None else [teacher])):
                compile_networks(model)
        self._teacher = teacher
        self._copies = {name: follower.model for name, follower in followers.items()}
        self._models = {name: self._models_of(name) for name in self.players}

        share = training.batch_size // accelerator.num_processes
        first = share * accelerator.process_index
        self.share = range(first, first + share)
        self.split(min(engine.set_micro_batch or share, share))

        # The device needs an index, because the feeding thread has its own current device.
        device = torch.empty(0, device=accelerator.device).device
        self.batches, self.ahead = batches, ahead
        self._feed = Feed(batches, self.places_of, device, ahead)
        self._window_losses: list[float] = []
        self._window_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._plateau_at: int | None = None
        self._stop: StopSignal | None = None
        self._window_start = 0
        self._waited = 0.0
        self.seconds = 0.0
        """The stage's training time in seconds, up to the last window."""
        self._clock = time.perf_counter()

    @property
    def student(self) -> Player:
        """The player whose model is the result of the stage."""
        return self.players[STUDENT]

    def _models_of(self, trains: str) -> Models:
        """Return the models for a turn of this player, which is the only player that is wrapped in DDP."""
        shown = {name: p.trained if name == trains else p.called for name, p in self.players.items()}
        student = shown.pop(STUDENT)
        assert isinstance(student, Denoiser)
        return Models(student, self._teacher, {**shown, **self._copies})

    def split(self, micro_batch: int) -> None:
        """Split this rank's share of the batch into micro batches of `micro_batch` samples."""
        self.micro_batch = micro_batch
        first, end = self.share.start, self.share.stop
        self.micro_batch_found = False
        self._places = [range(a, min(a + micro_batch, end)) for a in range(first, end, micro_batch)]

    def run(self, stop: StopSignal | None = None) -> Iterator[int]:
        """Train to the end of the stage, and yield the number of finished updates after each update.

        Args:
            stop: a signal that ends the iteration. An update that has not changed the weights yet is abandoned, so the
                state, including buffers, is that of the previous update. With several processes, the update is finished
                instead, and all processes end together.

        Raises:
            OutOfMemory: if an update does not fit in memory.
        """
        self._stop = stop if self.accelerator.num_processes == 1 else None
        self._clock = time.perf_counter()
        feed = self._feed.updates(self.update, lambda: self.last_update)
        buffers = KeptBuffers(() if self._stop is None else self.players.values())
        while True:
            buffers.keep()
            try:
                with contextlib.nullcontext() if self._stop is None else self._stop.at_once():
                    waits_since = time.perf_counter()
                    fed = next(feed, None)
                    self._waited += time.perf_counter() - waits_since
                if fed is None:
                    return
                self._one_update(fed)
            except Interrupted:
                for player in self.players.values():
                    player.clear()
                # The forward passes of the abandoned update have changed buffers, such as BatchNorm statistics.
                buffers.restore()
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # The new exception refers to the first one, whose frames would keep the memory alive.
                error.__traceback__ = None
                raise OutOfMemory(does_not_fit(self)) from None
            yield self.update

    def places_of(self, update: int) -> Iterator[list[Place]]:
        """Yield this rank's micro batches in an update, turn by turn, as positions in the batch with their random
        numbers."""
        for number, turn in enumerate(self.stage.objective.turns(update)):
            if turn.trains not in self.players:
                raise ValueError(
                    f"turn {number} of update {update} trains {turn.trains!r}, but stage {self.stream} has the players "
                    f"{', '.join(self.players)}"
                )
            stream = self.stream if number == 0 else f"{self.stream}, turn {number}"
            yield [
                Place(number, turn, Draw(self.seed, stream, update, self.stage.training.batch_size, places))
                for places in self._places
            ]

    def _one_update(self, fed: list[list[Fed]]) -> None:
        rate_share = self.rate_share(self.update)
        for number, parts in enumerate(fed):
            turn, draw = parts[0].place.turn, parts[0].place.draw
            player = self.players[turn.trains]
            self._seed_layers(draw)
            # An update can be abandoned at any point before the first optimiser step.
            may_stop = contextlib.nullcontext() if self._stop is None or number else self._stop.at_once()
            with may_stop, player.alone(self.players.values()):
                if player.needs_settling(self.processes.count):
                    with unchanged_buffers(self.players.values()):
                        self.gradient(player, parts[0])
                    player.clear()
                    player.recent.forget()
                    # The repeated pass must draw the same dropout masks.
                    self._seed_layers(draw)
                total = torch.zeros((), device=self.accelerator.device)
                for part in parts:
                    # Gradients are synchronised once per turn, with the turn's last micro batch.
                    with contextlib.nullcontext() if part is parts[-1] else unsynced(player.wrapped):
                        total += self.gradient(player, part)
            player.step(self.update, player.training.rate_at(self.update) * rate_share, total)
            if player is self.student and self._is_watched and self._plateau_at is None:
                self._window_sum += total.to(self._window_sum)
        self.update += 1
        self._end_early()

    def _seed_layers(self, draw: Draw) -> None:
        """Seed the device's global generator, which random layers (dropout) use.

        torch.manual_seed would seed all devices, which takes a millisecond.
        """
        key = (draw.seed, draw.stream, draw.update, self.accelerator.process_index)
        seed = generator_for(*key).initial_seed()
        torch.default_generator.manual_seed(seed)
        if self.accelerator.device.type != "cpu":
            torch.get_device_module(self.accelerator.device).manual_seed(seed)

    def gradient(self, player: Player, part: Fed) -> Tensor:
        """Add the gradient of a micro batch, and return the micro batch's contribution to the mean loss."""
        turn, draw = part.place.turn, part.place.draw
        with self.accelerator.autocast():
            losses = turn.loss(self._models[player.name], part.batch, draw)
        return player.backward(self.update, draw.places, losses, part.batch.x0)

    @property
    def _is_watched(self) -> bool:
        return bool(self.stage.training.early_end.patience) and self.stage.objective.loss_falls

    def _end_early(self) -> None:
        rule = self.stage.training.early_end
        if not self._is_watched or self._plateau_at is not None or self.update % rule.window:
            return
        (mean,) = self.processes.mean(float(self._window_sum))
        self._window_losses.append(mean / rule.window)
        self._window_sum.zero_()
        if rule.has_stopped_falling(self._window_losses):
            self._plateau_at = self.update

    @property
    def last_update(self) -> int:
        """The number of updates after which the stage ends: its budget, or fewer once the loss has stopped falling."""
        training = self.stage.training
        if self._plateau_at is None:
            return training.num_updates
        return min(training.num_updates, self._plateau_at + training.early_end.window)

    def rate_share(self, update: int) -> float:
        """Return the factor for all learning rates: 1 until the loss stops falling, then decaying to 0."""
        if self._plateau_at is None or update < self._plateau_at:
            return 1.0
        return 1 - (update - self._plateau_at) / (self.last_update - self._plateau_at)

    def check_finite(self) -> None:
        """Raise NonFinite if any loss or gradient norm so far was not finite.

        Raises:
            NonFinite: the error contains the stage, the first bad update, and the statistics of that update's batch.
        """
        firsts = [int(player.first_bad) for player in self.players.values()]
        # Each rank has only its own losses, so all ranks agree on the earliest bad update that any rank has found.
        late = self.processes.agree(*(-first if first >= 0 else -(2**62) for first in firsts))
        first = -max(late)
        if first == 2**62:
            return
        # A diverging player breaks the other players in later turns, so report the player that diverged first.
        broken = {name for name, number in zip(self.players, late, strict=True) if -number == first}
        name = next(turn.trains for turn in self.stage.objective.turns(first) if turn.trains in broken)
        player = self.players[name]
        statistics = player.recent.statistics(first)
        # All ranks have the bad gradient, but only some have bad losses. One of these ranks reports its statistics.
        (seen,) = self.processes.agree(self.processes.index + 1 if statistics.get("not_finite") else 0)
        statistics = self.processes.told_by(max(0, seen - 1), statistics)
        share = ", on one rank" if self.processes.count > 1 else ""
        whose = "" if player is self.student else f" of {name}"
        raise NonFinite(
            f"the loss{whose} or its gradient was not finite in stage {self.stream} at update {first} "
            f"({in_words(statistics)}{share}). Lower the learning rate ({player.training.learning_rate:g}), lengthen "
            "the warm-up, or use precision float32",
            {
                "stage": self.stream,
                "learning_rate": player.training.rate_at(first) * self.rate_share(first),
                **({} if player is self.student else {"network": name}),
                **statistics,
            },
        )

    def window(self) -> Window:
        """Return the statistics since the last call. This waits for the device.

        Raises:
            NonFinite: see `check_finite`.
        """
        self.check_finite()
        count, last = max(1, self.update - self._window_start), max(0, self.update - 1)
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self.seconds += elapsed
        found = {}
        for name, player in self.players.items():
            loss_sum, norm_sum, turns = player.take_sums()
            (loss_sum,) = self.processes.mean(loss_sum)
            found[name] = PlayerWindow(loss_sum / (turns or math.nan), norm_sum / (turns or math.nan))
        student = found.pop(STUDENT)
        # All ranks wait for the slowest rank.
        (waited,) = self.processes.agree(int(1000 * min(1.0, self._waited / max(elapsed, 1e-9))) if self.ahead else 0)
        window = Window(
            update=self.update,
            **student._asdict(),
            learning_rate=self.stage.training.rate_at(last) * self.rate_share(last),
            samples_per_second=count * self.stage.training.batch_size / max(elapsed, 1e-9),
            seconds=self.seconds,
            data_share=waited / 1000,
            helpers=found,
        )
        self._waited = 0.0
        self._window_start = self.update
        return window

    def pause(self, seconds: float) -> None:
        """Exclude time that was not spent on training, such as saving a checkpoint, from the statistics."""
        self._clock += seconds

    def state(self) -> State:
        """Return everything except `update` and `seconds` that is needed to resume with any number of processes.

        All ranks must call this. Rank 0 gets copies on the CPU, and the other ranks get an empty dictionary.
        """
        sums = self.processes.each(float(self._window_sum))
        if not (self.processes.is_main or is_sharded(self.student.network)):
            return {}
        state: State = {
            _file_of(name, part): tensors
            for name, player in self.players.items()
            for part, tensors in player.state().items()
        }
        if self._is_watched:
            state["early_end"] = {
                "window_losses": torch.tensor(self._window_losses, dtype=torch.float64),
                "window_sum": torch.tensor(sums, dtype=torch.float64),
                "plateau_at": torch.tensor(-1 if self._plateau_at is None else self._plateau_at),
            }
        held: State = {part: {} for part in state}
        for part, tensors in state.items():
            for name, value in tensors.items():
                full = whole(value.detach())
                if self.processes.is_main:
                    # Even with a GPU, the moments of a paged optimiser are on the CPU.
                    held[part][name] = (
                        full.cpu().contiguous()
                        if full.device.type != "cpu"
                        else full.clone(memory_format=torch.contiguous_format)
                    )
        return held if self.processes.is_main else {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], update: int, seconds: float) -> None:
        """Restore a state that `state` returned after `update` updates and `seconds` seconds of training."""
        turns = [turn.trains for number in range(update) for turn in self.stage.objective.turns(number)]
        for name, player in self.players.items():
            own = {part: state[_file_of(name, part)] for part in player.parts}
            player.load_state(own, turns.count(name))
        if self._is_watched:
            held = state["early_end"]
            self._window_losses = held["window_losses"].tolist()
            sums = held["window_sum"].reshape(-1)
            # If the number of processes has changed, only the mean carries over.
            mine = sums[self.processes.index] if len(sums) == self.processes.count else sums.mean()
            self._window_sum.copy_(mine)
            self._plateau_at = None if int(held["plateau_at"]) < 0 else int(held["plateau_at"])
        self.update, self.seconds, self._window_start = update, seconds, update

    def finish(self) -> Denoiser:
        """Return the stage's result: the unwrapped student in evaluation mode, with EMA weights if it has any."""
        result = self.student.finish()
        assert isinstance(result, Denoiser)
        # accelerate would otherwise retain the networks and optimiser moments of all stages.
        self.accelerator._models.clear()
        self.accelerator._optimizers.clear()
        return result


def _file_of(player: str, part: str) -> str:
    """Return the name of the file in a checkpoint that contains the given part of a player's state."""
    if player == STUDENT:
        return STUDENT if part == "network" else part
    return f"helper-{player}" if part == "network" else f"helper-{player}-{part}"
