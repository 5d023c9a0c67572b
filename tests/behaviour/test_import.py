"""An imported checkpoint is an ordinary stage. Any other file gives a one-line error and leaves nothing behind."""

import json
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch

from halfstep.cli import main
from halfstep.hub import config_of, import_google_pd
from halfstep.hub.google_pd import convert, read_checkpoint
from halfstep.models.folder import load
from halfstep.runs import RunFolder
from support_google_pd import TINY, checkpoint_bytes, packed, params, tree_of

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    file = tmp_path_factory.mktemp("pd") / "tiny_8.msgpack"
    file.write_bytes(checkpoint_bytes(params(TINY)))
    return file


@pytest.fixture(scope="module")
def config(checkpoint: Path) -> Path:
    file = checkpoint.with_name("tiny.json")
    file.write_text(TINY.model_dump_json())
    return file


def refused(argv: list[str], capsys: Capture) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


def test_an_imported_student_samples_and_continues_the_chain(
    checkpoint: Path, config: Path, tmp_path: Path, capsys: Capture
) -> None:
    stage = tmp_path / "stage"
    main(["import", "google-pd", str(checkpoint), "--config", str(config), "--out", str(stage)])
    assert "a student of 8 steps, samples of shape [3, 8, 8], 3 classes, predicts both" in capsys.readouterr().out
    model = load(stage)
    assert (model.num_steps, model.num_classes, model.shape) == (8, 3, (3, 8, 8))
    assert model.manifest.source is not None
    assert model.manifest.source.startswith("tiny_8.msgpack sha256 ")
    main(["sample", str(stage), "--num-samples", "4", "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["arr_0"].shape == (4, 8, 8, 3)
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", arr_0=pictures, labels=np.arange(12) % 3)
    out = tmp_path / "run"
    settings = ["--chain.num-updates", "1", "--chain.batch-size", "4", "--evaluation.no-enabled"]
    main(["distill", str(stage), "--data", str(tmp_path / "data.npz"), "--to", "2", "--out", str(out), *settings])
    assert [s.manifest().num_steps for s in RunFolder(out).stages()] == [8, 4, 2]
    assert load(out).manifest.network == model.manifest.network


@pytest.mark.parametrize("steps", [None, 0, 16])
def test_an_undistilled_checkpoint_is_a_teacher(steps: int | None, tmp_path: Path) -> None:
    """Test a file without a number of steps, and the configuration's own start."""
    file = tmp_path / "original.msgpack"
    data: dict[str, Any] = {"ema_params": tree_of(params(TINY))}
    if steps is not None:
        data["num_sample_steps"] = steps
    file.write_bytes(msgpack.packb(data, default=packed))
    manifest = import_google_pd(file, TINY, tmp_path / "stage")
    assert (manifest.num_steps, manifest.start_steps) == (None, 16)


@torch.no_grad()
def test_an_imported_network_is_a_stock_one_that_diffusers_reads_back(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    ours = convert(params(TINY), TINY)
    ours.model.save_pretrained(tmp_path / "unet")
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet")
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 2])
    first, last = ours.clock_range
    timestep = 1000 * (first + (last - first) * 0.5) - 1
    expected = theirs(x_t, timestep, class_labels=labels).sample
    torch.testing.assert_close(ours(x_t, torch.full((2,), 0.5), class_labels=labels), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_files_of_different_flax_versions_are_read_equally(tmp_path: Path) -> None:
    """Test merged axes and axes of length 1, chunked arrays, unchanged half precision, and scalars as arrays."""
    plain = params(TINY)
    other: dict[str, Any] = {}
    for path, value in plain.items():
        if "attn" in path and value.ndim == 3:
            value = value.reshape(value.shape[0], -1) if "proj_out" not in path else value.reshape(-1, value.shape[-1])
        elif "nin_shortcut/kernel" in path:
            value = value[None, None]
        other[path] = value
    flat = other["conv_in/kernel"].ravel()
    other["conv_in/kernel"] = {
        "__msgpack_chunked_array__": True,
        "shape": {str(i): n for i, n in enumerate(plain["conv_in/kernel"].shape)},
        "chunks": {"0": flat[:100], "1": flat[100:]},
    }
    file = tmp_path / "other.msgpack"
    file.write_bytes(checkpoint_bytes(other, num_sample_steps=np.array(8)))
    held = read_checkpoint(file)
    assert held.num_steps == 8
    theirs, ours = convert(held.params, TINY).state_dict(), convert(plain, TINY).state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_checkpoint_cut_anywhere_is_refused_and_leaves_nothing(
    checkpoint: Path, config: Path, tmp_path: Path, capsys: Capture
) -> None:
    whole = checkpoint.read_bytes()
    for twentieth in range(20):
        file = tmp_path / "cut.msgpack"
        file.write_bytes(whole[: len(whole) * twentieth // 20])
        said = refused(
            ["import", "google-pd", str(file), "--config", str(config), "--out", str(tmp_path / "s")], capsys
        )
        assert "cut.msgpack is truncated, or was not written by the authors' code" in said
    assert not (tmp_path / "s").exists()


def _array(shape: object, name: str, content: bytes) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((shape, name, content), use_bin_type=True))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        np.random.default_rng(0).bytes(4096),
        b"PK\x03\x04 a zip",
        msgpack.packb([1, 2, 3]),
        msgpack.packb({"params": {}}),
        msgpack.packb({"ema_params": {"conv_in": 3}}),
        msgpack.packb({"ema_params": {"a": _array([2**40, 2**20], "float32", b"")}}),
        msgpack.packb({"ema_params": {"a": _array([-1], "float32", b"")}}),
        msgpack.packb({"ema_params": {"a": _array([2], "float32", b"123")}}),
        msgpack.packb({"ema_params": {"a": _array([1], "object", b"12345678")}}),
        msgpack.packb({"ema_params": {"a": _array([1], "O", b"12345678")}}),
        msgpack.packb({"ema_params": {"a": _array([1], "no such type", b"1234")}}),
        msgpack.packb({"ema_params": {"a": msgpack.ExtType(2, b"1234")}}),
        msgpack.packb({"ema_params": {"a": msgpack.ExtType(1, b"\xc1")}}),
        msgpack.packb({"ema_params": {"a": {"__msgpack_chunked_array__": True, "shape": {"0": 2}, "chunks": {}}}}),
        msgpack.packb({"ema_params": {}, "num_sample_steps": "eight"}),
        msgpack.packb({"ema_params": {}, "num_sample_steps": -8}),
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
    ],
    ids=lambda content: f"{len(content)}-bytes",
)
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, config: Path, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "foreign.msgpack"
    file.write_bytes(content)
    said = refused(["import", "google-pd", str(file), "--config", str(config), "--out", str(tmp_path / "s")], capsys)
    assert "foreign.msgpack is truncated, or was not written by the authors' code" in said
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ch": 64}, "the tensor conv_in/kernel has shape [3, 3, 3, 32], but [3, 3, 3, 64] is needed"),
        ({"time_embedding_dim": 96}, "the tensor dense0/kernel has shape [32, 64], but [32, 96] is needed"),
        ({"num_classes": 0}, "the tensor class_emb/bias of shape [64] is not part of the network"),
        ({"layers_per_block": 2}, "it has no tensor down_0.block_1/norm1/scale of shape [32]"),
        ({"prediction": "x0"}, "the tensor conv_out/kernel has shape [3, 3, 32, 6], but [3, 3, 32, 3] is needed"),
        ({"attention": [False, False]}, "is not part of the network"),
        ({"multipliers": [1, 3]}, "the tensor down_1.attn_0/norm/scale has shape [64], but [96] is needed"),
    ],
)
def test_the_wrong_configuration_names_the_first_tensor_that_does_not_fit(
    changes: dict[str, object], said: str, checkpoint: Path, tmp_path: Path, capsys: Capture
) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text(json.dumps(json.loads(TINY.model_dump_json()) | changes))
    line = refused(
        ["import", "google-pd", str(checkpoint), "--config", str(wrong), "--out", str(tmp_path / "s")], capsys
    )
    assert said in line
    assert line.endswith("Choose another --config")
    assert not (tmp_path / "s").exists()


