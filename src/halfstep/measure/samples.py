"""Samples as arrays and pictures, and what a model is shown for them."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from halfstep.data import Data
from halfstep.metrics import to_uint8
from halfstep.models.model import Model
from halfstep.runtime.files import replacing, write_arrays


def samples_array(x0: Tensor, is_image: bool) -> np.ndarray:
    """What is written into an .npz: uint8 `[n, h, w, c]` for images `[n, c, h, w]`, float32 as it is otherwise."""
    if is_image:
        return to_uint8(x0).permute(0, 2, 3, 1).contiguous().numpy()
    return x0.float().numpy()


def grid_image(pixels: np.ndarray, columns: int | None = None, gap: int = 1) -> Image.Image:
    """A picture of all images uint8 `[n, h, w, c]` side by side, small ones enlarged to be seen.

    Args:
        columns: a square by default.
    """
    count, height, width, channels = pixels.shape
    across = columns or int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    canvas = np.full((down * (height + gap) - gap, across * (width + gap) - gap, channels), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // across) * (height + gap), (index % across) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    factor = max(1, 32 // max(height, width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a picture as PNG, atomically."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def conditions_for(model: Model, data: Data, seeds: list[int]) -> dict[str, Tensor]:
    """What the model is shown beside a class, for samples of these seeds: the conditions of data sample seed modulo
    their number. Empty for a model that needs none.

    Raises:
        ValueError: if the data has no such conditions.
    """
    if not model.manifest.conditions:
        return {}
    cond = data.fetch(torch.tensor([seed % len(data) for seed in seeds])).cond
    for name in model.manifest.conditions:
        if name not in cond:
            raise ValueError(f"the model is conditioned on {name}, which {data.source} does not hold")
    return {name: cond[name] for name in model.manifest.conditions}


def keep_samples(folder: Path, num_steps: int, x0: Tensor, is_image: bool) -> str:
    """Writes samples/steps-NNNN.npz, and a .png for images, under `folder`; returns the path of the .npz in it."""
    name = f"samples/steps-{num_steps:04d}.npz"
    array = samples_array(x0, is_image)
    write_arrays(folder / name, arr_0=array)
    if is_image:
        write_png((folder / name).with_suffix(".png"), grid_image(array))
    return name
