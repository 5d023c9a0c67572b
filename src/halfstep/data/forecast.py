"""The cost of encoding images or prompts, measured on the first batch without writing anything."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import torch
from safetensors.torch import save
from torch import Tensor

from halfstep.data.captions import CaptionedImages, Prompts
from halfstep.data.clips import CaptionedClips
from halfstep.data.encoding import Encoder, Encoding, planned_index, refuse_foreign_files
from halfstep.data.latents import Entry, Index, Stored, is_intact, shard_name
from halfstep.runtime.files import user_path
from halfstep.runtime.processes import Processes

QUICK: Final = 5.0
"""If encoding one image takes longer than this, in seconds, `forecast` does not time a whole batch."""

_STORED: Final = Stored(sha256="0" * 64, size=2**20)
"""A placeholder for a file that has not been written yet."""


@final
@dataclass(frozen=True)
class Forecast:
    """The cost of a call to `encode`."""

    pending: int
    """The number of images that have not been encoded yet."""
    tensors: Mapping[str, Entry]
    """The latents and conditions of one sample, keyed by name."""
    num_bytes: int
    """The size of the complete folder."""
    seconds: float
    """The estimated time that one process needs to encode the pending images."""
    timed: int
    """The number of images that were timed, or 0 if no images are pending."""


def forecast(
    images: CaptionedImages | CaptionedClips | Prompts,
    encoder: Encoder,
    folder: Path | None,
    batch_size: int = 8,
    shard_size: int = 256,
    class_names: Sequence[str] = (),
    repeats: float = 1.0,
) -> Forecast:
    """Return the cost of a call to `encode`, without writing anything.

    The time is measured on the first batch, or on a single image if that takes longer than `QUICK`.

    Args:
        folder: the folder that would be written, or None for a new folder.
        repeats: for prompts, the sampling time of the real call divided by that of `images.sampled`.

    Raises:
        ValueError: as described in `encode`, except that images after the first batch and other processes are not
            checked.
    """
    root = Path() if folder is None else user_path(folder)
    if folder is not None:
        refuse_foreign_files(root)
    index, _ = planned_index(images, encoder, None if folder is None else root, shard_size, tuple(class_names))
    encoding = Encoding(images, encoder, root, batch_size, lambda done, total: None, index, Processes())
    null = encoding.null()
    parts = [
        index.places(number)
        for number, shard in enumerate(index.shards)
        if not is_intact(root / shard_name(number), shard)
    ]
    pending, seconds, timed = sum(map(len, parts)), 0.0, 0
    for size in (1, batch_size) if pending else ():
        part = parts[0][:size]
        seconds, timed = encoding.time(part, repeats) / len(part) * pending, len(part)
        if seconds > QUICK * pending:
            break
    return Forecast(pending, encoding.index.tensors, _size(encoding.index, null), seconds, timed)


def _size(index: Index, null: Mapping[str, Tensor]) -> int:
    """Estimate the size of a complete folder in bytes. A shard's header is about as large as an empty shard."""
    empty = {name: torch.empty(0, *entry.shape, dtype=_dtype(entry)) for name, entry in index.tensors.items()}
    row = sum(math.prod(entry.shape) * _dtype(entry).itemsize for entry in index.tensors.values())
    files = len(save(empty)) * len(index.shards) + len(save(dict(null)))
    written = index.model_copy(update={"null": _STORED, "shards": (_STORED,) * len(index.shards)})
    return row * index.images.count + files + len(json.dumps(written.model_dump(mode="json"), indent=2))


def _dtype(entry: Entry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, entry.dtype)
    return dtype
