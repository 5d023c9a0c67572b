"""Browsers for the tests: Debian's chromium, driven by playwright, and its WebKit, driven by selenium."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCREENS = [(width, scheme) for width in (390, 820, 1400) for scheme in ("light", "dark")]
"""A phone, a tablet and a desktop; light and dark."""


def chromium() -> str:
    """Return its path. Without it, the test is skipped, or fails if HALFSTEP_BROWSER=required (in CI)."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    reason = "no chromium: apt-get install chromium" if path is None else None
    if reason is None and not (find_spec("playwright") and find_spec("axe_playwright_python")):
        reason = "no playwright: pip install --group dev"
    if reason is not None:
        if os.environ.get("HALFSTEP_BROWSER") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    assert path
    return path


@contextmanager
def browser() -> Iterator[Any]:
    """Start chromium."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def webkit() -> Iterator[Any]:
    """Start WebKitGTK's browser, the engine of Safari, on a virtual screen. Without it, the test is skipped."""
    driver, screen = shutil.which("WebKitWebDriver"), shutil.which("Xvfb")
    if driver is None or screen is None:
        pytest.skip("no WebKit: apt-get install webkit2gtk-driver xvfb")
    if not find_spec("selenium"):
        pytest.skip("no selenium: pip install --group dev")
    from selenium.webdriver import WebKitGTK
    from selenium.webdriver.webkitgtk.options import Options
    from selenium.webdriver.webkitgtk.service import Service

    # The server chooses a free display and prints its number.
    with subprocess.Popen([screen, "-displayfd", "1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout
            display = f":{int(server.stdout.readline())}"
            service = Service(driver, env=os.environ | {"DISPLAY": display})
            found = WebKitGTK(options=Options(), service=service)
            try:
                found.set_script_timeout(60)
                yield found
            finally:
                found.quit()
        finally:
            server.terminate()


class Watched:
    """A page that records its errors and requests."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._heard)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _heard(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def elsewhere(self, *allowed: str) -> list[str]:
        """Return the requested addresses that do not start with one of `allowed`."""
        return [url for url in self.requests if not url.startswith(("data:", "blob:", *allowed))]


def serious(page: Any, context: object = None) -> list[str]:
    """Return axe's serious and critical findings, with the elements."""
    import axe_playwright_python

    script = (Path(str(axe_playwright_python.__file__)).parent / "axe.min.js").read_text(encoding="utf-8")
    # In the devtools' own world, to which a page's policy does not apply.
    page.evaluate(script)
    found = page.evaluate("context => axe.run(context ?? document, { resultTypes: ['violations'] })", context)
    return [
        f"{one['id']}: {one['help']}: {node['target']}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
