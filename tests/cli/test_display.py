"""What is shown while a run runs."""

import io

from rich.console import Console

from halfstep.cli.display import RunDisplay, duration
from halfstep.objectives import Plan
from halfstep.train import Progress, StageEnd, StageStart, Window
from halfstep.train.cost import update_cost


def _window(update: int, seconds: float) -> Window:
    return Window(update, 0.1, 0.1, 1e-3, 100.0, seconds)


def test_the_time_left_counts_network_calls_and_batches_of_all_stages() -> None:
    plan = Plan.teacher(num_updates=100, batch_size=20, learning_rate=1e-3) + Plan.halvings(
        2, 1, num_updates=60, batch_size=10, learning_rate=1e-3, updates_at={}
    )
    assert [update_cost(stage) for stage in plan.stages] == [60.0, 50.0]
    out = io.StringIO()
    display = RunDisplay(plan, Console(file=out, width=200))
    display.show(
        [
            StageStart("00-denoise", 0, plan.stages[0], 0),
            Progress("00-denoise", 100, _window(10, 6.0)),
            Progress("00-denoise", 100, _window(20, 12.0)),
        ]
    )
    # 0.6 s an update of cost 60: 80 more updates and 60 of cost 50 take 48 s + 30 s.
    assert display.seconds_left() == 78.0
    display.show([StageEnd("00-denoise", 60.0, was_there=False)])
    assert display.seconds_left() == 30.0
    assert "00-denoise: done in 1:00 min" in out.getvalue()


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 3599, 7800, float("inf"))] == [
        "0 s",
        "59 s",
        "1:01 min",
        "59:59 min",
        "2:10 h",
        "unknown",
    ]
