"""The engine: trains the student of one stage, one update at a time.

It never learns which objective it runs. An update is: the global batch split over processes and micro batches by place,
the objective's losses, one backward pass for each, the gradient clipped to a global norm, one AdamW step, one step of
the moving average. Nothing in it waits for the device; statistics are fetched when `window` is called. What it needs
from the host can be made ahead (`feed`), and the networks can be compiled: once for the whole chain, since the networks
of all stages are of one architecture.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.draw import Draw, generator_for
from halfstep.nets import load_own_state, own_state, set_dropout, trainable
from halfstep.objectives import Batch, Models, Stage
from halfstep.runtime.failures import NonFinite, OutOfMemory, is_out_of_memory
from halfstep.runtime.processes import TIMEOUT_MINUTES, Processes
from halfstep.runtime.stop import Interrupted, StopSignal, at_once
from halfstep.train.ema import EMA
from halfstep.train.feed import Batches, Fed, Feed
from halfstep.train.optimizers import flatten_state, make_optimizer
from halfstep.train.recent import Recent, in_words
from halfstep.train.sharding import SHARDINGS, fill, is_sharded, load_whole, shard, skeleton, spread_as, unsynced, whole

State = dict[str, dict[str, Tensor]]
"""What a checkpoint holds: tensors by name, for "student", "ema", "optimizer" and "early_end"."""


@final
@dataclass(frozen=True)
class Window:
    """Statistics of the updates since the last window."""

    update: int
    """Updates done."""
    loss: float
    """Mean over the window's updates."""
    grad_norm: float
    """Mean of the global gradient norm before clipping."""
    learning_rate: float
    """Of the last update."""
    samples_per_second: float
    seconds: float
    """Training time of the stage so far, over all restarts."""
    data_share: float
    """Share of the window's time in which an update waited for what is made ahead of it, of the process that waited
    most; 0 where nothing is made ahead."""


