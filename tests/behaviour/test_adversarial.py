"""The adversarial term in halving and in a finish, with interruptions and micro batches, and from the command line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import teams
from halfstep.cli import main
from halfstep.models.folder import load
from halfstep.objectives import Adversarial, Finishing, Objective, Plan, Training
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.runs import RunFolder
from support_cli import Capture, refused
from toys import TINY_ARRAYS, finish, points, toy_plan, toy_spec, weights


def _with_critic(objective: Objective) -> Objective:
    return Adversarial(objective, weight=0.5, lead_updates=3)


def _plan() -> Plan:
    teacher, *students = toy_plan(20, 9).stages
    finishing = Plan.finishes([1], Training(9, 1e-3, 16, ema_decay=0.9), lambda n: Finishing(n, lead_updates=4))
    return Plan((teacher,)) + (Plan(tuple(students)) + finishing).changed(_with_critic)


def _spec(**changes: Any) -> Any:
    return toy_spec(plan=_plan(), **changes)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uncut") / "run"
    finish(_spec(), path)
    return path


@pytest.mark.parametrize(
    ("stage", "update"), [("01-halve-critic-0002", 2), ("02-halve-critic-0001", 5), ("03-finish-critic-0001", 7)]
)
def test_a_stage_with_a_critic_that_was_cut_ends_as_the_uncut_one(
    tmp_path: Path, uncut: Path, stage: str, update: int
) -> None:
    """Interrupt during the critic's lead, after it, and with an auxiliary denoiser."""
    events: Iterator[Any] = run(_spec(log_every=1, checkpoint_updates=1), tmp_path / "run")
    for event in events:
        if isinstance(event, Progress) and (event.name, event.window.update) == (stage, update):
            assert "critic" in event.window.helpers
            break
    events.close()  # type: ignore[attr-defined]
    assert RunFolder(tmp_path / "run").stage(stage).checkpoints()
    finish(_spec(), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uncut)


def test_a_finish_with_a_critic_names_both_parents_and_its_steps(uncut: Path) -> None:
    finished = load(uncut / "stages" / "03-finish-critic-0001")
    assert (finished.manifest.parent, finished.manifest.teacher) == ("02-halve-critic-0001", "00-denoise")
    assert (finished.role, finished.num_steps) == ("student", 1)


def test_micro_batches_give_the_same_student_to_rounding(tmp_path: Path) -> None:
    teacher, student = toy_plan(5, 5, dropout=0.0).stages[:2]
    plan = Plan((teacher,)) + Plan((student,)).changed(_with_critic)
    results = []
    for micro in (16, 5):
        finish(toy_spec(plan=plan, micro_batch=micro), tmp_path / str(micro))
        results.append(load(tmp_path / str(micro)).sample(range(32)))
    torch.testing.assert_close(*results, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_processes_give_the_student_of_one(tmp_path: Path) -> None:
    """Run with DDP, and with all weights, including the critic's, sharded over both processes."""
    (stage,) = Plan((teams.halving(12),)).changed(_with_critic).stages
    torch.set_num_threads(1)
    expected = teams.trained("none", None, stage)
    cases = [("none", 5, stage, None), ("none", 5, stage, 6), ("full", None, stage, None)]
    for held in teams.together(2, teams.all_trainings, tmp_path, cases)[0]:
        assert float((held["student"] - expected["student"]).abs().max()) < 1e-5
        assert held["shapes"] == expected["shapes"]


def test_the_command_line_adds_a_critic_to_halvings_and_to_finishes(tmp_path: Path, capsys: Capture) -> None:
    np.save(tmp_path / "points.npy", points(64).numpy())
    brief = ["--finish.num-updates", "4", "--finish.batch-size", "8", "--finish.lead-updates", "2"]
    where = ["--data", str(tmp_path / "points.npy"), "--out", str(tmp_path / "run"), *TINY_ARRAYS, *brief]
    main(["run", "arrays", *where, "--chain.critic-weight", "0.1"])
    main(["finish", str(tmp_path / "run"), "--steps", "1", "--finish.critic-weight", "0.2"])
    stages = RunFolder(tmp_path / "run").stages()
    assert [stage.name for stage in stages] == [
        "00-denoise", "01-halve-critic-0002", "02-halve-critic-0001", "03-finish-critic-0001",
    ]  # fmt: skip
    for weight in ("0", "-1"):
        assert "critic" in refused(["run", "arrays", *where, "--chain.critic-weight", weight], capsys)
    early = ["--chain.critic-weight", "0.1", "--chain.early-end.patience", "3"]
    assert "early_end has no effect with critic_weight" in refused(["run", "arrays", *where, *early], capsys)
    idle = refused(["run", "arrays", *where, "--finish.critic-weight", "0.1"], capsys)
    assert "0.1 has no effect without finish.steps. Add finish.steps" in idle
