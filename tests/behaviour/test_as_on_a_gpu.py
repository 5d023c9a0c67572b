"""What differs on a GPU: layouts that change with the device, marks of accelerate, memory and several devices.

These tests imitate it on the CPU.
"""

import gc
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import halfstep
from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.prediction import Denoised
from halfstep.data.base import Batch, MemoryData, held_on
from halfstep.runtime.failures import OutOfMemory, told_when_out_of_memory
from halfstep.runtime.processes import is_lost, make_accelerator
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine
from toys import toy_plan, tuned


class Relaid(nn.Module):
    """A network whose weights change their layout whenever they are moved, like those of a U-Net on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.moves = 0

    def _apply(self, fn: Any, recurse: bool = True) -> "Relaid":
        super()._apply(fn, recurse)
        self.moves += 1
        self.conv.weight.data = self.conv.weight.data.clone().contiguous(memory_format=torch.channels_last)
        return self

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.conv(x_t) * time[:, None, None, None]
        return found


def _trainer(network: nn.Module, optimizer: Any = "adamw", updates: int = 6) -> StageTrainer:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(8, 4, 4, 4, generator=generator)
    return StageTrainer(
        halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V()),
        None,
        tuned(toy_plan(dropout=0.0).stages[0], num_updates=updates, batch_size=8, learning_rate=1e-2, ema_decay=0.5),
        lambda draw: Batch(x0[: len(draw.places)], {}),
        (4, 4, 4),
        seed=0,
        stream="00-denoise",
        accelerator=make_accelerator(cpu=True),
        engine=Engine(optimizer=optimizer),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_the_average_follows_weights_whose_layout_changes(optimizer: str) -> None:
    if optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        pytest.skip("needs the package bitsandbytes")
    trainer = _trainer(Relaid(), optimizer)
    start = trainer.student.network.conv.weight.detach().clone()
    list(trainer.run())
    trained = trainer.student.network.conv.weight.detach().clone()
    average = trainer.finish().network.conv.weight.detach()
    assert float((trained - start).detach().norm()) > 0.1
    assert float((average - trained).norm()) < 0.5 * float((trained - start).norm())


def test_a_network_that_an_earlier_call_has_marked_is_moved() -> None:
    """A copy of a trained network has accelerate's mark, which would keep it on its old device."""
    network = Relaid()
    network._is_accelerate_prepared = True  # type: ignore[assignment]
    _trainer(network)
    assert network.moves >= 1


def test_a_new_stage_starts_without_the_memory_of_the_previous_one() -> None:
    """Reference cycles in a trainer would otherwise keep its moments and averages."""
    gc.collect()
    gc.disable()
    try:
        trainer = _trainer(Relaid())
        list(trainer.run())
        held = weakref.ref(trainer.student)
        del trainer
        _trainer(Relaid())
        assert held() is None
    finally:
        gc.enable()


class Elsewhere(Denoiser):
    """A denoiser on a device without storage, which records where it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.process = halfstep.VPCosine()
        self.weight = nn.Parameter(torch.empty(1, device="meta"))
        self.seen: list[str] = []

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        self.seen += [str(x_t.device), *(str(value.device) for value in (cond or {}).values())]
        raise KeyboardInterrupt


def test_sampling_moves_noise_and_conditions_to_the_model() -> None:
    model = Elsewhere()
    with pytest.raises(KeyboardInterrupt):
        halfstep.sample(model, torch.randn(2, 3), 2, cond={"a": torch.zeros(2)})
    assert model.seen == ["meta", "meta"]
    with pytest.raises(ValueError, match="the noise must be"):
        halfstep.sample(model, [1.0], 2)  # type: ignore[arg-type]


class Small(Denoiser):
    """An exact denoiser that runs out of memory with more than four samples."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__()
        self.inner = halfstep.GaussianDenoiser(halfstep.VPCosine(), torch.tensor([0.5, -0.5]), torch.tensor(0.3))
        self.process, self.shape = self.inner.process, (2,)
        self.message, self.largest = message, 4

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        if len(x_t) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory") if self.message is None else RuntimeError(self.message)
        return self.inner(x_t, t, cond)


@pytest.mark.parametrize("message", [None, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"])
def test_own_samples_are_drawn_in_batches_that_fit(message: str | None) -> None:
    small, large = Small(message), Small()
    large.largest = 100
    found, expected = (halfstep.samples_of(model, 11, num_steps=2) for model in (small, large))
    assert torch.equal(found.x, expected.x)


def test_conditions_count_for_the_memory_of_data_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    data = MemoryData("x", torch.zeros(4, 2), conditions={"text": torch.zeros(4, 1000)})
    moved: list[object] = []
    monkeypatch.setattr(MemoryData, "to", lambda self, device: moved.append(device) or self)
    for total, count in ((8 * 16_032, 1), (8 * 16_000, 0)):
        moved.clear()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, n=total: SimpleNamespace(total_memory=n))
        assert held_on(torch.device("cuda"), data) is data
        assert len(moved) == count


def test_an_error_of_this_process_is_not_a_lost_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    assert is_lost(RuntimeError("NCCL error: remote process exited or there was a network error"))
    assert not is_lost(RuntimeError("NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1"))
    assert not is_lost(RuntimeError("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)"))


def test_the_error_about_memory_does_not_hold_memory() -> None:
    def work() -> Iterator[None]:
        with told_when_out_of_memory("smaller batches"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with pytest.raises(OutOfMemory, match="smaller batches") as caught:
        list(work())
    first = caught.value.__context__
    assert isinstance(first, torch.OutOfMemoryError)
    assert first.__traceback__ is None
