"""The engine: trains the student of one stage, one update at a time.

It never learns which objective it runs. An update is: the global batch split over processes and micro batches by place,
the objective's losses, one backward pass for each, the gradient clipped to a global norm, one AdamW step, one step of
the moving average. Nothing in it waits for the device; statistics are fetched when `window` is called. What it needs
from the host can be made ahead (`feed`), and the networks can be compiled: once for the whole chain, since the networks
of all stages are of one architecture.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from halfstep.core.denoiser import Denoiser, NetworkDenoiser
from halfstep.core.draw import Draw, generator_for
from halfstep.nets import copy_network, load_own_state, own_state, set_dropout, trainable
from halfstep.objectives import Models, Stage
from halfstep.train.ema import EMA
from halfstep.train.feed import Batches, Fed, Feed

State = dict[str, dict[str, Tensor]]
"""What a checkpoint holds: tensors by name, for "student", "ema", "optimizer" and "early_end"."""


class NonFinite(RuntimeError):
    """The loss or the gradient was not a finite number; the message says where and what to do."""


def make_accelerator(precision: str = "float32", cpu: bool = False) -> Accelerator:
    """An accelerator for this process: "float32", or "bf16" for bfloat16 autocast over float32 weights.

    Raises:
        ValueError: if the precision is neither.
    """
    modes = {"float32": "no", "bf16": "bf16"}
    if precision not in modes:
        raise ValueError(f"precision must be one of {', '.join(modes)}, got {precision!r}")
    # accelerate keeps its settings for the whole process; two runs in one process may differ in them.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(mixed_precision=modes[precision], cpu=cpu)


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
            not depend on it beyond rounding.
        optimizer: one of `OPTIMIZERS`.
        ahead: updates whose batches and random numbers a thread makes ready, as `Feed`'s.
        compiled: whether the networks are compiled.

    Raises:
        ValueError: if the objective needs a teacher and there is none, or the global batch cannot be split evenly
            over the processes.
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
    ) -> None:
        if stage.objective.needs_teacher and teacher is None:
            raise ValueError(f"stage {stream} learns from a teacher, and there is none")
        if stage.batch_size % accelerator.num_processes:
            raise ValueError(
                f"a batch of {stage.batch_size} cannot be split evenly over {accelerator.num_processes} processes"
            )
        self.stage, self.seed, self.stream = stage, seed, stream
        self.accelerator = accelerator
        self.update = 0
        """Updates done."""
        self._plain = student
        set_dropout(student.network, stage.dropout)
        student.network.train()
        made = make_optimizer(optimizer, [parameter for _, parameter in trainable(student.network)], stage)
        self._network, self._optimizer = accelerator.prepare(student.network, made)
        self._ema = EMA(student.network, stage.ema_decay) if stage.ema_decay else None
        if teacher is not None:
            teacher = teacher.to(accelerator.device).eval().requires_grad_(False)
        if compiled:
            compile_networks(student)
            if teacher is not None:
                compile_networks(teacher)
        self._models = Models(NetworkDenoiser(self._network, student.process, student.prediction), teacher)

        share = stage.batch_size // accelerator.num_processes
        first = share * accelerator.process_index
        size = micro_batch or share
        self._places = [range(a, min(a + size, first + share)) for a in range(first, first + share, size)]

        device = accelerator.device
        self._feed = Feed(batches, self._draws, device, ahead)
        self._window_losses: list[float] = []
        self._window_sum = torch.zeros((), dtype=torch.float64, device=device if device.type != "mps" else "cpu")
        self._plateau_at: int | None = None
        self._loss_sum = torch.zeros((), device=device)
        self._norm_sum = torch.zeros((), device=device)
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._window_start = 0
        self._seconds = 0.0
        self._clock = time.perf_counter()

    def run(self) -> Iterator[int]:
        """Trains to the end of the stage, yielding the number of updates done after each."""
        self._clock = time.perf_counter()
        for fed in self._feed.updates(self.update, lambda: self.last_update):
            self._one_update(fed)
            yield self.update

    def _draws(self, update: int) -> Iterator[Draw]:
        """The random numbers of this process' micro batches of an update."""
        for places in self._places:
            yield Draw(self.seed, self.stream, update, self.stage.batch_size, places)

    def _one_update(self, fed: list[Fed]) -> None:
        stage, accelerator = self.stage, self.accelerator
        # Layers with randomness of their own (dropout) draw from the global generator.
        torch.manual_seed(generator_for(self.seed, self.stream, self.update, accelerator.process_index).initial_seed())
        rate = self.learning_rate(self.update)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros_like(self._loss_sum)
        for draw, batch in fed:
            with accelerator.autocast():
                losses = stage.objective.loss(self._models, batch, draw)
            # DDP averages gradients over processes; each process' share of the mean is summed here.
            loss = losses.loss.sum() * (accelerator.num_processes / stage.batch_size)
            accelerator.backward(loss)
            total += loss.detach()
        norm = accelerator.clip_grad_norm_(self._network.parameters(), stage.grad_clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        bad = ~(torch.isfinite(total) & torch.isfinite(norm))
        self._first_bad = torch.where(bad & (self._first_bad < 0), self.update, self._first_bad)
        self._loss_sum += total
        self._norm_sum += norm
        self.update += 1
        self._watch_for_early_end(total)
        if self._ema is not None:
            self._ema.update(self.update)

    def _watch_for_early_end(self, loss: Tensor) -> None:
        rule = self.stage.early_end
        if rule is None or self._plateau_at is not None:
            return
        self._window_sum += loss.to(self._window_sum)
        if self.update % rule.window:
            return
        mean = self.accelerator.reduce(self._window_sum, "mean") / rule.window
        self._window_losses.append(float(mean))
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
            NonFinite: naming the stage and the first update that was not.
        """
        first = int(self._first_bad)
        if first >= 0:
            raise NonFinite(
                f"the loss or its gradient was not finite in stage {self.stream} at update {first}: lower the "
                f"learning rate ({self.stage.learning_rate:g}), lengthen the warm-up, or use precision float32"
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
        window = Window(
            update=self.update,
            loss=float(self._loss_sum) / count,
            grad_norm=float(self._norm_sum) / count,
            learning_rate=self.learning_rate(max(0, self.update - 1)),
            samples_per_second=count * self.stage.batch_size / max(elapsed, 1e-9),
            seconds=self._seconds,
        )
        self._loss_sum.zero_()
        self._norm_sum.zero_()
        self._window_start = self.update
        return window

    def pause(self, seconds: float) -> None:
        """Takes time that was not spent training (saving a checkpoint) out of the statistics."""
        self._clock += seconds

    @property
    def seconds(self) -> float:
        """Training time of the stage up to the last window."""
        return self._seconds

    def state(self) -> State:
        """All that a resumed run needs beyond `update` and `seconds`; on the CPU, where it shares the live tensors."""
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
                "window_sum": self._window_sum.clone(),
                "plateau_at": torch.tensor(-1 if self._plateau_at is None else self._plateau_at),
            }
        return {part: {k: v.detach().cpu().contiguous() for k, v in d.items()} for part, d in state.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], update: int, seconds: float) -> None:
        """Continues from what `state` returned after `update` updates and `seconds` of training."""
        network = self._plain_network()
        load_own_state(network, state["student"])
        parameters = trainable(network)
        index_of = {name: index for index, (name, _) in enumerate(parameters)}
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state["optimizer"].items():
            kind, name = key.split(".", 1)
            parameter = parameters[index_of[name]][1]
            if value.shape == parameter.shape:
                # A fused optimiser walks through memory, so moments must lie there as their weights do, which a file
                # does not tell: weights of convolutions have their channels last.
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
            self._window_sum.copy_(held["window_sum"])
            self._plateau_at = None if int(held["plateau_at"]) < 0 else int(held["plateau_at"])
        self.update, self._seconds, self._window_start = update, seconds, update

    def finish(self) -> NetworkDenoiser:
        """The stage's result: the student with the moving average if there is one, unwrapped, in evaluation mode."""
        network = self._plain_network()
        if self._ema is not None:
            load_own_state(network, self._ema.state_dict())
        network.eval()
        return NetworkDenoiser(network, self._plain.process, self._plain.prediction)

    def _plain_network(self) -> torch.nn.Module:
        network: torch.nn.Module = self.accelerator.unwrap_model(self._network, keep_fp32_wrapper=False)
        return network


def compile_networks(denoiser: Denoiser) -> None:
    """Lets torch compile each network of the denoiser, in place, at its first call.

    The code that it makes is kept for the class of the network, with the weights as its arguments: the networks of the
    next stage find it there.
    """
    for part in denoiser.modules():
        if isinstance(part, NetworkDenoiser) and isinstance(part.network, torch.nn.Module):
            part.network.compile()


def copy_denoiser(denoiser: NetworkDenoiser) -> NetworkDenoiser:
    """A student: the same process and prediction, and a copy of the network with weights that can be trained."""
    return NetworkDenoiser(copy_network(denoiser.network), denoiser.process, denoiser.prediction)


OPTIMIZERS: Final = ("adamw", "adamw8bit", "paged_adamw8bit")
"""AdamW; and bitsandbytes' AdamW with moments of 8 bits, in the second case moved out of a full GPU's memory."""


def make_optimizer(kind: str, parameters: list[torch.nn.Parameter], stage: Stage) -> torch.optim.Optimizer:
    """The optimiser of a stage.

    Raises:
        ValueError: if the kind is unknown or the package bitsandbytes is missing.
    """
    settings: dict[str, Any] = {
        "lr": stage.learning_rate, "betas": stage.adam_betas, "weight_decay": stage.weight_decay
    }  # fmt: skip
    if kind == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    if kind not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {kind!r} (known: {', '.join(OPTIMIZERS)})")
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"the optimizer {kind} needs the package bitsandbytes: pip install bitsandbytes") from None
    for parameter in parameters:
        # It does so itself at its first step, after the moments of a resumed stage were laid out like the weights.
        parameter.data = parameter.data.contiguous()
    made = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    optimizer: torch.optim.Optimizer = made[kind](parameters, **settings)
    return optimizer


def flatten_state(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """What an optimiser holds of one parameter: tensors by name, those of a nested group as "group/name"."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from flatten_state(value, f"{prefix}{key}/")
        else:
            # Groups hold tensors that several parameters share, which a file of tensors must not.
            yield f"{prefix}{key}", torch.as_tensor(value).clone() if prefix else torch.as_tensor(value)
