"""Network sharding across processes with FSDP2, which is torch's `fully_shard`.

Each process stores a slice of every weight, gradient, moment and average. The weights of a unit (a block) are gathered
while the unit runs. accelerate's FSDP2 supports neither CPU processes nor networks without an optimiser, such as
teachers, so this module calls `fully_shard` itself.

Source: Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277).
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from halfstep.nets import own_state
from halfstep.train.settings import Engine

UNIT: Final = 500_000
"""Minimum number of parameters for a block to form a separate unit, which is gathered and freed on its own."""


def check_sharding(engine: Engine, num_processes: int) -> None:
    """Raise ValueError if the engine's sharding is not possible with this number of processes."""
    if engine.sharding == "none":
        return
    if num_processes == 1:
        raise ValueError(
            "sharding full shards weights across several processes, but this is the only process. Start several "
            "processes with torchrun or accelerate launch, or remove --engine.sharding"
        )
    if engine.compile:
        raise ValueError("sharded networks cannot be compiled. Remove --engine.compile or --engine.sharding")
    if engine.optimizer != "adamw":
        raise ValueError(
            f"the optimizer {engine.optimizer} cannot be sharded. Use adamw, whose moments can be sharded, or "
            "remove --engine.sharding"
        )


def shard(network: nn.Module, device: torch.device, count: int) -> None:
    """Shard the network in place, so that each of `count` processes keeps a slice of each weight on its device."""
    for parameter in network.parameters():
        # fully_shard supports only contiguous parameters.
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (count,))
    for block in _blocks(network, UNIT):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The remaining parameters are used at both ends of the network, so they stay gathered until the backward pass.
    fully_shard(network, mesh=mesh, reshard_after_forward=not any(p.requires_grad for p in network.parameters()))


def _blocks(network: nn.Module, unit: int) -> list[nn.Module]:
    """Return the blocks in module lists that have at least `unit` parameters of their own, innermost first."""
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = set()
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    # diffusers puts None into a list if a block has no attention.
    entries = [entry for blocks in lists for entry in blocks if entry is not None]
    for block in reversed(entries):
        own = {parameter for parameter in block.parameters() if parameter not in taken}
        if sum(parameter.numel() for parameter in own) >= unit:
            found.append(block)
            taken |= own
    return found


def is_sharded(network: nn.Module) -> bool:
    """Return whether `shard` was called on the network."""
    return isinstance(network, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """Return this process's slice of a sharded tensor, as a view of its memory. Return any other tensor unchanged."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; every process must call this. Return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(full: Tensor, like: Tensor) -> Tensor:
    """Shard `full` in the same way as `like`, or return it unchanged if `like` is not sharded. Every process must have
    the whole of `full`."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def joined(part: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded like `like`, with `part` as this process's slice, or `part` if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load this process's slices from an unsharded `own_state` of the network.

    Raises:
        RuntimeError: if the names or shapes do not match those of the network.
    """
    targets = own_state(network)
    if foreign := targets.keys() ^ state.keys():
        raise RuntimeError(f"the weights do not match the network: {min(foreign)}")
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise RuntimeError(
                f"the weights do not match the network: {name} has shape {list(state[name].shape)}, not "
                f"{list(target.shape)}"
            )
        local(target).copy_(local(spread_as(state[name], target)))


def skeleton(network: nn.Module) -> nn.Module:
    """Return a copy of the network on the meta device, which `fill` then fills with weights."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    twin: nn.Module = copy.deepcopy(network, empty)
    return twin


@torch.no_grad()
def fill(twin: nn.Module, network: nn.Module) -> None:
    """Fill the `skeleton` of a network with the network's unsharded weights, on the CPU of every process."""
    state = network.state_dict(keep_vars=True)
    full: dict[int, Tensor] = {}
    for value in state.values():
        if id(value) not in full:
            gathered = whole(value.detach()).cpu()
            full[id(value)] = nn.Parameter(gathered, False) if isinstance(value, nn.Parameter) else gathered
    # Tied weights stay tied, because they are one object under several names.
    twin.load_state_dict({name: full[id(value)] for name, value in state.items()}, assign=True)
    for parameter, like in zip(twin.parameters(), network.parameters(), strict=True):
        parameter.requires_grad_(like.requires_grad)


@contextlib.contextmanager
def unsynced(network: nn.Module) -> Iterator[None]:
    """Return a context manager under which each process accumulates gradients without synchronising them.

    Use this context for all micro batches of a turn except the last.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)
    elif isinstance(network, DistributedDataParallel):
        with network.no_sync():
            yield
    else:
        yield
