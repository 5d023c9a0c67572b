"""Contracts of the data: exact pixels, labels that follow their images, batches that are a function of Draw."""

import itertools
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from sklearn.datasets import load_digits

from halfstep.core.draw import Draw
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import Data, DataConfig, ImageFiles, MemoryData, open_data, training_batch
from halfstep.run.sources import as_source

os.environ["HF_HUB_OFFLINE"] = "1"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def opened(source: object, **settings: object) -> Data:
    return open_data(DataConfig(source=str(source), **settings))  # type: ignore[arg-type]


def pixels(data: Data, *indices: int) -> np.ndarray:
    """Return the uint8 pixels `[n, channels, height, width]` of x0, after checking that x0 is on their grid."""
    x0 = data.fetch(torch.tensor(indices or range(len(data)))).x0
    assert x0.dtype == torch.float32
    exact = (x0 + 1) * 127.5
    torch.testing.assert_close(exact, exact.round(), atol=1e-4, rtol=0)
    return exact.round().numpy().astype(np.uint8)


def labels(data: Data) -> list[int]:
    return data.fetch(torch.arange(len(data))).cond["class_labels"].tolist()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def draw(places: range, size: int = 100, update: int = 3) -> Draw:
    return Draw(seed=1, stream="s", update=update, batch_size=size, places=places)


# Pixels


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 2**32 - 1))
def test_pixels_survive_a_folder_of_png_exactly(tmp_path_factory, height, width, coloured, seed):
    folder = tmp_path_factory.mktemp("png")
    shape = (height, width, 3) if coloured else (height, width)
    arrays = [noise(*shape, seed=seed + index) for index in range(3)]
    for index, array in enumerate(arrays):
        save(folder / f"{index}.png", array)
    data = opened(folder)
    expected = np.stack(arrays).reshape(3, height, width, -1).transpose(0, 3, 1, 2)
    assert data.shape == expected.shape[1:]
    assert data.is_image
    np.testing.assert_array_equal(pixels(data), expected)


def test_black_is_minus_one_and_white_is_one_exactly(tmp_path):
    save(tmp_path / "a.png", np.array([[0, 255]], np.uint8))
    assert opened(tmp_path).fetch(torch.tensor([0])).x0.flatten().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "area", "lanczos"])
@pytest.mark.parametrize(("height", "width"), [(8, 13), (13, 8), (8, 8)])
def test_crop_keeps_the_centre_square_untouched(tmp_path, height, width, resample):
    array = noise(height, width, 3)
    save(tmp_path / "a.png", array)
    top, left = (height - 8) // 2, (width - 8) // 2
    centre = array[top : top + 8, left : left + 8].transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(opened(tmp_path, image_size=8, resample=resample))[0], centre)


def test_crop_does_not_distort_and_stretch_keeps_everything(tmp_path):
    # The left and right quarters are white, the centre square is black.
    array = np.full((16, 32), 255, np.uint8)
    array[:, 8:24] = 0
    save(tmp_path / "a.png", array)
    assert (pixels(opened(tmp_path, image_size=4, resample="area")) == 0).all()
    stretched = pixels(opened(tmp_path, image_size=4, resample="area", resize="stretch"))[0, 0]
    np.testing.assert_array_equal(stretched, np.tile(np.array([255, 0, 0, 255], np.uint8), (4, 1)))


@pytest.mark.parametrize("resample", ["bicubic", "bilinear", "area", "lanczos"])
def test_resizing_is_antialiased(tmp_path, resample):
    """A checkerboard of single pixels becomes grey; a filter that skips pixels would return black or white."""
    array = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    save(tmp_path / "a.png", array.astype(np.uint8))
    assert np.abs(pixels(opened(tmp_path, image_size=8, resample=resample)).astype(int) - 127.5).max() < 16


def test_small_images_are_enlarged(tmp_path):
    save(tmp_path / "a.png", noise(3, 5))
    assert opened(tmp_path, image_size=8).shape == (1, 8, 8)


def test_exif_orientation_turns_the_image(tmp_path):
    array = noise(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the top row was on the right: turned clockwise
    save(tmp_path / "a.png", array, exif=exif)
    np.testing.assert_array_equal(pixels(opened(tmp_path))[0, 0], np.rot90(array, -1))


def test_transparency_is_laid_on_white(tmp_path):
    array = noise(4, 4, 4)
    array[..., 3] = [0, 255, 0, 255]
    save(tmp_path / "a.png", array)
    expected = np.where(array[..., 3:] == 255, array[..., :3], 255).transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels(opened(tmp_path))[0], expected)


