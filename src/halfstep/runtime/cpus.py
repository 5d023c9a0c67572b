"""Counts the CPU cores that this process may use."""

import contextlib
import math
import os
from pathlib import Path

_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The CPU limit of a container (cgroup v2): the microseconds of CPU time in each period, and the period's length."""


def usable_cores() -> int:
    """Return the number of cores for this process, limited by its affinity and by its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        # The text "max" instead of a quota is a ValueError: no limit.
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
