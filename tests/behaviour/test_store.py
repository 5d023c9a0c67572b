"""One store: the first reader of a cell draws it, and the others read it."""

import dataclasses
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import MemoryData
from halfstep.measure import sources
from halfstep.measure.evaluate import Evaluation, Method, Reference, finest, teacher_methods
from halfstep.measure.sources import DataSource, ModelSource
from halfstep.measure.store import Cell, SameNoise, Store
from halfstep.models.model import Model
from halfstep.nets import MLP
from halfstep.recipes import Recipe
from halfstep.runs import Best, Manifest, Outcome, RunFolder, teacher_best
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import write_sealed
from halfstep.samplers import DDIM, Ancestral, Heun, Sampler
from halfstep.studies import SCALES, Bench
from toys import TINY_ARRAYS, points

EVALUATION = Evaluation(num_samples=16, num_reference=60, features="pixels")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Counter[int | None]:
    """Return the number of samples drawn at each number of steps."""
    counted: Counter[int | None] = Counter()
    sample = Model.sample

    def counting(self: Model, seeds: list[int], num_steps: int | None = None, *rest: object, **more: object) -> object:
        counted[num_steps] += len(seeds)
        return sample(self, seeds, num_steps, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "sample", counting)
    return counted


def model(shift: float = 0.0) -> Model:
    torch.manual_seed(0)
    network = MLP((2,), width=8, depth=1)
    with torch.no_grad():
        next(network.parameters()).add_(shift)
    manifest = Manifest(
        stage="00-denoise", objective="denoise", parent=None, outcome=Outcome(role="teacher"), num_updates=0,
        seconds=0.0, shape=(2,), is_image=False, clip=False, network={}, process={}, prediction={},
        files={"model.safetensors": str(shift)},
    )  # fmt: skip
    return Model(NetworkDenoiser(network, VPCosine(), V()).eval(), manifest)


def cell(
    steps: int = 2, seeds: range = range(16), sampler: Sampler | None = None, shift: float = 0.0, **more: object
) -> Cell:
    made, data = model(shift), MemoryData("toy", points())
    source = ModelSource(made.manifest, lambda: made, sampler or DDIM(), torch.device("cpu"), data, **more)  # type: ignore[arg-type]
    return Cell(source, steps, seeds)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(MemoryData("toy", points()), EVALUATION)


