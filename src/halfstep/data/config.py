"""The data configuration, and the function that opens the data."""

import re
import warnings
from pathlib import Path, PurePath
from typing import Final

from pydantic import field_validator

from halfstep.core.door import check_instance, in_python
from halfstep.core.warnings import HalfstepWarning
from halfstep.data.arrays import array_file, digits
from halfstep.data.base import Data, check_flip
from halfstep.data.folders import IMAGE_SUFFIXES, files_below, image_folder, image_paths
from halfstep.data.images import Labelled, decoded
from halfstep.data.latents import is_latents, open_latents
from halfstep.data.preparation import Channels, Preparation, Resample, Resize
from halfstep.data.tables import is_saved, table
from halfstep.runs.record import Record
from halfstep.runtime.files import user_path

LARGEST_SIDE: Final = 16_384
"""The largest side that images can be resized to, in pixels."""
_HUB_NAME: Final = re.compile(r"\w[\w.-]*/[\w.-]+")
_TABLES: Final = (".parquet", ".arrow")


class DataConfig(Record):
    """The source and preparation of the data."""

    source: str = "digits"
    """`digits`, a .npy or .npz file, a folder of images, tables or latents, or a name on the Hub (owner/name)."""
    split: str = "train"
    """Split of a data set; in a folder, the sub-folder with this name, if it exists."""
    image_size: int | None = None
    """Height and width to resize images to; by default, all images must have the same size, which is kept."""
    resize: Resize = "crop"
    """crop resizes the central square of an image; stretch resizes the whole image."""
    resample: Resample = "bicubic"
    """Filter for resizing; all filters are antialiased."""
    channels: Channels | None = None
    """1 for grey or 3 for RGB; by default, the channels of the images. Transparent pixels get a white background."""
    labels: bool = True
    """Use the classes of the data, if it has any."""
    label_column: str | None = None
    """Table column that contains the class; only needed if several columns could contain it."""
    flip: bool = False
    """Mirror a random half of the images in each batch."""
    limit: int | None = None
    """Maximum number of samples; the first samples are kept, in about equal numbers from each class folder."""
    skip_broken: bool = False
    """Skip unreadable images with a warning instead of stopping."""
    accept_changed: bool = False
    """Resume a run even if its data has changed, for example because a file was repaired."""
    max_bytes: int = 2 * 2**30
    """Memory limit for decoded images, in bytes; if they need more, they are decoded at each use."""

    @field_validator("source")
    @classmethod
    def _plain(cls, source: str) -> str:
        """Remove "./" and trailing slashes from a path, so that the same data always has the same name."""
        # "link/../data" is not "data" if link is a symbolic link, so ".." is kept.
        plain = str(PurePath(source)) if source else source
        # "./owner/name" marks a path, as opposed to a name on the Hub.
        if _HUB_NAME.fullmatch(plain) and not user_path(plain).exists():
            return source
        # Likewise, "./digits" and "digits/" mark a path, as opposed to scikit-learn's digits.
        return f"./{plain}" if plain == "digits" and source != plain else plain


@in_python()
def open_data(config: DataConfig) -> Data:
    """Open and prepare the data that `config` describes.

    Raises:
        ValueError: if the source is missing or unreadable, if its samples differ in shape, or if a setting is out of
            range or has no effect.
    """
    check_instance("config", config, DataConfig, "halfstep.DataConfig(source='digits')")
    _check(config)
    data = _open(config)
    check_flip(data, config.flip)
    return data


def holds_images(config: DataConfig) -> bool:
    """Return whether the source is a folder or a data set on the Hub, whose images may have any size."""
    path = user_path(config.source)
    return config.source != "digits" and not path.is_file() and not is_latents(path)


def _open(config: DataConfig) -> Data:
    source, path = config.source, user_path(config.source)
    prepare = Preparation(config.image_size, config.resize, config.resample, config.channels)
    if source == "digits" or (path.suffix.lower() in (".npy", ".npz") and not path.is_dir()):
        if config.split != "train":
            raise ValueError(f"{source} has no split {config.split!r}: only --data.split train exists")
        _refuse_label_column(config)
        if source == "digits":
            if path.is_dir() and not _is_run(path):
                warnings.warn(
                    "the data digits is scikit-learn's digits, not the folder of this name: to use the folder, pass "
                    "./digits",
                    HalfstepWarning,
                    stacklevel=2,
                )
            return digits(prepare, config.labels, config.limit)
        return array_file(source, prepare, config.labels, config.limit)
    if is_latents(path):
        if prepare != Preparation() or config.split != "train" or config.limit is not None:
            raise ValueError(f"{source} contains latents, which are used unchanged: remove the other --data options")
        _refuse_label_column(config)
        latents = open_latents(path)
        return latents if config.labels else latents.without_classes()
    if path.is_dir():
        return decoded(source, _folder(config, path), prepare, config.max_bytes, config.skip_broken)
    if _HUB_NAME.fullmatch(source) and not path.exists():
        return decoded(source, _table(config), prepare, config.max_bytes, config.skip_broken)
    raise ValueError(
        f"{source} {'is not a supported file' if path.exists() else 'does not exist'}: set --data.source to digits, a "
        f".npy or .npz file, a folder, or a name on the Hub such as owner/name"
    )


def _folder(config: DataConfig, root: Path) -> Labelled:
    """Return the images in the tables of a folder, or its image files if it has no tables."""
    if is_saved(root):
        return _table(config)
    if _is_run(root):
        raise ValueError(f"{config.source} is a run folder, not data: pass the data that the run was trained on")
    files = files_below(root, config.split)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in files if path.suffix.lower() in _TABLES]
    if images and tables:
        raise ValueError(
            f"{config.source} contains both images ({images[0]}) and tables ({tables[0]}): pass a folder that contains "
            f"only one of the two"
        )
    if tables or (not images and any(path.suffix.lower() == ".jsonl" for path in files)):
        return _table(config)
    _refuse_label_column(config)
    return image_folder(root, image_paths(root, files), config.split, config.labels, config.limit)


def _is_run(root: Path) -> bool:
    return (root / "recipe.json").is_file() and (root / "stages").is_dir()


def _table(config: DataConfig) -> Labelled:
    return table(config.source, config.split, config.labels, config.label_column, config.limit)


def _refuse_label_column(config: DataConfig) -> None:
    if config.label_column is not None:
        raise ValueError(f"{config.source} has no columns: remove --data.label-column {config.label_column}")


def _check(config: DataConfig) -> None:
    """Raise ValueError for settings that are out of range or have no effect."""
    for flag, value in (("limit", config.limit), ("image-size", config.image_size)):
        if value is not None and value < 1:
            raise ValueError(f"--data.{flag} is {value}: set it to 1 or more, or remove it")
    if config.image_size is not None and config.image_size > LARGEST_SIDE:
        raise ValueError(f"--data.image-size is {config.image_size}: set it to at most {LARGEST_SIDE:,}")
    if config.max_bytes < 0:
        raise ValueError(f"--data.max-bytes is {config.max_bytes}: set it to 0 or more")
    if config.image_size is None and (config.resize, config.resample) != ("crop", "bicubic"):
        raise ValueError("--data.resize and --data.resample have no effect without --data.image-size. Add that option")
    if config.label_column is not None and not config.labels:
        raise ValueError("--data.label-column has no effect with --data.no-labels. Remove one of the two options")
