"""The clock of a recorded pipeline, which maps noise levels to the times passed to its denoiser."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfstep.core.noise import processes
from halfstep.hub.calls import SAME, reached
from halfstep.hub.schedulers import Schedule
from halfstep.hub.trace import Step, Trace


def fit_clock(schedule: Schedule, call: Mapping[str, Any], two: Trace) -> dict[str, Any]:
    """Return a pipeline's clock, fitted to a trace for two prompts.

    Raises:
        ValueError: if no clock matches to within a relative error of 1e-6.
    """
    shown = [shown_time(call, step) for step in two.steps]
    times, seen = grid_of(schedule, two)[:-1], torch.tensor(shown, dtype=torch.float64)
    alpha, sigma = schedule.process.alpha_sigma(times)
    rules = {"u": times, "sigma": sigma, "angle": torch.atan2(sigma, alpha) * (2 / math.pi)}
    allowed = SAME * max(1.0, float(seen.abs().max()))
    for of in ("sigma", "u", "angle") if schedule.is_flow else ("u", "angle", "sigma"):
        design = torch.stack([rules[of], torch.ones_like(times)], dim=1)
        scale, offset = (_snapped(float(number), allowed) for number in torch.linalg.lstsq(design, seen).solution)
        if float((scale * rules[of] + offset - seen).abs().max()) <= allowed:
            clock = {"of": of, "scale": scale, "offset": offset}
            return clock if of == "u" else clock | {"process": processes.describe(schedule.process)}
    raise ValueError(
        f"its denoiser receives the times {', '.join(f'{x:.6g}' for x in shown)} at the noise levels "
        f"{', '.join(f'{float(x):.6g}' for x in sigma)}, but these times are not affine in t, sigma or the angle of "
        "(alpha, sigma)"
    )


def _snapped(number: float, allowed: float) -> float:
    """Round to three decimals, to remove float32 errors, unless this changes the number by more than `allowed`."""
    near = round(number, 3)
    return near + 0.0 if abs(near - number) <= allowed else number


def shown_time(call: Mapping[str, Any], step: Step) -> float:
    """Return the time passed to the denoiser in a step."""
    for node, value in reached(call, step.calls[0].arguments):
        if node["is"] == "time":
            return float(value.flatten()[0])
    raise ValueError("its denoiser has no time argument (a number that changes from step to step)")


def grid_of(schedule: Schedule, made: Trace) -> Tensor:
    """Return the start and end times of a trace's steps, in float64."""
    starts = [schedule.time_of(step.timestep, step.sigma) for step in made.steps]
    return torch.tensor([*starts, schedule.last_time], dtype=torch.float64)
