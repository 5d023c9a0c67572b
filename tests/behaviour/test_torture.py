"""After kills, signals, damage and a full disk at random moments, runs end with the uninterrupted run's weights.

This applies a few faults; `python benchmarks/torture.py` applies many.
"""

import json
from pathlib import Path

import pytest

from teams import context
from torture import Ordeal, write_growth


@pytest.mark.slow
def test_a_run_interrupted_at_random_moments_ends_like_an_uninterrupted_one(
    tmp_path: Path,
) -> None:
    ordeal = Ordeal(tmp_path, seed=20221)
    ordeal.deal({"sigkill": 3, "sigterm": 2, "damage": 1, "full_disk": 1, "killed_rank": 1})
    assert ordeal.dealt["SIGKILL"] == 3
    assert ordeal.dealt["SIGTERM"] == 2
    assert ordeal.dealt["truncation"] + ordeal.dealt["bit flip"] == 1
    assert ordeal.dealt["killed rank"] == 1
    assert ordeal.dealt.total() == 8
    # At least one interrupted run must have completed, because only these are compared.
    assert ordeal.finished >= 1
    assert ordeal.slowest_stop < 5


@pytest.mark.slow
def test_memory_grows_by_nothing_over_2000_updates_after_the_first_50(tmp_path: Path) -> None:
    process = context().Process(target=write_growth, args=(str(tmp_path / "run"), str(tmp_path / "growth.json")))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    grown = json.loads((tmp_path / "growth.json").read_text())
    # The stage writes 200 checkpoints and log lines. An allocator settles within a few hundred kilobytes, but leaking
    # one tensor of the small network per update would take two megabytes.
    assert grown["bytes"] < 1 << 20
    assert grown["objects"] < 200
