"""How many files a reader has to open to follow one training update, or one sampling call.

The trace records every function of `src` that is called, in the main thread and in the thread that prepares batches,
with `sys.setprofile`. The network is the user's own: one of the library's adds its file.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.train.engine import StageTrainer
from toys import points

ROOT = str(Path(halfstep.__file__).parent)


class Trace:
    """The files of `src` in which a function was called while `entered` was active."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._is_on = False

    def look(self, frame: FrameType, event: str, argument: Any) -> None:
        if self._is_on and event == "call" and frame.f_code.co_filename.startswith(ROOT):
            self.files.add(frame.f_code.co_filename.removeprefix(ROOT))

    @contextmanager
    def entered(self) -> Iterator[None]:
        before, self._is_on = sys.getprofile(), True
        sys.setprofile(self.look)
        try:
            yield
        finally:
            sys.setprofile(before)
            self._is_on = False


class OwnNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        return self.layers(torch.cat([x_t, time[:, None].to(x_t)], dim=1))


def own_teacher() -> halfstep.NetworkDenoiser:
    return halfstep.NetworkDenoiser(OwnNetwork(), halfstep.VPCosine(), halfstep.V())


def files_of_an_update(monkeypatch: pytest.MonkeyPatch, ahead: int = 0, out: Path | None = None) -> set[str]:
    """Return the files entered in the sixth update of a halving stage."""
    trace = Trace()
    plain_run: Callable[..., Iterator[int]] = StageTrainer.run

    def traced_run(trainer: StageTrainer, *args: Any) -> Iterator[int]:
        trainer._feed._ahead = ahead
        threading.setprofile(trace.look)
        updates = plain_run(trainer, *args)
        for _ in range(5):
            yield next(updates)
        threading.setprofile(None)
        with trace.entered():
            update = next(updates)
        yield update
        yield from updates

    monkeypatch.setattr(StageTrainer, "run", traced_run)
    training = halfstep.Training(10, 1e-3, batch_size=8, ema_decay=0.9)
    halfstep.distill(own_teacher(), points(), start=4, to=2, training=training, out=out, device="cpu", progress=False)
    assert {"/train/engine.py", "/objectives/halving.py", "/data/base.py", "/core/draw.py"} <= trace.files
    return trace.files


@pytest.mark.parametrize("ahead", [0, 2])
def test_an_update_of_a_halving_stage_enters_at_most_10_files(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    files = files_of_an_update(monkeypatch, ahead)
    assert len(files) <= 10, sorted(files)


def test_an_update_in_a_run_folder_enters_only_the_handling_of_signals_besides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of_an_update(monkeypatch, out=tmp_path / "run") - {"/runtime/stop.py"}
    assert len(files) <= 10, sorted(files)


def test_a_sampling_call_enters_at_most_8_files() -> None:
    trace, teacher, noise = Trace(), own_teacher(), torch.randn(4, 2)
    halfstep.sample(teacher, noise, 4)
    with trace.entered():
        halfstep.sample(teacher, noise, 4)
    assert {"/samplers/loop.py", "/core/denoiser.py"} <= trace.files
    assert len(trace.files) <= 8, sorted(trace.files)
