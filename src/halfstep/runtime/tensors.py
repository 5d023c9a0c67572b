"""Reads and writes tensors in safetensors files, and raises the errors of `halfstep.runtime.files`."""

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
"""The name of the tensor that contains the digest of all other tensors in a cached file."""
CHUNK: Final = 1 << 20
"""The number of bytes to compare at a time."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write tensors atomically as safetensors, read the file back to compare it, and return the sha256 of the file.

    Raises:
        OSError: if the disk is full or gone. safetensors reports this only in the text of its own error.
        DamagedFile: if the file reads back differently. In that case, `path` is left unchanged.
    """
    held: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        tensor = value.detach().cpu().contiguous()
        # safetensors rejects tensors that share memory, such as tied weights, so such tensors are cloned.
        held[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in places else tensor
        places.add(tensor.untyped_storage().data_ptr())
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
    """Return the sha256 of the tensors' names, dtypes and content."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        held = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(held.numpy()))  # type: ignore[arg-type]
    return digest.hexdigest()


def check_written(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Return the sha256 of the file. Raise DamagedFile unless the file contains the tensors byte for byte.

    The file is read instead of mapped into memory, so that a lost disk raises an error instead of killing the process.
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
                # Python compares bytearrays as memory, but memoryviews element by element.
                if stream.readinto(buffer) != len(wanted) or buffer != wanted:
                    raise DamagedFile(f"{path} was written, but {name} reads back differently: check the disk")
                digest.update(buffer)
        if stream.read(1):
            raise DamagedFile(f"{path} was written, but is longer than its tensors: check the disk")
    return digest.hexdigest()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file.

    Raises:
        DamagedFile: if the file is not a complete safetensors file.
    """
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            # safetensors cannot open paths that are not valid UTF-8.
            return load(path.read_bytes())
        return load_file(path)
    except SafetensorError as error:
        raise DamagedFile(f"{path} is not a complete safetensors file ({error})") from None


def check_finite(tensors: Mapping[str, Tensor], where: Path | str) -> None:
    """Raise DamagedFile for the first tensor that is not finite; the message includes `where`."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise DamagedFile(
                f"{where} contains weights that are not finite (tensor {name}): it was damaged, or its training "
                "diverged. Use other weights"
            )


def read_cached(file: Path | None) -> dict[str, Tensor]:
    """Return the tensors that `write_cached` or `write_verified` wrote to this file, or an empty dict if it is missing
    or damaged."""
    if file is None:
        return {}
    try:
        held = read_tensors(file)
        digest = held.pop(DIGEST, None)
        return held if digest is not None and torch.equal(digest, _digest(file, held)) else {}
    except (DamagedFile, OSError):
        return {}


def write_cached(file: Path | None, tensors: Mapping[str, Tensor]) -> None:
    """Cache tensors with their digest. Errors are ignored, because a missing cache only costs time."""
    if file is not None:
        with contextlib.suppress(DamagedFile, OSError, SafetensorError):
            write_verified(file, tensors)


def write_verified(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their digest, which `read_cached` checks.

    Raises:
        OSError, DamagedFile: see `write_tensors`.
    """
    write_tensors(file, {**tensors, DIGEST: _digest(file, tensors)})


def _digest(file: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the sha256 of the file's name and of the named tensors, as a tensor of 32 bytes."""
    digest = hashlib.sha256(file.name.encode())
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
