"""Collects the versions, commit, machine and command line of a run."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from halfstep.runtime.launch import command


def device_name() -> str:
    """Return the name of the GPU, or of the processor if no GPU is available."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else (platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """Return the information needed to reproduce a run, as JSON-ready data.

    The command is None if halfstep was called by a Python program, whose arguments would not reproduce the run.
    """
    versions = {}
    for package in ("halfstep", "torch", "diffusers", "accelerate", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    try:
        commit = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"],
            capture_output=True, text=True, timeout=5, check=False,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_commit": commit or None,
        "platform": platform.platform(),
        "device": device_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": command(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
