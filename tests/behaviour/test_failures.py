"""Messages, exit codes and stored state of failing runs: divergence, memory, signals, disks, damage."""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import torture
from halfstep.cli import main, training
from halfstep.core.draw import Draw
from halfstep.data import MemoryData
from halfstep.measure.evaluate import Evaluation
from halfstep.measure.store import Store
from halfstep.models.folder import load
from halfstep.nets import MLP
from halfstep.objectives import (
    STUDENT,
    Batch,
    Denoising,
    Evals,
    Losses,
    Models,
    Objective,
    Outcome,
    Plan,
    Role,
    Turn,
    objectives,
)
from halfstep.run import runner as pipeline
from halfstep.run.events import Measuring, Progress
from halfstep.run.runner import run
from halfstep.run.start import trainer_for
from halfstep.runs import RunFolder, StageFolder, read_log
from halfstep.runtime import tensors as tensor_files
from halfstep.runtime.failures import NonFinite, OutOfMemory, is_out_of_memory
from halfstep.runtime.files import DamagedFile
from halfstep.runtime.processes import exit_code, is_lost, make_accelerator
from halfstep.runtime.stop import SAME_PRESS, Interrupted, StopSignal, at_once
from halfstep.runtime.storage import NoStorage, no_storage
from halfstep.runtime.tensors import write_tensors
from halfstep.train import checkpoint, recent
from halfstep.train import checkpoint as checkpoints
from halfstep.train.engine import StageTrainer
from halfstep.train.memory import fit_micro_batch
from halfstep.train.recent import Part, Recent
from torture import mount, unmount
from toys import TINY_ARRAYS, Poisoned, finish, one_stage, points, toy_plan, toy_spec, tuned, weights


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uncut") / "run"
    finish(toy_spec(), path)
    return path


@dataclasses.dataclass(frozen=True)
class Hungry(Objective):
    """Denoising that allocates a petabyte for more than `fitting` samples in the turns of update `since` and later."""

    fitting: int
    since: int = 0
    needs_teacher: ClassVar[bool] = False

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.TEACHER)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1)}

    def turns(self, update: int) -> tuple[Turn, ...]:
        return (Turn(STUDENT, Denoising().loss if update < self.since else self.loss),)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        losses = Denoising().loss(models, batch, draw)
        if len(draw.places) > self.fitting:
            torch.empty(2**50, dtype=torch.uint8)
        return losses


@dataclasses.dataclass(frozen=True)
class Slow(Objective):
    """Denoising that, while `slow` is set, takes minutes from one update on; `reached` signals that it has called the
    network once."""

    update: int
    needs_teacher: ClassVar[bool] = False
    slow: ClassVar[threading.Event] = threading.Event()
    reached: ClassVar[threading.Event] = threading.Event()

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.TEACHER)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1)}

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        losses = Denoising().loss(models, batch, draw)
        if draw.update >= self.update and self.slow.is_set():
            self.reached.set()
            time.sleep(100)
        return losses


class Normalised(torch.nn.Module):
    """A network with buffers that every forward pass changes, in place or by assignment."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.calls = self.calls + 1
        found: torch.Tensor = self.leave(self.norm(self.enter(torch.cat([x_t, time[:, None]], 1))).relu())
        return found


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name the objectives of these tests."""
    for kind in (Poisoned, Hungry, Slow):
        monkeypatch.setitem(objectives, kind.__name__.lower(), kind)


def trainer(objective: Objective, micro_batch: int | None = None, x0: torch.Tensor | None = None) -> StageTrainer:
    data = MemoryData("toy", points() if x0 is None else x0)
    spec = toy_spec(plan=one_stage(objective), data=data, micro_batch=micro_batch)
    return trainer_for(spec, spec.plan.stages[0], "00-x", None, make_accelerator(cpu=True))


