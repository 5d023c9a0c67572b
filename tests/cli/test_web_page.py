"""`halfstep export --format web`: supported and rejected models."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from halfstep.cli import exporting, main
from halfstep.models.model import Model
from halfstep.runtime.files import read_sealed, write_sealed
from report.asked_run import write_asked_run
from support_cli import Capture, refused


class Recorder:
    """The arguments of the page's export, recorded instead of exporting it."""

    def __init__(self) -> None:
        self.models: list[tuple[str, int | None]] = []
        self.others: tuple[object, ...] = ()

    def __call__(self, models: Sequence[tuple[Model, int | None]], *others: object) -> int:
        self.models, self.others = [(model.manifest.stage, steps) for model, steps in models], others
        return 1_500_000


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(exporting, "export_web", recorder)
    return recorder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_asked_run(tmp_path_factory.mktemp("asked") / "mine")


def test_a_run_offers_its_students_at_their_own_steps(run: Path, made: Recorder, capsys: Capture) -> None:
    main(["export", str(run), "--format", "web", "--out", "page.html", "--single-file", "--runtime", "ort.tgz"])
    assert made.models == [("02-halve-0002", 2), ("01-halve-0004", 4)]
    assert made.others == (Path("page.html"), "mine", True, Path("ort.tgz"))
    assert capsys.readouterr().out == "page.html: 1.5 MB; open it in a browser\n"


def test_a_later_student_replaces_an_earlier_one_of_as_many_steps(tmp_path: Path, made: Recorder) -> None:
    run = write_asked_run(tmp_path / "run")
    manifest = run / "stages/02-halve-0002/manifest.json"
    held = read_sealed(run / "recipe.json")
    for row in held["plan"]:
        row["num_steps"] = 4 if row["stage"] == "02-halve-0002" else row["num_steps"]
    write_sealed(run / "recipe.json", held)
    write_sealed(manifest, read_sealed(manifest) | {"outcome": {"role": "student", "num_steps": 4}})
    main(["export", str(run), "--format", "web", "--out", "page"])
    assert made.models == [("02-halve-0002", 4)]
    write_sealed(manifest, read_sealed(manifest) | {"weights_kept": False, "files": {}})
    main(["export", str(run), "--format", "web", "--out", "page"])
    assert made.models == [("01-halve-0004", 4)]


def test_a_stage_or_a_number_of_steps_is_one_choice(run: Path, made: Recorder) -> None:
    main(["export", str(run / "stages/01-halve-0004"), "--format", "web", "--out", "page"])
    assert made.models == [("01-halve-0004", None)]
    main(["export", str(run), "--format", "web", "--out", "page", "--num-steps", "8"])
    assert made.models == [("02-halve-0002", 8)]


def test_a_run_without_a_student_offers_its_teacher(tmp_path: Path, made: Recorder) -> None:
    run = write_asked_run(tmp_path / "run", trained=1)
    main(["export", str(run), "--format", "web", "--out", "page", "--num-steps", "8"])
    assert made.models == [("00-denoise", 8)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--format", "web", "--single-file", "--out", "page"],
            "--out page is not an HTML file. Choose a name that ends in .html",
        ),
        (
            ["--format", "onnx", "--single-file", "--out", "a.onnx"],
            "--single-file has no effect with --format onnx. Remove it",
        ),
        (["--runtime", "ort.tgz", "--out", "page"], "--runtime has no effect with --format diffusers. Remove it"),
        (["--format", "web", "--push-to-hub", "a/b", "--out", "page"], "--push-to-hub has no effect with --format web"),
        (["--format", "web", "--runtime", "none.tgz", "--out", "page"], "none.tgz is not the npm package"),
    ],
)
def test_what_cannot_be_is_refused(run: Path, words: list[str], said: str, capsys: Capture) -> None:
    assert said in refused(["export", str(run), *words], capsys)


def test_samples_of_points_have_no_page(tmp_path: Path, capsys: Capture) -> None:
    run = write_asked_run(tmp_path / "run", points=True)
    words = ["export", str(run), "--format", "web", "--out", str(tmp_path / "page")]
    assert "samples of shape [2] are not grey or colour images. Use --format onnx." in refused(words, capsys)
