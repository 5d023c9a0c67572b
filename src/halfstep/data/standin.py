"""Random samples with the shape of missing data, for dry runs, which only measure the cost of an update."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from halfstep.core.draw import generator_for
from halfstep.data.base import Data, to_batch
from halfstep.objectives.base import Batch


@final
@dataclass(frozen=True, eq=False)
class StandIn(Data):
    """Random images `[*image_shape]` with random labels, or random arrays with all-zero conditions.

    Not intended for training.
    """

    source: str
    image_shape: tuple[int, ...]
    num_samples: int
    class_names: tuple[str, ...] = ()
    conditions: Mapping[str, tuple[int, ...]] | None = None
    """The shape of each condition, keyed by name, or None if the samples are images."""
    fingerprint: ClassVar[str] = "stand-in"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image_shape

    @property
    def is_image(self) -> bool:
        return self.conditions is None

    def __len__(self) -> int:
        return self.num_samples

    def fetch(self, indices: Tensor) -> Batch:
        generator = generator_for("stand-in", indices.tolist())
        size = (len(indices), *self.image_shape)
        if self.conditions is not None:
            # One sample is repeated without copies, because the samples of video models are large.
            cond = {name: torch.zeros(shape).expand(len(indices), *shape) for name, shape in self.conditions.items()}
            return Batch(torch.randn(self.image_shape, generator=generator).expand(size), cond)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        batch = to_batch(pixels, None, indices)
        if self.class_names:
            labels = torch.randint(self.num_classes, (len(indices),), generator=generator)
            batch = Batch(batch.x0, {"class_labels": labels})
        return batch
