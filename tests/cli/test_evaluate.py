"""`halfstep evaluate` from outside: the curve, its files, reused samples, and one line for bad input."""

import csv
import itertools
import json
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.cli import main
from halfstep.cli.evaluating import _recipe, _samples
from halfstep.cli.subjects import EvaluateArguments, Subject
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.data import DataConfig, open_data
from halfstep.measure import store
from halfstep.metrics import frechet_distance
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.recipes import Recipe
from halfstep.runs import EvaluationResult, RunFolder
from halfstep.runs.evaluation import EvaluationTable, Row
from halfstep.runtime.files import read_sealed, write_sealed
from halfstep.runtime.processes import Processes
from halfstep.samplers import sample
from support_cli import Capture, refused
from toys import TINY_ARRAYS


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "240")


def _result(out: Path) -> EvaluationResult:
    return EvaluationResult.model_validate(read_sealed(out / "evaluation.json"))


def _row(table: EvaluationTable, series: str, num_steps: int) -> Row:
    (row,) = [row for row in table.rows if (row.series, row.num_steps) == (series, num_steps)]
    return row


def _stage(run: Path, name: str) -> str:
    return str(run / "stages" / name)


def test_the_students_figures_are_those_of_the_run(toy_run: Path, tmp_path: Path) -> None:
    main(["evaluate", str(toy_run), "--num-steps", "4", "--out", str(tmp_path)])
    sets, same_noise = _result(tmp_path).tables
    for stage in RunFolder(toy_run).stages()[1:]:
        (recorded,) = stage.metrics().results  # type: ignore[union-attr]
        row = _row(sets, "student", recorded.num_steps)
        assert row.stage == stage.name
        assert row.num_evals == recorded.num_evals
        assert row.figures["frechet"].mean == pytest.approx(recorded.frechet, rel=1e-6)
        assert row.figures["kid"].mean == pytest.approx(recorded.kid, rel=1e-6)
        assert _row(same_noise, "student", recorded.num_steps).figures["rmse"].mean > 0
    assert [row.num_steps for row in sets.rows if row.series == "teacher-ddim"] == [4]
    # The teacher at the chain's own start is the reference of the others.
    assert all(row.series == "student" for row in same_noise.rows)
    assert "4 steps, from the same noise" in same_noise.protocol.reference


def test_bfloat16_sampling_is_a_separate_protocol_with_nearly_the_same_figures(
    digits_run: Path, tmp_path: Path
) -> None:
    options = ["evaluate", str(digits_run), "--against", "teacher-ddim", "--num-steps", "2", "--num-samples", "40"]
    main([*options, "--out", str(tmp_path)])
    whole = _result(tmp_path).tables[0]
    main([*options, "--out", str(tmp_path), "--precision", "bf16", "--batch-size", "7"])
    half = _result(tmp_path).tables[0]
    assert (whole.protocol.precision, half.protocol.precision) == ("float32", "bf16")
    assert "sampled in bf16" in (tmp_path / "evaluation.md").read_text()
    found = [_row(table, "teacher-ddim", 2).figures["frechet"].mean for table in (whole, half)]
    # It has its own samples, because it rounds differently, and does not use the existing ones.
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


