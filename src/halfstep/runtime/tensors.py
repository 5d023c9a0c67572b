"""Tensors in safetensors files, whose errors are those of any other file."""

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from halfstep.runtime.files import DamagedFile, replacing, sync

DIGEST: Final = "sha256"
"""Tensor of a cached file: the digest of all others."""
CHUNK: Final = 1 << 20
"""Bytes that are compared at once."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors as safetensors, atomically, and return the sha256 of the file, which was read back and compared.

    Raises:
        OSError: if the disk is full or gone (safetensors itself hides the reason in its own error's text).
        DamagedFile: if the file reads otherwise; `path` stays as it was.
    """
    held = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(held, temporary)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        sync(temporary)
        return check_written(held, temporary)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of the tensors' names, kinds and content."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(held.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def check_written(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Return the sha256 of the file; raise DamagedFile unless it holds the tensors byte for byte.

    Bytes are read, not mapped into memory, so that a disk that is gone is an error and not the end of the process.
    """
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    with open(path, "rb") as stream:
        head = stream.read(8)
        text = stream.read(int.from_bytes(head, "little"))
        digest.update(head + text)
        header = json.loads(text)
        for name in sorted(tensors, key=lambda name: header[name]["data_offsets"]):
            held: Any = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(held), CHUNK):
                wanted = held[start : start + CHUNK]
                if len(buffer) != len(wanted):
                    buffer = bytearray(len(wanted))
                # A bytearray compares memory; a memoryview compares number by number.
                if stream.readinto(buffer) != len(wanted) or buffer != wanted:
                    raise DamagedFile(f"{path} was written, but {name} reads otherwise: check the disk")
                digest.update(buffer)
        if stream.read(1):
            raise DamagedFile(f"{path} was written, but is longer than what it holds: check the disk")
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file.

    Raises:
        DamagedFile: if it is not a safetensors file.
    """
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            # safetensors opens no file whose name is not UTF-8.
            return load(path.read_bytes())
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is not a whole safetensors file ({error})") from None


def check_finite(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise DamagedFile for the first tensor that contains a value that is not finite; `where` names its origin."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DamagedFile(
                f"{where} holds weights that are not finite (tensor {name}): it was damaged, or its training diverged. "
                "Give other weights"
            )


def read_cached(file: Path | None) -> dict[str, Tensor]:
    """Load the tensors that `write_cached` has written into this file; none if there are none or any bit differs."""
    if file is None:
        return {}
    try:
        held = read_tensors(file)
        digest = held.pop(DIGEST, None)
        return held if digest is not None and torch.equal(digest, _digest(file, held)) else {}
    except (DamagedFile, OSError):
        return {}


def write_cached(file: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Cache tensors with their digest. A cache that cannot be written (read-only, full) costs only time."""
    if file is not None:
        with contextlib.suppress(DamagedFile, OSError, SafetensorError):
            write_tensors(file, {**tensors, DIGEST: _digest(file, tensors)})


def _digest(file: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the sha256 of tensors by name, and of the name of their file, as 32 bytes."""
    digest = hashlib.sha256(file.name.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
