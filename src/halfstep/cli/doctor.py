"""`halfstep doctor`: checks this machine and the installed packages."""

import contextlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final, Literal, final

from rich.table import Table
from rich.text import Text

from halfstep.cli.usage import Switch, parse
from halfstep.cli.words import Screen, print_json
from halfstep.runtime.cpus import usable_cores
from halfstep.runtime.files import cache_folder, first_line

GIVES: Final = {
    "text": "text-conditioned models such as Stable Diffusion, in encode, distill and sample --prompt",
    "clips": "encode --data with videos (except .gif files) and sounds (except .wav files)",
    "lora": "LoRA students (--chain.lora-rank) and export --format lora",
    "onnx": "export --format onnx (the whole sampler as one graph) and --format web",
    "explore": "halfstep explore, a local page for sampling from a run's models",
    "inception": "distances between Inception features, as in published FIDs",
    "dinov2": "distances between DINOv2 features",
    "tensorboard": "curves and samples in TensorBoard",
    "wandb": "curves and samples in Weights & Biases",
    "trackio": "curves and samples in Trackio",
    "bitsandbytes": "--engine.optimizer adamw8bit, which stores AdamW's moments in a quarter of the memory, and "
    "--base-precision int8 or nf4",
}
"""The purpose of each extra and optional package."""

REQUIRED: Final = ("torch", "diffusers", "accelerate", "numpy", "safetensors", "datasets", "pydantic", "tyro", "rich")
LEAST_DISK: Final = 2 * 2**30
"""The minimum free disk space, in bytes: enough for a small run's checkpoints and the data caches."""


@dataclass
class DoctorArguments:
    """Check this machine: versions, devices, threads, disk space and the cache. Missing packages are listed with their
    purpose. Nothing is changed, and the exit code is 0 even if problems are found.
    """

    json: Switch = False
    """Print the findings as one JSON document."""


@final
@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    what: str
    verdict: Literal["ok", "missing", "problem"]
    """missing: an optional item, such as a package, is unavailable. problem: something does not work."""
    found: str
    advice: str | None = None


def doctor(argv: Sequence[str]) -> None:
    arguments = parse(DoctorArguments, argv, "halfstep doctor")
    findings = [*_packages(), *_torch(), *_diffusers(), *_extras(), *_places()]
    count = sum(finding.verdict == "problem" for finding in findings)
    if arguments.json:
        print_json(
            {
                "problems": count,
                "python": platform.python_version(),
                "versions": {name: version_of(name) for name in ("halfstep", *REQUIRED)},
                "findings": [asdict(finding) for finding in findings],
            }
        )
        return
    screen = Screen()
    table = Table.grid(padding=(0, 2))
    styles = {"ok": "green", "missing": "yellow", "problem": "bold red"}
    for finding in findings:
        text = Text(finding.found)
        if finding.advice:
            text.append(f"\n{finding.advice}", "dim")
        table.add_row(Text(finding.verdict, styles[finding.verdict]), finding.what, text)
    screen.show(table)
    screen.say(f"{count} problem{'s' if count > 1 else ''}: see above" if count else "no problems found")


