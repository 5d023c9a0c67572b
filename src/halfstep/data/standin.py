"""Random pixels in the shape of data that is not at hand: for a dry run, which asks only what an update costs."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from halfstep.core.draw import generator_for
from halfstep.data.base import Data, to_batch
from halfstep.objectives.base import Batch


@final
@dataclass(frozen=True, eq=False)
class StandIn(Data):
    """`num_samples` random images `[*image_shape]` with random labels; never to be trained on."""

    source: str
    image_shape: tuple[int, ...]
    num_samples: int
    class_names: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.image_shape

    @property
    def is_image(self) -> bool:
        return True

    @property
    def fingerprint(self) -> str:
        return "stand-in"

    def __len__(self) -> int:
        return self.num_samples

    def fetch(self, indices: Tensor) -> Batch:
        generator = generator_for("stand-in", indices.tolist())
        size = (len(indices), *self.image_shape)
        pixels = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
        if not self.class_names:
            return to_batch(pixels, None, indices)
        labels = torch.randint(self.num_classes, (len(indices),), generator=generator)
        return Batch(to_batch(pixels, None, indices).x0, {"class_labels": labels})