def test_a_run_an_evaluation_and_a_study_that_ask_for_one_cell_draw_it_once(
    tmp_path: Path, drawn: Counter[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "toy.npy", points().numpy())
    run = tmp_path / "runs" / "teacher"
    main(["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(run), *TINY_ARRAYS])
    assert drawn == {4: 24, 2: 72, 1: 48}
    drawn.clear()
    main(["evaluate", str(run), "--num-steps", "2", "1"])
    main(["evaluate", str(run / "stages" / "00-denoise"), "--num-steps", "4", "2"])
    assert not drawn
    # Only cells that the run has not measured are drawn.
    main(["evaluate", str(run), "--num-steps", "3", "2"])
    assert drawn == {3: 24}
    drawn.clear()
    recipe = Recipe.model_validate(RunFolder(run).recipe()["recipe"])
    bench = Bench(tmp_path, dataclasses.replace(SCALES["smoke"](), recipe=recipe), None, lambda event: None)
    teacher, _, last = RunFolder(run).stages()
    found = [bench.measured(teacher, 3, DDIM()), bench.measured(last, 1, DDIM())]
    assert not drawn
    (student,) = last.metrics().results  # type: ignore[union-attr]
    tables = json.loads(RunFolder(run).evaluation_path.read_text())["tables"]
    (row,) = [row for row in tables[0]["rows"] if row["num_steps"] == 3]
    assert found[0].frechet == row["figures"]["frechet"]["mean"]
    assert (found[1].frechet, found[1].kid) == (student.frechet, student.kid)
    # A study with another sampler draws, and the evaluation reads its cells.
    bench.measured(teacher, 3, Heun())
    assert drawn == {3: 24}
    main(["evaluate", str(run), "--num-steps", "3", "2", "--against", "teacher-heun"])
    assert drawn == {3: 24}


def test_one_number_of_steps_by_two_samplers_is_two_rows(
    tmp_path: Path, drawn: Counter[int | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HALFSTEP_CACHE", str(tmp_path / "cache"))
    np.save(tmp_path / "toy.npy", points().numpy())
    run = tmp_path / "run"
    heun = ["--evaluation.teacher-heun-steps", "4"]
    argv = ["run", "arrays", "--data", str(tmp_path / "toy.npy"), "--out", str(run), *TINY_ARRAYS, *heun]
    main(argv)
    teacher, *students = RunFolder(run).stages()
    held = {(r.sampler, r.num_steps): r for r in teacher.metrics().results}  # type: ignore[union-attr]
    assert list(held) == [("ddim", 4), ("ddim", 2), ("ddim", 1), ("heun", 4)]
    ddim, by_heun = held["ddim", 4], held["heun", 4]
    assert (ddim.num_evals, by_heun.num_evals) == (4, 7)
    assert ddim.frechet != by_heun.frechet
    # Samples are compared with the teacher's cell with the most network calls.
    assert by_heun.teacher_rmse is None
    assert all(r.teacher_rmse for key, r in held.items() if key != ("heun", 4))
    arrays = [np.load(teacher.path / str(r.samples))["arr_0"] for r in (ddim, by_heun)]
    assert not np.array_equal(*arrays)
    (student,) = students[0].metrics().results  # type: ignore[union-attr]
    samples = np.load(students[0].path / str(student.samples))["arr_0"]
    assert len(samples) == 4
    cells = {kind: np.load(next(run.glob(f"evaluation/cells/{kind}-000*/samples.npz")))["arr_0"][:8]
             for kind in ("00-denoise-heun", "01-halve-0002-ddim")}  # fmt: skip
    apart = np.sqrt(np.mean((cells["00-denoise-heun"] - cells["01-halve-0002-ddim"]) ** 2))
    assert student.teacher_rmse == pytest.approx(apart, rel=1e-5)
    # The ratio is the quotient, in the table and in the status.
    best = min(r.frechet for r in held.values())
    capsys.readouterr()
    main(["status", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["teacher_best"]["frechet"] == best
    assert told["stages"][1]["results"][0]["ratio"] == student.frechet / best
    assert [r["ratio"] for r in told["stages"][0]["results"]] == [None] * 4
    # Nothing is measured again except a missing row.
    drawn.clear()
    before = teacher.metrics_path.stat().st_mtime_ns
    main(argv)
    assert not drawn
    assert teacher.metrics_path.stat().st_mtime_ns == before
    told = json.loads(teacher.metrics_path.read_text())
    told["results"] = [r for r in told["results"] if r["sampler"] != "heun"]
    write_sealed(teacher.metrics_path, told)
    main(argv)
    assert {(r.sampler, r.num_steps) for r in teacher.metrics().results} == held.keys()  # type: ignore[union-attr]
    capsys.readouterr()
    main(["evaluate", str(run)])
    assert not drawn
    table = json.loads(RunFolder(run).evaluation_path.read_text())["tables"][0]
    rows = {(r["series"], r["num_steps"]): r["figures"]["frechet"]["mean"] for r in table["rows"]}
    assert rows["teacher-heun", 4] == by_heun.frechet
    assert rows["teacher-ddim", 4] == ddim.frechet
    shown = (run / "evaluation" / "evaluation.md").read_text()
    (line,) = [line for line in shown.splitlines() if line.startswith("| student, DDIM | 2 |")][:1]
    assert line.split(" | ")[3] == f"{student.frechet / best:.2f}"


def test_samples_are_compared_with_a_fine_teacher() -> None:
    fine = teacher_methods(DDIM(), (16, 256, 64), EVALUATION)
    assert [(type(one.sampler).__name__, one.num_steps) for one in fine] == [
        ("DDIM", 256), ("DDIM", 64), ("DDIM", 16), ("Heun", 32),
    ]  # fmt: skip
    assert finest(fine) == Method(DDIM(), 256)
    assert finest(teacher_methods(DDIM(), (16,), EVALUATION)) == Method(Heun(), 32)
    # A teacher whose own sampler is Heun is not measured twice.
    assert len(teacher_methods(Heun(), (32,), EVALUATION)) == 1
    with pytest.raises(ValueError, match="teacher_heun_steps must be a whole number of at least 1, got 0"):
        Evaluation(teacher_heun_steps=(0,))


def test_the_teacher_at_its_best_is_its_smallest_finite_distance_by_ddim_or_heun() -> None:
    cells = [
        Best("ddim", 64, 64, 2.0), Best("heun", 32, 63, 1.5), Best("heun", 64, 127, 1.5),
        Best("ancestral", 64, 64, 0.5), Best("ddim", 256, 256, math.nan), Best("ddim", 128, 128, 1.75),
    ]  # fmt: skip
    for order in (cells, cells[::-1]):
        best = teacher_best(order)
        assert best == cells[1]
    assert teacher_best(cells[:1] + cells[3:]) == cells[-1]
    assert teacher_best([cells[3], cells[4]]) is None
    assert cells[1].ratio(3.0) == 2.0
    assert cells[1].ratio(math.inf) is None
    assert Best("ddim", 1, 1, 0.0).ratio(1.0) is None


def test_the_identity_of_a_cell_contains_everything_its_samples_depend_on() -> None:
    others = [
        cell(steps=4), cell(seeds=range(16, 32)), cell(sampler=Heun()), cell(sampler=Ancestral(0.0)),
        cell(sampler=Ancestral(1.0)), cell(shift=0.5), cell(guidance_scale=1.0), cell(precision="bf16"),
    ]  # fmt: skip
    names = {one.name for one in [cell(), *others]}
    assert len(names) == 1 + len(others)
    assert cell().name in names


class Listener(nn.Module):
    """A network that records its conditions."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.heard: list[tuple[Tensor, Tensor]] = []

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor, observation: Tensor) -> Tensor:
        self.heard.append((class_labels, observation))
        return self.gain * x_t


def sorted_data(labelled: bool = True) -> MemoryData:
    """Return data that is sorted by class, with a condition that equals the class."""
    labels = torch.arange(8).repeat_interleave(50)
    observed = {"observation": labels.float()[:, None]}
    if not labelled:
        return MemoryData("unlabelled", points(400), conditions=observed)
    return MemoryData("sorted", points(400), labels, tuple("abcdefgh"), observed)


def listening(data: MemoryData) -> tuple[ModelSource, Listener]:
    network = Listener()
    denoiser = NetworkDenoiser(network, VPCosine(), V())
    made = Model.of(denoiser, (2,), num_classes=8, conditions={"observation": (1,)})
    return ModelSource(made.manifest, lambda: made, DDIM(), torch.device("cpu"), data), network


def test_each_seed_is_sampled_with_the_conditions_and_the_class_of_one_random_row() -> None:
    source, network = listening(sorted_data())
    source.draw(2, range(64), None)
    # The first call only warms the network up.
    (classes, observed), second = network.heard[1:]
    assert torch.equal(classes, second[0])
    assert torch.equal(classes.float()[:, None], observed)
    assert set(classes.tolist()) == set(range(8))
    # A seed's row depends neither on its batch nor on the source, and repeats after all rows have been used.
    again, other = listening(sorted_data())
    again.draw(1, range(410, 420), None)
    assert torch.equal(other.heard[-1][0], classes[10:20])
    every, last = listening(sorted_data())
    every.draw(1, range(400), 400)
    assert last.heard[-1][0].bincount().tolist() == [50] * 8


def test_files_are_measured_in_a_random_order_that_is_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(400.0)[:, None]
    source = DataSource(MemoryData("sorted", rows))
    first = source.draw(None, range(64), None).x0
    # If there are 50 files of each class, the first seeds cover all classes.
    assert set((first // 50).flatten().tolist()) == set(range(8))
    again = DataSource(MemoryData("sorted", rows))
    assert torch.equal(again.draw(None, range(10, 20), None).x0, first[10:20])
    assert torch.equal(source.draw(None, range(400), None).x0.sort(dim=0).values, rows)
    before = Cell(source, None, range(64)).name
    monkeypatch.setattr(sources, "SAMPLES_FORMAT", sources.SAMPLES_FORMAT + 1)
    assert Cell(source, None, range(64)).name != before


def test_data_without_the_classes_of_its_conditions_is_refused() -> None:
    source, _ = listening(sorted_data(labelled=False))
    with pytest.raises(ValueError, match=r"conditioned on class_labels, which unlabelled lacks\. Use data with"):
        source.draw(1, range(4), None)


def test_another_choice_of_rows_redraws_only_where_conditions_come_from_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, conditional = cell().name, Cell(listening(sorted_data())[0], 2, range(4)).name
    monkeypatch.setattr(sources, "CONDITIONS_FORMAT", sources.CONDITIONS_FORMAT + 1)
    assert cell().name == plain
    assert Cell(listening(sorted_data())[0], 2, range(4)).name != conditional
    assert cell().source.content["conditions"] is None


def test_samples_of_another_device_are_drawn_again_only_where_that_matters(
    tmp_path: Path, drawn: Counter[int | None], reference: Reference
) -> None:
    Store(tmp_path).result(cell(), reference)
    file = tmp_path / "cells" / cell().name / "cell.json"
    held = json.loads(file.read_text())
    write_sealed(file, held | {"pace": ["NVIDIA H100", 1]})
    drawn.clear()
    Store(tmp_path).measure([cell()], [reference])
    assert not drawn
    assert Store(tmp_path).result(cell(), reference).pace == ("NVIDIA H100", 1)
    assert Store(tmp_path, own_device=True).result(cell(), reference).pace == tuple(held["pace"])
    assert drawn == {2: 16}
    assert json.loads(file.read_text())["pace"] == held["pace"]


def test_figures_of_a_cell_need_its_samples_no_longer(
    tmp_path: Path, drawn: Counter[int | None], reference: Reference
) -> None:
    store = Store(tmp_path)
    first = store.result(cell(), reference)
    store.drop_samples(cell())
    drawn.clear()
    assert Store(tmp_path).result(cell(), reference) == first
    assert not drawn
    Store(tmp_path).measure([cell()], [SameNoise(cell(steps=4), (2,))])
    assert drawn == {2: 16, 4: 16}
    # The redrawn samples are the same, so their figures remain valid.
    assert Store(tmp_path).kept(cell(), reference) is not None


def test_figures_are_those_of_the_samples_that_are_kept(tmp_path: Path, reference: Reference) -> None:
    store = Store(tmp_path)
    result = store.result(cell(), reference)
    kept = torch.from_numpy(np.load(tmp_path / "cells" / cell().name / "samples.npz")["arr_0"])
    assert torch.equal(store.samples(cell()), kept)
    torch.testing.assert_close(kept, model().sample(range(16), 2), rtol=1e-5, atol=1e-6)
    assert reference.figures(kept).values["frechet"] == result.frechet
    # If samples are lost, their figures are measured again.
    (file,) = tmp_path.glob("figures/*")
    write_sealed(file, json.loads(file.read_text()) | {"values": {"frechet": -1.0, "kid": 0.0}})
    shutil.rmtree(tmp_path / "cells")
    assert Store(tmp_path).result(cell(), reference) == result.model_copy(
        update={"seconds_per_1000": Store(tmp_path).result(cell(), reference).seconds_per_1000}
    )


def test_resampled_cells_replace_those_in_memory(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.fill([cell()])
    first = store.samples(cell()).clone()
    shutil.rmtree(tmp_path / "cells")
    again = cell()
    assert isinstance(again.source, ModelSource)
    # Like rounding on another machine, but larger.
    again.source._load = lambda: model(shift=0.5)
    store.fill([again])
    kept = torch.from_numpy(np.load(tmp_path / "cells" / again.name / "samples.npz")["arr_0"])
    assert again.name == cell().name
    assert not torch.equal(kept, first)
    assert torch.equal(store.samples(again), kept)


def test_a_broken_cell_is_reported_and_leaves_nothing(tmp_path: Path, reference: Reference) -> None:
    store, bad = Store(tmp_path), cell(shift=float("nan"))
    with pytest.raises(NonFinite, match="samples drawn in 2 steps are not finite"):
        store.result(bad, reference)
    store.measure([bad, cell()], [reference, SameNoise(bad, (2,))])
    assert store.kept(bad, reference) is None
    assert store.kept(cell(), SameNoise(bad, (2,))) is None
    assert store.kept(cell(), reference) is not None
    assert [folder.name for folder in tmp_path.glob("cells/*")] == [cell().name]
