"""The rule that ends a stage once its loss has stopped falling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, final

from halfstep.core.door import FORBID_EXTRA, check_number, check_whole


@final
@dataclass(frozen=True)
class EarlyEnd:
    """Early stopping of a stage after its loss has stopped falling.

    The mean loss of each window is compared with the lowest mean loss of all earlier windows. If `patience` consecutive
    windows fail to lower this minimum by at least the fraction `min_drop`, the learning rate decays linearly to 0 over
    one more window, and the stage ends. The decay acts like averaging the student's weights; without it, the stage
    would pass on a worse student.

    Raises:
        ValueError: if a count is not a whole number in its range, `min_drop` is not in [0, 1), or another setting is
            changed while `patience` is 0.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = FORBID_EXTRA

    patience: int = 0
    """Number of consecutive windows without progress after which the stage ends; 0 disables early stopping."""
    window: int = 1000
    """Number of updates per window."""
    min_drop: float = 0.01
    """Smallest relative drop in a window's loss that counts as progress."""

    def __post_init__(self) -> None:
        check_whole("early_end.patience", self.patience, 0)
        check_whole("early_end.window", self.window)
        check_number("early_end.min_drop", self.min_drop, below=1)
        if not self.patience:
            for field in fields(self):
                if (value := getattr(self, field.name)) != field.default:
                    raise ValueError(
                        f"early_end.{field.name} {value} has no effect while early_end.patience is 0. Set "
                        "early_end.patience to 1 or more"
                    )

    def has_stopped_falling(self, losses: Sequence[float]) -> bool:
        """Return whether the last `patience` windows made no progress, given the mean losses of all windows so far."""
        lowest, idle = math.inf, 0
        for loss in losses:
            if loss < lowest * (1 - self.min_drop) or lowest == math.inf:
                lowest, idle = loss, 0
            else:
                idle += 1
        return 0 < self.patience <= idle
