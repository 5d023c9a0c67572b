"""Argument checks that recognise the most common mistakes and suggest the fix."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn


def got(value: Any) -> str:
    """Return a short description of a value for an error message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str | Path):
        return f"the {type(value).__name__} {str(value)!r}"
    return f"a {type(value).__name__}"


def check_instance(name: str, value: Any, kind: type, example: str) -> None:
    """Raise ValueError unless `value` is an instance of `kind`.

    Args:
        example: Python code that creates one.
    """
    if isinstance(value, kind):
        return
    if isinstance(value, type) and issubclass(value, kind):
        raise ValueError(f"{name} must be an instance, got the class {value.__name__}. Call it: {value.__name__}(...)")
    raise ValueError(f"{name} must be a {kind.__name__}, got {got(value)}. Pass {example}")


def check_denoiser(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless `value` is a denoiser.

    Args:
        kind: the class `Denoiser`, passed in because its module imports this one.
    """
    if isinstance(value, str | Path):
        path = str(value)
        raise ValueError(f"{name} must be a denoiser, got the path {path!r}. Load it: halfstep.load({path!r})")
    if (
        not isinstance(value, kind)
        and not isinstance(value, type)
        and (isinstance(value, nn.Module) or callable(value))
    ):
        raise ValueError(
            f"{name} must be a denoiser, got the network {type(value).__name__}. Wrap it with its noise process and "
            "prediction: halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())"
        )
    check_instance(name, value, kind, "halfstep.NetworkDenoiser(network, process, prediction)")


def check_noise(x_t: Any, shape: tuple[int, ...] | None, module: nn.Module) -> None:
    """Raise ValueError unless `x_t` is a float batch of this shape on the module's device.

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
            f"the noise has shape {list(x_t.shape)}, but the model generates samples of shape {list(shape)}. Pass "
            f"noise of shape [{needed}]"
        )
    weight = next(module.parameters(), None)
    if weight is not None and weight.device != x_t.device:
        raise ValueError(
            f"the model is on {weight.device}, but the noise is on {x_t.device}. Move one: "
            f"noise.to({str(weight.device)!r})"
        )
