"""Time an update with 1 and 2 processes and with gradient accumulation, and compare it with the network calls alone.

    python benchmarks/scale.py                   # the digits and the CIFAR-10 network
    python benchmarks/scale.py --short

Each setting is a separate program that `torchrun` starts, like a run with several processes. In every process, a
halfstep update takes turns with bare network calls on the process's share of the batch and an optimiser step, without
communication. The ratio therefore shows the cost of the data, the noise, the target, the moving average and gradient
averaging. `against 1` is the time with one process and one thread, divided by the time of this setting. On a
machine with two cores, two processes with one thread each are compared with one process with two threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import arguments, halving, images, median, median_ratio, model_of, spec_of, timed, write
from halfstep.run.start import trainer_for
from halfstep.runtime.processes import make_accelerator
from step import bare

BATCH = {"digits": 64, "cifar10": 16, "tiny": 8}

SETTINGS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 1, 2), (1, 1, 4)]
"""The numbers of processes, threads per process, and micro batches per process."""

SHORT = [(1, 1, 1), (2, 1, 1), (1, 1, 2)]


def worker(name: str, batch: int, number: int, rounds: int, device: str, out: Path) -> None:
    """Time the updates in this process. The first process writes its seconds to a file."""
    accelerator = make_accelerator(cpu=device == "cpu")
    share = batch // accelerator.num_processes
    micro = share // number
    spec = spec_of(name, halving(batch), teacher=model_of(name), cpu=device == "cpu", micro_batch=micro)
    updates = trainer_for(spec, spec.plan.stages[0], "bench", spec.teacher, accelerator).run()
    parts: dict[str, Callable[[], Any]] = {
        "ours": lambda: next(updates),
        "bare": bare(name, images(name), halving(micro), "float32", False, str(accelerator.device), number),
    }
    seconds = timed(parts, rounds, device)
    if accelerator.is_main_process:
        out.write_text(json.dumps({"processes": accelerator.num_processes, "seconds": seconds}))
    accelerator.end_training()


def started(
    name: str, batch: int, processes: int, threads: int, number: int, rounds: int, device: str
) -> dict[str, list[float]]:
    """Start a program for one setting, and return the seconds that its first process measured."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        words = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *(__file__, "--worker", name, str(batch), str(number), str(rounds), "--device", device, "--out", str(out)),
        ]
        # By default, torchrun gives each process one thread.
        subprocess.run(words, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        found = json.loads(out.read_text())
    if found["processes"] != processes:
        raise RuntimeError(f"{processes} processes were started, but {found['processes']} connected")
    seconds: dict[str, list[float]] = found["seconds"]
    return seconds


def measured(
    name: str, batch: int, device: str, rounds: int, settings: list[tuple[int, int, int]]
) -> list[dict[str, Any]]:
    """Return a row for each setting. All later settings are compared with the first."""
    rows: list[dict[str, Any]] = []
    for processes, threads, number in settings:
        seconds = started(name, batch, processes, threads, number, rounds, device)
        mine = median(seconds["ours"])
        rows.append(
            {
                "network": name, "batch": batch, "processes": processes, "threads of each": threads,
                "micro batches of each": number, "seconds": mine, "bare": median(seconds["bare"]),
                "ours / bare": round(median_ratio(seconds["ours"], seconds["bare"]), 4),
                "against 1": round((rows[0]["seconds"] if rows else mine) / mine, 3),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=None)
    parser.add_argument("--batch", type=int, default=None, help="batch size; default: that of each network's recipe")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--worker", nargs=4, metavar=("NETWORK", "BATCH", "NUMBER", "ROUNDS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads is not None:
        parser.error("--threads has no effect, because each setting has its own number of threads. Remove it")
    if options.worker:
        name, *numbers = options.worker
        batch, number, rounds = (int(value) for value in numbers)
        worker(name, batch, number, rounds, options.device, options.out)
        return
    rows = []
    for name in options.networks or (["tiny"] if options.short else ["digits", "cifar10"]):
        rounds = options.rounds or {"digits": 60, "cifar10": 10, "tiny": 5}[name]
        settings = SHORT if options.short else SETTINGS
        rows += measured(name, options.batch or BATCH[name], options.device, rounds, settings)
    write("scale", rows, options)


if __name__ == "__main__":
    main()
