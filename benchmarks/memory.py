"""Measure how much memory each part of an update needs, and compare it with the estimate of a dry run.

    python benchmarks/memory.py                   # the CIFAR-10 network
    python benchmarks/memory.py --short

Every setting runs in a separate process: first with a tiny network, so that the libraries allocate their own memory,
and then with the network to measure. The parts are:

- `weights` are those of the student, the moving average and the teacher before the first update of the last stage;
- `moments` is the additional memory that remains after updates;
- `pass` is the memory for activations, gradients and workspaces, which is freed within an update;
- `peak` is the total of these parts.

On a CPU, the script measures the resident memory of the process. MALLOC_MMAP_THRESHOLD_ is set so that the allocator
releases freed memory at once, because a process would otherwise keep some of it. On a GPU, the script measures the
memory that torch has allocated.

`growth` is the increase in memory from update 50 to the end of a run with 2,050 updates, a log, and a checkpoint every
20 updates. The data set is small: an epoch has 8 updates, so the shuffled orders of several epochs are cached by update
50. The memory after about a quarter of the run is also reported, because the allocator only reaches its final size
after several checkpoints.
"""

import argparse
import dataclasses
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import psutil
import torch

from common import arguments, halving, images, model_of, network, parsed, show, spec_of, write
from halfstep.data import MemoryData
from halfstep.objectives import Denoising, Plan, Stage
from halfstep.run.cost import count_forward, memory_of_update
from halfstep.run.events import Progress, StageStart
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec

MB = 1e6

BATCH = {"digits": 64, "cifar10": 16, "tiny": 8}

DENOISE: dict[str, dict[str, Any]] = {
    "": {},
    "no moving average": {"ema_decay": 0.0},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "a quarter's micro batch": {"micro": 4},
}
HALVE: dict[str, dict[str, Any]] = {
    "": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "teacher in bf16": {"teacher_precision": "bf16"},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "LoRA of rank 16": {"lora_rank": 16},
    "LoRA, teacher in bf16, checkpointing": {
        "lora_rank": 16, "teacher_precision": "bf16", "gradient_checkpointing": True,
    },
    "bf16 autocast": {"precision": "bf16"},
}  # fmt: skip
SETTINGS = {"denoise": DENOISE, "halve": HALVE}
"""The settings to measure for each kind of stage."""

SHORT = [("halve", ""), ("halve", "gradient checkpointing")]

NO_ATTENTION = ("digits", "tiny")
"""Networks without any layers that LoRA can be added to."""


def settings_of(name: str) -> list[tuple[str, str]]:
    """Return the (stage, setting) pairs that a network supports."""
    return [
        (kind, setting)
        for kind, held in SETTINGS.items()
        for setting in held
        if not (name in NO_ATTENTION and "LoRA" in setting)
    ]


def one_update(stage: Stage) -> Stage:
    """Return the stage with its number of updates set to 1."""
    return dataclasses.replace(stage, training=dataclasses.replace(stage.training, num_updates=1))


