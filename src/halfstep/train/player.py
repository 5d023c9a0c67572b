"""A player: a trained network of a stage with its optimiser, its averages and the statistics of its turns.

The student and each auxiliary network are players. The engine, checkpoints, DDP, FSDP2 and micro batches treat all
players alike.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.prediction import Denoised
from halfstep.nets import copy_network, load_own_state, own_state, set_dropout, trainable
from halfstep.objectives import Losses, Training
from halfstep.train.optimizers import flatten_state, make_optimizer
from halfstep.train.recent import KEPT, Part, Recent
from halfstep.train.sharding import (
    fill,
    is_sharded,
    joined,
    load_whole,
    local,
    shard,
    skeleton,
    spread_as,
    whole,
)


@final
class KeptBuffers:
    """Copies of the buffers of the players' networks, such as BatchNorm statistics, to undo discarded passes.

    Constants are copied only once. The buffers of a module are copied again if one of them has been changed. Each
    tensor counts its changes, but batch norm and `Tensor.data` change tensors without increasing this count, so the
    second call of `keep` also compares the values, which waits for the device.
    """

    def __init__(self, players: Iterable["Player"]) -> None:
        modules = (module for player in players for module in player.network.modules())
        self._held: dict[nn.Module, dict[str, _KeptBuffer]] = {
            module: {} for module in modules if any(True for _ in module.buffers(recurse=False))
        }
        self._changing: set[nn.Module] = set()
        self._calls = 0

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the buffers of all modules that have changed so far."""
        # torch copies tensors of one device and dtype together.
        again: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for module, held in self._held.items():
            buffers = dict(module.named_buffers(recurse=False))
            if module not in self._changing:
                if held.keys() == buffers.keys() and all(
                    held[name].is_current(buffer) and (self._calls > 1 or torch.equal(buffer, held[name].copy))
                    for name, buffer in buffers.items()
                ):
                    continue
                if self._calls:
                    self._changing.add(module)
            # The memory of the old copies is used again or freed before new copies are made.
            old = {
                name: held[name].copy for name, buffer in buffers.items() if name in held and held[name].fits(buffer)
            }
            held.clear()
            for name, buffer in buffers.items():
                if name in old:
                    copies, changed = again.setdefault((buffer.device, buffer.dtype), ([], []))
                    copies.append(old[name])
                    changed.append(buffer)
                else:
                    old[name] = buffer.clone()
                held[name] = _KeptBuffer(buffer, _version(buffer), old[name])
        for copies, changed in again.values():
            torch._foreach_copy_(copies, changed)
        self._calls += 1

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the buffers to their values at the last call of `keep`."""
        for module, held in self._held.items():
            for name, kept in held.items():
                kept.buffer.copy_(kept.copy)
                # The module may have assigned a new tensor instead of changing this one.
                setattr(module, name, kept.buffer)


class _KeptBuffer(NamedTuple):
    """A buffer with its version and its values at the same moment."""

    buffer: Tensor
    version: int
    copy: Tensor

    def is_current(self, buffer: Tensor) -> bool:
        """Return whether `buffer` is this tensor, without changes that its version counts."""
        return buffer is self.buffer and _version(buffer) == self.version

    def fits(self, buffer: Tensor) -> bool:
        """Return whether the values of `buffer` fit into the memory of the copy."""
        copy = self.copy
        return (copy.shape, copy.dtype, copy.device) == (buffer.shape, buffer.dtype, buffer.device)


def _version(tensor: Tensor) -> int:
    """Return the number of changes of a tensor, or 0 for an inference tensor, which cannot be changed."""
    return 0 if tensor.is_inference() else tensor._version


@contextlib.contextmanager
def unchanged_buffers(players: Iterable["Player"]) -> Iterator[None]:
    """Restore the buffers of the players' networks after passes that are discarded."""
    kept = KeptBuffers(players)
    kept.keep()
    yield
    kept.restore()


def network_of(model: nn.Module) -> nn.Module:
    """Return the module that is trained, wrapped and saved: the network of a `NetworkDenoiser`, or the model itself."""
    network: nn.Module = model.network if isinstance(model, NetworkDenoiser) else model
    return network


def seen_through(model: nn.Module, network: nn.Module) -> nn.Module:
    """Return the model with its network replaced by `network`, which is a copy or the same network wrapped in DDP."""
    if isinstance(model, NetworkDenoiser):
        return NetworkDenoiser(network, model.process, model.prediction)
    if isinstance(model, Denoiser) and isinstance(network, DistributedDataParallel):
        return _Wrapped(network, model)
    return network


