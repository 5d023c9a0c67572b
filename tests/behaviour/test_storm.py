"""Random damage to any file of a run folder leads to the undamaged result or a one-line error; see tests/storm.py."""

from pathlib import Path

import pytest

from storm import Storm


@pytest.mark.slow
def test_two_hundred_faults_change_nothing_silently(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=2022)
    storm.deal(200)
    assert storm.dealt.total() == storm.ends.total() == 200
    assert min(storm.met.values()) >= 10, "a kind of run was not tested"
    assert min(storm.dealt[kind] for kind in storm.faults) >= 5
    assert storm.ends["refused"] >= 20
    assert storm.ends["equal"] + storm.ends["equal, with a line"]


@pytest.mark.slow
def test_faults_in_runs_of_two_processes_change_nothing_silently(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=5, kinds=("pair",))
    storm.runs = [(spec, uncut, start) for spec, uncut, start in storm.runs if spec is None]
    storm.deal(16)
    assert storm.met.keys() == {"pair", "cut-pair"}
    assert storm.ends["refused"]
