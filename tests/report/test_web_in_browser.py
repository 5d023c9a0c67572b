"""The exported page in chromium and WebKit, served and from disk, on a phone and on a desktop."""

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.draw import between, sample_noise, step_noise
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import V
from halfstep.hub import export_web
from halfstep.hub.web import runtime
from halfstep.measure.samples import samples_array
from halfstep.models.model import Model
from halfstep.nets import MLP, describe_network
from halfstep.runs import Manifest
from halfstep.runtime.files import cache_folder
from halfstep.samplers import sample
from report.support_browser import SCREENS, Watched, browser, serious, webkit

# Read before the tests of the command line set another cache.
CACHE = cache_folder()
SEEDS = [0, 1, 2, 3, 11, 1234, 2**31 + 5, 2**53 - 1]
NEAR = 1e-3


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with browser() as found:
        yield found


# --- Noise ---


@pytest.fixture(scope="module")
def script(window: Any) -> Iterator[Any]:
    """Return a blank page with the script that draws the noise."""
    page = window.new_page()
    # As one string, because names do not persist between evaluations.
    source = files("halfstep.hub.web").joinpath("noise.js").read_text(encoding="utf-8")
    page.add_script_tag(content=source)
    yield page
    page.close()


def test_noise_is_torchs_for_sizes_around_its_blocks_of_16(script: Any) -> None:
    for size in (1, 2, 3, 15, 16, 17, 31, 32, 64, 100, 3072):
        found = script.evaluate("([seeds, size]) => seeds.map((seed) => [...noiseOf(seed, size)])", [SEEDS, size])
        torch.testing.assert_close(torch.tensor(found), sample_noise(SEEDS, (size,)), rtol=0, atol=2e-6)


def test_the_noise_of_steps_is_torchs(script: Any) -> None:
    for step in (0, 1, 12):
        found = script.evaluate("([seeds, step]) => seeds.map((seed) => [...noiseOf(seed, 20, step)])", [SEEDS, step])
        torch.testing.assert_close(torch.tensor(found), step_noise(SEEDS, (20,))(step), rtol=0, atol=2e-6)


def test_the_path_between_two_noises_is_that_of_the_library(script: Any) -> None:
    shares = [0.0, 0.2, 0.5, 1.0]
    for first, second in ((3, 8), (5, 5)):
        found = script.evaluate(
            "([a, b, shares]) => shares.map((share) => [...between(noiseOf(a, 64), noiseOf(b, 64), share)])",
            [first, second, shares],
        )
        ends = sample_noise([first, second], (64,))
        torch.testing.assert_close(torch.tensor(found), between(*ends, shares), rtol=0, atol=4e-6)


# --- The page ---


@pytest.fixture(scope="module")
def source() -> Path:
    """Return onnxruntime-web if it was fetched before: tests use no network."""
    folder = CACHE / f"onnxruntime-web-{runtime.VERSION}"
    if not folder.is_dir():
        pytest.skip("onnxruntime-web is not in the cache: `halfstep export --format web` fetches it")
    return folder


def pictures(stochastic: bool, guided: bool, shape: tuple[int, ...], num_steps: int) -> Model:
    """Return a network of three classes whose samples depend on all its inputs."""
    torch.manual_seed(0)
    network = MLP(shape, width=16, depth=1, num_classes=3, guided=guided)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    sampler = {"type": "ancestral" if stochastic else "ddim"}
    facts: dict[str, Any] = {
        "stage": "s", "objective": "halve", "parent": None, "num_updates": 1, "seconds": 1.0, "shape": shape,
        "outcome": {"role": "student", "num_steps": num_steps, "sampler": sampler},
        "num_classes": 3, "guidance": {"type": "range", "low": 1.0, "high": 4.0} if guided else None,
        "is_image": True, "clip": True, "network": describe_network(network),
        "process": processes.describe(VPCosine()), "prediction": {"type": "v"}, "files": {},
    }  # fmt: skip
    return Model(NetworkDenoiser(network, VPCosine(), V()), Manifest(**facts)).eval()


STUDENTS = [pictures(False, False, (1, 8, 8), steps) for steps in (1, 2)]
GAME = pictures(True, True, (3, 4, 6), 3)
"""A model of colour images that are not square, with a stochastic sampler and a guidance scale."""


@pytest.fixture(scope="module")
def pages(source: Path, shared: Path) -> Iterator[dict[str, str]]:
    """Return the addresses of the students' page from disk and of the other model's page as served."""
    folder = shared / "pages"
    folder.mkdir(exist_ok=True)
    file = folder / "a #b ?c%20.html"
    with FileLock(folder / ".lock"):
        # The first of the test processes exports them.
        if not (folder / "done").exists():
            students = [(student, None) for student in STUDENTS]
            export_web(students, file, "digits", single_file=True, runtime_source=source)
            export_web([(GAME, None)], folder / "game", "game", runtime_source=source)
            (folder / "done").touch()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder / "game")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {
            "disk": file.as_uri(),
            "served": f"http://127.0.0.1:{server.server_port}/",
            "unserved": (folder / "game" / "index.html").as_uri(),
        }
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def opened(window: Any, url: str, width: int = 1400, scheme: str = "light") -> Watched:
    watched = Watched(window.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme))
    watched.page.goto(url)
    settle(watched.page)
    return watched


