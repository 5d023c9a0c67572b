"""Convert an image to pixels.

The steps, in order, are: apply the EXIF orientation if it can be read, fill transparent areas with white, convert the
channels, crop, and resample. Only the first frame of an image is read. An image that needs none of these steps is
unchanged.
"""

from dataclasses import dataclass
from typing import Final, Literal, final

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

Channels = Literal[1, 3]
Resize = Literal["crop", "stretch"]
Resample = Literal["bicubic", "bilinear", "area", "lanczos"]

_FILTERS: Final = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "area": Image.Resampling.BOX,
    "lanczos": Image.Resampling.LANCZOS,
}
_GREY: Final = ("1", "L", "LA", "La")
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The transposition that undoes each EXIF orientation. Orientation 1 and unknown orientations need none."""


class TooDeep(ValueError):
    """Raised if an image has more than 8 bits per channel: its white level is unknown, so it cannot be rescaled."""


@final
@dataclass(frozen=True)
class Preparation:
    """Converts an image to pixels. The fields have the same meaning as in `DataConfig`."""

    image_size: int | None = None
    resize: Resize = "crop"
    resample: Resample = "bicubic"
    channels: Channels | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Return pixels `[channels, height, width]`, resized to `image_size` if it is set.

        "crop" preserves the aspect ratio.

        Raises:
            TooDeep: if the image has more than 8 bits per channel. Pillow would keep only the upper 8 bits.
        """
        if mode := deep_mode(image):
            raise TooDeep(f"has more than 8 bits per channel (mode {mode}): scale it to 8 bits, or remove it")
        image = _upright(image)
        channels = self.channels or (1 if image.mode in _GREY else 3)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
        if self.image_size is not None:
            image = image.resize((self.image_size,) * 2, _FILTERS[self.resample], self._box(*image.size))
        pixels = np.asarray(image)
        return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """Return the box to keep as (left, upper, right, lower), in whole pixels to avoid blurring."""
        if self.resize == "stretch":
            return 0, 0, width, height
        side = min(width, height)
        left, upper = (width - side) // 2, (height - side) // 2
        return left, upper, left + side, upper + side


def deep_mode(image: Image.Image) -> str | None:
    """Return the mode of an opened image with more than 8 bits per channel, or None. No pixels are decoded."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return image.mode
    # Pillow converts 16-bit colour to 8 bits; only its decoder's raw mode shows the original depth.
    is_deep = image.format in ("PNG", "TIFF") and any(";16" in str(tile.args) for tile in image.tile)
    return "16-bit colour" if is_deep else None


def _upright(image: Image.Image) -> Image.Image:
    """Return the image with its EXIF orientation applied, or unchanged if the orientation cannot be read."""
    image.load()  # outside of `try`, so that broken pixels are not mistaken for broken metadata
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # reading broken EXIF or XMP data can raise any error
        turn = None
    return image if turn is None else image.transpose(turn)
