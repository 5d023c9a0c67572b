"""The Inception score (Salimans et al. 2016, arXiv:1606.03498) in any classifier: exp E KL(p(y | x) | p(y)).

High where the classifier is sure of each sample and their classes are many; real data play no part. Biased downwards
for few samples.
"""

import torch
from torch import Tensor

from halfstep.metrics.distances import computed, importing_torchmetrics, metric_of_features

SPLITS = 10
"""Parts over which the score is averaged, as in the first paper."""


def inception_score(logits: Tensor, splits: int = SPLITS) -> float:
    """The score of samples with these `logits` `[n, classes]`, the mean over `splits` random parts of a fixed order.

    Raises:
        ValueError: if there are fewer samples than parts, or a logit is not finite.
    """
    if logits.ndim != 2 or len(logits) < splits:
        raise ValueError(
            f"an Inception score needs logits [n, classes] of at least {splits} samples, got {list(logits.shape)}"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("logits are not finite: the samples are broken")
    with importing_torchmetrics():
        from torchmetrics.image.inception import InceptionScore
    metric = metric_of_features(InceptionScore, logits.shape[1], splits=splits)
    metric.update(logits.double())
    return computed(metric)
