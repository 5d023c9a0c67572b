"""Faults that a run must survive at any moment: kills, signals, damaged files, a full disk, a vanished folder.

`Ordeal` applies faults to runs of the toy chain and two finishes, which are measured after each stage, in separate
processes. It compares every completed run with the weights and figures of an uninterrupted run.
`tests/behaviour/test_torture.py` applies a few faults, `benchmarks/torture.py` any number.
"""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Final

# Modules that a run imports. The fork server imports them first, so that faults hit the run and not its imports.
import torch._dynamo
import torchmetrics  # noqa: F401

import teams
from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import Finishing, Plan, Training
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.runs import RunFolder
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.runtime.storage import NoStorage
from toys import finish, toy_plan, toy_spec, weights

NO_STORAGE: Final = 3
"""Exit code of a run whose disk is full or gone."""


def spec() -> RunSpec:
    """Return the toy chain with finishes of its students, checkpoints every few updates, and a measurement of each
    stage."""
    evaluation = Evaluation(num_samples=60, num_compared=20, num_shown=8, batch_size=20)
    plan = toy_plan(20, 15) + Plan.finishes(
        [2, 1], Training(24, 1e-3, 16, ema_decay=0.9), lambda n: Finishing(n, lead_updates=8)
    )
    return toy_spec(plan=plan, evaluation=evaluation)


def child(path: str, began: Event, said: str) -> None:
    """Run as the command line does, with its exit codes; the final message goes to the file `said`."""
    torch.set_num_threads(1)
    with StopSignal() as stop:
        began.set()
        try:
            finish(spec(), Path(path), stop)
        except Interrupted as stopped:
            os._exit(stopped.code)
        except NoStorage as error:
            Path(said).write_text(str(error.strerror))
            os._exit(NO_STORAGE)


def rank(path: str) -> None:
    """Run as one of several processes."""
    finish(spec(), Path(path))


def figures(path: Path) -> dict[str, Any]:
    """Return the measurements of a run, without times."""
    held = {}
    for file in sorted(path.glob("stages/*/metrics.json")):
        results = json.loads(file.read_text())["results"]
        held[file.parent.name] = [{k: v for k, v in one.items() if k != "seconds_per_1000"} for one in results]
    return held