# ------------------------------------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("micro_batch", [None, 5])
def test_a_non_finite_loss_is_reported_with_the_statistics_of_its_batch(micro_batch: int | None) -> None:
    x0 = points()[:16]
    x0[3] = torch.tensor([7.0, -9.0])
    poisoned = trainer(Poisoned(6, (2, 11), math.nan), micro_batch, x0)
    sound = trainer(Denoising(), None, x0)
    norms = []
    for _ in sound.run():
        norms.append(sound.window().grad_norm)
        if sound.update == 6:
            break
    # The losses of the seventh update without the poison, as one batch and without dropout.
    draw = Draw(0, "00-x", 6, 16, range(16))
    log_snr = sound.student.model.process.log_snr(draw.uniform("time"))

    list(poisoned.run())
    with pytest.raises(NonFinite) as error:
        poisoned.check_finite()
    held = dict(error.value.statistics or {})
    assert held["stage"] == "00-x"
    assert held["update"] == 6
    assert held["samples"] == 16
    assert [entry["place"] for entry in held["not_finite"]] == [2, 11]
    assert [entry["log_snr"] for entry in held["not_finite"]] == pytest.approx([log_snr[2].item(), log_snr[11].item()])
    assert {entry["loss"] for entry in held["not_finite"]} == {"nan"}
    assert held["largest_x0"] == 9.0
    assert held["grad_norm"] == "nan"
    assert held["grad_norm_before"] == pytest.approx(norms[5], rel=0.2 if micro_batch else 1e-5)
    assert 0 < held["loss_min"] < held["loss_max"] < math.inf
    assert any(held["log_snr_of_loss_max"] == pytest.approx(value.item()) for value in log_snr)
    low, high = sorted((log_snr[2].item(), log_snr[11].item()))
    message = str(error.value)
    assert f"stage 00-x at update 6 (2 of 16 losses were not finite at log-SNR {low:.3g} to {high:.3g}; " in message
    assert "largest |x0| 9; gradient norm nan, " in message
    assert "Lower the learning rate (0.002)" in message


def test_the_losses_of_a_batch_are_those_of_its_objective() -> None:
    recent = Recent()
    loss, log_snr = torch.tensor([3.0, 1.0, math.inf, 2.0]), torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    recent.norms.append((8, torch.tensor(0.5)))
    recent.parts.append(Part(9, range(4, 6), loss[:2], log_snr[:2], torch.tensor(0.2)))
    recent.parts.append(Part(9, range(6, 8), loss[2:], log_snr[2:], torch.tensor(0.3)))
    recent.norms.append((9, torch.tensor(math.inf)))
    assert recent.statistics(9) == {
        "update": 9,
        "samples": 4,
        "loss_min": 1.0,
        "loss_max": 3.0,
        "log_snr_of_loss_max": 1.0,
        "not_finite": [{"place": 6, "loss": "inf", "log_snr": 3.0}],
        "largest_x0": pytest.approx(0.3),
        "grad_norm": "inf",
        "grad_norm_before": 0.5,
    }
    # The end of a window drops its updates, but the next window still has the norm from before it.
    recent.forget()
    assert recent.statistics(10) == {"update": 10, "grad_norm": None, "grad_norm_before": "inf"}


def test_a_signal_that_a_library_makes_an_error_of_its_own_of_is_still_one() -> None:
    def compiled() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except Exception as error:
            raise RuntimeError("the compiler failed") from error

    with StopSignal() as stop, pytest.raises(Interrupted), stop.at_once():
        compiled()
    with StopSignal() as stop, pytest.raises(RuntimeError, match="its own"), stop.at_once():
        raise RuntimeError("its own")


@pytest.mark.parametrize("where", ["build", "make_report"])
def test_a_signal_before_or_after_training_ends_with_the_requested_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    np.save(tmp_path / "toy.npy", points().numpy())

    def killed(*arguments: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(30)

    monkeypatch.setattr(training, where, killed)
    words = ["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--engine.requeue-code", "85"])
    assert ended.value.code == 85
    assert "stopped by SIGUSR1; the state is saved" in capsys.readouterr().err