@pytest.mark.parametrize(("size", "most"), [(None, 75), (7, 7), (300, 300)])
def test_samples_are_drawn_as_many_at_once_as_was_asked(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None, most: int
) -> None:
    asked: list[int] = []
    call = NetworkDenoiser.forward

    def counted(self: NetworkDenoiser, x_t: torch.Tensor, *others: Any) -> Any:
        asked.append(len(x_t))
        return call(self, x_t, *others)

    monkeypatch.setattr(NetworkDenoiser, "forward", counted)
    options = [] if size is None else ["--batch-size", str(size)]
    main(["evaluate", str(toy_run), "--num-steps", "1", "--num-samples", "600", "--out", str(tmp_path), *options])
    assert max(asked) == most


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--batch-size", "16"], "with 16 samples at once: lower --batch-size"),
        ([], "free some memory for this process"),
    ],
)
def test_insufficient_memory_is_reported_in_one_line(
    toy_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    remedy: str,
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    command = ["evaluate", str(toy_run), "--num-steps", "1", "--out", str(tmp_path), *options]
    monkeypatch.setattr("halfstep.models.model.sample", full)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("halfstep: error:")]
    assert "out of memory while sampling, " in line
    assert remedy in line
    monkeypatch.setattr("halfstep.models.model.sample", sample)
    monkeypatch.setattr("halfstep.measure.evaluate.figures_of", full)
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 1
    assert "use fewer samples (--num-samples)" in capsys.readouterr().err


def test_several_sets_of_seeds_are_disjoint_and_have_a_spread(toy_run: Path, tmp_path: Path) -> None:
    options = ["--num-steps", "2", "--num-samples", "20"]
    main(["evaluate", str(toy_run), *options, "--seeds", "2", "--out", str(tmp_path / "two")])
    row = _row(_result(tmp_path / "two").tables[0], "teacher-ddim", 2)
    assert _result(tmp_path / "two").tables[0].protocol.seeds == ["0-19", "20-39"]
    figure = row.figures["frechet"]
    assert len(figure.values) == 2
    assert figure.values[0] != figure.values[1]
    assert figure.mean == pytest.approx(np.mean(figure.values))
    assert figure.spread == pytest.approx(np.std(figure.values, ddof=1))
    main(["evaluate", str(toy_run), *options, "--out", str(tmp_path / "one")])
    alone = _row(_result(tmp_path / "one").tables[0], "teacher-ddim", 2).figures["frechet"]
    assert alone.values == figure.values[:1]
    assert alone.spread is None


def test_figures_of_different_protocols_are_in_different_tables(digits_run: Path, tmp_path: Path) -> None:
    main(
        [
            "evaluate",
            str(digits_run),
            "--num-steps",
            "2",
            "1",
            "--extractors",
            "pixels",
            "classifier",
            "--out",
            str(tmp_path),
        ]
    )
    result = _result(tmp_path)
    assert result.complete
    kinds = [(table.protocol.kind, table.protocol.extractor.split("-")[0]) for table in result.tables]
    assert kinds == [("sets", "pixels"), ("sets", "classifier"), ("same_noise", "none")]
    pixels, classifier, same_noise = result.tables
    # Pixels have no classes, and 8 x 8 images are too small for SSIM: these figures are absent, not zero.
    assert "inception_score" not in pixels.rows[0].figures
    assert 1 <= classifier.rows[0].figures["inception_score"].mean <= 10
    assert set(same_noise.rows[0].figures) == {"rmse", "psnr"}
    assert any("SSIM is omitted because it needs images of at least 11 x 11" in notice for notice in result.notices)
    assert any("is unreliable: 64 dimensions" in notice for notice in result.notices)
    # There are 24 samples and 64 dimensions, so the real data's halves are measured with the same count.
    assert pixels.halves is not None
    assert pixels.halves.num_each == 1797 // 2
    rows = list(csv.DictReader((tmp_path / "evaluation.csv").open()))
    for table in result.tables:
        for row in table.rows:
            for name, figure in row.figures.items():
                (found,) = [
                    r for r in rows
                    if (r["kind"], r["extractor"], r["series"], r["stage"], r["num_steps"], r["metric"])
                    == (table.protocol.kind, table.protocol.extractor, row.series, row.stage, str(row.num_steps), name)
                ]  # fmt: skip
                assert float(found["mean"]) == figure.mean
                assert found["num_samples"] == "24"
                assert found["reference_fingerprint"] == table.protocol.reference_fingerprint
    text = (tmp_path / "evaluation.md").read_text()
    assert text.count("## Against real data") == 2
    assert text.count("Protocol: ") == 3
    assert "<svg" in (tmp_path / "evaluation.svg").read_text()


