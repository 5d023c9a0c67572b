"""The report in chromium, on a phone and on a desktop, with mouse and keyboard."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from halfstep.report import write_report
from report.fake_run import STUDENT_STEPS, TEACHER_STEPS, digit_samples, write_fake_evaluation, write_fake_run
from report.support_browser import SCREENS, Watched, browser, serious


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    run = write_fake_run(tmp_path_factory.mktemp("runs") / "digits")
    write_fake_evaluation(run)
    return write_report(run).as_uri()


def opened(window: Any, url: str, width: int = 1400, scheme: str = "light", **settings: Any) -> Watched:
    watched = Watched(window.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme, **settings))
    watched.page.goto(url)
    return watched


def first_seed(source: str) -> np.ndarray:
    """Return the upper left picture, `[8, 8]`, of the walk's grid of enlarged digits."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))[..., 0]
    return pixels[:64:8, :64:8]


def test_the_slider_walks_the_same_noise_from_the_teachers_steps_to_one(window: Any, url: str) -> None:
    page = opened(window, url).page
    slider = page.locator("#steps")
    slider.focus()
    page.keyboard.press("Home")
    seen = []
    for _ in range(len({*STUDENT_STEPS, *TEACHER_STEPS})):
        said = slider.get_attribute("aria-valuetext")
        assert page.locator("#walk output").inner_text() == said
        steps = int(said.split()[0])
        frame = page.locator("#walk .pair:visible")
        assert frame.count() == 1
        for who, student in (("student", True), ("teacher", False)):
            figure = frame.locator(f"figure.{who}").last
            if steps in (STUDENT_STEPS if student else TEACHER_STEPS):
                shown = first_seed(figure.locator("img").get_attribute("src"))
                np.testing.assert_array_equal(shown, digit_samples(steps, student)[0, ..., 0])
        if steps > max(STUDENT_STEPS):
            # At the start of the chain, the teacher is on both sides.
            assert frame.locator("figure.teacher").count() == 2
        seen.append(steps)
        page.keyboard.press("ArrowRight")
    assert seen == sorted({*STUDENT_STEPS, *TEACHER_STEPS}, reverse=True)
    page.close()


def test_the_first_screen_has_the_sentence_and_the_slider(window: Any, url: str) -> None:
    for width in (390, 1400):
        page = opened(window, url, width).page
        for selector in (".lead", "#steps", "#walk .pair:visible img >> nth=0"):
            box = page.locator(selector).first.bounding_box()
            assert box["y"] + box["height"] <= 844, selector
        page.close()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_it_is_quiet_fits_and_is_accessible(window: Any, url: str, width: int, scheme: str) -> None:
    watched = opened(window, url, width, scheme)
    page = watched.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark == (scheme == "dark")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert serious(page) == []
    assert watched.complaints == []
    assert watched.elsewhere(url) == []
    page.close()


def test_keyboard_focus_follows_the_order_of_the_page(window: Any, url: str) -> None:
    page = opened(window, url).page
    places = []
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            "() => { const now = document.activeElement; return now === document.body ? null : [now.tagName, "
            "now.getBoundingClientRect().top + scrollY, getComputedStyle(now).outlineStyle]; }"
        )
        if found is None:
            break
        places.append(found)
    assert places[0][0] == "INPUT"
    assert {"A", "SUMMARY", "DIV"} <= {tag for tag, _, _ in places}
    # The frame of a figure or table starts above its content.
    assert [top for _, top, _ in places] == sorted(top for _, top, _ in places)
    assert {outline for _, _, outline in places} <= {"solid", "auto"}
    page.close()


def test_paper_and_browsers_without_scripts_get_all_pictures(window: Any, url: str) -> None:
    plain = opened(window, url, java_script_enabled=False).page
    printed = opened(window, url).page
    printed.emulate_media(media="print")
    for page in (plain, printed):
        assert not page.locator("#walk").is_visible()
        assert page.locator(".strip img").first.is_visible()
    page.close()


def test_the_table_of_an_evaluation_is_reached_by_its_link(window: Any, url: str) -> None:
    page = opened(window, url, 390).page
    page.get_by_role("link", name="Evaluation").click()
    box = page.get_by_role("heading", name="Evaluation", exact=True).bounding_box()
    assert 0 <= round(box["y"]) < 844
    page.close()


def test_a_report_opens_from_a_folder_with_any_name(window: Any, tmp_path: Path) -> None:
    run = write_fake_run(tmp_path / "a #b ?c%20", students=(128,), planned=(128,))
    watched = opened(window, write_report(run).as_uri())
    assert "128 network calls" in watched.page.locator(".lead").inner_text()
    assert watched.complaints == []
    watched.page.close()
