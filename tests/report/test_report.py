"""The report shows the contents of the run folder in any state, and nothing in it can run or send requests."""

import base64
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from halfstep.cli.display import show_results
from halfstep.cli.status import view
from halfstep.cli.words import Screen
from halfstep.report import write_report
from halfstep.report.words import number, times
from halfstep.runs import RunFolder, read_status
from halfstep.runtime.files import json_digest, sha256_of, write_sealed
from report.fake_run import (
    HEUN,
    PROTOCOL,
    STUDENT_STEPS,
    TEACHER_STEPS,
    digit_samples,
    fake_evaluation,
    figure,
    frechet,
    point_samples,
    result,
    write_fake_evaluation,
    write_fake_run,
    write_stage,
)

HOSTILE = "</title><script>alert('$x^2')</script><img src=https://evil.example onerror=alert(1)>"
VOID = {"meta", "br", "img", "input", "link", "hr"}


class Page(HTMLParser):
    """The elements, table cells and texts of a page; fails on elements that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.values: list[float] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "data":
            self.values.append(float(dict(attrs)["value"] or ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("script", "style"):
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.tables[-1][-1][-1] += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, first: str) -> list[list[str]]:
        """Return the only table with this text at the start of its first cell."""
        (found,) = [t for t in self.tables if t[0] and t[0][0].startswith(first)]
        return [[cell.strip() for cell in row] for row in found]


def reported(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "digits")


@pytest.fixture(scope="module")
def html(whole: Path) -> str:
    return write_report(whole).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def figures_of(cell: str) -> float | None:
    return None if cell == "–" else float(cell.rstrip("×").replace(",", ""))


def test_the_table_shows_the_figures_of_metrics_json(whole: Path, page: Page) -> None:
    held = {}
    for stage in RunFolder(whole).stages():
        for row in json.loads(stage.metrics_path.read_text())["results"]:
            steps = row["num_steps"] if row["sampler"] == "ddim" else f"{row['sampler'].title()} {row['num_steps']}"
            held[str(steps), "teacher" if stage.name == "00-denoise" else "student"] = row
    shown = {row[0]: row for row in page.table("Steps")[2:]}
    assert shown.keys() == {steps for steps, _ in held}
    assert shown.keys() == {"Heun 32", *map(str, TEACHER_STEPS), *map(str, STUDENT_STEPS)}
    best = held["Heun 32", "teacher"]
    assert best["frechet"] < held["256", "teacher"]["frechet"]
    for steps, row in shown.items():
        teacher, student = held.get((steps, "teacher"), {}), held.get((steps, "student"), {})
        timed = (student or teacher)["seconds_per_1000"]
        wanted = [
            (student or teacher)["num_evals"],
            teacher.get("frechet"),
            student.get("frechet"),
            student["frechet"] / best["frechet"] if student else None,
            teacher["kid"] if teacher else None,
            student["kid"] if student else None,
            teacher.get("teacher_rmse"),
            student.get("teacher_rmse"),
            *((student or teacher)[name] for name in ("precision", "recall", "coverage")),
            timed,
            best["seconds_per_1000"] / timed,
        ]
        for cell, value in zip(row[1:], wanted, strict=True):
            assert (figures_of(cell) is None) == (value is None)
            # Three digits are shown, or two of a speed-up from 2 to 100; the element contains the whole number.
            assert value is None or figures_of(cell) == pytest.approx(value, rel=0.03)
            assert value is None or isinstance(value, int) or value in page.values


def test_the_first_sentence_follows_from_the_figures(page: Page) -> None:
    base = HEUN.frechet
    kept = min(n for n in STUDENT_STEPS if result(n, True).frechet <= 1.5 * base)
    one = result(kept, True)
    assert 1 < kept < 128
    assert (
        f"{kept} network calls instead of 63 ({times(63 / kept)} times fewer): Frechet distance "
        f"{one.frechet / base:.2f} times that of the teacher at its best "
        f"({times(result(kept, False).frechet / base)} times without distillation)." in page.text
    )
    assert "at its best: Heun, 32 steps (63 calls)" in page.text
    fewest = result(1, True)
    assert f"At 1 step: Frechet distance {fewest.frechet / base:.1f} times that of the teacher at its" in page.text


@pytest.mark.parametrize(("factor", "gains"), [(1.04, False), (0.9, False), (1.06, True)])
def test_a_student_that_the_undistilled_teacher_equals_is_not_praised(
    factor: float, gains: bool, tmp_path: Path
) -> None:
    run = write_fake_run(tmp_path / "photos", students=(4,), planned=(4,))
    path = run / "stages/00-denoise/metrics.json"
    held = json.loads(path.read_text())
    row = next(row for row in held["results"] if row["num_steps"] == 4)
    row["frechet"] = factor * result(4, True).frechet
    write_sealed(path, held)
    page = reported(run)
    assert ("A student with 4 network calls instead of" in page.text) == gains
    no_gain = "No gain from distillation with 4 network calls: the undistilled teacher is just as close to the data"
    assert (no_gain in page.text) != gains


def test_a_report_has_the_name_of_its_folder(tmp_path: Path) -> None:
    page = write_report(write_fake_run(tmp_path / "photos", name="digits")).read_text(encoding="utf-8")
    assert "<h1>photos</h1>" in page


def test_a_teacher_that_covers_little_of_the_data_is_not_praised(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    path = run / "stages/00-denoise/metrics.json"
    held = json.loads(path.read_text())
    for row in held["results"]:
        row["coverage"] = 0.03
    write_sealed(path, held)
    page = reported(run)
    assert "The teacher has not learned the data yet: train it longer." in page.text
    assert "At its best (Heun, 32 steps (63 calls)), its samples cover 3% of the real data" in page.text
    assert "times fewer" not in page.text


def rewritten(run: Path, **changes: float | None) -> None:
    """Mark the Frechet distances of all stages as unreliable, and change the teacher's figures with Heun."""
    for path in run.glob("stages/*/metrics.json"):
        held = json.loads(path.read_text()) | {"too_few": True}
        for row in held["results"]:
            row |= changes if row["sampler"] == "heun" else {}
        write_sealed(path, held)


