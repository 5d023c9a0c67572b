"""The Inception score (Salimans et al. 2016, arXiv:1606.03498) in any classifier: exp E KL(p(y | x) | p(y)).

It looks at the samples alone: high where the classifier is sure of each and their classes are many. It is biased
downwards for few samples.
"""

import warnings

import torch
from torch import Tensor

from halfstep.metrics.distances import ALONE, Given, torchmetrics_at_hand

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
    with torchmetrics_at_hand():
        from torchmetrics.image.inception import InceptionScore
    with warnings.catch_warnings():
        # torchmetrics says that it keeps all features, which are here already.
        warnings.simplefilter("ignore", UserWarning)
        metric = InceptionScore(feature=Given(logits.shape[1]), splits=splits, **ALONE)
    metric.set_dtype(torch.float64)
    metric.update(logits.double())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return float(metric.compute()[0])
