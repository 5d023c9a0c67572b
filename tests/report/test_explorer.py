"""The served explorer: its page in chromium, and its server and API for unauthorised clients."""

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from halfstep import load
from halfstep.cli import main
from halfstep.explore import page as explorer_module
from halfstep.explore.explorer import Explorer
from halfstep.measure.samples import samples_array
from report.asked_run import write_asked_run
from report.support_browser import Watched, browser, serious
from support_cli import Capture, refused

httpx = pytest.importorskip("httpx")
pytest.importorskip("gradio")
STUDENT = "02-halve-0002"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_asked_run(tmp_path_factory.mktemp("asked") / "run")


@contextlib.contextmanager
def explored(run: Path, *words: str) -> Iterator[str]:
    """Return the address of `halfstep explore RUN` in a separate process, which Ctrl-C ends quietly."""
    command = [sys.executable, "-m", "halfstep", "explore", str(run), "--port", "0", *words]
    # A suite that a shell runs in the background ignores Ctrl-C, and so would its children.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.match(r"http://127\.0\.0\.1:\d+", line)
        assert found, process.communicate(timeout=10)
        yield found[0]
        process.send_signal(signal.SIGINT)
        # On a busy machine, running requests take time to end.
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors, errors
        assert "03-halve-0001 is missing: it has not been trained yet" in errors
    finally:
        process.kill()


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    with explored(run) as found:
        yield found


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with browser() as found:
        yield found


