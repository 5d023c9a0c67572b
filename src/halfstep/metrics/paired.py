"""Distillation metrics, which compare pairs of samples generated from the same noise. Images are in [-1, 1]."""

import functools
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from halfstep.metrics.distances import ALONE, importing_torchmetrics
from halfstep.metrics.images import as_rgb
from halfstep.runtime.files import sha256_of

WIDTH: Final = 2.0
SSIM_SIDE: Final = 11
"""The window size of Wang et al. 2004, in pixels. Images must be at least this large."""
LPIPS_SIDE: Final = 31
"""The smallest image side, in pixels, that AlexNet's two pooling layers do not reduce to zero."""
AT_ONCE: Final = 64
"""The number of pairs per call to SSIM or LPIPS."""


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"paired samples must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}")


def rmse(a: Tensor, b: Tensor) -> float:
    """Return the root mean square difference between paired samples, both `[n, *dims]`.

    Raises:
        ValueError: if the shapes of the samples differ.
    """
    _check_pair(a, b)
    return float((a.double() - b.double()).square().mean().sqrt())


def psnr(a: Tensor, b: Tensor) -> float:
    """Return the PSNR in dB over all pairs of images, which is infinite if all pairs are equal.

    Raises:
        ValueError: if the shapes of the images differ.
    """
    difference = rmse(a, b)
    return math.inf if difference == 0 else 20 * math.log10(WIDTH / difference)


def ssim(a: Tensor, b: Tensor) -> float:
    """Return the mean structural similarity (Wang et al. 2004) of paired images `[n, c, h, w]` in [-1, 1].

    Raises:
        ValueError: if the shapes differ, or if the samples are not images of at least 11 x 11 pixels (the window).
    """
    _check_pair(a, b)
    if a.ndim != 4 or min(a.shape[2:]) < SSIM_SIDE:
        raise ValueError(f"SSIM needs images of at least {SSIM_SIDE} x {SSIM_SIDE} pixels, got {list(a.shape[1:])}")
    with importing_torchmetrics():
        from torchmetrics.functional.image import structural_similarity_index_measure

    total = 0.0
    # Pairs are processed a few at a time, because SSIM makes about twenty copies of its input.
    for first, second in zip(a.split(AT_ONCE), b.split(AT_ONCE), strict=True):
        # Values are shifted to [0, 2], because the constants of SSIM assume that no value is negative.
        score = structural_similarity_index_measure(
            first.double() + 1, second.double() + 1, data_range=WIDTH, reduction="sum"
        )
        assert isinstance(score, Tensor)
        total += float(score)
    return total / len(a)


def why_no_lpips(shape: Sequence[int]) -> str | None:
    """Return why LPIPS cannot be measured for images of shape `(c, h, w)` on this machine, or None if it can be.

    The names of stored metrics contain a hash of this reason, so changing its wording invalidates stored metrics.
    """
    if shape[0] not in (1, 3):
        return f"images with {shape[0]} channels are neither grey nor colour"
    if min(shape[1:]) < LPIPS_SIDE:
        return f"it needs images of at least {LPIPS_SIDE} x {LPIPS_SIDE} pixels"
    if importlib.util.find_spec("torchvision") is None:
        return "torchvision is not installed"
    file = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if not file.is_file():
        return f"its AlexNet is not at {file}"
    return None if _is_published(file) else f"{file} is not torchvision's AlexNet, and may run code when unpickled"


@functools.cache
def _is_published(file: Path) -> bool:
    """Return whether the file's hash matches its name. torchvision would unpickle any file with this name."""
    return sha256_of(file).startswith(file.stem.rpartition("-")[2])


def lpips(a: Tensor, b: Tensor) -> float:
    """Return the mean LPIPS (Zhang et al. 2018, arXiv:1801.03924) of paired images in [-1, 1], with AlexNet.

    Raises:
        ValueError: if the shapes differ, if the samples are not images, or if a requirement is missing (see
            `why_no_lpips`).
    """
    _check_pair(a, b)
    if (lacking := why_no_lpips(a.shape[1:])) is not None:
        raise ValueError(f"LPIPS cannot be measured: {lacking}")
    with importing_torchmetrics():
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    metric = LearnedPerceptualImagePatchSimilarity(net_type="alex", reduction="mean", normalize=False, **ALONE)
    with torch.inference_mode():
        for first, second in zip(a.split(AT_ONCE), b.split(AT_ONCE), strict=True):
            metric.update(as_rgb(first.float()), as_rgb(second.float()))
        return float(metric.compute())
