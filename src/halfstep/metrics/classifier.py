"""The classifier whose features the data's own labels make: trained on them, with a fixed seed, and kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.core.draw import generator_for
from halfstep.metrics.features import FeatureExtractor, RealData, digest_of, extractors, refuse_path
from halfstep.runtime.tensors import read_cached, write_cached

CLASSIFIER: Final = "classifier-1"
"""Name of the classifier's architecture and training; another number when either changes, for old figures are not
comparable with new ones then."""


@final
class Classifier(FeatureExtractor):
    """The 64 linear features before the last layer of a small network trained on labelled data (`train_classifier`).

    They are taken before their ReLU, so that no direction of error is cut off.

    Args:
        name: see `FeatureExtractor.name`.
        network: maps samples to logits through `body` (features) and `head`.
    """

    def __init__(self, name: str, network: "ClassifierNetwork", accuracy: float) -> None:
        self._name = name
        self.network = network.eval()
        self.accuracy = accuracy
        """Share of held-out samples that it classifies rightly."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"accuracy": round(self.accuracy, 4)}

    @property
    def resize(self) -> str:
        return "none"

    @torch.no_grad()
    def features(self, samples: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        chunks = [self.network.body(chunk.to(device).float()).cpu() for chunk in samples.split(1000)]
        return torch.cat(chunks)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        head = self.network.head
        logits: Tensor = head(F.relu(features.to(head.weight.device))).cpu()
        return logits


@final
class ClassifierNetwork(nn.Module):
    """Three 3x3 convolutions with two poolings for images `[n, c, h, w]`, two dense layers for anything else."""

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body: nn.Sequential
        if len(shape) == 3:
            self.body = nn.Sequential(
                nn.Conv2d(shape[0], 32, 3, padding=1), nn.ReLU(),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
                nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                nn.Linear(256, 64),
            )  # fmt: skip
        else:
            entries = int(torch.Size(shape).numel())
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(entries, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.body(x)))
        return logits


def _restored(network: nn.Module, cache: Path | None) -> bool:
    """Whether the weights could be read from the cache; a damaged cache is as good as none."""
    try:
        network.load_state_dict(read_cached(cache))
    except RuntimeError:
        return False
    return True


def train_classifier(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    name: str,
    cache: Path | None = None,
    num_updates: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
) -> Classifier:
    """A classifier of `x` `[n, *dims]` with int64 `labels` `[n]`, the same for the same arguments on one machine.

    It is trained for `num_updates`, by default for 4 epochs, but at least 300 and at most 3,000 updates. A tenth of the
    data is held out to measure its accuracy. The extractor's name is `name` with a hash of the weights. With `cache`,
    the weights are read from and written to that safetensors file, whose name must be unique to the data.

    Raises:
        ValueError: if there are fewer than 20 samples or fewer than 2 classes.
    """
    if len(x) < 20 or num_classes < 2:
        raise ValueError(
            f"a classifier needs 20 samples and 2 classes, got {len(x)} and {num_classes}: use the features `pixels`"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ClassifierNetwork(tuple(x.shape[1:]), num_classes)
    order = torch.randperm(len(x), generator=generator_for(seed, "classifier split"))
    held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
    if not _restored(network, cache):
        num_updates = num_updates or min(3000, max(300, 4 * len(kept) // batch_size))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_updates)
        for update in range(num_updates):
            picks = torch.randint(len(kept), (batch_size,), generator=generator_for(seed, "classifier", update))
            rows = kept[picks]
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows].float()), labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
        write_cached(cache, network.state_dict())
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(chunk.float()).argmax(1) for chunk in x[held_out].split(1000)]) == labels[held_out]
    # Another machine, or another number of threads, trains another network of the same name.
    return Classifier(f"{name}-{digest_of(network)[:12]}", network, float(right.double().mean()))


@extractors.register("classifier")
def classifier(path: str | None, measured: RealData) -> FeatureExtractor:
    """64 features of a small network trained on the labelled data; kept in the cache folder."""
    refuse_path("classifier", path)
    if not measured.num_classes:
        raise ValueError(
            "the features `classifier` need labels, and the data has none: use the features `pixels` "
            "(--extractors pixels, or --evaluation.features pixels)"
        )
    x0, labels = measured.labelled()
    name = f"{CLASSIFIER}-{measured.fingerprint[:12]}"
    file = None if measured.cache is None else measured.cache / f"{name}.safetensors"
    return train_classifier(x0, labels, measured.num_classes, name, file)
