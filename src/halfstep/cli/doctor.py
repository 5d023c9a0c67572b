"""`halfstep doctor`: what this machine and its packages can do here, what is missing, and what it would give."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any, Final, Literal, final

from rich.markup import escape
from rich.table import Table

from halfstep.cli.usage import Switch, parse
from halfstep.cli.words import console_for, print_json
from halfstep.runtime.files import cache_folder, first_line

GIVES: Final = {
    "text": "models of texts, such as Stable Diffusion: encode, distill and sample with --prompt",
    "lora": "students that are low-rank additions (--chain.lora-rank), and export --format lora",
    "onnx": "export --format onnx, the whole sampler as one graph",
    "explore": "halfstep explore, a local page on which models are asked",
    "inception": "distances in the features of the Inception network, as published FIDs are",
    "dinov2": "distances in the features of DINOv2",
    "tensorboard": "curves and samples in TensorBoard",
    "wandb": "curves and samples in Weights & Biases",
    "trackio": "curves and samples in Trackio",
}
"""What each extra of halfstep gives."""

OTHERS: Final = {"bitsandbytes": "--engine.optimizer adamw8bit, a quarter of the memory of AdamW's moments"}
"""Packages that are used if they are there, and what they give."""

REQUIRED: Final = ("torch", "diffusers", "accelerate", "numpy", "safetensors", "datasets", "pydantic", "tyro", "rich")
LEAST_DISK: Final = 2 * 2**30
"""Free bytes below which it is said: checkpoints of a small run, and the caches of data."""
IMPORT_SECONDS: Final = 120

Verdict = Literal["ok", "missing", "problem"]


@dataclass
class DoctorArguments:
    """Look at this machine: versions, devices, threads, free disk, the cache, and the packages that are missing, with
    what each would give. Nothing is changed. It ends with 0 also where it finds problems: they are in its output."""

    json: Switch = False
    """Print one JSON document."""


@final
@dataclass(frozen=True)
class Finding:
    """One thing looked at."""

    what: str
    verdict: Verdict
    """missing: optional, and not there. problem: something would fail."""
    found: str
    advice: str | None = None


def doctor(argv: Sequence[str]) -> None:
    """Prints what is found."""
    arguments = parse(DoctorArguments, argv, "halfstep doctor")
    findings = [*_packages(), *_torch(), *_diffusers(), *_extras(), *_places()]
    problems = [finding for finding in findings if finding.verdict == "problem"]
    if arguments.json:
        print_json(
            {
                "problems": len(problems),
                "python": platform.python_version(),
                "versions": {name: version_of(name) for name in ("halfstep", *REQUIRED)},
                "findings": [asdict(finding) for finding in findings],
            }
        )
        return
    console = console_for()
    table = Table.grid(padding=(0, 2))
    styles = {"ok": "green", "missing": "yellow", "problem": "bold red"}
    for finding in findings:
        text = escape(finding.found) + (f"\n[dim]{escape(finding.advice)}[/dim]" if finding.advice else "")
        table.add_row(f"[{styles[finding.verdict]}]{finding.verdict}[/]", finding.what, text)
    console.print(table, highlight=False)
    count = len(problems)
    console.print(
        "no problems found" if not count else f"{count} problem{'s' if count > 1 else ''}: see above", highlight=False
    )


def version_of(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> list[Finding]:
    shown = f"halfstep {version_of('halfstep')}, Python {platform.python_version()}, {platform.platform()}"
    findings = [Finding("halfstep", "ok", shown)]
    there = [f"{name} {version_of(name)}" for name in REQUIRED if version_of(name)]
    absent = [name for name in REQUIRED if not version_of(name)]
    findings.append(Finding("packages", "ok", ", ".join(there)))
    if absent:
        findings.append(Finding("packages", "problem", f"not installed: {', '.join(absent)}", "pip install halfstep"))
    return findings


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", "problem", f"torch cannot be imported ({first_line(error)})", "install it anew")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    findings = [
        Finding(
            "cpu",
            "ok",
            f"{platform.processor() or platform.machine()}, {cores} cores for this process, torch uses "
            f"{torch.get_num_threads()} threads{_memory()}",
            "another number: --engine.threads N, or OMP_NUM_THREADS=N",
        )
    ]
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    findings += [device_finding(name) for name in names]
    if not names:
        findings.append(
            Finding("accelerator", "missing", "no CUDA, ROCm or Metal device: all runs on the CPU", _why_no_cuda(torch))
        )
    return findings


def _why_no_cuda(torch: Any) -> str | None:
    if torch.version.cuda or torch.version.hip:
        return f"this torch is built for {'CUDA' if torch.version.cuda else 'ROCm'}: a driver or a device is not there"
    if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        return "there is a driver, but this torch is built for CPUs only: install the torch for your GPU"
    return None


def device_finding(name: str) -> Finding:
    """Whether a device computes, its memory, and whether it has float64, in which clocks are kept."""
    import torch

    try:
        device = torch.device(name)
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        return Finding(
            name, "problem", f"it does not compute ({first_line(error)})", "stay on the CPU with --engine.cpu"
        )
    shown = torch.cuda.get_device_name(device) if device.type == "cuda" else "Apple's GPU"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shown += f", {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        shown += ", bfloat16" if torch.cuda.is_bf16_supported() else ", no bfloat16: leave --engine.precision float32"
    if not has_float64(device):
        return Finding(
            name,
            "problem",
            f"{shown}, no float64",
            "clocks and schedules are float64 here: train and sample on the CPU (--engine.cpu, --device cpu)",
        )
    return Finding(name, "ok", shown)


def has_float64(device: Any) -> bool:
    """Whether the device knows float64; Metal does not."""
    import torch

    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def _memory() -> str:
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return f", {total / 2**30:.1f} GiB of memory"
    return ""


def _diffusers() -> list[Finding]:
    """diffusers imported in a process of its own: what breaks it must not break this one."""
    # A torchvision of another torch fails when its operators are registered, deep inside the import of a pipeline.
    code = "from diffusers import DDPMPipeline, UNet2DModel, DDIMScheduler"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("diffusers", "problem", f"its import does not end ({first_line(error)})", None)]
    if ended.returncode == 0:
        return [Finding("diffusers", "ok", "pipelines, networks and schedulers can be imported")]
    return [diffusers_failure(ended.stderr, version_of("torch"), version_of("torchvision"))]


def diffusers_failure(errors: str, torch: str | None, torchvision: str | None) -> Finding:
    """What a failed import of diffusers means."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else "it ended without a word"
    named = [line for line in lines if "torchvision" in line and not line.startswith("File ")]
    if torchvision is not None and named:
        return Finding(
            "diffusers",
            "problem",
            f"torchvision {torchvision} does not fit torch {torch} and breaks diffusers ({named[-1]})",
            "pip uninstall torchvision (halfstep does not need it), or install the one built for this torch",
        )
    return Finding("diffusers", "problem", f"it cannot be imported ({last})", "pip install --upgrade diffusers")


