"""The list of slow tests only contains existing tests."""

import re
from pathlib import Path

import pytest

from slow_tests import main, slow_tests

ROOT = Path(__file__).parents[2]


def test_every_slow_test_exists() -> None:
    for test in slow_tests():
        file, function = test.split("[")[0].split("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), re.M), test


def test_a_test_is_slow_by_its_setup_and_call_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "2.00s setup    tests/a.py::test_a[x y]",
        "1.60s call     tests/a.py::test_a[x y]",
        "2.90s call     tests/a.py::test_b",
        "noise",
    ]
    (tmp_path / "durations.txt").write_text("\n".join(lines))
    monkeypatch.setattr("slow_tests.FILE", tmp_path / "slow.txt")
    main(tmp_path / "durations.txt")
    assert slow_tests() == {"tests/a.py::test_a[x y]": 4}