def chain_for(name: str, kind: str, setting: str, batch: int, updates: int, cpu: bool, data: MemoryData) -> RunSpec:
    """Return a run that ends with the stage to measure: only a teacher, or a teacher after one update and a student."""
    changes = dict(SETTINGS[kind][setting])
    last = halving(batch, num_updates=updates, ema_decay=changes.pop("ema_decay", 0.99))
    teacher = dataclasses.replace(last, objective=Denoising())
    plan = Plan((teacher,) if kind == "denoise" else (one_update(teacher), last))
    if "micro" in changes:
        changes["micro_batch"] = max(1, batch // changes.pop("micro"))
    spec = spec_of(name, last, data=data, network=lambda: network(name), cpu=cpu, log_every=1, **changes)
    return dataclasses.replace(spec, plan=plan)


class Gauge:
    """A gauge for the memory of this process or of the GPU, in bytes."""

    def __init__(self, device: str) -> None:
        self._cuda = device.startswith("cuda")

    def now(self) -> int:
        """Return the number of bytes in use."""
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        return int(psutil.Process().memory_info().rss)

    def reset_peak(self) -> None:
        """Reset the peak. On a CPU, only Linux can reset the peak of a process."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Return the peak since the last reset, in bytes."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


UPDATES = 2
"""The number of updates. The first update allocates the moments, and the second is typical of all later updates."""


def stage_measured(spec: RunSpec, gauge: Gauge) -> tuple[int, int, int]:
    """Return the bytes in use before the last stage and after a few updates of it, and the peak in between."""
    first = after = peak = 0
    with tempfile.TemporaryDirectory() as folder:
        events = run(spec, Path(folder) / "run")
        for event in events:
            if isinstance(event, StageStart) and event.index == len(spec.plan.stages) - 1:
                first = gauge.now()
                gauge.reset_peak()
            elif isinstance(event, Progress) and first and event.window.update == UPDATES:
                peak, after = gauge.peak(), gauge.now()
                break
        events.close()
    return first, after, peak


def measured_here(name: str, kind: str, setting: str, batch: int, device: str) -> dict[str, float]:
    """Return the megabytes of each part, as measured in this process."""
    cpu = device == "cpu"
    if "LoRA" in setting:
        import peft  # noqa: F401
    data, gauge = images(name), Gauge(device)
    small = setting if (kind, setting) in settings_of("tiny") else ""
    stage_measured(chain_for("tiny", kind, small, 8, UPDATES + 1, cpu, images("tiny")), gauge)
    before = gauge.now()
    first, after, peak = stage_measured(chain_for(name, kind, setting, batch, UPDATES + 1, cpu, data), gauge)
    found = {"weights": first - before, "moments": after - first, "pass": peak - after, "peak": peak - before}
    return {part: size / MB for part, size in found.items()}


def counted(name: str, kind: str, setting: str, batch: int) -> dict[str, float]:
    """Return the megabytes of each part, as estimated by a dry run."""
    spec = chain_for(name, kind, setting, batch, UPDATES, True, images(name))
    stage = spec.plan.stages[-1]
    if kind == "halve":
        # A dry run of a chain from this teacher computes the estimate in the same way.
        spec = dataclasses.replace(spec, network=None, teacher=model_of(name))
    memory = memory_of_update(stage, count_forward(spec), spec.engine, {})
    return {part: size / MB for part, size in memory._asdict().items()} | {"peak": sum(memory) / MB}


def in_a_process(*words: str) -> dict[str, float]:
    """Run this script with these arguments in a new process, and return the JSON that the process prints."""
    done = subprocess.run(
        [sys.executable, __file__, *words],
        stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def row_of(name: str, kind: str, setting: str, batch: int, found: dict[str, float]) -> dict[str, Any]:
    """Return a row with the estimated and measured memory."""
    count = counted(name, kind, setting, batch)
    row: dict[str, Any] = {"network": name, "stage": kind, "setting": setting or "-", "batch": batch}
    row |= {f"counted {part}": round(size, 2) for part, size in count.items()}
    row |= {f"measured {part}": round(size, 2) for part, size in found.items()}
    return row | {"measured / counted": round(found["peak"] / count["peak"], 3)}


def growth_here(name: str, device: str, updates: int) -> dict[str, Any]:
    """Return how much the memory of a run in this process grows from update 50 to the end."""
    stage = halving(8, num_updates=updates + 50, ema_decay=0.99)
    spec = spec_of(
        name, stage, data=images(name, 64), cpu=device == "cpu", teacher=model_of(name), log_every=50,
        checkpoint_updates=20,
    )  # fmt: skip
    gauge, held = Gauge(device), {}
    settled = 50 + 50 * max(1, updates // 200)
    with tempfile.TemporaryDirectory() as folder:
        for event in run(spec, Path(folder) / "run"):
            if isinstance(event, Progress) and event.window.update in (50, settled, updates + 50):
                held[event.window.update] = (gauge.now(), live_tensors())
    (first, tensors), (then, _), (last, at_end) = held.values()
    return {
        "network": name, "updates": updates, "MB at 50": round(first / MB, 2), "settled at": settled,
        "MB then": round(then / MB, 2), "MB at the end": round(last / MB, 2),
        "growth, MB": round((last - first) / MB, 3), "growth, bytes of live tensors": at_end - tensors,
    }  # fmt: skip


def live_tensors() -> int:
    """Return the total number of bytes of all live tensors."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storages = {
            thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()
            for thing in gc.get_objects()
            # Tensors without memory, which torch's compiler leaves behind, are ignored.
            if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided
        }
    return sum(storages.values())


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=None)
    parser.add_argument("--batch", type=int, default=None, help="batch size; default: that of each network's recipe")
    parser.add_argument("--worker", nargs=4, metavar=("NETWORK", "STAGE", "SETTING", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--growth-worker", nargs=2, metavar=("NETWORK", "UPDATES"), help=argparse.SUPPRESS)
    options = parsed(parser)
    if options.worker:
        name, kind, setting, batch = options.worker
        print(json.dumps(measured_here(name, kind, setting, int(batch), options.device)))
        return
    if options.growth_worker:
        name, updates = options.growth_worker
        print(json.dumps(growth_here(name, options.device, int(updates))))
        return
    names = options.networks or (["tiny"] if options.short else ["cifar10"])
    words = ["--device", options.device, *(["--threads", str(options.threads)] if options.threads else [])]
    rows = []
    for name in names:
        batch = options.batch or BATCH[name]
        for kind, setting in SHORT if options.short else settings_of(name):
            found = in_a_process(*words, "--worker", name, kind, setting, str(batch))
            rows.append(row_of(name, kind, setting, batch, found))
    smallest = "tiny" if options.short else "digits"
    growth = in_a_process(*words, "--growth-worker", smallest, "100" if options.short else "2000")
    show("growth", [growth])
    write("memory", rows, options, growth=growth, threads=torch.get_num_threads(), unit="10^6 bytes")


if __name__ == "__main__":
    main()
