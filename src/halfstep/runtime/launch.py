"""The processes that `torchrun` or `accelerate launch` has started, as their environment says; no torch."""

import os
from typing import Final

VARIABLES: Final = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""Environment variables that launchers set, with the least value of each."""


def check_launch() -> None:
    """Raise ValueError if a launcher's variable is not a whole number, or the rank none of the world's."""
    for name, least in VARIABLES.items():
        text = os.environ.get(name, "")
        # Only ASCII digits: torch and accelerate read these variables too.
        is_whole = text.isascii() and text.isdigit() and len(text) < 10
        if text and not (is_whole and int(text) >= least) and not (name == "LOCAL_RANK" and text == "-1"):
            raise ValueError(
                f"the environment variable {name} must be a whole number of at least {least}, got {text!r}. Unset it, "
                "or start halfstep by torchrun or accelerate launch"
            )
    if _number("RANK", 0) >= (world := world_size()) > 1:
        raise ValueError(f"RANK {os.environ['RANK']} must be below WORLD_SIZE {world}. Unset both, or start it again")


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def world_size() -> int:
    """Return the number of processes that a launcher has started; 1 without one."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Return this process's number among them; 0 without a launcher, whatever RANK says."""
    return _number("RANK", 0) if world_size() > 1 else 0
