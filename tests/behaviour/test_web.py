"""The parts of the page, without a browser: runtime, weights, files."""

import base64
import gzip
import io
import json
import re
import shutil
import tarfile
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import V
from halfstep.hub import export_onnx, export_web
from halfstep.hub.web import page, runtime
from halfstep.hub.web.page import SMALLEST, halve_weights
from halfstep.models.model import Model
from halfstep.nets import MLP, describe_network
from halfstep.runs import Manifest


def small_model(**changes: Any) -> Model:
    """Return a residual network of small images that is fast to export."""
    torch.manual_seed(0)
    shape = changes.get("shape", (1, 4, 6))
    network = MLP(shape, width=16, depth=1)
    facts: dict[str, Any] = {
        "stage": "s", "objective": "halve", "parent": None, "outcome": {"role": "student", "num_steps": 1},
        "num_updates": 1, "seconds": 1.0, "shape": shape, "is_image": True, "clip": True,
        "network": describe_network(network), "process": processes.describe(VPCosine()), "prediction": {"type": "v"},
        "files": {},
    }  # fmt: skip
    return Model(NetworkDenoiser(network, VPCosine(), V()), Manifest(**facts | changes)).eval()


# --- The runtime ---

CONTENTS = {runtime.MODULE: b"export {}", runtime.BINARY: b"\0asm"}


def write_package(path: Path, contents: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serve a package with small files instead of onnxruntime-web from the npm registry, with an empty cache."""
    file = write_package(tmp_path / "registry.tgz", CONTENTS)
    monkeypatch.setattr(runtime, "SHA256", {name: sha256(content).hexdigest() for name, content in CONTENTS.items()})
    monkeypatch.setattr(runtime, "URL", file.as_uri())
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    return file


def test_the_runtime_is_fetched_once(registry: Path) -> None:
    assert runtime.read_runtime() == CONTENTS
    registry.unlink()
    assert runtime.read_runtime() == CONTENTS


def test_a_damaged_cache_is_filled_again(registry: Path, tmp_path: Path) -> None:
    runtime.read_runtime()
    (held,) = (tmp_path / "cache").glob(f"*/dist/{runtime.BINARY}")
    held.write_bytes(b"\0as")
    assert runtime.read_runtime() == CONTENTS
    assert held.read_bytes() == CONTENTS[runtime.BINARY]


def test_an_unreachable_registry_is_reported_with_the_package_to_download(registry: Path) -> None:
    registry.unlink()
    with pytest.raises(
        ValueError, match=r"cannot be downloaded .* On another machine, download https:\S+\.tgz"
    ) as refusal:
        runtime.read_runtime()
    assert "\n" not in str(refusal.value)


def test_a_downloaded_package_is_read_packed_and_unpacked(registry: Path, tmp_path: Path) -> None:
    with tarfile.open(registry) as archive:
        archive.extractall(tmp_path, filter="data")
    assert runtime.read_runtime(registry) == runtime.read_runtime(tmp_path / "package") == CONTENTS
    assert not (tmp_path / "cache").exists()


def test_a_folder_instead_of_a_file_is_refused(registry: Path) -> None:
    with tarfile.open(registry, "w:gz") as archive:
        for name in CONTENTS:
            folder = tarfile.TarInfo(f"package/dist/{name}")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
    for source in (registry, None):
        with pytest.raises(ValueError, match=r"is not a file.*--runtime\.$"):
            runtime.read_runtime(source)


@pytest.mark.parametrize("contents", [CONTENTS | {runtime.BINARY: b"\0asn"}, {runtime.MODULE: b"export {}"}])
def test_another_package_is_refused_and_never_cached(
    registry: Path, tmp_path: Path, contents: dict[str, bytes]
) -> None:
    write_package(registry, contents)
    for source in (registry, None):
        with pytest.raises(ValueError, match=r"--runtime\.$"):
            runtime.read_runtime(source)
    assert not list((tmp_path / "cache").rglob(runtime.MODULE))
    with pytest.raises(ValueError, match="is not the npm package"):
        runtime.read_runtime(tmp_path / "nothing.tgz")


@pytest.mark.parametrize("spoil", ["cut", "overwrite"])
def test_a_damaged_package_is_refused_in_one_line(registry: Path, spoil: str) -> None:
    # Digits are compressed, unlike random bytes. The damage is in the second file.
    contents = {name: np.random.default_rng(0).bytes(25_000).hex().encode() for name in CONTENTS}
    whole = write_package(registry, contents).read_bytes()
    place = len(whole) * 3 // 4
    registry.write_bytes(whole[:place] if spoil == "cut" else whole[:place] + b"\xff" * 200 + whole[place + 200 :])
    for source in (registry, None):
        with pytest.raises(ValueError, match=r"--runtime\.$") as refusal:
            runtime.read_runtime(source)
        assert "\n" not in str(refusal.value)


# --- Weights ---


def weights_of(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer}


def test_weights_of_half_the_bytes_are_near_for_each_channel(tmp_path: Path) -> None:
    """An error is at most 2^-16 of the channel's largest weight, however different the channels are."""
    from onnxruntime import InferenceSession

    values = np.random.default_rng(0).standard_normal((5, 3, 40)).astype(np.float32)
    values *= np.float32([1e-6, 1, 0, 1e4, 3e9])[:, None, None]
    small = np.full((SMALLEST - 1,), 1 / 3, np.float32)
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name} again"]) for name in ("large", "small")],
        "g",
        [],
        [helper.make_tensor_value_info(f"{name} again", TensorProto.FLOAT, None) for name in ("large", "small")],
        [numpy_helper.from_array(values, "large"), numpy_helper.from_array(small, "small")],
    )
    whole, halved = tmp_path / "whole.onnx", tmp_path / "halved.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)]), whole)
    halve_weights(whole, halved)
    found, same = InferenceSession(halved, providers=["CPUExecutionProvider"]).run(None, {})
    largest = np.abs(values).max(axis=(1, 2), keepdims=True)
    assert (np.abs(found - values) <= 2**-16 * (1 + 1e-3) * largest).all()
    np.testing.assert_array_equal(same, small)
    sizes = [sum(weight.nbytes for weight in weights_of(file).values()) for file in (whole, halved)]
    assert sizes[1] - small.nbytes < 0.52 * (sizes[0] - small.nbytes)


