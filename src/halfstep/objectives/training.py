"""Hyperparameters of one optimiser: the only place that declares them.

Stages, helpers, recipes, the Python API and the command line all take a `Training`; its docstrings are the help texts
of the flags.

Source of the defaults: Salimans & Ho 2022 (arXiv:2202.00512), section 5.2 and appendix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, final

FORBID_EXTRA = {"extra": "forbid"}
"""What pydantic reads off a dataclass that is a field of a recipe: unknown names are an error."""


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Raise unless `value` is a whole number of at least `least`.

    Raises:
        ValueError: naming the setting.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@final
@dataclass(frozen=True)
class EarlyEnd:
    """The rule by which a stage ends before its budget: its loss has stopped falling.

    The mean loss of each `window` updates is compared with the lowest of all windows before it. When `patience` windows
    in a row were not lower than that by the share `min_drop`, the stage's rate is multiplied by a factor that falls
    linearly from 1 to 0 over one more window, and the stage ends. (The rate's fall to 0 is what averages a student's
    weights, so a stage that merely stopped would hand on a worse student.)

    Raises:
        ValueError: if a count is not a whole number in its range, the share is not in [0, 1), or the rule is changed
            without a patience.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    patience: int = 0
    """Windows in a row without progress that end a stage; 0 disables."""
    window: int = 1000
    """Updates of a window."""
    min_drop: float = 0.01
    """Share by which a window's loss must drop to count as progress."""

    def __post_init__(self) -> None:
        check_whole("early_end.patience", self.patience, 0)
        check_whole("early_end.window", self.window)
        if not 0 <= self.min_drop < 1:
            raise ValueError(f"early_end.min_drop must be in [0, 1), got {self.min_drop}")
        if not self.patience:
            for field in fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise ValueError(f"early_end.{field.name} {value} has no effect without early_end.patience. Add it")

    def has_stopped_falling(self, losses: Sequence[float]) -> bool:
        """Return whether the mean losses of the windows so far end in `patience` windows without progress."""
        lowest, idle = math.inf, 0
        for loss in losses:
            if loss < lowest * (1 - self.min_drop) or lowest == math.inf:
                lowest, idle = loss, 0
            else:
                idle += 1
        return 0 < self.patience <= idle


@final
@dataclass(frozen=True)
class Training:
    """Hyperparameters of AdamW for one network over one stage.

    Raises:
        ValueError: if one is out of range.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    num_updates: int
    """Optimiser updates of a stage."""
    learning_rate: float
    """Peak learning rate of AdamW."""
    batch_size: int = 128
    """Samples of an update, over all processes."""
    warmup_updates: int = 0
    """Updates over which the rate rises from 0 to its peak."""
    anneal: bool = True
    """Let the rate fall linearly to 0 over the stage."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decays."""
    grad_clip: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float = 0.0
    """Decay of the moving average that the stage hands on; 0 hands on the weights."""
    dropout: float = 0.0
    """Dropout probability while training."""
    early_end: EarlyEnd = EarlyEnd()
    """When a stage may end before its budget."""

    def __post_init__(self) -> None:
        for name in ("num_updates", "batch_size", "learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        for name in ("num_updates", "batch_size", "warmup_updates"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name} must be a whole number, got {getattr(self, name)!r}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and at least 0, got {self.weight_decay}")
        for beta in self.adam_betas:
            if not 0 <= beta < 1:
                raise ValueError(f"adam_betas must be in [0, 1), got {self.adam_betas}")
        for name in ("ema_decay", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.warmup_updates <= self.num_updates:
            raise ValueError(
                f"warmup_updates must be from 0 to num_updates = {self.num_updates}, got {self.warmup_updates}"
            )

    def rate_at(self, update: int) -> float:
        """Return the rate of update `update` (from 0): linear warm-up, then constant or linear to 0 after the last."""
        rate = self.learning_rate
        if self.anneal:
            rate *= 1 - update / self.num_updates
        if update < self.warmup_updates:
            rate *= (update + 1) / self.warmup_updates
        return rate
