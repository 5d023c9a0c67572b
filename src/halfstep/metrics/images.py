"""Convert images between x0 in [-1, 1] and uint8 pixels, and to the inputs of feature networks."""

import torch
from torch import Tensor
from torch.nn import functional as F


def to_uint8(x0: Tensor) -> Tensor:
    """Return x0 in [-1, 1] as rounded and clipped uint8 pixels."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 x0 in [-1, 1]."""
    return pixels.float() / 127.5 - 1


def as_rgb(x0: Tensor) -> Tensor:
    """Return images `[n, 1 or 3, h, w]` as `[n, 3, h, w]`, repeating grey channels; raise ValueError for others."""
    if x0.ndim != 4 or x0.shape[1] not in (1, 3):
        raise ValueError(
            f"samples of shape {list(x0.shape[1:])} are not images with 1 or 3 channels, which these features need. "
            "Use the features `pixels`"
        )
    return x0.expand(-1, 3, -1, -1)


def normalised(x0: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Return images as RGB `[n, 3, side, side]`, resized with antialiasing and normalised with ImageNet statistics."""
    rgb = (as_rgb(x0).float() + 1) / 2
    if tuple(rgb.shape[2:]) != (side, side):
        rgb = F.interpolate(rgb, (side, side), mode=mode, align_corners=False, antialias=True).clamp(0, 1)
    moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in moments)
    return (rgb - mean) / std
