"""A folder of latents contains the encoder's output for each image, also after interruptions and damage."""

import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from halfstep.core.draw import Draw
from halfstep.data import DataConfig, encoding, open_data, training_batch
from halfstep.data.captions import CaptionedImages, Prompts, read_captions
from halfstep.data.encoding import Encoder, encode
from halfstep.data.forecast import forecast
from halfstep.data.latents import LatentData, open_latents
from halfstep.data.preparation import Preparation
from halfstep.runtime.files import DamagedFile

COUNT = 11


@pytest.fixture
def images(tmp_path: Path) -> CaptionedImages:
    """Return different images with different captions, one of them empty."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(COUNT):
        pixels = np.random.default_rng(index).integers(0, 256, (16, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
        (folder / f"{index:02d}.txt").write_text("" if index == 4 else "cat " * index)
    return read_captions(folder)


def to_latents(x: Tensor) -> Tensor:
    """Encode each image separately, exactly in float32: the pixel in the corner of each 8x8 block, four times."""
    return torch.cat([x, -x[:, :1]], 1)[:, :, ::8, ::8] / 4


def to_conditions(captions: list[str]) -> dict[str, Tensor]:
    words = [len(caption.split()) for caption in captions]
    grid = torch.arange(6.0).reshape(3, 2)
    return {
        "encoder_hidden_states": torch.stack([grid + number for number in words]).half(),
        "mask": torch.tensor([[place < number for place in range(3)] for number in words]),
        "pooled_projections": torch.tensor(words, dtype=torch.float32),
    }


ENCODER = Encoder(to_latents, to_conditions, "corners")


class Killed(Exception):
    """An exception that stops an encoder."""


@final
class Counting:
    """ENCODER that records its images and is killed at the batch `last`."""

    def __init__(self, last: int | None = None) -> None:
        self.shown: list[Tensor] = []
        self.told: list[list[str]] = []
        self.last = last

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.images, self.texts, ENCODER.key)

    def images(self, x: Tensor) -> Tensor:
        if len(self.shown) == self.last:
            raise Killed
        self.shown.append(x)
        return to_latents(x)

    def texts(self, captions: list[str]) -> dict[str, Tensor]:
        self.told.append(captions)
        return to_conditions(captions)


def files(folder: Path) -> dict[str, bytes]:
    """Return all files except the lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def everything(data: LatentData) -> dict[str, Tensor]:
    batch = data.fetch(torch.arange(len(data)))
    return {"x0": batch.x0, **batch.cond}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(call: Callable[[], object], *words: str, kind: type[ValueError] = ValueError) -> None:
    """Assert that the call raises a one-line error that contains all of `words`."""
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


# Contents


