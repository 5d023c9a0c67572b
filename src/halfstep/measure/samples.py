"""Samples as arrays and images."""

from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image
from torch import Tensor

from halfstep.metrics import to_uint8
from halfstep.runtime.files import replacing, write_arrays

WIDTH: Final = 800
"""Width of a grid of small images, in pixels."""


def samples_array(x0: Tensor, is_image: bool) -> np.ndarray:
    """Return samples as stored in an .npz: uint8 `[n, h, w, c]` for images `[n, c, h, w]`, otherwise float32."""
    if is_image:
        return to_uint8(x0).permute(0, 2, 3, 1).contiguous().numpy()
    return x0.float().numpy()


def grid_image(pixels: np.ndarray, columns: int | None = None, gap: int = 1) -> Image.Image:
    """Return a grid of images uint8 `[n, h, w, c]`, enlarged by a whole number to a width near `WIDTH`.

    Args:
        columns: number of columns; a square grid by default.
    """
    count, height, width, channels = pixels.shape
    across = columns or int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    canvas = np.full((down * (height + gap) - gap, across * (width + gap) - gap, channels), 255, np.uint8)
    for index, picture in enumerate(pixels):
        top, left = (index // across) * (height + gap), (index % across) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    image = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    factor = max(1, round(WIDTH / image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file, atomically."""
    with replacing(path) as temporary:
        image.save(temporary, "PNG")


def keep_samples(folder: Path, name: str, x0: Tensor, is_image: bool) -> str:
    """Write samples/NAME.npz to `folder`, and a .png for images; return the relative path of the .npz."""
    name = f"samples/{name}.npz"
    array = samples_array(x0, is_image)
    write_arrays(folder / name, arr_0=array)
    if is_image:
        write_png((folder / name).with_suffix(".png"), grid_image(array))
    return name
