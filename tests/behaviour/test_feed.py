"""An update's inputs are the same whether they are prepared on demand or ahead: each once, in the order of updates.

Also tests compiled networks.
"""

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.core.denoiser import Guided, NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import FlowMatching, NoiseProcess, VPCosine, VPTable
from halfstep.core.prediction import V
from halfstep.data import Data, DataConfig, MemoryData, held_on, open_data, training_batch
from halfstep.data.base import Feed, Place
from halfstep.nets import MLP
from halfstep.objectives import (
    STUDENT,
    Batch,
    Denoising,
    GuidanceRange,
    Halving,
    Matching,
    Models,
    Objective,
    Plan,
    Stage,
    Training,
    Turn,
)
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.runs import RunFolder, read_log
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import Heun, LogSNR
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine
from support import variants
from toys import finish, points, toy_plan, toy_spec, tuned, weights

CPU = torch.device("cpu")


def _batches(draw: Draw) -> Batch:
    return training_batch(MemoryData("toy", points()), draw, False)


def _places(update: int) -> list[list[Place]]:
    """Return one turn of two micro batches."""
    turn = Turn(STUDENT, Denoising().loss)
    return [[Place(0, turn, Draw(0, "a", update, 12, places)) for places in (range(8), range(8, 12))]]


def _first(update: int) -> list[list[Place]]:
    """Return its first micro batch."""
    return [_places(update)[0][:1]]


def _trainer(
    objective: object, ahead: int = 0, compiled: bool = False, cpu: bool = True, micro: int = 6
) -> StageTrainer:
    torch.manual_seed(0)
    guided = getattr(objective, "guidance", None) is not None
    student, teacher = (NetworkDenoiser(MLP((2,), width=16, depth=1, guided=guided), VPCosine(), V()) for _ in range(2))
    stage = Stage(objective, Training(8, 1e-3, batch_size=16))  # type: ignore[arg-type]
    return StageTrainer(
        student, teacher, stage, _batches, (2,), seed=0, stream="s", accelerator=make_accelerator(cpu=cpu),
        engine=Engine(micro_batch=micro, compile=compiled), ahead=ahead,
    )  # fmt: skip


def _weights(trainer: StageTrainer) -> torch.Tensor:
    return torch.cat([p.flatten() for p in trainer.finish().parameters()])


@pytest.mark.parametrize(
    "objective", [Denoising(), Halving(4), Halving(2, 3), Matching(32), Halving(4, guidance=GuidanceRange(1, 4))]
)
def test_training_ahead_is_training_bit_for_bit(objective: object) -> None:
    results = []
    for ahead in (0, 1, 5, 50):
        trainer = _trainer(objective, ahead)
        assert list(trainer.run()) == list(range(1, 9))
        results.append(_weights(trainer))
    assert all(torch.equal(result, results[0]) for result in results)


def test_inputs_of_the_first_update_are_prepared_ahead_for_later_ones() -> None:
    feed = Feed(_batches, _places, CPU, ahead=2)
    drawn_late = []
    for number, fed in enumerate(feed.updates(0, lambda: 6)):
        for (_, _, draw), batch in fed[0]:
            made = dict(draw._ahead)
            value = draw.normal("noise", batch.x0.shape[1:])
            drawn_late.append(not made)
            assert not draw._ahead, "a number was used twice or for another request"
            fresh = Draw(0, "a", number, 12, draw.places)
            assert torch.equal(value, fresh.normal("noise", (2,)))
            assert torch.equal(draw.normal("noise", (2,)), value)
            assert torch.equal(batch.x0, _batches(fresh).x0)
    assert len(drawn_late) == 12
    # The thread may be a few updates ahead before the first request; after that, nothing is drawn late.
    assert not any(drawn_late[-4:])


def test_the_feed_stops_where_the_stage_ends_and_leaves_no_thread() -> None:
    asked: list[int] = []

    def batches(draw: Draw) -> Batch:
        asked.append(draw.update)
        return _batches(draw)

    updates = Feed(batches, _first, CPU, ahead=3).updates(2, lambda: 7)
    assert sum(1 for _ in updates) == 5
    assert asked == [2, 3, 4, 5, 6]
    half = Feed(batches, _first, CPU, ahead=3).updates(0, lambda: 100)
    next(half)
    half.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("halfstep-feed")]