def test_each_sample_is_what_the_encoder_makes_of_its_image(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents", batch_size=3, shard_size=4)
    assert (len(data), data.shape, data.is_image, data.num_classes) == (COUNT, (4, 2, 3), False, 0)
    for index in range(COUNT):
        x0, cond = data.fetch(torch.tensor([index]))
        assert x0.dtype == torch.float32
        assert torch.equal(x0[0], to_latents(images.loaded([index]).x.float() / 127.5 - 1)[0])
        expected = to_conditions([images.captions[index]])
        assert {name: value.dtype for name, value in cond.items()} == {
            "encoder_hidden_states": torch.float32,
            "mask": torch.bool,
            "pooled_projections": torch.float32,
        }
        assert same(dict(cond), {name: value.to(cond[name].dtype) for name, value in expected.items()})


@pytest.mark.parametrize(("batch_size", "shard_size"), [(1, 1), (8, 256), (3, 4), (4, 3), (11, 11), (5, 10)])
def test_neither_batches_nor_shards_matter(images, tmp_path, batch_size, shard_size):
    whole = encode(images, ENCODER, tmp_path / "whole", COUNT, COUNT)
    cut = encode(images, ENCODER, tmp_path / "cut", batch_size, shard_size)
    assert same(everything(cut), everything(whole))
    assert len(list((tmp_path / "cut").glob("shard-*"))) == -(-COUNT // shard_size)


def test_a_forecast_is_what_encode_writes_and_writes_nothing(images, tmp_path):
    out = tmp_path / "latents"
    cost = forecast(images, ENCODER, out, 2, 4)
    assert (cost.pending, cost.timed, out.exists()) == (COUNT, 2, False)
    made = encode(images, ENCODER, out, 2, 4)
    assert cost.tensors == made.index.tensors
    written = {path: path.read_bytes() for path in out.iterdir() if path.suffix in (".json", ".safetensors")}
    # The headers contain offsets.
    assert abs(cost.num_bytes - sum(map(len, written.values()))) < 200
    (out / "shard-00001.safetensors").write_bytes(b"?")
    again = forecast(images, ENCODER, out, 2, 4)
    assert (again.pending, again.tensors, again.num_bytes) == (4, cost.tensors, cost.num_bytes)
    assert (out / "shard-00001.safetensors").read_bytes() == b"?"
    for path, content in written.items():
        path.write_bytes(content)
    assert forecast(images, ENCODER, out, 2, 4).pending == 0
    other = dataclasses.replace(ENCODER, key="other")
    refused(lambda: forecast(images, other, out, 2, 4), "contains latents from the encoder 'corners', not from 'other'")
    refused(lambda: forecast(images, ENCODER, tmp_path / "images"), "contains other files")


class Clock:
    """Replaces the module `time`: only the encoder's work takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def after(self, seconds, call):
        """Return `call` as a function that takes this time for each sample."""

        def slow(batch, *rest):
            self.now += seconds * len(batch)
            return call(batch, *rest)

        return slow


def test_a_forecast_is_timed_on_a_batch_or_on_one_slow_image(images, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(encoding, "time", clock)
    for seconds, timed in ((4.0, 3), (6.0, 1)):
        slow = dataclasses.replace(ENCODER, images=clock.after(seconds, to_latents))
        cost = forecast(images, slow, None, 3)
        assert (cost.seconds, cost.timed) == (seconds * COUNT, timed)
    # Only the latents of prompts are repeated.
    slow = dataclasses.replace(ENCODER, texts=clock.after(2.0, to_conditions))
    prompts = Prompts("p", ("a", "b"), clock.after(1.0, lambda part, cond: torch.zeros(len(part), 1, 2)))
    assert forecast(prompts, slow, None, 2, repeats=10).seconds == 2 * (2.0 + 1.0 * 10)


def test_conditions_can_be_kept_without_a_caption(images, tmp_path):
    """The unconditional branch shares them, so `null` lacks them."""
    null = {name: value[0] for name, value in to_conditions([""]).items() if name != "mask"}
    data = encode(images, dataclasses.replace(ENCODER, null=null), tmp_path / "latents", 4, 4)
    assert set(data.null) == set(null)
    assert "mask" in data.fetch(torch.tensor([0])).cond
    odd = dataclasses.replace(ENCODER, null={**null, "odd": torch.zeros(1)})
    refused(lambda: encode(images, odd, tmp_path / "odd"), "return the same conditions")


def test_any_order_with_repeats_across_shards(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents", shard_size=4)
    expected = everything(data)
    for indices in ([10, 0, 4, 4, 3, 9, 0], [7], list(range(COUNT))[::-1], []):
        x0, cond = data.fetch(torch.tensor(indices, dtype=torch.int64))
        assert same({"x0": x0, **cond}, {name: value[indices] for name, value in expected.items()})
    for indices in ([-1], [0, COUNT]):
        with pytest.raises(IndexError, match=f"{COUNT} samples"):
            data.fetch(torch.tensor(indices))


def test_the_null_conditions_are_those_of_the_empty_caption(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents")
    of_the_fifth = data.fetch(torch.tensor([4])).cond
    assert same(dict(data.null), {name: value[0] for name, value in of_the_fifth.items()})
    assert {name: value.dtype for name, value in data.null.items()} == {
        name: value.dtype for name, value in of_the_fifth.items()
    }


def test_an_encoder_without_conditions(images, tmp_path):
    data = encode(images, Encoder(to_latents, lambda captions: {}, "bare"), tmp_path / "latents")
    assert (data.null, data.fetch(torch.tensor([2])).cond) == ({}, {})


def test_tensors_are_stored_in_the_encoders_dtype(images, tmp_path):
    encode(images, Encoder(lambda x: to_latents(x).bfloat16(), to_conditions, "short"), tmp_path / "latents")
    stored = load_file(tmp_path / "latents/shard-00000.safetensors")
    assert (stored["latents"].dtype, stored["encoder_hidden_states"].dtype) == (torch.bfloat16, torch.float16)
    data = open_latents(tmp_path / "latents")
    assert torch.equal(data.fetch(torch.arange(COUNT)).x0, stored["latents"].float())


def test_encoders_are_called_without_gradients_on_batches_in_order(images, tmp_path):
    graphs = []

    def with_weight(x: Tensor) -> Tensor:
        latents = to_latents(x) * torch.ones(1, requires_grad=True)
        graphs.append(latents.requires_grad)
        return latents

    encode(images, Encoder(with_weight, to_conditions, "weights"), tmp_path / "a")
    assert graphs == [False, False]
    counting = Counting()
    encode(images, counting.encoder, tmp_path / "b", batch_size=3, shard_size=5)
    assert [len(x) for x in counting.shown] == [3, 2, 3, 2, 1]
    assert counting.told[0] == [""]
    assert tuple(itertools.chain(*counting.told[1:])) == images.captions


def test_no_labels_drops_the_classes_and_keeps_everything_else(images, tmp_path):
    encode(images, ENCODER, tmp_path / "captioned", shard_size=4)
    names = ("cat", "dog")

    def classes(captions: list[str]) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([names.index(caption) if caption else 2 for caption in captions])}

    classed = dataclasses.replace(images, captions=tuple(names[index % 2] for index in range(COUNT)))
    encode(classed, Encoder(to_latents, classes, "classes"), tmp_path / "classed", 8, 4, class_names=names)
    config = DataConfig(source=str(tmp_path / "classed"))
    whole, without = open_data(config), open_data(config.model_copy(update={"labels": False}))
    assert isinstance(without, LatentData)
    assert (whole.num_classes, without.num_classes, dict(without.null)) == (2, 0, {})
    assert whole.fingerprint != without.fingerprint
    held = everything(whole)
    assert held.pop("class_labels").tolist() == [index % 2 for index in range(COUNT)]
    assert same(everything(without), held)
    config = DataConfig(source=str(tmp_path / "captioned"), labels=False)
    captioned = open_latents(tmp_path / "captioned")
    assert open_data(config).fingerprint == captioned.fingerprint
    assert same(everything(open_data(config)), everything(captioned))
    config = DataConfig(source=str(tmp_path / "classed"), label_column="kind")
    refused(lambda: open_data(config), "has no columns", "remove --data.label-column kind")


def test_it_is_training_data(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents", shard_size=4)
    draw = Draw(seed=1, stream="s", update=3, batch_size=6, places=range(6))
    indices = draw.order(COUNT)
    x0, cond = training_batch(data, draw, False)
    assert same({"x0": x0, **cond}, {name: value[indices] for name, value in everything(data).items()})
    refused(lambda: training_batch(data, draw, True), "only images can be mirrored")


def test_a_fetch_only_reads_the_shards_of_its_samples(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents", shard_size=4)
    (tmp_path / "latents/shard-00000.safetensors").unlink()
    data.fetch(torch.tensor([4, 10]))
    refused(lambda: data.fetch(torch.tensor([4, 3])), "shard-00000", "into", "again", kind=DamagedFile)


def test_the_fingerprint_is_of_the_content(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "a", batch_size=2, shard_size=4)
    assert len(data.fingerprint) == 64
    assert data.fingerprint == open_latents(tmp_path / "a").fingerprint
    assert data.fingerprint == encode(images, ENCODER, tmp_path / "b", batch_size=3, shard_size=4).fingerprint
    captions = (*images.captions[:-1], "dog")
    other = dataclasses.replace(images, captions=captions)
    assert data.fingerprint != encode(other, ENCODER, tmp_path / "c", shard_size=4).fingerprint
    mapped = Encoder(to_latents, lambda texts: {**to_conditions(texts), "bias": torch.ones(len(texts))}, "more")
    assert data.fingerprint != encode(images, mapped, tmp_path / "d", shard_size=4).fingerprint


# Stopped, damaged and rerun


@pytest.mark.parametrize("last", range(7))
def test_a_stopped_encoding_goes_on_to_the_same_bytes(images, tmp_path, last):
    """Shards of 4, 4 and 3 in batches of 2 are killed at each of the 6 batches in turn, or not at all."""
    encode(images, ENCODER, tmp_path / "whole", batch_size=2, shard_size=4)
    folder, first, second = tmp_path / "latents", Counting(last), Counting()
    if last < 6:
        with pytest.raises(Killed):
            encode(images, first.encoder, folder, batch_size=2, shard_size=4)
        refused(lambda: open_latents(folder), f"{last // 2} of 3 shards", "encode the same images")
    else:
        encode(images, first.encoder, folder, batch_size=2, shard_size=4)
    encode(images, second.encoder, folder, batch_size=2, shard_size=4)
    assert files(folder) == files(tmp_path / "whole")
    assert len(second.shown) == 6 - last // 2 * 2
    assert first.told[0] == [""]
    assert [""] not in second.told


def test_an_empty_attempt_does_not_block_other_settings(images, tmp_path):
    folder, other = tmp_path / "latents", dataclasses.replace(images, preparation=Preparation(8, channels=3))
    encode(other, ENCODER, tmp_path / "whole", shard_size=4)
    with pytest.raises(Killed):
        encode(images, Counting(0).encoder, folder, batch_size=2, shard_size=3)
    encode(other, ENCODER, folder, shard_size=4)
    assert files(folder) == files(tmp_path / "whole")


def test_a_hard_kill_leaves_nothing_incomplete(images, tmp_path):
    """A process dies without unwinding in the middle of a shard and leaves temporary files."""
    script = """
import os, sys
from pathlib import Path
import torch
from halfstep.data.captions import read_captions
from halfstep.data.encoding import Encoder, encode
calls = []
def to_latents(x):
    calls.append(1)
    if len(calls) == 4:
        os._exit(9)
    return torch.cat([x, -x[:, :1]], 1)[:, :, ::8, ::8] / 4
encode(read_captions(Path(sys.argv[1])), Encoder(to_latents, lambda texts: {}, "k"), Path(sys.argv[2]), 2, 4)
"""
    folder, whole = tmp_path / "latents", tmp_path / "whole"
    assert subprocess.run([sys.executable, "-c", script, images.source, folder], check=False).returncode == 9
    for name in (".shard-00001.safetensors.tmp", ".index.json.123.tmp"):
        (folder / name).write_bytes(b"half")
    (folder / "shard-00001.safetensors").write_bytes(b"whole, but not recorded")
    encoder = Encoder(to_latents, lambda texts: {}, "k")
    encode(images, encoder, whole, 2, 4)
    encode(images, encoder, folder, 2, 4)
    assert files(folder) == files(whole)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("damage", [cut, flipped, None])
@pytest.mark.parametrize(("name", "shown"), [("shard-00001.safetensors", 2), ("null.safetensors", 0)])
def test_only_a_damaged_file_is_written_again(images, tmp_path, name, shown, damage):
    folder = tmp_path / "latents"
    encode(images, ENCODER, folder, batch_size=2, shard_size=4)
    before, path = files(folder), folder / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    if damage is not flipped or name.startswith("null"):
        refused(lambda: open_latents(folder), name, "missing or altered", "again", kind=DamagedFile)
    counting, progress = Counting(), []
    encode(images, counting.encoder, folder, 2, 4, lambda done, total: progress.append((done, total)))
    assert files(folder) == before
    assert len(counting.shown) == shown
    assert counting.told.count([""]) == (shown == 0)
    assert progress == ([(7, 11), (9, 11), (11, 11)] if shown else [(11, 11)])


def test_a_shard_damaged_after_opening_is_named(images, tmp_path):
    data = encode(images, ENCODER, tmp_path / "latents")
    path = tmp_path / "latents/shard-00000.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    refused(lambda: data.fetch(torch.tensor([0])), "shard-00000", "encode the same images", kind=DamagedFile)


def test_a_finished_folder_is_not_encoded_again_wherever_the_images_lie(images, tmp_path):
    encode(images, ENCODER, tmp_path / "latents")
    before = files(tmp_path / "latents")
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    for path in moved.iterdir():
        path.touch()
    counting = Counting()
    encode(read_captions(moved), counting.encoder, tmp_path / "latents")
    assert (counting.shown, counting.told) == ([], [])
    assert files(tmp_path / "latents") == before


def test_progress_counts_images(images, tmp_path):
    progress: list[tuple[int, int]] = []
    encode(images, ENCODER, tmp_path / "latents", 3, 5, lambda done, total: progress.append((done, total)))
    assert progress == [(done, COUNT) for done in (0, 3, 5, 8, 10, 11)]


# Errors


def test_another_encoder(images, tmp_path):
    encode(images, ENCODER, tmp_path / "latents")
    other = dataclasses.replace(ENCODER, key="other weights")
    call = lambda: encode(images, other, tmp_path / "latents")  # noqa: E731
    refused(call, "'corners'", "'other weights'", "another folder", "delete")


def test_another_size_of_shards(images, tmp_path):
    encode(images, ENCODER, tmp_path / "latents", shard_size=4)
    refused(lambda: encode(images, ENCODER, tmp_path / "latents"), "shards of 4", "256", "another folder")


def test_other_images(images, tmp_path):
    folder = tmp_path / "latents"
    encode(images, ENCODER, folder)

    def again(*words: str) -> None:
        refused(lambda: encode(read_captions(tmp_path / "images"), ENCODER, folder), *words, images.source, "delete")

    resized = read_captions(tmp_path / "images", Preparation(8, channels=3))
    refused(lambda: encode(resized, ENCODER, folder), "image_size was None and is now 8")
    (tmp_path / "images/03.txt").write_text("a dog")
    again("different captions;")
    Image.new("RGB", (24, 16)).save(tmp_path / "images/05.png")
    again("different file contents and captions;")
    (tmp_path / "images/10.png").rename(tmp_path / "images/11.png")
    (tmp_path / "images/10.txt").rename(tmp_path / "images/11.txt")
    again("different file names and ")
    (tmp_path / "images/11.png").unlink()
    (tmp_path / "images/11.txt").unlink()
    again("their number was 11 and is now 10")


def test_images_that_are_gone(images, tmp_path):
    (tmp_path / "images/03.png").unlink()
    refused(lambda: encode(images, ENCODER, tmp_path / "latents"), "03.png", "cannot be read", "run the command again")


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"shard_size": -1}])
def test_sizes_out_of_range(images, tmp_path, arguments):
    [(name, value)] = arguments.items()
    expected = f"{name} must be a whole number of at least 1, got {value}"
    refused(lambda: encode(images, ENCODER, tmp_path / "latents", **arguments), expected)


def test_a_folder_of_something_else(images, tmp_path):
    refused(lambda: encode(images, ENCODER, tmp_path / "images"), "00.png", "empty folder")
    refused(lambda: encode(images, ENCODER, tmp_path / "images/00.png"), "00.png is a file")
    for name in ("images", "nowhere"):
        refused(lambda name=name: open_latents(tmp_path / name), name, "no latents", "halfstep encode")


def test_a_folder_that_is_being_written(images, tmp_path):
    (tmp_path / "latents").mkdir()
    script = """
import sys
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", script, tmp_path / "latents/.lock"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        refused(lambda: encode(images, ENCODER, tmp_path / "latents"), "latents", "another process", "wait")
        holder.communicate(b"\n")
    encode(images, ENCODER, tmp_path / "latents")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[:50], ["not readable JSON"]),
        (lambda text: text.replace('"format": 1', '"format": 2'), ["format 2", "reads format 1"]),
        (lambda text: text.replace('"shard_size": 256', '"shard_size": null'), ["shard_size: "]),
        (lambda text: "[]", ["not an index"]),
    ],
)
def test_a_damaged_index(images, tmp_path, change, words):
    encode(images, ENCODER, tmp_path / "latents")
    path = tmp_path / "latents/index.json"
    path.write_text(change(path.read_text()))
    for call in (lambda: open_latents(tmp_path / "latents"), lambda: encode(images, ENCODER, tmp_path / "latents")):
        refused(call, "index.json", *words, "delete the folder")


