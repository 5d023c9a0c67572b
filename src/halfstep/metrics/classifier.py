"""Features of a small classifier, which is trained on the labelled data with a fixed seed."""

from pathlib import Path
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.core.draw import generator_for
from halfstep.metrics.features import FeatureExtractor, RealData, extractors, in_batches, refuse_path
from halfstep.runtime.tensors import digest_of, read_cached, write_cached

CLASSIFIER: Final = "classifier-1"
"""The version of the classifier's architecture and training. Increment the number when either changes, because metrics
from before and after the change are not comparable."""
LEAST: Final = 20
"""The minimum number of samples for training a classifier."""
BATCH: Final = 128
SEED: Final = 0


def check_classes(num_samples: int, num_classes: int) -> None:
    """Raise ValueError if there are too few samples or classes to train a classifier."""
    remedy = "Use the features `pixels` (--extractors pixels, or --evaluation.features pixels)"
    if not num_classes:
        raise ValueError(f"the `classifier` features need labels, but the data has none. {remedy}")
    if num_samples < LEAST or num_classes < 2:
        raise ValueError(
            f"a classifier needs at least {LEAST} samples and 2 classes, but the data has {num_samples} and "
            f"{num_classes}. {remedy}"
        )


@final
class Classifier(FeatureExtractor):
    """The 64 features before the last layer of a small network that `train_classifier` trains on labelled data.

    The features of images are taken before the ReLU, which would hide errors in some directions.
    """

    def __init__(self, name: str, network: "ClassifierNetwork", accuracy: float) -> None:
        self.name = name
        self.network = network.eval()
        self.accuracy = accuracy
        """The accuracy on held-out samples."""
        self.facts = {"accuracy": round(accuracy, 4)}
        self.resize = "none"

    def features(self, samples: Tensor) -> Tensor:
        device = self.network.head.weight.device
        return in_batches(lambda part: self.network.body(part.float()), samples, device, 1000)

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        head = self.network.head
        logits: Tensor = head(F.relu(features.to(head.weight.device))).cpu()
        return logits


@final
class ClassifierNetwork(nn.Module):
    """A small classifier, in which `head` maps the 64 features of `body` to logits.

    For images `[n, c, h, w]` of at least 2 x 2 pixels, the body has three 3x3 convolutions, two pooling layers and a
    dense layer. For other data, it has two dense layers.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int) -> None:
        super().__init__()
        self.body: nn.Sequential
        # Images must have at least 2 x 2 pixels for pooling.
        if len(shape) == 3 and min(shape[1:]) >= 2:
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


def train_classifier(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    name: str,
    cache: Path | None = None,
    num_updates: int | None = None,
) -> Classifier:
    """Train a classifier on `x` `[n, *dims]` with int64 `labels` `[n]`. On a given machine, training is deterministic.

    A tenth of the data is held out to measure the accuracy. The extractor's name is `name` plus a hash of the
    weights.

    Args:
        cache: the safetensors file that caches the weights. Its name must be unique to the data.
        num_updates: the number of updates; by default, 4 epochs, but at least 300 and at most 3,000 updates.

    Raises:
        ValueError: as described in `check_classes`.
    """
    check_classes(len(x), num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = ClassifierNetwork(tuple(x.shape[1:]), num_classes)
    order = torch.randperm(len(x), generator=generator_for(SEED, "classifier split"))
    held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
    try:
        network.load_state_dict(read_cached(cache))
    except RuntimeError:  # the cache is missing or damaged
        num_updates = num_updates or min(3000, max(300, 4 * len(kept) // BATCH))
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_updates)
        for update in range(num_updates):
            rows = kept[torch.randint(len(kept), (BATCH,), generator=generator_for(SEED, "classifier", update))]
            optimizer.zero_grad()
            F.cross_entropy(network(x[rows].float()), labels[rows], label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
        write_cached(cache, network.state_dict())
    network.eval()
    with torch.no_grad():
        right = torch.cat([network(chunk.float()).argmax(1) for chunk in x[held_out].split(1000)]) == labels[held_out]
    # On a different machine, or with a different number of threads, training results in a different network.
    return Classifier(f"{name}-{digest_of(network.state_dict())[:12]}", network, float(right.double().mean()))


@extractors.register("classifier")
def classifier(path: str | None, measured: RealData) -> FeatureExtractor:
    """64 features from a small network, which is trained on the labelled data and then cached."""
    refuse_path("classifier", path)
    check_classes(LEAST if measured.num_classes else 0, measured.num_classes)
    x0, labels = measured.labelled()
    name = f"{CLASSIFIER}-{measured.fingerprint[:12]}"
    file = None if measured.cache is None else measured.cache / f"{name}.safetensors"
    return train_classifier(x0, labels, measured.num_classes, name, file)