def test_a_failure_is_reported_however_rarely_the_log_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (recent, pipeline):
        monkeypatch.setattr(module, "KEPT", 4)
    spec = toy_spec(plan=one_stage(Poisoned(7, (4,), math.inf)), log_every=10**6, checkpoint_updates=10**6)
    with pytest.raises(NonFinite, match=r"at update 7 \(1 of 16 losses were not finite"):
        finish(spec, tmp_path / "run")


def test_a_failure_in_a_later_stage_reports_the_stage_before_it(tmp_path: Path) -> None:
    stages = (toy_plan().stages[0], one_stage(Poisoned(1, (4,), math.inf)).stages[0])
    with pytest.raises(NonFinite, match=r"the last complete stage is .*00-denoise$"):
        finish(toy_spec(plan=Plan(stages)), tmp_path / "run")


def test_a_run_that_diverged_keeps_the_statistics_and_its_last_checkpoint(tmp_path: Path) -> None:
    spec = toy_spec(plan=one_stage(Poisoned(7, (4,), math.inf)))
    with pytest.raises(NonFinite, match=r"1 of 16 losses were not finite.*the last good checkpoint is .*00000006"):
        finish(spec, tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "00-poisoned"
    held = json.loads((stage / "non-finite.json").read_text())
    assert (held["stage"], held["update"], held["not_finite"][0]["place"]) == ("00-poisoned", 7, 4)
    assert [path.name for path in StageFolder(stage).checkpoints()] == ["checkpoint-00000006", "checkpoint-00000003"]
    # The message says that nothing was repaired: the same checkpoint leads to the same divergence.
    with pytest.raises(NonFinite, match="at update 7"):
        finish(spec, tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------- memory


def test_memory_errors_are_distinguished_from_others() -> None:
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50, dtype=torch.uint8)
    held = (real.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory."))
    assert all(is_out_of_memory(error) for error in held)
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"))
    others = (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("memory"),
        OSError(errno.EIO, "x"),
    )
    assert not any(is_out_of_memory(error) for error in others)


def test_an_update_that_does_not_fit_names_the_micro_batch_that_was_tried(tmp_path: Path) -> None:
    with pytest.raises(
        OutOfMemory, match=r"stage 00-hungry at update 0 with a micro batch of 16 \(batch 16\)"
    ) as error:
        finish(toy_spec(plan=one_stage(Hungry(5))), tmp_path / "run")
    assert "Set engine.micro_batch to 8, or auto" in str(error.value)
    with pytest.raises(OutOfMemory, match=r"micro batch of 1 .*gradient_checkpointing"):
        finish(toy_spec(plan=one_stage(Hungry(0)), micro_batch="auto"), tmp_path / "none")


def test_the_largest_micro_batch_that_fits_is_found_and_the_result_is_that_of_the_batch(tmp_path: Path) -> None:
    hungry = one_stage(Hungry(5))
    told = finish(toy_spec(plan=hungry, micro_batch="auto"), tmp_path / "auto")
    assert told == ["00-hungry: the micro batch is 4 samples, because 16 and 8 did not fit into memory"]
    finish(toy_spec(plan=hungry, micro_batch=4), tmp_path / "four")
    assert weights(tmp_path / "auto") == weights(tmp_path / "four")

    # Dropout masks differ between micro batches. Without dropout, the result is that of the whole batch, except for
    # rounding.
    plans = [Plan((tuned(one_stage(Hungry(n)).stages[0], dropout=0.0),)) for n in (5, 16)]
    results = []
    for name, plan in zip(("tried", "whole"), plans, strict=True):
        finish(toy_spec(plan=plan, micro_batch="auto"), tmp_path / name)
        network = load(tmp_path / name).denoiser
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert 0 < torch.linalg.norm(results[0] - results[1]) < 1e-5 * torch.linalg.norm(results[1])


def test_a_micro_batch_that_is_found_also_fits_the_larger_turns_of_later_updates(tmp_path: Path) -> None:
    told = finish(toy_spec(plan=one_stage(Hungry(5, since=5)), micro_batch="auto"), tmp_path)
    assert told == ["00-hungry: the micro batch is 4 samples, because 16 and 8 did not fit into memory"]


def test_trying_leaves_no_trace_in_the_result(tmp_path: Path) -> None:
    plain, tried = trainer(Denoising()), trainer(Denoising())
    assert fit_micro_batch(tried) == []
    assert tried.micro_batch == 16
    for made in (plain, tried):
        list(made.run())
    assert tried.window().loss == plain.window().loss
    for part, tensors in plain.state().items():
        held = tried.state()[part]
        assert all(torch.equal(held[name], value) for name, value in tensors.items())


def test_a_resumed_run_keeps_the_micro_batch_that_was_found(tmp_path: Path) -> None:
    # The size is kept on a machine with more memory too, because another split would round differently.
    spec = toy_spec(plan=one_stage(Hungry(5)), micro_batch="auto", log_every=1)
    finish(spec, tmp_path / "uncut")
    events = run(spec, tmp_path / "cut")
    next(e for e in events if isinstance(e, Progress) and e.window.update == 10)
    events.close()  # type: ignore[attr-defined]
    finish(dataclasses.replace(spec, plan=one_stage(Hungry(100))), tmp_path / "cut")
    assert weights(tmp_path / "cut") == weights(tmp_path / "uncut")


@pytest.mark.parametrize(
    ("size", "fits", "remedy"),
    [(None, 3, None), (None, 0, "measure on the CPU"), (8, 3, "lower --batch-size .*--evaluation.batch-size")],
)
def test_an_evaluation_draws_what_fits_or_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, fits: int, remedy: str | None
) -> None:
    evaluation = Evaluation(num_samples=64, num_compared=4, num_shown=4, batch_size=size)
    plan = Plan(toy_plan(5).stages[:1])
    finish(toy_spec(plan=plan, evaluation=evaluation), tmp_path / "plenty")
    call = MLP.forward

    def hungry(self: MLP, x_t: torch.Tensor, *rest: Any, **cond: Any) -> torch.Tensor:
        if not self.training and len(x_t) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return call(self, x_t, *rest, **cond)

    monkeypatch.setattr(MLP, "forward", hungry)
    if remedy is not None:
        with pytest.raises(OutOfMemory, match=f"out of memory while sampling, .*{remedy}"):
            finish(toy_spec(plan=plan, evaluation=evaluation), tmp_path / "scarce")
        return
    finish(toy_spec(plan=plan, evaluation=evaluation), tmp_path / "scarce")
    one, two = (RunFolder(tmp_path / name).stage("00-denoise").metrics() for name in ("plenty", "scarce"))
    assert one is not None
    assert two is not None
    assert [row.frechet for row in two.results] == pytest.approx([row.frechet for row in one.results], rel=1e-5)


def test_only_the_micro_batch_that_is_found_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda module, **settings: compile_(module, backend="aot_eager", **settings)
    )
    reset()
    counters.clear()
    # Torch gives up after eight sizes, but a resumed run has only one.
    told = finish(toy_spec(plan=one_stage(Hungry(1)), compile=True, micro_batch="auto"), tmp_path)
    assert told == ["00-hungry: the micro batch is 1 samples, because 16 and 8 and 4 and 2 did not fit into memory"]
    assert counters["stats"]["unique_graphs"] == 1