def test_the_index_identifies_its_data(images, tmp_path):
    encode(images, ENCODER, tmp_path / "latents", shard_size=4)
    index = json.loads((tmp_path / "latents/index.json").read_text())
    assert index["encoder"] == "corners"
    assert index["tensors"]["latents"] == {"shape": [4, 2, 3], "dtype": "float32"}
    assert index["tensors"]["mask"] == {"shape": [3], "dtype": "bool"}
    assert [list(shard) for shard in index["shards"]] == [["sha256", "size"]] * 3


def with_nan(x: Tensor) -> Tensor:
    latents = to_latents(x)
    latents[2, 1, 0, 0] = torch.inf
    return latents


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"images": lambda x: to_latents(x)[:-1]}, ["latents", "(3, 4, 2, 3)", "batch of 4", "00.png"]),
        ({"images": lambda x: to_latents(x).flatten(1)}, ["float32 latents of shape (4, 24)", "00.png"]),
        ({"images": lambda x: to_latents(x).int()}, ["int32 latents", "floats"]),
        ({"images": with_nan}, ["non-finite latents", "02.png", "float32"]),
        ({"images": lambda x: to_latents(x)[..., : len(x) - 1]}, ["(4, 2, 2)", "(4, 2, 3)", "08.png", "one size"]),
        ({"texts": lambda texts: {"latents": torch.zeros(len(texts))}}, ["called latents", "another name"]),
        ({"texts": lambda texts: {"a": torch.zeros(1, 2)}}, ["a of shape (1, 2)", "batch of 4", "first axis"]),
        ({"texts": lambda texts: {"a": torch.zeros(())}}, ["a of shape ()", "the empty caption"]),
        ({"texts": lambda texts: {"a": torch.zeros(len(texts), len(texts))}}, ["(4,)", "(1,)", "pad all captions"]),
        ({"texts": lambda texts: {"ab"[len(texts) > 1]: torch.zeros(len(texts))}}, ["conditions b", "but a for"]),
        ({"texts": lambda texts: {} if len(texts) > 1 else {"a": torch.zeros(1)}}, ["conditions none", "but a for"]),
        (
            {"texts": lambda texts: {"a": torch.full((len(texts),), torch.nan)}},
            ["non-finite a", "empty caption"],
        ),
    ],
)
def test_encoders_with_outputs_of_the_wrong_form(images, tmp_path, broken, words):
    encoder = dataclasses.replace(ENCODER, **broken)
    refused(lambda: encode(images, encoder, tmp_path / "latents", batch_size=4), "the encoder returned", *words)


