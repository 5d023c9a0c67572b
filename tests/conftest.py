"""Settings of every test: one thread, no network, the same examples each time."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
# A fork server looks here for what it is to import ahead, and not where its parent does (Python 3.11), without a word.
os.environ["PYTHONPATH"] = os.pathsep.join([os.path.dirname(__file__), *filter(None, [os.environ.get("PYTHONPATH")])])

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Our own warnings are errors. (In pyproject.toml, this would import halfstep before coverage starts.)"""
    config.addinivalue_line("filterwarnings", "error::halfstep.core.warnings.HalfstepWarning")


def pytest_collection_finish() -> None:
    """Exempt the modules and tests from garbage collection, which otherwise takes half a second each time."""
    gc.collect()
    gc.freeze()
