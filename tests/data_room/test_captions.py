"""Captions follow their images, from tables and from text files, and every error is one line."""

import csv
import json
import unicodedata
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.data.captions import CaptionedImages, read_captions, read_prompts
from halfstep.data.preparation import Preparation

CAPTIONS = {"b.png": 'a dog, "sitting"', "a/c.png": "", "a/a.png": "zwei Vögel\nim Baum", "z.png": "a\u2028cat"}
"""Unordered captions: with quotes, commas and line ends, and an empty one."""
ORDERED = ["a/a.png", "a/c.png", "b.png", "z.png"]


def image(path: Path, *shape: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape or (4, 4, 3), dtype=np.uint8)).save(path)
    return path


def write_texts(folder: Path, captions: Mapping[str, str]) -> None:
    for name, caption in captions.items():
        (folder / name).with_suffix(".txt").write_text(f"{caption}\n", encoding="utf-8")


def write_jsonl(folder: Path, captions: Mapping[str, str]) -> None:
    rows = [json.dumps({"width": 4, "file_name": name, "text": caption}) for name, caption in captions.items()]
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n\n", encoding="utf-8")


def write_csv(folder: Path, captions: Mapping[str, str]) -> None:
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "file_name"])
        rows.writerows([caption, f"./{name}"] for name, caption in captions.items())
        rows.writerow([])


def write_two(folder: Path, captions: Mapping[str, str]) -> None:
    """Return a table in each folder, with file names relative to it."""
    write_jsonl(folder / "a", {name[2:]: caption for name, caption in captions.items() if name.startswith("a/")})
    write_csv(folder, {name: caption for name, caption in captions.items() if not name.startswith("a/")})


def refused(folder: Path, *words: str) -> None:
    """Assert that reading raises a one-line ValueError that contains all of `words`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        read_captions(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


# Reading


@pytest.mark.parametrize("write", [write_texts, write_jsonl, write_csv, write_two])
def test_captions_follow_their_images_in_the_order_of_paths(tmp_path, write):
    for name in CAPTIONS:
        image(tmp_path / name)
    image(tmp_path / ".hidden/x.png")
    write(tmp_path, CAPTIONS)
    read = read_captions(tmp_path)
    assert [path.as_posix() for path in read.files] == ORDERED
    assert read.captions == tuple(CAPTIONS[name] for name in ORDERED)
    assert (read.source, len(read)) == (str(tmp_path), 4)


def test_tables_are_those_that_datasets_reads(tmp_path):
    """The library's own reader of such folders finds the same captions."""
    import datasets

    for name in CAPTIONS:
        image(tmp_path / "in" / name)
    write_jsonl(tmp_path / "in", CAPTIONS)
    rows = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "in"), cache_dir=str(tmp_path / "cache"))
    rows = rows["train"].cast_column("image", datasets.Image(decode=False))
    theirs = {str(Path(row["image"]["path"]).relative_to(tmp_path / "in")): row["text"] for row in rows}
    ours = read_captions(tmp_path / "in")
    assert dict(zip(map(str, ours.files), ours.captions, strict=True)) == theirs


def write_parquet(folder: Path, captions: Mapping[str, str]) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(
        pa.table({"file_name": list(captions), "text": list(captions.values())}), folder / "metadata.parquet"
    )


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_words_and_numbers_stay_the_texts_that_they_are(tmp_path, write):
    """Table readers tend to convert these to missing values and numbers."""
    captions = {"a.png": "NA", "b.png": "None", "c.png": "007", "d.png": " x "}
    for name in captions:
        image(tmp_path / name)
    write(tmp_path, captions)
    assert read_captions(tmp_path).captions == tuple(captions.values())


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_parquet])
def test_captions_that_are_all_dates_or_numbers_stay_as_they_are(tmp_path, write):
    """Table readers infer a column's type from its values."""
    for captions in ({"a.png": "2021-05-03", "b.png": "2022-01-02"}, {"a.png": "007", "b.png": "1.50"}):
        for name in captions:
            image(tmp_path / name)
        write(tmp_path, captions)
        assert read_captions(tmp_path).captions == tuple(captions.values())