def opened(window: Any, url: str, width: int = 1300, scheme: str = "light") -> Watched:
    watched = Watched(window.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
    watched.page.goto(url)
    watched.page.wait_for_selector("#compared figure", timeout=60_000)
    return watched


def pictures(source: str, count: int) -> np.ndarray:
    """Return the images uint8 `[count, 8, 8]` of a grid, which are enlarged by 8 with gaps of 4 pixels."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))[..., 0]
    columns = (pixels.shape[1] + 4) // 68
    places = [(68 * (index // columns), 68 * (index % columns)) for index in range(count)]
    return np.stack([pixels[y : y + 64 : 8, x : x + 64 : 8] for y, x in places])


def drawn(run: Path, stage: str, seeds: list[int], steps: int, class_label: int | None = None) -> np.ndarray:
    return samples_array(load(run / "stages" / stage).sample(seeds, steps, class_label=class_label), True)[..., 0]


def test_the_main_workflow_in_a_browser(run: Path, url: str, window: Any) -> None:
    watched = opened(window, url)
    page = watched.page
    assert "03-halve-0001 is missing" in page.locator("body").inner_text()

    # Side by side, with a typed seed and class.
    page.get_by_label("Stage", exact=True).click()
    page.get_by_role("option", name="4-step student").click()
    page.wait_for_function("document.querySelector('#steps input').value === '4'")
    page.fill("#seed input", "7")
    page.fill("#samples input", "5")
    page.get_by_label("Class").click()
    page.get_by_role("option", name="1", exact=True).click()
    page.click("#compare")
    page.wait_for_selector("#compared figure[data-stage='01-halve-0004']")
    for stage, steps in (("01-halve-0004", 4), ("00-denoise", 8)):
        image = page.locator(f"#compared figure[data-stage='{stage}'] img")
        shown = pictures(image.get_attribute("src"), 5)
        np.testing.assert_array_equal(shown, drawn(run, stage, [7, 8, 9, 10, 11], steps, 1))
        assert f"at {steps} steps" in image.get_attribute("alt")
    assert re.search(r"4 steps, 4 network calls, [\d.]+ m?s", page.locator("#compared").inner_text())

    # The download equals the displayed samples.
    with page.expect_download() as download:
        page.locator("#compared figure >> nth=0").get_by_text("Download npz").click()
    assert download.value.suggested_filename == "01-halve-0004-4-steps.npz"
    held = np.load(download.value.path(), allow_pickle=False)["arr_0"][..., 0]
    np.testing.assert_array_equal(held, drawn(run, "01-halve-0004", [7, 8, 9, 10, 11], 4, 1))

    page.get_by_role("tab", name="All stages").click()
    page.click("#strip")
    page.wait_for_selector("#stripped figure >> nth=2")
    for stage, steps in (("00-denoise", 8), ("01-halve-0004", 4), (STUDENT, 2)):
        source = page.locator(f"#stripped figure[data-stage='{stage}'] img").get_attribute("src")
        np.testing.assert_array_equal(pictures(source, 1), drawn(run, stage, [7], steps, 1))

    page.get_by_role("tab", name="Walk").click()
    # A tab's fields are created when it is first opened, and text typed before they are bound is lost.
    page.locator("#walk").wait_for(state="visible")
    page.wait_for_timeout(1000)
    page.fill("#other-seed input", "3")
    page.locator("#other-seed input").press("Tab")
    page.wait_for_timeout(500)
    page.click("#walk")
    page.wait_for_selector("#walked figure")
    assert page.locator("#walked figure >> nth=0").locator("picture.moving img").count() == 1
    shown = pictures(page.locator("#walked figure >> nth=0").locator("img").last.get_attribute("src"), 8)
    np.testing.assert_array_equal(shown[[0, -1]], drawn(run, "01-halve-0004", [7, 3], 4, 1))

    # The error is shown, and the page keeps working.
    page.fill("#seed input", "-2")
    page.click("#walk")
    page.get_by_text("first seed must be a whole number from 0").wait_for()
    assert watched.complaints == []
    assert watched.elsewhere(url) == []
    page.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1300, "light")])
def test_the_page_is_accessible_and_fits(url: str, window: Any, width: int, scheme: str) -> None:
    watched = opened(window, url, width, scheme)
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    assert serious(watched.page) == []
    for name in ("Compare", "All stages", "Walk"):
        assert watched.page.get_by_role("tab", name=name).is_visible()
    assert watched.complaints == []
    watched.page.close()


def ask(url: str, name: str, data: object) -> dict[str, Any]:
    """Return the API's response: {"html"} or {"error"}, or {"status"} if it rejects the call."""
    sent = httpx.post(f"{url}/gradio_api/call/{name}", json={"data": data}, timeout=60)
    if sent.status_code != 200:
        return {"status": sent.status_code, "text": sent.text}
    answer = httpx.get(f"{url}/gradio_api/call/{name}/{sent.json()['event_id']}", timeout=60).text
    event, body = re.search(r"event: (complete|error)\ndata: (.*)", answer).groups()  # type: ignore[union-attr]
    return {"html": json.loads(body)[0]} if event == "complete" else {"error": json.loads(body)["error"]}


def request(**changes: object) -> list[object]:
    values: dict[str, object] = {
        "stage": STUDENT, "steps": 2, "teacher_steps": 2, "seed": 0, "samples": 1, "class": None, "guidance": None,
    }  # fmt: skip
    return list((values | changes).values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stage": "../../../etc/passwd"}, "stage '../../../etc/passwd' does not exist. Choose one of 00-denoise,"),
        ({"stage": "03-halve-0001"}, "03-halve-0001 is missing: it has not been trained yet"),
        ({"stage": None}, "stage None does not exist"),
        ({"steps": -1}, "steps must be a whole number from 1 to 1,024, got -1"),
        ({"steps": 10**12}, "steps must be a whole number from 1 to 1,024"),
        ({"steps": "__import__('os').system('true')"}, "steps must be a whole number"),
        ({"teacher_steps": 1e300}, "teacher's steps must be a whole number"),
        ({"samples": 100_000}, "samples must be a whole number from 1 to 64, got 100000"),
        ({"samples": 0}, "samples must be a whole number from 1 to 64, got 0"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"class": 99}, "class must be a whole number from 0 to 2, got 99"),
        ({"guidance": 3}, "has no guidance"),
        ({"guidance": "many"}, "the guidance scale must be a number from 0 to 50"),
    ],
)
def test_hostile_values_get_clear_refusals_through_the_api(url: str, changes: dict[str, object], said: str) -> None:
    assert said in ask(url, "compare", request(**changes))["error"]


