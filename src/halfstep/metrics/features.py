"""Feature extractors: from samples `[n, *dims]` on the data's own scale to features `[n, d]`.

Distances in different features are never comparable, so an extractor has a name that goes into every protocol. It is
asked for as `NAME` or `NAME=PATH`, PATH being its weights: see `extractors`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.registry import Registry


class FeatureExtractor(ABC):
    """Samples in, features out."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What a protocol says of it; equal names mean comparable features."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What else a protocol says of it, JSON-ready: where its weights came from, how good it is."""

    @property
    @abstractmethod
    def resize(self) -> str:
        """How samples are brought to its size, in words; "none" if they are not."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Features float32 `[n, d]` of `samples` `[n, *dims]`, on the CPU, without gradient.

        Raises:
            ValueError: if it takes images only, and these are none.
        """

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor | None:
        """Logits `[n, classes]` that belong to `features`, or None for an extractor that knows no classes."""


@final
@dataclass(frozen=True)
class RealData:
    """The real data that an extractor is made for."""

    fingerprint: str
    num_classes: int
    labelled: Callable[[], tuple[Tensor, Tensor]]
    """Real samples `[n, *dims]` and their classes int64 `[n]`; asked for by extractors that are trained on them."""
    cache: Path | None = None
    """Folder for weights that can be made again."""
    device: torch.device | str = "cpu"
    """Where its network runs."""


extractors: Registry[Callable[[str | None, RealData], FeatureExtractor]] = Registry("feature extractor")
"""From the weights' path, None if none is given, and the real data to an extractor."""


def extractor_for(asked: str, measured: RealData) -> FeatureExtractor:
    """The extractor that `asked`, NAME or NAME=PATH, means.

    Raises:
        ValueError: if it is unknown, its weights are missing or damaged, or the data lack what it needs.
    """
    name, _, path = asked.partition("=")
    return extractors[name](path or None, measured)


def refuse_path(name: str, path: str | None) -> None:
    """Passes if no weights were given to an extractor that has none.

    Raises:
        ValueError: otherwise.
    """
    if path is not None:
        raise ValueError(f"{name}={path}: the features `{name}` take no file; leave ={path} out")


def in_batches(network: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device | str, size: int) -> Tensor:
    """What `network` makes of `samples`, `size` of them at a time on `device`; float32 on the CPU."""
    with torch.inference_mode():
        return torch.cat([network(part.to(device)).float().cpu() for part in samples.split(size)])


def digest_of(network: nn.Module) -> str:
    """A sha256 in hexadecimal of a network's weights: equal for equal weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


LARGEST: Final = 4096
"""Entries of a sample beyond which pixels are averaged first."""


@final
class Pixels(FeatureExtractor):
    """The entries themselves. Honest for low-dimensional data, blunt for images.

    Samples of more entries than `LARGEST`, the square matrix of which would not fit a machine, must be images
    `[n, c, h, w]`, and are averaged over areas down to at most 32 x 32 pixels.

    Raises:
        ValueError: at the call, if samples have more entries and are no images.
    """

    @property
    def name(self) -> str:
        return "pixels"

    @property
    def facts(self) -> Mapping[str, Any]:
        return {}

    @property
    def resize(self) -> str:
        return f"averaged to 32 x 32 if a sample has more than {LARGEST} entries"

    def features(self, samples: Tensor) -> Tensor:
        if samples[0].numel() > LARGEST:
            if samples.ndim != 4:
                raise ValueError(
                    f"samples of shape {list(samples.shape[1:])} have more entries than the {LARGEST} that can be "
                    "compared: use --evaluation.no-enabled"
                )
            sides = (min(32, samples.shape[2]), min(32, samples.shape[3]))
            samples = F.adaptive_avg_pool2d(samples.float(), sides)
        return samples.flatten(1).float()

    def logits(self, features: Tensor) -> Tensor | None:
        return None


@extractors.register("pixels")
def pixels(path: str | None, measured: RealData) -> FeatureExtractor:
    """The entries of a sample themselves; needs nothing."""
    refuse_path("pixels", path)
    return Pixels()
