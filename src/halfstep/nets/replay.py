"""A diffusers network, called as its own pipeline called it: the recorded call with the values of the batch.

The call is a tree of nodes, JSON-ready. A node is one argument of the stock module's `forward`, or a part of one:

    {"is": "sample", "shape": [...]}            x_t of each sample in this shape; with "list": a list of samples
    {"is": "time", "dims": [...]}               the clock's value for each sample, repeated over further axes
    {"is": "condition", "name": ..., ...}       the batch's condition of that name; with "list": cut to its lengths
    {"is": "constant", "name": ..., ...}        a tensor without a batch axis, or with "rows" one for every sample
    {"is": "repeat", "item": node}              a list with the item for every sample
    {"is": "guidance", "factor": ..., ...}      the guidance scale, a scalar input
    {"is": "embedding", "width": ..., ...}      the guidance scale as sinusoids, as in latent consistency models
    {"is": "dict" | "list" | "tuple", "items": ...}, {"is": "value", "value": ...}

hub/recording.py records it.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE
from halfstep.core.noise import processes
from halfstep.nets.base import networks
from halfstep.nets.half import called_in_half
from halfstep.nets.lowered import BasePrecision, lower, restore, settle
from halfstep.nets.stock import StockNetwork

Node = Mapping[str, Any]
"""An argument of a recorded call; see the module."""
LENGTH: Final = ".length"
"""Suffix of the name of the condition that contains the unpadded lengths of another condition."""


def nodes_of(call: Node, kind: str) -> Iterator[Node]:
    """Yield all nodes of a kind in a recorded call."""
    if call["is"] == kind:
        yield call
    items = call.get("items", ())
    for item in items.values() if isinstance(items, Mapping) else items:
        yield from nodes_of(item, kind)


def conditions_of(call: Node) -> dict[str, tuple[int, ...]]:
    """Return the shape of each condition of a recorded call, for one sample."""
    found: dict[str, tuple[int, ...]] = {}
    for node in nodes_of(call, "condition"):
        found[node["name"]] = tuple(node["shape"])
        if "list" in node:
            found[node["name"] + LENGTH] = ()
    return found


@final
class Constants(nn.Module):
    """Tensors that keep their dtype, because positions and sizes would be wrong in half precision."""

    def __init__(self, call: Node) -> None:
        super().__init__()
        for node in nodes_of(call, "constant"):
            self.register_buffer(node["name"], torch.zeros(node["shape"], dtype=getattr(torch, node["dtype"])))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, value in list(self.named_buffers()):
            moved = fn(value)
            setattr(self, name, moved if moved.dtype == value.dtype else value.to(moved.device))
        return self


@final
@networks.register("replay")
class Replay(StockNetwork):
    """Any diffusers network, with the arguments that were recorded from its pipeline.

    It takes `guidance_scale` `[batch]` if the recorded call has an input for it, and otherwise uses the recorded scale.

    Args:
        call: arguments of the stock module, a node for each.
        clock: {"of": "u", "sigma" or "angle", "scale": a, "offset": b}: the module's time is a g + b, where g is t,
            sigma(t), or the angle of (alpha, sigma) in quarter turns, on "process" (its description).
        output: {"sign": 1 or -1, "part": the channels of its output to use: "all", "first" or "last"}, and whether
            guidance restores its norm ("restores_norm").
        precision: storage precision of its weights (see nets/lowered.py); all but float32 freeze them.
    """

    def __init__(
        self,
        stock: str,
        config: Mapping[str, Any],
        call: Node,
        clock: Mapping[str, Any],
        output: Mapping[str, Any],
        num_train_timesteps: int = 1000,
        precision: BasePrecision = "float32",
    ) -> None:
        super().__init__(stock, config, num_train_timesteps)
        self.call, self.clock, self.output = dict(call), dict(clock), dict(output)
        self.constants = Constants(call)
        self.conditions = {node["name"]: node for node in nodes_of(call, "condition")}
        (self.sample,) = nodes_of(call, "sample")
        self._process = None if clock["of"] == "u" else processes.rebuild(clock["process"])
        self.precision: BasePrecision = "float32"
        self.lower(precision)

    def lower(self, precision: BasePrecision) -> None:
        """Freeze the weights in another precision."""
        lower(self.model, precision)
        self.precision = precision

    def restore(self) -> None:
        """Dequantise the weights to float32."""
        restore(self.model)
        self.precision = "float32"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        settle(self.model)
        return self

    def arguments(self) -> dict[str, Any]:
        return {
            "stock": self.stock,
            "config": self.config,
            "call": self.call,
            "clock": self.clock,
            "output": self.output,
            "num_train_timesteps": self.num_train_timesteps,
            **({} if self.precision == "float32" else {"precision": self.precision}),
        }

    @property
    def restores_norm(self) -> bool:
        """Whether guidance rescales the output to the norm that it has with conditions."""
        return bool(self.output.get("restores_norm", False))

    def timestep(self, time: Tensor) -> Tensor:
        if self._process is not None:
            alpha, sigma = self._process.alpha_sigma(time)
            time = sigma if self.clock["of"] == "sigma" else torch.atan2(sigma, alpha) * (2 / math.pi)
        return self.clock["scale"] * time + self.clock["offset"]

    def on_table(self, num_train_timesteps: int) -> dict[str, Any]:
        return {
            "num_train_timesteps": num_train_timesteps,
            "clock": {"of": "u", "scale": float(num_train_timesteps), "offset": -1.0},
        }

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the prediction, shaped as `x_t` `[batch, *dims]`, at times in [0, 1] `[batch]`.

        Raises:
            ValueError: if a condition of the call is missing, or an unexpected one is passed.
        """
        if self.precision == "float32":
            return self._read(self.raw(x_t, time, **cond), x_t)
        return called_in_half(lambda x_t, time, **cond: self._read(self.raw(x_t, time, **cond), x_t), x_t, time, cond)

    def _read(self, output: Tensor, x_t: Tensor) -> Tensor:
        """Return the used part of the stock module's output."""
        wanted = x_t.shape[1] if x_t.ndim > 1 else 1
        if self.output["part"] != "all":
            output = output[:, :wanted] if self.output["part"] == "first" else output[:, -wanted:]
        if output.shape[1:] != x_t.shape[1:]:
            output = output.reshape(-1, *x_t.shape[1:])
        return -output if self.output["sign"] < 0 else output

    def raw(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the stock module's own output."""
        needed = {*conditions_of(self.call)}
        if GUIDANCE in cond and takes_scale(self.call):
            needed.add(GUIDANCE)
        if odd := sorted(needed ^ set(cond)):
            raise ValueError(
                f"a {self.stock} needs the conditions {', '.join(sorted(needed)) or 'none'}, got "
                f"{', '.join(sorted(cond)) or 'none'} ({odd[0]})"
            )
        found = self.model(**self._filled(self.call, x_t, self.timestep(time), cond), return_dict=False)[0]
        return torch.stack(list(found)) if isinstance(found, list | tuple) else found

    def _filled(self, node: Node, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Any:
        """Return the value of a node for this batch."""
        batch, kind = x_t.shape[0], node["is"]
        match kind:
            case "sample":
                shown = x_t if list(x_t.shape[1:]) == node["shape"] else x_t.reshape(-1, *node["shape"])
                return list(shown.unbind()) if "list" in node else shown
            case "time":
                dims = node["dims"]
                return timestep.reshape(-1, *[1] * len(dims)).expand(-1, *dims) if dims else timestep
            case "condition":
                value = cond[node["name"]]
                if "list" not in node:
                    return value
                return [row[: int(n)] for row, n in zip(value, cond[node["name"] + LENGTH], strict=True)]
            case "constant":
                held: Tensor = getattr(self.constants, node["name"])
                return held.expand(batch, *held.shape[1:]) if node.get("rows") else held
            case "repeat":
                return [self._filled(node["item"], x_t, timestep, cond) for _ in range(batch)]
            case "guidance":
                return node["factor"] * self._scale(node, timestep, cond)
            case "embedding":
                from diffusers.models.embeddings import get_timestep_embedding

                scale = self._scale(node, timestep, cond)
                return get_timestep_embedding(1000 * (scale - 1), node["width"], downscale_freq_shift=1).to(x_t.dtype)
            case "value":
                return node["value"]
        items = node["items"]
        if kind == "dict":
            return {name: self._filled(item, x_t, timestep, cond) for name, item in items.items()}
        filled = [self._filled(item, x_t, timestep, cond) for item in items]
        return tuple(filled) if kind == "tuple" else filled

    def _scale(self, node: Node, timestep: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        given = cond.get(GUIDANCE)
        return torch.full_like(timestep, node["default"]) if given is None else given.to(timestep)


def takes_scale(call: Node) -> bool:
    """Return whether a recorded call has an input for the guidance scale."""
    return any(True for kind in ("guidance", "embedding") for _ in nodes_of(call, kind))
