"""Several processes as one run.

One process, the first, writes the run's folder; what it finds there, or fails at, the others are told. Decisions that
depend on a clock, a signal or a disk are made once and told to all, so that no process waits for another that went a
different way. What is said between processes goes over a group of its own, on the CPU, and never waits for a device.

Without `torchrun` or `accelerate launch` there is one process, and every call here is a plain call.
"""

import functools
import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar, final

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor
from torch import distributed as dist

from halfstep.runtime import storage
from halfstep.runtime.stop import Interrupted, StopSignal

Item = TypeVar("Item")
Made = TypeVar("Made")
Parts = tuple[Tensor, ...]

TIMEOUT_MINUTES: Final = 10.0
"""Minutes after which a process that does not answer in training is given up."""

WAIT_FOR_MAIN: Final = timedelta(hours=6)
"""How long the others wait while the first process writes, measures or trains a classifier: its end is noticed at once,
so this is for a disk that does not answer."""

LOOK_SECONDS: Final = 1.0
"""Training time between two looks at the signals and clocks of all processes."""


class FailedElsewhere(Exception):
    """Another process of the run has failed: why, and the exit code that it ends with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class LostProcess(RuntimeError):
    """Another process of the run has ended without a word, or does not answer; the message says what to do."""


def exit_code(error: BaseException) -> int:
    """What a process ends with after an error: that of another process, 128 + n for signal n, or `storage.exit_code`'s
    code."""
    if isinstance(error, FailedElsewhere):
        return error.code
    if isinstance(error, Interrupted):
        return 128 + error.signal
    return storage.exit_code(error)


def launched() -> int:
    """Processes that a launcher says it has started; 1 without one."""
    return max(1, int(os.environ.get("WORLD_SIZE", "1") or "1"))


_FOREIGN: Final = {
    "ACCELERATE_USE_FSDP": ("true", "its FSDP", "--engine.sharding full"),
    "ACCELERATE_USE_DEEPSPEED": ("true", "DeepSpeed", "--engine.sharding full"),
    "ACCELERATE_USE_MEGATRON_LM": ("true", "Megatron-LM", "--engine.sharding full"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("true", "a parallelism config", "--engine.sharding full"),
}


def _check_launcher(precision: str) -> None:
    """Refuses settings of `accelerate launch` that would be ignored, or act twice.

    Raises:
        ValueError: naming the first and what stands in its place.
    """
    held = os.environ
    for name, (value, what, instead) in _FOREIGN.items():
        if held.get(name, "").lower() == value:
            raise ValueError(f"accelerate is set to use {what}, which halfstep does not: leave it out, use {instead}")
    if (steps := held.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) != "1":
        raise ValueError(
            f"accelerate is set to accumulate over {steps} steps, which halfstep does not: use --engine.micro-batch"
        )
    asked = held.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", precision):
        ours = "--engine.precision bf16" if asked == "bf16" else "--engine.precision float32 or bf16"
        raise ValueError(f"accelerate is set to {asked}, but the run to {precision}: leave one out, or use {ours}")
    if (compiler := held.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()) != "no":
        raise ValueError(f"accelerate is set to compile by {compiler}, which halfstep does not: leave it out")


def make_accelerator(
    precision: str = "float32", cpu: bool = False, timeout_minutes: float = TIMEOUT_MINUTES
) -> Accelerator:
    """An accelerator for this process: "float32", or "bf16" for bfloat16 autocast over float32 weights.

    Under `torchrun` or `accelerate launch` it is one of several, which are connected at the first call.

    Raises:
        ValueError: if the precision is neither, or a launcher is set to something that would be ignored.
    """
    modes = {"float32": "no", "bf16": "bf16"}
    if precision not in modes:
        raise ValueError(f"precision must be one of {', '.join(modes)}, got {precision!r}")
    _check_launcher(precision)
    if launched() > 1 and not torch.accelerator.is_available():
        # accelerate would otherwise take each process for the only one.
        cpu = True
    # accelerate keeps its settings for the whole process; two runs in one process may differ in them.
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state(reset_partial_state=not dist.is_initialized())
    accelerator = Accelerator(
        mixed_precision=modes[precision],
        cpu=cpu,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes)),
            # Buffers of networks are constants; to send them at each call would cost a message an update.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if launched() > accelerator.num_processes:
        raise ValueError(
            f"{launched()} processes were started, but they are not connected (accelerate sees "
            f"{accelerator.num_processes}): start them with torchrun or accelerate launch"
        )
    return accelerator


@functools.lru_cache(maxsize=1)
def _words() -> dist.ProcessGroup:
    """The group for what processes say to each other, on the CPU; made once, by all of them."""
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=WAIT_FOR_MAIN)
    return group


@final
class Processes:
    """The processes of a run, as one of them sees them.

    Args:
        accelerator: of this process; None for a process alone.
    """

    def __init__(self, accelerator: Accelerator | None = None, timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        self.count: int = 1 if accelerator is None else accelerator.num_processes
        self.index: int = 0 if accelerator is None else accelerator.process_index
        self._timeout = timedelta(minutes=timeout_minutes)
        if self.count > 1:
            _words()

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes."""
        return self.index == 0

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, as JSON holds it: done by the first process, told to all.

        Raises:
            FailedElsewhere: on the others, if it raised an error on the first.
        """
        if self.count == 1:
            return work()
        if not self.is_main:
            told = self._told()
            if "code" in told:
                if told["code"] > 128:
                    raise Interrupted(told["code"] - 128)
                raise FailedElsewhere(told["message"], told["code"])
            return told["result"]
        try:
            result = work()
        except Exception as error:
            self._tell({"code": exit_code(error), "message": str(error)})
            raise
        self._tell({"result": result})
        return result

    def main_first(self, work: Callable[[], Made]) -> Made:
        """What `work` returns, done by each process, by the first before the others: for what leaves a cache behind."""
        made: list[Made] = []
        self.on_main(lambda: made.append(work()))
        return made[0] if made else work()

    def agree(self, *numbers: int, patience: timedelta | None = None) -> tuple[int, ...]:
        """The largest of each number over all processes.

        Args:
            patience: how long to wait for the others; as in training if None.
        """
        if self.count == 1:
            return numbers
        held = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(held, dist.ReduceOp.MAX, group=_words(), async_op=True).wait(patience or self._timeout)
        return tuple(held.tolist())

    def check_same(self, name: str, what: str, remedy: str) -> None:
        """Passes if `name` is the same on all processes.

        Raises:
            ValueError: on all, if it is not.
        """
        own = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        most, least = self.agree(own, -own, patience=WAIT_FOR_MAIN)
        if most != -least:
            raise ValueError(f"processes of the run have {what} each of its own, here {name}: {remedy}")

    def told_by(self, index: int, value: Any) -> Any:
        """The value that process `index` has, as JSON holds it, on all."""
        if self.count == 1:
            return value
        if self.index == index:
            self._tell(value, index)
            return value
        return self._told(index)

    def mean(self, *numbers: float) -> tuple[float, ...]:
        """The mean of each number over all processes."""
        if self.count == 1:
            return numbers
        held = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(held, dist.ReduceOp.SUM, group=_words(), async_op=True).wait(self._timeout)
        return tuple((held / self.count).tolist())

    def each(self, number: float) -> list[float]:
        """The number of every process, in their order."""
        held = torch.zeros(self.count, dtype=torch.float64)
        held[self.index] = number
        if self.count > 1:
            dist.all_reduce(held, dist.ReduceOp.SUM, group=_words(), async_op=True).wait(self._timeout)
        return list(held.tolist())

    def spread(
        self, items: Sequence[Item], work: Callable[[Item], Parts], stop: StopSignal | None = None
    ) -> list[Parts] | None:
        """`work` of every item, in order, on the first process; None on the others.

        Item k is done by process k modulo their number. What an item gives does not depend on who does it, so neither
        does the result on how many there are.

        Raises:
            Interrupted: on all, if a process was asked to stop.
            FailedElsewhere: on the others, if an item failed on one.
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
        """Passes if no process has failed and none was asked to stop."""
        # Items may differ in size without bound: a sample in 256 steps beside one in 1.
        number, failed = self.agree(asked, 0 if failure is None else self.index + 1, patience=WAIT_FOR_MAIN)
        if failed == self.index + 1 and failure is not None:
            if self.count > 1:
                self._tell({"code": exit_code(failure), "message": str(failure)}, self.index)
            raise failure
        if failed:
            told = self._told(failed - 1)
            raise FailedElsewhere(f"{told['message']} (in process {failed - 1} of the run)", told["code"])
        if number:
            raise Interrupted(number)

    def _collected(self, own: list[Parts], number: int) -> list[Parts] | None:
        """The parts of all processes in the order of their items, on the first."""
        if self.count == 1:
            return own
        if not self.is_main:
            shapes = [[[str(part.dtype).removeprefix("torch."), list(part.shape)] for part in parts] for parts in own]
            self._send(json.dumps(shapes), 0)
            for parts in own:
                for part in parts:
                    dist.send(part.contiguous(), 0, group=_words())
            return None
        held: list[list[Parts]] = [own]
        for source in range(1, self.count):
            taken = []
            for described in json.loads(self._receive(source)):
                parts = tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for dtype, shape in described)
                for part in parts:
                    dist.recv(part, source, group=_words())
                taken.append(parts)
            held.append(taken)
        return [held[item % self.count][item // self.count] for item in range(number)]

    @staticmethod
    def _send(text: str, to: int) -> None:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        dist.send(torch.tensor([len(data)]), to, group=_words())
        dist.send(data, to, group=_words())

    @staticmethod
    def _receive(source: int) -> str:
        length = torch.zeros(1, dtype=torch.int64)
        dist.recv(length, source, group=_words())
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, source, group=_words())
        return bytes(data.tolist()).decode()

    @staticmethod
    def _tell(value: Any, source: int = 0) -> None:
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(data)]), source, group=_words())
        dist.broadcast(data, source, group=_words())

    @staticmethod
    def _told(source: int = 0) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, source, group=_words())
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, source, group=_words())
        return json.loads(bytes(data.tolist()))


