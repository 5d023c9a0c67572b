"""The teacher at its best, with which the quality of every student is compared."""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from halfstep.runs.schema import Result

BEST_OF: Final = ("ddim", "heun")
"""The teacher's samplers among which its best is looked for: a student follows the same deterministic trajectories."""


class Best(NamedTuple):
    """The teacher where its Frechet distance is smallest."""

    sampler: str
    num_steps: int
    num_evals: int
    """Network calls for a sample."""
    frechet: float
    seconds_per_1000: float | None = None
    coverage: float | None = None
    """Share of the real data with a sample in their neighbourhood."""

    @classmethod
    def of(cls, result: Result) -> "Best":
        """Return the part of a row of metrics.json that is compared."""
        return cls(
            result.sampler, result.num_steps, result.num_evals, result.frechet, result.seconds_per_1000, result.coverage
        )

    def ratio(self, frechet: float) -> float | None:
        """Return a Frechet distance of the same protocol over the teacher's; None if that is undefined."""
        return frechet / self.frechet if math.isfinite(frechet) and self.frechet > 0 else None


def teacher_best(cells: Iterable[Best]) -> Best | None:
    """Return the teacher's cell of DDIM or Heun with the smallest finite distance, at equal ones that of fewest calls.

    Args:
        cells: the undistilled teacher's, all of one protocol.
    """
    comparable = [cell for cell in cells if cell.sampler in BEST_OF and math.isfinite(cell.frechet)]
    return min(comparable, key=lambda cell: (cell.frechet, cell.num_evals), default=None)
