"""The stages that the explorer offers, and its answers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StageChoice(NamedTuple):
    """A stage that can be sampled, or that is missing for some reason."""

    name: str
    num_steps: int | None
    """Steps that it was distilled for; None for any number."""
    role: str | None
    """teacher, matched or student; None if unknown."""
    missing: str | None = None
    """Reason why it cannot be sampled; None if it can."""

    @property
    def words(self) -> str:
        """Description such as "4-step student", which may not be unique; the name if the role is unknown."""
        if self.role is None:
            return self.name
        role = "matched teacher" if self.role == "matched" else self.role
        return role if self.num_steps is None else f"{self.num_steps}-step {role}"


class Shown(NamedTuple):
    """Samples of a model."""

    stage: str
    is_start: bool
    """Whether the model is the start of the chain."""
    label: str
    """Description of the model."""
    num_steps: int
    num_evals: int
    """Network calls per sample."""
    sampler: str
    seconds: float
    """Wall time of sampling alone."""
    samples: np.ndarray
    """uint8 `[n, h, w, c]` for images, float32 `[n, *dims]` otherwise."""


class Answer(NamedTuple):
    """The samples of a request, and notes about them."""

    shown: Sequence[Shown]
    notes: Sequence[str]