@final
class StageTrainer:
    """The training state of one stage.

    Args:
        student: what is trained, in place.
        teacher: the denoiser to learn from, or None; it is not changed.
        stage: objective and budget.
        batches: see `Batches`.
        seed, stream: with the update, the key of every random number.
        micro_batch: samples that go through the network at once; None for a process' whole share. The result does
            not depend on it beyond rounding, but for the masks of dropout.
        optimizer: one of `OPTIMIZERS`.
        ahead: updates whose batches and random numbers a thread makes ready, as `Feed`'s.
        compiled: whether the networks are compiled.
        sharding: "full" spreads the weights of student and teacher, both in place, over the processes.
        timeout_minutes: how long another process is waited for.

    Raises:
        ValueError: if the objective needs a teacher and there is none, the global batch cannot be split evenly over
            the processes, or there is nothing to shard over or no way to.
    """

    def __init__(
        self,
        student: NetworkDenoiser,
        teacher: Denoiser | None,
        stage: Stage,
        batches: Batches,
        *,
        seed: int,
        stream: str,
        accelerator: Accelerator,
        micro_batch: int | None = None,
        optimizer: str = "adamw",
        ahead: int = 0,
        compiled: bool = False,
        sharding: str = "none",
        timeout_minutes: float = TIMEOUT_MINUTES,
    ) -> None:
        if stage.objective.needs_teacher and teacher is None:
            raise ValueError(f"stage {stream} learns from a teacher, and there is none")
        if stage.batch_size % accelerator.num_processes:
            raise ValueError(
                f"a batch of {stage.batch_size} cannot be split evenly over {accelerator.num_processes} processes"
            )
        _check_sharding(sharding, accelerator, optimizer, compiled)
        self.stage, self.seed, self.stream = stage, seed, stream
        self.accelerator = accelerator
        self.processes = Processes(accelerator, timeout_minutes)
        self.update = 0
        """Updates done."""
        self._plain = student
        set_dropout(student.network, stage.dropout)
        student.network.train()
        if teacher is not None:
            teacher = teacher.eval().requires_grad_(False)
        self._skeleton: torch.nn.Module | None = None
        if sharding == "full":
            self._skeleton = skeleton(student.network)
            asked = [] if teacher is None else [d for d in teacher.modules() if isinstance(d, NetworkDenoiser)]
            for network in (student.network, *(denoiser.network for denoiser in asked)):
                shard(network, accelerator.device, accelerator.num_processes)
        elif teacher is not None:
            teacher = teacher.to(accelerator.device)
        made = make_optimizer(optimizer, [parameter for _, parameter in trainable(student.network)], stage)
        if sharding == "full":
            self._network, self._optimizer = student.network, made
        else:
            with warnings.catch_warnings():
                # Of DDP's argument broadcast_buffers, whose successor accelerate does not pass on.
                warnings.simplefilter("ignore", FutureWarning)
                self._network, self._optimizer = accelerator.prepare(student.network, made)
            # What enters autocast here is the engine. accelerate's own wrapper would make the network another to the
            # compiler in each stage, and once more where it is taken off.
            accelerator.unwrap_model(self._network, keep_fp32_wrapper=False)
        self._ema = EMA(student.network, stage.ema_decay) if stage.ema_decay else None
        if compiled:
            compile_networks(student)
            if teacher is not None:
                compile_networks(teacher)
        self._models = Models(NetworkDenoiser(self._network, student.process, student.prediction), teacher)

        share = stage.batch_size // accelerator.num_processes
        first = share * accelerator.process_index
        self._share = range(first, first + share)
        self.split(min(micro_batch or share, share))

        device = accelerator.device
        self._batches, self._ahead = batches, ahead
        self._feed = Feed(batches, self._draws, device, ahead)
        self._settled = False
        self._window_losses: list[float] = []
        self._window_sum = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        self._plateau_at: int | None = None
        self._loss_sum = torch.zeros((), device=device)
        self._norm_sum = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._recent = Recent()
        self._stop: StopSignal | None = None
        self._window_start = 0
        self._waited = 0.0
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def split(self, micro_batch: int) -> None:
        """Sends a process' share of the batch through the network `micro_batch` samples at a time."""
        self.micro_batch = micro_batch
        first, end = self._share.start, self._share.stop
        self.micro_batch_found = False
        self._places = [range(a, min(a + micro_batch, end)) for a in range(first, end, micro_batch)]

    def fit_micro_batch(self, largest: int | None = None) -> list[int]:
        """Splits a process' share into the largest micro batch that fits into memory, and returns those that did not.

        The whole share is tried, then powers of two below it, each with the passes of an update of this stage beside
        the optimiser's moments. Weights, buffers, moments and all random numbers stay as they are.

        Args:
            largest: where to begin; the whole share if None.

        Raises:
            OutOfMemory: if not even a single sample fits.
            ValueError: if the weights are spread over processes, which would wait for one that has no memory left.
        """
        if self._skeleton is not None:
            raise ValueError("micro batches are not tried with sharding full: give engine.micro_batch a number")
        top = min(largest or len(self._share), len(self._share))
        sizes = [top, *(2**k for k in reversed(range((top - 1).bit_length())))]
        buffers = [(buffer, buffer.clone()) for buffer in self._plain_network().buffers()]
        refused: list[int] = []
        for size in sizes:
            self.split(size)
            (too_large,) = self.processes.agree(int(not self._passes_fit()))
            self._optimizer.zero_grad()
            self._recent.forget()
            # Gradients, activations and the place held for moments are free again, for the next try too.
            clear_device_cache(garbage_collection=True)
            if not too_large:
                break
            refused.append(size)
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        if len(refused) == len(sizes):
            raise OutOfMemory(self._does_not_fit())
        self.micro_batch_found = True
        return refused

    def _passes_fit(self) -> bool:
        """Whether two micro batches go forward and backward: the second finds the gradients of the first in memory."""
        try:
            held = [] if self._optimizer.state_dict()["state"] else self._place_for_moments()
            first = self.update
            feed = Feed(self._batches, self._draws, self.accelerator.device)
            ahead = list(feed.updates(first, lambda: min(first + 1 + self._ahead, self.stage.num_updates)))
            # Not compiled: each size would be compiled anew, and after some torch compiles no more, so that the size
            # that is found would run otherwise than in a run that is resumed with it.
            with unsynced(self._network), torch.compiler.set_stance("force_eager"):
                for part in ahead[0][:2]:
                    self._gradient(part.draw, part.batch)
            del held, ahead
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _place_for_moments(self) -> list[Tensor]:
        """As much memory as the optimiser will take at its first step."""
        return [torch.empty_like(p) for _, p in trainable(self._plain_network()) for _ in range(2)]

    def _does_not_fit(self) -> str:
        """What is said when memory ran out."""
        size, processes = self.micro_batch, self.accelerator.num_processes
        if size == 1:
            remedy = (
                "turn on engine.gradient_checkpointing, take engine.teacher_precision bf16 or chain.lora_rank, or a "
                "smaller network"
            )
        else:
            # Sizes are looked for without compiling, which may take more.
            auto = "in the place of auto" if self.micro_batch_found else "or auto, which tries what fits"
            remedy = f"give engine.micro_batch {size // 2}, {auto}; batch and result stay the same"
        return (
            f"out of memory in stage {self.stream} at update {self.update} with a micro batch of {size} (batch "
            f"{self.stage.batch_size}{f' over {processes} processes' if processes > 1 else ''}): {remedy}"
        )

    def run(self, stop: StopSignal | None = None) -> Iterator[int]:
        """Trains to the end of the stage, yielding the number of updates done after each.

        Args:
            stop: a signal leaves an update that has not changed the weights yet, and ends the iteration: the state is
                that of the update before. (On one process; several end after an update, together.)

        Raises:
            OutOfMemory: if an update does not fit into memory.
        """
        self._stop = stop if self.accelerator.num_processes == 1 else None
        self._clock = time.perf_counter()
        feed = self._feed.updates(self.update, lambda: self.last_update)
        while True:
            try:
                with at_once(self._stop):
                    asked_at = time.perf_counter()
                    fed = next(feed, None)
                    self._waited += time.perf_counter() - asked_at
                if fed is None:
                    return
                self._settle(fed)
                self._one_update(fed)
            except Interrupted:
                self._optimizer.zero_grad()
                return
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # What holds the memory hangs on the exception's frames.
                raise OutOfMemory(self._does_not_fit()) from None
            yield self.update

    def _draws(self, update: int) -> Iterator[Draw]:
        """The random numbers of this process' micro batches of an update."""
        for places in self._places:
            yield Draw(self.seed, self.stream, update, self.stage.batch_size, places)

    def _one_update(self, fed: list[Fed]) -> None:
        stage, accelerator = self.stage, self.accelerator
        # Layers with randomness of their own (dropout) draw from the device's global generator. torch.manual_seed would
        # seed those of all devices that there could be, which takes a millisecond.
        seed = generator_for(self.seed, self.stream, self.update, accelerator.process_index).initial_seed()
        torch.default_generator.manual_seed(seed)
        if accelerator.device.type != "cpu":
            torch.get_device_module(accelerator.device).manual_seed(seed)
        rate = self.learning_rate(self.update)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros_like(self._loss_sum)
        # Until the optimiser's step an update can be left at any point.
        with at_once(self._stop):
            for part in fed:
                # Gradients are sent once an update, with its last micro batch.
                with contextlib.nullcontext() if part is fed[-1] else unsynced(self._network):
                    total += self._gradient(part.draw, part.batch)
        norm = whole(accelerator.clip_grad_norm_(self._network.parameters(), stage.grad_clip))
        self._optimizer.step()
        self._optimizer.zero_grad()
        bad = ~(torch.isfinite(total) & torch.isfinite(norm))
        self._first_bad = torch.where(bad & (self._first_bad < 0), self.update, self._first_bad)
        self._loss_sum += total
        self._norm_sum += norm
        self._recent.norm(self.update, norm)
        self.update += 1
        self._watch_for_early_end(total)
        if self._ema is not None:
            self._ema.update(self.update)

    def _gradient(self, draw: Draw, batch: Batch) -> Tensor:
        """Adds the gradient of a micro batch; returns its part of the mean loss."""
        stage, accelerator = self.stage, self.accelerator
        with accelerator.autocast():
            losses = stage.objective.loss(self._models, batch, draw)
        self._recent.losses(self.update, draw.places, losses, batch.x0)
        # Gradients are averaged over processes; each process' share of the mean is summed here.
        loss: Tensor = losses.loss.sum() * (accelerator.num_processes / stage.batch_size)
        accelerator.backward(loss)
        return loss.detach()

    def _settle(self, fed: list[Fed]) -> None:
        """Lets DDP put its messages in order before the first update that counts.

        It does so after its first backward pass, and in which order more than two numbers are added depends on their
        place in a message: a resumed run would differ from the uncut one in its first update.
        """
        if not self._settled and isinstance(self._network, DistributedDataParallel) and self.processes.count > 2:
            self._gradient(next(self._draws(self.update)), fed[0].batch)
            self._optimizer.zero_grad()
            self._recent.forget()
        self._settled = True

    def _watch_for_early_end(self, loss: Tensor) -> None:
        rule = self.stage.early_end
        if rule is None or self._plateau_at is not None:
            return
        self._window_sum += loss.to(self._window_sum)
        if self.update % rule.window:
            return
        (mean,) = self.processes.mean(float(self._window_sum))
        self._window_losses.append(mean / rule.window)
        self._window_sum.zero_()
        if rule.has_stopped_falling(self._window_losses):
            self._plateau_at = self.update

    @property
    def last_update(self) -> int:
        """Updates after which the stage ends, as far as is known now: its budget, or less once the loss has stopped
        falling."""
        rule = self.stage.early_end
        if rule is None or self._plateau_at is None:
            return self.stage.num_updates
        return min(self.stage.num_updates, self._plateau_at + rule.window)

    def learning_rate(self, update: int) -> float:
        """The rate of update `update` (from 0): the stage's, falling to 0 after a plateau."""
        rate = self.stage.learning_rate_at(update)
        if self._plateau_at is None or update < self._plateau_at:
            return rate
        return rate * (1 - (update - self._plateau_at) / (self.last_update - self._plateau_at))

    def check_finite(self) -> None:
        """Passes if every loss and gradient norm so far was finite.

        Raises:
            NonFinite: naming the stage, the first update that was not, and the statistics of its batch.
        """
        first = int(self._first_bad)
        # Each process sees its own share of the losses: the earliest that any has seen, and on all of them.
        (late,) = self.processes.agree(-first if first >= 0 else -(2**62))
        first = -late
        if first < 2**62:
            statistics = self._recent.statistics(first)
            # The gradient is broken on all, the losses on some: one of those tells what it has seen.
            (seen,) = self.processes.agree(self.processes.index + 1 if statistics.get("not_finite") else 0)
            statistics = self.processes.told_by(max(0, seen - 1), statistics)
            share = self.processes.count > 1
            raise NonFinite(
                f"the loss or its gradient was not finite in stage {self.stream} at update {first} "
                f"({in_words(statistics)}{', of one process' if share else ''}): lower the "
                f"learning rate ({self.stage.learning_rate:g}), lengthen the warm-up, or use precision float32",
                {"stage": self.stream, "learning_rate": self.learning_rate(first), **statistics},
            )

    def window(self) -> Window:
        """Statistics since the last call; this waits for the device.

        Raises:
            NonFinite: see `check_finite`.
        """
        self.check_finite()
        count = max(1, self.update - self._window_start)
        now = time.perf_counter()
        elapsed, self._clock = now - self._clock, now
        self._seconds += elapsed
        (loss_sum,) = self.processes.mean(float(self._loss_sum))
        # The others wait for the one that waits.
        (waited,) = self.processes.agree(int(1000 * min(1.0, self._waited / max(elapsed, 1e-9))) if self._ahead else 0)
        window = Window(
            update=self.update,
            loss=loss_sum / count,
            grad_norm=float(self._norm_sum) / count,
            learning_rate=self.learning_rate(max(0, self.update - 1)),
            samples_per_second=count * self.stage.batch_size / max(elapsed, 1e-9),
            seconds=self._seconds,
            data_share=waited / 1000,
        )
        self._waited = 0.0
        self._loss_sum.zero_()
        self._norm_sum.zero_()
        self._window_start = self.update
        self._recent.forget()
        return window

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent training (saving a checkpoint) out of the statistics."""
        self._clock += seconds

    @property
    def seconds(self) -> float:
        """Training time of the stage up to the last window."""
        return self._seconds

    def state(self) -> State:
        """All that a resumed run needs beyond `update` and `seconds`, in one form for any number of processes.

        Every process must ask; the first gets copies of all, on the CPU, and the others nothing.
        """
        sums = self.processes.each(float(self._window_sum))
        if not (self.processes.is_main or is_sharded(self._network)):
            return {}
        network = self._plain_network()
        names = [name for name, _ in trainable(network)]
        moments: dict[str, Tensor] = {}
        for index, entry in self._optimizer.state_dict()["state"].items():
            for key, value in flatten_state(entry):
                moments[f"{key}.{names[index]}"] = value
        state: State = {"student": own_state(network), "optimizer": moments}
        if self._ema is not None:
            state["ema"] = self._ema.state_dict()
        if self.stage.early_end is not None:
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
                    # Not by the trainer's device: the moments of a paged optimiser lie on the CPU beside a GPU.
                    held[part][name] = (
                        full.cpu().contiguous()
                        if full.device.type != "cpu"
                        else full.clone(memory_format=torch.contiguous_format)
                    )
        return held if self.processes.is_main else {}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], update: int, seconds: float) -> None:
        """Continues from what `state` returned after `update` updates and `seconds` of training."""
        network = self._plain_network()
        (load_whole if is_sharded(network) else load_own_state)(network, state["student"])
        parameters = trainable(network)
        index_of = {name: index for index, (name, _) in enumerate(parameters)}
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state["optimizer"].items():
            kind, name = key.split(".", 1)
            parameter = parameters[index_of[name]][1]
            if is_sharded(network):
                value = spread_as(value, parameter) if value.shape == parameter.shape else value
            elif value.shape == parameter.shape:
                # A fused optimiser walks through memory, so moments must lie there as their weights do, which a file
                # does not tell: on a GPU, weights of convolutions have their channels last.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            entry = entries.setdefault(index_of[name], {})
            *groups, last = kind.split("/")
            for group in groups:
                entry = entry.setdefault(group, {})
            entry[last] = value
        held_groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": held_groups})
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])
        if self.stage.early_end is not None:
            held = state["early_end"]
            self._window_losses = held["window_losses"].tolist()
            sums = held["window_sum"].reshape(-1)
            # Of another number of processes, only the mean goes on.
            own = sums[self.processes.index] if len(sums) == self.processes.count else sums.mean()
            self._window_sum.copy_(own)
            self._plateau_at = None if int(held["plateau_at"]) < 0 else int(held["plateau_at"])
        self.update, self._seconds, self._window_start = update, seconds, update

    def finish(self) -> NetworkDenoiser:
        """The stage's result: the student with the moving average if there is one, unwrapped, in evaluation mode."""
        network = self._plain_network()
        if self._skeleton is not None:
            if self._ema is not None:
                load_whole(network, {name: whole(value) for name, value in self._ema.state_dict().items()})
            fill(self._skeleton, network)
            network = self._skeleton
        elif self._ema is not None:
            load_own_state(network, self._ema.state_dict())
        network.eval()
        return NetworkDenoiser(network, self._plain.process, self._plain.prediction)

    def _plain_network(self) -> torch.nn.Module:
        network: torch.nn.Module = self.accelerator.unwrap_model(self._network, keep_fp32_wrapper=False)
        return network