def test_a_tensor_that_is_not_finite_is_refused_by_name(tmp_path: Path) -> None:
    held = params(TINY)
    held["conv_in/kernel"][0, 0, 0, 0] = np.nan
    file = tmp_path / "nan.msgpack"
    file.write_bytes(checkpoint_bytes(held))
    with pytest.raises(ValueError, match=r"nan\.msgpack has non-finite values in conv_in/kernel"):
        import_google_pd(file, TINY, tmp_path / "stage")
    assert not (tmp_path / "stage").exists()


def test_a_transposed_array_is_not_taken_for_the_other(tmp_path: Path) -> None:
    held = params(TINY)
    held["down_1.block_0/nin_shortcut/kernel"] = held["down_1.block_0/nin_shortcut/kernel"].T
    with pytest.raises(ValueError, match=r"nin_shortcut/kernel has shape \[64, 32\], but \[32, 64\] is needed"):
        convert(held, TINY)


def test_bad_arguments_get_one_line(
    checkpoint: Path, config: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, out = str(checkpoint), str(tmp_path / "s")
    assert "--config is missing. Use cifar10, imagenet64" in refused(["import", "google-pd", file], capsys)
    assert "did you mean 'cifar10'?" in refused(["import", "google-pd", file, "--config", "cifar"], capsys)
    assert "does not exist" in refused(["import", "google-pd", "nowhere", "--config", "cifar10"], capsys)
    assert "is a folder" in refused(["import", "google-pd", str(tmp_path), "--config", "cifar10"], capsys)
    assert "google-pd" in refused(["import", "google_pd", file, "--config", "cifar10"], capsys)
    (tmp_path / "bad.json").write_text('{"ch": 0}')
    assert "bad.json: image_size" in refused(["import", "google-pd", file, "--config", "bad.json"], capsys)
    (tmp_path / "uneven.json").write_text(json.dumps(json.loads(TINY.model_dump_json()) | {"attention": [True]}))
    assert "one entry per level, but have 2 and 1 entries" in refused(
        ["import", "google-pd", file, "--config", "uneven.json"], capsys
    )
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine.txt").write_text("mine")
    assert "already exists" in refused(["import", "google-pd", file, "--config", str(config), "--out", out], capsys)
    assert (tmp_path / "s" / "mine.txt").read_text() == "mine"


def test_the_released_configurations_have_names() -> None:
    assert config_of("cifar10").prediction == "x0"
    assert config_of("bedroom128") == config_of("church128")
    assert config_of("imagenet64").num_classes == 1000
