"""Selects and checks devices.

Clocks and schedules are computed in float64, which Apple's GPUs lack. Such a device is therefore never used.
"""

import torch


def default_accelerator() -> torch.device | None:
    """Return torch's accelerator, such as `cuda`, or None if there is none or it has no float64."""
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return found if found is not None and has_float64(found) else None


def has_float64(device: torch.device) -> bool:
    """Return whether an existing device supports float64."""
    try:
        torch.zeros(1, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):
        return False
    return True


def existing_device(device: str | torch.device) -> torch.device:
    """Return the torch device with this name.

    Raises:
        ValueError: if torch has no device with this name, this machine has no such device, or the device has no float64
            or does not store values.
    """
    here = "cpu"
    if (kind := default_accelerator()) is not None:
        here = ", ".join(["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))])
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ValueError(f"the device {str(device)!r} does not exist here. Choose one of {here}") from None
    if found.type == "meta":
        raise ValueError(f"the device 'meta' stores no values. Choose one of {here}")
    if not has_float64(found):
        raise ValueError(
            f"the device {str(device)!r} has no float64, which clocks and schedules require. Choose one of {here}"
        )
    return found