def compile_networks(denoiser: Denoiser) -> None:
    """Lets torch compile each network of the denoiser, in place, at its first call.

    The code that it makes is kept for the class of the network, with the weights as its arguments: the networks of the
    next stage find it there. It is made for one shape of the batch: code for any, which torch would make at the second
    shape, is slower, and rounds otherwise in a run that was resumed after that than in the uncut one.
    """
    for part in denoiser.modules():
        if isinstance(part, NetworkDenoiser) and isinstance(part.network, torch.nn.Module):
            part.network.compile(dynamic=False)


def _check_sharding(sharding: str, accelerator: Accelerator, optimizer: str, compiled: bool) -> None:
    if sharding not in SHARDINGS:
        raise ValueError(f"sharding must be one of {', '.join(SHARDINGS)}, got {sharding!r}")
    if sharding == "none":
        return
    if accelerator.num_processes == 1:
        raise ValueError(
            "sharding full spreads weights over processes, and this is the only one: start several with torchrun or "
            "accelerate launch, or leave --engine.sharding out"
        )
    if compiled:
        raise ValueError("networks that are sharded are not compiled here: leave out --engine.compile or the sharding")
    if optimizer != "adamw":
        raise ValueError(
            f"the optimizer {optimizer} cannot be sharded, which makes moments smaller by itself: use adamw, or leave "
            "--engine.sharding out"
        )
