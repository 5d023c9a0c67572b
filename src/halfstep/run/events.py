"""Events of a run, for displaying its progress."""

from dataclasses import dataclass
from typing import final

from halfstep.objectives import Stage
from halfstep.runs.schema import Result
from halfstep.train.window import Window


class Event:
    """Something that happened in a run."""


@final
@dataclass(frozen=True)
class StageStart(Event):
    name: str
    index: int
    stage: Stage
    resumed_at: int
    """Update of the checkpoint that the stage resumed from; 0 for a fresh start."""
    seconds: float
    """Training time of the stage up to that update."""


@final
@dataclass(frozen=True)
class Progress(Event):
    name: str
    num_updates: int
    window: Window


@final
@dataclass(frozen=True)
class StageEnd(Event):
    name: str
    seconds: float
    was_there: bool
    """Whether the stage was complete before this call."""


@final
@dataclass(frozen=True)
class Measuring(Event):
    """The next measurement of a stage has begun."""

    name: str
    what: str
    """The samples or the comparison in progress, in words."""
    number: int
    """Counted from 1; 0 for the real data, before the first."""
    total: int


@final
@dataclass(frozen=True)
class Measured(Event):
    name: str
    result: Result
    num_left: int = 0
    """Further results of the stage."""
    seconds: float = 0.0
    """Wall time of sampling and measuring since the first result."""
    too_few: bool = False
    """Whether the samples are too few for a reliable Frechet distance."""


@final
@dataclass(frozen=True)
class Notice(Event):
    text: str
