"""Every study, at a size of seconds: its plan runs, resumes after an interruption, and its results are shown."""

import dataclasses
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from matplotlib.figure import Figure

from halfstep.data import DataConfig
from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import Finishing, Halving, Training
from halfstep.recipes import MLPConfig, Recipe
from halfstep.recipes.schema import ChainConfig
from halfstep.report.figures import Curve
from halfstep.report.study_figure import Panel, draw_panels
from halfstep.report.words import number
from halfstep.runs import RunFolder
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.samplers import samplers
from halfstep.studies import SCALES, Bench, Finding, Scale, Study, Table, Trial, run_study, studies, write_study
from halfstep.studies.integrators import METHODS
from halfstep.studies.published import COST, FIGURE_4, TABLE_1, TABLE_2
from halfstep.studies.roads import ROADS, Leg, funded, passes_of, way_to, ways
from halfstep.studies.sampling import most_steps, students_of
from halfstep.studies.scales import RoadSettings
from halfstep.studies.schedules import students_by
from halfstep.studies.show import spread

BEST = (("ddim", 256), ("heun", 63))
"""The teacher at its best: samplers and their network calls."""


def tiny() -> Scale:
    """Return a scale with the digits and a small MLP: nothing is learned, but everything runs."""
    recipe = Recipe(
        name="tiny",
        data=DataConfig(source="digits", limit=200),
        network=MLPConfig(width=16, depth=1),
        teacher=Training(4, 2e-4, 8, warmup_updates=1, anneal=False, ema_decay=0.5),
        chain=ChainConfig(start_steps=16, training=Training(2, 1e-3, 8)),
        evaluation=Evaluation(num_samples=24, num_reference=100, features="pixels", batch_size=12),
    )
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"conditional": False})})
    return Scale(
        name="tiny",
        recipe=recipe,
        ablation=recipe,
        seeds=1,
        gamma_levels=2,
        ablation_gamma_levels=2,
        steps=(1, 2, 4, 8),
        ablation_steps=4,
        updates=(1, 2),
        rates=(1e-4, 1e-3),
        roads=RoadSettings(
            passes={4: 800, 1: 1200},
            finish=Training(99, 1e-4, 4, adam_betas=(0.0, 0.99), ema_decay=0.5),
            consistency=Training(99, 1e-3, 8, warmup_updates=50),
            grid=(8, 32),
            moments=Training(99, 1e-3, 4),
        ),
        road_seeds=1,
    )


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the common folder of this module's studies, as those of a scale share one."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", list(studies))
def test_a_study_fills_its_cells_and_shows_every_one_of_them(name: str, shared: Path) -> None:
    study, scale = studies[name](), tiny()
    rows = run_study(study, scale, shared)
    assert [dict(row.axes) for row in rows] == [dict(cell.axes) for cell in study.trials(scale)]
    assert len({cell.name for cell in study.trials(scale)}) == len(rows)
    table = study.table(rows, scale)
    assert {len(row) for row in table.rows} == {len(table.headings)}
    path = write_study(study, scale, rows, shared)
    assert table.markdown() in path.read_text(encoding="utf-8")
    assert path.with_name("figure.png").read_bytes().startswith(b"\x89PNG")
    held = json.loads((shared / name / "study.json").read_text(encoding="utf-8"))
    assert [(row["axes"], row["figures"]) for row in held["rows"]] == [(dict(r.axes), r.figures) for r in rows]
    # The table and the figure only need the JSON.
    again = [Finding(row["axes"], row["figures"]) for row in held["rows"]]
    assert study.table(again, scale) == table
    assert study.panels(again, scale) == study.panels(rows, scale)
    shown = " ".join(value for row in table.rows for value in row)
    for row in rows:
        if "distance" in row.figures:
            assert number(row.figures["distance"]) in shown


def test_a_second_call_only_reads(shared: Path) -> None:
    study = studies["steps"]()
    first = run_study(study, tiny(), shared)
    before = {file: file.stat().st_mtime_ns for file in shared.rglob("*") if file.is_file()}
    told: list[bool] = []
    events: list[object] = []
    again = run_study(
        study, tiny(), shared, watch=events.append, done=lambda cell, figures, was_there: told.append(was_there)
    )
    assert again == first
    assert all(told)
    assert not events
    changed = {file.name for file, when in before.items() if file.stat().st_mtime_ns != when}
    assert changed <= {"study.json"}