def test_an_unreliable_frechet_distance_is_not_in_the_headline(tmp_path: Path) -> None:
    """KID chooses the teacher at its best, the student, and is the figure that is stated."""
    run = write_fake_run(tmp_path / "run")
    # By its Frechet distance, Heun would be the teacher at its best.
    rewritten(run, kid=0.5)
    best, kept, last = (result(256, False), result(32, True), result(1, True))
    assert kept.kid <= 1.5 * best.kid < result(16, True).kid
    page = reported(run)
    said = f"{number(kept.kid)} ({number(best.kid)} for the teacher at its best)."
    assert f"A student with 32 network calls instead of 256 (8.0 times fewer): KID {said}" in page.text
    assert f"At 1 step: KID {number(last.kid)} ({number(best.kid)} for the teacher at its best, " in page.text
    assert f"KID; {number(best.kid)} for the teacher at its best: DDIM, 256 steps (256 calls)" in page.text
    assert "It compares KID because there are too few samples" in page.text
    assert "Frechet distance" not in page.text.partition("Number of sampler steps")[0]
    assert "Frechet distance of the teacher at its best" not in page.text


def test_students_that_kid_cannot_tell_from_the_data_are_all_good_enough(tmp_path: Path) -> None:
    """A multiple of a negative KID would be a limit below the teacher's best."""
    run = write_fake_run(tmp_path / "run")
    rewritten(run, kid=-0.002)
    for path in run.glob("stages/*/metrics.json"):
        held = json.loads(path.read_text())
        for row in held["results"]:
            if row["sampler"] == "ddim":
                row["kid"] = {8: -0.0009, 4: -0.0005}.get(row["num_steps"], 0.02) if "halve" in str(path) else 0.03
        write_sealed(path, held)
    text = reported(run).text
    assert "A student with 4 network calls instead of" in text
    assert "a KID of at most 1.5 times the teacher’s best, or of at most 0 (" in text


