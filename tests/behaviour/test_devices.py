"""The device that is used by default, on machines that this one imitates."""

import pytest
import torch

import halfstep
from halfstep.cli.arguments import device_of
from halfstep.runtime import devices
from halfstep.runtime.processes import make_accelerator


@pytest.fixture
def on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and accelerate find an Apple GPU, which has no float64."""
    made = torch.empty, torch.zeros

    def empty(*size: int, device: object = None, **options: object) -> torch.Tensor:
        return made[0](*size, device="cpu" if str(device) == "mps" else device, **options)  # type: ignore[call-overload,no-any-return]

    def zeros(*size: int, device: object = None, **options: object) -> torch.Tensor:
        if str(device) == "mps" and options.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made[1](*size, device="cpu" if str(device) == "mps" else device, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "zeros", zeros)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("mps"))
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_: True)


@pytest.mark.usefixtures("on_a_mac")
def test_an_accelerator_without_float64_is_not_used() -> None:
    assert devices.default_accelerator() is None
    assert make_accelerator().device.type == "cpu"
    assert device_of(None).type == "cpu"


@pytest.mark.usefixtures("on_a_mac")
@pytest.mark.parametrize("load", [devices.existing_device, lambda name: halfstep.load("fashion", device=name)])
def test_a_device_without_float64_is_refused_by_name(load: object) -> None:
    with pytest.raises(ValueError, match=r"'mps' has no float64.*Choose one of cpu$"):
        load("mps")  # type: ignore[operator]


def test_an_accelerator_with_float64_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_: torch.device("cpu"))
    assert devices.default_accelerator() == torch.device("cpu")