class Ordeal:
    """Random faults in runs in `folder`."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder = folder
        self.path = folder / "run"
        self.dice = random.Random(seed)
        self.dealt: Counter[str] = Counter()
        """Numbers of faults by kind."""
        self.finished = 0
        """Number of completed runs with the weights and figures of the uninterrupted one."""
        self.where: Counter[str] = Counter()
        """Numbers of faults by stage and its state."""
        self.slowest_loss = 0.0
        """Longest time in seconds from the end of one of two processes to the end of the other."""
        self._pair: tuple[dict[str, bytes], dict[str, Any]] | None = None
        self.slowest_stop = 0.0
        """Longest time in seconds from a SIGTERM until a run has saved its state and ended."""
        self._context = teams.context()
        finish(spec(), folder / "uncut")
        self._weights, self._figures = weights(folder / "uncut"), figures(folder / "uncut")
        # The first process waits for the server.
        self._ended(self.start(folder / "warm"))
        begun = time.monotonic()
        self._ended(self.start(folder / "timed"))
        self.duration = time.monotonic() - begun

    @property
    def said(self) -> Path:
        """Return the file with the message of the last run that failed for lack of storage."""
        return self.folder / "said.txt"

    def start(self, path: Path | None = None) -> BaseProcess:
        """Start a run and wait until it handles signals."""
        began = self._context.Event()
        process = self._context.Process(target=child, args=(str(path or self.path), began, str(self.said)))
        process.start()
        assert began.wait(180)
        return process

    @staticmethod
    def _ended(process: BaseProcess) -> int:
        process.join(120)
        assert process.exitcode is not None, "a run hangs"
        return process.exitcode

    def running(self) -> BaseProcess:
        """Start a run that is killed at a random moment unless the caller does so; it has run for a random time."""
        while True:
            process = self.start()
            process.join(self.dice.uniform(0.0, 0.8) * self.duration)
            if process.exitcode is None:
                return process
            self._check(process.exitcode)

    def _check(self, code: int) -> None:
        """Compare a completed run with the uninterrupted one, and remove it."""
        assert code == 0, f"a run ended with {code}"
        assert weights(self.path) == self._weights
        assert figures(self.path) == self._figures
        left = [file for file in self.path.rglob("*") if ".tmp" in file.name or "checkpoint" in file.name]
        assert not left, f"a complete run keeps {left}"
        self.finished += 1
        self._clear()

    def _clear(self) -> None:
        shutil.rmtree(self.path)

    def _deal(self, kind: str) -> None:
        self.dealt[kind] += 1
        stages = sorted(self.path.glob("stages/*"))
        what = "nothing yet" if not stages else stages[-1].name
        if stages and (stages[-1] / "manifest.json").exists():
            what += ", complete"
        self.where[what] += 1

    def to_the_end(self) -> None:
        """Let the existing run complete."""
        self._check(self._ended(self.start()))

    def sigkill(self) -> None:
        """Kill a run."""
        process = self.running()
        process.kill()
        self._ended(process)
        self._deal("SIGKILL")

    def sigterm(self) -> None:
        """Signal a run: it ends soon with its state saved and the right exit code."""
        process = self.running()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGTERM)
        sent = time.monotonic()
        code = self._ended(process)
        if code == 0:
            # It was so close to its end that there was nothing left to save.
            self._check(code)
            return
        assert code == 128 + signal.SIGTERM, f"SIGTERM ended a run with {code}"
        self.slowest_stop = max(self.slowest_stop, time.monotonic() - sent)
        self._deal("SIGTERM")

    def damage(self) -> None:
        """Kill a run, then truncate a file of a checkpoint or flip one of its bits."""
        while True:
            process = self.running()
            process.kill()
            self._ended(process)
            files = sorted(file for file in self.path.glob("stages/*/checkpoint-*/*") if file.stat().st_size)
            if files:
                break
        file = self.dice.choice(files)
        content = bytearray(file.read_bytes())
        if self.dice.random() < 0.5:
            file.write_bytes(content[: self.dice.randrange(len(content))])
            self._deal("truncation")
        else:
            bit = self.dice.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            self._deal("bit flip")

    def full_disk(self) -> None:
        """Fill the disk of a run: it ends, reports its last good state, and resumes when space is available again.

        The disk is a tmpfs if one can be mounted. Otherwise the process may write no more bytes (RLIMIT_FSIZE).
        """
        disk, elsewhere = self.folder / "disk", self.path
        disk.mkdir(exist_ok=True)
        small = mount(disk, "4m")
        self.path = disk / "run"
        try:
            process = self.running()
            if small:
                with open(disk / "ballast", "wb", buffering=0) as file:
                    self._fill(file.write)
            else:
                assert process.pid is not None
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            code = self._ended(process)
            (disk / "ballast").unlink(missing_ok=True)
            if code == 0:
                # It was so close to its end that it had nothing left to write.
                self._check(code)
                return
            assert code == NO_STORAGE, f"a full disk ended a run with {code}"
            said = self.said.read_text()
            assert said.startswith(f"no space left for {self.path}: ")
            good = [*self.path.glob("stages/*/checkpoint-*"), *self.path.glob("stages/*/manifest.json")]
            assert bool(good) == bool(re.search("the last (good checkpoint|complete stage) is ", said)), said
            self._deal("full disk (tmpfs)" if small else "full disk (RLIMIT_FSIZE)")
            self.to_the_end()
        finally:
            self.path = elsewhere
            if small:
                unmount(disk)

    def killed_rank(self) -> None:
        """Kill one of two processes of a run: the other ends with a message, and both resume together and complete."""
        if self._pair is None:
            begun = time.monotonic()
            teams.together(2, rank, self.folder / "left", str(self.folder / "pair"))
            self._pair_duration = time.monotonic() - begun
            self._pair = weights(self.folder / "pair"), figures(self.folder / "pair")
        path, left = self.folder / "ranks", self.folder / "left"
        shutil.rmtree(left)
        team = teams.start(2, rank, left, str(path))
        # Before they are connected, only the connection attempt can detect the other's end.
        while not (path / "recipe.json").exists() and all(process.exitcode is None for process in team):
            time.sleep(0.01)
        team[0].join(self.dice.uniform(0.0, 0.7) * self._pair_duration)
        victim = self.dice.randrange(2)
        if all(process.exitcode is None for process in team):
            team[victim].kill()
            killed = time.monotonic()
            other = teams.ended(team, left)[1 - victim]
            self.slowest_loss = max(self.slowest_loss, time.monotonic() - killed)
            # A process that no longer needed the other has completed.
            if "result" not in other:
                said = other["error"]
                assert said.startswith("LostProcess: another process of this run has ended"), said
                known = (
                    "the last good checkpoint is",
                    "the last complete stage is",
                    "no checkpoint has been written yet",
                )
                assert any(words in said for words in known), said
                self._deal("killed rank")
        teams.together(2, rank, left, str(path))
        assert (weights(path), figures(path)) == self._pair
        self.finished += 1
        shutil.rmtree(path)

    @staticmethod
    def _fill(write: Callable[[bytes], int]) -> None:
        for size in (1 << 16, 1 << 8, 1):
            try:
                while True:
                    write(bytes(size))
            except OSError:
                continue

    def deal(self, counts: dict[str, int]) -> None:
        """Apply the given number of each fault in random order, then let the last run complete."""
        blows = [kind for kind, count in counts.items() for _ in range(count)]
        self.dice.shuffle(blows)
        for kind in blows:
            before = sum(self.dealt.values())
            while sum(self.dealt.values()) == before:
                getattr(self, kind)()
        if self.path.exists():
            self.to_the_end()


def mount(path: Path, size: str) -> bool:
    """Mount a tmpfs of this size and return whether that worked; it needs root."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def unmount(path: Path) -> None:
    """Unmount `mount`, even if processes have open files there."""
    subprocess.run(["umount", "-l", str(path)], check=True)


def growth(path: Path, num_updates: int = 2000, after: int = 50) -> dict[str, int]:
    """Return the growth of a toy stage between an update and `num_updates` later: resident bytes, and Python objects.
    It logs a line and writes a checkpoint every 10 updates."""
    last = after + num_updates
    teacher = toy_plan(last + 10).stages[0]
    held: dict[int, tuple[int, int]] = {}
    for event in run(toy_spec(plan=Plan((teacher,)), log_every=10, checkpoint_updates=10), path):
        # Count once before, because the list of all objects is large itself.
        if isinstance(event, Progress) and event.window.update in (after - 10, after, last):
            # The checkpoint of ten updates ago is certainly written by then.
            time.sleep(0.3)
            gc.collect()
            objects = len(gc.get_objects())
            # Count only resident memory outside files, because pages of libraries come and go.
            kilobytes = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            assert kilobytes is not None
            held[event.window.update] = (1024 * int(kilobytes[1]), objects)
    assert RunFolder(path).stage("00-denoise").is_complete()
    return {"bytes": held[last][0] - held[after][0], "objects": held[last][1] - held[after][1]}


def write_growth(path: str, out: str) -> None:
    """Print `growth` as JSON, for a separate process."""
    torch.set_num_threads(1)
    Path(out).write_text(json.dumps(growth(Path(path))))