@final
class _Wrapped(Denoiser):
    """A denoiser that is wrapped in DDP. DDP hides the attributes of the denoiser, so this class restores them."""

    def __init__(self, network: nn.Module, denoiser: Denoiser) -> None:
        super().__init__()
        self.network, self.process = network, denoiser.process

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        x0, eps = self.network(x_t, t, cond)
        return Denoised(x0, eps)


def compile_networks(model: torch.nn.Module) -> None:
    """Let torch compile each network of a denoiser, in place, when the network is first called.

    The compiled code is cached for the network's class and takes the weights as arguments, so the next stage reuses it.
    Shapes are static. Otherwise, torch would compile slower code for dynamic shapes when a second shape occurs, and a
    run that resumes after that would round differently from an uninterrupted run.
    """
    for part in model.modules():
        if isinstance(part, NetworkDenoiser) and isinstance(part.network, torch.nn.Module):
            part.network.compile(dynamic=False)


@final
class EMA:
    """An exponential moving average of the trainable parameters of `module`. The buffers of `module` are copied.

    After n steps, the decay is min(decay, (1 + n) / (10 + n)). The average therefore soon forgets the random initial
    weights and does not lag behind in short runs. The averages are float32, or float64 for float64 weights, because an
    average in half precision would round small changes away. A single operation updates all tensors.

    Args:
        decay: final decay, in [0, 1).
        into: a copy of the module with the same dtypes, sharded like the module. The parameters of this copy are kept
            equal to the averages, rounded to their dtypes. If None, only the averages are stored.
    """

    def __init__(self, module: nn.Module, decay: float, into: nn.Module | None = None) -> None:
        self.decay = decay
        self._module, self._into = module, into
        # A tied weight has several names in the state.
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        self._names = [names[p] for _, p in trainable(module)]
        self._weights = [p.detach() for _, p in trainable(module)]
        # Each process averages only its own slices of sharded weights.
        self._parameters = [local(p) for p in self._weights]
        dtypes = [torch.promote_types(p.dtype, torch.float32) for p in self._parameters]
        self._rounded: list[tuple[Tensor, Tensor]] = []
        """The parameters of `into` that are too narrow to hold their averages, each with its average."""
        if into is None:
            self._averages = [p.to(dtype, copy=True) for p, dtype in zip(self._parameters, dtypes, strict=True)]
        else:
            held = [local(p.detach()) for _, p in trainable(into)]
            self._averages = [p.to(dtype) for p, dtype in zip(held, dtypes, strict=True)]
            self._rounded = [(p, mean) for p, mean in zip(held, self._averages, strict=True) if p is not mean]

    @torch.no_grad()
    def update(self, num_steps: int) -> None:
        """Move the average towards the current weights, after `num_steps` optimiser steps."""
        weight = 1 - min(self.decay, (1 + num_steps) / (10 + num_steps))
        pairs = zip(self._parameters, self._averages, strict=True)
        current = [p if p.dtype == average.dtype else p.to(average.dtype) for p, average in pairs]
        torch._foreach_lerp_(self._averages, current, weight)
        self._copy_into()

    def _copy_into(self) -> None:
        if self._into is not None:
            for own, average in self._rounded:
                own.copy_(average)
            for own, buffer in zip(self._into.buffers(), self._module.buffers(), strict=True):
                own.copy_(buffer)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the module's state, with the averages instead of the parameters.

        The averages keep their dtypes, so a resumed stage has the averages of an uninterrupted one.
        """
        state = own_state(self._module)
        for names, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            value = joined(average, weight)
            state[names[0]] = value
            # The state may contain only one of the names of a tied weight.
            state.update({name: value for name in names[1:] if name in state})
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load the averages from an unsharded result of `state_dict`, and copy the buffers, which the module has loaded
        before."""
        for names, weight, average in zip(self._names, self._weights, self._averages, strict=True):
            average.copy_(local(spread_as(state[names[0]], weight)))
        self._copy_into()


@final
class Follower:
    """A copy of a player that the objective calls: a moving average, or the player as it was before the first update.

    The copy keeps the dtypes of the player's network, which may convert its inputs to them.

    Args:
        model: the player's model, whose network must not be sharded yet.
        decay: decay of the average, which the player updates; None freezes the copy.
    """

    def __init__(self, model: nn.Module, decay: float | None) -> None:
        self.decay = decay
        self.network = copy_network(network_of(model)).requires_grad_(False).eval()
        self.model = seen_through(model, self.network)