def test_channels_converts_both_ways(tmp_path):
    grey, colour = noise(4, 4), noise(4, 4, 3)
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.png", colour)
    np.testing.assert_array_equal(pixels(opened(tmp_path, channels=3), 0)[0], np.stack([grey] * 3))
    luma = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(pixels(opened(tmp_path, channels=1), 1)[0, 0] - luma).max() <= 1


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "PNG"])
def test_every_suffix_is_read(tmp_path, suffix):
    save(tmp_path / f"deep/er/a.{suffix}", noise(4, 4))
    save(tmp_path / f".hidden/b.{suffix}", noise(4, 4))
    (tmp_path / "notes.txt").write_text("no image")
    assert len(opened(tmp_path, channels=3)) == 1


# Classes and limits


def test_sub_folders_are_classes_and_labels_follow_their_images(tmp_path):
    for index in range(10):
        save(tmp_path / ("dog" if index % 3 else "cat") / f"{index}.png", np.full((2, 2), index, np.uint8))
    data = opened(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.num_classes == 2
    batch = data.fetch(torch.tensor([7, 0, 4, 4]))
    shown = ((batch.x0[:, 0, 0, 0] + 1) * 127.5).round().int()
    assert batch.cond["class_labels"].tolist() == [int(value % 3 > 0) for value in shown]
    plain = opened(tmp_path, labels=False)
    assert (plain.num_classes, plain.fetch(torch.tensor([0])).cond) == (0, {})
    assert Counter(labels(opened(tmp_path, limit=4))) == {0: 2, 1: 2}


@pytest.mark.parametrize("names", [("a/1.png", "a/2.png"), ("a/1.png", "2.png"), ("a/1.png", "b/c/2.png")])
def test_other_layouts_have_no_classes(tmp_path, names):
    for name in names:
        save(tmp_path / name, noise(2, 2))
    assert opened(tmp_path).num_classes == 0


def test_sub_folders_named_like_splits_are_splits(tmp_path):
    for name, value in (("train/a/1.png", 1), ("train/b/2.png", 2), ("test/a/3.png", 3)):
        save(tmp_path / name, np.full((2, 2), value, np.uint8))
    train, test = opened(tmp_path), opened(tmp_path, split="test")
    assert pixels(train)[:, 0, 0, 0].tolist() == [1, 2]
    assert train.class_names == ("a", "b")
    assert pixels(test)[:, 0, 0, 0].tolist() == [3]


def test_the_samples_of_a_run_among_the_images_are_no_data(tmp_path):
    """With `--data . --out runs/mine`, the run would otherwise use other data once it has samples."""
    for place in ("0.png", "1.png"):
        save(tmp_path / place, noise(4, 4))
    before = opened(tmp_path)
    samples = tmp_path / "runs" / "mine" / "stages" / "00-denoise" / "samples"
    samples.mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "recipe.json").touch()
    save(samples / "steps-0004.png", noise(4, 4))
    assert (len(before), opened(tmp_path).fingerprint) == (2, before.fingerprint)
    # A folder that only has such a name is a folder of images.
    (tmp_path / "runs" / "mine" / "recipe.json").unlink()
    assert len(opened(tmp_path)) == 3


