"""Tensors in safetensors files, whose errors are those of any other file."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from halfstep.runs import DamagedFile

CHUNK: Final = 1 << 18
"""Bytes that are compared at once."""


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


def check_written(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Passes if the file holds the tensors, byte for byte (a number that is not one differs from itself).

    The bytes are read, not mapped into memory: a disk that is gone is an error then, and not the end of the process.

    Raises:
        DamagedFile: if it reads otherwise.
    """
    buffer = bytearray(CHUNK)
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, tensor in tensors.items():
            stream.seek(8 + length + header[name]["data_offsets"][0])
            for part in tensor.reshape(-1).view(torch.uint8).split(CHUNK):
                count = stream.readinto(memoryview(buffer)[: len(part)])
                if count != len(part) or not torch.equal(torch.frombuffer(buffer, dtype=torch.uint8)[:count], part):
                    raise DamagedFile(f"{path} was written, but {name} reads otherwise: check the disk")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        DamagedFile: if it is no safetensors file.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is not a whole safetensors file ({error})") from None
