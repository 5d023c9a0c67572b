"""Check that a refactoring does not change the final weights of six toy runs (sha256) or the metrics of one run.

    python benchmarks/same_results.py --out before.json            # before the change
    python benchmarks/same_results.py --against before.json        # after it: exit code 1 and a list of differences

The runs are a teacher and halvings with a moving average, LoRA students, matching to a range of guidance scales, two
processes, a run that is killed and resumed, and `halfstep.distill` in memory. All runs use only the command line and
the public Python API, so the same script works before and after a change. Weights depend on the machine and on the
build of torch, so only compare files from the same machine.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SMALL = [
    *("--engine.threads", "1", "--engine.cpu", "--engine.trackers", "None", "--engine.log-every", "2"),
    *("--evaluation.num-samples", "24", "--evaluation.num-compared", "8", "--evaluation.num-shown", "4"),
    *("--evaluation.features", "pixels", "--evaluation.teacher-steps", "4", "1", "--evaluation.batch-size", "12"),
    *("--chain.updates-at", "None", "--chain.learning-rate-at", "None", "--chain.warmup-updates", "0"),
    *("--chain.start-steps", "4", "--chain.num-updates", "8", "--chain.batch-size", "8", "--chain.ema-decay", "0.9"),
    *("--chain.teacher-sampler", "ddim", "--finish.steps"),
]
TEACHER = [
    *("--teacher.num-updates", "12", "--teacher.warmup-updates", "2", "--teacher.batch-size", "8"),
    *("--network.block-out-channels", "8", "16", "--network.attention-head-dim", "8", "--network.norm-num-groups", "8"),
    *("--network.layers-per-block", "1", "--network.attention", "False", "True", "--model.conditional"),
    *("--chain.learning-rate", "5e-4"),
]
IN_MEMORY = """
import sys
import torch
import halfstep
from safetensors.torch import save_file

torch.set_num_threads(1)
torch.manual_seed(0)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.SiLU(), torch.nn.Linear(32, 2))

    def forward(self, x_t, time):
        return self.layers(torch.cat([x_t, time[:, None].to(x_t)], dim=1))


data = torch.randn(256, 2, generator=torch.Generator().manual_seed(1)) * 0.3 + 0.2
teacher = halfstep.NetworkDenoiser(Network(), halfstep.VPCosine(), halfstep.V())
training = halfstep.Training(40, 2e-4, batch_size=32, warmup_updates=2, ema_decay=0.995)
halfstep.fit(teacher, data, training)
student = halfstep.distill(teacher, data, start=4, to=1, training=halfstep.Training(20, 2e-4, batch_size=32))
save_file(student.network.state_dict(), sys.argv[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the digests to this file")
    parser.add_argument("--against", type=Path, help="compare with a file that --out wrote")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = digests(Path(folder))
    text = json.dumps(found, indent=2, sort_keys=True)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)
    if arguments.against is not None:
        held = json.loads(arguments.against.read_text())
        changed = sorted(name for name in held.keys() | found.keys() if held.get(name) != found.get(name))
        print(f"differ: {', '.join(changed)}" if changed else "all equal")
        raise SystemExit(1 if changed else 0)


def digests(folder: Path) -> dict[str, str]:
    """Execute the six runs, and return the sha256 of each stage's weights and of the first run's metrics, by name."""
    chain = folder / "chain"
    teacher = str(chain / "stages" / "00-denoise")
    halfstep("run", "digits", *SMALL, *TEACHER, "--out", str(chain))
    halfstep("distill", teacher, *SMALL, "--chain.lora-rank", "2", "--out", str(folder / "lora"))
    points = folder / "points.npz"
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 2)).astype(np.float32)
    np.savez(points, x=x, y=np.arange(64) % 3)
    plain = folder / "points"
    small_mlp = ("--network.width", "16", "--network.depth", "1", "--data", str(points))
    halfstep("train", "arrays", *SMALL, *TEACHER[:6], *small_mlp, "--out", str(plain))
    matching = ("--matching.guidance-range", "1", "4", "--matching.null-class", "2", "--matching.num-updates", "8")
    matched = (
        *matching,
        "--matching.batch-size",
        "8",
        "--matching.prediction",
        "x0",
        "--out",
        str(folder / "matching"),
    )
    halfstep("distill", str(plain / "stages" / "00-denoise"), *SMALL, *matched)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    two = ("run", "digits", *SMALL, *TEACHER, "--out", str(folder / "two-processes"))
    check([*launch, "-m", "halfstep", *two])
    resumed = (*SMALL, *TEACHER, "--engine.checkpoint-updates", "1", "--chain.num-updates", "60")
    cut_and_resume(["run", "digits", *resumed, "--out", str(folder / "resumed")], folder / "resumed")
    (folder / "in-memory").mkdir()
    check([sys.executable, "-c", IN_MEMORY, str(folder / "in-memory" / "model.safetensors")])
    halfstep("evaluate", str(chain), "--num-samples", "24", "--seeds", "2")
    found = {str(file.parent.relative_to(folder)): sha256(file.read_bytes()) for file in weights(folder)}
    found["figures"] = sha256(json.dumps(figures(chain), sort_keys=True).encode())
    return found


def weights(folder: Path) -> list[Path]:
    return sorted(folder.rglob("model.safetensors"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def figures(run: Path) -> dict[str, Any]:
    """Return the metrics in the report, without times: those that the run measured, and those of `evaluate`."""
    measured = {
        file.parent.name: [
            {name: row[name] for name in ("sampler", "num_steps", "num_evals", "frechet", "kid", "teacher_rmse")}
            for row in json.loads(file.read_text())["results"]
        ]
        for file in sorted(run.glob("stages/*/metrics.json"))
    }
    tables = json.loads((run / "evaluation" / "evaluation.json").read_text())["tables"]
    rows = [
        [{name: row[name] for name in ("series", "num_steps", "num_evals", "figures")} for row in table["rows"]]
        for table in tables
    ]
    return {"measured": measured, "tables": rows}


def halfstep(*words: str) -> None:
    check([sys.executable, "-m", "halfstep", *words])


def check(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def cut_and_resume(words: list[str], run: Path) -> None:
    """Kill the command during its second stage, after a checkpoint, and rerun it."""
    command = [sys.executable, "-m", "halfstep", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment())
    while process.poll() is None and not list(run.glob("stages/01-*/checkpoint-0000001*")):
        time.sleep(0.01)
    if process.poll() is not None:
        raise SystemExit("the run ended before it could be killed. Increase its number of updates")
    process.send_signal(signal.SIGKILL)
    process.wait()
    check(command)


if __name__ == "__main__":
    main()