def test_links_to_folders_are_followed_once(tmp_path):
    save(tmp_path / "elsewhere/1.png", noise(2, 2))
    (tmp_path / "data/a").mkdir(parents=True)
    (tmp_path / "data/a/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    assert len(opened(tmp_path / "data")) == 1


def test_a_split_may_be_a_link_to_another(tmp_path):
    save(tmp_path / "val/a/1.png", noise(2, 2))
    save(tmp_path / "val/b/2.png", noise(2, 2))
    (tmp_path / "val/b/loop").symlink_to(tmp_path)
    (tmp_path / "test").symlink_to("val")
    val, test = opened(tmp_path, split="val"), opened(tmp_path, split="test")
    assert (len(val), val.class_names) == (len(test), test.class_names) == (2, ("a", "b"))
    # Links to one folder within a split still count once.
    (tmp_path / "val/c").symlink_to("a")
    assert len(opened(tmp_path, split="test")) == 2


@pytest.mark.parametrize("limit", [1, 7, 1797, 5000])
def test_limit_keeps_the_first(limit):
    data, whole = opened("digits", limit=limit), opened("digits")
    assert len(data) == min(limit, 1797)
    assert data.num_classes == 10
    np.testing.assert_array_equal(pixels(data), pixels(whole)[:limit])
    assert labels(data) == labels(whole)[:limit]


# Sources


def test_digits_are_scikit_learns():
    data, bunch = opened("digits"), load_digits()
    assert (len(data), data.shape, data.class_names) == (1797, (1, 8, 8), tuple("0123456789"))
    assert labels(data) == bunch.target.tolist()
    x0 = data.fetch(torch.arange(1797)).x0[:, 0].double().numpy()
    assert np.abs(x0 - (bunch.images / 8 - 1)).max() <= 0.5 / 127.5 + 1e-6  # half a grey level


def test_a_path_to_a_folder_named_digits_is_not_scikit_learns_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(Path("digits/0.png"), noise(4, 4))
    Path("a").mkdir()
    for spelling in ("./digits", "digits/", "./digits/", "a/../digits", tmp_path / "digits"):
        np.testing.assert_array_equal(pixels(opened(spelling)), noise(4, 4)[None, None])
    assert len({DataConfig(source=spelling).source for spelling in ("./digits", "digits/", "./digits/")}) == 1
    np.testing.assert_array_equal(pixels(as_source(Path("digits"))), noise(4, 4)[None, None])
    with pytest.warns(HalfstepWarning, match=r"not the folder.*\./digits"):
        assert len(opened("digits")) == 1797
    (tmp_path / "digits").rename("other")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(opened("digits")) == 1797
    with pytest.raises(ValueError, match=r"\./digits does not exist"):
        opened("digits/")


def test_numpy_images_are_those_of_a_folder(tmp_path):
    arrays = noise(3, 6, 9, 3)
    np.save(tmp_path / "x.npy", arrays)
    for index, array in enumerate(arrays):
        save(tmp_path / f"folder/{index}.png", array)
    for settings_ in ({}, {"image_size": 4}, {"image_size": 4, "channels": 1}, {"channels": 1}):
        np.testing.assert_array_equal(
            pixels(opened(tmp_path / "x.npy", **settings_)), pixels(opened(tmp_path / "folder", **settings_))
        )


@pytest.mark.parametrize("keys", [("x", "y"), ("x", "labels"), ("arr_0", "arr_1")])
def test_npz_has_samples_and_labels(tmp_path, keys):
    np.savez(tmp_path / "d.npz", **dict(zip(keys, (noise(5, 4, 4), np.array([2, 0, 1, 0, 2], np.uint8)), strict=True)))
    data = opened(tmp_path / "d.npz")
    assert (data.class_names, labels(data)) == (("0", "1", "2"), [2, 0, 1, 0, 2])
    assert (data.shape, data.is_image) == ((1, 4, 4), True)


def test_floats_of_any_shape_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(4, 2, 3, 5, 2)) * 100
    np.save(tmp_path / "x.npy", x)
    data = opened(tmp_path / "x.npy")
    assert (data.shape, data.is_image, data.num_classes) == ((2, 3, 5, 2), False, 0)
    assert torch.equal(data.fetch(torch.tensor([3, 1])).x0, torch.from_numpy(x[[3, 1]]).float())


