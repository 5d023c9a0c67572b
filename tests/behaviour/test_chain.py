"""Whole runs with other factors, with stages that end early, and with weights that are not kept."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import X0, V
from halfstep.models.folder import load
from halfstep.nets import MLP
from halfstep.objectives import Denoising, EarlyEnd, Halving, Matching, Plan, Stage, Training
from halfstep.run.distill import distill
from halfstep.run.events import Progress
from halfstep.run.runner import run
from halfstep.run.sources import as_batches, in_memory
from halfstep.runs import RunFolder, read_log
from halfstep.runtime.files import write_sealed
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import sample
from halfstep.train.engine import StageTrainer
from toys import finish, toy_plan, toy_spec, tuned, weights

STUDENTS = ("01-halve-0008", "02-halve-0004", "03-halve-0002", "04-halve-0001")


def _long(**changes: object) -> Plan:
    """Return a plan with a teacher and four students, each with few updates."""
    teacher = toy_plan(teacher_updates=10).stages[:1]
    students = Plan.halvings(16, 1, Training(6, 1e-3, 16), updates_at={}).stages
    return Plan(teacher + tuple(tuned(stage, **changes) for stage in students))


def _weights_there(path: Path) -> set[str]:
    return set(weights(path))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uncut") / "run"
    finish(toy_spec(plan=_long(), start_steps=16), path)
    return path


def test_a_chain_of_uneven_factors_trains_each_student_on_its_own_number_of_teacher_steps(tmp_path: Path) -> None:
    chain = Plan.halvings(24, 1, Training(4, 1e-3, 16), students=(8, 4, 1), updates_at={})
    assert [s.objective.num_teacher_steps for s in chain.stages if isinstance(s.objective, Halving)] == [3, 2, 4]
    plan = Plan(toy_plan(teacher_updates=5).stages[:1]) + chain
    finish(toy_spec(plan=plan, start_steps=24), tmp_path / "run")
    stages = RunFolder(tmp_path / "run").stages()
    assert [stage.name for stage in stages] == ["00-denoise", "01-halve-0008", "02-halve-0004", "03-halve-0001"]
    assert [stage.manifest().parent for stage in stages] == [None, *(stage.name for stage in stages[:-1])]


@pytest.mark.parametrize("keep", [(), (4,), (8, 2)])
def test_only_the_weights_that_were_asked_for_stay_with_the_teacher_and_the_last_student(
    tmp_path: Path, uncut: Path, keep: tuple[int, ...]
) -> None:
    path = tmp_path / "run"
    finish(toy_spec(plan=_long(), start_steps=16, keep=keep), path)
    wanted = {f"{n:04d}" for n in (*keep, 1)}
    kept = {"00-denoise"} | {name for name in STUDENTS if name[-4:] in wanted}
    assert _weights_there(path) == kept
    assert {name: data for name, data in weights(uncut).items() if name in kept} == weights(path)
    # The manifests and figures of all stages remain.
    assert [stage.name for stage in RunFolder(path).stages()] == ["00-denoise", *STUDENTS]
    for name in set(STUDENTS) - kept:
        with pytest.raises(ValueError, match=r"no longer has weights.*Load another stage"):
            load(path / "stages" / name)
    assert load(path).num_steps == 1


def test_a_matched_model_is_always_kept_because_finishes_learn_from_it(tmp_path: Path) -> None:
    teacher, *students = _long().stages
    matched = Stage(Matching(4, prediction=X0()), Training(4, 1e-3, 16))
    finish(toy_spec(plan=Plan((teacher, matched, *students)), start_steps=16, keep=(4,)), tmp_path / "run")
    assert _weights_there(tmp_path / "run") == {"00-denoise", "01-match", "03-halve-0004", "05-halve-0001"}


@pytest.mark.parametrize("stage", STUDENTS)
def test_a_run_that_keeps_few_weights_resumes_after_any_interruption(tmp_path: Path, uncut: Path, stage: str) -> None:
    path = tmp_path / "run"
    spec = toy_spec(plan=_long(), start_steps=16, keep=(), log_every=1, checkpoint_updates=2)
    events = run(spec, path)
    for event in events:
        if isinstance(event, Progress) and event.name == stage and event.window.update == 3:
            break
    events.close()  # type: ignore[attr-defined]
    finish(spec, path)
    finish(spec, path)
    assert weights(path) == {name: weights(uncut)[name] for name in ("00-denoise", "04-halve-0001")}


def test_an_interruption_between_weights_and_manifest_is_repaired(tmp_path: Path) -> None:
    path = tmp_path / "run"
    spec = toy_spec(plan=_long(), start_steps=16, keep=())
    finish(dataclasses.replace(spec, keep=None), path)
    file = path / "stages" / STUDENTS[1] / "manifest.json"
    write_sealed(file, json.loads(file.read_text()) | {"weights_kept": False, "files": {}})
    finish(spec, path)
    assert _weights_there(path) == {"00-denoise", "04-halve-0001"}


def test_a_stage_is_not_trained_anew_from_another_teacher_than_its_own(tmp_path: Path) -> None:
    """Its own teacher has no weights any more, and the previous stage would give another student."""
    path = tmp_path / "run"
    spec = toy_spec(plan=_long(), start_steps=16, keep=())
    finish(spec, path)
    shutil.rmtree(path / "stages" / STUDENTS[3])
    with pytest.raises(ValueError, match=r"04-halve-0001 must be trained, but the weights of 03-halve-0002.*not kept"):
        finish(spec, path)


RULE = EarlyEnd(window=5, patience=2, min_drop=0.5)


def _early() -> Plan:
    """Return the toy plan with students that may end early."""
    teacher, *students = toy_plan().stages
    return Plan((teacher, *(tuned(stage, num_updates=60, early_end=RULE) for stage in students)))


def test_a_stage_whose_loss_has_stopped_falling_ends_by_its_rule(tmp_path: Path) -> None:
    """Replay the rule over the logged losses: same end, same falling rate, and a notice."""
    notices = finish(toy_spec(plan=_early(), log_every=1), tmp_path / "run")
    for stage in RunFolder(tmp_path / "run").stages()[1:]:
        rows = [row for row in read_log(tmp_path / "run" / "log.jsonl") if row["stage"] == stage.name]
        losses = [float(row["loss"]) for row in rows]
        means = [sum(losses[i : i + 5]) / 5 for i in range(0, len(losses), 5)]
        plateau = next(k for k in range(1, len(means) + 1) if RULE.has_stopped_falling(means[:k])) * 5
        assert plateau < 55, "without a plateau in the toy's budget, this test proves nothing"
        assert len(rows) == stage.manifest().num_updates == plateau + 5
        rates = [float(row["learning_rate"]) for row in rows]
        planned = [1e-3 * (1 - k / 60) for k in range(len(rows))]
        shares = [rate / plan for rate, plan in zip(rates, planned, strict=True)]
        assert shares == pytest.approx([1.0] * plateau + [1 - k / 5 for k in range(5)])
        assert any(f"{stage.name} ended at update {plateau + 5} of 60" in notice for notice in notices)


@pytest.mark.parametrize("update", [3, 12, 16])
def test_a_stage_that_ends_early_is_the_same_after_a_cut(tmp_path: Path, update: int) -> None:
    finish(toy_spec(plan=_early()), tmp_path / "uncut")
    events = run(toy_spec(plan=_early(), log_every=1, checkpoint_updates=1), tmp_path / "run")
    for event in events:
        if isinstance(event, Progress) and event.name == "01-halve-0002" and event.window.update == update:
            break
    events.close()  # type: ignore[attr-defined]
    finish(toy_spec(plan=_early()), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(tmp_path / "uncut")


def test_a_rule_that_never_holds_changes_nothing(tmp_path: Path) -> None:
    never = Plan(tuple(tuned(s, early_end=EarlyEnd(1000, 5)) for s in toy_plan().stages))
    finish(toy_spec(plan=never), tmp_path / "never")
    finish(toy_spec(), tmp_path / "plain")
    assert weights(tmp_path / "never") == weights(tmp_path / "plain")


def test_one_step_of_a_quartering_student_is_nearer_to_four_steps_of_its_teacher_than_to_fewer() -> None:
    data = 0.5 * torch.randn(512, 2, generator=torch.Generator().manual_seed(1)) + 0.3
    torch.manual_seed(0)
    trainer = StageTrainer(
        NetworkDenoiser(MLP((2,), width=32, depth=2), VPCosine(), V()),
        None,
        Stage(Denoising(), Training(300, 3e-3, batch_size=64)),
        as_batches(in_memory(data), torch.device("cpu"))[0],
        (2,),
        seed=0,
        stream="teacher",
        accelerator=make_accelerator(),
    )
    for _ in trainer.run():
        pass
    teacher = trainer.finish()
    plan = Plan.halvings(4, 1, Training(400, 2e-3, batch_size=64), factor=4, updates_at={})
    student = distill(teacher, data, start=4, to=1, plan=plan)
    noise = torch.randn(256, 2, generator=torch.Generator().manual_seed(2))
    landed = sample(student, noise, 1)
    errors = [float((landed - sample(teacher, noise, n)).square().mean().sqrt()) for n in (4, 2, 1)]
    assert errors[0] < 0.5 * errors[1] < 0.5 * errors[2]
