"""The progress display of a run."""

import io

import pytest

from halfstep.cli.display import RunDisplay
from halfstep.cli.plan_view import PlanView
from halfstep.cli.words import Screen
from halfstep.objectives import Denoising, Plan, Training
from halfstep.report.words import duration
from halfstep.run.events import Measured, Measuring, Notice, Progress, StageEnd, StageStart
from halfstep.runs.schema import Result
from halfstep.train.window import Window


def _window(update: int, seconds: float) -> Window:
    return Window(update, 0.1, 0.1, 1e-3, 100.0, seconds, 0.0)


def _plan(teacher: Training, student: Training) -> Plan:
    return Plan.of(Denoising(), teacher) + Plan.halvings(2, 1, student, updates_at={})


def test_the_time_left_counts_network_calls_and_batches_of_all_stages() -> None:
    plan = _plan(Training(100, 1e-3, batch_size=20), Training(60, 1e-3, batch_size=10))
    assert [stage.update_cost for stage in plan.stages] == [60.0, 50.0]
    out = io.StringIO()
    display = RunDisplay(list(zip(plan.names(), plan.stages, strict=True)), Screen(file=out))
    display.show(
        [
            StageStart("00-denoise", 0, plan.stages[0], 0, 0.0),
            Progress("00-denoise", 100, _window(10, 6.0)),
            Progress("00-denoise", 100, _window(20, 12.0)),
        ]
    )
    # 0.6 s for an update of cost 60: 80 more updates and 60 of cost 50 take 48 s + 30 s.
    assert display.status.seconds_left == 78.0
    display.show([StageEnd("00-denoise", 60.0, was_there=False)])
    assert display.status.seconds_left == 30.0
    assert "00-denoise: done in 1 min 0 s" in out.getvalue()


def test_the_time_left_of_a_resumed_run_is_at_the_pace_since_then() -> None:
    plan = _plan(Training(100, 1e-3, batch_size=20), Training(60, 1e-3, batch_size=10))
    display = RunDisplay(list(zip(plan.names(), plan.stages, strict=True)), Screen(file=io.StringIO()))
    # 40 updates in 4,000 s, and the next 10 in 6 s: 50 more take 30 s, and so do 60 of cost 50.
    events = [StageStart("00-denoise", 0, plan.stages[0], 40, 4000.0), Progress("00-denoise", 100, _window(50, 4006.0))]
    display.show(events)
    assert display.status.seconds_left == pytest.approx(60.0)


def test_measuring_shows_where_it_is_and_counts_in_the_time_left() -> None:
    plan = _plan(Training(10, 1e-3, batch_size=20), Training(6, 1e-3, batch_size=10))
    result = Result(sampler="ddim", num_steps=1, num_evals=1, frechet=1.0, kid=0.0, seconds_per_1000=1.0)
    out = io.StringIO()
    display = RunDisplay(list(zip(plan.names(), plan.stages, strict=True)), Screen(file=out))
    display.show([StageStart("00-denoise", 0, plan.stages[0], 0, 0.0), Progress("00-denoise", 10, _window(10, 6.0))])
    display.lines._last_line = 0.0
    display.show([StageEnd("00-denoise", 6.0, was_there=False), Measuring("00-denoise", "Heun", 1, 3)])
    assert "00-denoise: measuring 1/3, Heun" in out.getvalue()
    assert display.status.stages[0].state == "measuring"
    training = display.status.seconds_left
    display.show([Measured("00-denoise", result, num_left=2, seconds=5.0)])
    # Two more results of the teacher and one of the student, each in 5 s.
    assert display.status.seconds_left == training + 15.0
    assert "distance 1.00, 1.00 s per 1,000 samples" in out.getvalue()


def test_too_few_samples_are_shown_with_their_kid() -> None:
    plan = _plan(Training(10, 1e-3, batch_size=20), Training(6, 1e-3, batch_size=10))
    out = io.StringIO()
    display = RunDisplay(list(zip(plan.names(), plan.stages, strict=True)), Screen(file=out))
    for name, kid, frechet in (("00-denoise", 0.125, 1.0), ("01-halve-0001", 0.25, 2.0)):
        result = Result(sampler="ddim", num_steps=1, num_evals=1, frechet=frechet, kid=kid, seconds_per_1000=1.0)
        display.show([Measured(name, result, too_few=True)])
    assert "KID 0.125, 1.00 s per 1,000 samples" in out.getvalue()
    display.screen.show(PlanView(display.status))
    shown = out.getvalue()
    assert "KID 0.250" in shown
    assert "distance" not in shown
    assert "x)" not in shown


def test_a_terminal_gets_one_display_and_no_terminal_gets_lines() -> None:
    plan = _plan(Training(20, 1e-3, batch_size=20), Training(6, 1e-3, batch_size=10))
    events = [
        StageStart("00-denoise", 0, plan.stages[0], 0, 0.0),
        Progress("00-denoise", 20, _window(10, 6.0)),
        Notice("[a] note"),
        StageEnd("00-denoise", 12.0, was_there=False),
        StageStart("01-halve-0001", 1, plan.stages[1], 2, 0.0),
    ]
    printed = {}
    for terminal in (True, False):
        out = io.StringIO()
        console = Screen(file=out, is_terminal=terminal)
        display = RunDisplay(list(zip(plan.names(), plan.stages, strict=True)), console)
        display.show(events)
        printed[terminal] = out.getvalue()
        assert [stage.state for stage in display.status.stages] == ["done", "training"]
        assert " [a] note" in printed[terminal]
    assert "▶ 01-halve-0001" in printed[True]
    assert "✓ 00-denoise" in printed[True]
    assert "00-denoise: done in" not in printed[True]
    assert [line.split(":")[0] for line in printed[False].splitlines()] == [
        "00-denoise",
        "00-denoise",
        "note",
        "00-denoise",
        "01-halve-0001",
    ]
    assert "6 updates, resuming at update 2" in printed[False]
    assert "\x1b" not in printed[False]


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599, 7800, float("inf"))] == [
        "0.4 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "2 h 10 min",
        "unknown",
    ]
