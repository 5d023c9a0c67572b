"""The Inception score (Salimans et al. 2016, arXiv:1606.03498) with any classifier: exp E KL(p(y | x) | p(y)).

It is high if the classifier is certain about each sample and the samples cover many classes. It does not use real data
and is biased downwards for few samples.
"""

import torch
from torch import Tensor

from halfstep.metrics.distances import computed, importing_torchmetrics, metric_of_features

SPLITS = 10
"""Number of parts over which the score is averaged, as in the original paper."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """Return the score of samples with these `logits` `[n, classes]`, averaged over `splits` fixed random parts.

    Raises:
        ValueError: if there are fewer samples than parts, or a logit is not finite.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(
            f"an Inception score needs logits [n, classes] of at least {splits} samples, got {list(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits are not finite, so the samples are invalid. Check them")
    with importing_torchmetrics():
        from torchmetrics.image.inception import InceptionScore
    metric = metric_of_features(InceptionScore, logits.shape[1], splits=splits)
    metric.update(logits.double())
    return computed(metric)