def test_a_terminal_shows_kid_where_the_frechet_distance_is_unreliable(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    best = result(256, False)

    def printed() -> str:
        out = io.StringIO()
        screen = Screen(file=out)
        show_results(run, screen)
        screen.show(view(read_status(run)))
        return out.getvalue()

    picture = RunFolder(run).stages()[-1].samples / "steps-0001.png"
    assert "samples of the last model" not in printed()
    picture.touch()
    assert f"samples of the last model: {picture}\n" in printed()
    assert "Frechet distance (features: " in printed()
    assert f"{result(32, True).frechet:.4g}" in printed()
    # By its Frechet distance, Heun would be the teacher at its best.
    rewritten(run, kid=0.5)
    found = printed()
    assert "KID (features: " in found
    assert f"{result(32, True).kid:.3g}" in found
    assert f"{result(32, True).frechet:.4g}" not in found
    assert f"teacher's best: DDIM, 256 steps (256 calls), KID {number(best.kid)}\n" in re.sub(" +\n", "\n", found)


def test_a_reliable_evaluation_comes_before_an_unreliable_measurement(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    rewritten(run)
    write_fake_evaluation(run)
    ratio = frechet(4, True) / frechet(256, False)
    assert f"A student with 4 network calls instead of 256 (64 times fewer): Frechet distance {ratio:.2f}" in (
        reported(run).text
    )


@pytest.mark.parametrize("size", [1796, 1797])
def test_an_evaluation_is_reliable_if_its_samples_outnumber_the_dimensions(tmp_path: Path, size: int) -> None:
    run = write_fake_run(tmp_path / "run")
    for path in run.glob("stages/*/metrics.json"):
        path.unlink()
    told = fake_evaluation()
    for row in told["tables"][0]["rows"]:
        row["figures"]["kid"] = figure(row["figures"]["frechet"]["mean"] / 10)
    told["tables"][0]["protocol"]["extractor_facts"]["dimension"] = size
    write_sealed(RunFolder(run).evaluation_path, told)
    lead = reported(run).text.partition("There are no metrics")[0]
    assert ("KID" in lead, "Frechet distance" in lead) == (size == 1797, size == 1796)


def test_the_teacher_at_its_best_has_the_first_column(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    samples = 255 - digit_samples(256, False)
    file, path = run / "stages/00-denoise/samples/steps-0032-heun.npz", run / "stages/00-denoise/metrics.json"
    np.savez(file, arr_0=samples)
    held = json.loads(path.read_text())
    held["files"]["samples/steps-0032-heun.npz"] = sha256_of(file)
    write_sealed(path, held)
    page = reported(run)
    (strip,) = [table for table in page.tables if any("Not distilled" in cell for row in table for cell in row)]
    assert [cell.split()[0] for cell in strip[0][1:]] == ["32", "256", *map(str, STUDENT_STEPS)]
    assert strip[0][1].endswith("Heun steps")
    images = [one for one in page.attributes("img") if (one["alt"] or "").endswith("at 32 Heun steps")]
    assert images
    data = (images[0]["src"] or "").split(",", 1)[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0]
    np.testing.assert_array_equal(pixels[:64:8, :64:8], samples[0, :, :, 0])


def test_a_stage_with_one_row_of_the_log_is_seen_in_the_figure(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    drawn = []
    for length in (1, 2):
        rows = [{"stage": "01-halve-0128", "update": 20 * k, "loss": 0.1} for k in range(1, length + 1)]
        (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        losses = write_report(run).read_text(encoding="utf-8").partition('id="chain"')[2]
        # matplotlib draws a marker once in the definitions and refers to it for each point.
        drawn.append(len(re.findall(r'<use [^>]*href="#chain-m[^"]*" [^>]*fill: var\(--student\)', losses)))
    assert drawn[0] > drawn[1]


def test_pictures_are_the_same_seeds_enlarged_without_smoothing(whole: Path, page: Page) -> None:
    for stage, steps, who in (("00-denoise", 4, "the undistilled teacher"), ("06-halve-0004", 4, "the student")):
        samples = np.load(whole / "stages" / stage / "samples" / f"steps-{steps:04d}.npz")["arr_0"]
        (image,) = [
            image
            for image in page.attributes("img")
            if (image["alt"] or "").startswith("Seeds 0 to 7, from top")
            and who in (image["alt"] or "")
            and (image["alt"] or "").endswith("at 4 steps")
        ]
        scheme, data = (image["src"] or "").split(",", 1)
        assert scheme == "data:image/png;base64"
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[..., 0]
        for seed in range(8):
            np.testing.assert_array_equal(pixels[68 * seed : 68 * seed + 64 : 8, ::8], samples[seed, :, :, 0])
            np.testing.assert_array_equal(pixels[68 * seed + 7 : 68 * seed + 64 : 8, 7::8], samples[seed, :, :, 0])


def test_nothing_is_fetched_and_only_our_script_runs(html: str, page: Page) -> None:
    assert not re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+", re.sub(r'xmlns(?::\w+)?="[^"]*"', "", html))
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png"))
    (script,) = page.attributes("script")
    assert not script
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.attributes("meta"))


def test_the_policy_allows_the_script_that_is_there(html: str) -> None:
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_it_can_be_read_by_a_screen_reader(html: str, page: Page) -> None:
    assert page.attributes("html")[0]["lang"] == "en"
    assert all(image["alt"] for image in page.attributes("img"))
    assert all(cell.get("scope") for cell in page.attributes("th"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {label["for"] for label in page.attributes("label")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)|href=\"#([^\"]*)\"", html)) <= {
        pair for name in ids for pair in ((name, ""), ("", name))
    }


def test_the_same_run_gives_the_same_bytes(whole: Path, html: str) -> None:
    first = html.encode()
    code = f"from halfstep.report import write_report; from pathlib import Path; write_report(Path({str(whole)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert RunFolder(whole).report_path.read_bytes() == first


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,), name=HOSTILE)
    content = json.loads((run / "recipe.json").read_text())
    content["plan"].append({"stage": "02-" + HOSTILE, "num_steps": "$", "num_updates": 10})
    content["recipe"][HOSTILE] = [HOSTILE]
    content["environment"]["device"] = HOSTILE
    folder = "03-<script>alert(1)<"
    content["plan"].append({"stage": folder, "role": "student", "num_steps": 64, "num_updates": 400})
    write_sealed(run / "recipe.json", content)
    write_stage(run, folder, 64, [result(64, True)], {}, protocol={HOSTILE: HOSTILE})
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": "$\\frac$" + HOSTILE, "update": 5, "loss": 1.0}) + "\n")
    page = reported(run)
    assert len(page.attributes("script")) == 1
    assert all((image["src"] or "").startswith("data:") for image in page.attributes("img"))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(HOSTILE) >= 6
    assert folder in page.text


def test_a_run_in_progress_shows_existing_parts_and_lists_missing_ones(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=STUDENT_STEPS[:3])
    with open(run / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": "04-halve-0016", "update": 120, "loss": 0.5}) + '\n{"stage": "04-ha')
    page = reported(run)
    assert "This run is not finished: it has completed 4 of 9 stages." in page.text
    assert "04-halve-0016 (120 of 400 updates done), 05-halve-0008" in page.text
    states = {row[0]: row[-1] for row in page.table("Stage")[1:]}
    assert states["03-halve-0032"] == "complete"
    assert states["08-halve-0001"] == "not started"
    assert "32 network calls instead of 63" in page.text


def test_a_teacher_alone_is_reported(tmp_path: Path) -> None:
    page = reported(write_fake_run(tmp_path / "run", students=()))
    assert "A teacher, trained in 6 min 51 s; no student is complete yet." in page.text
    assert "Distilled" not in page.text


def test_a_complete_run_mentions_no_missing_parts(html: str) -> None:
    assert "Notices about this report" not in html


def test_a_damaged_stage_is_skipped_and_reported(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    (run / "stages/02-halve-0064/manifest.json").write_text('{"format": 1', encoding="utf-8")
    page = reported(run)
    assert "Stage 02-halve-0064 is damaged and was skipped" in page.text
    assert str(tmp_path) not in page.text
    assert {row[0]: row[-1] for row in page.table("Stage")[1:]}["02-halve-0064"] == "damaged"
    assert next(row for row in page.table("Steps")[2:] if row[0] == "64")[3] == "–"


def test_a_damaged_teacher_leaves_no_comparison(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run")
    (run / "stages/00-denoise/manifest.json").write_text("[]", encoding="utf-8")
    page = reported(run)
    assert (
        "8 students, from 128 steps to 1. There are no comparable results for the teacher and the students."
        in page.text
    )
    assert "instead of" not in page.text


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("arr_0.npy", b"\x93NUMPY\x01\x00junk")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: path.write_bytes(b"PK\3\4" + bytes(50)),
        lambda path: np.savez(path, other=np.zeros(3)),
        lambda path: np.savez(path, arr_0=np.array([{"a": 1}], dtype=object)),
        lambda path: np.savez(path, arr_0=np.zeros((0, 8, 8, 1), np.uint8)),
        bomb,
    ],
    ids=["empty", "cut", "zeros", "other key", "pickle", "no samples", "bad header"],
)
def test_unreadable_samples_are_reported(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    run = write_fake_run(tmp_path / "run", students=(128, 64), planned=(128, 64))
    spoil(run / "stages/02-halve-0064/samples/steps-0064.npz")
    page = reported(run)
    assert "stages/02-halve-0064/samples/steps-0064.npz is truncated or altered" in page.text
    assert "There are no samples for stage 02-halve-0064." in page.text


def test_missing_figures_recipe_log_and_samples_are_listed(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    for path in ("recipe.json", "log.jsonl", "stages/01-halve-0128/metrics.json"):
        (run / path).unlink()
    (run / "stages/00-denoise/metrics.json").write_text("{}", encoding="utf-8")
    for path in run.glob("stages/*/samples/*"):
        path.unlink()
    page = reported(run)
    for text in (
        "The recipe cannot be shown: recipe.json does not exist; restore it from a copy",
        "stages/00-denoise/metrics.json has no sha256 of its content",
        "There are no metrics (metrics.json) for stages 00-denoise, 01-halve-0128.",
        "There are no samples for stages 00-denoise, 01-halve-0128.",
        "No losses were logged.",
        "The command of this run was not recorded.",
    ):
        assert text in page.text


def test_a_recipe_without_a_plan_is_enough(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    write_sealed(run / "recipe.json", {"recipe": "?", "environment": 3, "plan": {"a": 1}})
    page = reported(run)
    assert page.text.strip().startswith("run: A student with 128 network calls instead of 63")


def test_figures_of_different_protocols_share_no_row(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128, 64))
    write_stage(run, "02-halve-0064", 64, [result(64, True)], {}, protocol={**PROTOCOL, "device": "cuda"})
    page = reported(run)
    assert "Not all stages were measured with the same protocol (they differ in: device)." in page.text
    first, second = (table[2:] for table in page.tables if table[0] and table[0][0] == "Steps")
    assert [row[0] for row in first] == ["256", "128", "64", "Heun 32", "8", "4", "2", "1"]
    (row,) = second
    assert row[0] == "64"
    assert [row[index] for index in (2, 4, 5, 13)] == ["–"] * 4
    assert next(row for row in first if row[0] == "64")[3] == "–"
    assert "128 network calls instead of 63" in page.text


def test_numbers_that_no_axis_can_show_do_not_stop_the_report(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,))
    path = run / "stages/01-halve-0128/metrics.json"
    odd = json.loads(path.read_text())
    odd["results"][0] |= {"frechet": float("nan"), "kid": -0.001, "seconds_per_1000": 0.0}
    del odd["sha256"]
    path.write_text(json.dumps(odd | {"sha256": json_digest(odd)}), encoding="utf-8")
    (run / "log.jsonl").write_text(
        '{"stage": "00-denoise", "update": 1, "loss": NaN}\n{"stage": "00-denoise", "update": 2, "loss": -1}\n'
        '{"stage": 3, "update": "x", "loss": 1}\n{"stage": "00-denoise", "update": 3, "loss": "1"}\n[]\n',
        encoding="utf-8",
    )
    page = reported(run)
    row = next(row for row in page.table("Steps")[2:] if row[0] == "128")
    assert row[3] == "not finite"
    assert figures_of(row[6]) == -0.001
    assert row[13] == "–"


def test_points_in_the_plane_are_drawn_where_they_are(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(128,), planned=(128,), samples=point_samples)
    page = reported(run)
    assert not page.attributes("img")
    labels = [span.get("aria-label") or "" for span in page.attributes("span")]
    assert "Scatter plot of 256 samples of the student at 128 steps" in labels
    paths = [path["d"] or "" for path in page.attributes("path") if path.get("class") == "rest"]
    points = point_samples(256, False)[8:]
    drawn = np.array([[float(x) for x in dot.split()] for dot in re.findall(r"M([\d.]+ [\d.]+)h0", paths[0])])
    # The frame keeps the proportions and the order of the points, with y upwards.
    scale = np.ptp(drawn[:, 0]) / np.ptp(points[:, 0])
    centre = points - points.mean(axis=0)
    np.testing.assert_allclose(drawn - drawn.mean(axis=0), scale * centre * [1, -1], atol=0.11)


def test_samples_without_a_picture_are_described_as_such(tmp_path: Path) -> None:
    def audio(steps: int, student: bool) -> np.ndarray:
        return np.zeros((4, 1, 160), np.float32)

    page = reported(write_fake_run(tmp_path / "run", students=(128,), planned=(128,), samples=audio))
    assert "Samples of shape 1 × 160 and type float32 cannot be shown as images." in page.text


def test_without_a_stage_and_without_a_log_there_is_one_clear_line(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "run", students=(), planned=(128,))
    (run / "stages/00-denoise/manifest.json").unlink()
    (run / "log.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"contains nothing to report on \(it has no stages/\*/manifest.json and no log.jsonl\)"
    ):
        write_report(run)
    assert not RunFolder(run).report_path.exists()
    with pytest.raises(ValueError, match="is not a run folder"):
        write_report(tmp_path / "nowhere")


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, types; package = types.ModuleType('halfstep'); "
        f"package.__path__ = [{str(Path(sys.modules['halfstep'].__file__ or '').parent)!r}]; "
        "sys.modules['halfstep'] = package; import halfstep.report; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