@pytest.mark.slow
def test_two_hundred_at_once_are_served_or_told_to_come_back(run: Path, url: str) -> None:
    def one(seed: int) -> dict[str, Any]:
        return ask(url, "compare", request(seed=seed))

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(one, range(200)))
    served = [seed for seed, answer in enumerate(answers) if "html" in answer]
    assert len(served) >= explorer_module.LARGEST_QUEUE
    for answer in answers:
        assert "html" in answer or (answer["status"] == 503 and "Queue is full" in answer["text"])
    # No client got another client's response.
    for seed in served[:: max(1, len(served) // 10)]:
        source = re.search(r'src="([^"]+)"', answers[seed]["html"])
        assert source
        np.testing.assert_array_equal(pictures(source[1], 1), drawn(run, STUDENT, [seed], 2))
    assert "html" in one(0)


def test_a_response_follows_its_sampling_quickly(url: str) -> None:
    """Take the best of a few times: the test is about the page's overhead, not about the load of the machine."""
    added = []
    for seed in range(8):
        start = time.perf_counter()
        html = ask(url, "compare", request(stage="01-halve-0004", steps=4, seed=seed))["html"]
        sampling = sum(float(seconds) for seconds in re.findall(r'data-seconds="([\d.]+)"', html))
        added.append(time.perf_counter() - start - sampling)
    assert min(added) < 0.3


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/file=http://127.0.0.1:1/"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("GET", "/assets/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"),
        ("POST", "/gradio_api/upload"),
        ("POST", "/gradio_api/run/compare"),
        ("POST", "/gradio_api/call/own_steps"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/monitoring"),
        ("GET", "/login_check"),
        ("GET", "/docs"),
    ],
)
def test_the_door_is_closed_to_all_that_the_page_does_not_need(url: str, method: str, path: str) -> None:
    answer = httpx.request(method, url + path)
    assert answer.status_code == 404
    assert answer.text == "halfstep: not found; the page is at /\n"


def test_bodies_that_are_large_or_nonsense_are_refused(url: str) -> None:
    call, join = f"{url}/gradio_api/call/compare", f"{url}/gradio_api/queue/join"
    kind = {"content-type": "application/json"}
    assert httpx.post(call, content=b"x" * 70_000, headers=kind).status_code == 413
    assert httpx.post(call, content=iter([b"x" * 10] * 10), headers=kind).status_code == 413
    for content in (b"", b"no json", b"[" * 60_000, b'{"data": 3}', b"[]", b"\xff"):
        answer = httpx.post(call, content=content, headers=kind)
        assert (answer.status_code, answer.text) == (400, 'halfstep: a call must be JSON of the form {"data": [...]}\n')
    for data in ([], [float("inf")], [STUDENT, 2], [*request(), 1]):
        answer = httpx.post(call, content=json.dumps({"data": data}), headers=kind)
        said = f"halfstep: this function takes 7 values, got {len(data)}: see /gradio_api/info\n"
        assert (answer.status_code, answer.text) == (400, said)
    # Before a function is called, gradio copies such a file to its cache or fetches it.
    for file in ({"path": "/etc/passwd"}, {"path": "a", "url": f"{url}/config"}, ["/etc/passwd"], {"a": {"path": "b"}}):
        value = file | {"meta": {"_type": "gradio.FileData"}} if isinstance(file, dict) else file
        for address, more in ((call, {}), (join, {"fn_index": 1, "session_hash": "a"})):
            answer = httpx.post(address, json={"data": request(stage=value), **more})
            assert (answer.status_code, answer.text) == (
                400,
                "halfstep: each value must be a number, string or null\n",
            )
    for number in (99, -1, "x", None, 1.5):
        answer = httpx.post(join, json={"data": [], "fn_index": number, "session_hash": "a"})
        assert (answer.status_code, answer.text) == (400, f"halfstep: function {number!r} does not exist\n")
    answer = httpx.post(join, json={"data": request(), "fn_index": 1, "session_hash": {"a": 1}})
    assert 400 <= answer.status_code < 500
    assert "html" in ask(url, "compare", request())


def test_another_name_for_this_machine_is_refused(url: str) -> None:
    assert httpx.get(url, headers={"host": "evil.example"}).status_code == 421
    assert httpx.get(url, headers={"host": f"localhost:{urlsplit(url).port}"}).status_code == 200
    policy = httpx.get(url).headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


PREFIX = "/user/me/proxy/7860"


def test_a_page_below_a_prefix_names_addresses_below_it(run: Path) -> None:
    app = explorer_module.page(Explorer(run), ("hub.example.org",), PREFIX)

    async def got(path: str) -> Any:
        through = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=through, base_url="http://hub.example.org") as client:
            return await client.get(path)

    # Some proxies remove the prefix, others do not.
    for path in ("/config", f"{PREFIX}/config"):
        # In its own thread, because browser tests leave a running event loop in this one.
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(asyncio.run, got(path)).result()
        assert answer.status_code == 200
        assert urlsplit(answer.json()["root"]).path == PREFIX