def test_training_on_files_that_do_not_fit_into_memory_is_training_on_those_that_do(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(40):
        Image.fromarray(generator.integers(256, size=(9, 7, 3), dtype=np.uint8)).save(tmp_path / f"{number:02}.png")
    for name, most in (("held", 2**30), ("streamed", 0)):
        data = open_data(
            DataConfig(source=str(tmp_path), labels=False, image_size=6, channels=3, flip=True, max_bytes=most)
        )
        assert isinstance(data, MemoryData) == (name == "held")
        network = {"network": lambda: MLP((3, 6, 6), width=16, depth=1)}
        # Micro batches, and epochs that start in the middle of a batch.
        finish(toy_spec(data=data, flip=True, micro_batch=6, **network), tmp_path / "runs" / name)
    assert weights(tmp_path / "runs" / "held") == weights(tmp_path / "runs" / "streamed")


def test_an_error_of_the_data_reaches_the_training_loop() -> None:
    def batches(draw: Draw) -> Batch:
        if draw.update == 4:
            raise ValueError("picture.png cannot be decoded")
        return _batches(draw)

    updates = Feed(batches, _places, CPU, ahead=3).updates(0, lambda: 9)
    assert [fed[0][0].place.draw.update for fed in itertools.islice(updates, 4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"picture\.png cannot be decoded"):
        next(updates)


@dataclass(frozen=True)
class _Slow(Data):
    """Points that are slow to read."""

    seconds: float
    source: str = "slow points"
    fingerprint: str = "0" * 64
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def is_image(self) -> bool:
        return False

    def __len__(self) -> int:
        return 200

    def fetch(self, indices: torch.Tensor) -> Batch:
        time.sleep(self.seconds)
        return Batch(points()[indices], {})


@pytest.mark.parametrize(("reading", "computing", "is_told"), [(0.1, 0.0, True), (0.0, 0.1, False)])
def test_a_run_that_waits_for_its_data_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: float, computing: float, is_told: bool
) -> None:
    call = MLP.forward

    def slow(self: MLP, *given: Any, **cond: Any) -> torch.Tensor:
        time.sleep(computing)
        return call(self, *given, **cond)

    monkeypatch.setattr(MLP, "forward", slow)
    plan = Plan(toy_plan(25).stages[:1])
    told = finish(toy_spec(plan=plan, data=_Slow(reading), log_every=5, checkpoint_updates=1000), tmp_path)
    # Once, however often it happens.
    assert len(told) == is_told
    shares = sorted(row["data_share"] for row in read_log(RunFolder(tmp_path).log_path))
    assert all(0 <= share <= 1 for share in shares)
    assert (shares[2] > 0.5) == is_told
    if is_told:
        assert told[0].startswith("00-denoise: updates wait for data ")
        assert told[0].endswith("give the run more CPU cores or a faster disk")


class _Watch(TorchDispatchMode):
    """A mode that records operations that make the host wait for its device: reading a number or indices."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(function)
        if "_local_scalar_dense" in name or "nonzero" in name or "is_nonzero" in name:
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


OBJECTIVES: Final = [Denoising(), Halving(4), Matching(32), Halving(4, guidance=GuidanceRange(1, 4))]
BY_HEUN: Final = Halving(4, 1, teacher_sampler=Heun(LogSNR()))
EVERY_TEACHER: Final = [
    Halving(4, teacher_sampler=each.values[0]) for each in variants() if not each.values[0].stochastic
]


@pytest.mark.parametrize("objective", [*OBJECTIVES, *EVERY_TEACHER])
def test_an_update_never_waits_for_the_device(objective: object) -> None:
    # The feed prepares inputs on the CPU, wherever the networks are, so they are fetched before the recording starts.
    trainer = _trainer(objective)
    feed = trainer._feed
    fed = next(feed.updates(0, lambda: 1))
    with _Watch() as watch:
        trainer._one_update(fed)
    assert watch.waits == []
    with _Watch() as watch:
        trainer.window()
    assert watch.waits, "nothing was recorded"


class _Copies(TorchDispatchMode):
    """A mode that records copies from the host to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        moved = isinstance(result, torch.Tensor) and result.device.type != "cpu"
        given = [value for value in args if isinstance(value, torch.Tensor)]
        if moved and any(value.device.type == "cpu" for value in given if value.ndim):
            self.copies.append(str(function))
        return result


@pytest.mark.parametrize(
    ("objective", "process"),
    [
        *((objective, VPCosine()) for objective in OBJECTIVES),
        *((BY_HEUN, process) for process in (VPCosine(), VPTable(), FlowMatching(3.0))),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_update_copies_nothing_from_the_host_except_prepared_inputs(
    objective: Objective, process: NoiseProcess
) -> None:
    # On the device "meta", every copy from the host is recorded: on a GPU it would wait.
    meta = torch.device("meta")
    guided = getattr(objective, "guidance", None) is not None
    made = [NetworkDenoiser(MLP((2,), width=16, depth=1, cond_width=3, guided=guided), process, V()) for _ in range(2)]
    student, bare = (one.to(meta) for one in made)
    teacher = Guided(bare, {"observation": torch.zeros(3)}, scale=2.0) if isinstance(objective, Matching) else bare
    copies = []
    for fed in Feed(_observed, _places, meta, ahead=1).updates(0, lambda: 3):
        with _Copies() as watch:
            for part in fed[0]:
                objective.loss(Models(student, teacher), part.batch, part.place.draw)
        copies.append(watch.copies)
    # The first update finds out which numbers it needs. From then on, they stay on the device.
    assert copies[0], "nothing was recorded"
    assert copies[-1] == []


def _observed(draw: Draw) -> Batch:
    x0, _ = _batches(draw)
    return Batch(x0, {"observation": torch.zeros(len(x0), 3)})


def test_clock_numbers_are_sent_to_devices_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    # Apple's GPUs do not support float64 and reject the copy.
    went: list[tuple[torch.dtype, str]] = []
    monkeypatch.setattr(
        "halfstep.data.base.sent", lambda value, device: went.append((value.dtype, device.type)) or value
    )
    for fed in Feed(_batches, _places, torch.device("mps"), ahead=1).updates(0, lambda: 4):
        for part in fed[0]:
            part.place.draw.uniform("time")
            part.place.draw.normal("noise", (2,))
    assert (torch.float32, "mps") in went
    assert {device for dtype, device in went if dtype == torch.float64} == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where torch itself detects this")
def test_on_a_gpu_torch_finds_no_wait_either() -> None:
    trainer = _trainer(Halving(4), ahead=3, cpu=False)
    _finds_no_wait(trainer)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, where torch itself detects this")
def test_on_a_gpu_images_that_lie_there_are_fetched_and_mirrored_without_a_wait() -> None:
    pixels = torch.randint(256, (64, 1, 2, 2), dtype=torch.uint8)
    held = held_on(torch.device("cuda"), MemoryData("toy", pixels))
    assert held.fetch(torch.arange(2)).x0.is_cuda
    feed = Feed(lambda draw: training_batch(held, draw, True), _places, torch.device("cuda"))
    updates = feed.updates(0, lambda: 8)
    next(updates)
    with _errors_at_waits():
        assert len(list(updates)) == 7


@contextlib.contextmanager
def _errors_at_waits() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _finds_no_wait(trainer: StageTrainer) -> None:
    updates = trainer.run()
    next(updates)
    with _errors_at_waits():
        for _ in updates:
            pass


@pytest.fixture
def _quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use all of torch.compile except the generation of C++, which takes a minute."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **settings: compile_(module, backend="aot_eager", **settings)
    )


@pytest.mark.usefixtures("_quick_compiler")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_networks_are_compiled_once_for_the_chain_and_train_equally(tmp_path: Path, precision: str) -> None:
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    reset()
    counters.clear()
    spec = toy_spec(plan=toy_plan(12, 8), precision=precision)
    finish(spec, tmp_path / "eager")
    # With gradient checkpointing, for which the network is unwrapped.
    engine = replace(spec.engine, compile=True, checkpoint_updates=3)
    finish(replace(spec, engine=engine), tmp_path / "compiled")
    # Teacher training, teacher calls and student training are compiled; the second student reuses all of them.
    assert 2 <= counters["stats"]["unique_graphs"] <= 3
    for stage in RunFolder(tmp_path / "eager").stages():
        for name, value in load_file(stage.model).items():
            other = load_file(tmp_path / "compiled" / "stages" / stage.name / stage.model.name)[name]
            # Fused code rounds to bfloat16 at other points.
            apart = 1e-4 if precision == "float32" else 1e-2
            assert torch.linalg.norm(other - value) <= apart * torch.linalg.norm(value)


def test_code_is_compiled_for_the_current_shapes_whatever_was_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo import reset
    from torch._dynamo.backends.debugging import aot_eager

    seen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[object]) -> object:
        seen.append({str(type(value).__name__) for value in inputs})
        return aot_eager(graph, inputs)

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **settings: compile_(module, backend=backend, **settings)
    )
    reset()
    # The teacher has another batch size than its students. By default, torch would compile the second graph for any
    # size.
    plan = toy_plan(10, 10)
    plan = Plan((tuned(plan.stages[0], batch_size=24), *plan.stages[1:]))
    spec = toy_spec(plan=plan, compile=True, checkpoint_updates=5)
    finish(spec, tmp_path / "uncut")
    assert len(seen) == 3
    assert not any("SymInt" in kinds for kinds in seen)
    reset()
    # A run that is resumed in a later stage never compiles the first stage, and ends with the same weights.
    events = run(spec, tmp_path / "cut")
    next(e for e in events if isinstance(e, Progress) and (e.name, e.window.update) == ("01-halve-0002", 5))
    events.close()  # type: ignore[attr-defined]
    reset()
    finish(spec, tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "uncut")


@pytest.mark.parametrize(
    ("backend", "objective"),
    [("aot_eager", Halving(4)), pytest.param("inductor", Denoising(), marks=pytest.mark.slow)],
)
def test_a_compiled_stage_ends_near_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, backend: str, objective: Objective
) -> None:
    from torch._dynamo import reset

    if backend == "inductor" and shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch compiles for the CPU with g++ or clang++, and neither is here")
    reset()
    compile_ = torch.nn.Module.compile
    if backend != "inductor":
        monkeypatch.setattr(
            torch.nn.Module, "compile", lambda module, **settings: compile_(module, backend=backend, **settings)
        )
    results = []
    for compiled in (False, True):
        # As one piece, because each size would compile other code.
        trainer = _trainer(objective, compiled=compiled, micro=16)
        list(trainer.run())
        results.append(_weights(trainer))
    assert torch.linalg.norm(results[1] - results[0]) < 1e-5 * torch.linalg.norm(results[0])
