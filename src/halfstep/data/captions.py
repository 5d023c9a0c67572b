"""Folders of captioned images or captioned clips (for clips, see data/clips.py).

The captions are either in a table (metadata.jsonl, metadata.csv or metadata.parquet) or in a .txt file next to each
image or clip: a.txt for a.png, or for a folder of frames named a. Tables have the `imagefolder` format of the
`datasets` library: the column file_name contains paths relative to the table's folder, and the column text contains the
captions. Other columns are ignored.
"""

import json
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, Final, final

import torch
from torch import Tensor

from halfstep.data.base import MemoryData
from halfstep.data.folders import (
    IMAGE_SUFFIXES,
    SOUND_SUFFIXES,
    VIDEO_SUFFIXES,
    Files,
    files_below,
    has_folder,
    image_folder,
    image_paths,
    no_images,
)
from halfstep.data.images import Labelled, decoded
from halfstep.data.preparation import Preparation
from halfstep.runtime.files import check_regular, first_line, user_path

TABLES: Final = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
COLUMNS: Final = ("file_name", "text")
"""The columns of a table that are read."""
FORMATS: Final = {
    ".jsonl": ", as UTF-8 and with one JSON object per line",
    ".csv": ", as UTF-8 and with quotes around texts that contain commas",
    ".parquet": "",
}
"""Advice on saving a table, by its suffix."""
RGB: Final = Preparation(channels=3)
"""Converts images to RGB and keeps their original size."""


@final
@dataclass(frozen=True, eq=False)
class CaptionedImages:
    """The image files in the folder `source` and its sub-folders, each with a caption, which may be empty.

    Raises:
        ValueError: if there are no files, or if the number of captions differs from the number of files.
    """

    source: str
    files: tuple[Path, ...]
    """The paths of the images, relative to `source`."""
    captions: tuple[str, ...]
    preparation: Preparation

    def __post_init__(self) -> None:
        if not self.files or len(self.files) != len(self.captions):
            raise ValueError(
                f"{self.source} does not have one caption per image (images: {len(self.files)}, captions: "
                f"{len(self.captions)}): pass at least 1 image, and one caption per image"
            )

    def __len__(self) -> int:
        return len(self.files)

    @property
    def root(self) -> Path:
        """The folder that the paths in `files` are relative to."""
        return user_path(self.source)

    @property
    def contents(self) -> list[Path]:
        """The full paths of all images, in order."""
        return [self.root / path for path in self.files]

    def x0(self, indices: Sequence[int]) -> Tensor:
        """Return the prepared pixels in [-1, 1], float32 `[n, 3, height, width]`; raise the same errors as `loaded`."""
        x0 = self.loaded(indices).fetch(torch.arange(len(indices))).x0
        if x0.shape[1] != 3:
            raise ValueError(
                f"{self.files[indices[0]]} has {x0.shape[1]} channels, but encoders take 3: prepare the images with "
                f"channels=3"
            )
        return x0

    def loaded(self, indices: Sequence[int]) -> MemoryData:
        """Load and prepare the images at `indices`, which must not be empty.

        Raises:
            ValueError: if an image cannot be decoded, or if its channels or size differ from those of the first image.
        """
        files = Files(self.root, tuple(self.files[index] for index in indices))
        data = decoded(self.source, Labelled(files), self.preparation, sys.maxsize)
        assert isinstance(data, MemoryData)
        return data


