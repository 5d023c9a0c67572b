"""Reads how this process was started: its rank and world size, from the environment variables of `torchrun` or
`accelerate launch`, and its command line.

This module does not import torch.
"""

import contextlib
import os
import shlex
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Final

VARIABLES: Final = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
"""The environment variables that launchers set, with the minimum value of each variable."""

_COMMAND: ContextVar[str | None] = ContextVar("command", default=None)


@contextlib.contextmanager
def recorded_command(argv: Sequence[str]) -> Iterator[None]:
    """Let `command` return the command `halfstep` with these arguments while the block runs."""
    before = _COMMAND.set(shlex.join(["halfstep", *argv]))
    try:
        yield
    finally:
        _COMMAND.reset(before)


def command() -> str | None:
    """Return the `halfstep` command that is being run, quoted for a shell, or None in other Python programs."""
    return _COMMAND.get()


def check_launch() -> None:
    """Raise ValueError if a launcher variable is not a valid integer, or the rank is not below the world size."""
    for name, least in VARIABLES.items():
        text = os.environ.get(name, "")
        # Only ASCII digits are allowed, because torch and accelerate read these variables too.
        is_whole = text.isascii() and text.isdigit() and len(text) < 10
        if text and not (is_whole and int(text) >= least) and not (name == "LOCAL_RANK" and text == "-1"):
            raise ValueError(
                f"the environment variable {name} must be a whole number of at least {least}, got {text!r}. Unset it, "
                "or start halfstep with torchrun or accelerate launch"
            )
    if _number("RANK", 0) >= (world := world_size()) > 1:
        raise ValueError(
            f"RANK {os.environ['RANK']} must be below WORLD_SIZE {world}. Unset both variables, or restart the launcher"
        )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else default


def world_size() -> int:
    """Return the number of processes that the launcher started, or 1 without a launcher."""
    return max(1, _number("WORLD_SIZE", 1))


def rank() -> int:
    """Return the rank of this process, or 0 without a launcher, even if RANK is set."""
    return _number("RANK", 0) if world_size() > 1 else 0
