"""Run a diffusers pipeline, and record the inputs and outputs of its denoiser and scheduler."""

import copy
import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from halfstep.hub.schedulers import COSINE
from halfstep.hub.stock import in_one_line, quiet

STEPS: Final = 4
"""Number of steps in a recording: two more than an affine clock's number of unknowns."""


class Call(NamedTuple):
    """One call of the denoiser."""

    arguments: dict[str, Any]
    output: Tensor


class Step(NamedTuple):
    """One scheduler step, and the denoiser calls since the previous step."""

    calls: tuple[Call, ...]
    output: Tensor
    """The model output passed to the scheduler."""
    timestep: float
    sigma: float | None
    """The sigma of a flow-matching scheduler."""
    before: Tensor
    after: Tensor


@final
@dataclass
class Trace:
    """A recorded pipeline run, possibly stopped after one of the scheduler's steps."""

    steps: list[Step] = field(default_factory=list)
    mu: float | None = None
    """The dynamic shift set by the pipeline."""


class _Enough(BaseException):
    """Raised when everything requested has been recorded."""


def component_of(pipe: Any) -> str:
    """Return the name of a pipeline's only denoiser.

    Raises:
        ValueError: if the pipeline has no denoiser or several denoisers.
    """
    names = ("transformer", "transformer_2", "unet", "prior", "decoder")
    found = [name for name in names if pipe.components.get(name) is not None]
    if len(found) != 1 or found[0] not in ("transformer", "unet"):
        parts = ", ".join(found) or "no transformer or unet"
        raise ValueError(f"{type(pipe).__name__} has {parts}, but exactly one denoiser is needed")
    return found[0]


def prompted(pipe: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """Return `prompts` as a pipeline call argument: `prompt` or `class_labels`.

    Raises:
        ValueError: if the call takes neither prompts nor classes.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", "class_labels"):
        if name in taken:
            return {name: list(prompts)}
    raise ValueError(f"{type(pipe).__name__} takes neither prompt nor class_labels, so it cannot be recorded")


def trace(pipe: Any, num_steps: int, *, of: int = STEPS, **call: Any) -> Trace:
    """Run the first `num_steps` of a pipeline's `of` steps with the arguments `call`, and return the trace.

    Raises:
        ValueError: if the pipeline fails or takes fewer steps.
    """
    found, calls = Trace(), list[Call]()
    module, scheduler = getattr(pipe, component_of(pipe)), pipe.scheduler
    step, set_timesteps = scheduler.step, scheduler.set_timesteps
    stepped = inspect.signature(step)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        first = output[0]
        first = torch.stack(list(first)) if isinstance(first, list | tuple) else first
        calls.append(Call(_arguments(module, args, kwargs), first.clone()))

    @functools.wraps(step)
    def seen(*args: Any, **kwargs: Any) -> Any:
        bound = stepped.bind(*args, **kwargs).arguments
        sample = bound["sample"].clone()
        result = step(*args, **kwargs)
        place, moved = getattr(scheduler, "step_index", None), result[0].clone()
        sigma = None if place is None else float(scheduler.sigmas[place - 1])
        if type(scheduler).__name__ == COSINE:
            # This scheduler's samples grow with the noise, but the denoiser receives them at unit variance.
            sample, moved = (
                value / (float(scheduler.sigmas[at]) ** 2 + 1) ** 0.5
                for value, at in ((sample, scheduler.step_index - 1), (moved, scheduler.step_index))
            )
        found.steps.append(
            Step(tuple(calls), bound["model_output"].clone(), float(bound["timestep"]), sigma, sample, moved)
        )
        calls.clear()
        if len(found.steps) == num_steps:
            raise _Enough
        return result

    @functools.wraps(set_timesteps)
    def set_seen(*args: Any, **kwargs: Any) -> Any:
        found.mu = kwargs.get("mu")
        return set_timesteps(*args, **kwargs)

    scheduler.step, scheduler.set_timesteps = seen, set_seen
    try:
        with module.register_forward_hook(called, with_kwargs=True):
            _run(pipe, of, call)
    finally:
        del scheduler.step, scheduler.set_timesteps
    if len(found.steps) < num_steps:
        raise ValueError(f"{type(pipe).__name__} took {len(found.steps)} of the {num_steps} requested steps")
    return found


def first_arguments(pipe: Any, **call: Any) -> dict[str, Any]:
    """Return the arguments of the denoiser's first call. The denoiser is not run, so it needs no weights.

    Raises:
        ValueError: if the pipeline fails or does not call its denoiser.
    """
    found: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(_arguments(module, args, kwargs))
        raise _Enough

    with getattr(pipe, component_of(pipe)).register_forward_pre_hook(stop, with_kwargs=True):
        _run(pipe, STEPS, call)
    if not found:
        raise ValueError(f"{type(pipe).__name__} does not call its denoiser")
    return found


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return copies of a call's arguments, keyed by name, because the pipeline may change the originals later."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return {name: copy.deepcopy(value) for name, value in bound.items() if name not in ("self", "return_dict")}


@torch.no_grad()
def _run(pipe: Any, num_steps: int, call: dict[str, Any]) -> None:
    """Run a pipeline until it ends or a hook raises `_Enough`. A single negative prompt applies to all prompts."""
    pipe.set_progress_bar_config(disable=True)
    # Many pipelines reject a single negative prompt if the prompts are a list.
    call = call | {
        name: [value] * len(call["prompt"])
        for name, value in call.items()
        if name.startswith("negative_prompt") and isinstance(value, str)
    }
    try:
        with quiet():
            pipe(num_inference_steps=num_steps, generator=torch.Generator().manual_seed(0), **call)
    except _Enough:
        pass
    except Exception as error:  # pipelines raise many exception types for wrong arguments or parts
        raise ValueError(f"calling {type(pipe).__name__} failed ({in_one_line(error)})") from None
