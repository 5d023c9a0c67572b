"""All metrics, keyed by name, each with a label and a description."""

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

from torch import Tensor

from halfstep.metrics.distances import frechet_distance, kernel_distance, sliced_wasserstein
from halfstep.metrics.features import FeatureExtractor
from halfstep.metrics.neighbours import K, precision_recall
from halfstep.metrics.paired import SSIM_SIDE, lpips, psnr, rmse, ssim, why_no_lpips
from halfstep.metrics.reference import RealFeatures, described, halves
from halfstep.metrics.scores import SPLITS, inception_score
from halfstep.runs.evaluation import MetricInfo


def _lower(label: str, meaning: str) -> MetricInfo:
    return MetricInfo(label=label, better="lower", meaning=meaning)


def _higher(label: str, meaning: str) -> MetricInfo:
    return MetricInfo(label=label, better="higher", meaning=meaning)


METRICS: Final[Mapping[str, MetricInfo]] = {
    "frechet": _lower(
        "Frechet distance",
        "Distance between Gaussians fitted to the features of the samples and of the real data; with `inception`, the "
        "FID.",
    ),
    "kid": _lower(
        "KID",
        "Squared kernel distance between the features; unbiased for any number of samples, so it may be slightly "
        "negative.",
    ),
    "inception_score": _higher(
        "Inception score",
        "Certainty of the extractor's classifier about each sample, combined with the diversity of the predicted "
        "classes.",
    ),
    "precision": _higher("precision", "Share of the samples that are in the neighbourhood of a real sample."),
    "recall": _higher("recall", "Share of the real data that is in the neighbourhood of a sample."),
    "density": _higher(
        "density", "Number of real neighbourhoods that contain a sample, divided by the expected number; may exceed 1."
    ),
    "coverage": _higher("coverage", "Share of the real data that has a sample in its neighbourhood."),
    "sliced_wasserstein": _lower(
        "sliced Wasserstein", "Mean Wasserstein-1 distance between features projected onto 128 fixed random directions."
    ),
    "rmse": _lower("RMSE to teacher", "Root mean square difference to the teacher's samples from the same noise."),
    "psnr": _higher("PSNR to teacher, dB", "Pixel range divided by the RMSE to the teacher, in decibels."),
    "ssim": _higher(
        "SSIM to teacher", "Structural similarity to the teacher's images from the same noise; 1 for equal images."
    ),
    "lpips": _lower("LPIPS to teacher", "Perceptual distance (AlexNet) to the teacher's images from the same noise."),
}
"""All metrics, in display order."""


class Figures(NamedTuple):
    """Values by metric name, and a message for each metric that could not be measured."""

    values: dict[str, float]
    missing: list[str]


def figures_of(extractor: FeatureExtractor, features: Tensor, real: RealFeatures) -> Figures:
    """Return all metrics that compare `features` `[n, d]` with the real data.

    Raises:
        ValueError: if there are fewer than 2 samples, or if a feature is not finite.
    """
    missing = []
    values = {
        "frechet": frechet_distance(real.features, features, real.moments),
        "kid": kernel_distance(real.features, features),
        "sliced_wasserstein": sliced_wasserstein(real.features, features),
    }
    logits = extractor.logits(features)
    if logits is not None and len(features) >= SPLITS:
        values["inception_score"] = inception_score(logits)
    elif logits is not None:
        missing.append(f"The Inception score needs at least {SPLITS} samples, but there are only {len(features)}.")
    least = min(len(features), len(real.features))
    if real.radii is not None and least >= K + 2:
        values |= precision_recall(real.features, features, real.radii)._asdict()
    else:
        missing.append(
            f"Precision, recall, density and coverage need at least {K + 2} samples, but there are only {least}."
        )
    return Figures({name: values[name] for name in METRICS if name in values}, missing)


def figures_of_halves(extractor: FeatureExtractor, real: RealFeatures) -> Figures:
    """Return the metrics that compare one half of the real data with the other half."""
    first, second = halves(real.features)
    return figures_of(extractor, second, described(first))


def paired_figures(samples: Tensor, others: Tensor, is_image: bool) -> Figures:
    """Return the metrics that compare samples `[n, *dims]` with another model's samples from the same noise.

    Raises:
        ValueError: if the shapes of the samples differ.
    """
    values, missing = {"rmse": rmse(samples, others)}, []
    if is_image:
        values["psnr"] = psnr(samples, others)
        if math.isinf(values["psnr"]):
            del values["psnr"]
            missing.append("PSNR is omitted because it is infinite for equal images.")
        if min(samples.shape[2:]) >= SSIM_SIDE:
            values["ssim"] = ssim(samples, others)
        else:
            missing.append(f"SSIM is omitted because it needs images of at least {SSIM_SIDE} x {SSIM_SIDE} pixels.")
        if (lacking := why_no_lpips(samples.shape[1:])) is None:
            values["lpips"] = lpips(samples, others)
        else:
            missing.append(f"LPIPS is omitted: {lacking}.")
    return Figures({name: values[name] for name in METRICS if name in values}, missing)
