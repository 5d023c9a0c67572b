"""Statistics of a stage's updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final


class PlayerWindow(NamedTuple):
    """Statistics of one player's turns since the last window. The means are NaN if the player had no turn."""

    loss: float
    grad_norm: float
    """Global gradient norm before clipping."""


@final
@dataclass(frozen=True)
class Window:
    """Statistics of the updates since the last window."""

    update: int
    """Number of finished updates."""
    loss: float
    """Mean loss of the student, or NaN if the student had no turn."""
    grad_norm: float
    """Mean global gradient norm of the student before clipping."""
    learning_rate: float
    """Learning rate at the last update."""
    samples_per_second: float
    seconds: float
    """The stage's training time in seconds so far, including all restarts."""
    data_share: float
    """Fraction of the window's time that the slowest rank spent waiting for prepared inputs; 0 if none are prepared."""
    helpers: Mapping[str, PlayerWindow] = field(default_factory=dict)
    """Statistics of the auxiliary networks."""
