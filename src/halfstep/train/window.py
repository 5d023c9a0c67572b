"""Statistics of a stage's updates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final


class PlayerWindow(NamedTuple):
    """Statistics of one player's turns since the last window; the mean of none is NaN."""

    loss: float
    grad_norm: float
    """Global gradient norm before clipping."""


@final
@dataclass(frozen=True)
class Window:
    """Statistics of the updates since the last window."""

    update: int
    """Updates done."""
    loss: float
    """Mean of the student's losses; NaN if it had no turn."""
    grad_norm: float
    """Mean of its global gradient norm before clipping."""
    learning_rate: float
    """Learning rate of the last update."""
    samples_per_second: float
    seconds: float
    """Training time of the stage so far, over all restarts."""
    data_share: float
    """Share of the window's time in which an update waited for what is made ahead of it, on the rank that waited most;
    0 where nothing is made ahead."""
    helpers: Mapping[str, PlayerWindow] = field(default_factory=dict)
    """Figures of the auxiliary networks."""
