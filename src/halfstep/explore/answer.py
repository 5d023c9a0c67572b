"""The stages that the explorer offers, and the answers that it returns."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class StageChoice(NamedTuple):
    """A stage that can be sampled, or that is missing for a known reason."""

    name: str
    num_steps: int | None
    """Number of steps that the stage was distilled for, or None if it can be sampled with any number."""
    role: str | None
    """The role: teacher, matched or student, or None if it is unknown."""
    missing: str | None = None
    """The reason why the stage cannot be sampled, or None if it can be."""

    @property
    def words(self) -> str:
        """A description such as "4-step student", which may not be unique, or the name if the role is unknown."""
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
    """Number of network calls per sample."""
    sampler: str
    seconds: float
    """Wall time of the sampling alone, in seconds."""
    samples: np.ndarray
    """The samples: uint8 `[n, h, w, c]` for images, and float32 `[n, *dims]` otherwise."""


class Answer(NamedTuple):
    """The samples for a request, and notes about the samples."""

    shown: Sequence[Shown]
    notes: Sequence[str]
