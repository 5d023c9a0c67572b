"""Random damage to any file of a run folder ends in the uncut run's result or in one line; see tests/storm.py."""

from pathlib import Path

import pytest

from storm import Storm


def test_damage_to_any_file_of_a_run_changes_nothing_in_silence(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=17)
    storm.deal(12)
    assert storm.dealt.total() == storm.ends.total() == 12
    assert storm.ends["refused"]
    assert storm.ends["equal"] + storm.ends["equal, with a line"]


@pytest.mark.slow
def test_ninety_faults_over_every_kind_of_run_change_nothing_in_silence(tmp_path: Path) -> None:
    storm = Storm(tmp_path, seed=2022, kinds=("chain", "lora", "matched", "pair"))
    storm.deal(90)
    assert min(storm.met.values()) >= 3, "a kind of run was left out"
    assert min(storm.dealt[kind] for kind in storm.faults) >= 3
    assert storm.ends["refused"] >= 10
