"""The training samples nearest to a model's samples, which show whether the model has memorised its training data.

A distance is the root mean square difference over all values, on the scale of x0 ([-1, 1] for images), so a copy has
distance 0. For comparison, `real` contains the distances from training samples to the nearest other training sample.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from halfstep.core.draw import generator_for
from halfstep.data import Data

MOST_VALUES = 200_000_000
"""The maximum number of training values to search. In larger data sets, only a fixed random subset is searched."""
NUM_REAL = 256
"""The maximum number of training samples for which `real` contains a distance."""
CHUNK = 16_000_000
"""The number of training values to load at a time."""


@final
@dataclass(frozen=True, eq=False)
class Neighbours:
    """The training samples nearest to each of n samples."""

    rows: Tensor
    """The indices of these training samples in the data, int64 `[n, k]`, nearest first."""
    x0: Tensor
    """The training samples, float32 `[n, k, *shape]`. A training sample is mirrored if its mirror image is nearer."""
    distances: Tensor
    """The distances to the training samples, float64 `[n, k]`, in ascending order."""
    real: Tensor
    """Distances, float64 `[m]`, from some training samples to their nearest neighbours; empty for a single sample."""
    num_searched: int
    """The number of training samples that were searched."""


def nearest_samples(data: Data, x0: Tensor, k: int = 3, flip: bool = False) -> Neighbours:
    """Return the k training samples nearest to each sample in `x0` `[n, *shape]`, or all if there are fewer than k.

    Args:
        flip: whether the model was also trained on mirrored images, which are then searched too.

    Raises:
        ValueError: if `x0` is empty, if its samples differ in shape from the data, or if k is less than 1.
    """
    if tuple(x0.shape[1:]) != data.shape or len(x0) == 0:
        raise ValueError(f"samples of shape {list(x0.shape)} cannot be compared with data of shape {list(data.shape)}")
    if k < 1:
        raise ValueError(f"the number of neighbours must be at least 1, got {k}")
    size = x0[0].numel()
    searched = torch.arange(len(data))
    if len(data) > (most := max(1, MOST_VALUES // size)):
        searched = torch.randperm(len(data), generator=generator_for("nearest rows"))[:most].sort().values
    own = searched[torch.randperm(len(searched), generator=generator_for("nearest"))[:NUM_REAL]]
    samples = x0.float()
    # Mirrored samples are searched separately. The 2 rows nearest to a real sample include the sample itself.
    near, mirrored = _Best(samples, k), _Best(samples.flip(-1) if flip else samples[:0], k)
    others = _Best(data.fetch(own).x0, 2)
    for part in searched.split(max(1, CHUNK // size)):
        found = data.fetch(part).x0.flatten(1)
        for one in (near, mirrored, others):
            one.offer(found, part)
    rows, distances, pictures = near.exact(data)
    if flip:
        further_rows, further, further_pictures = mirrored.exact(data)
        rows = torch.cat([rows, further_rows], 1)
        pictures = torch.cat([pictures, further_pictures.flip(-1)], 1)
        distances, order = torch.cat([distances, further], 1).sort(dim=1, stable=True)
        # An image that is found twice, mirrored and unmirrored, counts once, at the smaller distance.
        rows = rows.gather(1, order)
        again = (rows[:, :, None] == rows[:, None, :]).tril(-1).any(2)
        distances, kept = distances.masked_fill(again, torch.inf).sort(dim=1, stable=True)
        kept = kept[:, : min(k, len(searched))]
        distances = distances[:, : kept.shape[1]]
        rows = rows.gather(1, kept)
        pictures = pictures[torch.arange(len(samples))[:, None], order.gather(1, kept)]
    real_rows, real, _ = others.exact(data)
    real = real.masked_fill(real_rows == own[:, None], torch.inf).min(1).values
    return Neighbours(rows, pictures, distances, real[real.isfinite()], len(searched))


class _Best:
    """The k nearest rows found so far for each sample in `query` `[n, *shape]`."""

    def __init__(self, query: Tensor, k: int) -> None:
        self.query, self.k = query, k
        self.squared, self.rows = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.int64)

    def offer(self, found: Tensor, rows: Tensor) -> None:
        """Add the rows `found` `[m, values]`, and keep only the k nearest rows."""
        squared = torch.cat([self.squared, found.square().sum(1) - 2 * self.query.flatten(1) @ found.T], 1)
        rows = torch.cat([self.rows, rows.expand(len(self.query), -1)], 1)
        self.squared, order = squared.topk(min(self.k, squared.shape[1]), largest=False)
        self.rows = rows.gather(1, order)

    def exact(self, data: Data) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rows, distances and samples, nearest first, with distances recomputed in higher precision."""
        found = data.fetch(self.rows.flatten()).x0.view(*self.rows.shape, *data.shape)
        distances = (found.double() - self.query.double()[:, None]).flatten(2).square().mean(2).sqrt()
        distances, order = distances.sort(dim=1, stable=True)
        return self.rows.gather(1, order), distances, found[torch.arange(len(order))[:, None], order]
