"""Settings of all tests: one thread, no network, reproducible examples."""

import gc
import os
from collections.abc import Generator
from pathlib import Path
from typing import Final

os.environ["HF_HUB_OFFLINE"] = "1"
# In Python 3.11, a fork server ignores its parent's import path without a message, and looks here for modules to
# preload.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch
from hypothesis import settings

from slow_tests import slow_tests

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("repeatable")


MEASURED: Final = tuple(
    Path(__file__).parent / name
    for name in (
        *("contracts", "anchors", "behaviour/test_gain.py", "behaviour/test_matching.py"),
        *("behaviour/test_api_door.py", "behaviour/test_python_api.py"),
    )
)
"""The tests of the mathematics and of its argument checks. Only these are measured for coverage, which slows down all
Python code that runs."""


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Pause coverage for all other tests and their fixtures."""
    plugin = item.config.pluginmanager.getplugin("_cov")
    controller = getattr(plugin, "cov_controller", None)
    if controller is None or any(item.path.is_relative_to(folder) for folder in MEASURED):
        return (yield)
    controller.pause()
    try:
        return (yield)
    finally:
        controller.resume()


def pytest_configure(config: pytest.Config) -> None:
    """Turn our own warnings into errors. (In pyproject.toml, this would import halfstep before coverage starts.)"""
    config.addinivalue_line("filterwarnings", "error::halfstep.core.warnings.HalfstepWarning")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that were measured to be slow."""
    listed = slow_tests()
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Exempt the modules and tests from garbage collection, which otherwise takes half a second each time."""
    gc.collect()
    gc.freeze()