def test_the_kept_samples_are_lossless_and_give_the_figures(digits_run: Path, tmp_path: Path) -> None:
    main(["evaluate", str(digits_run), "--extractors", "pixels", "--num-steps", "1", "--out", str(tmp_path)])
    (cell,) = (tmp_path / "cells").glob("00-denoise-ddim-0001-*")
    kept = np.load(cell / "samples.npz")["arr_0"]
    assert kept.dtype == np.uint8
    main(
        [
            "sample",
            _stage(digits_run, "00-denoise"),
            "--num-steps",
            "1",
            "--num-samples",
            "24",
            "--out",
            str(tmp_path / "s.npz"),
        ]
    )
    np.testing.assert_array_equal(kept, np.load(tmp_path / "s.npz")["arr_0"])
    real = open_data(DataConfig()).fetch(torch.arange(1797)).x0.flatten(1)
    mine = torch.from_numpy(kept).float().div(127.5).sub(1).flatten(1)
    row = _row(_result(tmp_path).tables[0], "teacher-ddim", 1)
    assert row.figures["frechet"].mean == pytest.approx(frechet_distance(real, mine), rel=1e-5)


def test_a_second_call_draws_nothing_and_an_interrupted_one_resumes(
    toy_run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    sample = Model.sample

    def counted(self: Model, seeds: list[int], num_steps: int | None = None, *rest: object, **more: object) -> object:
        drawn.append(num_steps or 0)
        return sample(self, seeds, num_steps, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "sample", counted)
    command = ["evaluate", str(toy_run), "--num-steps", "2", "1", "--out", str(tmp_path)]
    main(command)
    # Each cell is drawn in eight parts.
    assert Counter(drawn) == {1: 16, 2: 16, 4: 8}
    first = _result(tmp_path)
    drawn.clear()
    main(command)
    assert drawn == []
    assert capsys.readouterr().out.count("(reused)") == 4
    assert _result(tmp_path).tables == first.tables
    # Another extractor needs no new samples.
    main([*command, "--num-samples", "24", "--data", str(toy_run.parent / "toy.npy"), "--extractors", "pixels"])
    assert drawn == []
    # A missing cell and a damaged one are drawn again, and nothing else.
    (gone,) = (tmp_path / "cells").glob("02-halve-0001-ddim-0001-*")
    shutil.rmtree(gone)
    (broken,) = (tmp_path / "cells").glob("00-denoise-ddim-0002-*")
    (broken / "samples.npz").write_bytes(b"PK cut")
    for file in (tmp_path / "figures").glob("00-denoise-ddim-0002-*"):
        file.write_text("{")
    # A killed writer has left these.
    (tmp_path / "cells" / ".x-0001.0a1b.tmp").mkdir()
    (tmp_path / "figures" / ".x.json.0a1b.tmp").write_text("{")
    main(command)
    assert Counter(drawn) == {1: 8, 2: 8}
    assert _result(tmp_path).tables[0].rows[0].figures == first.tables[0].rows[0].figures
    assert not list(tmp_path.rglob("*.tmp"))


def test_writers_of_one_store_keep_the_unfinished_files_of_each_other(
    toy_run: Path, toy_npy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(toy_run, tmp_path / "run")
    main(["evaluate", str(run), "--num-steps", "2"])
    write, others = store.write_arrays, [
        ["evaluate", str(run), "--num-steps", "2"],
        ["run", "arrays", "--data", str(toy_npy), "--out", str(run), *TINY_ARRAYS],
    ]  # fmt: skip

    def interleaved(path: Path, **arrays: Any) -> None:
        # Other commands start while this one is writing samples, and find nothing else to do.
        while others:
            main(others.pop())
        write(path, **arrays)

    monkeypatch.setattr(store, "write_arrays", interleaved)
    main(["evaluate", _stage(run, "01-halve-0002"), "--num-steps", "3"])
    assert not others
    assert len(list(run.glob("evaluation/cells/01-halve-0002-ddim-0003-*/samples.npz"))) == 1


def test_an_evaluation_writes_only_to_its_folder(toy_run: Path, tmp_path: Path) -> None:
    main(["evaluate", str(toy_run), "--num-steps", "2", "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_models_of_a_run_are_in_memory_one_after_another(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[tuple[str, weakref.ref[Model]]] = []
    alive: list[int] = []

    def loading(path: Path) -> Model:
        alive.append(sum(held() is not None for _, held in loaded))
        model = load(path)
        loaded.append((path.name, weakref.ref(model)))
        return model

    monkeypatch.setattr("halfstep.cli.subjects.load", loading)
    argv = ["evaluate", str(toy_run), "--num-steps", "2", "1", "--seeds", "2", "--out", str(tmp_path)]
    main([*argv, "--against", "teacher-ddim", "student-heun"])
    # A model is loaded once for consecutive cells, not for each batch. The reference of the same-noise comparison, the
    # teacher at 4 steps, is drawn last.
    students = ["01-halve-0002", "02-halve-0001"]
    assert [name for name, _ in loaded] == [*students, "00-denoise", *students, "00-denoise"]
    assert max(alive) == 0


def test_the_calls_that_ranks_make_together_depend_on_no_clock(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    agreed: list[str] = []
    on_main, spread, check_same = Processes.on_main, Processes.spread, Processes.check_same

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            calls.append(name)
            return call(*arguments)

        return noted

    def checked(self: Processes, name: str, what: str, remedy: str) -> None:
        agreed.append(name)
        check_same(self, name, what, remedy)

    monkeypatch.setattr(Processes, "on_main", noting("on_main", on_main))
    monkeypatch.setattr(Processes, "spread", noting("spread", spread))
    monkeypatch.setattr(Processes, "check_same", checked)

    def made(clock: Callable[[], float], *steps: str) -> tuple[list[str], list[str]]:
        calls.clear()
        agreed.clear()
        monkeypatch.setattr("halfstep.measure.curve.monotonic", clock)
        main(["evaluate", str(toy_run), "--num-steps", *steps, "--out", str(tmp_path)])
        return calls.copy(), agreed.copy()

    made(lambda: 0.0, "2", "1")
    # Like two ranks that resume: one finds evaluation.json up to date, and the other finds it outdated after each cell.
    still = made(lambda: 0.0, "2", "1")
    assert made(itertools.count(10.0, 10.0).__next__, "2", "1") == still
    # Ranks that would measure different cells are refused.
    assert made(lambda: 0.0, "2")[1] != still[1]


def test_gamma_is_searched_for_each_number_of_steps(toy_run: Path, tmp_path: Path) -> None:
    teacher = _stage(toy_run, "00-denoise")
    ancestral = ["--num-steps", "4", "2", "--against", "teacher-ancestral"]
    tried = {}
    for gamma in ("0", "0.5", "1"):
        out = tmp_path / gamma
        main(["evaluate", teacher, *ancestral, "--gamma", gamma, "--out", str(out)])
        assert _result(out).series[0].gamma == float(gamma)
        # The same results as text state gamma too.
        assert _result(out).series[0].label.endswith(f", gamma {gamma}")
        assert f", gamma {gamma} | 4 |" in (out / "evaluation.md").read_text()
        with (out / "evaluation.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["series"] == "teacher-ancestral"]
        assert {float(row["gamma"]) for row in rows} == {float(gamma)}
        for steps in (4, 2):
            tried[steps, float(gamma)] = (
                _row(_result(out).tables[0], "teacher-ancestral", steps).figures["frechet"].mean
            )
    main(["evaluate", teacher, *ancestral, "--search-gamma", "3", "--out", str(tmp_path / "best")])
    for steps in (4, 2):
        best = _row(_result(tmp_path / "best").tables[0], "teacher-ancestral", steps)
        assert best.figures["frechet"].mean == min(tried[steps, gamma] for gamma in (0.0, 0.5, 1.0))
        assert tried[steps, best.gamma] == best.figures["frechet"].mean  # type: ignore[index]


def test_a_folder_of_images_and_an_npz_are_measured_equally(tmp_path: Path) -> None:
    data = open_data(DataConfig())
    pixels = data.fetch(torch.arange(60)).x0.add(1).mul(127.5).round().to(torch.uint8).squeeze(1).numpy()
    (tmp_path / "images").mkdir()
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "images" / f"{index:04d}.png")
    np.savez(tmp_path / "samples.npz", arr_0=pixels[..., None])
    figures = []
    for name in ("images", "samples.npz"):
        out = tmp_path / f"out-{name}"
        main(["evaluate", str(tmp_path / name), "--data", "digits", "--extractors", "pixels", "--out", str(out)])
        result = _result(out)
        assert result.kind == "images"
        (row,) = result.tables[0].rows
        assert row.num_steps is None
        figures.append(row.figures)
    assert figures[0] == figures[1]
    # They are real samples: each is in its own neighbourhood.
    assert figures[0]["precision"].mean == 1
    whole = data.fetch(torch.arange(1797)).x0.flatten(1)
    assert figures[0]["frechet"].mean == pytest.approx(frechet_distance(whole, whole[:60]), rel=1e-5)


def test_samples_in_a_folder_named_digits_are_not_replaced_by_the_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    real = open_data(DataConfig(limit=20))
    Path("digits").mkdir()
    for index in range(5):
        Image.fromarray(np.full((8, 8), index, np.uint8)).save(f"digits/{index:06d}.png")
    samples = _samples(Path("digits"), real)
    assert torch.equal(samples.fetch(torch.arange(5)).x0[:, 0, 0, 0], torch.arange(5) / 127.5 - 1)
    assert len(samples) == 5


def test_an_exported_pipeline_gives_the_figures_of_its_stage(digits_run: Path, tmp_path: Path) -> None:
    student = RunFolder(digits_run).stages()[-1]
    main(["export", str(student.path), "--out", str(tmp_path / "pipeline")])
    common = ["--data", "digits", "--extractors", "pixels", "--num-steps", "1"]
    main(["evaluate", str(tmp_path / "pipeline"), *common, "--num-samples", "24", "--out", str(tmp_path / "a")])
    main(["evaluate", str(student.path), *common, "--out", str(tmp_path / "b")])
    theirs, ours = _result(tmp_path / "a").tables[0].rows[0], _result(tmp_path / "b").tables[0].rows[0]
    assert theirs.series == "teacher-ddim"
    assert theirs.figures["frechet"].mean == pytest.approx(ours.figures["frechet"].mean, rel=1e-3)


def test_damaged_and_missing_parts_are_skipped_with_a_note(toy_run: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"
    shutil.copytree(toy_run, run)
    first, last = RunFolder(run).stages()[1:]
    weights = first.path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    shutil.rmtree(last.path)
    main(["evaluate", str(run), "--num-steps", "2"])
    result = RunFolder(run).evaluation()
    assert result is not None
    assert {row.series for row in result.tables[0].rows} == {"teacher-ddim"}
    printed = " ".join(capsys.readouterr().out.split())
    skipped = f"Stage {first.name} is damaged and was skipped"
    for said in (skipped, f"The run is not finished, and {last.name} does not exist yet"):
        assert any(said in notice for notice in result.notices)
        assert said in printed
    teacher = run / "stages" / "00-denoise" / "model.safetensors"
    whole = shutil.copytree(toy_run, tmp_path / "whole")
    (whole / "stages" / "00-denoise" / "model.safetensors").write_bytes(b"")
    main(["evaluate", str(whole), "--num-steps", "2"])
    held = RunFolder(whole).evaluation()
    assert held is not None
    assert {row.series for row in held.tables[0].rows} == {"student"}
    teacher.write_bytes(b"")
    assert "has no stage that can be measured" in refused(["evaluate", str(run)], capsys)


def test_an_interrupted_run_has_consistent_files(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["evaluate", str(toy_run), "--num-steps", "1", "--out", str(tmp_path)])
    sample = Model.sample

    def cut(self: Model, seeds: list[int], num_steps: int | None = None, *rest: object, **more: object) -> object:
        if num_steps == 3:
            raise KeyboardInterrupt
        return sample(self, seeds, num_steps, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "sample", cut)
    with pytest.raises(SystemExit):
        main(["evaluate", str(toy_run), "--num-steps", "3", "2", "--num-samples", "20", "--out", str(tmp_path)])
    assert not _result(tmp_path).complete
    said = (tmp_path / "evaluation.md").read_text()
    assert "The evaluation was interrupted or is still running" in said
    assert "20 samples" in said
    with (tmp_path / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    tables = _result(tmp_path).tables
    assert len(rows) == sum(len(row.figures) for table in tables for row in table.rows)


def test_a_row_covers_all_sets_of_seeds_or_is_omitted(
    toy_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Model.sample

    def broken(self: Model, seeds: list[int], num_steps: int | None = None, *rest: object, **more: object) -> object:
        drawn = sample(self, seeds, num_steps, *rest, **more)  # type: ignore[arg-type]
        return drawn * float("nan") if num_steps == 2 and 20 in seeds else drawn

    monkeypatch.setattr(Model, "sample", broken)
    options = ["--num-steps", "3", "2", "--num-samples", "20", "--seeds", "2", "--against", "teacher-ddim"]
    main(["evaluate", _stage(toy_run, "00-denoise"), *options, "--out", str(tmp_path)])
    result = _result(tmp_path)
    assert [row.num_steps for row in result.tables[0].rows] == [3]
    assert not result.complete
    assert any("at 2 steps was skipped" in notice for notice in result.notices)


def test_times_of_another_machine_are_no_column_with_those_of_this(toy_run: Path, tmp_path: Path) -> None:
    command = ["evaluate", _stage(toy_run, "00-denoise"), "--num-steps", "3", "2", "--out", str(tmp_path)]
    main(command)
    (cell,) = (tmp_path / "cells").glob("00-denoise-ddim-0003-*/cell.json")
    held = json.loads(cell.read_text())
    write_sealed(cell, held | {"pace": ["NVIDIA H100", 1]})
    main(command)
    there = {row.num_steps: row.seconds_per_1000 for row in _result(tmp_path).tables[0].rows}
    assert there[3] is None
    assert there[2] is not None


def test_photos_of_mixed_sizes_are_resized_to_the_samples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index, side in enumerate([8, 9, 12, 16] * 3):
        for folder in ("photos", "samples"):
            (tmp_path / folder).mkdir(exist_ok=True)
            size = side if folder == "photos" else 8
            picture = random.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / folder / f"{index}.png")
    words = ["--data", str(tmp_path / "photos"), "--image-size", "8", "--extractors", "pixels"]
    main(["evaluate", str(tmp_path / "samples"), *words, "--out", str(tmp_path / "out")])
    (table,) = _result(tmp_path / "out").tables
    assert (table.protocol.num_reference, table.protocol.reference_split) == (12, None)


def test_other_data_is_read_without_the_limit_and_the_column_of_the_runs_data(tmp_path: Path) -> None:
    own = DataConfig(source="photos", label_column="kind", limit=10, image_size=8)
    subject = Subject("run", tmp_path, Recipe(name="r", data=own))

    def data(**asked: Any) -> DataConfig:
        return _recipe(subject, EvaluateArguments(subject="run", **asked)).data

    assert data() == own
    assert data(data="others") == DataConfig(source="others", image_size=8)
    assert data(data="others", label_column="part").label_column == "part"
    assert data(label_column="part") == own.model_copy(update={"label_column": "part"})


def test_bad_input_is_refused_in_one_line(toy_run: Path, digits_run: Path, tmp_path: Path, capsys: Capture) -> None:
    toy, student = str(toy_run), _stage(toy_run, "02-halve-0001")
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((20, 16, 16, 1), np.uint8))
    np.savez(tmp_path / "one.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    (tmp_path / "weights.safetensors").write_bytes(b"nothing")
    resnet = "resnet20-cifar10"
    out = ["--out", str(tmp_path / "out")]
    cases = [
        (["evaluate", str(tmp_path / "none")], "does not exist"),
        (["evaluate", toy, "--num-samples", "1"], "--num-samples must be at least 2, got 1"),
        (["evaluate", toy, "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["evaluate", toy, "--num-steps", "0"], "--num-steps must be"),
        (["evaluate", toy, "--search-gamma", "1"], "--search-gamma must be at least 2, got 1"),
        (["evaluate", toy, "--search-gamma", "3", "--gamma", "0.5"], "Remove one"),
        (["evaluate", toy, "--gamma", "0.5"], "have no effect without --against teacher-ancestral"),
        (["evaluate", toy, "--against", "teacher-hein"], "unknown sampler 'hein'; did you mean 'heun'?"),
        (["evaluate", toy, "--against", "heun"], "Use teacher-SAMPLER or student-SAMPLER"),
        (["evaluate", student, "--against", "teacher-ddim"], "needs a teacher, but this stage has none"),
        (["evaluate", toy, "--extractors", "pixel"], "unknown feature extractor 'pixel'; did you mean 'pixels'?"),
        (["evaluate", toy, "--extractors", "pixels=x"], "do not take a file"),
        (["evaluate", toy, "--extractors", "classifier"], "need labels"),
        (["evaluate", str(digits_run), "--extractors", resnet], f"Set {resnet}=PATH"),
        (["evaluate", str(digits_run), "--extractors", f"{resnet}={tmp_path}/no"], "no such file"),
        (
            ["evaluate", str(digits_run), "--extractors", f"{resnet}={tmp_path}/weights.safetensors"],
            "not a complete safetensors file",
        ),
        (
            ["evaluate", str(digits_run), "--extractors", f"dinov2={tmp_path}"],
            "cannot load a DINOv2 model",
        ),
        (["evaluate", str(digits_run), "--data", f"{toy_run.parent}/toy.npy"], "generates images in [-1, 1], but"),
        (["evaluate", str(digits_run), "--data", f"{tmp_path}/other.npz"], "has samples of shape [1, 8, 8], but"),
        (["evaluate", f"{tmp_path}/other.npz"], "its data is unknown. Add --data"),
        (["evaluate", f"{tmp_path}/other.npz", "--data", "digits"], "Use a reference of the same size"),
        (["evaluate", f"{tmp_path}/one.npz", "--data", "digits"], "but 2 are needed"),
        (["evaluate", f"{tmp_path}/other.npz", "--data", f"{toy_run.parent}/toy.npy"], "of the same kind"),
        (
            ["evaluate", f"{tmp_path}/other.npz", "--data", "digits", "--seeds", "2"],
            "no effect when the samples are read from files",
        ),
    ]
    for argv, said in cases:
        assert said in refused([*argv, *out], capsys), argv
    assert not (tmp_path / "out" / "evaluation.json").exists()
    for file in ("other.npz", "other.npz/x"):
        said = refused(["evaluate", toy, "--out", str(tmp_path / file)], capsys)
        assert f"{tmp_path}/other.npz is a file, so" in said
        assert said.endswith("cannot be a folder. Choose another --out")