@final
class Lookout:
    """Says after an update whether the run was asked to stop, and whether a checkpoint is late: the same on all
    processes. A process alone looks at each update; several look together about once a second."""

    def __init__(self, processes: Processes, stop: StopSignal | None, seconds: float) -> None:
        self._processes, self._stop, self._seconds = processes, stop, seconds
        self._saved = self._looked = time.monotonic()
        self._last = -1
        self._next = 0

    def look(self, update: int) -> tuple[bool, bool]:
        """Whether to stop (then `stop.check` raises on every process) and whether `seconds` have passed since `saved`.

        Raises:
            Interrupted: if another process was asked to stop and this one watches no signals.
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
            wait = max(1, min(1000, int(LOOK_SECONDS / max(pace, 1e-6))))
        # Clocks differ, so the first process' own count.
        main = self._processes.is_main
        number, overdue, wait = self._processes.agree(number, int(late and main), wait if main else 0)
        self._looked, self._last, self._next = now, update, update + wait
        if number:
            if self._stop is None:
                raise Interrupted(number)
            self._stop.number = number
        return number > 0, overdue > 0

    def saved(self) -> None:
        """Counts the seconds from now."""
        self._saved = time.monotonic()


_BROKEN: Final = re.compile(r"gloo|nccl|connection (was )?(closed|reset)|broken pipe|timed ?out", re.IGNORECASE)


def is_lost(error: BaseException) -> bool:
    """Whether an error is what a process sees of another that has gone."""
    # Our own errors name files and folders, which may be called anything.
    ours = type(error).__module__.startswith("halfstep.")
    return isinstance(error, RuntimeError) and not ours and dist.is_initialized() and bool(_BROKEN.search(str(error)))


def leave() -> None:
    """Ends the connection to the other processes, in good order."""
    if dist.is_initialized():
        _words.cache_clear()
        dist.destroy_process_group()


def wait_to_be_ended(seconds: float, code: int) -> None:
    """Waits for a launcher that ends all processes once one of them has failed; the end is one with `code` then."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    time.sleep(seconds)
