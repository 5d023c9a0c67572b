"""The teacher at its best, which is the reference for the quality of every student."""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from halfstep.runs.schema import Result

BEST_OF: Final = ("ddim", "heun")
"""Samplers that count for the teacher's best result: students follow the same deterministic trajectories."""


class Best(NamedTuple):
    """The teacher's result with the smallest Frechet distance."""

    sampler: str
    num_steps: int
    num_evals: int
    """Network calls per sample."""
    frechet: float
    seconds_per_1000: float | None = None
    coverage: float | None = None
    """Share of the real samples with a generated sample in their neighbourhood."""

    @classmethod
    def of(cls, result: Result) -> "Best":
        """Return the compared fields of a row of metrics.json."""
        return cls(
            result.sampler, result.num_steps, result.num_evals, result.frechet, result.seconds_per_1000, result.coverage
        )

    def ratio(self, frechet: float) -> float | None:
        """Return the ratio of a Frechet distance (same protocol) to the teacher's; None if it is undefined."""
        return frechet / self.frechet if math.isfinite(frechet) and self.frechet > 0 else None


def teacher_best(cells: Iterable[Best]) -> Best | None:
    """Return the teacher's DDIM or Heun cell with the smallest finite distance; ties go to the fewest network calls.

    Args:
        cells: cells of the undistilled teacher, all measured with the same protocol.
    """
    comparable = [cell for cell in cells if cell.sampler in BEST_OF and math.isfinite(cell.frechet)]
    return min(comparable, key=lambda cell: (cell.frechet, cell.num_evals), default=None)
