"""Feature extractors: from samples `[n, *dims]` on the data's own scale to features `[n, d]`.

Distances in different features are never comparable, so an extractor has a name that goes into every protocol. It is
asked for as `NAME` or `NAME=PATH`, PATH being its weights: see `extractors`.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.registry import Registry


class FeatureExtractor(ABC):
    """Samples in, features out."""

    name: str
    """Its name in a protocol; equal names mean comparable features."""
    facts: Mapping[str, Any]
    """Further facts for a protocol, JSON-ready: where its weights came from, how good it is."""
    resize: str
    """How samples are brought to its size, in words; "none" if they are not."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Features float32 `[n, d]` of `samples` `[n, *dims]`, on the CPU, without gradient.

        Raises:
            ValueError: if it takes images only, and these are none.
        """

    def logits(self, features: Tensor) -> Tensor | None:
        """Logits `[n, classes]` of `features`; None, the default, for an extractor without classes."""
        return None


class NetworkFeatures(FeatureExtractor):
    """Features of a published network, with a hash of its weights in the name `KIND-HASH`."""

    batch_size: ClassVar[int]

    def __init__(self, kind: str, network: Any, device: torch.device | str) -> None:
        self.network = network.eval().to(device)
        self.device = device
        sha256 = digest_of(network)
        self.name = f"{kind}-{sha256[:12]}"
        self.facts = {"weights_sha256": sha256}

    @abstractmethod
    def batch_features(self, samples: Tensor) -> Tensor:
        """Features `[n, d]` of one batch, both on `device`."""

    @final
    def features(self, samples: Tensor) -> Tensor:
        return in_batches(self.batch_features, samples, self.device, self.batch_size)


@final
@dataclass(frozen=True)
class RealData:
    """The real data that an extractor is made for."""

    fingerprint: str
    num_classes: int
    labelled: Callable[[], tuple[Tensor, Tensor]]
    """Return real samples `[n, *dims]` and their classes int64 `[n]`, for extractors that are trained on them."""
    cache: Path | None = None
    """Folder for weights that can be trained again."""
    device: torch.device | str = "cpu"
    """Where its network runs."""


extractors: Registry[Callable[[str | None, RealData], FeatureExtractor]] = Registry("feature extractor")
"""From the weights' path, None if none is given, and the real data to an extractor."""


def extractor_for(asked: str, measured: RealData) -> FeatureExtractor:
    """Return the extractor `asked`, NAME or NAME=PATH.

    Raises:
        ValueError: if it is unknown, its weights are missing or damaged, or the data lack what it needs.
    """
    name, _, path = asked.partition("=")
    return extractors[name](path or None, measured)


def refuse_path(name: str, path: str | None) -> None:
    """Raise ValueError if a path of weights was given to an extractor without any."""
    if path is not None:
        raise ValueError(f"{name}={path}: the features `{name}` take no file; leave ={path} out")


def in_batches(network: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device | str, size: int) -> Tensor:
    """Run `network` on `samples`, `size` at a time on `device`; return float32 on the CPU."""
    with torch.inference_mode():
        return torch.cat([network(part.to(device)).float().cpu() for part in samples.split(size)])


def digest_of(network: nn.Module) -> str:
    """Return the hexadecimal sha256 of a network's weights, independent of the file that they came from."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


LARGEST: Final = 4096
"""Largest sample size without averaging of pixels: a square matrix of a larger size would not fit into memory."""


@final
class Pixels(FeatureExtractor):
    """The entries themselves. Honest for low-dimensional data, blunt for images.

    Samples of more than `LARGEST` entries must be images `[n, c, h, w]`; areas are averaged to at most 32 x 32 pixels.

    Raises:
        ValueError: at the call, if samples have more entries and are not images.
    """

    def __init__(self) -> None:
        self.name = "pixels"
        self.facts = {}
        self.resize = f"averaged to 32 x 32 if a sample has more than {LARGEST} entries"

    def features(self, samples: Tensor) -> Tensor:
        if samples[0].numel() > LARGEST:
            if samples.ndim != 4:
                raise ValueError(
                    f"samples of shape {list(samples.shape[1:])} have more entries than the {LARGEST} that the "
                    "features `pixels` can compare: take others, or let a run go without by --evaluation.no-enabled"
                )
            sides = (min(32, samples.shape[2]), min(32, samples.shape[3]))
            samples = F.adaptive_avg_pool2d(samples.float(), sides)
        return samples.flatten(1).float()


@extractors.register("pixels")
def pixels(path: str | None, measured: RealData) -> FeatureExtractor:
    """The entries of a sample themselves; needs nothing."""
    refuse_path("pixels", path)
    return Pixels()