def test_studies_share_their_measurements(tmp_path: Path) -> None:
    """Table 2 needs no samples of DDIM or of students beyond those of figure 4."""
    run_study(studies["steps"](), tiny(), tmp_path)
    kept = "runs/*/evaluation/cells/*"
    before = set(tmp_path.glob(kept))
    rows = run_study(studies["table2"](), tiny(), tmp_path)
    steps = {
        (row.axes["method"], row.figures["steps"]): row.figures["distance"]
        for row in run_study(studies["steps"](), tiny(), tmp_path)
    }
    for row in rows:
        if row.axes["method"] in ("student", "ddim"):
            assert row.figures["distance"] == steps[row.axes["method"], row.figures["steps"]]
    new = {folder.name for folder in set(tmp_path.glob(kept)) - before}
    assert new
    assert not any("-ddim-" in name for name in new)


def test_cells_of_other_settings_are_refused_and_left_alone(shared: Path) -> None:
    run_study(studies["cost"](), tiny(), shared)
    other = tiny().recipe.model_copy(update={"seed": 1})
    with pytest.raises(ValueError, match=r"was written with different settings\. Choose another --out"):
        run_study(studies["cost"](), dataclasses.replace(tiny(), recipe=other), shared)
    # A study does not depend on settings that it does not use.
    assert run_study(studies["cost"](), dataclasses.replace(tiny(), seeds=2), shared)


class Probe(Study):
    """Three cells, the second of which diverges."""

    title: ClassVar[str] = "probe"
    question: ClassVar[str] = "?"
    uses: ClassVar[tuple[str, ...]] = ("seeds",)

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.stop_at: int | None = None

    def trials(self, scale: Scale) -> list[Trial]:
        return [Trial({"number": n}, lambda bench, n=n: self.work(bench, n)) for n in range(3)]  # type: ignore[misc]

    def work(self, bench: Bench, n: int) -> dict[str, Any]:
        self.calls.append(n)
        if n == self.stop_at:
            raise Interrupted(15)
        if n == 1:
            raise NonFinite("the loss was not finite in stage 00-denoise at update 7")
        return {"value": float(n)}

    def table(self, rows: Any, scale: Scale) -> Table:
        return Table(("number", "value"), [])

    def panels(self, rows: Any, scale: Scale) -> list[Any]:
        return []


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    monkeypatch.setitem(studies, "probe", Probe)
    return Probe()


def test_a_diverged_cell_says_so_and_does_not_stop_the_study(tmp_path: Path, probe: Probe) -> None:
    rows = run_study(probe, tiny(), tmp_path)
    why = {"diverged": "the loss was not finite in stage 00-denoise at update 7"}
    assert [row.figures for row in rows] == [{"value": 0.0}, why, {"value": 2.0}]
    assert run_study(probe, tiny(), tmp_path) == rows
    assert probe.calls == [0, 1, 2]


def test_a_study_resumes_at_the_interrupted_cell(tmp_path: Path, probe: Probe) -> None:
    probe.stop_at = 2
    with pytest.raises(Interrupted):
        run_study(probe, tiny(), tmp_path)
    probe.stop_at = None
    assert len(run_study(probe, tiny(), tmp_path)) == 3
    assert probe.calls == [0, 1, 2, 2]


def test_a_signal_stops_a_study_between_cells(tmp_path: Path, probe: Probe) -> None:
    with StopSignal() as stop:
        stop.number = 15
        with pytest.raises(Interrupted):
            run_study(probe, tiny(), tmp_path, stop=stop)
    assert probe.calls == []


def test_a_teacher_that_learned_nothing_is_marked_as_diverged_in_table_1() -> None:
    rows = [
        Finding({"prediction": p, "weighting": w, "seed": seed}, {"ddim": 1.0 + seed, "ancestral": 2.0, "gamma": 0.5})
        for p, w in TABLE_1
        for seed in (0, 1)
    ]
    rows[0] = Finding(rows[0].axes, {"diverged": "noise"})
    rows[2:4] = [Finding(row.axes, {"diverged": "noise"}) for row in rows[2:4]]
    lines = studies["table1"]().table(rows, dataclasses.replace(tiny(), seeds=2)).rows
    assert list(lines[0]) == ["both, snr", "2.00 (diverges in 1 of 2)", "2.00 (diverges in 1 of 2)", "2.54", "2.78"]
    assert list(lines[1])[1:3] == ["diverges", "diverges"]
    assert list(lines[2])[1:3] == ["2.00 ± 0", "1.50 ± 0.707"]
    eps = next(line for line in lines if line[0] == "eps, truncated_snr")
    assert list(eps)[3:] == ["diverges", "diverges"]


