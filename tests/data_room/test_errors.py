"""Every error is a single line that names the cause and the remedy."""

import builtins
import errno
import io
import os
import shutil
import socket
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.core.draw import Draw
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import DataConfig, MemoryData, open_data, training_batch
from halfstep.data.folders import files_below
from halfstep.data.images import _is_doubtful

os.environ["HF_HUB_OFFLINE"] = "1"


def refused(source: object, *words: str, **settings: object) -> None:
    """Assert that opening raises a one-line ValueError that contains all of `words`."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are checked below
        open_data(DataConfig(source=str(source), **settings))  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def image(path: Path, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros(shape, np.uint8)).save(path)
    return path


def array(folder: Path, x: np.ndarray, **labels: np.ndarray) -> Path:
    np.savez(folder / "d.npz", x=x, **labels)
    return folder / "d.npz"


@pytest.mark.parametrize("source", ["nowhere", "/no/such/folder", "./a/b", "digit"])
def test_missing(source):
    refused(source, source, "does not exist", "digits")


def test_a_hub_name_that_cannot_be_reached():
    refused("owner/nothing-of-the-kind", "owner/nothing-of-the-kind", "Hub")


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "d.zip").write_bytes(b"PK")
    refused(tmp_path / "d.zip", "d.zip", ".npz")


def test_files_that_numpy_takes_for_pickles_are_rejected_without_its_advice(tmp_path):
    (tmp_path / "d.npy").write_text("1, 2, 3")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    for name in ("d.npy", "objects.npy"):
        with pytest.raises(ValueError, match="it is not a NumPy file, or it contains Python objects") as caught:
            open_data(DataConfig(source=str(tmp_path / name)))
        assert "pickle" not in str(caught.value)


def test_the_folder_of_a_run_is_no_data(tmp_path):
    image(tmp_path / "stages" / "00-denoise" / "samples" / "steps-0004.png", 4, 4)
    (tmp_path / "recipe.json").touch()
    refused(tmp_path, str(tmp_path), "is a run folder, not data")


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    for name in ("cats/0.png", "dogs/1.png"):
        image(tmp_path / name, 4, 4)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("dogs"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refused(tmp_path, "dogs cannot be read (Permission denied)", "Make it readable")


def test_folders_of_a_file_system_and_folders_that_were_removed_are_skipped(tmp_path, monkeypatch):
    for name in ("cats/0.png", "dogs/1.png", "lost+found/2.png"):
        image(tmp_path / name, 4, 4)
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        if str(path).endswith("dogs"):
            shutil.rmtree(path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert files_below(tmp_path) == [Path("cats/0.png")]
    with pytest.raises(ValueError, match="none cannot be read"):
        files_below(tmp_path / "none")


def test_each_image_is_opened_once_by_the_check(tmp_path, monkeypatch):
    image(tmp_path / "a.png", 4, 4)
    opened, io_open = [], io.open

    def counted(file, *arguments, **keywords):
        opened.append(file)
        return io_open(file, *arguments, **keywords)

    monkeypatch.setattr(io, "open", counted)
    monkeypatch.setattr(builtins, "open", counted)
    assert not _is_doubtful(tmp_path / "a.png")
    assert len(opened) == 1


def test_an_empty_folder(tmp_path):
    refused(tmp_path, str(tmp_path), "no images", ".png", ".webp")


LAZY = {"image_size": 4, "channels": 1, "max_bytes": 0}


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
def test_an_unreadable_image(tmp_path, settings):
    for name in ("a.png", "c.png"):
        image(tmp_path / name, 40, 40)
    whole = image(tmp_path / "b.png", 40, 40).read_bytes()
    for damaged in (b"not an image", b"", whole[: len(whole) // 2]):
        (tmp_path / "b.png").write_bytes(damaged)
        refused(tmp_path, "b.png", "remove it", "--data.skip-broken", **settings)
    (tmp_path / "a.png").write_bytes(b"broken too")
    refused(tmp_path, "2 of 3 images", "a.png", "b.png", "--data.skip-broken", **settings)
    with pytest.warns(HalfstepWarning, match="2 of 3 images.*skipped.*a.png.*b.png"):
        data = open_data(DataConfig(source=str(tmp_path), skip_broken=True, **settings))
    assert len(data) == 1
    assert data.fetch(torch.tensor([0])).x0.max() == -1
    (tmp_path / "c.png").write_bytes(b"")
    refused(tmp_path, "3 of 3 images", "repair", skip_broken=True, **settings)


def test_an_image_that_is_damaged_or_goes_once_training_has_begun(tmp_path):
    image(tmp_path / "a.png", 40, 40)
    data = open_data(DataConfig(source=str(tmp_path), **LAZY))
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png is not an image"):
        data.fetch(torch.tensor([0]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png is missing"):
        data.fetch(torch.tensor([0]))


def test_skipping_the_only_image_of_a_class_removes_the_class(tmp_path):
    for name in ("a/0.png", "b/0.png", "c/0.png"):
        image(tmp_path / name, 4, 4)
    (tmp_path / "b/0.png").write_bytes(b"")
    with pytest.warns(HalfstepWarning, match="b/0.png"):
        data = open_data(DataConfig(source=str(tmp_path), skip_broken=True))
    assert data.class_names == ("a", "c")
    assert data.fetch(torch.arange(2)).cond["class_labels"].tolist() == [0, 1]


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
@pytest.mark.parametrize("kind", ["FIFO", "socket", "device"])
def test_special_files_are_rejected_without_hanging(tmp_path, monkeypatch, kind, settings):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    image(Path("im/a.png"), 4, 4)
    if kind == "FIFO":
        os.mkfifo("im/z.png")
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind("im/z.png")
    else:
        Path("im/z.png").symlink_to("/dev/null")
    refused("im", "z.png", f"a {kind}", **settings)


def test_a_link_to_nothing(tmp_path):
    image(tmp_path / "a.png", 4, 4)
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    refused(tmp_path, "b.png is missing")


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
def test_deep_images(tmp_path, settings):
    image(tmp_path / "0.png", 4, 4)
    Image.fromarray(np.full((4, 4), 1000, np.uint16)).save(tmp_path / "a.png")
    refused(tmp_path, "a.png", "8 bits", "I;16", **settings)


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
def test_deep_colour(tmp_path, settings):
    image(tmp_path / "0.png", 1, 1)

    # Pillow cannot write it: one row of one white pixel, 3 x 16 bits.
    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" + b"\xff" * 6)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", pixels) + part(b"IEND", b"")
    )
    refused(tmp_path, "a.png", "8 bits", "16-bit colour", **settings)


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
def test_a_scene_with_more_pixels_than_pillow_decodes(tmp_path, monkeypatch, settings):
    image(tmp_path / "0.png", 20, 20)
    image(tmp_path / "a.png", 40, 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    refused(tmp_path, "a.png has 1,600 pixels", "scale it down", **settings)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"II*\0" + bytes(40), "an unsupported kind of TIFF"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_image_is_described(tmp_path, content, words):
    (tmp_path / "a.png").write_bytes(content)
    refused(tmp_path, "a.png", words)


def test_suffixes_that_are_skipped_are_counted(tmp_path):
    for name in ("x.jfif", "y.JFIF", "z.heic", "noname"):
        (tmp_path / name).write_bytes(b"")
    refused(tmp_path, "2 .jfif, 1 .heic, 1 without a suffix")
    image(tmp_path / "a.png", 4, 4)
    (tmp_path / "readme.txt").write_text("beside images this is not a surprise")
    with pytest.warns(HalfstepWarning, match="4 in total: 2 .jfif, 1 .heic, 1 without a suffix") as caught:
        open_data(DataConfig(source=str(tmp_path)))
    assert len(caught) == 1


def test_a_folder_that_may_be_a_split_or_a_class(tmp_path):
    for name in ("train/0.png", "plane/0.png", "test/0.png"):
        image(tmp_path / name, 4, 4)
    refused(tmp_path, "train and plane", "split or a class")
    (tmp_path / "plane/0.png").unlink()
    (tmp_path / "plane").rmdir()
    assert len(open_data(DataConfig(source=str(tmp_path)))) == 1
    (tmp_path / "train").rename(tmp_path / "val")
    refused(tmp_path, "no sub-folder train, but test, val", "--data.split", "--data.no-labels")
    assert len(open_data(DataConfig(source=str(tmp_path), labels=False))) == 2


def test_mixed_channels(tmp_path):
    image(tmp_path / "a.png", 4, 4)
    image(tmp_path / "b.png", 4, 4, 3)
    refused(tmp_path, "a.png", "b.png", "--data.channels 3")


def test_mixed_sizes(tmp_path):
    image(tmp_path / "a.png", 4, 6)
    image(tmp_path / "b.png", 5, 6)
    refused(tmp_path, "a.png is 6x4", "b.png is 6x5", "--data.image-size 32")


def test_a_large_folder_without_a_common_form(tmp_path):
    image(tmp_path / "a.png", 4, 4)
    for settings in ({}, {"image_size": 4}, {"channels": 1}):
        refused(tmp_path, str(tmp_path), "--data.image-size", "--data.channels", max_bytes=0, **settings)


def test_images_beside_tables(tmp_path):
    image(tmp_path / "preview.png", 4, 4)
    (tmp_path / "train.parquet").write_bytes(b"")
    refused(tmp_path, "preview.png", "train.parquet")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_values_that_are_not_finite(tmp_path, bad):
    x = np.zeros((4, 2, 3))
    x[2, 1, 0] = x[3, 0, 0] = bad
    refused(array(tmp_path, x), "d.npz", "2 in total", "[2, 1, 0]")


def test_python_objects(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    refused(tmp_path / "x.npy", "x.npy", "plain arrays")
    refused(array(tmp_path, np.array([{}, []], dtype=object)), "d.npz", "plain arrays")


@pytest.mark.parametrize("name", ["x.npy", "x.npz"])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9])
def test_truncated_arrays(tmp_path, name, kept):
    (np.save if name.endswith("y") else np.savez_compressed)(
        tmp_path / name, np.random.default_rng(0).normal(size=(50, 9))
    )
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    refused(tmp_path / name, name, "cannot be read")


def test_a_missing_array_file(tmp_path):
    refused(tmp_path / "x.npy", "x.npy", "not a file")


def test_an_archive_without_samples(tmp_path):
    np.savez(tmp_path / "d.npz", a=np.zeros(3), b=np.zeros(3))
    refused(tmp_path / "d.npz", "a, b", "arr_0")


@pytest.mark.parametrize(
    ("x", "word"),
    [
        (np.zeros((5, 4), np.uint8), "(5, 4)"),
        (np.zeros((5, 3, 4, 4, 3), np.uint8), "(5, 3, 4, 4, 3)"),
        (np.zeros((5, 3, 8, 8), np.uint8), "move the channels to the last axis"),
        (np.zeros(5), "(5,)"),
        (np.float64(1.0), "a single number"),
        (np.zeros((5, 4), np.int64), "int64"),
        (np.zeros((5, 4), np.complex64), "complex64"),
        (np.zeros((0, 4, 4), np.uint8), "no samples"),
        (np.zeros((0, 4)), "no samples"),
    ],
)
def test_arrays_of_another_kind(tmp_path, x, word):
    refused(array(tmp_path, x), "d.npz", word)


@pytest.mark.parametrize(
    ("y", "word"),
    [
        (np.zeros(4, np.int64), "(4,)"),
        (np.zeros((5, 1), np.int64), "(5, 1)"),
        (np.zeros(5), "float64"),
        (np.array([0, 1, -1, 0, 0]), "-1"),
    ],
)
def test_labels_of_another_kind(tmp_path, y, word):
    path = array(tmp_path, np.zeros((5, 4)), y=y)
    refused(path, "d.npz", word, "--data.no-labels")
    assert open_data(DataConfig(source=str(path), labels=False)).num_classes == 0


def test_labels_that_are_identifiers(tmp_path):
    rows = np.arange(40) * 2500
    refused(array(tmp_path, np.zeros((40, 4)), y=rows), "40 classes for 40 samples", "0 to 97500", "--data.no-labels")
    for number in range(11):
        image(tmp_path / f"people/{number}/0.png", 4, 4)
    refused(tmp_path / "people", "11 classes for 11 samples", "--data.no-labels")


def test_an_archive_member_that_is_not_an_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive:
        archive.writestr("x", b"text")
    refused(tmp_path / "d.npz", "its member x is not an array")


def test_unknown_splits(tmp_path):
    import datasets

    image(tmp_path / "images/a.png", 4, 4)
    rows = datasets.Dataset.from_dict({"scan": [Image.new("L", (4, 4))]}).cast_column("scan", datasets.Image())
    rows.to_parquet(tmp_path / "parquet/train.parquet")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "saved")
    refused("digits", "'tset'", "train", split="tset")
    for folder in ("images", "parquet", "saved"):
        refused(tmp_path / folder, folder, "tset", "train", split="tset")


def test_tables_without_one_way_to_read_them(tmp_path):
    import datasets

    label = datasets.ClassLabel(names=["x", "y"])
    rows = datasets.Dataset.from_dict({"a": [0], "b": [1]}, features=datasets.Features({"a": label, "b": label}))
    rows.to_parquet(tmp_path / "none/train.parquet")
    refused(tmp_path / "none", "0 Image columns", "a (ClassLabel)")
    rows = rows.add_column("scan", [{"path": None, "bytes": b"broken"}]).cast_column("scan", datasets.Image())
    rows.to_parquet(tmp_path / "two/train.parquet")
    refused(tmp_path / "two", "a, b", "--data.label-column")
    refused(tmp_path / "two", "'c'", "a, b", label_column="c")
    refused(tmp_path / "two", "row 0", "scan", label_column="a")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train.parquet").write_bytes(b"not parquet")
    refused(tmp_path / "bad", "bad", "cannot be opened")


def test_a_label_that_is_missing_in_a_table(tmp_path):
    import datasets

    features = datasets.Features({"scan": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y"])})
    rows = datasets.Dataset.from_dict({"scan": [Image.new("L", (4, 4))] * 2, "kind": [0, None]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    refused(tmp_path, "label -1 at sample 1", "--data.no-labels")


@pytest.mark.parametrize("settings", [LAZY, {}], ids=["lazy", "in memory"])
@pytest.mark.parametrize("form", ["bytes", "path"])
def test_a_missing_image_in_a_table_is_found_or_skipped_when_the_data_is_opened(tmp_path, settings, form):
    import datasets

    files = [image(tmp_path / f"images/{index}.png", 4, 4) for index in range(7)]
    cells = [{"bytes": None, "path": str(file)} for file in files]
    if form == "bytes":
        cells = [{"bytes": file.read_bytes(), "path": None} for file in files]
    features = datasets.Features({"scan": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])})

    def opened(**more):
        rows = datasets.Dataset.from_dict({"scan": cells, "kind": [2, 0, 0, 1, 0, 2, 0]}, features=features)
        rows.save_to_disk(tmp_path / "rows")
        return open_data(DataConfig(source=str(tmp_path / "rows"), **settings, **more))

    assert len(opened()) == 7
    cells[3] = None
    with pytest.raises(
        ValueError, match=r"row 3 of .* is missing: remove the row; or skip it with --data\.skip-broken"
    ):
        opened()
    cells[0] = None
    with pytest.raises(ValueError, match=r"2 of 7 images.*skip-broken.*row 0 of.*row 3 of"):
        opened()
    with pytest.warns(HalfstepWarning, match="2 of 7 images.*skipped.*row 0 of.*row 3 of"):
        data = opened(skip_broken=True)
    batch = data.fetch(torch.arange(5))
    assert batch.x0.shape == (5, 1, 4, 4)
    assert batch.cond["class_labels"].tolist() == [0, 0, 0, 1, 0]
    assert data.class_names == ("x", "z")
    assert len(data.fingerprint) == 64
    cells[:] = [None] * 7
    with pytest.raises(ValueError, match=r"7 of 7 images.*repair or remove"):
        opened(skip_broken=True)


def test_a_row_that_is_damaged_is_named_by_its_number_in_the_table_after_others_are_skipped(tmp_path):
    import datasets

    whole = image(tmp_path / "images/0.png", 4, 4).read_bytes()
    cells = [{"bytes": whole, "path": None}, None, {"bytes": whole, "path": None}, {"bytes": b"broken", "path": None}]
    rows = datasets.Dataset.from_dict({"scan": cells}, features=datasets.Features({"scan": datasets.Image()}))
    rows.save_to_disk(tmp_path / "rows")
    with pytest.warns(HalfstepWarning, match="row 1 of"):
        data = open_data(DataConfig(source=str(tmp_path / "rows"), skip_broken=True, **LAZY))
    with pytest.raises(ValueError, match="row 3 of"):
        data.fetch(torch.arange(3))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"limit": 0}, "--data.limit is 0"),
        ({"image_size": -1}, "--data.image-size is -1"),
        ({"resize": "stretch"}, "--data.image-size"),
        ({"resample": "area"}, "--data.image-size"),
        ({"label_column": "y"}, "--data.label-column"),
        ({"label_column": "y", "labels": False}, "--data.no-labels"),
    ],
)
def test_settings_out_of_range_or_ignored(settings, word):
    refused("digits", word, **settings)


def test_floats_are_not_prepared_or_mirrored(tmp_path):
    path = array(tmp_path, np.zeros((5, 3, 4, 4)))
    refused(path, "--data.image-size", image_size=4)
    refused(path, "--data.channels", channels=3)
    refused(path, "--data.no-flip", flip=True)
    draw = Draw(seed=0, stream="s", update=0, batch_size=2, places=range(2))
    with pytest.raises(ValueError, match="mirrored"):
        training_batch(open_data(DataConfig(source=str(path))), draw, True)


def test_memory_data_checks_what_it_is_given():
    x = torch.zeros(3, 2)
    for arguments, word in [
        ((x.double(),), "float64"),
        ((x.byte(),), "uint8"),
        ((x, None, ("a",)), "no labels"),
        ((x, torch.zeros(3), ("a",)), "int64"),
        ((x, torch.tensor([0, 1, 0]), ("a",)), "label 1 at sample 1"),
    ]:
        with pytest.raises(ValueError, match=word):
            MemoryData("mine", *arguments)
