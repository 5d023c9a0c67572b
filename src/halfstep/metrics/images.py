"""Pixels: conversion between x0 in [-1, 1] and uint8, which is saved, displayed and measured."""

import torch
from torch import Tensor
from torch.nn import functional as F


def to_uint8(x0: Tensor) -> Tensor:
    """Return the pixels 0 to 255, uint8, of x0 in [-1, 1]: rounded and clipped."""
    return ((x0.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_uint8(pixels: Tensor) -> Tensor:
    """Return x0 float32 in [-1, 1] of uint8 pixels."""
    return pixels.float() / 127.5 - 1


def as_rgb(x0: Tensor) -> Tensor:
    """Return images x0 `[n, 1 or 3, h, w]` as `[n, 3, h, w]`, repeating grey; raise ValueError for other shapes."""
    if x0.ndim != 4 or x0.shape[1] not in (1, 3):
        raise ValueError(
            f"samples of shape {list(x0.shape[1:])} are not images of 1 or 3 channels, which these features need. Use "
            "the features `pixels`"
        )
    return x0.expand(-1, 3, -1, -1)


def normalised(x0: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Return images as RGB `[n, 3, side, side]`, resized with antialiasing and normalised as ImageNet; see `as_rgb`."""
    rgb = (as_rgb(x0).float() + 1) / 2
    if tuple(rgb.shape[2:]) != (side, side):
        rgb = F.interpolate(rgb, (side, side), mode=mode, align_corners=False, antialias=True).clamp(0, 1)
    moments = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean, std = (torch.tensor(values, device=rgb.device)[:, None, None] for values in moments)
    return (rgb - mean) / std
