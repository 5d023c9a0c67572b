"""Argument checks that recognise common mistakes and suggest a fix."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

OWNERS: Final = {"data": "halfstep.DataConfig", "engine": "halfstep.Engine", "evaluation": "halfstep.Evaluation"}
"""The class for each section of options, with one field per option."""
ARGUMENTS: Final = ("out", "to", "start", "lora_rank", "prediction", "process")
"""The arguments of `fit` and `distill` that are also command-line options."""

FORBID_EXTRA: Final = {"extra": "forbid"}
"""The pydantic setting that rejects unknown fields in the dataclasses nested in a recipe."""


@contextmanager
def in_python() -> Iterator[None]:
    """Add a note to a ValueError for each command-line option in its message, with the option's Python equivalent.

    Tracebacks show these notes, but the command line's one-line errors do not.
    """
    try:
        yield
    except ValueError as error:
        for section, option in dict.fromkeys(re.findall(r"(?<!\S)--(?:([a-z]+)\.)?([a-z][a-z-]*)", str(error))):
            name, typed = option.removeprefix("no-").replace("-", "_"), f"{section}." if section else ""
            if section in OWNERS:
                meant = f"{OWNERS[section]}({name}={'False' if option.startswith('no-') else '...'})"
            elif (section, name) in (("matching", "guidance_scale"), ("matching", "guidance_range")):
                meant = "the argument `guidance`, such as halfstep.FixedGuidance(4.0)"
            elif name in ARGUMENTS:
                meant = f"the argument {name}"
            else:
                continue
            note = f"In Python, --{typed}{option} is {meant}."
            if note not in getattr(error, "__notes__", ()):
                error.add_note(note)
        raise


def got(value: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | Path):
        return f"the {type(value).__name__} {str(value)!r}"
    return _with_article(type(value).__name__)


def _with_article(name: str) -> str:
    """Return the name of a class, preceded by "a" or "an"."""
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def check_instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is an instance of `kind`.

    Args:
        example: Python code that creates such an instance.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name} must be an instance, got the class {value.__name__}. Call it: {value.__name__}(...)")
    raise ValueError(f"{name} must be {_with_article(kind.__name__)}, got {got(value)}. Pass {example}")


def check_denoiser(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is a denoiser.

    Args:
        kind: the class `Denoiser`, passed as an argument because its module imports this module.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, str | Path):
        path = str(value)
        raise ValueError(f"{name} is the path {path!r}, but a loaded model is needed. Load it: halfstep.load({path!r})")
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name} is the class {value.__name__}, not an instance. Call it: {value.__name__}(...)")
    if isinstance(value, type) or not callable(value):
        raise ValueError(
            f"{name} is {got(value)}, which cannot denoise. Pass halfstep.NetworkDenoiser(network, "
            "halfstep.VPCosine(), halfstep.V())"
        )
    raise ValueError(
        f"{name} is the network {_name_of(value)} alone, whose noise process and prediction are unknown. Wrap it: "
        "halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())"
    )


def _name_of(value: Any) -> str:
    """Return the name of a function, or of the class of any other object."""
    return str(getattr(value, "__name__", type(value).__name__))


def check_number(name: str, value: object, least: float = 0.0, below: float = math.inf, *, above: bool = False) -> None:
    """Raise ValueError unless the setting `name` is a number in [least, below).

    If `above` is true, the number must also be greater than `least`.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if is_number and (least < value if above else least <= value) and value < below:  # type: ignore[operator]
        return
    if below < math.inf:
        raise ValueError(f"{name} must be in [{least:g}, {below:g}), got {value!r}")
    raise ValueError(f"{name} must be a finite number {'above' if above else 'of at least'} {least:g}, got {value!r}")


MOST_UPDATES: Final = 10**9
"""The largest allowed number of updates, and the default limit for all other counts."""


def check_whole(name: str, value: object, least: int = 1, most: int = MOST_UPDATES) -> None:
    """Raise ValueError unless the setting `name` is a whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if value > most:
        raise ValueError(f"{name} must be at most {most:,}, got {value}")


def check_switch(name: str, value: object) -> None:
    """Raise ValueError unless the setting `name` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_real(**values: object) -> None:
    """Raise ValueError unless all arguments are real numbers."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")


def failed_call(what: str, x_t: Tensor, cond: Mapping[str, Tensor] | None, error: Exception, remedy: str) -> ValueError:
    """Return a one-line error that contains the cause of a failed call and the dtypes and shapes of its inputs.

    Args:
        what: a description of the callable, such as "the network".
    """
    forms = [f"{name} {form_of(value)}" for name, value in {"x_t": x_t, **(cond or {})}.items()]
    lines = str(error).strip().splitlines() or [""]
    fault = lines[-1].strip() if isinstance(error, ValueError) else f"{type(error).__name__}: {lines[-1].strip()}"
    return ValueError(f"{what} fails on {', '.join(forms)} ({fault}). {remedy}")


def form_of(value: Tensor) -> str:
    """Return the dtype and shape of a tensor as text."""
    return f"{value.dtype} {list(value.shape)}"


def check_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of a sample as a tuple of ints.

    Raises:
        ValueError: if a dimension is not a whole number of at least 1.
    """
    sides = tuple(shape) if isinstance(shape, Iterable) and not isinstance(shape, str) else None
    sides = None if sides is None else tuple(side.item() if hasattr(side, "item") else side for side in sides)
    if sides is None or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise ValueError(
            f"the shape of a sample must consist of whole numbers of at least 1, got {shape!r}. Pass a shape such as "
            "(3, 32, 32)"
        )
    return sides


def check_noise(x_t: Any, shape: tuple[int, ...] | None, module: nn.Module) -> None:
    """Raise ValueError unless `x_t` is a batch of float samples of this shape on the module's device.

    If `shape` is None, the samples may have any shape.
    """
    check_instance("the noise", x_t, Tensor, "torch.randn(16, *shape)")
    if not x_t.is_floating_point() or x_t.ndim == 0:
        raise ValueError(
            f"the noise must be a float tensor [batch, *dims], got {x_t.dtype} of shape {list(x_t.shape)}. Pass "
            "torch.randn(16, *shape)"
        )
    if shape is not None and tuple(x_t.shape[1:]) != shape:
        needed = ", ".join(map(str, ("batch", *shape)))
        raise ValueError(
            f"the noise has shape {list(x_t.shape)}, but the model generates samples of shape {list(shape)}. Pass "
            f"noise of shape [{needed}]"
        )
    weight = next(module.parameters(), None)
    if weight is not None and weight.device != x_t.device:
        raise ValueError(
            f"the model is on {weight.device}, but the noise is on {x_t.device}. Move one of them: "
            f"noise.to({str(weight.device)!r})"
        )
