"""The user's configuration of the data, and the one function that opens them."""

import os
import re
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, field_validator

from halfstep.core.door import in_python
from halfstep.data.arrays import array_file, digits
from halfstep.data.base import Data, check_flip
from halfstep.data.folders import IMAGE_SUFFIXES, files_below, image_folder, image_paths
from halfstep.data.images import Channels, Labelled, Preparation, Resample, Resize, decoded
from halfstep.data.latents import is_latents, open_latents
from halfstep.data.tables import is_saved, table
from halfstep.runtime.files import user_path

LARGEST_SIDE: Final = 16_384
"""Largest side to which images are brought."""
_HUB_NAME: Final = re.compile(r"\w[\w.-]*/[\w.-]+")
_TABLES: Final = (".parquet", ".arrow")


class DataConfig(BaseModel):
    """Which data, and how they are prepared."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "digits"
    """`digits`, a .npy or .npz file, a folder of images, tables or latents, or a name on the Hub (owner/name)."""
    split: str = "train"
    """Part of the source: a data set's split, or a folder's sub-folder of that name if it has one."""
    image_size: int | None = None
    """Height and width to resize images to; by default the size that they all have."""
    resize: Resize = "crop"
    """crop scales the shorter side and keeps the centre, undistorted; stretch scales both sides."""
    resample: Resample = "bicubic"
    """Filter for resizing; all are antialiased."""
    channels: Channels | None = None
    """1 for grey, 3 for RGB; by default what the images all have. Transparency is laid on white."""
    labels: bool = True
    """Use the classes of the data if they have any."""
    label_column: str | None = None
    """Column of a table that holds the class, if several could."""
    flip: bool = False
    """Mirror half of the images of an update, at random."""
    limit: int | None = None
    """Maximum number of samples: the first, balanced across class folders."""
    skip_broken: bool = False
    """Leave out images that cannot be read, with a warning, instead of stopping."""
    accept_changed: bool = False
    """Resume a run although its data have changed since, such as by a repaired file."""
    max_bytes: int = 2 * 2**30
    """Images whose pixels take more memory than this are decoded each time they are used."""

    @field_validator("source")
    @classmethod
    def _plain(cls, source: str) -> str:
        """Return a path without "./" and a slash at its end, so that the same data has one name."""
        plain = os.path.normpath(source) if source else source
        # "./owner/name" says that no name on the Hub is meant.
        return source if _HUB_NAME.fullmatch(plain) and not user_path(plain).exists() else plain


@in_python()
def open_data(config: DataConfig) -> Data:
    """Open and prepare the data that `config` names.

    Raises:
        ValueError: if the source is missing, unreadable or not samples of one shape, or if a setting is out of range or
            would be ignored.
    """
    _check(config)
    data = _open(config)
    check_flip(data, config.flip)
    return data


def holds_images(config: DataConfig) -> bool:
    """Whether the source is a folder or a name on the Hub, from which images come in any size."""
    path = user_path(config.source)
    return config.source != "digits" and not path.is_file() and not is_latents(path)


def _open(config: DataConfig) -> Data:
    source, path = config.source, user_path(config.source)
    prepare = Preparation(config.image_size, config.resize, config.resample, config.channels)
    if source == "digits" or (path.suffix.lower() in (".npy", ".npz") and not path.is_dir()):
        if config.split != "train":
            raise ValueError(f"{source} has no split {config.split!r}: it has only --data.split train")
        _refuse_label_column(config)
        if source == "digits":
            return digits(prepare, config.labels, config.limit)
        return array_file(source, prepare, config.labels, config.limit)
    if is_latents(path):
        if prepare != Preparation() or config.split != "train" or config.limit is not None:
            raise ValueError(f"{source} holds latents, which are taken as they are: leave out other --data options")
        return open_latents(path)
    if path.is_dir():
        return decoded(source, _folder(config, path), prepare, config.max_bytes, config.skip_broken)
    if _HUB_NAME.fullmatch(source) and not path.exists():
        return decoded(source, _table(config), prepare, config.max_bytes, config.skip_broken)
    raise ValueError(
        f"{source} {'is a file of another kind' if path.exists() else 'does not exist'}: --data.source is digits, a "
        f".npy or .npz file, a folder, or a name on the Hub such as owner/name"
    )


def _folder(config: DataConfig, root: Path) -> Labelled:
    """Return the images of a folder: those in its tables if it has any, else its image files."""
    if is_saved(root):
        return _table(config)
    if (root / "recipe.json").is_file() and (root / "stages").is_dir():
        raise ValueError(f"{config.source} is the folder of a run, not data: give the data that it was trained on")
    files = files_below(root)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    tables = [path for path in files if path.suffix.lower() in _TABLES]
    if images and tables:
        raise ValueError(
            f"{config.source} holds images ({images[0]}) and tables ({tables[0]}): give a folder that holds one kind"
        )
    if tables or (not images and any(path.suffix.lower() == ".jsonl" for path in files)):
        return _table(config)
    _refuse_label_column(config)
    return image_folder(root, image_paths(root, files), config.split, config.labels, config.limit)


def _table(config: DataConfig) -> Labelled:
    return table(config.source, config.split, config.labels, config.label_column, config.limit)


def _refuse_label_column(config: DataConfig) -> None:
    if config.label_column is not None:
        raise ValueError(f"{config.source} has no columns: leave out --data.label-column {config.label_column}")


def _check(config: DataConfig) -> None:
    """Raise ValueError for settings that are out of range or would be ignored."""
    for flag, value in (("limit", config.limit), ("image-size", config.image_size)):
        if value is not None and value < 1:
            raise ValueError(f"--data.{flag} is {value}: give 1 or more, or leave it out")
    if config.image_size is not None and config.image_size > LARGEST_SIDE:
        raise ValueError(f"--data.image-size is {config.image_size}: give at most {LARGEST_SIDE:,}")
    if config.max_bytes < 0:
        raise ValueError(f"--data.max-bytes is {config.max_bytes}: give 0 or more")
    if config.image_size is None and (config.resize, config.resample) != ("crop", "bicubic"):
        raise ValueError("--data.resize and --data.resample do nothing without --data.image-size: give it too")
    if config.label_column is not None and not config.labels:
        raise ValueError("--data.label-column does nothing with --data.no-labels: leave out one of them")
