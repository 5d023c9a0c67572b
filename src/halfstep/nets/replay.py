"""A diffusers network that replays its pipeline's recorded call with each batch's values.

The call is a tree of JSON-serialisable nodes. A node is an argument of the stock module's `forward`, or part of one:

    {"is": "sample", "shape": [...]}            x_t with samples of this shape; with "list", a list of samples
    {"is": "time", "dims": [...]}               the clock value of each sample, repeated over further axes
    {"is": "condition", "name": ..., ...}       the condition with this name; with "list", truncated to its lengths
    {"is": "constant", "name": ..., ...}        a tensor without a batch axis; with "rows", repeated for each sample
    {"is": "repeat", "item": node}              a list that repeats the item for each sample
    {"is": "guidance", "factor": ..., ...}      the guidance scale, a scalar input
    {"is": "embedding", "width": ..., ...}      the guidance scale as sinusoids, as in latent consistency models
    {"is": "dict" | "list" | "tuple", "items": ...}, {"is": "value", "value": ...}

`hub/recording.py` records the call.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, Self, final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE
from halfstep.core.noise import processes
from halfstep.nets.base import moved, networks
from halfstep.nets.lowered import BasePrecision, called_in_half, lower, restore, settle
from halfstep.nets.stock import StockNetwork

Node = Mapping[str, Any]
"""An argument of a recorded call, as described in this module's docstring."""
LENGTH: Final = ".length"
"""The name suffix of a condition that contains another condition's unpadded lengths."""


def nodes_of(call: Node, *kinds: str) -> Iterator[Node]:
    """Yield all nodes of the given kinds in a recorded call."""
    if call["is"] in kinds:
        yield call
    items = call.get("items", ())
    for item in items.values() if isinstance(items, Mapping) else items:
        yield from nodes_of(item, *kinds)


def takes_scale(call: Node) -> bool:
    """Return whether a recorded call has an input for the guidance scale."""
    return any(True for _ in nodes_of(call, "guidance", "embedding"))


def conditions_of(call: Node) -> dict[str, tuple[int, ...]]:
    """Return the per-sample shapes of a recorded call's conditions, keyed by name."""
    found: dict[str, tuple[int, ...]] = {}
    for node in nodes_of(call, "condition"):
        found[node["name"]] = tuple(node["shape"])
        if "list" in node:
            found[node["name"] + LENGTH] = ()
    return found


def read_output(output: Tensor, x_t: Tensor, reading: Mapping[str, Any]) -> Tensor:
    """Return the prediction, shaped like `x_t`, from a stock module's output.

    `reading` is `Replay.output`, which describes the prediction's sign and its channels in the output.
    """
    channels = x_t.shape[1] if x_t.ndim > 1 else 1
    if reading["part"] != "all":
        output = output[:, :channels] if reading["part"] == "first" else output[:, -channels:]
    if output.shape[1:] != x_t.shape[1:]:
        output = output.reshape(-1, *x_t.shape[1:])
    return -output if reading["sign"] < 0 else output


@final
class Constants(nn.Module):
    """Tensors that keep their dtype, because half precision would round positions and sizes."""

    def __init__(self, call: Node) -> None:
        super().__init__()
        for node in nodes_of(call, "constant"):
            self.register_buffer(node["name"], torch.zeros(node["shape"], dtype=getattr(torch, node["dtype"])))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for name, value in list(self.named_buffers()):
            setattr(self, name, moved(fn, value))
        return self