@pytest.mark.parametrize(
    ("name", "split", "length", "shape", "names"),
    [
        ("fashion-mnist", "train", 60_000, (1, 28, 28), ("T-shirt/top", "Ankle boot")),
        ("fashion-mnist", "test", 10_000, (1, 28, 28), ("T-shirt/top", "Ankle boot")),
        ("cifar10", "test", 10_000, (3, 32, 32), ("airplane", "truck")),
        ("cifar10", "train", 50_000, (3, 32, 32), ("airplane", "truck")),
    ],
)
def test_benchmark_data_sets(name, split, length, shape, names):
    if not (SHARED / name).is_dir():
        pytest.skip(f"{SHARED / name} is not here")
    data = opened(SHARED / name, split=split, image_size=shape[1], channels=shape[0], max_bytes=0)
    assert (len(data), data.shape, data.num_classes) == (length, shape, 10)
    assert (data.class_names[0], data.class_names[-1]) == names
    assert isinstance(data, ImageFiles)
    counts = torch.bincount(data.labels)
    assert counts.tolist() == [length // 10] * 10
    held = opened(SHARED / name, split=split, limit=200)
    indices = torch.tensor([199, 0, 17])
    assert torch.equal(data.fetch(indices).x0, held.fetch(indices).x0)
    assert torch.equal(data.fetch(indices).cond["class_labels"], held.fetch(indices).cond["class_labels"])


@pytest.fixture
def rows():
    import datasets

    images = [Image.fromarray(noise(4, 4, seed=index)) for index in range(6)]
    features = datasets.Features(
        {
            "whole": datasets.ClassLabel(names=["x", "y"]),
            "scan": datasets.Image(),
            "part": datasets.ClassLabel(names=["p", "q", "r"]),
        }
    )
    columns = {"whole": [0, 1] * 3, "scan": images, "part": [0, 1, 2] * 2}
    return datasets.Dataset.from_dict(columns, features=features)


def test_tables_are_read_by_type_saved_or_as_parquet(tmp_path, rows):
    import datasets

    rows.to_parquet(tmp_path / "parquet/train.parquet")
    datasets.DatasetDict({"train": rows, "extra": rows.select([5, 0])}).save_to_disk(tmp_path / "saved")
    for folder in ("parquet", "saved"):
        data = opened(tmp_path / folder, label_column="part")
        np.testing.assert_array_equal(pixels(data)[:, 0], [noise(4, 4, seed=index) for index in range(6)])
        assert (labels(data), data.class_names) == ([0, 1, 2, 0, 1, 2], ("p", "q", "r"))
    assert labels(opened(tmp_path / "saved", split="extra", label_column="whole")) == [1, 0]


# Batches


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 100), max_size=4), st.booleans())
def test_a_batch_is_the_same_for_any_split_of_its_places(cuts, flip):
    data = opened("digits")
    whole = training_batch(data, draw(range(100)), flip)
    edges = [0, *sorted(cuts), 100]
    parts = [training_batch(data, draw(range(a, b)), flip) for a, b in itertools.pairwise(edges) if a < b]
    assert torch.equal(whole.x0, torch.cat([part.x0 for part in parts]))
    assert torch.equal(whole.cond["class_labels"], torch.cat([part.cond["class_labels"] for part in parts]))


def test_an_epoch_shows_each_sample_once():
    data = MemoryData("ramp", torch.arange(100.0)[:, None])
    shown = torch.cat([training_batch(data, draw(range(20), 20, update), False).x0 for update in range(5)])
    assert sorted(shown.flatten().tolist()) == list(range(100))


def test_flip_mirrors_the_width_of_about_half_and_of_no_other():
    data = opened("digits")
    size = 1000
    plain = training_batch(data, draw(range(size), size), False)
    flipped = training_batch(data, draw(range(size), size), True)
    where = draw(range(size), size).uniform("flip") < 0.5
    assert 440 < int(where.sum()) < 560
    assert torch.equal(flipped.x0[~where], plain.x0[~where])
    assert torch.equal(flipped.x0[where], plain.x0[where][..., [7, 6, 5, 4, 3, 2, 1, 0]])
    assert torch.equal(flipped.cond["class_labels"], plain.cond["class_labels"])


# Memory and fingerprints


def test_a_lazy_folder_gives_the_batches_of_memory(tmp_path):
    for index in range(12):
        save(tmp_path / "ab"[index % 2] / f"{index:02}.jpg", noise(9 + index, 20, 3, seed=index))
    settings_ = {"image_size": 8, "channels": 3}
    held, lazy = opened(tmp_path, **settings_), opened(tmp_path, max_bytes=100, **settings_)
    assert isinstance(held, MemoryData)
    assert isinstance(lazy, ImageFiles)
    assert (held.shape, held.class_names, len(held)) == (lazy.shape, lazy.class_names, len(lazy))
    a, b = (training_batch(data, draw(range(30), 30), True) for data in (held, lazy))
    assert torch.equal(a.x0, b.x0)
    assert torch.equal(a.cond["class_labels"], b.cond["class_labels"])
    assert lazy.fetch(torch.empty(0, dtype=torch.int64)).x0.shape == (0, 3, 8, 8)


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_an_index_out_of_range_is_an_error(tmp_path, max_bytes):
    save(tmp_path / "a.png", noise(4, 4))
    data = opened(tmp_path, image_size=4, channels=1, max_bytes=max_bytes)
    for index in (-1, 1):
        with pytest.raises(IndexError):
            data.fetch(torch.tensor([index]))


