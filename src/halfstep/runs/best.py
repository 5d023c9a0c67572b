"""The teacher's best result, which is the reference for the quality of every student."""

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from halfstep.runs.schema import Result

BEST_OF: Final = ("ddim", "heun")
"""The samplers that count towards the teacher's best result. They follow the same deterministic paths as students."""


class Best(NamedTuple):
    """One result of a model: the sampler, the number of steps, and the metrics that are compared."""

    sampler: str
    num_steps: int
    num_evals: int
    """The number of network calls per sample."""
    frechet: float
    seconds_per_1000: float | None = None
    coverage: float | None = None
    """The share of real samples that have a generated sample in their neighbourhood."""
    kid: float | None = None
    pace: tuple[str, int] | None = None
    """The device and the number of CPU threads that determined the time, as in `Result.pace`."""

    @classmethod
    def of(cls, result: Result) -> "Best":
        """Return the compared fields of a metrics.json row."""
        return cls(**{name: getattr(result, name) for name in cls._fields})

    def ratio(self, frechet: float) -> float | None:
        """Return the ratio of a Frechet distance to the teacher's, or None if it is undefined.

        Both distances must be measured with the same protocol.
        """
        return frechet / self.frechet if math.isfinite(frechet) and self.frechet > 0 else None


def teacher_best(cells: Iterable[Best], by_kid: bool = False) -> Best | None:
    """Return the teacher's DDIM or Heun cell with the smallest finite distance.

    If several cells have the same distance, return the one with the fewest network calls.

    Args:
        cells: cells of the undistilled teacher, which must all be measured with the same protocol.
        by_kid: whether to compare KID instead of the Frechet distance, which is unreliable for too few samples
            (`too_few`).
    """

    def rank(cell: Best) -> tuple[float, int]:
        value = cell.kid if by_kid else cell.frechet
        return math.inf if value is None else value, cell.num_evals

    comparable = [cell for cell in cells if cell.sampler in BEST_OF and math.isfinite(rank(cell)[0])]
    return min(comparable, key=rank, default=None)


def too_few(num_samples: int, num_reference: int, dimension: int) -> bool:
    """Return whether a covariance is singular because of too few samples, making the Frechet distance unreliable."""
    return min(num_samples, num_reference) <= dimension