def settle(page: Any) -> None:
    """Wait until all requested samples are drawn."""
    page.wait_for_function("() => document.querySelectorAll('[aria-busy=false]').length === 2")


def drawn(page: Any, seed: int, steps: int, label: int | None = None, scale: float = 1.0) -> torch.Tensor:
    """Return the flat sample of the page's script, before it becomes a picture."""
    call = "async ([seed, steps, asked]) => [...(await sample(seed, steps, asked)).x0]"
    return torch.tensor(page.evaluate(call, [seed, steps, {"label": label, "scale": scale}]))


def shown(canvases: Any) -> np.ndarray:
    """Return the pictures of some canvases, int `[n, h, w, 3]`."""
    values, height = canvases.evaluate_all(
        "(all) => [all.map((one) => [...one.getContext('2d').getImageData(0, 0, one.width, one.height).data]), "
        "all[0].height]"
    )
    return np.array(values).reshape(len(values), height, -1, 4)[..., :3]


def pixels(x0: torch.Tensor) -> np.ndarray:
    """Return the pictures that the page should show for samples, int `[n, h, w, 3]`."""
    return samples_array(x0, True) + np.zeros(3, int)


def assert_grid(page: Any, model: Model, first: int, **asked: Any) -> None:
    settle(page)
    seeds = range(first, first + 12)
    assert page.locator("#samples figcaption").all_inner_texts() == [str(seed) for seed in seeds]
    found = shown(page.locator("#samples canvas"))
    np.testing.assert_allclose(found, pixels(model.sample(seeds, **asked)), rtol=0, atol=1)


def test_seeds_give_the_samples_of_the_library(window: Any, pages: dict[str, str]) -> None:
    watched = opened(window, pages["disk"])
    for student in STUDENTS:
        steps = student.num_steps or 0
        expected = student.sample(SEEDS).flatten(1)
        assert float(expected.std(dim=0).mean()) > 100 * NEAR
        for seed, one in zip(SEEDS, expected, strict=True):
            torch.testing.assert_close(drawn(watched.page, seed, steps), one, rtol=0, atol=NEAR)
        (other,) = student.sample([4], class_label=2).flatten(1)
        torch.testing.assert_close(drawn(watched.page, 4, steps, label=2), other, rtol=0, atol=NEAR)
        assert float((other - drawn(watched.page, 4, steps, label=0)).abs().max()) > 100 * NEAR
    assert watched.elsewhere(pages["disk"]) == []
    assert watched.complaints == []
    watched.page.close()


def test_step_noise_and_guidance_give_the_samples_of_the_library(window: Any, pages: dict[str, str]) -> None:
    watched = opened(window, pages["served"])
    assert_grid(watched.page, GAME, 0)
    for scale in (1.0, 3.5):
        expected = GAME.sample(SEEDS, guidance_scale=scale).flatten(1)
        for seed, one in zip(SEEDS, expected, strict=True):
            torch.testing.assert_close(drawn(watched.page, seed, 3, scale=scale), one, rtol=0, atol=NEAR)
    field = watched.page.get_by_label("Guidance")
    assert [field.get_attribute(name) for name in ("min", "max")] == ["1", "4"]
    assert float(field.input_value()) == 2.5
    assert watched.elsewhere(pages["served"]) == []
    assert watched.complaints == []
    watched.page.close()


def test_the_controls_work_by_keyboard(window: Any, pages: dict[str, str]) -> None:
    page = opened(window, pages["disk"]).page
    one, two = STUDENTS
    assert_grid(page, one, 0)
    assert page.locator("#time").inner_text().startswith("1 step, ")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert_grid(page, two, 0)
    assert page.locator("#time").inner_text().startswith("2 steps, ")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowUp")
    assert_grid(page, two, 1)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert_grid(page, two, 1, class_label=1)
    for key, first in (("Tab", 1), ("Enter", 0), ("Tab", 0), ("Space", 12)):
        page.keyboard.press(key)
        assert_grid(page, two, first, class_label=1)
    # An invalid seed is not drawn.
    page.get_by_label("First seed").fill("-1")
    assert_grid(page, two, 12, class_label=1)
    page.close()


def test_the_walk_goes_from_one_seed_to_the_other(window: Any, pages: dict[str, str]) -> None:
    page = opened(window, pages["disk"]).page
    page.get_by_role("spinbutton", name="From seed").fill("5")
    page.get_by_role("spinbutton", name="To seed").fill("7")
    slider = page.get_by_label("Position")
    slider.focus()
    way = between(*STUDENTS[0].noise([5, 7]), [0, 0.01, 1])
    expected = pixels(sample(STUDENTS[0], way, 1, cond=STUDENTS[0].cond([5, 5, 5])))
    assert np.abs(expected[0] - expected[2]).max() > 20
    for key, picture in zip(("Home", "ArrowRight", "End"), expected, strict=True):
        page.keyboard.press(key)
        settle(page)
        np.testing.assert_allclose(shown(page.locator("#frame"))[0], picture, rtol=0, atol=1)
    play = page.get_by_role("button", name="Play")
    play.click()
    page.wait_for_function("() => document.getElementById('share').valueAsNumber < 98")
    page.get_by_role("button", name="Pause").click()
    settle(page)
    assert play.get_attribute("aria-pressed") == "false"
    page.close()