def test_schedules_are_shown_at_the_best_of_their_rates_with_mean_and_deviation() -> None:
    distances = {(1e-4, 0): 4.0, (1e-4, 1): 6.0, (1e-3, 0): 1.0, (1e-3, 1): 3.0}
    rows = [
        Finding(
            {"factor": factor, "updates": updates, "rate": rate, "seed": seed},
            {"updates": 100 * updates, "at 4": factor * distance, "at 1": 10.0},
        )
        for factor in (2, 4)
        for updates in (1, 2)
        for (rate, seed), distance in distances.items()
    ]
    table = studies["schedules"]().table(rows, dataclasses.replace(tiny(), seeds=2))
    assert list(table.headings)[2:] == ["student at 4", "student at 1"]
    assert list(table.rows[0]) == ["2, 1", "100", "4.00 ± 2.83 (rate 0.001)", "10.0 ± 0 (rate 0.0001)"]
    assert table.rows[2][2] == "8.00 ± 5.66 (rate 0.001)"


@pytest.mark.parametrize("method", ["ddim", "ancestral", "heun", "dpmpp_2m", "rk4"])
@pytest.mark.parametrize("num_evals", [1, 2, 3, 4, 8, 15, 16, 64])
def test_equal_network_calls_are_as_many_steps_as_fit(method: str, num_evals: int) -> None:
    steps, kind = most_steps(method, num_evals), samplers[method]()
    assert kind.num_evals(steps + 1) > num_evals
    assert steps == 0 or kind.num_evals(steps) <= num_evals


@pytest.mark.parametrize("name", ["tiny", *SCALES])
def test_every_method_costs_the_scales_budget_within_one_update(name: str) -> None:
    scale = tiny() if name == "tiny" else SCALES[name]()
    for road in ROADS.values():
        for steps, passes in scale.roads.passes.items():
            plan = road.plan(scale, steps)
            led = [plan.stages[place] for place in way_to(plan, steps)]
            assert led[-1].num_steps == steps
            assert passes_of(led) == pytest.approx(passes, abs=led[-1].update_cost)
            assert all(stage.training.num_updates > 1 for stage in led)


def test_a_chain_makes_all_students_and_the_finish_of_one_leads_to_no_other() -> None:
    """teacher -> 8 -> 4 -> 2 -> 1, with a finish of each student."""
    plan = ROADS["finish"].plan(SCALES["smoke"](), 1)
    assert [stage.num_steps for stage in plan.stages] == [8, 4, 2, 1] * 2
    halved = [(0,), (0, 1), (0, 1, 2), (0, 1, 2, 3)]
    assert ways(plan.stages) == halved + [(*way, 4 + place) for place, way in enumerate(halved)]
    # A scale with fewer students has stages with larger factors, each with a teacher on its own grid.
    short = [stage.objective for stage in ROADS["second_order"].plan(tiny(), 1).stages]
    assert [(one.num_steps, one.num_teacher_steps) for one in short if isinstance(one, Halving)] == [(4, 2), (1, 4)]


def test_passes_pay_for_helpers_and_for_what_led_to_a_stage() -> None:
    """An update of 2 samples costs 28 passes in a finish and 10 in a halving. The finish starts from the halved
    student, so the cost of that student is subtracted."""
    training = Training(99, 1e-3, 2)
    halving, finishing = Halving(2), Finishing(2, lead_updates=0)
    plan = funded([Leg(lambda _: halving, training, 90), Leg(lambda _: finishing, training, 90 + 5 * 28 + 1)])
    assert [stage.training.num_updates for stage in plan.stages] == [9, 5]
    # The remainder of one stage's rounding goes to the next.
    rounded = funded([Leg(lambda _: halving, training, 94), Leg(lambda _: Halving(1), training, 94 + 52)])
    assert [stage.training.num_updates for stage in rounded.stages] == [9, 6]