def test_a_micro_batch_that_was_given_is_no_bound_for_one_that_is_looked_for(tmp_path: Path) -> None:
    spec = toy_spec(plan=one_stage(Hungry(5)), micro_batch=1, log_every=1)
    events = run(spec, tmp_path)
    next(e for e in events if isinstance(e, Progress) and e.window.update == 10)
    events.close()  # type: ignore[attr-defined]
    told = finish(toy_spec(plan=spec.plan, micro_batch="auto", log_every=1), tmp_path)
    assert told == ["00-hungry: the micro batch is 4 samples, because 16 and 8 did not fit into memory"]


# ---------------------------------------------------------------------------------------------------------- signals


@contextlib.contextmanager
def _sent(number: int, when: Callable[[], bool]) -> Iterator[None]:
    """Send this process a signal twice, as launchers do, when its time has come."""
    # A signal to the process may be delivered to any thread; a sleep in this one would then not be interrupted.
    main = threading.get_ident()

    def wait() -> None:
        while not when():
            time.sleep(0.01)
        for _ in range(2):
            signal.pthread_kill(main, number)

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


@pytest.mark.parametrize(
    ("number", "own_network"), [(signal.SIGTERM, None), (signal.SIGUSR1, Normalised)], ids=["MLP", "BatchNorm"]
)
def test_a_signal_in_the_middle_of_a_long_update_saves_the_state_before_it_at_once(
    tmp_path: Path, number: int, own_network: Callable[[], torch.nn.Module] | None
) -> None:
    spec = toy_spec(plan=one_stage(Slow(7)), checkpoint_updates=1000, micro_batch=6)
    if own_network is not None:
        spec = dataclasses.replace(spec, network=own_network, own_network=own_network())
    Slow.slow.set()
    Slow.reached.clear()
    begun = time.monotonic()
    with StopSignal() as stop, _sent(number, Slow.reached.is_set), pytest.raises(Interrupted) as stopped:
        finish(spec, tmp_path / "run", stop)
    assert time.monotonic() - begun < 30
    assert stopped.value.code == 128 + number
    assert [path.name for path in RunFolder(tmp_path / "run").stage("00-slow").checkpoints()] == ["checkpoint-00000007"]
    Slow.slow.clear()
    finish(spec, tmp_path / "run")
    finish(spec, tmp_path / "uncut")
    assert weights(tmp_path / "run") == weights(tmp_path / "uncut")
    rows = [(row["stage"], row["update"]) for row in read_log(RunFolder(tmp_path / "run").log_path)]
    assert rows == sorted(set(rows))


