"""Settings of all tests: one thread, no network, no waiting for the disk, reproducible examples."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final

os.environ["HF_HUB_OFFLINE"] = "1"
# In Python 3.11, a fork server ignores its parent's import path without a message, and looks here for modules to
# preload.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch
from hypothesis import settings

from slow_tests import slow_tests

torch.set_num_threads(1)

# A run syncs thousands of files, each in milliseconds, and only a power cut would show their loss. The tests of syncs
# replace this function again. Processes that tests start keep the original.
os.fsync = lambda fd: None

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("repeatable")


MEASURED: Final = tuple(
    Path(__file__).parent / name
    for name in (
        *("contracts", "behaviour/test_gain.py", "behaviour/test_matching.py"),
        *("behaviour/test_api_door.py", "behaviour/test_python_api.py"),
    )
)
"""The fast tests of the mathematics and of its argument checks. Only these are measured for coverage, which slows down
all Python code that runs."""
IS_MEASURED: Final = pytest.StashKey[bool]()


def _coverage(config: pytest.Config) -> Any:
    """Return the controller of pytest-cov in this process; None without it."""
    return getattr(config.pluginmanager.getplugin("_cov"), "cov_controller", None)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Trace the measured tests and their fixtures, nothing else."""
    if (coverage := _coverage(item.config)) is None or IS_MEASURED not in item.stash:
        return (yield)
    coverage.resume()
    try:
        return (yield)
    finally:
        coverage.pause()


def pytest_configure(config: pytest.Config) -> None:
    """Turn our own warnings into errors. (In pyproject.toml, this would import halfstep before coverage starts.)"""
    config.addinivalue_line("filterwarnings", "error::halfstep.core.warnings.HalfstepWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that were measured to be slow, and those that coverage measures. Run the longest first.

    Otherwise, one process waits at the end while the other runs a long test. The tests of a module stay together, for
    they share its fixtures. Coverage measures each value of each parameter once: more cases run no other lines.
    """
    seconds = slow_tests()
    longest: dict[Path, int] = {}
    met = set()
    for item in items:
        if item.nodeid in seconds:
            item.add_marker(pytest.mark.slow)
            longest[item.path] = max(longest.get(item.path, 0), seconds[item.nodeid])
        if item.get_closest_marker("slow") or not any(item.path.is_relative_to(path) for path in MEASURED):
            continue
        test, _, values = item.nodeid.removesuffix("]").partition("[")
        cases = {(test, value) for value in values.split("-")}
        if not cases <= met:
            item.stash[IS_MEASURED] = True
            met |= cases
    items.sort(key=lambda item: -longest.get(item.path, 0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Exempt the modules and tests from garbage collection, which otherwise takes half a second each time."""
    gc.collect()
    gc.freeze()
    if (coverage := _coverage(session.config)) is not None:
        coverage.pause()


def _session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of the session, the same one in each worker of pytest-xdist."""
    return _session_folder(tmp_path_factory)


@pytest.fixture(scope="session", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Set the session's cache folder, so that the classifier of the digits is trained once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFSTEP_CACHE", str(_session_folder(tmp_path_factory) / "cache"))
        yield