def test_the_fingerprint_is_of_the_content(tmp_path):
    arrays = noise(3, 4, 4)
    np.save(tmp_path / "x.npy", arrays)
    first = opened(tmp_path / "x.npy").fingerprint
    assert len(first) == 64
    assert opened(tmp_path / "x.npy").fingerprint == first
    arrays[2, 1, 0] ^= 1
    np.save(tmp_path / "x.npy", arrays)
    assert opened(tmp_path / "x.npy").fingerprint != first


def test_labels_are_part_of_the_fingerprint():
    assert opened("digits").fingerprint != opened("digits", labels=False).fingerprint


def test_the_lazy_fingerprint_is_of_files_and_preparation(tmp_path):
    for index in range(3):
        save(tmp_path / f"{index}.png", noise(4, 4, seed=index))
    settings_ = {"image_size": 4, "channels": 1, "max_bytes": 0}
    first = opened(tmp_path, **settings_).fingerprint
    assert opened(tmp_path, **settings_).fingerprint == first
    assert opened(tmp_path, **{**settings_, "image_size": 3}).fingerprint != first
    (tmp_path / "0.png").rename(tmp_path / "00.png")
    assert opened(tmp_path, **settings_).fingerprint != first


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (np.arange(40) % 10 + 1, [str(k) for k in range(1, 11)]),
        (np.arange(40) % 4 * 100, ["0", "100", "200", "300"]),
        (np.array(["dog", "cat", "eel", "cat"] * 10), ["cat", "dog", "eel"]),
        (np.array([b"dog", b"cat"] * 20), ["cat", "dog"]),
    ],
)
def test_classes_are_the_labels_in_order_without_gaps(tmp_path, written, names):
    x = np.arange(40.0)[:, None]
    np.savez(tmp_path / "d.npz", x=x, y=written)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = opened(tmp_path / "d.npz")
    assert [
        str(one.message) for one in caught if "become the classes 0 to" in str(one.message)
    ] or written.dtype.kind != "i"
    assert list(data.class_names) == names
    asked = [one.decode() if isinstance(one, bytes) else str(one) for one in written.tolist()]
    assert [names[label] for label in labels(data)] == asked


def test_labels_of_the_layout_of_edm(tmp_path):
    """Sub-folders are shards, and dataset.json contains the classes."""
    listed = []
    for k in range(30):
        name = f"{k // 10:05}/img{k:08}.png"
        save(tmp_path / name, noise(4, 4, seed=k))
        listed.append([name, k % 3 + 5])
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": listed}))
    with pytest.warns(HalfstepWarning, match=r"5, 6, 7 of .*dataset\.json become the classes 0 to 2"):
        data = opened(tmp_path)
    assert data.class_names == ("5", "6", "7")
    assert labels(data) == [k % 3 for k in range(30)]
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": None}))
    assert opened(tmp_path).num_classes == 0
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": listed[:-1]}))
    with pytest.raises(ValueError, match=r"no label for 00002/img00000029\.png"):
        opened(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [1, 2]}))
    with pytest.raises(ValueError, match="does not contain one"):
        opened(tmp_path)


def test_a_class_without_rows_in_a_table_is_ignored(tmp_path):
    import datasets

    features = datasets.Features({"scan": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])})
    rows = {"scan": [Image.fromarray(noise(4, 4, seed=k)) for k in range(4)], "kind": [0, 2, 2, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    data = opened(tmp_path)
    assert data.class_names == ("x", "z")
    assert labels(data) == [0, 1, 1, 0]
    assert opened(tmp_path, limit=1).class_names == ("x", "z")


@pytest.mark.parametrize("form", ["png", "jpg", "webp"])
@pytest.mark.parametrize("exif", [b"Exif\0\0no TIFF header", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_broken_metadata_leaves_the_pixels_as_they_are(tmp_path, form, exif):
    """The same file without the metadata is decoded to the same pixels."""
    options = {"lossless": True} if form == "webp" else {}
    with_it = save(tmp_path / f"a/0.{form}", noise(6, 4), exif=exif, **options)
    without = save(tmp_path / f"b/0.{form}", noise(6, 4), **options)
    np.testing.assert_array_equal(pixels(opened(with_it.parent)), pixels(opened(without.parent)))


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_pillow_turns_them(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / "0.png", noise(6, 4), exif=exif)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(pixels(opened(tmp_path))[0, 0], expected)
