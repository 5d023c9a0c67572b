"""Coordinates the processes of a run.

Rank 0 writes the run folder and broadcasts its results and errors to the other ranks. Decisions that depend on a clock,
a signal or a disk are made once, so that no process waits for another that decided differently. Messages use a separate
process group on the CPU and never wait for a device. A single process calls functions directly.
"""

import functools
import hashlib
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from itertools import chain
from typing import Any, Final, TypeVar, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch import distributed as dist

from halfstep.runtime import storage
from halfstep.runtime.devices import default_accelerator
from halfstep.runtime.launch import world_size
from halfstep.runtime.stop import Interrupted, StopSignal, at_once

Item = TypeVar("Item")
Made = TypeVar("Made")
Parts = tuple[Tensor, ...]

TIMEOUT_MINUTES: Final = 10.0
"""The number of minutes after which a process that does not respond during training is considered lost."""

WAIT_FOR_MAIN: Final = timedelta(hours=6)
"""How long the other ranks wait while rank 0 writes, evaluates or trains a classifier. If rank 0 dies, the other ranks
notice immediately, so this limit matters only if a disk does not respond."""


class FailedElsewhere(Exception):
    """Another process of the run has failed. The exception contains the reason and the exit code of that process."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LostProcess(RuntimeError):
    """Another process of the run has died or does not respond. The message suggests a remedy."""


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error.

    This is the exit code of another process that failed, 128 + n for signal n, or the result of `storage.exit_code`.
    """
    return error.code if isinstance(error, FailedElsewhere | Interrupted) else storage.exit_code(error)


_FOREIGN: Final = {
    "FSDP": "its own FSDP",
    "DEEPSPEED": "DeepSpeed",
    "MEGATRON_LM": "Megatron-LM",
    "PARALLELISM_CONFIG": "a parallelism config",
}
"""The sharding methods of `accelerate launch`, keyed by the suffix of the method's environment variable."""


