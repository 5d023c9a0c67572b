"""Data sets in the Hub's layout, from a folder or by name, opened by the `datasets` library."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from halfstep.data.base import Data, first_line
from halfstep.data.images import EncodedImages, Preparation, decoded


@final
@dataclass(frozen=True, eq=False)
class _Rows(EncodedImages):
    rows: Any
    """A `datasets.Dataset` whose image column is not decoded."""
    column: str
    source: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"number {index} of {self.source}"

    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes]:
        cells = self.rows[list(indices)][self.column]
        return [cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]) for cell in cells]

    def sizes(self) -> Iterator[tuple[str, int]]:
        yield self.rows._fingerprint, len(self.rows)


def dataset_source(
    source: str, split: str, prepare: Preparation, labels: bool, limit: int | None, max_bytes: int
) -> Data:
    """The image column of a data set, with its class column where it has one; the columns are found by their types.

    Raises:
        ValueError: if it cannot be opened, has no such split or no image column, or its images differ.
    """
    import datasets

    datasets.disable_progress_bars()
    rows = _opened(source, split)
    image = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if image is None:
        kinds = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in rows.features.items())
        raise ValueError(f"{source} has no column of images, but {kinds}: use a data set with an Image column")
    label = next((name for name, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if len(rows) == 0:
        raise ValueError(f"{source} has no samples in its split {split!r}")
    indices, names = None, ()
    if labels and label is not None:
        indices, names = torch.tensor(rows[label][:], dtype=torch.int64), tuple(rows.features[label].names)
    rows = rows.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    return decoded(source, _Rows(rows, image, source), indices, names, prepare, max_bytes)


def _opened(source: str, split: str) -> Any:
    import datasets

    try:
        if (Path(source) / "dataset_dict.json").is_file() or (Path(source) / "state.json").is_file():
            held = datasets.load_from_disk(source)
            splits = held if isinstance(held, datasets.DatasetDict) else {"train": held}
        else:
            splits = datasets.load_dataset(source)
    except Exception as error:
        # The library raises whatever its formats and its network do; all of it means that the source is not usable.
        where = "this folder" if Path(source).exists() else "the Hub (is the name right, and the network there?)"
        raise ValueError(f"{source} cannot be opened as a data set from {where}: {first_line(error)}") from None
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}: give --data.split, one of {', '.join(splits)}")
    return splits[split]
