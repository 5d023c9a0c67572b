"""The doctor's findings, also with broken packages."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from halfstep.cli import doctor, main
from support_cli import Capture

ROOT = Path(__file__).parents[2]


def test_the_doctor_ends_with_0_and_one_document(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "_diffusers", lambda: [doctor.Finding("diffusers", "problem", "broken", "mend it")])
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "not" / "there" / "yet"))
    main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == 1
    assert found["versions"]["torch"] == doctor.version_of("torch")
    by_name = {finding["what"]: finding for finding in found["findings"]}
    assert str(tmp_path / "not" / "there" / "yet") in by_name["cache"]["found"]
    assert by_name["cache"]["verdict"] == "ok"
    assert not (tmp_path / "not").exists()
    assert f"{torch.get_num_threads()} threads" in by_name["cpu"]["found"]
    main(["doctor"])
    printed = capsys.readouterr().out
    assert "1 problem" in printed
    assert "mend it" in printed


@pytest.mark.parametrize("importer", ["torchvision", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_a_torchvision_that_breaks_diffusers_is_named(
    importer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that fails like one built for another torch: when its operators are registered.

    Importing diffusers this way takes five seconds, so the quick form imports torchvision alone.
    """
    run = subprocess.run
    if importer == "torchvision":
        alone = [sys.executable, "-c", "import torchvision"]
        monkeypatch.setattr(doctor.subprocess, "run", lambda _, **options: run(alone, **options))
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    for name in ("transforms", "ops", "io"):
        (package / f"{name}.py").write_text("")
    meta = tmp_path / "torchvision-0.99.0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    [finding] = doctor._diffusers()
    assert finding.verdict == "problem"
    assert "torchvision 0.99.0 is incompatible with torch" in finding.found
    assert "nms" in finding.found
    assert "pip uninstall torchvision" in str(finding.advice)


def test_another_failure_of_diffusers_is_not_blamed_on_torchvision() -> None:
    finding = doctor.diffusers_failure("Traceback\nImportError: no peft\n", "2.9", "0.24")
    assert "ImportError: no peft" in finding.found
    assert "torchvision" not in finding.found + str(finding.advice)


def test_a_device_without_float64_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like Metal's devices, which raise a TypeError for it."""
    assert doctor.device_finding("cpu").verdict == "ok"
    made = torch.zeros

    def zeros(*size: int, dtype: torch.dtype | None = None, device: object = None) -> torch.Tensor:
        if dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return made(*size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", zeros)
    finding = doctor.device_finding("cpu")
    assert finding.verdict == "missing"
    assert "no float64" in finding.found
    assert "runs on the CPU" in str(finding.advice)
    assert "does not work" in doctor.device_finding("abacus").found


def test_a_driver_without_a_build_of_torch_for_it_leads_to_that_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "version", SimpleNamespace(cuda=None, hip=None))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    (finding,) = (finding for finding in doctor._torch() if finding.what == "accelerator")
    assert str(finding.advice).endswith("Install the torch build for your GPU")


def test_places_that_cannot_be_written_or_are_full_are_problems(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    assert doctor.place_finding("cache", tmp_path / "a" / "b", "").verdict == "ok"
    assert "is a file" in doctor.place_finding("cache", tmp_path / "file" / "b", "").found
    assert "cannot write to" in doctor.place_finding("cache", Path("/proc/halfstep"), "elsewhere").found
    monkeypatch.setattr(doctor, "LEAST_DISK", 2**80)
    assert doctor.place_finding("cache", tmp_path, "").verdict == "problem"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_missing_packages_are_listed_with_their_purpose() -> None:
    finding = doctor.extra_finding("lora", ("peft", "a-package-that-is-not"), "halfstep[lora]")
    assert finding.verdict == "missing"
    assert "not installed: a-package-that-is-not; needed for LoRA students" in finding.found
    assert finding.advice == "pip install 'halfstep[lora]'"


def test_every_extra_of_the_project_is_explained() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(project["optional-dependencies"]) <= set(doctor.GIVES)
    assert set(doctor.extras()) >= {"text", "lora", "onnx"}
    assert doctor.extras()["onnx"] == ("onnx", "onnxruntime", "onnxscript")