@final
@dataclass(frozen=True, eq=False)
class Prompts:
    """Texts without images. Their latents are sampled from a model."""

    source: str
    captions: tuple[str, ...]
    sampled: Callable[[range, Mapping[str, Tensor]], Tensor]
    """Maps the indices and conditions of texts to latents `[n, *dims]`."""
    guidance_scale: float | None = None
    """The guidance scale at which `sampled` samples; 1 is no guidance. None if the model cannot be guided."""

    def __len__(self) -> int:
        return len(self.captions)


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the non-empty lines of a text file.

    Raises:
        ValueError: if the file is missing, is not a text file or contains no text.
    """
    file = path.expanduser()
    if not file.is_file():
        problem = "is not a file" if file.exists() else "does not exist"
        raise ValueError(f"{path} {problem}: pass a text file with one prompt per line")
    # Unlike splitlines, this does not split prompts at separators such as U+2028.
    prompts = tuple(line.strip() for line in _read_text(file).split("\n") if line.strip())
    if not prompts:
        raise ValueError(f"{path} contains no prompts: write one prompt per line")
    return prompts


def read_captions(folder: Path, preparation: Preparation = RGB) -> CaptionedImages:
    """Find all images in the folder and its sub-folders, along with their captions, sorted by relative path.

    Leading and trailing whitespace in .txt files is removed. A null in a table means an empty caption. Hidden files are
    ignored.

    Raises:
        ValueError: if the folder is missing or has no images; if an image has no caption, two captions, or both a row
            in a table and a .txt file; if a caption has no image; or if a table or a .txt file cannot be read.
    """
    root = existing(folder, "of images with captions")
    below = files_below(root)
    if has_folder(root, "train") and (other := {path.parts[0] for path in below} & {"test", "validation", "val"}):
        raise ValueError(
            f"{folder} contains the splits train and {min(other)}: pass one of them, such as {folder / 'train'}"
        )
    files = [path for path in below if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise no_images(folder)
    captions = captions_of(folder, files, below, "image")
    return CaptionedImages(str(folder), tuple(map(Path, files)), captions, preparation)


def captions_of(folder: Path, files: Sequence[PurePath], below: Sequence[PurePath], kind: str) -> tuple[str, ...]:
    """Return the captions of `files`, which are all of the same kind. `below` lists all files in the folder.

    Raises:
        ValueError: as described in `read_captions`.
    """
    root = user_path(folder)
    tables = [path for path in below if path.name in TABLES]
    beside = {path.with_suffix(""): path for path in below if path.suffix.lower() == ".txt"}
    captions = _from_tables(root, files, tables, beside, kind) if tables else _from_texts(root, files, beside, kind)
    if missing := [path for path in files if path not in captions]:
        remedy = f"add it to {tables[0]}" if tables else f"write {_stem(missing[0])}.txt or a file metadata.jsonl"
        if not tables and (like := [path for path in below if path.stem == "metadata"]):
            remedy = f"rename {like[0]} to one of {', '.join(TABLES)}"
        raise ValueError(
            f"{folder} has no caption for {len(missing)} of {len(files)} {kind}s, the first of which is {missing[0]}: "
            f"{remedy}. A caption may be empty"
        )
    return tuple(captions[path] for path in files)


def _one(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"


def _stem(path: PurePath) -> PurePath:
    """Return the path without its file suffix. A dot in a folder's name does not start a suffix."""
    return path.with_suffix("") if path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, *SOUND_SUFFIXES) else path


def read_classes(folder: Path, preparation: Preparation = RGB) -> tuple[CaptionedImages, tuple[str, ...]]:
    """Read a folder with one sub-folder per class; return its images, captioned with their classes, and the classes.

    Raises:
        ValueError: if the folder is missing, has no images or has fewer than two classes.
    """
    root = existing(folder, "with a sub-folder of images for each class")
    found = image_folder(root, image_paths(root, files_below(root, "train")), "train", labels=True, limit=None)
    if found.labels is None:
        raise ValueError(f"{folder} has no classes: put the images of each class into a separate sub-folder")
    assert isinstance(found.images, Files)
    captions = tuple(found.class_names[label] for label in found.labels.tolist())
    files = tuple(map(Path, found.images.paths))
    return CaptionedImages(str(found.images.root), files, captions, preparation), found.class_names


def existing(folder: Path, content: str) -> Path:
    """Return the path of a folder, or raise ValueError with its expected `content` if it does not exist."""
    root = user_path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is {'not a folder' if root.exists() else 'missing'}: pass a folder {content}")
    return root


def _from_texts(
    root: Path, files: Sequence[PurePath], beside: dict[PurePath, PurePath], kind: str
) -> dict[PurePath, str]:
    """Return the captions in the .txt files next to `files`."""
    stems = {_stem(path) for path in files}
    if lost := sorted(path for stem, path in beside.items() if stem not in stems):
        raise ValueError(
            f"{root} has captions without {_one(kind)} ({len(lost)} in total, such as {lost[0]}): add the {kind}s, "
            f"or move the .txt files out of the folder"
        )
    texts = {stem: _read_text(root / path) for stem, path in beside.items()}
    return {path: texts[_stem(path)] for path in files if _stem(path) in texts}


def _read_text(path: Path) -> str:
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text ({first_line(error)}): save it as UTF-8") from error


