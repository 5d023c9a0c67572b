"""The sampling loop, implemented as a generator so that callers can observe, stop or record it."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.door import check_denoiser, check_instance, check_noise, failed_call, got
from halfstep.core.grids import check_num_steps, uniform_times
from halfstep.runtime.failures import is_out_of_memory
from halfstep.samplers.base import Memory, Sampler
from halfstep.samplers.ddim import DDIM

StepNoise = Callable[[int], Tensor]
"""A function that maps a step number to standard normal noise `[batch, *dims]`; see `step_noise`. The numbers start
at 0 and, unlike `SamplerStep.number`, do not count steps of length 0."""


class SamplerStep(NamedTuple):
    """A completed step of a trajectory, with its `number`, the times t and s, and the samples `x_s` `[batch, *dims]`.

    Steps are numbered from 0.
    """

    number: int
    t: float
    s: float
    x_s: Tensor


ROUNDING: Final = 1e-6
"""The maximum distance by which a grid's times may fall outside [0, 1]."""


def _times(times: Tensor, num_steps: int) -> list[float]:
    """Return the times of a grid as floats in [0, 1].

    Raises:
        ValueError: if the grid does not consist of `num_steps + 1` decreasing times in [0, 1]. Times outside [0, 1]
            by at most `ROUNDING` are accepted and clamped, except that a negative time before the last is replaced by
            its absolute value. Steps of length 0 are also accepted, because some schedulers end with such a step.
    """
    found = torch.as_tensor(times, dtype=torch.float64).flatten().tolist()
    within = [min(max(t, 0.0), 1.0) for t in found]
    is_near = all(abs(t - time) <= ROUNDING for t, time in zip(found, within, strict=True))
    falls = all(s <= t for t, s in itertools.pairwise(within)) and len(set(within)) > 1
    if is_near and falls and len(found) == num_steps + 1:
        # At time 0, samples are clean. A scheduler that ends with a small noise level and then 0 needs both steps, even
        # if this level has been rounded to a time below 0.
        return [
            min(-t, within[place - 1]) if t < 0 and place < num_steps else within[place]
            for place, t in enumerate(found)
        ]
    raise ValueError(
        f"the grid of {num_steps} steps must consist of {num_steps + 1} decreasing times in [0, 1], got {found[:8]}. "
        "Remove grid to use the default, or pass a function such as lambda n: torch.linspace(1, 0, n + 1)"
    )


@torch.no_grad()
def trajectory(
    denoiser: Denoiser,
    x_t: Tensor,
    num_steps: int | None = None,
    sampler: Sampler | None = None,
    cond: Cond | None = None,
    grid: Callable[[int], Tensor] = uniform_times,
    noise: StepNoise | None = None,
) -> Iterator[SamplerStep]:
    """Yield each sampling step from the noise `x_t` `[batch, *dims]` at t = 1 down to clean data.

    Args:
        num_steps: the number of sampler steps, at least 1; None uses the number that a student was distilled for.
        sampler: the sampler; None uses the sampler that a student was distilled for, or else DDIM().
        cond: the conditions, keyed by name, each `[batch, ...]`.
        grid: a function that maps `num_steps` to `num_steps + 1` decreasing times. A step between equal times returns
            its samples unchanged, without a call of the sampler.
        noise: the noise that a stochastic sampler adds at each step, or None for a deterministic sampler. Steps between
            equal times add no noise and are not counted.

    Raises:
        ValueError: if `num_steps` is unknown or not a whole number of at least 1, if noise is missing or would not be
            used, or if an argument has the wrong type, shape or device.
    """
    check_denoiser("the model to sample", denoiser, Denoiser)
    check_noise(x_t, denoiser.shape, denoiser)
    if num_steps is None:
        num_steps = denoiser.num_steps
        if num_steps is None:
            raise ValueError(
                "an undistilled model works with any number of steps. Pass num_steps to choose one, such as "
                "num_steps=64"
            )
    check_num_steps(num_steps)
    method = (denoiser.sampler or DDIM()) if sampler is None else sampler
    check_instance("the sampler", method, Sampler, "halfstep.DDIM() or halfstep.Heun()")
    if cond is not None and not isinstance(cond, Mapping):
        raise ValueError(
            f"cond must be a mapping of names to tensors, got {got(cond)}. Pass {{'class_labels': labels}}"
        )
    for name, value in (cond or {}).items():
        if not isinstance(value, Tensor) or value.shape[:1] != x_t.shape[:1]:
            shape = f" of shape {list(value.shape)}" if isinstance(value, Tensor) else ""
            raise ValueError(
                f"the condition {name} must be a tensor [{len(x_t)}, ...] with one row per sample, got "
                f"{got(value)}{shape}. Repeat the condition for each sample"
            )
    if method.stochastic and noise is None:
        raise ValueError(
            f"{type(method).__name__} needs noise at each step. Pass noise=step_noise(seeds, shape), or a function of "
            "your own"
        )
    if not method.stochastic and noise is not None:
        raise ValueError(
            f"{type(method).__name__} does not use noise. Remove the argument `noise`, or choose a stochastic sampler"
        )
    for name, function in (("grid", grid), ("noise", noise)):
        if function is not None and not callable(function):
            raise ValueError(
                f"{name} must be a function that takes a number, got {got(function)}. Pass lambda number: ..."
            )
    times = _times(grid(num_steps), num_steps)
    memory: Memory = None
    taken = 0
    for number, (t, s) in enumerate(itertools.pairwise(times)):
        if t == s:
            # In a step of length 0, many formulas are 0 / 0.
            yield SamplerStep(number, t, s, x_t)
            continue
        drawn = None if noise is None else noise(taken).to(x_t)
        if drawn is not None and drawn.shape != x_t.shape:
            raise ValueError(f"the noise of a step must have the shape {list(x_t.shape)}, got {list(drawn.shape)}")
        try:
            x_t, memory = method.step(denoiser, x_t, t, s, cond, memory, drawn)
        except Exception as error:
            # Invalid inputs raise exactly these types. A subclass of RuntimeError has a different cause, such as
            # running out of memory.
            known = type(error) in (TypeError, RuntimeError, IndexError, AttributeError)
            if taken or not known or is_out_of_memory(error):
                raise
            remedy = "Pass the same kind of noise and conditions as in training, in the dtype of the model"
            raise failed_call(type(denoiser).__name__, x_t, cond, error, remedy) from error
        taken += 1
        yield SamplerStep(number, t, s, x_t)


def sample(
    denoiser: Denoiser,
    x_t: Tensor,
    num_steps: int | None = None,
    sampler: Sampler | None = None,
    cond: Cond | None = None,
    grid: Callable[[int], Tensor] = uniform_times,
    noise: StepNoise | None = None,
) -> Tensor:
    """Return the clean samples x0 `[batch, *dims]` at the end of `trajectory`, with the same arguments and errors.

    The noise and the conditions are moved to the denoiser's device, and the samples to the noise's device. Sampling
    clips x0 only if the denoiser does (see `Clipped`), as models returned by `load` do for images.
    """
    weight = next(denoiser.parameters(), None) if isinstance(denoiser, torch.nn.Module) else None
    if weight is None or not isinstance(x_t, Tensor) or x_t.is_meta or weight.device == x_t.device:
        x_s = x_t
    else:
        x_s = x_t.to(weight.device)
        if isinstance(cond, Mapping):
            cond = {name: value.to(weight.device) for name, value in cond.items()}
    for step in trajectory(denoiser, x_s, num_steps, sampler, cond, grid, noise):
        x_s = step.x_s
    return x_s if x_s is x_t else x_s.to(x_t.device)
