"""The Inception score (Salimans et al. 2016, arXiv:1606.03498), exp E KL(p(y | x) | p(y)), with any classifier.

The score is high if the classifier is certain about each sample and the samples cover many classes. It does not use
real data, and it is biased downwards if there are few samples.
"""

import torch
from torch import Tensor

from halfstep.metrics.distances import computed, importing_torchmetrics, metric_of_features

SPLITS = 10
"""The number of parts over which the score is averaged, as in the original paper."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """Return the score of samples with the given logits `[n, classes]`, averaged over `splits` fixed random parts.

    Raises:
        ValueError: if there are fewer samples than parts, or if a logit is not finite.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(
            f"an Inception score needs logits [n, classes] for at least {splits} samples, got shape "
            f"{list(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("some logits are not finite, so the samples are invalid. Check the samples")
    with importing_torchmetrics():
        from torchmetrics.image.inception import InceptionScore
    metric = metric_of_features(InceptionScore, logits.shape[1], splits=splits)
    metric.update(logits.double())
    return computed(metric)
