"""Statistics of a stage's updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final


class PlayerWindow(NamedTuple):
    """Statistics of one player's turns since the last window; means are NaN if it had no turn."""

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
    """Mean loss of the student; NaN if it had no turn."""
    grad_norm: float
    """Mean global gradient norm of the student before clipping."""
    learning_rate: float
    """Learning rate of the last update."""
    samples_per_second: float
    seconds: float
    """Training time of the stage so far, including all restarts."""
    data_share: float
    """Share of the window's time spent waiting for prepared inputs, on the slowest rank; 0 if nothing is prepared."""
    helpers: Mapping[str, PlayerWindow] = field(default_factory=dict)
    """Statistics of the auxiliary networks."""
