"""The page of reproductions is generated from its JSON, and every study has its paragraph."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from halfstep.studies import studies

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproductions", DOCS / "reproductions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_generated_from_the_results_that_lie_beside_it(generator: ModuleType, tmp_path: Path) -> None:
    committed = (DOCS / "pages" / "reproductions.md").read_text(encoding="utf-8")
    assert generator.page(tmp_path / "studies") == committed, "run `python docs/reproductions.py`"
    figures = {path.name for path in (tmp_path / "studies").glob("*.svg")}
    assert figures == {path.name for path in (DOCS / "pages" / "studies").glob("*.svg")}
    assert all(f"studies/{name}" in committed for name in figures)


def test_every_study_has_a_place_on_the_page(generator: ModuleType) -> None:
    assert set(generator.ORDER) == set(studies)


def test_a_result_of_other_settings_is_not_published(generator: ModuleType, tmp_path: Path) -> None:
    """Tables describe the scale's settings, so a result with other settings would be described wrongly."""

    for folder in ("results", "reproductions"):
        shutil.copytree(DOCS / folder, tmp_path / folder)
    files = sorted((tmp_path / "results" / "studies").glob("*.json"))
    held = json.loads(files[0].read_text(encoding="utf-8"))
    held["scale"]["name"] = "other"
    files[0].write_text(json.dumps(held), encoding="utf-8")
    generator.DOCS, before = tmp_path, generator.DOCS
    try:
        with pytest.raises(SystemExit, match="was run with different settings of smoke"):
            generator.page(tmp_path / "figures")
    finally:
        generator.DOCS = before
