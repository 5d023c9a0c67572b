"""The page on schedulers: bash runs its script unchanged, and its manifest contains the documented exit codes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

from toys import TINY_ARRAYS, points

PAGE = (Path(__file__).parents[2] / "docs" / "pages" / "operations.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n((?:#!/bin/bash|apiVersion).*?)```", PAGE, re.DOTALL)
    assert found is not None
    return found[1]


def command(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def test_the_script_for_slurm_saves_the_state_and_asks_to_be_queued_again(tmp_path: Path) -> None:
    np.save(tmp_path / "toy.npy", points().numpy())
    (tmp_path / "bin").mkdir()
    tiny = " ".join([*TINY_ARRAYS, "--teacher.num-updates", "1000000", "--engine.checkpoint-updates", "50"])
    run = f'{sys.executable} -m halfstep run arrays --data {tmp_path / "toy.npy"} {tiny} "$@"'
    command(tmp_path / "bin", "halfstep", f"shift 2\nexec {run}")
    command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path / "queued"}')
    (tmp_path / "job.sh").write_text(block("bash"))
    process = subprocess.Popen(
        ["bash", str(tmp_path / "job.sh")],
        env=os.environ
        | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "SCRATCH": str(tmp_path),
            "SLURM_JOB_ID": "4711",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoints = "runs/cifar10/stages/*/checkpoint-*"
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(checkpoints)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # Slurm signals only the script too.
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 85, errors
    assert "stopped by SIGUSR1; the state is saved" in errors
    assert (tmp_path / "queued").read_text() == "requeue 4711\n"
    assert list(tmp_path.glob(checkpoints))


def test_the_manifest_for_kubernetes_does_not_retry_permanent_failures() -> None:
    job = yaml.safe_load(block("yaml"))
    spec = job["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [1, 2]
    # Kubernetes rejects a podFailurePolicy with any other restartPolicy.
    assert spec["restartPolicy"] == "Never"
    out = container["command"][container["command"].index("--out") + 1]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert out.startswith(mounts["runs"])
    assert {volume["name"] for volume in spec["volumes"]} == set(mounts)
