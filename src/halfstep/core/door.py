"""Checks of arguments, with the usual fix: what is passed most often instead of an object, and what was meant."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

OWNERS: Final = {"data": "halfstep.DataConfig", "engine": "halfstep.Engine", "evaluation": "halfstep.Evaluation"}
"""The classes whose fields are the options of a section."""
ARGUMENTS: Final = ("out", "to", "start", "lora_rank", "prediction", "process")
"""Arguments of `fit` and `distill` that the command line has too."""


@contextmanager
def in_python() -> Iterator[None]:
    """Add notes to a ValueError that names options of the command line: their names in Python.

    A traceback shows notes; the one line of the command line does not.
    """
    try:
        yield
    except ValueError as error:
        for section, option in dict.fromkeys(re.findall(r"(?<!\S)--(?:([a-z]+)\.)?([a-z][a-z-]*)", str(error))):
            name, typed = option.removeprefix("no-").replace("-", "_"), f"{section}." if section else ""
            if section in OWNERS:
                meant = f"{OWNERS[section]}({name}={'False' if option.startswith('no-') else '...'})"
            elif name in ARGUMENTS:
                meant = f"the argument {name}"
            else:
                continue
            note = f"In Python, --{typed}{option} is {meant}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def got(value: Any) -> str:
    """Return what a value is, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | Path):
        return f"the {type(value).__name__} {str(value)!r}"
    return f"a {type(value).__name__}"


def check_instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is an instance of `kind`.

    Args:
        example: how one is made, as Python code.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name} must be an instance, got the class {value.__name__}. Call it: {value.__name__}(...)")
    raise ValueError(f"{name} must be a {kind.__name__}, got {got(value)}. Pass {example}")


def check_denoiser(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is a denoiser.

    Args:
        kind: the class `Denoiser`, which imports this module.
    """
    if isinstance(value, str | Path):
        raise ValueError(f"{name} must be a model, got the path {str(value)!r}. Load it: halfstep.load({str(value)!r})")
    if (
        not isinstance(value, kind)
        and not isinstance(value, type)
        and (isinstance(value, nn.Module) or callable(value))
    ):
        raise ValueError(
            f"{name} must be a denoiser, got the network {type(value).__name__}. Say how noise was added and what its "
            "output means: halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())"
        )
    check_instance(name, value, kind, "halfstep.NetworkDenoiser(network, process, prediction)")


def check_noise(x_t: Any, shape: tuple[int, ...] | None, module: nn.Module) -> None:
    """Raise ValueError unless `x_t` is a batch of floats of this shape on the module's device.

    Args:
        shape: shape of one sample; None accepts any.
    """
    check_instance("the noise", x_t, Tensor, "torch.randn(16, *shape)")
    if not x_t.is_floating_point() or x_t.ndim == 0:
        raise ValueError(
            f"the noise must be floats [batch, *dims], got {x_t.dtype} of shape {list(x_t.shape)}. Pass "
            "torch.randn(16, *shape)"
        )
    if shape is not None and tuple(x_t.shape[1:]) != shape:
        needed = ", ".join(map(str, ("batch", *shape)))
        raise ValueError(
            f"the noise has the shape {list(x_t.shape)}, but the model makes samples of shape {list(shape)}. Pass "
            f"noise of shape [{needed}]"
        )
    weight = next(module.parameters(), None)
    if weight is not None and weight.device != x_t.device:
        raise ValueError(
            f"the model is on {weight.device}, but the noise is on {x_t.device}. Move one: "
            f"noise.to({str(weight.device)!r})"
        )
