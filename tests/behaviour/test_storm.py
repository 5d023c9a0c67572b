"""Random damage to any file of a run folder leads to the undamaged result or a one-line error; see tests/storm.py."""

from pathlib import Path

import pytest

from storm import Storm


@pytest.mark.slow
def test_every_fault_in_every_kind_of_run_changes_nothing_silently(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=2022)
    assert len(storm.faults) == 8
    assert len(storm.runs) == 7
    storm.deal()
    assert storm.ends.total() == 56
    assert storm.ends["refused"] >= 10
    assert storm.ends["equal"] + storm.ends["equal, with a line"]


@pytest.mark.slow
def test_faults_in_runs_of_two_processes_change_nothing_silently(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=5, kinds=("pair",))
    # One run of each fault: two processes take seconds to start.
    complete, interrupted = (each for each in storm.runs if each[0] is None)
    faults = list(storm.faults.items())
    for run, dealt in ((complete, faults[::2]), (interrupted, faults[1::2])):
        storm.runs, storm.faults = [run], dict(dealt)
        storm.deal()
    assert storm.ends["refused"]
