"""What happens in a run, told to whoever shows it."""

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
    """Updates that a checkpoint brought; 0 for a fresh start."""


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
class Measured(Event):
    name: str
    result: Result


@final
@dataclass(frozen=True)
class Notice(Event):
    text: str
