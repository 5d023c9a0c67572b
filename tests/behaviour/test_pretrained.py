"""Packaged students are loaded by name and sampled without network access; nothing is written into the package."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import halfstep
from halfstep.cli import main
from halfstep.cli.subjects import subject_of
from halfstep.models.folder import PRETRAINED, pretrained, save_stage
from halfstep.runs import StageFolder
from support_cli import Capture, refused

NAMES = sorted(pretrained())
HEADER = 32_768
"""Maximum bytes of the names and shapes in a weights file."""


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    }


def test_the_package_contains_a_student_of_clothes() -> None:
    assert "fashion" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_student_is_small_half_precision_and_has_a_card(name: str) -> None:
    file = PRETRAINED / name / "model.safetensors"
    numbers = sum(parameter.numel() for parameter in halfstep.load(name).denoiser.parameters())
    assert file.stat().st_size <= 2 * numbers + HEADER
    assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {torch.float16}
    card = (PRETRAINED / name / "README.md").read_text()
    assert f'halfstep.load("{name}")' in card
    assert "licence" in card.lower()


@pytest.mark.parametrize("name", NAMES)
def test_a_packaged_student_samples_by_name_in_float32(name: str) -> None:
    model = halfstep.load(name)
    assert model.role == "student"
    assert {parameter.dtype for parameter in model.denoiser.parameters()} == {torch.float32}
    both = model.sample(range(4))
    torch.testing.assert_close(model.sample([2]), both[2:3], rtol=0, atol=1e-5)
    # Pictures, neither grey areas nor noise. A fresh network of this kind predicts 0 everywhere.
    assert both.std() > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_commands_take_the_name_and_write_nothing_into_the_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    before = _digests(PRETRAINED)
    main(["sample", name, "--num-samples", "3", "--out", "three.npz"])
    drawn = np.load("three.npz")["arr_0"]
    x0 = halfstep.load(name).sample(range(3)).clamp(-1, 1)
    assert np.abs(drawn[..., 0] - (x0[:, 0].numpy() * 127.5 + 127.5)).max() <= 1
    # For any other stage, an evaluation would be written next to the model, so the package must be detected first.
    assert subject_of(name).out == Path(f"evaluation-{name}")
    assert _digests(PRETRAINED) == before


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = halfstep.load("fashion")
    zeroed = halfstep.load("fashion")
    with torch.no_grad():
        for parameter in zeroed.denoiser.parameters():
            parameter.zero_()
    save_stage(StageFolder(Path("fashion")), zeroed.denoiser, zeroed.manifest)
    torch.testing.assert_close(halfstep.load("fashion").sample([0]), zeroed.sample([0]))
    assert not torch.equal(packaged.sample([0]), zeroed.sample([0]))


def test_an_unknown_name_gets_the_list_of_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    said = refused(["sample", "fashon", "--out", "x.npz"], capsys)
    assert "fashon does not exist" in said
    assert "packaged student (fashion)" in said