def _check_launcher(precision: str) -> None:
    """Raise ValueError if a setting of `accelerate launch` would be ignored or applied twice."""
    held = os.environ
    for name, what in _FOREIGN.items():
        if held.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ValueError(
                f"accelerate is set to use {what}, which halfstep does not support: remove this setting, or use "
                "--engine.sharding full"
            )
    if (steps := held.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise ValueError(
            f"accelerate is set to accumulate over {steps} steps, which halfstep ignores: use --engine.micro-batch"
        )
    asked = held.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        ours = "--engine.precision bf16" if asked == "bf16" else "--engine.precision float32 or bf16"
        raise ValueError(
            f"accelerate is set to {asked}, but the run uses {precision}: remove one of the settings, or use {ours}"
        )
    if (compiler := held.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise ValueError(
            f"accelerate is set to compile with {compiler}, which halfstep does not support: remove this setting"
        )


def make_accelerator(
    precision: str = "float32", cpu: bool = False, timeout_minutes: float = TIMEOUT_MINUTES
) -> Accelerator:
    """Return an accelerator for this process.

    `precision` must be "float32", or "bf16" for bfloat16 autocast over float32 weights. The first call connects the
    processes of `torchrun` or `accelerate launch`.

    Raises:
        ValueError: if the precision is neither "float32" nor "bf16", or a launcher has a setting that would be ignored.
    """
    modes = {"float32": "no", "bf16": "bf16"}
    if precision not in modes:
        raise ValueError(f"precision must be one of {', '.join(modes)}, got {precision!r}")
    _check_launcher(precision)
    # With several processes but no accelerator, accelerate would otherwise treat each process as the only one.
    cpu = cpu or default_accelerator() is None
    # accelerate's settings are global to the process, but two runs in one process may have different settings.
    # The user may have created a state, too.
    if AcceleratorState._shared_state or PartialState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    accelerator = Accelerator(
        mixed_precision=modes[precision],
        cpu=cpu,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
            # Network buffers are constants, so broadcasting them would waste a message per update.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if world_size() > accelerator.num_processes:
        raise ValueError(
            f"{world_size()} processes were started, but they are not connected (accelerate sees "
            f"{accelerator.num_processes}): start them with torchrun or accelerate launch"
        )
    return accelerator


@functools.lru_cache(maxsize=1)
def _words() -> dist.ProcessGroup:
    """Return the process group for messages on the CPU. All processes must make the first call together."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)
    return group


@final
class Processes:
    """All processes of a run, from the point of view of this process.

    Args:
        accelerator: the accelerator of this process, or None for a single process.
    """

    def __init__(self, accelerator: Accelerator | None = None, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.index: int = 0 if accelerator is None else accelerator.process_index
        self._timeout = timedelta(minutes=timeout_minutes)
        if self.count > 1:
            _words()

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which is the only rank that writes."""
        return self.index == 0

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Call `work` on rank 0 only, and return its result on all ranks.

        Raises:
            FailedElsewhere: on the other ranks, if `work` raised an error on rank 0.
        """
        if self.count == 1:
            return work()
        if not self.is_main:
            told = _from(0)
            if "code" in told:
                if told["code"] > 128:
                    raise Interrupted(told["code"] - 128)
                raise FailedElsewhere(told["message"], told["code"])
            return told["result"]
        try:
            result = work()
        except Exception as error:
            _from(0, {"code": exit_code(error), "message": str(error)})
            raise
        _from(0, {"result": result})
        return result

    def at_once(self, stop: StopSignal | None) -> AbstractContextManager[None]:
        """Return `stop.at_once()` for a single process. Several processes must stop together, at an agreed point."""
        return at_once(stop if self.count == 1 else None)

    def main_first(self, work: Callable[[], Made]) -> Made:
        """Call `work` on all ranks and return the result. Rank 0 runs first, so that the others can use its cache."""
        made: list[Made] = []
        self.on_main(lambda: made.append(work()))
        return made[0] if made else work()

    def check_same(self, name: str, what: str, remedy: str) -> None:
        """Raise ValueError on all ranks if `name` differs between the ranks."""
        own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        most, least = self.agree(own, -own, patience=WAIT_FOR_MAIN)
        if most != -least:
            raise ValueError(f"the processes of the run differ in {what} (this process: {name}): {remedy}")

    def told_by(self, index: int, value: Any) -> Any:
        """Return the value of rank `index` on all ranks."""
        return value if self.count == 1 else _from(index, value)

    def agree(self, *numbers: int, patience: timedelta | None = None) -> tuple[int, ...]:
        """Return the maximum of each number over all processes.

        Args:
            patience: how long to wait for the other processes; by default, the training timeout.
        """
        return tuple(self._reduced(numbers, torch.int64, dist.ReduceOp.MAX, patience))

    def mean(self, *numbers: float) -> tuple[float, ...]:
        """Return the mean of each number over all processes."""
        return tuple(total / self.count for total in self._reduced(numbers, torch.float64, dist.ReduceOp.SUM))

    def each(self, number: float) -> list[float]:
        """Return the numbers of all processes, in the order of their ranks."""
        own = [number if index == self.index else 0.0 for index in range(self.count)]
        return self._reduced(own, torch.float64, dist.ReduceOp.SUM)

    def _reduced(
        self, numbers: Sequence[float], dtype: torch.dtype, operation: Any, patience: timedelta | None = None
    ) -> list[Any]:
        if self.count == 1:
            return list(numbers)
        held = torch.tensor(numbers, dtype=dtype)
        dist.all_reduce(held, operation, group=_words(), async_op=True).wait(patience or self._timeout)
        return held.tolist()

    def spread(
        self, items: Sequence[Item], work: Callable[[Item], Parts], stop: StopSignal | None = None
    ) -> list[Parts] | None:
        """Distribute the items across the processes. Return the results in order on rank 0, and None on the other
        ranks.

        Item k goes to rank k modulo the world size. The result of an item must not depend on the rank.

        Raises:
            Interrupted: on all ranks, if a process was asked to stop.
            FailedElsewhere: on the other ranks, if an item failed on one rank.
        """
        done: list[Parts] = []
        failure: Exception | None = None
        for first in range(0, len(items), self.count):
            asked = 0 if stop is None else stop.number or 0
            self._end_if(failure, asked)
            if first + self.index < len(items):
                try:
                    done.append(tuple(part.detach().cpu() for part in work(items[first + self.index])))
                except Exception as error:
                    if self.count == 1:
                        raise
                    failure = error
        self._end_if(failure, 0)
        return self._collected(done, len(items))

    def _end_if(self, failure: Exception | None, asked: int) -> None:
        """Raise an error on all ranks if a rank has failed or was asked to stop."""
        # Items may differ greatly in cost, such as samples with 256 steps and samples with one step.
        number, failed = self.agree(asked, 0 if failure is None else self.index + 1, patience=WAIT_FOR_MAIN)
        if failure is not None and failed == self.index + 1:
            self.told_by(self.index, {"code": exit_code(failure), "message": str(failure)})
            raise failure
        if failed:
            told = _from(failed - 1)
            raise FailedElsewhere(f"{told['message']} (in process {failed - 1} of the run)", told["code"])
        if number:
            raise Interrupted(number)

    def _collected(self, own: list[Parts], number: int) -> list[Parts] | None:
        """Return the parts of all processes on rank 0, in the order of their items."""
        if self.count == 1:
            return own
        if not self.is_main:
            # Tensors are sent one by one, because pickling them together would double the memory that they need.
            described = [[(part.dtype, part.shape) for part in parts] for parts in own]
            dist.send_object_list([described], 0, group=_words())
            for part in chain.from_iterable(own):
                dist.send(part.contiguous(), 0, group=_words())
            return None
        held: list[list[Parts]] = [own]
        for source in range(1, self.count):
            told: list[Any] = [None]
            dist.recv_object_list(told, source, group=_words())
            theirs = [tuple(torch.empty(shape, dtype=dtype) for dtype, shape in parts) for parts in told[0]]
            for part in chain.from_iterable(theirs):
                dist.recv(part, source, group=_words())
            held.append(theirs)
        return [held[item % self.count][item // self.count] for item in range(number)]


def _from(source: int, value: Any = None) -> Any:
    """Return the value of rank `source` on all ranks."""
    held = [value]
    dist.broadcast_object_list(held, source, group=_words())
    return held[0]


@final
class Lookout:
    """A joint decision of all processes on whether to stop and whether a checkpoint is due.

    A single process checks at each update. Several processes check together about once a second.
    """

    def __init__(self, processes: Processes, stop: StopSignal | None, seconds: float) -> None:
        self._processes, self._stop, self._seconds = processes, stop, seconds
        self._saved = self._looked = time.monotonic()
        self._last, self._next = -1, 0

    def look(self, update: int) -> tuple[bool, bool]:
        """Return whether to stop, and whether a checkpoint is due.

        If the run must stop, `stop.check` then raises Interrupted on every process.

        Raises:
            Interrupted: if another process was asked to stop and this process does not handle signals.
        """
        now = time.monotonic()
        number = 0 if self._stop is None else self._stop.number or 0
        late = now - self._saved > self._seconds
        if self._processes.count == 1:
            return number > 0, late
        if update < self._next:
            return False, False
        wait = 1
        if self._last >= 0:
            pace = (now - self._looked) / max(1, update - self._last)
            wait = max(1, min(1000, int(1 / max(pace, 1e-6))))
        # Clocks differ, so rank 0 decides.
        main = self._processes.is_main
        number, overdue, wait = self._processes.agree(number, int(late and main), wait if main else 0)
        self._looked, self._last, self._next = now, update, update + wait
        if number:
            if self._stop is None:
                raise Interrupted(number)
            self._stop.number = number
        return number > 0, overdue > 0

    def saved(self) -> None:
        """Restart the timer for the next checkpoint."""
        self._saved = time.monotonic()


_OURS: Final = re.compile(r"invalid usage|unhandled cuda error|out of memory", re.IGNORECASE)
"""Errors of NCCL that this process caused, such as two processes on one GPU."""
_BROKEN: Final = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|timed ?out", re.IGNORECASE)


def is_lost(error: BaseException) -> bool:
    """Return whether an error means that another process is gone."""
    # Our own errors contain paths, which may match by accident.
    ours = type(error).__module__.startswith("halfstep.")
    if not isinstance(error, RuntimeError) or ours or not dist.is_initialized():
        return False
    return bool(_BROKEN.search(str(error))) and not _OURS.search(str(error))


def leave() -> None:
    """Disconnect from the other processes."""
    if dist.is_initialized():
        _words.cache_clear()
        dist.destroy_process_group()


def wait_to_be_ended(seconds: float, code: int) -> None:
    """Wait for the launcher to terminate all processes after one has failed, and then exit with `code`."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(seconds)
