"""Format numbers, durations and counts for display."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from halfstep.runs import is_finite
from halfstep.runs.schema import flatten

SAMPLER_LABELS: Final = {"ddim": "DDIM", "euler": "Euler", "heun": "Heun", "rk4": "RK4", "dpmpp_2m": "DPM-Solver++(2M)"}


def sampler_label(name: str) -> str:
    """Return a sampler's display name."""
    return SAMPLER_LABELS.get(name, name)


def method_words(sampler: str, num_steps: int, num_evals: int) -> str:
    """Return a description such as "Heun, 32 steps (63 calls)"."""
    return f"{sampler_label(sampler)}, {count(num_steps, 'step')} ({count(num_evals, 'call')})"


def distance_words(frechet: float, kid: float | None, too_few: bool) -> str:
    """Return a model's quality as text, such as "distance 1.23", or its KID if there are too few samples."""
    return f"KID {number(kid)}" if too_few else f"distance {number(frechet)}"


def number(value: float | None) -> str:
    """Format a number with three significant digits, an integer in full, and None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_spread(mean: float, spread: float | None) -> str:
    """Format a mean, followed by the standard deviation if it is known."""
    return number(mean) + ("" if spread is None else f" ± {number(spread)}")


def times(value: float) -> str:
    """Format a factor as "61", "6.3" or "1.21"."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """Format a duration in its two largest units."""
    if not math.isfinite(seconds) or seconds < 0:
        return "unknown"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {int(seconds % 60)} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def count(num: int, noun: str) -> str:
    """Return "1 step", "4 steps" or "2 classes"."""
    return f"{num:,} {noun}" + ("" if num == 1 else "es" if noun.endswith("s") else "s")


def inside(folder: Path, error: Exception) -> str:
    """Return an error's message with paths relative to `folder`, so that it reveals nothing about the machine."""
    return str(error).replace(f"{folder}/", "")


def flat_words(data: Mapping[Any, Any]) -> dict[str, str]:
    """Return nested data as a mapping from dotted names to strings."""
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in flatten(data).items()
    }


def ratio(value: float | None, base: float | None) -> float | None:
    """Return value / base if both are finite and the base is above 0, otherwise None."""
    if value is None or base is None or not (is_finite(value) and is_finite(base) and base > 0):
        return None
    return value / base