@final
class Player:
    """A network in training, with its optimiser and averages.

    Weights that do not require gradients when the player is created stay frozen.

    Args:
        model: a denoiser or any other module, which is trained in place.
        training: the hyperparameters of this network.
        optimizer: the name of the optimiser, as in `make_optimizer`.
        sharded: whether the weights are sharded across the processes.

    Raises:
        ValueError: if a trainable weight is complex, or all weights are frozen.
    """

    def __init__(
        self, name: str, model: nn.Module, training: Training, accelerator: Accelerator, optimizer: str, sharded: bool
    ) -> None:
        self.name, self.model, self.training = name, model, training
        self._accelerator, self._optimizer_name = accelerator, optimizer
        network = network_of(model)
        odd = (path for path, weight in network.named_parameters() if weight.requires_grad and weight.is_complex())
        if (path := next(odd, None)) is not None:
            raise ValueError(
                f"the weight {path} is complex, which the optimiser does not support. Store "
                "torch.view_as_real(weight), or make it a buffer if it is constant"
            )
        set_dropout(network, training.dropout)
        network.train()
        self._skeleton = skeleton(network) if sharded else None
        self.wrapped: nn.Module
        """The network as used in the player's own turns: sharded or, with several processes, wrapped in DDP."""
        if sharded:
            shard(network, accelerator.device, accelerator.num_processes)
        else:
            # Moving can change the weights' memory layout, which an optimiser and averages then rely on.
            network.to(accelerator.device)
            # A copy of a network from an earlier call has accelerate's mark, with which accelerate would ignore it.
            vars(network).pop("_is_accelerate_prepared", None)
        self._trained = [(path, weight) for path, weight in trainable(network) if weight.requires_grad]
        """The weights that the optimiser changes, with their names."""
        if not self._trained:
            raise ValueError(f"all weights of the network of {name} are frozen. Call requires_grad_(True)")
        made = make_optimizer(optimizer, [weight for _, weight in self._trained], training)
        if sharded:
            self.wrapped, self._optimizer = network, made
        else:
            with warnings.catch_warnings():
                # DDP warns that broadcast_buffers is deprecated, but accelerate does not support its replacement.
                warnings.simplefilter("ignore", FutureWarning)
                self.wrapped, self._optimizer = accelerator.prepare(network, made, device_placement=[False, True])
            # The engine enters autocast itself. With accelerate's wrapper, the compiler would see a new network in each
            # stage, and another one when the wrapper is removed.
            network = accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.network: nn.Module = network
        """The network without its multi-process wrapper."""
        self._ema = EMA(self.network, training.ema_decay) if training.ema_decay else None
        self.followed_by: list[EMA] = []
        """The averages of this player that the objective calls."""
        self.trained = seen_through(model, self.wrapped)
        """The model as used in the player's own turns."""
        self.called = seen_through(model, self.network)
        """The model as used in the turns of other players."""
        self.steps = 0
        """Number of optimiser steps taken."""
        self._settled = False
        device = accelerator.device
        self._loss_sum = torch.zeros((), device=device)
        self._norm_sum = torch.zeros((), device=device)
        self.first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        """The first update whose loss or gradient was not finite, or -1 if all were finite."""
        self._window_turns = 0
        self.recent = Recent()

    @contextlib.contextmanager
    def alone(self, players: "Iterable[Player]") -> Iterator[None]:
        """Return a context manager that discards the gradients of other players' weights."""
        others = [player for player in players if player is not self]
        stopped = [p for other in others if not is_sharded(other.network) for _, p in other._trained]
        for parameter in stopped:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in stopped:
                parameter.requires_grad_(True)
            for other in others:
                if is_sharded(other.network):
                    # FSDP2 ignores later changes to requires_grad, so the gradients are discarded instead.
                    other.clear()

    def backward(self, update: int, places: range, losses: Losses, x0: Tensor) -> Tensor:
        """Add the gradient of a micro batch, and return the micro batch's contribution to the mean loss.

        Raises:
            ValueError: unless the objective returned one loss and one log-SNR for each sample.
        """
        shapes = [list(losses.loss.shape), list(losses.log_snr.shape)]
        # A mean over the batch, or a loss for each entry, would scale the gradient.
        if shapes != [[len(places)]] * 2:
            raise ValueError(
                f"the objective's turn of {self.name} returned a loss of shape {shapes[0]} and a log_snr of shape "
                f"{shapes[1]} for a micro batch of {len(places)} samples. Return Losses with one number per sample in "
                f"both, each of shape [{len(places)}]"
            )
        accelerator = self._accelerator
        largest = torch.linalg.vector_norm(x0, ord=torch.inf)
        self.recent.parts.append(Part(update, places, losses.loss.detach(), losses.log_snr.detach(), largest))
        while self.recent.parts[0].update <= update - KEPT:
            self.recent.parts.popleft()
        # Gradients are averaged over the processes, so each process multiplies its part of the mean loss by the world
        # size.
        loss: Tensor = losses.loss.sum() * (accelerator.num_processes / self.training.batch_size)
        accelerator.backward(loss)
        return loss.detach()

    def step(self, update: int, rate: float, loss: Tensor) -> None:
        """Take one optimiser step with the accumulated gradients of the mean loss `loss`."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = self._accelerator.clip_grad_norm_(self.wrapped.parameters(), self.training.grad_clip)
        if self._skeleton is not None:
            norm = whole(norm)
        self._optimizer.step()
        self.clear()
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.first_bad = torch.where(bad & (self.first_bad < 0), update, self.first_bad)
        self._loss_sum += loss
        self._norm_sum += norm
        self.recent.norms.append((update, norm.detach()))
        self.steps += 1
        self._window_turns += 1
        for average in self._averages.values():
            average.update(self.steps)

    @property
    def _averages(self) -> dict[str, EMA]:
        """All averages of this player, with the same keys as in `state`."""
        own = {} if self._ema is None else {"ema": self._ema}
        return own | {f"average{number}": average for number, average in enumerate(self.followed_by)}

    def clear(self) -> None:
        """Drop all gradients."""
        self._optimizer.zero_grad()

    def needs_settling(self, count: int) -> bool:
        """Return whether DDP still has to rebuild its buckets. This is True at most once.

        DDP rebuilds its gradient buckets after the first backward pass, and the rounding of a sum over more than two
        processes depends on the buckets. The engine therefore discards the gradient of a first pass. Otherwise, the
        first update of a resumed run would differ from that of the uninterrupted run.
        """
        settled, self._settled = self._settled, True
        return not settled and isinstance(self.wrapped, DistributedDataParallel) and count > 2

    def place_for_moments(self) -> list[Tensor]:
        """Return tensors as large as the state that the first optimiser step allocates, or [] if that state exists."""
        if self._optimizer.state_dict()["state"]:
            return []
        # The moments of an 8-bit optimiser are bytes.
        dtype = torch.uint8 if self._optimizer_name != "adamw" else None
        return [torch.empty_like(p, dtype=dtype) for _, p in self._trained for _ in range(2)]

    def take_sums(self) -> tuple[float, float, int]:
        """Return the sums of losses and gradient norms and the number of turns since the last call."""
        sums = float(self._loss_sum), float(self._norm_sum), self._window_turns
        self._loss_sum.zero_()
        self._norm_sum.zero_()
        self._window_turns = 0
        self.recent.forget()
        return sums

    @property
    def parts(self) -> list[str]:
        """The keys of `state`."""
        return ["network", "optimizer", *self._averages]

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights, moments and averages, keyed by name. The tensors may be sharded."""
        moments: dict[str, Tensor] = {}
        for index, entry in self._optimizer.state_dict()["state"].items():
            for key, value in flatten_state(entry):
                moments[f"{key}.{self._trained[index][0]}"] = value
        averages = {name: average.state_dict() for name, average in self._averages.items()}
        return {"network": own_state(self.network), "optimizer": moments, **averages}

    def load_state(self, state: Mapping[str, Mapping[str, Tensor]], steps: int) -> None:
        """Restore an unsharded result of `state` that was saved after `steps` steps."""
        network = self.network
        (load_whole if is_sharded(network) else load_own_state)(network, state["network"])
        index_of = {name: index for index, (name, _) in enumerate(self._trained)}
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state["optimizer"].items():
            kind, name = key.split(".", 1)
            parameter = self._trained[index_of[name]][1]
            if is_sharded(network):
                value = spread_as(value, parameter) if value.shape == parameter.shape else value
            elif value.shape == parameter.shape:
                # A fused optimiser iterates over memory, so the moments need the memory layout of the weights, which
                # the file does not store. On a GPU, convolution weights are channels-last.
                value = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            entry = entries.setdefault(index_of[name], {})
            *groups, last = kind.split("/")
            for group in groups:
                entry = entry.setdefault(group, {})
            entry[last] = value
        held_groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": entries, "param_groups": held_groups})
        for name, average in self._averages.items():
            average.load_state_dict(state[name])
        self.steps = steps

    def finish(self) -> nn.Module:
        """Return the unwrapped model in evaluation mode, with EMA weights if it has any."""
        network = self.network
        if self._skeleton is not None:
            if self._ema is not None:
                load_whole(network, {name: whole(value) for name, value in self._ema.state_dict().items()})
            fill(self._skeleton, network)
            network = self._skeleton
        elif self._ema is not None:
            load_own_state(network, self._ema.state_dict())
        network.eval()
        return seen_through(self.model, network)
