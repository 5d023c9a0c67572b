"""Create an optimiser by name, and convert an optimiser's state to named tensors."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from halfstep.objectives import Training


def make_optimizer(kind: str, parameters: list[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """Return torch's AdamW or the 8-bit AdamW of bitsandbytes.

    The paged variant can move the moments to CPU memory when the GPU's memory is full.

    Raises:
        ValueError: if the kind is unknown, or the package bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {
        "lr": training.learning_rate,
        # torch rejects a pair of an integer and a float, such as (0, 0.99).
        "betas": tuple(map(float, training.adam_betas)),
        "weight_decay": training.weight_decay,
    }
    if kind == "adamw":
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.AdamW(parameters, fused=fused, **settings)
    made = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}
    if kind not in made:
        raise ValueError(f"unknown optimizer {kind!r} (known: adamw, {', '.join(made)})")
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError(f"the optimizer {kind} needs the package bitsandbytes: pip install bitsandbytes") from None
    for parameter in parameters:
        # bitsandbytes does this in the first step, but a resumed stage creates moments in the layout of the weights
        # before that step.
        parameter.data = parameter.data.contiguous()
    optimizer: torch.optim.Optimizer = getattr(bitsandbytes.optim, made[kind])(parameters, **settings)
    return optimizer


def flatten_state(entry: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of one parameter's optimiser state. In a nested group, the name is "group/name"."""
    for key, value in entry.items():
        if isinstance(value, Mapping):
            yield from flatten_state(value, f"{prefix}{key}/")
        else:
            # Parameters share the tensors of groups, and safetensors files must not contain shared tensors.
            yield f"{prefix}{key}", torch.as_tensor(value).clone() if prefix else torch.as_tensor(value)