def test_of_many_moves_of_the_slider_only_the_last_is_drawn(window: Any, pages: dict[str, str]) -> None:
    page = opened(window, pages["disk"]).page
    page.evaluate(
        "() => { window.runs = 0; const post = worker.postMessage.bind(worker); "
        "worker.postMessage = (message, ...rest) => { runs += message.call === 'run'; post(message, ...rest); }; }"
    )
    move = (
        "async (places) => { for (const place of places) { share.value = place; "
        "share.dispatchEvent(new Event('input', { bubbles: true })); await null; } }"
    )
    page.evaluate(f"async (places) => {{ const share = element('share'); await ({move})(places); }}", list(range(40)))
    settle(page)
    way = between(*STUDENTS[0].noise([0, 1]), [0.39])
    picture = pixels(sample(STUDENTS[0], way, 1, cond=STUDENTS[0].cond([0])))
    np.testing.assert_allclose(shown(page.locator("#frame")), picture, rtol=0, atol=1)
    # The first was running when the others came.
    assert page.evaluate("runs") <= 2
    page.close()


def test_pausing_and_playing_again_leaves_one_walk(window: Any, pages: dict[str, str]) -> None:
    page = opened(window, pages["disk"]).page
    page.evaluate(
        "() => { window.timers = []; window.setTimeout = (call, time, ...rest) => timers.push(() => call(...rest)); }"
    )
    page.evaluate("() => { for (let click = 0; click < 3; click++) element('play').click(); }")
    for _ in range(3):
        settle(page)
        place = int(page.get_by_label("Position").input_value())
        page.evaluate("timers.splice(0).forEach((call) => call())")
        assert int(page.get_by_label("Position").input_value()) == place + 1
    page.close()


def test_a_download_that_failed_is_tried_again(window: Any, pages: dict[str, str]) -> None:
    page = window.new_page()
    page.route("**/sampler-*", lambda route: route.abort())
    page.goto(pages["served"])
    page.get_by_role("alert").wait_for()
    settle(page)
    page.unroute("**/sampler-*")
    page.get_by_role("button", name="Next seeds").click()
    assert_grid(page, GAME, 12)
    assert page.locator("#alert").is_hidden()
    page.close()


def test_it_is_quiet_fits_and_is_accessible(window: Any, pages: dict[str, str]) -> None:
    watched = opened(window, pages["served"])
    page = watched.page
    small = "(one) => Math.min(one.offsetHeight, one.offsetWidth) < 44"
    for width, scheme in SCREENS:
        page.set_viewport_size({"width": width, "height": 844})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        fields = page.locator("button:visible, select:visible, .choices b:visible, input:not([type=radio]):visible")
        assert fields.count() == 10
        # Large enough for a thumb.
        assert [field for field in fields.all() if field.evaluate(small)] == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert serious(page) == []
    assert watched.complaints == []
    assert watched.elsewhere(pages["served"]) == []
    page.close()


def test_licences_open_from_both(window: Any, pages: dict[str, str]) -> None:
    for which in ("disk", "served"):
        page = opened(window, pages[which]).page
        with page.expect_popup() as popup:
            page.get_by_role("link", name="licence and notices").click()
        popup.value.wait_for_load_state()
        assert "Copyright (c) Microsoft Corporation" in popup.value.inner_text("body")
        assert len(page.context.pages) == 2
        page.context.close()


def test_a_folder_opened_from_disk_says_what_to_do(window: Any, pages: dict[str, str]) -> None:
    page = window.new_page()
    page.goto(pages["unserved"])
    page.get_by_role("alert").wait_for()
    assert "Serve this folder (python -m http.server), or export with --single-file." in page.inner_text("#alert")
    page.close()


@pytest.mark.parametrize("which", ["disk", "served"])
def test_webkit_gives_the_samples_of_the_library(pages: dict[str, str], which: str) -> None:
    """WebKit refuses to import a blob in a worker if the page was opened from disk."""
    model = STUDENTS[0] if which == "disk" else GAME
    expected = model.sample(SEEDS).flatten(1)
    call = (
        "const [seed, steps, done] = arguments; "
        "sample(seed, steps, options()).then(({x0}) => done([...x0]), (error) => done(String(error)))"
    )
    with webkit() as driver:
        driver.get(pages[which])
        for seed, one in zip(SEEDS, expected, strict=True):
            found = driver.execute_async_script(call, seed, model.num_steps)
            assert isinstance(found, list), found
            torch.testing.assert_close(torch.tensor(found), one, rtol=0, atol=NEAR)
