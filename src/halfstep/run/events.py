"""The events of a run, which are used to display its progress."""

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
    """The update of the checkpoint from which the stage resumed, or 0 if the stage started from scratch."""
    seconds: float
    """The training time of the stage up to this update, in seconds."""
    complete: tuple[str, ...] = ()
    """The names of later stages that are already complete, for example because only this stage was removed."""


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
    """The start of a stage's next measurement."""

    name: str
    what: str
    """A description of the measurement, such as "8 steps of ddim"."""
    number: int
    """The number of the measurement, starting at 1, or 0 for the features of the real data."""
    total: int


@final
@dataclass(frozen=True)
class Measured(Event):
    name: str
    result: Result
    num_left: int = 0
    """The number of the stage's results that are still to be measured."""
    seconds: float = 0.0
    """The wall time spent on sampling and measuring the stage so far."""
    too_few: bool = False
    """Whether there are too few samples for a reliable Frechet distance."""


@final
@dataclass(frozen=True)
class Notice(Event):
    text: str