def version_of(package: str) -> str | None:
    """Return the installed version of a package, or None if the package is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    shown = f"halfstep {version_of('halfstep')}, Python {platform.python_version()}, {platform.platform()}"
    yield Finding("halfstep", "ok", shown)
    versions = {name: version_of(name) for name in REQUIRED}
    yield Finding("packages", "ok", ", ".join(f"{name} {found}" for name, found in versions.items() if found))
    if absent := [name for name, found in versions.items() if not found]:
        yield Finding("packages", "problem", f"not installed: {', '.join(absent)}", "pip install halfstep")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("torch", "problem", f"torch cannot be imported ({first_line(error)})", "reinstall torch")
        return
    cores = usable_cores()
    memory = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {total / 2**30:.1f} GiB of memory"
    cpu, threads = platform.processor() or platform.machine(), torch.get_num_threads()
    shown = f"{cpu}, {cores} cores for this process, torch uses {threads} threads{memory}"
    yield cpu_finding(shown, cores, threads)
    names = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        names.append("mps")
    yield from map(device_finding, names)
    if not names:
        advice = None
        if torch.version.cuda or torch.version.hip:
            built = "CUDA" if torch.version.cuda else "ROCm"
            advice = f"the installed torch is built for {built}, but the driver or the device is missing"
        elif shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
            advice = "a GPU driver is installed, but torch is built for CPUs only. Install the torch build for your GPU"
        yield Finding(
            "accelerator", "missing", "no CUDA or ROCm device was found, so everything runs on the CPU", advice
        )


def cpu_finding(shown: str, cores: int, threads: int) -> Finding:
    """Check that torch does not use more threads than there are cores, which slows it down many times."""
    if threads > cores:
        return Finding("cpu", "problem", shown, f"set OMP_NUM_THREADS={cores}, because further threads only wait")
    return Finding("cpu", "ok", shown, "change the number of threads with --engine.threads N or OMP_NUM_THREADS=N")


def device_finding(name: str) -> Finding:
    """Check whether a device works, and whether halfstep uses it."""
    import torch

    from halfstep.runtime.devices import has_float64

    try:
        device = torch.device(name)
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:
        return Finding(
            name, "problem", f"the device does not work ({first_line(error)})", "use the CPU with --engine.cpu"
        )
    shown = "Apple's GPU"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shown = f"{torch.cuda.get_device_name(device)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        shown += ", bfloat16" if torch.cuda.is_bf16_supported() else ", no bfloat16: use --engine.precision float32"
    if not has_float64(device):
        advice = "clocks and schedules require float64, so everything runs on the CPU"
        return Finding(name, "missing", f"{shown}, no float64", advice)
    return Finding(name, "ok", shown)


def _diffusers() -> list[Finding]:
    # Import in a separate process, because a failed import would leave this one in a broken state. For example, a
    # torchvision built for a different version of torch fails while it registers its operators.
    command = [sys.executable, "-c", "from diffusers import DDPMPipeline, UNet2DModel, DDIMScheduler"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Finding("diffusers", "problem", f"diffusers cannot be imported ({first_line(error)})")]
    if ended.returncode == 0:
        return [Finding("diffusers", "ok", "pipelines, networks and schedulers can be imported")]
    return [diffusers_failure(ended.stderr, version_of("torch"), version_of("torchvision"))]


def diffusers_failure(errors: str, torch: str | None, torchvision: str | None) -> Finding:
    """Return a finding that explains why diffusers cannot be imported."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if "torchvision" in line and not line.startswith("File ")]
    if torchvision is not None and named:
        return Finding(
            "diffusers",
            "problem",
            f"torchvision {torchvision} is incompatible with torch {torch} and breaks diffusers ({named[-1]})",
            "pip uninstall torchvision (halfstep does not need it), or install the build for this version of torch",
        )
    last = lines[-1] if lines else "no error message"
    return Finding("diffusers", "problem", f"diffusers cannot be imported ({last})", "pip install --upgrade diffusers")


def extras() -> dict[str, tuple[str, ...]]:
    """Return the extras of the installed halfstep, each with its packages."""
    found: dict[str, tuple[str, ...]] = {}
    for line in requires("halfstep") or []:
        if matched := re.match(r"([\w.-]+).*;.*extra *== *['\"]([\w-]+)['\"]", line):
            found[matched[2]] = (*found.get(matched[2], ()), matched[1])
    return found


def _extras() -> Iterator[Finding]:
    for name, packages in extras().items():
        yield extra_finding(name, packages, f"halfstep[{name}]")
    yield extra_finding("bitsandbytes", ("bitsandbytes",), "bitsandbytes")


def extra_finding(name: str, packages: Sequence[str], install: str) -> Finding:
    """Check whether the packages of an extra are installed."""
    absent = [package for package in packages if version_of(package) is None]
    if not absent:
        return Finding(name, "ok", ", ".join(f"{package} {version_of(package)}" for package in packages))
    gives = f"; needed for {GIVES[name]}" if name in GIVES else ""
    return Finding(name, "missing", f"not installed: {', '.join(absent)}{gives}", f"pip install '{install}'")


def _places() -> Iterator[Finding]:
    yield place_finding("runs", Path("runs"), "start halfstep in another folder, or pass --out")
    advice = "set HALFSTEP_CACHE to a writable folder"
    try:
        yield place_finding("cache", cache_folder(), advice)
    except ValueError as error:
        yield Finding("cache", "problem", str(error), advice)
    yield place_finding("temporary files", Path(tempfile.gettempdir()), "set TMPDIR")


def place_finding(name: str, path: Path, advice: str) -> Finding:
    """Check whether a folder is writable or can be created, and whether its disk has enough free space."""
    path = path.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        return Finding(name, "problem", f"{path} is not a folder, because {there} is a file", advice)
    try:
        # Permission bits do not reveal a read-only file system.
        with tempfile.NamedTemporaryFile(dir=there):
            pass
        free = shutil.disk_usage(there).free
    except OSError as error:
        return Finding(name, "problem", f"cannot write to {path} ({error.strerror})", advice)
    shown = f"{path}, {free / 2**30:.1f} GiB free"
    if free < LEAST_DISK:
        return Finding(name, "problem", shown, "free some space for checkpoints and caches")
    return Finding(name, "ok", shown)
