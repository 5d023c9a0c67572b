"""Data opened with the `datasets` library: folders of tables, folders saved by the library, and Hub data sets."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray

from halfstep.data.images import EncodedImages, Labelled, numbered
from halfstep.runtime.files import first_line, user_path


@final
@dataclass(frozen=True, eq=False)
class Column(EncodedImages):
    """A column of encoded images in a `datasets.Dataset` in arrow format."""

    source: str
    rows: Any
    column: str
    numbers: NDArray[np.int64]
    """The numbers of the rows in the source, `[len(rows)]`."""

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return f"the {self.column} in row {self.numbers[index]} of {self.source}"

    def read(self, indices: Sequence[int]) -> Sequence[Path | bytes | None]:
        cells = self.rows[indices if isinstance(indices, range) else list(indices)][self.column].to_pylist()
        return [_file(cell) for cell in cells]

    def missing(self) -> Sequence[int]:
        return [
            index
            for start, paths, lengths in self._chunks()
            for index, (path, length) in enumerate(zip(paths, lengths, strict=True), start)
            if path is None and length is None
        ]

    def subset(self, indices: Sequence[int]) -> "Column":
        return Column(self.source, self.rows.select(indices), self.column, self.numbers[np.asarray(indices)])

    def sizes(self) -> Iterator[tuple[str, int]]:
        for start, paths, lengths in self._chunks():
            for index, (path, length) in enumerate(zip(paths, lengths, strict=True), start):
                name = str(index) if path is None else Path(path).name
                yield name, Path(path).stat().st_size if length is None and path is not None else length or 0

    def _chunks(self) -> Iterator[tuple[int, list[str | None], list[int | None]]]:
        """Yield the first index, the paths and the sizes in bytes of each 1,024 images, without copying the images."""
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        for start in range(0, len(self), 1024):
            cells = self.rows[start : start + 1024][self.column]
            lengths = pc.binary_length(pc.struct_field(cells, "bytes")).to_pylist()
            yield start, pc.struct_field(cells, "path").to_pylist(), lengths


def _file(cell: dict[str, Any] | None) -> Path | bytes | None:
    if cell is None or (cell["bytes"] is None and cell["path"] is None):
        return None
    return Path(cell["path"]) if cell["bytes"] is None else cell["bytes"]


def table(source: str, split: str, labels: bool, label_column: str | None, limit: int | None) -> Labelled:
    """Return the images and labels of a data set in a folder or on the Hub. Columns are found by type, not by name.

    Raises:
        ValueError: if the source cannot be opened; if the split does not exist or is empty; if the data set does not
            have exactly one Image column; or if it has several ClassLabel columns and `label_column` is None.
    """
    import datasets

    rows = _open(source, split)
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(images) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in rows.features.items())
        raise ValueError(
            f"{source} has {len(images)} Image columns, but exactly one is needed; the columns are {columns}. Convert "
            "one column with cast_column(NAME, Image()) and remove the others"
        )
    if label_column is not None and label_column not in classes:
        known = ", ".join(classes) or "none"
        raise ValueError(f"{source} has no ClassLabel column {label_column!r} for --data.label-column (known: {known})")
    if labels and label_column is None and len(classes) > 1:
        raise ValueError(
            f"{source} has several ClassLabel columns ({', '.join(classes)}): choose one with --data.label-column"
        )
    if len(rows) == 0:
        raise ValueError(f"{source} has no samples in its split {split!r}: at least 1 sample is needed")
    encoded = rows.select_columns(images).cast_column(images[0], datasets.Image(decode=False)).with_format("arrow")
    column = Column(source, encoded, images[0], np.arange(len(rows), dtype=np.int64))
    first = range(len(rows) if limit is None else min(limit, len(rows)))
    if not labels or not classes:
        return Labelled(column.subset(first))
    chosen = label_column or classes[0]
    numbers = rows.select_columns([chosen]).with_format("arrow")[:][chosen].fill_null(-1).to_numpy()
    whole = torch.from_numpy(np.array(numbers, np.int64))
    # Empty classes would otherwise be sampled and measured.
    found = numbered(Labelled(column, whole, tuple(rows.features[chosen].names)))
    assert found.labels is not None
    return Labelled(column.subset(first), found.labels[: len(first)], found.class_names)


def is_saved(root: Path) -> bool:
    """Return whether the folder was written by the `save_to_disk` method of the `datasets` library."""
    return any((root / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _open(source: str, split: str) -> Any:
    """Return the `datasets.Dataset` of a split."""
    import datasets

    root = user_path(source)
    try:
        if not is_saved(root):
            return datasets.load_dataset(str(root.resolve()) if root.is_dir() else source, split=split)
        opened = datasets.load_from_disk(str(root))
    except Exception as error:  # the network, the Hub, builders and parsers raise many exception types
        where = "as a folder of tables" if root.is_dir() else "as a name on the Hub, and is not a local file or folder"
        reason = first_line(error.__cause__ or error)
        raise ValueError(f"{source} (--data.split {split}) cannot be opened {where}: {reason}") from error
    splits = dict(opened) if isinstance(opened, datasets.DatasetDict) else {str(opened.split or "train"): opened}
    if split not in splits:
        raise ValueError(f"{source} has no split {split!r}: choose --data.split from {', '.join(splits)}")
    return splits[split]
