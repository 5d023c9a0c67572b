"""The report's chain, evaluation, studies, neighbours and cost."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfstep.cli import main
from halfstep.data import DataConfig, MemoryData, open_data
from halfstep.measure.nearest import nearest_samples
from halfstep.recipes import recipes
from halfstep.report import headline, read_run, write_report
from halfstep.report.evaluation import curves_of
from halfstep.report.evaluation import text_table as evaluation_table
from halfstep.report.page import MOST_BYTES
from halfstep.report.quality import Group, quality_groups, text_table
from halfstep.report.words import number, times
from halfstep.runs import EvaluationResult, RunFolder
from halfstep.runtime.files import write_json, write_sealed
from report.fake_run import (
    HEUN,
    STUDENT_STEPS,
    digit_samples,
    fake_evaluation,
    figure,
    frechet,
    result,
    write_fake_evaluation,
    write_fake_run,
    write_stage,
)
from report.test_report import Page, reported
from support_cli import Capture, refused


def rmse(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a / 127.5 - b / 127.5) ** 2)))


# --- The chain ---


def test_each_student_is_compared_with_its_own_teacher_and_with_the_first(tmp_path: Path) -> None:
    page = reported(write_fake_run(tmp_path / "run"))
    rows = {row[0]: row for row in page.table("Stage")[2:]}
    for index, steps in enumerate(STUDENT_STEPS):
        row = rows[f"{index + 1:02d}-halve-{steps:04d}"]
        # The distance to the first model is that of the table of figures, from more samples than are stored.
        to_first = result(steps, True).teacher_rmse
        to_parent = to_first
        if index:
            to_parent = rmse(digit_samples(steps, True), digit_samples(STUDENT_STEPS[index - 1], True))
        assert row[6:8] == [number(to_parent), number(to_first)]
    assert rows["00-denoise"][6:8] == ["–", "–"]
    assert rows["00-denoise"][3] == "0.00100"


def test_samples_of_other_shapes_are_not_compared(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128, 64), planned=(128, 64))
    np.savez(run / "stages/02-halve-0064/samples/steps-0064.npz", arr_0=digit_samples(64, True)[:5])
    assert {row[0]: row for row in reported(run).table("Stage")[2:]}["02-halve-0064"][6] == "–"


def test_the_cost_follows_from_times_and_figures(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    content = json.loads((run / "recipe.json").read_text())
    recipe = recipes["digits"]()
    content["recipe"] = recipe.model_dump(mode="json")
    content["environment"]["threads"] = 4
    write_sealed(run / "recipe.json", content)
    page = reported(run)
    spent = dict(page.table("Teacher"))
    assert spent["Teacher"] == f"6 min 51 s, 2,000 updates of {recipe.teacher.batch_size} samples"
    # The chain and the finish have different batches.
    batch = recipe.chain.training.batch_size
    assert recipe.finish.steps
    assert recipe.finish.training.batch_size != batch
    assert spent["Students"] == "12 min 28 s, 3,200 updates, 8 stages"
    content["recipe"]["finish"]["steps"] = []
    write_sealed(run / "recipe.json", content)
    told = dict(reported(run).table("Teacher"))
    assert told["Students"] == f"12 min 28 s, 3,200 updates of {batch} samples, 8 stages"
    assert spent["Hardware"] == "NVIDIA H100, 16 CPU cores, torch on 4 threads"
    steps = int(re.search(r"A student with (\d+) network calls instead", page.text)[1])  # type: ignore[index]
    stages = STUDENT_STEPS.index(steps) + 1
    samples = stages * 93.5 / ((HEUN.seconds_per_1000 - result(steps, True).seconds_per_1000) / 1000)
    said = re.search(r"it pays off after about ([\d,]+) samples", page.text)
    assert said
    assert float(said[1].replace(",", "")) == pytest.approx(samples, rel=0.05)


def test_times_of_different_machines_are_not_compared(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")

    def measured_on(pace: tuple[str, int] | None) -> tuple[Page, Group]:
        """Return the report and the figures of a run whose students were measured with this pace."""
        for path in run.glob("stages/*/metrics.json"):
            held = json.loads(path.read_text())
            for row in held["results"]:
                row["pace"] = ("Xeon", 2) if path.parent.name == "00-denoise" else pace
            write_sealed(path, held)
        facts = read_run(run)
        (group,) = quality_groups(facts.stages, facts.start)
        return reported(run), group

    page, group = measured_on(("Xeon", 2))
    assert "it pays off after" in page.text
    assert all(row.speed_up for row in group.rows)
    assert group.pace_note is None
    for other in (("Xeon", 4), ("Epyc", 2), None):
        page, group = measured_on(other)
        assert "pays off" not in page.text
        # The teacher's own rows are compared with the teacher at its best.
        assert [row.speed_up is None for row in group.rows] == [row.student is not None for row in group.rows]
        table = text_table(group)
        assert [row[-1] == "–" for row in table.rows] == [row.student is not None for row in group.rows]
        assert group.pace_note in table.notes
        assert str(group.pace_note) in page.text


# --- A run in progress ---


def test_a_run_whose_teacher_is_still_in_training_is_reported(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=())
    (run / "stages/00-denoise/manifest.json").unlink()
    page = reported(run)
    assert "The run is in progress; no stage is complete yet." in page.text
    assert "00-denoise (2,000 of 2,000 updates done)" in page.text
    assert any("training loss" in (div.get("aria-label") or "") for div in page.attributes("div"))


# --- The evaluation ---


def test_an_evaluation_is_shown_one_table_for_each_protocol(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    content = fake_evaluation(complete=False)
    content["tables"][0]["rows"][-1]["gamma"] = 0.25
    write_sealed(RunFolder(run).evaluation_path, content)
    page = reported(run)
    sets, near = (table[1:] for table in page.tables if table[0] and table[0][0] == "Series")
    assert [row[:2] for row in sets[:3]] == [["student", "8"], ["student", "4"], ["student", "1"]]
    assert sets[0][3] == f"{frechet(8, True) / frechet(256, False):.2f}"
    assert sets[0][4] == f"{number(frechet(8, True))} ± {number(0.01)}"
    assert sets[0][5] == "0.800"
    assert sets[4][5] == "–"
    assert [row[0] for row in sets[-3:-1]] == ["teacher, Heun", "teacher, Heun, gamma 0.25"]
    assert sets[-1][0].startswith("real data, one half against the other (898 samples each; fewer samples bias")
    assert sets[-1][3:5] == ["–", "0.600"]
    assert len(near) == 3
    for text in (
        "The evaluation is not finished",
        "Distances of small sets are too large.",
        "Against the teacher",
        "How many are real.",
    ):
        assert text in page.text


def test_unreliable_frechet_distances_have_no_ratios(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    for path in run.glob("stages/*/metrics.json"):
        write_sealed(path, json.loads(path.read_text()) | {"too_few": True})
    content = fake_evaluation()
    for row in content["tables"][0]["rows"]:
        # KID chooses the teacher at its best.
        row["figures"]["kid"] = figure(row["figures"]["frechet"]["mean"] / 10)
    headings = []
    for dimension in (64, 1797):
        content["tables"][0]["protocol"]["extractor_facts"]["dimension"] = dimension
        evaluation = EvaluationResult.model_validate(content)
        headings.append(evaluation_table(evaluation.tables[0], evaluation).headings)
    assert set(headings[0]) - set(headings[1]) == {"ratio"}
    write_sealed(RunFolder(run).evaluation_path, content)
    page = reported(run)
    assert {row[4] for row in page.table("Steps")[2:]} == {"–"}
    assert not any("Ratio" in table[0] for table in page.tables if table)
    assert "Ratio and speed-up are" not in page.text
    assert "The ratio is" not in page.text
    assert "Speed-up is relative to the teacher at its best" in page.text


@pytest.mark.parametrize(("further", "said"), [(3, ""), (4, ", and 1 more series that are not in the chart")])
def test_series_for_which_the_chart_has_no_colour_are_counted(tmp_path: Path, further: int, said: str) -> None:
    run = write_fake_run(tmp_path / "run")
    content = fake_evaluation()
    rows, series = content["tables"][0]["rows"], content["series"]
    # Next to the students, the teacher and one more of its samplers.
    for index in range(further):
        series.append(series[-1] | {"name": f"teacher-{index}"})
        rows.append(rows[-1] | {"series": f"teacher-{index}"})
    write_sealed(RunFolder(run).evaluation_path, content)
    page = write_report(run).read_text(encoding="utf-8")
    charts = re.findall(r'aria-label="(Line chart[^"]*)"', page)
    assert any(text.endswith(f"the table below contains its values{said}.") for text in charts)
    assert any("more series" in text for text in charts) == bool(said)


def test_a_run_without_figures_of_its_own_takes_the_first_sentence_from_its_evaluation(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    for path in run.glob("stages/*/metrics.json"):
        path.unlink()
    write_fake_evaluation(run)
    ratio = frechet(4, True) / frechet(256, False)
    assert ratio < 1.5 < frechet(1, True) / frechet(256, False)
    text = reported(run).text
    assert "A student with 4 network calls instead of 256 (64 times fewer): " in text
    alone = frechet(4, False) / frechet(256, False)
    said = f"Frechet distance {ratio:.2f} times that of the teacher at its best ({alone:.0f} times without"
    assert said in text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: "{",
        lambda data: json.dumps(data | {"format": 99}),
        lambda data: json.dumps(data | {"tables": 3}),
        lambda data: json.dumps([]),
    ],
    ids=["cut", "later", "wrong", "list"],
)
def test_a_damaged_evaluation_is_skipped_with_a_note(tmp_path: Path, spoil: Any) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    path = RunFolder(run).evaluation_path
    path.parent.mkdir()
    path.write_text(spoil(fake_evaluation()), encoding="utf-8")
    page = reported(run)
    assert "The evaluation is not shown: evaluation/evaluation.json" in page.text
    assert str(tmp_path) not in page.text


# --- Studies ---

TABLE = {"headings": ["steps", "ours", "theirs"], "rows": [["4", "1.5", "<b>2"]], "notes": ["A note."]}


def write_study(folder: Path, table: Any = TABLE) -> None:
    folder.mkdir(parents=True)
    held = {"title": "Schedules", "question": "How long?", "scale": {"name": "smoke"}, "seconds": 125.0, "rows": []}
    write_json(folder / "study.json", held | {"table": table})
    (folder / "figure.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", encoding="utf-8")


def test_studies_in_the_run_or_in_a_folder_named_are_shown(tmp_path: Path, capsys: Capture) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    write_study(run / "studies" / "schedules")
    page = reported(run)
    assert page.table("steps") == [["steps", "ours", "theirs"], ["4", "1.5", "<b>2"]]
    for text in ("Schedules", "How long?", "A note.", "Scale smoke. Time: 2 min 5 s."):
        assert text in page.text
    assert any((image["src"] or "").startswith("data:image/svg+xml;base64,") for image in page.attributes("img"))
    write_study(tmp_path / "elsewhere" / "other")
    for name, wrong in {
        "none": None,
        "short": TABLE | {"rows": [["4"]]},
        "number": TABLE | {"rows": [[4, "", ""]]},
    }.items():
        write_study(tmp_path / "elsewhere" / name, wrong)
    (tmp_path / "elsewhere" / "cut").mkdir()
    (tmp_path / "elsewhere" / "cut" / "study.json").write_text("{", encoding="utf-8")
    main(["report", str(run), "--studies", str(tmp_path / "elsewhere")])
    page = Page(RunFolder(run).report_path.read_text(encoding="utf-8"))
    assert "The study cut is not shown: cut/study.json is not readable JSON" in page.text
    for name in ("none", "short", "number"):
        assert (
            f"The study {name} is not shown: {name}/study.json cannot be shown: it does not contain a table."
            in page.text
        )
    assert "contains no studies" in refused(["report", str(run), "--studies", str(tmp_path)], capsys)


# --- Nearest training samples ---


def pictures(number: int, seed: int = 0, size: int = 6) -> MemoryData:
    pixels = torch.randint(0, 256, (number, 1, size, size), generator=torch.Generator().manual_seed(seed))
    return MemoryData("pictures", pixels.to(torch.uint8))


def test_neighbours_are_those_of_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.measure.nearest.CHUNK", 36 * 7)
    data = pictures(50)
    everything = data.fetch(torch.arange(50)).x0.double()
    x0 = pictures(5, seed=1).fetch(torch.arange(5)).x0
    found = nearest_samples(data, x0, 3)
    plain = (x0.double()[:, None] - everything[None]).flatten(2).square().mean(2).sqrt()
    distances, rows = plain.sort(1)
    torch.testing.assert_close(found.distances, distances[:, :3], rtol=0, atol=1e-14)
    assert torch.equal(found.rows, rows[:, :3])
    assert torch.equal(found.x0[2, 1], everything[rows[2, 1]].float())
    own = (everything[:, None] - everything[None]).flatten(2).square().mean(2).sqrt()
    own.fill_diagonal_(torch.inf)
    torch.testing.assert_close(found.real.sort().values, own.min(1).values.sort().values, rtol=0, atol=1e-14)
    assert found.num_searched == 50


def test_copies_and_mirrored_copies_are_found() -> None:
    data = pictures(40)
    x0 = data.fetch(torch.tensor([7, 30])).x0
    assert nearest_samples(data, x0, 1).rows.flatten().tolist() == [7, 30]
    assert nearest_samples(data, x0, 1).distances.abs().max() == 0
    mirrored = nearest_samples(data, x0.flip(-1), 2, flip=True)
    assert mirrored.rows[:, 0].tolist() == [7, 30]
    assert mirrored.distances[:, 0].abs().max() == 0
    assert torch.equal(mirrored.x0[:, 0], x0.flip(-1))
    assert nearest_samples(data, x0.flip(-1), 1).distances.min() > 0.1


def test_a_symmetric_image_counts_once_and_few_images_are_enough() -> None:
    x = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    x[1] = 255
    found = nearest_samples(MemoryData("two", x), torch.full((1, 1, 4, 4), -1.0), 3, flip=True)
    assert found.rows.tolist() == [[0, 1]]
    assert found.distances.tolist() == [[0.0, 2.0]]
    assert found.real.tolist() == [2.0, 2.0]
    alone = nearest_samples(MemoryData("one", x[:1]), torch.zeros(1, 1, 4, 4), 3)
    assert alone.rows.tolist() == [[0]]
    assert len(alone.real) == 0


def test_a_part_of_large_data_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.measure.nearest.MOST_VALUES", 36 * 10)
    assert nearest_samples(pictures(50), pictures(2, 1).fetch(torch.arange(2)).x0).num_searched == 10


@pytest.mark.parametrize("x0", [torch.zeros(2, 1, 4, 4), torch.zeros(0, 1, 6, 6)])
def test_samples_that_do_not_fit_are_refused(x0: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot be compared with data of shape"):
        nearest_samples(pictures(3), x0)


def test_the_report_shows_the_neighbours_of_the_sentences_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_fake_run(tmp_path / "run")
    data = open_data(DataConfig(source="digits"))
    write_sealed(
        run / "recipe.json", json.loads((run / "recipe.json").read_text()) | {"data_fingerprint": data.fingerprint}
    )
    main(["report", str(run)])
    page = Page(RunFolder(run).report_path.read_text(encoding="utf-8"))
    facts = read_run(run).nearest
    assert facts is not None
    assert f"A student with {facts.num_steps} network calls instead" in page.text
    np.testing.assert_array_equal(facts.samples, digit_samples(facts.num_steps, True)[:8])
    # The fake samples are digits of that data set with noise: row i is nearest to digit i.
    np.testing.assert_array_equal(facts.neighbours[:, 0], digit_samples_clean())
    assert (
        f"nearest of 1,797 training samples has a median of {number(float(np.median(facts.distances[:, 0])))}"
        in page.text
    )
    # The second call finds them there without the data, and the page is the same.
    monkeypatch.setattr("halfstep.cli.reporting.open_data", lambda config: pytest.fail("the data was opened again"))
    before = RunFolder(run).report_path.read_bytes()
    main(["report", str(run)])
    assert RunFolder(run).report_path.read_bytes() == before


def digit_samples_clean() -> np.ndarray:
    """Return the first eight digits from the data package, uint8 `[8, 8, 8, 1]`."""
    x0 = open_data(DataConfig(source="digits")).fetch(torch.arange(8)).x0
    return ((x0 + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def test_data_that_cannot_be_opened_is_reported(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    content = json.loads((run / "recipe.json").read_text())
    for recipe, said in (
        ({"name": "a", "data": {"source": str(tmp_path / "gone.npy")}}, "gone.npy is not a file"),
        ({"name": "a", "data": {"source": "digits"}}, "has changed since the run was trained on it"),
    ):
        write_sealed(run / "recipe.json", content | {"recipe": recipe, "data_fingerprint": "another"})
        main(["report", str(run)])
        text = Page(RunFolder(run).report_path.read_text(encoding="utf-8")).text
        assert re.search(rf"Not searched: [^\n]*{said}", text)


@pytest.mark.parametrize("content", [b"", b"PK\3\4junk", b"x" * 1000])
def test_a_damaged_file_of_neighbours_is_reported(tmp_path: Path, content: bytes) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    path = RunFolder(run).nearest_path
    path.parent.mkdir()
    path.write_bytes(content)
    assert "report/nearest.npz cannot be read, so the nearest training samples are not shown." in reported(run).text


# --- Size ---


def test_a_report_of_large_noisy_images_stays_below_its_limit(tmp_path: Path) -> None:
    def noisy(steps: int, student: bool) -> np.ndarray:
        return np.random.default_rng(steps).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)

    run = write_fake_run(tmp_path / "run", samples=noisy)
    size = write_report(run).stat().st_size
    assert size <= MOST_BYTES < 8_000_000
    assert size > MOST_BYTES / 4
    assert len(Page(RunFolder(run).report_path.read_text(encoding="utf-8")).attributes("img")) > 20


def test_a_student_of_other_steps_than_planned_is_walked_in_its_place(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    content = json.loads((run / "recipe.json").read_text())
    content["plan"].append({"stage": "02-quarter-0032", "role": "student", "num_steps": 32, "num_updates": 400})
    write_sealed(run / "recipe.json", content)
    write_stage(run, "02-quarter-0032", 32, [], {32: digit_samples(32, True)}, parent="01-halve-0128")
    labels = [div["data-label"] for div in reported(run).attributes("div") if "data-label" in div]
    assert labels == ["256 steps", "128 steps", "64 steps", "32 steps", "8 steps", "4 steps", "2 steps", "1 step"]


def test_a_later_student_of_as_many_steps_stands_for_them_and_the_earlier_one_stays_in_sight(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=STUDENT_STEPS[:6])
    content = json.loads((run / "recipe.json").read_text())
    content["plan"].append({"stage": "09-finish-0004", "role": "student", "num_steps": 4, "num_updates": 400})
    write_sealed(run / "recipe.json", content)
    finished = result(4, True, factor=0.8)
    write_stage(run, "09-finish-0004", 4, [finished], {4: digit_samples(128, True)}, parent="06-halve-0004")
    page = reported(run)
    rows = {row[0]: row for row in page.table("Steps")[2:]}
    assert rows["06-halve-0004 4"][3:5] == [number(frechet(4, True)), number(frechet(4, True) / HEUN.frechet)]
    assert rows["09-finish-0004 4"][3:5] == [number(finished.frechet), number(finished.frechet / HEUN.frechet)]
    assert "A student with 4 network calls" in page.text
    ratio, alone = finished.frechet / HEUN.frechet, frechet(4, False) / HEUN.frechet
    sentence = f"Frechet distance {ratio:.2f} times that of the teacher at its best ({times(alone)} times without "
    assert sentence in page.text
    assert headline(read_run(run)) == ("09-finish-0004", 4)
    # The slider shows the later one, with its own distance.
    places = re.findall(r'data-label="4 steps".*?Frechet ([0-9.]+)', RunFolder(run).report_path.read_text(), re.S)
    assert places == [number(finished.frechet)]
    facts = read_run(run)
    group = quality_groups(facts.stages, facts.start)[0]
    assert [row.student_stage for row in group.rows if row.is_earlier] == ["06-halve-0004"]
    assert "06-halve-0004" in str(group.figure)
    assert "09-finish-0004" not in str(group.figure)
    texts = {row[0]: row for row in text_table(group).rows}
    assert texts["4 (09-finish-0004)"][4] == f"{finished.frechet / HEUN.frechet:.2f}"
    assert texts["32 (Heun)"][2] == f"{HEUN.frechet:.4g}"
    # An evaluation also has a row for each and plots the last.
    told = fake_evaluation()
    own = next(row for row in told["tables"][0]["rows"] if row["num_steps"] == 4)
    told["tables"][0]["rows"].insert(2, own | {"stage": "09-finish-0004", "figures": {"frechet": figure(0.2)}})
    found = EvaluationResult.model_validate(told)
    labels = [row[0] for row in evaluation_table(found.tables[0], found).rows[:4]]
    assert labels == ["student", f"student, {own['stage']}", "student", "student"]
    assert 0.2 in curves_of(found.tables[0], found, "frechet")[0][1].y
    assert own["figures"]["frechet"]["mean"] not in curves_of(found.tables[0], found, "frechet")[0][1].y


def test_figures_of_an_earlier_halfstep_are_read(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    for path in run.glob("stages/*/metrics.json"):
        held = json.loads(path.read_text())
        for row in held["results"]:
            for name in ("precision", "recall", "coverage", "pace"):
                del row[name]
        held["results"] = [row for row in held["results"] if row["sampler"] != "heun"]
        write_sealed(path, held)
    page = reported(run)
    (row,) = [row for row in page.table("Steps")[2:] if row[0] == "128"]
    assert row[3:5] == [number(frechet(128, True)), number(frechet(128, True) / frechet(256, False))]
    assert len(row) == 11
    assert row[-1] == f"{times(result(256, False).seconds_per_1000 / result(128, True).seconds_per_1000)}×"