def test_the_recipes_own_chain_keeps_its_proportions_before_the_first_student() -> None:
    """Digits: 100, 200 and 650 updates to 32, 16 and 8 steps, each at the same cost."""
    plan = ROADS["halving"].plan(SCALES["smoke"](), 1)
    updates = [stage.training.num_updates for stage in plan.stages]
    assert [stage.num_steps for stage in plan.stages] == [32, 16, 8, 4, 2, 1]
    assert [round(updates[place] / updates[0], 1) for place in range(3)] == pytest.approx([1, 2, 6.5], rel=0.03)


def test_a_plan_counts_what_its_runs_and_samples_take(shared: Path) -> None:
    """The costs of a dry run are those of the folders that the study leaves."""
    study, scale = studies["roads"](), tiny()
    run_study(study, scale, shared)
    costs = dict(study.costs(scale))
    runs: dict[str, float] = {"teacher": 4 * 8 * 3}
    drawn = 0
    for folder in (shared / "runs").glob("road-*"):
        rows = RunFolder(folder).recipe()["plan"]
        name = folder.name.split("-")[1]
        runs[name] = runs.get(name, 0) + sum(row["num_updates"] * row["update_cost"] for row in rows)
    for file in (shared / "runs").glob("road-*/evaluation/cells/*/cell.json"):
        drawn += json.loads(file.read_text(encoding="utf-8"))["num_evals"] * 24
    assert {name: costs[name] for name in runs} == runs
    assert drawn == len(ROADS) * (4 + 1) * 24
    # DDIM with 4, 1 and 256 calls, Heun with 3, 1 and 63.
    assert costs["samples"] == drawn + (4 + 1 + 256 + 3 + 1 + 63) * 24


def test_seeds_of_a_road_share_the_teacher_but_neither_training_nor_noise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in set(ROADS) - {"halving"}:
        monkeypatch.delitem(ROADS, name)
    study, scale = studies["roads"](), dataclasses.replace(tiny(), road_seeds=2)
    rows = run_study(study, scale, tmp_path)
    for method in ("halving", "ddim", "heun"):
        first, second = (r.figures["distance"] for r in rows if r.axes["method"] == method and r.axes["evals"] == 1)
        assert first != second
    runs = [RunFolder(tmp_path / "runs" / f"road-halving-{seed}").stages() for seed in (0, 1)]
    given, last = ([run[place].manifest().files for run in runs] for place in (0, -1))
    assert given[0] == given[1]
    assert last[0] != last[1]
    table = study.table(rows, scale)
    distances = [r.figures["distance"] for r in rows if r.axes["method"] == "halving" and r.axes["evals"] == 4]
    assert spread(distances) in [row[1] for row in table.rows]
    # The line of the teacher at its best is the mean over the seeds, not the best of them.
    best = {m: [r.figures["distance"] for r in rows if (r.axes["method"], r.axes["evals"]) == m] for m in BEST}
    (panel, _) = study.panels(rows, scale)
    assert panel.level == ("teacher at its best", min(sum(values) / 2 for values in best.values()))
    figure = write_study(study, scale, rows, tmp_path).with_name("figure.svg")
    assert panel.level[0] in figure.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        {"chain": {"teacher_sampler": "heun"}},
        {"chain": {"teacher_steps": 3}},
        {"finish": {"steps": (4,)}},
        {"evaluation": {"precision": "bf16"}},
        {"evaluation": {"teacher_heun_steps": (16,)}},
    ],
)
def test_settings_younger_than_published_results_count_where_they_change_something(change: Mapping[str, Any]) -> None:
    scale = tiny()
    recipe = Recipe.model_validate(
        {
            **scale.recipe.model_dump(),
            **{name: {**scale.recipe.model_dump()[name], **new} for name, new in change.items()},
        }
    )
    assert dataclasses.replace(scale, recipe=recipe).as_data(["recipe"]) != scale.as_data(["recipe"])


def test_same_noise_is_the_distance_from_the_teachers_finest_samples(shared: Path) -> None:
    """Only the teacher itself with that sampler has no distance."""
    rows = run_study(studies["roads"](), tiny(), shared)
    at_zero = [row.axes for row in rows if row.figures["same_noise"] == 0]
    assert [(axes["method"], axes["evals"]) for axes in at_zero] == [("heun", 63)]