def test_images_of_other_forms(images, tmp_path):
    grey = read_captions(tmp_path / "images", Preparation(channels=1))
    refused(lambda: encode(grey, ENCODER, tmp_path / "grey"), "00.png has 1 channels", "channels=3")
    Image.new("RGB", (32, 16)).save(tmp_path / "images/05.png")
    mixed = read_captions(tmp_path / "images")
    refused(lambda: encode(mixed, ENCODER, tmp_path / "mixed"), "00.png is 24x16", "05.png is 32x16", "size")


def test_prompt_samples_resume_where_they_were_interrupted(tmp_path: Path) -> None:
    """The latents equal those of an uninterrupted call: each depends only on its place and its prompt."""

    def sampled(places: range, conditions: dict[str, Tensor]) -> Tensor:
        made.append(places)
        if len(made) == stop:
            raise Killed
        return torch.tensor([[float(place)] for place in places]) + conditions["pooled_projections"][:, None]

    captions = tuple("cat " * (index % 3) for index in range(7))
    made: list[range] = []
    stop = 3
    with pytest.raises(Killed):
        encode(Prompts("p.txt", captions, sampled), ENCODER, tmp_path / "cut", 2, 2)
    stop = 0
    cut = encode(Prompts("p.txt", captions, sampled), ENCODER, tmp_path / "cut", 2, 2)
    assert [place.start for place in made] == [0, 2, 4, 4, 6]
    whole = encode(Prompts("p.txt", captions, sampled), ENCODER, tmp_path / "whole", 2, 2)
    assert cut.fingerprint == whole.fingerprint
    batch = cut.fetch(torch.arange(7))
    assert batch.x0[:, 0].tolist() == [index + index % 3 for index in range(7)]
    with pytest.raises(ValueError, match=r"contains latents of images other than those in q\.txt: different captions"):
        encode(Prompts("q.txt", captions[::-1], sampled), ENCODER, tmp_path / "cut", 2, 2)
