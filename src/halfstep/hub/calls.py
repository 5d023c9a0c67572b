"""Represent denoiser calls as trees of nodes (see nets/replay.py), and find the conditions among their arguments."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, final

import torch
from torch import Tensor

from halfstep.nets import LENGTH
from halfstep.runs import Manifest

SAME: Final = 1e-6
"""Largest relative difference attributed to rounding."""


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest absolute difference, divided by the largest absolute value in `wanted` (but at least 1)."""
    return float((found.float() - wanted.float()).abs().max()) / max(1.0, float(wanted.abs().max()))


@final
class Reading:
    """A converter from the arguments of a denoiser call to nodes.

    Args:
        latents: the samples for two prompts.
        longest: the length to which prompts are padded, or None if unknown.
        has_classes: whether the denoiser's `class_labels` are classes.
    """

    def __init__(self, latents: Tensor, longest: Any, has_classes: bool) -> None:
        self.latents, self.longest, self.has_classes = latents, longest, has_classes
        self.constants: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def node(self, path: str, one: Any, two: Any, later: Any) -> dict[str, Any]:
        """Return an argument's node, given its values for one prompt, for two, and for two in the next step."""
        if isinstance(two, Mapping | list | tuple) and not type(one) is type(two) is type(later):
            kinds = [type(value).__name__ for value in (one, two, later)]
            raise ValueError(
                f"the argument {path[1:]} is a {kinds[0]} for one prompt, a {kinds[1]} for two prompts, and a "
                f"{kinds[2]} one step later"
            )
        if isinstance(two, Mapping):
            items = {name: self.node(f"{path}.{name}", one.get(name), two[name], later[name]) for name in two}
            return {"is": "dict", "items": items}
        if isinstance(two, list | tuple):
            return self._sequence(path, one, two, later)
        if isinstance(two, Tensor):
            return self._tensor(path, one, two, later)
        if two is None or isinstance(two, bool | int | float | str):
            if not one == two == later:
                raise ValueError(
                    f"the argument {path[1:]} is {one} for one prompt, {two} for two prompts, and {later} one step "
                    "later"
                )
            return {"is": "value", "value": two}
        raise ValueError(f"the argument {path[1:]} is a {type(two).__name__}, which cannot be recorded")

    def _sequence(self, path: str, one: Any, two: Any, later: Any) -> dict[str, Any]:
        if (len(one), len(two)) == (1, 2):
            if not isinstance(two[0], Tensor):
                if not one[0] == two[0] == two[1]:
                    raise ValueError(
                        f"the argument {path[1:]} is {two[0]} and {two[1]} for two prompts, but only tensors may "
                        "differ between prompts"
                    )
                return {"is": "repeat", "item": self.node(path, one[0], two[0], later[0])}
            if two[0].shape == two[1].shape and self._is_sample(torch.stack(list(two))):
                return {"is": "sample", "shape": list(two[0].shape), "list": True}
            return self._condition(path, two[0], list=True)
        if len(one) != len(two):
            raise ValueError(
                f"the argument {path[1:]} has length {len(one)} for one prompt, but {len(two)} for two prompts"
            )
        items = [self.node(f"{path}.{i}", *parts) for i, parts in enumerate(zip(one, two, later, strict=True))]
        return {"is": "tuple" if isinstance(two, tuple) else "list", "items": items}

    def _tensor(self, path: str, one: Any, two: Tensor, later: Tensor) -> dict[str, Any]:
        if self._is_sample(two):
            return {"is": "sample", "shape": list(two.shape[1:])}
        if two.shape == later.shape and not torch.equal(two, later):
            if bool((two != two.flatten()[0]).any()):
                raise ValueError(
                    f"the argument {path[1:]} changes from step to step, but is neither the sample nor the time"
                )
            return {"is": "time", "dims": list(two.shape[1:])}
        if two.ndim == 0 or len(two) != 2 or (one is not None and len(one) != 1):
            if one is None or one.shape != two.shape or not torch.equal(one, two):
                raise ValueError(
                    f"the argument {path[1:]} has no batch axis, but its values for one and two prompts differ"
                )
            return self._constant(path, two)
        if one is None or one.shape[1:] != two.shape[1:]:
            return self._condition(path, two[0], ragged=True)
        return (
            self._constant(path, two[:1], rows=True) if torch.equal(two[0], two[1]) else self._condition(path, two[0])
        )

    def _is_sample(self, value: Tensor) -> bool:
        same = value.shape[:1] == self.latents.shape[:1] and value.numel() == self.latents.numel()
        return same and difference(value.reshape(self.latents.shape), self.latents) <= SAME

    def _constant(self, path: str, value: Tensor, **rows: bool) -> dict[str, Any]:
        node = self._leaf("constant", path, value) | rows
        self.constants[node["name"]] = value
        return node

    def _condition(self, path: str, row: Tensor, **padded: bool) -> dict[str, Any]:
        node = self._leaf("condition", path, row) | padded
        if padded:
            if not isinstance(self.longest, int):
                raise ValueError(
                    f"the argument {path[1:]} has no maximum length, because max_sequence_length is not set. If the "
                    "pipeline's call takes it, set it with --call max_sequence_length=N. Otherwise, distil the network "
                    "in Python: halfstep.distill accepts any conditions"
                )
            node["shape"][0] = self.longest
        return node

    def _leaf(self, kind: str, path: str, value: Tensor) -> dict[str, Any]:
        name = path.rpartition(".")[2]
        if name == "class_labels" and not self.has_classes:
            # Some networks take text embeddings in this argument, but the name is reserved for classes.
            name = "class_embeddings"
        if name in self._names or name.isdigit():
            name = path[1:].replace(".", "_")
        self._names.add(name)
        return {"is": kind, "name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def reached(node: Mapping[str, Any], value: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield each leaf of a recorded call, along with its value in another call."""
    items = node.get("items")
    if items is None:
        yield node, value
        return
    if isinstance(items, Mapping):
        items, value = items.values(), [value[name] for name in items]
    for item, part in zip(items, value, strict=True):
        yield from reached(item, part)


def call_in(manifest: Manifest) -> dict[str, Any]:
    """Return the recorded call of an imported model, or of the imported model that a LoRA adapts."""
    call: dict[str, Any] = manifest.network.get("base", manifest.network)["call"]
    return call


def conditions_in(
    call: Mapping[str, Any], arguments: Mapping[str, Any], batch: int, first: int = 0
) -> dict[str, Tensor]:
    """Return a call's conditions, keyed by name, each `[batch, ...]` and padded with zeros.

    Args:
        first: the index of the batch's first row. A guided call contains two batches.
    """
    found: dict[str, Tensor] = {}
    leaves = [(node, value) for node, value in reached(call, arguments) if node["is"] == "condition"]
    lengths = [value.shape[1] for node, value in leaves if node.get("ragged") and value is not None]
    for node, value in leaves:
        name = node["name"]
        if value is None:
            # A pipeline may omit a mask that contains only ones.
            if not lengths:
                raise ValueError(f"the condition {name} is missing, and no other condition tells its length")
            value = torch.ones(first + batch, max(lengths), dtype=getattr(torch, node["dtype"]))
        rows = list(value[first : first + batch])
        if "list" in node:
            found[name + LENGTH] = torch.tensor([len(row) for row in rows])
        elif not node.get("ragged"):
            found[name] = torch.stack(rows)
            continue
        if (longest := max(len(row) for row in rows)) > node["shape"][0]:
            raise ValueError(f"the condition {name} has {longest} tokens, which is more than max_sequence_length")
        found[name] = rows[0].new_zeros(batch, *node["shape"])
        for place, row in enumerate(rows):
            found[name][place, : len(row)] = row
    return found