def test_a_method_with_more_calls_per_step_than_given_takes_no_step() -> None:
    assert most_steps("rk4", 2) == 0
    assert most_steps("rk4", 3) == 1


def test_the_cost_of_a_chain_is_read_from_its_runs(shared: Path) -> None:
    rows = {row.axes["part"]: row.figures for row in run_study(studies["cost"](), tiny(), shared)}
    manifests = [stage.manifest() for stage in RunFolder(shared / "runs" / "chain").stages()[1:]]
    assert rows["base training"]["updates"] == 4
    assert rows["base training"]["forward_passes"] == 4 * 8 * 3
    # 16 -> 8 -> 4: two stages with two updates; then 2 and 1, with four each; a student's update costs five passes.
    assert rows["distillation to 4"]["updates"] == 4
    assert rows["distillation to 1"]["updates"] == 12
    assert rows["distillation to 1"]["forward_passes"] == 12 * 8 * 5
    assert rows["distillation to 1"]["seconds"] == pytest.approx(sum(manifest.seconds for manifest in manifests))


def test_the_schedules_keep_only_what_is_measured(shared: Path) -> None:
    run_study(studies["schedules"](), tiny(), shared)
    for factor, kept in ((2, {4, 1}), (4, {4, 1})):  # 16 -> 8 -> 4 -> 2 -> 1, and 16 -> 4 -> 1
        folder = RunFolder(shared / "runs" / f"schedule-{factor}-1-0.001-0")
        there = {s.manifest(verify=False).num_steps for s in folder.stages()[1:] if s.model.is_file()}
        assert there == kept


@pytest.mark.parametrize(
    ("start", "factor", "students"),
    [(64, 2, (32, 16, 8, 4, 2, 1)), (64, 4, (16, 4, 1)), (8192, 4, (2048, 512, 128, 32, 8, 2, 1)), (6, 4, (1,))],
)
def test_quartering_ends_at_one_step_from_any_start(start: int, factor: int, students: tuple[int, ...]) -> None:
    assert students_by(start, factor) == students


@pytest.mark.parametrize("name", list(SCALES))
@pytest.mark.parametrize("study", list(studies))
def test_every_scale_has_a_plan_whose_models_exist(name: str, study: str) -> None:
    scale = SCALES[name]()
    cells = studies[study]().trials(scale)
    assert cells
    students = students_of(scale)
    for cell in cells:
        axes: Mapping[str, Any] = cell.axes
        if str(axes.get("method", "")).startswith("student"):
            assert axes.get("steps", axes.get("evals")) in students


def test_statements_about_the_paper_are_consistent() -> None:
    """Table 2's row of the method is the start of figure 4's curve; the best of table 1 are printed bold."""
    assert {n: fid for n, fid in FIGURE_4["CIFAR-10"]["student"].items() if n <= 8} == TABLE_2["student"]
    known = {key: value for key, value in TABLE_1.items() if value is not None}
    assert min(known, key=lambda key: known[key][1]) == ("x0", "truncated_snr")
    assert min(known, key=lambda key: known[key][0]) == ("v", "truncated_snr")
    assert TABLE_1["eps", "truncated_snr"] is None
    # The claim of section 5.2: distillation to 4 steps costs at most as many updates as base training.
    assert all(to_4 <= train for train, to_4, _ in COST.values())
    for curves in FIGURE_4.values():
        for curve in curves.values():
            assert list(curve) == sorted(curve)
            assert max(curve.values()) <= 20


def test_every_integrator_of_the_study_is_a_registered_sampler() -> None:
    assert {samplers.name_of(sampler) for sampler in METHODS.values()} == {
        name for name, kind in samplers.items() if not kind.stochastic
    }


def test_numbers_are_shown_to_three_digits_and_means_with_their_spread() -> None:
    assert [number(v) for v in (None, 1234.5, 0.012345, 3.0, 30)] == ["–", "1,234", "0.0123", "3.00", "30"]
    assert spread([]) == "–"
    assert spread([2.0]) == "2.00"
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    panels = [Panel("title", "x", "y", [Curve("curve", [1, 2], [3, 4])])]
    draw_panels(panels, tmp_path / "figure")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert {file.name for file in before} == {"figure.png", "figure.svg"}

    def half(self: Figure, file: Any, **_: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        draw_panels(panels, tmp_path / "figure")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