def test_json_numbers_become_captions(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    rows = ['{"file_name": "a.png", "text": 7}', '{"file_name": "b.png", "text": 1.50}']
    (tmp_path / "metadata.jsonl").write_text("\n".join([*rows, "", '{"file_name": "c.png", "text": "\u2028"}', ""]))
    assert read_captions(tmp_path).captions == ("7", "1.50", "\u2028")


@pytest.mark.parametrize(
    "rows",
    [
        ['{"file_name": "a.png", "text": "x", "score": 1}', '{"file_name": "b.png", "text": "y", "score": "n/a"}'],
        ['{"n": {"text": 1}, "file_name": "a.png", "text": "x"}', '{"n": [[]], "text": "y", "file_name": "b.png"}'],
    ],
)
def test_other_columns_may_have_values_of_several_types(tmp_path, rows):
    for name in ("a.png", "b.png"):
        image(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert read_captions(tmp_path).captions == ("x", "y")


def test_other_columns_of_a_parquet_file_are_not_read(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    image(tmp_path / "a.png")
    table = pa.table({"image": [b"Q" * 999], "file_name": ["a.png"], "text": ["x"], "n": [{"text": 1}]})
    file = tmp_path / "metadata.parquet"
    parquet.write_table(table, file, compression="gzip", use_dictionary=False, write_statistics=False)
    assert read_captions(tmp_path).captions == ("x",)
    file.write_bytes(file.read_bytes().replace(b"\x1f\x8b", b"\x00\x00", 1))  # damages the first column
    with pytest.raises(OSError, match=r"(?i)zlib|gzip|inflate"):
        parquet.read_table(file)
    assert read_captions(tmp_path).captions == ("x",)


def test_names_with_backslashes_and_of_another_spelling_are_found(tmp_path):
    composed, apart = (unicodedata.normalize(form, "s/caf\u00e9.png") for form in ("NFC", "NFD"))
    image(tmp_path / apart)
    write_jsonl(tmp_path, {composed.replace("/", "\\"): "a cat"})
    read = read_captions(tmp_path)
    assert (read.files, read.captions) == ((Path(apart),), ("a cat",))


def test_splits_are_not_mixed_and_mistyped_tables_are_named(tmp_path):
    for split in ("train", "test"):
        image(tmp_path / f"{split}/a.png")
        write_jsonl(tmp_path / split, {"a.png": split})
    refused(tmp_path, "train and test", str(tmp_path / "train"))
    assert read_captions(tmp_path / "test").captions == ("test",)
    (tmp_path / "test/metadata.jsonl").rename(tmp_path / "test/metadata.json1")
    refused(tmp_path / "test", "rename metadata.json1", "metadata.jsonl")


def test_a_null_is_the_empty_caption(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": null}')
    assert read_captions(tmp_path).captions == ("",)


def test_images_are_prepared(tmp_path):
    for index, shape in enumerate([(6, 8, 3), (8, 6)]):
        image(tmp_path / f"{index}.png", *shape, seed=index)
    write_texts(tmp_path, {"0.png": "", "1.png": ""})
    plain = read_captions(tmp_path)
    first = np.asarray(Image.open(tmp_path / "0.png")).transpose(2, 0, 1)
    np.testing.assert_array_equal(plain.loaded([0]).x[0].numpy(), first)
    grey = np.asarray(Image.open(tmp_path / "1.png"))
    np.testing.assert_array_equal(plain.loaded([1]).x[0].numpy(), np.stack([grey] * 3))
    square = read_captions(tmp_path, Preparation(image_size=6, channels=3))
    np.testing.assert_array_equal(square.loaded([0]).x[0].numpy(), first[:, :, 1:7])
    assert square.loaded([0]).x.dtype == torch.uint8
    assert torch.equal(square.loaded([1, 0, 1]).x, square.loaded([0, 1]).x[[1, 0, 1]])


# Errors


def test_a_missing_folder(tmp_path):
    refused(tmp_path / "no", "no is missing", "pass a folder")
    refused(image(tmp_path / "a.png"), "a.png is not a folder")


def test_a_folder_without_images(tmp_path):
    (tmp_path / "a.txt").write_text("a cat")
    refused(tmp_path, str(tmp_path), "no images", ".png")


@pytest.mark.parametrize(("write", "remedy"), [(write_texts, "write b.txt"), (write_jsonl, "add it to metadata.jsonl")])
def test_images_without_a_caption(tmp_path, write, remedy):
    for name in ("a.png", "b.png", "c.png"):
        image(tmp_path / name)
    write(tmp_path, {"a.png": "a cat"})
    refused(tmp_path, str(tmp_path), "2 of 3 images", "the first of which is b.png", remedy)


def test_no_captions_at_all(tmp_path):
    image(tmp_path / "a.png")
    refused(tmp_path, "1 of 1 images", "a.png", "a.txt", "metadata.jsonl")


def test_captions_of_missing_images(tmp_path):
    image(tmp_path / "a.png")
    write_texts(tmp_path, {"a.png": "", "b.png": "", "c.png": ""})
    refused(tmp_path, "captions without an image (2 in total", "b.txt", "move")


@pytest.mark.parametrize("name", ["b.png", "../a.png", "b.heic", ""])
@pytest.mark.parametrize(("write", "line"), [(write_jsonl, "jsonl row 2"), (write_csv, "csv row 2")])
def test_rows_of_missing_images(tmp_path, write, line, name):
    image(tmp_path / "a.png")
    (tmp_path / "b.heic").write_bytes(b"")
    write(tmp_path, {"a.png": "a cat", name: "a dog"})
    refused(tmp_path, line, name, "not an image", "remove the row")


def test_two_captions_of_one_image(tmp_path):
    image(tmp_path / "a.png")
    write_jsonl(tmp_path, {"a.png": "a cat", "./a.png": "a dog"})
    refused(tmp_path, "jsonl row 2", "second caption", "jsonl row 1")
    write_jsonl(tmp_path, {"a.png": "a cat"})
    write_csv(tmp_path, {"a.png": "a cat"})
    refused(tmp_path, "metadata.csv row 1", "metadata.jsonl row 1")


def test_both_kinds(tmp_path):
    image(tmp_path / "a.png")
    write_jsonl(tmp_path, {"a.png": "a cat"})
    write_texts(tmp_path, {"a.png": "a cat"})
    refused(tmp_path, "metadata.jsonl", "a.txt", "keep either the tables or the .txt files")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", ["cannot be read", "JSON"]),
        ("[1]", ["cannot be read", "JSON"]),
        ('{"file_name": "a.png", "caption": "x"}', ["'text'", "file_name, caption"]),
        ('{"file_name": "a.png", "text": ["x"]}', ["cannot be read", "list"]),
        ('{"file_name": null, "text": "x"}', ["row 1", "no file_name"]),
        ('{"file_name": "a.png", "text": "\xe9"}', ["cannot be read", "UTF-8"]),
        ('{"file_name": "a.png", "text": "\\ud83d"}', ["line 1", "surrogates"]),
        ('\n{"file_name": "a.png", "text": true}', ["line 2", "the text is a bool", "one JSON object per line"]),
    ],
)
def test_damaged_jsonl(tmp_path, row, words):
    image(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(row, encoding="latin-1")
    refused(tmp_path, "metadata.jsonl", *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("file_name,text\na.png,a cat, and a dog", ["Expected 2 columns, got 3", "quotes"]),
        ("file_name,text\na.png", ["Expected 2 columns, got 1"]),
        ('file_name,text\na.png,"a cat\nb.png,a dog', ["1 of 2 images", "b.png"]),
        ("file_name,text,text\na.png,a cat,a dog", ["several columns 'text'"]),
        ("a.png,a cat\na.png,a dog", ["'file_name'", "a.png, a cat"]),
        ("", ["1 of 1 images"]),
    ],
)
def test_damaged_csv(tmp_path, rows, words):
    for name in ("a.png", "b.png")[: 1 + ("b.png" in rows)]:
        image(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(rows)
    refused(tmp_path, "metadata.csv", *words)


def test_a_text_file_that_is_not_text(tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, "a.txt", "UTF-8")


def test_a_file_that_is_not_an_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    write_texts(tmp_path, {"a.png": ""})
    with pytest.raises(ValueError, match=r"a\.png is not an image"):
        read_captions(tmp_path).loaded([0])


def test_captions_that_do_not_fit():
    for files, captions in [((), ()), ((Path("a.png"),), ())]:
        with pytest.raises(ValueError, match=f"images: {len(files)}, captions: 0"):
            CaptionedImages("mine", files, captions, Preparation())


def test_prompts_end_at_line_ends_only(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa\u2028cat\r\n\r\n a \x0bdog\x85 \n\nb\nb".encode())
    assert read_prompts(tmp_path / "prompts.txt") == ("a\u2028cat", "a \x0bdog", "b", "b")
