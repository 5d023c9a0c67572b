"""Runs that several tests of the command line share, trained once per session by one of the test processes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from halfstep.cli import main
from toys import TINY_ARRAYS, TINY_DEMO, TINY_DIGITS, points


def copied(shared: Path, name: str, make: Callable[[Path], None], to: Path) -> Path:
    """Return `to`, a copy of the folder that `make` fills; only the first call of the session calls `make`."""
    made = shared / "once" / name
    made.mkdir(parents=True, exist_ok=True)
    with FileLock(made.with_suffix(".lock")):
        # A recipe contains the path of its data, so the folder is filled in its final place.
        if not made.with_suffix(".done").exists():
            make(made)
            made.with_suffix(".done").touch()
    return shutil.copytree(made, to)


@pytest.fixture(scope="module")
def toy_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `TINY_ARRAYS`, copied for each module, with its data next to it as toy.npy."""

    def make(folder: Path) -> None:
        np.save(folder / "toy.npy", points().numpy())
        main(["run", "arrays", "--data", str(folder / "toy.npy"), "--out", str(folder / "toy"), *TINY_ARRAYS])

    return copied(shared, "toy", make, tmp_path_factory.mktemp("runs") / "copy") / "toy"


@pytest.fixture(scope="module")
def toy_npy(toy_run: Path) -> Path:
    """Return the data of `toy_run`, as its recipe refers to it."""
    return Path(json.loads((toy_run / "recipe.json").read_text())["recipe"]["data"]["source"])


@pytest.fixture(scope="module")
def digits_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of `TINY_DIGITS`, copied for each module."""

    def make(folder: Path) -> None:
        main(["run", "digits", "--out", str(folder / "digits"), *TINY_DIGITS])

    return copied(shared, "digits", make, tmp_path_factory.mktemp("runs") / "copy") / "digits"


@pytest.fixture(scope="module")
def demo_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with the stages of the demo: students with 8, 4, 2 and 1 steps, and two finishes."""

    def make(folder: Path) -> None:
        main(["run", "digits", "--out", str(folder / "digits"), *TINY_DEMO])

    return copied(shared, "demo", make, tmp_path_factory.mktemp("runs") / "copy") / "digits"