def test_a_signal_in_the_middle_of_an_evaluation_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = threading.Event()

    def endless(*_: object, **__: object) -> None:
        reached.set()
        time.sleep(100)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "result", endless)
        with StopSignal() as stop, _sent(signal.SIGTERM, reached.is_set), pytest.raises(Interrupted):
            finish(torture.spec(), tmp_path / "run", stop)
    assert [stage.name for stage in RunFolder(tmp_path / "run").stages()] == ["00-denoise"]
    assert not list(tmp_path.glob("run/stages/*/metrics.json"))
    finish(torture.spec(), tmp_path / "run")
    assert len(list(tmp_path.glob("run/stages/*/metrics.json"))) == len(torture.spec().stages)


def test_only_a_second_ctrl_c_ends_a_process_at_once_and_not_a_launchers_echo() -> None:
    with StopSignal() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(SAME_PRESS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_ctrl_c_twice_ends_a_process_that_another_signal_has_stopped(first: signal.Signals) -> None:
    # If nohup started the suite, SIGHUP would remain ignored.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            signal.raise_signal(first)
            time.sleep(SAME_PRESS + 0.1)
            # The first Ctrl-C alone must not end a process that is saving its state.
            signal.raise_signal(signal.SIGINT)
            time.sleep(SAME_PRESS + 0.1)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            assert stop.number == first
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_interruptible_block_is_left_once_and_only_from_inside() -> None:
    with StopSignal() as stop:
        with pytest.raises(Interrupted), at_once(stop):
            signal.raise_signal(signal.SIGTERM)
        # A signal arrives before, and another one after.
        with pytest.raises(Interrupted), at_once(stop):
            raise AssertionError("entered")
        signal.raise_signal(signal.SIGTERM)
    with at_once(None):
        pass


def test_an_interrupted_import_leaves_no_partial_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_imported.py").write_text("import signal\nsignal.raise_signal(signal.SIGTERM)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with StopSignal() as stop, pytest.raises(Interrupted), at_once(stop):  # noqa: PT012
        import half_imported  # type: ignore[import-not-found]

        assert half_imported.whole
        reached = True
    assert reached


# ------------------------------------------------------------------------------------------------------------ disks


@pytest.mark.parametrize("how", ["moved away", "unmounted"])
def test_a_vanished_folder_is_not_recreated_and_the_message_gives_the_last_good_checkpoint(
    tmp_path: Path, uncut: Path, how: str
) -> None:
    disk, away = tmp_path / "disk", tmp_path / "away"
    disk.mkdir()
    if how == "unmounted" and not mount(disk, "16m"):
        pytest.skip("mounting a tmpfs needs root")
    path = disk / "run"
    spec = toy_spec(log_every=1)
    with pytest.raises(NoStorage) as error:  # noqa: PT012 (the folder goes in the middle of the run)
        for event in run(spec, path):
            if isinstance(event, Progress) and (event.name, event.window.update) == ("01-halve-0002", 8):
                # A checkpoint that is still being written would disappear from the copy under its temporary name.
                for _ in range(3000):
                    if not list(path.glob("stages/*/.*.tmp")):
                        break
                    time.sleep(0.01)
                # The mount returns with its old contents.
                shutil.copytree(path, away) if how == "unmounted" else path.rename(away)
                if how == "unmounted":
                    unmount(disk)
    assert "disk/run can no longer be written or read" in str(error.value.strerror)
    assert re.search(
        r"the last good checkpoint is .*/01-halve-0002/checkpoint-0000000[36]; restore it", str(error.value)
    )
    assert "\n" not in str(error.value)
    assert not list(disk.iterdir()), "folders were created at the old mount point"
    away.rename(path)
    finish(spec, path)
    assert weights(path) == weights(uncut)


def test_a_folder_that_vanishes_during_a_measurement_is_not_recreated(tmp_path: Path) -> None:
    path, away = tmp_path / "disk" / "run", tmp_path / "away"
    spec = toy_spec(evaluation=Evaluation(num_samples=64, num_compared=4, num_shown=4))
    with pytest.raises(NoStorage, match="disk/run can no longer be") as error:  # noqa: PT012 (it goes in the middle)
        for event in run(spec, path):
            if isinstance(event, Measuring) and event.name == "01-halve-0002":
                path.rename(away)
    assert exit_code(error.value) == 3
    assert not path.exists()
    away.rename(path)
    finish(spec, path)


@pytest.mark.parametrize("part", ["first", "second"])
def test_a_folder_that_vanishes_during_a_checkpoint_is_not_recreated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    folder = RunFolder(tmp_path / "disk" / "run").stage("00-denoise")
    folder.path.mkdir(parents=True)

    def writes(path: Path, tensors: dict[str, torch.Tensor]) -> str:
        if path.stem == part:
            (tmp_path / "disk" / "run").rename(tmp_path / "away")
        return write_tensors(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", writes)
    state = {name: {"x": torch.ones(2)} for name in ("first", "second")}
    with pytest.raises(OSError, match="No such file") as error:
        checkpoint.write_checkpoint(state, {"update": 3}, folder)
    assert isinstance(no_storage(error.value, tmp_path / "disk" / "run", None), NoStorage)
    assert not list((tmp_path / "disk").iterdir())


def test_only_an_error_of_the_connection_is_one_of_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert is_lost(RuntimeError("[enforce fail] gloo: Connection closed by peer [127.0.0.1]:2000"))
    # Our messages contain the run's folder, whatever its name.
    assert not is_lost(NonFinite("the loss was not finite ...; the last good checkpoint is /runs/nccl-test/stages"))
    assert not is_lost(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_disk_error_is_distinguished_from_errors_of_other_files() -> None:
    run_path, last = Path("runs/x"), Path("runs/x/stages/00-denoise/checkpoint-00000003")
    for number in (errno.EIO, errno.ESTALE, errno.ENOTCONN):
        said = no_storage(OSError(number, os.strerror(number)), run_path, last)
        assert isinstance(said, NoStorage)
        assert exit_code(said) == exit_code(OSError(number, "")) == 3
        assert f"the last good checkpoint is {last}" in str(said.strerror)
    within = no_storage(OSError(errno.EACCES, "Permission denied", "runs/x/log.jsonl"), run_path, Path("runs/x/00-a"))
    assert "the last complete stage is runs/x/00-a" in str(within.strerror)
    missing = FileNotFoundError(errno.ENOENT, "No such file", "photos/1.png")
    assert no_storage(missing, run_path, None) is missing


def test_a_disk_error_is_one_of_the_run_folder_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    monkeypatch.chdir(tmp_path)
    error = OSError(errno.EROFS, "Read-only file system", str(tmp_path / "scratch" / "run" / ".store.lock"))
    for run_path in (Path("scratch/run"), Path("link/run"), tmp_path / "link" / "run"):
        assert isinstance(no_storage(error, run_path, None), NoStorage)
    assert no_storage(error, Path("link/other"), None) is error
    # Without a working folder, a relative path still names the run.
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    error = OSError(errno.ENOENT, "No such file or directory", "runs/x/log.jsonl")
    assert isinstance(no_storage(error, Path("runs/x"), None), NoStorage)
    assert no_storage(error, Path("runs/y"), None) is error


@pytest.mark.parametrize(
    ("spoilt", "kept"),
    [
        ("checkpoint-00000012.*/.optimizer", ["checkpoint-00000009", "checkpoint-00000006"]),
        # The checkpoints of a complete stage are deleted after its weights have been read back, not before.
        ("00-denoise/.model", ["checkpoint-00000039", "checkpoint-00000036"]),
    ],
    ids=["checkpoint", "stage"],
)
def test_checkpoints_are_pruned_only_after_what_replaces_them_was_read_back(
    tmp_path: Path, uncut: Path, monkeypatch: pytest.MonkeyPatch, spoilt: str, kept: list[str]
) -> None:
    path, written = tmp_path / "run", tensor_files.save_file
    stage = RunFolder(path).stage("00-denoise")

    def unsound(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
        written(tensors, file)
        if re.search(spoilt, str(file)):
            content = bytearray(file.read_bytes())
            content[-3] ^= 1
            file.write_bytes(content)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "save_file", unsound)
        with pytest.raises(DamagedFile, match=rf"{spoilt}.safetensors.* was written, but .* check the disk"):
            finish(toy_spec(), path)
    assert [held.name for held in stage.checkpoints()] == kept
    assert not stage.is_complete()
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_the_latest_checkpoints_are_kept_when_their_names_become_longer(tmp_path: Path) -> None:
    folder = StageFolder(tmp_path / "stage")
    folder.path.mkdir()
    updates = (99_995_000, 100_000_000, 100_005_000)
    written = [checkpoints.write_checkpoint({"student": {}}, {"update": update}, folder) for update in updates]
    assert folder.checkpoints() == [written[2], written[1]]


def test_a_checkpoint_contains_the_state_at_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, go_on, written = trainer(Denoising()), threading.Event(), checkpoints.write_checkpoint

    def late(*arguments: Any) -> Path:
        assert go_on.wait(30)
        return written(*arguments)

    monkeypatch.setattr(checkpoints, "write_checkpoint", late)
    folder = StageFolder(tmp_path / "stage")
    writer = checkpoints.CheckpointWriter(folder, "run", made.processes)
    updates = made.run()
    for _ in range(5):
        next(updates)
    expected = {part: {k: v.clone() for k, v in held.items()} for part, held in made.state().items()}
    writer.save(made)
    # Training continues while the checkpoint is being written.
    for _ in range(5):
        next(updates)
    writer.check()
    assert writer.last is None
    go_on.set()
    writer.wait()
    assert writer.last == folder.path / "checkpoint-00000005"
    again = trainer(Denoising())
    checkpoints.resume(again, folder, "run", print)
    writer.close()
    for part, held in expected.items():
        assert all(torch.equal(again.state()[part][name], value) for name, value in held.items())


def test_the_remedy_for_a_damaged_stage_is_one(tmp_path: Path, uncut: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(uncut, path)
    stage = RunFolder(path).stage("01-halve-0002")
    stage.model.write_bytes(stage.model.read_bytes()[:-5])
    with pytest.raises(DamagedFile, match=r"restore it from a copy, or remove .*/01-halve-0002 and the stages after"):
        finish(toy_spec(), path)
    for folder in (stage, RunFolder(path).stage("02-halve-0001")):
        shutil.rmtree(folder.path)
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)


def test_if_all_checkpoints_are_damaged_the_stage_restarts_with_a_notice(tmp_path: Path, uncut: Path) -> None:
    path = tmp_path / "run"
    events = run(toy_spec(log_every=1), path)
    next(e for e in events if isinstance(e, Progress) and e.window.update == 14)
    events.close()  # type: ignore[attr-defined]
    for held in RunFolder(path).stage("00-denoise").checkpoints():
        (held / "student.safetensors").write_bytes(b"")
    told = finish(toy_spec(), path)
    assert len(told) == 2
    assert told[0].endswith("using the previous checkpoint")
    assert told[1].endswith("no other checkpoint exists, so the stage restarts")
    assert weights(path) == weights(uncut)


def test_leftovers_of_a_killed_writer_are_removed_and_block_no_run(tmp_path: Path, uncut: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    # Killed while writing its recipe.
    (path / ".recipe.json.4711.tmp").write_text("{")
    (path / ".lock").touch()
    events = run(toy_spec(log_every=1), path)
    next(e for e in events if isinstance(e, Progress) and e.window.update == 8)
    events.close()  # type: ignore[attr-defined]
    stage = RunFolder(path).stage("00-denoise").path
    (stage / ".checkpoint-00000009.4711.tmp").mkdir()
    (stage / ".checkpoint-00000009.4711.tmp" / "student.safetensors").write_bytes(b"half")
    (stage / ".model.safetensors.tmp").write_bytes(b"half")
    (path / ".log.jsonl.4711.tmp").write_bytes(b"half")
    finish(toy_spec(), path)
    assert weights(path) == weights(uncut)
    assert not list(path.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NonFinite("it diverged"), 1),
        (OutOfMemory("it does not fit"), 1),
        (ValueError("that is not a recipe"), 2),
        (NoStorage(errno.ENOSPC, "no space left"), 3),
        (Interrupted(signal.SIGINT), 130),
        (Interrupted(signal.SIGUSR1), 138),
        (Interrupted(signal.SIGTERM), 143),
    ],
)
def test_a_scheduler_can_tell_by_the_exit_code_whether_to_run_the_job_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def failing(argv: object) -> None:
        raise error

    monkeypatch.setattr(training, "run", failing)
    with pytest.raises(SystemExit) as end:
        main(["run", "digits"])
    assert end.value.code == code
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_takes_a_code_for_its_scheduler_and_goes_on_with_other_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "toy.npy", points().numpy())
    out = tmp_path / "run"
    long = [*TINY_ARRAYS, "--teacher.num-updates", "1000000", "--engine.micro-batch", "auto", "--engine.log-every", "1"]
    words = ["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(out), *long]
    cases = (
        (signal.SIGUSR1, ["--engine.requeue-code", "85"], 85),
        (signal.SIGTERM, ["--engine.requeue-code", "85"], 85),
        (signal.SIGTERM, [], 143),
        (signal.SIGINT, ["--engine.requeue-code", "85"], 130),
    )
    updates = 0
    for number, extra, code in cases:
        rows = len(read_log(RunFolder(out).log_path))
        with _sent(number, lambda: len(read_log(RunFolder(out).log_path)) > rows + 3), pytest.raises(SystemExit) as end:  # noqa: B023
            main([*words, *extra])
        assert end.value.code == code
        assert "the state is saved. Run the same command again" in capsys.readouterr().err
        latest = int(RunFolder(out).stage("00-denoise").checkpoints()[0].name.rpartition("-")[2])
        assert latest > updates
        updates = latest
