"""Networks whose weights are spread over the processes: FSDP2, torch's `fully_shard`.

Each process holds a slice of every weight, with its gradient, its moments and its average; the weights of one unit (a
block) are put together for as long as it computes. accelerate's own way to FSDP2 leaves out processes on the CPU and
networks without an optimiser, which teachers are, so `fully_shard` is called here.

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

UNIT: Final = 500_000
"""Parameters from which a block is a unit of its own, gathered and let go of alone."""


def shard(network: nn.Module, device: torch.device, count: int) -> None:
    """Leaves on this process, one of `count`, a slice of each of the network's weights, on the device; in place."""
    for parameter in network.parameters():
        # fully_shard takes no other layout.
        parameter.data = parameter.data.contiguous()
    mesh = init_device_mesh(device.type, (count,))
    for block in _blocks(network, UNIT):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    # The remaining parameters are used at both ends of a network: keep them until the backward pass, if any.
    fully_shard(network, mesh=mesh, reshard_after_forward=not any(p.requires_grad for p in network.parameters()))


def _blocks(network: nn.Module, unit: int) -> list[nn.Module]:
    """Blocks in lists with at least `unit` parameters outside smaller units, innermost first."""
    found: list[nn.Module] = []
    taken: set[nn.Parameter] = set()
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    # diffusers puts None into a list where a block has no attention.
    entries = [entry for blocks in lists for entry in blocks if entry is not None]
    for block in reversed(entries):
        own = {parameter for parameter in block.parameters() if parameter not in taken}
        if sum(parameter.numel() for parameter in own) >= unit:
            found.append(block)
            taken |= own
    return found


def is_sharded(network: nn.Module) -> bool:
    """Whether `shard` was called on it."""
    return isinstance(network, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """This process' slice of a tensor that is spread, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread, to which every process adds its slice in this call; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_as(full: Tensor, like: Tensor) -> Tensor:
    """A tensor spread as `like`, of which every process knows all; for a `like` that is not spread, itself."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def joined(part: Tensor, like: Tensor) -> Tensor:
    """The tensor, spread as `like`, of which `part` is this process' slice; `part` itself if `like` is not spread."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def load_whole(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Takes this process' slices of what `own_state` of the network holds in one piece.

    Raises:
        RuntimeError: if names or shapes do not fit.
    """
    targets = own_state(network)
    if foreign := targets.keys() ^ state.keys():
        raise RuntimeError(f"the weights do not fit the network: {min(foreign)}")
    for name, target in targets.items():
        if target.shape != state[name].shape:
            raise RuntimeError(
                f"the weights do not fit the network: {name} is {list(state[name].shape)}, not {list(target.shape)}"
            )
        local(target).copy_(local(spread_as(state[name], target)))


def skeleton(network: nn.Module) -> nn.Module:
    """A copy of the network whose weights take no memory, to be filled by `fill`."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in network.parameters()
    }
    twin: nn.Module = copy.deepcopy(network, empty)
    return twin


@torch.no_grad()
def fill(twin: nn.Module, network: nn.Module) -> None:
    """Gives the `skeleton` of a network the weights of that network, in one piece, on the CPU of every process."""
    full = {name: whole(value.detach()).cpu() for name, value in network.state_dict().items()}
    twin.load_state_dict(full, assign=True)
    for parameter, like in zip(twin.parameters(), network.parameters(), strict=True):
        parameter.requires_grad_(like.requires_grad)


@contextlib.contextmanager
def unsynced(network: nn.Module) -> Iterator[None]:
    """Within it, gradients are added up on each process and not sent: for all micro batches but an update's last."""
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
