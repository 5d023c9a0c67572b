"""Feature extractors, which map samples `[n, *dims]` at the scale of the data to features `[n, d]`.

Distances in different feature spaces are never comparable, so every protocol contains the extractor's name.
Users select an extractor as `NAME` or `NAME=PATH`, where PATH contains the weights (see `extractors`).
"""

import json
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.registry import Registry
from halfstep.runtime.files import user_path
from halfstep.runtime.tensors import digest_of, read_tensors


class FeatureExtractor(ABC):
    """A map from samples to features."""

    name: str
    """The name used in protocols. Extractors with equal names return comparable features."""
    facts: Mapping[str, Any]
    """Additional facts for a protocol, as JSON values, such as the accuracy or the source of the weights."""
    resize: str
    """A description of how samples are resized, or "none" if they are not resized."""

    @abstractmethod
    def features(self, samples: Tensor) -> Tensor:
        """Return the features of `samples` `[n, *dims]` as float32 `[n, d]`, on the CPU and without gradients.

        Raises:
            ValueError: if the extractor accepts only images, but the samples are not images.
        """

    def logits(self, features: Tensor) -> Tensor | None:
        """Return the logits `[n, classes]` of `features`, or None (the default) if the extractor has no classes."""
        return None


class NetworkFeatures(FeatureExtractor):
    """The features of a published network. The extractor's name is `KIND-HASH`, where HASH is a hash of the weights."""

    batch_size: ClassVar[int]

    def __init__(self, kind: str, network: Any, device: torch.device | str) -> None:
        self.network = network.eval().to(device)
        self.device = device
        sha256 = digest_of(self.network.state_dict())
        self.name = f"{kind}-{sha256[:12]}"
        self.facts = {"weights_sha256": sha256}

    @abstractmethod
    def batch_features(self, samples: Tensor) -> Tensor:
        """Return the features `[n, d]` of a batch. Both tensors are on `device`."""

    @final
    def features(self, samples: Tensor) -> Tensor:
        return in_batches(self.batch_features, samples, self.device, self.batch_size)


@final
@dataclass(frozen=True)
class RealData:
    """The real data that an extractor is created for."""

    fingerprint: str
    num_classes: int
    labelled: Callable[[], tuple[Tensor, Tensor]]
    """Returns real samples `[n, *dims]` and their classes, int64 `[n]`, for extractors that are trained on them."""
    cache: Path | None = None
    """The cache folder for trained weights."""
    device: torch.device | str = "cpu"
    """The device of the extractor's network."""


extractors: Registry[Callable[[str | None, RealData], FeatureExtractor]] = Registry("feature extractor")
"""Classes and functions that create an extractor from the path to its weights (or None) and the real data."""


def extractor_for(asked: str, measured: RealData) -> FeatureExtractor:
    """Return the extractor that `asked` selects; `asked` has the form NAME or NAME=PATH.

    Raises:
        ValueError: if the extractor is unknown, if its weights are missing or damaged, or if the data does not meet
            its requirements.
    """
    name, _, path = asked.partition("=")
    return extractors[name](path or None, measured)


def refuse_path(name: str, path: str | None) -> None:
    """Raise ValueError if a path is given to an extractor without weights."""
    if path is not None:
        raise ValueError(f"{name}={path}: the `{name}` features do not take a file. Remove ={path}")


def read_weights(name: str, path: str | None, needed: str) -> dict[str, Tensor]:
    """Return the weights of the extractor `name` from the safetensors file `path`.

    Args:
        needed: a description of the required file for error messages.

    Raises:
        ValueError: if the path or the file is missing, or if the file is not a .safetensors file; the message then
            contains the command that converts the file.
        DamagedFile: if the file is incomplete.
    """
    if path is None:
        raise ValueError(f"the `{name}` features need weights. Set {name}=PATH, where PATH is {needed}")
    file = user_path(path)
    if not file.is_file():
        raise ValueError(f"{name}={path}: no such file. Pass {needed}")
    if file.suffix != ".safetensors":
        raise ValueError(
            f"{name}={path} is not a .safetensors file, and halfstep does not read pickles, because they can run "
            f"code. If you trust the file, convert it once: {conversion(file)}"
        )
    return read_tensors(file)


def conversion(file: Path) -> str:
    """Return the shell command that converts a file written by `torch.save` to a safetensors file next to it."""
    source, target = json.dumps(str(file)), json.dumps(str(file.with_suffix(".safetensors")))
    tensors = f"{{name: value.contiguous() for name, value in torch.load({source}, weights_only=True).items()}}"
    code = f"import torch, safetensors.torch as s; s.save_file({tensors}, {target})"
    return f"python -c {shlex.quote(code)}"


def in_batches(network: Callable[[Tensor], Tensor], samples: Tensor, device: torch.device | str, size: int) -> Tensor:
    """Run `network` on `samples`, `size` at a time on `device`; return float32 on the CPU."""
    with torch.inference_mode():
        return torch.cat([network(part.to(device)).float().cpu() for part in samples.split(size)])


LARGEST: Final = 4096
"""The maximum number of entries per sample without averaging. Larger covariances would not fit into memory."""


@final
class Pixels(FeatureExtractor):
    """The raw values of a sample, which are suitable for low-dimensional data but coarse for images.

    Samples with more than `LARGEST` entries must be images `[n, c, h, w]`, which are averaged to at most 32 x 32
    pixels.

    Raises:
        ValueError: when called, if samples have more than `LARGEST` entries but are not images.
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
                    "features `pixels` can compare. Use other features, or disable evaluation (--evaluation.no-enabled)"
                )
            sides = (min(32, samples.shape[2]), min(32, samples.shape[3]))
            samples = F.adaptive_avg_pool2d(samples.float(), sides)
        return samples.flatten(1).float()


@extractors.register("pixels")
def pixels(path: str | None, measured: RealData) -> FeatureExtractor:
    """The raw values of a sample."""
    refuse_path("pixels", path)
    return Pixels()
