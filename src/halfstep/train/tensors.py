"""Tensors in safetensors files, whose errors are those of any other file."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfstep.runs import DamagedFile


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes contiguous CPU tensors and waits until they are on the disk.

    Raises:
        OSError: if the disk is full or gone (safetensors itself hides the reason in its own error's text).
    """
    try:
        save_file(dict(tensors), path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedFile: if it is no safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is not a whole safetensors file ({error})") from None
