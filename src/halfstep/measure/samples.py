"""Convert samples to arrays and images, and write them to files."""

import math
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from halfstep.metrics import to_uint8
from halfstep.runtime.files import replacing, write_arrays

WIDTH: Final = 800
"""The approximate width of a grid of small images, in pixels."""

MOST_CHANNELS: Final = 4
"""The largest number of channels in a PNG file."""


def samples_array(x0: Tensor, is_image: bool) -> np.ndarray:
    """Convert samples for an .npz file: images `[n, c, h, w]` to uint8 `[n, h, w, c]`, and other samples to float32."""
    if is_image:
        return to_uint8(x0).permute(0, 2, 3, 1).contiguous().numpy()
    return x0.float().numpy()


def grid_image(pixels: np.ndarray) -> Image.Image:
    """Return a square grid of uint8 images `[n, h, w, c]`, enlarged by an integer factor to a width near `WIDTH`.

    If the images have more than four channels, the first three are shown as colours.
    """
    if pixels.shape[3] > MOST_CHANNELS:
        pixels = pixels[..., :3]
    count, height, width, channels = pixels.shape
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    # A one-pixel white line separates the images.
    canvas = np.full((down * (height + 1) - 1, across * (width + 1) - 1, channels), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // across) * (height + 1), (index % across) * (width + 1)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    factor = max(1, round(WIDTH / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file atomically."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def keep_samples(folder: Path, name: str, x0: Tensor, is_image: bool) -> str:
    """Write samples/NAME.npz to `folder`, plus a .png file for images; return the relative path of the .npz file."""
    name = f"samples/{name}.npz"
    array = samples_array(x0, is_image)
    write_arrays(folder / name, arr_0=array)
    if is_image:
        write_png((folder / name).with_suffix(".png"), grid_image(array))
    return name
