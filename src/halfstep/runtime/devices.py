"""Checks the device that the user selects."""

import torch


def existing_device(device: str | torch.device) -> torch.device:
    """Return the torch device with this name.

    Raises:
        ValueError: if torch has no device with this name, this machine has no such device, or the device does not store
            values.
    """
    here = "cpu"
    if torch.accelerator.is_available():
        kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
        here = ", ".join(["cpu", *(f"{kind}:{index}" for index in range(count))])
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError):
        raise ValueError(f"the device {str(device)!r} does not exist here. Choose one of {here}") from None
    if found.type == "meta":
        raise ValueError(f"the device 'meta' stores no values. Choose one of {here}")
    return found