def extras() -> dict[str, tuple[str, ...]]:
    """The extras of the installed halfstep, with the packages of each."""
    found: dict[str, tuple[str, ...]] = {}
    for line in requires("halfstep") or []:
        matched = re.match(r"([\w.-]+).*;.*extra *== *['\"]([\w-]+)['\"]", line)
        if matched:
            found[matched[2]] = (*found.get(matched[2], ()), matched[1])
    return found


def _extras() -> list[Finding]:
    findings = [extra_finding(name, packages, f"halfstep[{name}]") for name, packages in extras().items()]
    return findings + [extra_finding(name, (name,), name) for name in OTHERS]


def extra_finding(name: str, packages: Sequence[str], install: str) -> Finding:
    """Whether the packages of an extra are there, and what they would give."""
    absent = [package for package in packages if version_of(package) is None]
    if not absent:
        return Finding(name, "ok", ", ".join(f"{package} {version_of(package)}" for package in packages))
    gives = GIVES.get(name) or OTHERS.get(name)
    shown = f"not installed: {', '.join(absent)}" + (f"; would give {gives}" if gives else "")
    return Finding(name, "missing", shown, f"pip install '{install}'")


def _places() -> list[Finding]:
    places = {
        "runs": (Path("runs"), "start halfstep in another folder, or give --out"),
        "cache": (cache_folder(), "set HALFSTEP_CACHE to a folder that can be written"),
        "temporary files": (Path(tempfile.gettempdir()), "set TMPDIR"),
    }
    return [place_finding(name, path, advice) for name, (path, advice) in places.items()]


def place_finding(name: str, path: Path, advice: str) -> Finding:
    """Whether a folder can be written, or made, and the space that is free there."""
    path = path.expanduser().absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        return Finding(name, "problem", f"{path}: {there} is a file", advice)
    try:
        # Permissions do not tell of read-only file systems.
        with tempfile.NamedTemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(name, "problem", f"{path} cannot be written ({error.strerror})", advice)
    shown = f"{path}, {free / 2**30:.1f} GiB free"
    if free < LEAST_DISK:
        return Finding(name, "problem", shown, "little space: checkpoints and caches may not fit")
    return Finding(name, "ok", shown)