def _from_tables(
    root: Path,
    files: Sequence[PurePath],
    tables: Sequence[PurePath],
    beside: dict[PurePath, PurePath],
    kind: str,
) -> dict[PurePath, str]:
    """Return the captions in the tables; raise ValueError unless each row refers to a different file."""
    if both := [path for path in files if _stem(path) in beside]:
        raise ValueError(
            f"{root} has captions both in {tables[0]} and in {beside[_stem(both[0])]}: keep either the tables or the "
            f".txt files"
        )
    # A file name can have two Unicode forms: \u00e9 is one code point on most systems and two on macOS.
    known = {_composed(path): path for path in files}
    captions: dict[PurePath, str] = {}
    places: dict[PurePath, str] = {}
    for table in tables:
        for row, (name, caption) in enumerate(_rows(root / table), 1):
            where = f"{root / table} row {row}"
            named = table.parent / PurePosixPath(name.replace("\\", "/"))
            path = known.get(_composed(named))
            if path is None:
                raise ValueError(
                    f"{where} has a caption for {name}, but {root / named} is not {_one(kind)} in the folder: write "
                    f"names relative to the table's folder, add the {kind}, or remove the row"
                )
            if path in captions:
                raise ValueError(
                    f"{where} has a second caption for {name}, in addition to {places[path]}: keep one of the two rows"
                )
            captions[path], places[path] = caption, where
    return captions


def _composed(path: PurePath) -> str:
    return unicodedata.normalize("NFC", path.as_posix())


def _rows(path: Path) -> list[tuple[str, str]]:
    """Return the file_name and text of each row in a table."""
    import pyarrow as pa  # type: ignore[import-untyped]

    if path.stat().st_size == 0:
        return []
    try:
        names, captions = _json_columns(path) if path.suffix == ".jsonl" else _arrow_columns(path)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({first_line(error)}): save it with the columns {' and '.join(COLUMNS)}"
            f"{FORMATS[path.suffix]}"
        ) from error
    if None in names:
        raise ValueError(f"{path} row {names.index(None) + 1} has no file_name: add the file name, or remove the row")
    return [(str(name), caption or "") for name, caption in zip(names, captions, strict=True)]


def _check_columns(found: Sequence[str]) -> None:
    """Raise ValueError unless each column that is read exists once."""
    if missing := set(COLUMNS) - set(found):
        raise ValueError(f"it has no column {min(missing)!r}, only these: {', '.join(found) or 'none'}")
    if several := [name for name in COLUMNS if found.count(name) > 1]:
        raise ValueError(f"it has several columns {several[0]!r}")


def _json_columns(path: Path) -> list[list[str | None]]:
    """Return the `COLUMNS` of a .jsonl file. A number becomes the text that it is written as."""
    # pyarrow's reader is not used: it either infers a type for each column, which turns dates into timestamps and
    # rejects columns with values of several types, or it rejects captions that are numbers.
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        try:
            rows += [_json_row(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    _check_columns(list(dict.fromkeys(name for row in rows for name in row)))
    return [[row.get(name) for row in rows] for name in COLUMNS]


def _json_row(line: str) -> dict[str, Any]:
    row = json.loads(line, parse_int=str, parse_float=str)
    if not isinstance(row, dict):
        raise ValueError("it is not a JSON object")
    for name, value in ((name, row.get(name)) for name in COLUMNS):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"the {name} is a {type(value).__name__}, not a string")
        # A JSON string may contain half of a surrogate pair, which cannot be encoded.
        (value or "").encode()
    return row


def _arrow_columns(path: Path) -> list[list[str | None]]:
    """Return the `COLUMNS` of a .csv or .parquet file."""
    import pyarrow as pa
    from pyarrow import csv, parquet

    # `imagefolder` itself is not used, because in .csv files it treats the captions "NA" and "None" as missing, and
    # shifts the columns of rows with an extra field.
    if path.suffix == ".csv":
        types = dict.fromkeys(COLUMNS, pa.string())
        table = csv.read_csv(
            path, None, csv.ParseOptions(newlines_in_values=True), csv.ConvertOptions(column_types=types)
        )
        _check_columns(table.column_names)
    else:
        _check_columns(parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=list(COLUMNS))
    return [table[name].cast(pa.string()).to_pylist() for name in COLUMNS]
