"""The lines of a plan on terminals of several sizes."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from halfstep.cli.plan_view import PlanView, shown_range
from halfstep.runs import Result, RunStatus, StageStatus


def measured(frechet: float) -> Result:
    return Result(sampler="ddim", num_steps=1, num_evals=1, frechet=frechet, kid=0.0, seconds_per_1000=1.0)


def status_at(current: int, count: int = 11) -> RunStatus:
    """Return a plan in which stage `current` is half done. All updates cost the same and take 0.1 s."""
    stages = []
    for index in range(count):
        stage = StageStatus(f"{index:02d}-halve-{2 ** (count - 1 - index):04d}", 2 ** (count - 1 - index), 100)
        if index < current:
            stage.state, stage.update, stage.seconds, stage.results = "done", 100, 10.0, [measured(1.5 + index)]
        elif index == current:
            stage.state = "training"
            stage.take({"update": 40, "seconds": 4.0, "loss": 0.25, "samples_per_second": 1234.0})
            stage.take({"update": 50, "seconds": 5.0, "loss": 0.125, "samples_per_second": 1234.0})
        stages.append(stage)
    return RunStatus(Path("run"), "toy", stages)


def lines_of(status: RunStatus, width: int, height: int, encoding: str = "utf-8", terminal: bool = True) -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=out, width=width, height=height, force_terminal=terminal, color_system=None)
    console.print(PlanView(status))
    out.seek(0)
    return out.read().rstrip("\n").split("\n")


def test_done_now_and_to_come_with_the_time_of_each() -> None:
    lines = lines_of(status_at(3), 120, 40)
    assert len(lines) == 12
    assert lines[0].startswith("✓ 00-halve-1024")
    assert "10 s" in lines[0]
    assert lines[0].rstrip().endswith("distance 1.50")
    # A later stage's distance relative to that of the first.
    assert lines[2].rstrip().endswith(f"distance 3.50 ({3.5 / 1.5:.2f}x)")
    assert lines[3].startswith("▶ 03-halve-0128")
    for said in ("50/100", "loss 0.125", "1,234 samples/s", "5 s left"):
        assert said in lines[3]
    assert lines[4].startswith("· 04-halve-0064")
    assert "about 10 s" in lines[4]
    # 7.5 stages of 10 s.
    assert "32% of the training  350/1,100 updates  35 s so far  1 min 15 s left" in lines[-1]


@pytest.mark.parametrize("width", [40, 60, 80, 92, 110, 200])
def test_names_are_whole_at_every_width(width: int) -> None:
    status = status_at(3)
    lines = lines_of(status, width, 40)
    assert all(len(line) <= width for line in lines)
    for stage, line in zip(status.stages, lines, strict=False):
        assert stage.name in line
        assert "left" in line or stage.state != "training"


@pytest.mark.parametrize("current", [0, 5, 10])
@pytest.mark.parametrize("height", [6, 8, 10, 13])
def test_a_low_terminal_keeps_the_stage_at_work(current: int, height: int) -> None:
    lines = lines_of(status_at(current), 120, height)
    assert len(lines) <= max(height - 2, 4)
    assert any(line.startswith(f"▶ {current:02d}-") for line in lines)
    hidden = sum(int(line.split()[0]) for line in lines if "stages before" in line or "stages to come" in line)
    assert hidden + sum(line[0] in "✓▶·" for line in lines) == 11


def test_terminals_without_utf8_get_ascii() -> None:
    lines = lines_of(status_at(3), 120, 40, encoding="ascii")
    assert lines[0].startswith("x 00-")
    assert lines[3].startswith("> 03-")


def test_nothing_is_omitted_without_a_terminal() -> None:
    assert len(lines_of(status_at(3), 160, 5, terminal=False)) == 12


def test_the_displayed_range_satisfies_its_requirements() -> None:
    for count in range(1, 15):
        for at in range(count):
            for room in range(1, 16):
                first, last = shown_range(count, at, room)
                assert 0 <= first <= at < last <= count
                assert last - first + (first > 0) + (last < count) <= max(room, 3)
