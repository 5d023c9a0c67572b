"""Which data to learn, as typed settings, and the way from them to the data."""

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from halfstep.data.arrays import array_file, digits
from halfstep.data.base import Data, check_flip
from halfstep.data.folders import image_folder, image_paths
from halfstep.data.hub import dataset_source
from halfstep.data.images import Preparation

_DATA_SET_FILES = ("*.parquet", "*.arrow", "*.jsonl", "dataset_dict.json", "dataset_infos.json")


class DataConfig(BaseModel):
    """What to learn, and how images are brought to one form."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = "digits"
    """`digits`, a folder of images, a .npy or .npz file, a data set's folder, or its name on the Hub."""
    split: str = "train"
    """Part of a data set."""
    image_size: int | None = Field(default=None, ge=1)
    """Side that images are resized to; as they are by default, which they must share."""
    resize: Literal["crop", "stretch"] = "crop"
    """Keep the centre square, or squeeze the whole image into one."""
    resample: Literal["bicubic", "bilinear", "area", "lanczos"] = "bicubic"
    """Filter for resizing; all are antialiased."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour; as the images are by default, which they must share."""
    labels: bool = True
    """Use class labels where there are some."""
    flip: bool = False
    """Mirror half of the images of each update."""
    limit: int | None = Field(default=None, ge=1)
    """Use so many samples at most."""
    max_bytes: int = Field(default=2 * 1024**3, ge=0)
    """Images whose pixels take more are decoded each time they are used."""


def open_data(config: DataConfig) -> Data:
    """The data that `config` names.

    The source is told by what it is: the name `digits`; a .npy or .npz file; a folder with a data set's files; any
    other folder, which holds images; else a name on the Hub, such as `owner/name`.

    Raises:
        ValueError: if there is nothing of the kind, or it cannot be used; the message says what to do.
    """
    data = _opened(config)
    check_flip(data, config.flip)
    return data


def _opened(config: DataConfig) -> Data:
    source, labels, limit = config.source, config.labels, config.limit
    prepare = Preparation(config.image_size, config.resize, config.resample, config.channels)
    path = Path(source).expanduser()
    if source == "digits":
        return digits(prepare, labels, limit)
    if path.is_file():
        if path.suffix in (".npy", ".npz"):
            return array_file(source, prepare, labels, limit)
        raise ValueError(f"{source} is a file of an unknown kind: give a .npy or .npz file, a folder, or a Hub name")
    if path.is_dir():
        is_data_set = any(any(path.rglob(pattern)) for pattern in _DATA_SET_FILES) and not image_paths(path)
        if is_data_set:
            return dataset_source(str(path), config.split, prepare, labels, limit, config.max_bytes)
        return image_folder(path, source, prepare, labels, limit, config.max_bytes)
    if path.suffix in (".npy", ".npz") or not re.fullmatch(r"[\w-]+[\w.-]*/[\w.-]+", source):
        raise ValueError(
            f"{source} does not exist: give `digits`, a folder, a .npy or .npz file, or a Hub name such as owner/name"
        )
    return dataset_source(source, config.split, prepare, labels, limit, config.max_bytes)