@pytest.mark.slow
def test_the_page_shows_samples_through_a_proxy_with_a_prefix(run: Path, window: Any) -> None:
    with explored(run, "--root-path", PREFIX) as inner:

        class Proxy(BaseHTTPRequestHandler):
            cuts = True

            def do_GET(self) -> None:
                if not self.path.startswith(f"{PREFIX}/"):
                    self.send_error(404)
                    return
                path = self.path.removeprefix(PREFIX) if self.cuts else self.path
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                answer = httpx.request(self.command, inner + path, content=body, headers=dict(self.headers), timeout=60)
                self.send_response(answer.status_code)
                self.send_header("content-type", answer.headers.get("content-type", "text/plain"))
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        class Whole(Proxy):
            cuts = False

        # Some proxies remove the prefix, others do not.
        for proxy in (Proxy, Whole):
            with ThreadingHTTPServer(("127.0.0.1", 0), proxy) as server:
                threading.Thread(target=server.serve_forever, daemon=True).start()
                watched = opened(window, f"http://localhost:{server.server_port}{PREFIX}/")
                assert watched.page.locator("#compared img").count() == 2
                outside = watched.elsewhere(f"http://localhost:{server.server_port}{PREFIX}/")
                assert [address for address in outside if not address.endswith("/favicon.ico")] == []
                watched.page.close()
                server.shutdown()


def test_it_listens_at_127_0_0_1_only(url: str) -> None:
    port = urlsplit(url).port
    assert port
    socket.create_connection(("127.0.0.1", port), timeout=5).close()
    # Another address of this machine: a server at 0.0.0.0 would respond there.
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=5)


SLOW = """
import sys, threading
from halfstep.cli import main
from halfstep.explore import door, explorer
door.PATIENCE = 3.0
def trajectory(*args, **kwargs):
    print("sampling", flush=True)
    threading.Event().wait()
explorer.trajectory = trajectory
main(["explore", *sys.argv[1:]])
"""
"""An explorer with short timeouts and endless sampling."""


def test_slow_connections_are_closed_a_long_sampling_is_not_and_ctrl_c_ends_it(run: Path) -> None:
    """Events are in order. The step never ends, so nothing that ends has waited for it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(run), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout
        port = int(re.findall(r":(\d+)", process.stdout.readline())[0])

        def connected(text: str) -> socket.socket:
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            connection.sendall(text.replace("\n", "\r\n").encode())
            return connection

        head = f"Host: 127.0.0.1:{port}\nContent-Type: application/json\n"
        asked = httpx.post(f"http://127.0.0.1:{port}/gradio_api/call/compare", json={"data": request()}, timeout=60)
        event = asked.json()["event_id"]
        answer = connected(f"GET /gradio_api/call/compare/{event} HTTP/1.1\n{head}\n")
        assert process.stdout.readline() == "sampling\n"
        silent, half = connected(""), connected(f"GET / HTTP/1.1\n{head}")
        slow = connected(f"POST /gradio_api/call/compare HTTP/1.1\n{head}Content-Length: 100\n\n{{")
        assert (silent.recv(1), half.recv(1)) == (b"", b"")
        assert b" 408 " in slow.recv(4096)
        # A client that requests a lot of data but reads none; a small window keeps it out of the system's buffers.
        deaf = socket.socket()
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        deaf.settimeout(60)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode() * 200)
        assert is_reset(deaf)
        # The response that was requested before all of them is still pending.
        answer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            assert answer.recv(4096), "the connection of a sampling in progress was closed"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, "Traceback" in errors) == (0, False), errors
    finally:
        process.kill()


def is_reset(connection: socket.socket) -> bool:
    """Return whether the server closes a connection from which nothing is read."""
    found = select.poll()
    found.register(connection, select.POLLHUP | select.POLLERR)
    return bool(found.poll(60_000))


def test_wrong_arguments_are_one_line(run: Path, tmp_path: Path, capsys: Capture, monkeypatch: Any) -> None:
    assert "does not exist" in refused(["explore", str(tmp_path / "nothing")], capsys)
    assert "--port must be at most 65,535" in refused(["explore", str(run), "--port", "70000"], capsys)
    assert "--max-samples must be at least 1, got 0" in refused(["explore", str(run), "--max-samples", "0"], capsys)
    assert "device" in refused(["explore", str(run), "--device", "warp"], capsys)
    assert "the device 'meta' stores no values" in refused(["explore", str(run), "--device", "meta"], capsys)
    assert "Choose another --host" in refused(["explore", str(run), "--host", "a..b"], capsys)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        text = refused(["explore", str(run), "--port", str(taken.getsockname()[1])], capsys)
        assert "Choose another --port" in text
    monkeypatch.setattr(explorer_module, "find_spec", lambda name: None)
    assert "pip install 'halfstep[explore]'" in refused(["explore", str(run)], capsys)


def test_help_needs_no_gradio(capsys: Capture) -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; from halfstep.cli import main\n"
        "try: main(['explore', '--help'])\nexcept SystemExit as end: sys.exit(end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ})
    assert "--max-seconds" in done.stdout
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "explore RUN" in capsys.readouterr().out