@final
@networks.register("replay")
class Replay(StockNetwork):
    """Any diffusers network, called with the arguments recorded from its pipeline.

    If the recorded call has an input for the guidance scale, the network accepts `guidance_scale` `[batch]`, which
    defaults to the recorded scale.

    Args:
        call: the recorded call.
        clock: {"of": "u", "sigma" or "angle", "scale": a, "offset": b}: the module's time is a g + b, where g is t,
            sigma(t), or the angle of (alpha, sigma) in quarter turns. For the last two, "process" is the noise process.
        output: {"sign": 1 or -1, "part": the output channels to use, "all", "first" or "last", "restores_norm":
            whether guidance restores the output's norm}.
        precision: the storage precision of the weights (see nets/lowered.py). Lower-precision weights are frozen.
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
        self.restores_norm = bool(output.get("restores_norm", False))
        self._process = None if clock["of"] == "u" else processes.rebuild(clock["process"])
        self.precision: BasePrecision = "float32"
        self.lower(precision)

    def lower(self, precision: BasePrecision) -> None:
        """Convert the weights to a precision, and freeze them unless it is float32."""
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

    def timestep(self, time: Tensor) -> Tensor:
        if self._process is not None:
            alpha, sigma = self._process.alpha_sigma(time)
            time = sigma if self.clock["of"] == "sigma" else torch.atan2(sigma, alpha) * (2 / math.pi)
        return self.clock["scale"] * time + self.clock["offset"]

    @property
    def is_on_table(self) -> bool:
        """Whether the module's time is the timestep of a noise-level table."""
        return self.clock == self.on_table(self.num_train_timesteps)["clock"]

    def on_table(self, num_train_timesteps: int) -> dict[str, Any]:
        clock = {"of": "u", "scale": float(num_train_timesteps), "offset": -1.0}
        return {"num_train_timesteps": num_train_timesteps, "clock": clock}

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the prediction, shaped like `x_t` `[batch, *dims]`, at times `[batch]` in [0, 1].

        Raises the same errors as `raw`.
        """
        if self.precision == "float32":
            output = self.raw(x_t, time, **cond)
        else:
            output = called_in_half(self.raw, x_t, time, cond)
        return read_output(output, x_t, self.output)

    def raw(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        """Return the stock module's unmodified output.

        Raises:
            ValueError: if a condition is missing or unexpected.
        """
        needed = {*conditions_of(self.call)}
        if GUIDANCE in cond and takes_scale(self.call):
            needed.add(GUIDANCE)
        if odd := sorted(needed ^ set(cond)):
            raise ValueError(
                f"a {self.stock} needs the conditions {', '.join(sorted(needed)) or 'none'}, got "
                f"{', '.join(sorted(cond)) or 'none'}. Check {odd[0]}"
            )
        found = self.model(**self._filled(self.call, x_t, self.timestep(time), cond), return_dict=False)[0]
        return torch.stack(list(found)) if isinstance(found, list | tuple) else found

    def _filled(self, node: Node, x_t: Tensor, timestep: Tensor, cond: Mapping[str, Tensor]) -> Any:
        """Return the value of a node for the current batch."""
        fill = functools.partial(self._filled, x_t=x_t, timestep=timestep, cond=cond)
        match node["is"]:
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
                # One transfer from the device for all rows.
                lengths = cond[node["name"] + LENGTH].long().tolist()
                return [row[:length] for row, length in zip(value, lengths, strict=True)]
            case "constant":
                held: Tensor = getattr(self.constants, node["name"])
                return held.expand(len(x_t), *held.shape[1:]) if node.get("rows") else held
            case "repeat":
                return [fill(node["item"]) for _ in x_t]
            case "guidance" | "embedding":
                scale = cond[GUIDANCE].to(timestep) if GUIDANCE in cond else torch.full_like(timestep, node["default"])
                if node["is"] == "guidance":
                    return node["factor"] * scale
                from diffusers.models.embeddings import get_timestep_embedding

                return get_timestep_embedding(1000 * (scale - 1), node["width"], downscale_freq_shift=1).to(x_t.dtype)
            case "value":
                return node["value"]
            case "dict":
                return {name: fill(item) for name, item in node["items"].items()}
            case "tuple":
                return tuple(fill(item) for item in node["items"])
        return [fill(item) for item in node["items"]]