def test_weights_stay_float32_if_halving_them_would_change_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, kinds = small_model(), []
    whole = export_onnx(model, tmp_path / "sampler.onnx")
    monkeypatch.setattr(page, "export_onnx", lambda model, out, steps: shutil.copyfile(whole, out))
    for near in (page.NEAR, 0.0):
        monkeypatch.setattr(page, "NEAR", near)
        file = tmp_path / "graph.onnx"
        file.write_bytes(page._graph(model, 1))
        kinds.append({weight.dtype for weight in weights_of(file).values() if weight.size >= SMALLEST})
    assert kinds == [{np.dtype(np.int16)}, {np.dtype(np.float32)}]


# --- Files ---


@pytest.fixture
def quick(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace graphs with texts that give their number of steps."""
    monkeypatch.setattr(page, "_graph", lambda model, steps: f"graph of {steps} steps".encode())


def held_in(html: str) -> dict[str, bytes]:
    """Return the files that a page contains."""
    found = re.findall(r'data-file="([^"]+)">([^<]*)<', html)
    return {name: gzip.decompress(base64.b64decode(content)) for name, content in found}


def test_a_folder_and_a_file_contain_the_same(quick: None, tmp_path: Path) -> None:
    models: Sequence[tuple[Model, int | None]] = [(small_model(), None), (small_model(outcome={"role": "teacher"}), 4)]
    sizes = [
        export_web(models, tmp_path / "page.html", "A <name> & $more", single_file=True),
        export_web(models, tmp_path / "page", "A <name> & $more"),
    ]
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    beside = {file.name: file.read_bytes() for file in (tmp_path / "page").iterdir()}
    assert sizes == [len(html.encode()), sum(map(len, beside.values()))]
    assert "<title>A &lt;name&gt; &amp; $more</title>" in html
    index = beside.pop("index.html").decode()
    assert held_in(index) == {}
    unpacked = {name: gzip.decompress(held) if name.endswith(".gz") else held for name, held in beside.items()}
    assert held_in(html) == unpacked
    assert unpacked["sampler-1.onnx"] == b"graph of 1 steps"
    assert unpacked["sampler-4.onnx"] == b"graph of 4 steps"
    assert unpacked[f"{runtime.BINARY}.gz"] == CONTENTS[runtime.BINARY]
    assert b"MIT License" in unpacked[page.LICENCES]
    # A page from disk sends no requests, and one in a folder only requests the folder's files.
    assert "connect-src 'none'" in html
    assert "connect-src 'self'" in index
    facts = json.loads(re.findall(r'id="facts">(.*?)</script>', html)[0])
    assert [graph["steps"] for graph in facts["graphs"]] == [1, 4]
    assert facts["shape"] == [1, 4, 6]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"is_image": False}, r"samples of shape \[1, 4, 6\] are not grey or colour images"),
        ({"shape": (4, 8, 8)}, r"samples of shape \[4, 8, 8\] are not grey or colour images"),
        ({"conditions": {"prompt": (4, 8)}}, "the page has no field for the condition prompt"),
        ({"outcome": {"role": "teacher"}}, "works with any number of steps. Choose one"),
    ],
)
def test_models_without_a_page_are_refused(quick: None, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        export_web([(small_model(**changes), None)], tmp_path / "page", "digits")
    assert not (tmp_path / "page").exists()


def test_large_models_and_existing_outputs_are_rejected(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="already exists"):
        export_web([(small_model(), None)], tmp_path / "registry.tgz", "digits", single_file=True)
    monkeypatch.setattr(page, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"0 MB of weights are too large for a web page"):
        export_web([(small_model(), None)], tmp_path / "page", "digits")


def test_a_graph_names_no_file_of_the_machine_that_made_it(tmp_path: Path) -> None:
    file = export_onnx(small_model(), tmp_path / "sampler.onnx")
    assert str(Path(torch.__file__).parent).encode() not in file.read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()
