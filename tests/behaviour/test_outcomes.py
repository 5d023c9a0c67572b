"""A model's role comes from its manifest, and a chain's start from its plan; all readers use both.

The stages have names that are meaningless or misleading, and objectives that no registry contains.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import (
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    linear_betas,
    processes,
    zero_terminal_betas,
)
from halfstep.core.prediction import FlowVelocity, Prediction, V
from halfstep.data import MemoryData
from halfstep.explore.explorer import Explorer
from halfstep.hub import export_onnx, export_pipeline
from halfstep.hub.onnx import UnrolledSampler
from halfstep.hub.schedulers import SOLVERS, multistep, write_schedule
from halfstep.measure.evaluate import Evaluation, Reference
from halfstep.measure.sources import ModelSource, sampler_of
from halfstep.measure.store import Cell, Store
from halfstep.models.folder import load, save_stage
from halfstep.models.model import Model
from halfstep.nets import MLP, Network, describe_network
from halfstep.recipes import UNetConfig, recipes
from halfstep.report.chain import stage_rows
from halfstep.report.gallery import Sizes, gallery
from halfstep.report.page import headline, page
from halfstep.report.quality import quality_groups
from halfstep.report.reading import read_run
from halfstep.report.summary import summarise
from halfstep.runs import Manifest, Metrics, Outcome, RunFolder, read_status
from halfstep.runs.schema import Result
from halfstep.runtime.files import sha256_of, write_sealed
from halfstep.samplers import DDIM, RK4, Ancestral, DPMSolverPP2M, Heun, LogSNR, Sampler, sample, samplers
from support_cli import Capture, refused
from support_pipelines import assert_same, noise, quietly, wake
from toys import points

START, MATCHED, OWN = "zeta", "00-between", "x-own-thing"
"""Sorted by name, the matched model comes first and looks like a teacher."""
TEACHER = Outcome(role="teacher")
STUDENT = Outcome(role="student", num_steps=4, sampler=samplers.describe(Heun()))


def made(
    outcome: Outcome, name: str = OWN, network: Network | None = None, seed: int = 0, **changes: Any
) -> tuple[NetworkDenoiser, Manifest]:
    """Return a network with random weights, and the manifest of a stage that an unknown objective produced."""
    torch.manual_seed(seed)
    network = network or MLP((2,), width=16, depth=1)
    facts: dict[str, Any] = {
        "stage": name, "objective": "anything", "parent": None, "outcome": outcome, "start_steps": 8, "num_updates": 10,
        "seconds": 5.0, "shape": (2,), "is_image": False, "clip": False, "network": describe_network(network),
        "process": processes.describe(VPCosine()), "prediction": {"type": "v"}, "files": {},
    }  # fmt: skip
    return NetworkDenoiser(network, VPCosine(), V()), Manifest(**facts | changes)


def figures(sampler: str, num_steps: int, num_evals: int, frechet: float) -> Result:
    return Result(
        sampler=sampler, num_steps=num_steps, num_evals=num_evals, frechet=frechet, kid=0.1, seconds_per_1000=num_evals
    )


def write_run(run: Path, stages: Mapping[str, Outcome], given: bool = False) -> Path:
    """Write a finished run of these stages in this order; the first takes 8 and 4 steps if it supports any number."""
    np.save(run.parent / "points.npy", points().numpy())
    recipe = recipes["arrays"]()
    recipe = recipe.model_copy(
        update={"data": recipe.data.model_copy(update={"source": str(run.parent / "points.npy")})}
    )
    rows = []
    for index, (name, outcome) in enumerate(stages.items()):
        folder = RunFolder(run).stage(name)
        parent = None if index == 0 else list(stages)[index - 1]
        save_stage(folder, *made(outcome, name, seed=index, parent=parent))
        own = [outcome.num_steps] if outcome.num_steps else [8, 4] if index == 0 else [8]
        sampler: Sampler = samplers.rebuild(outcome.sampler)
        results = [figures(outcome.sampler_name, n, sampler.num_evals(n), 1 + index + 1 / n) for n in own]
        if index:
            results = [result.model_copy(update={"teacher_rmse": 0.1}) for result in results]
        folder.samples.mkdir()
        for n in own:
            np.savez(folder.samples / f"steps-{n:04d}.npz", arr_0=load(folder.path).sample(range(16), n).numpy())
        files = {f"samples/{file.name}": sha256_of(file) for file in folder.samples.iterdir()}
        metrics = Metrics(stage=name, protocol={"features": "pixels"}, results=results, files=files)
        write_sealed(folder.metrics_path, metrics.model_dump())
        updates = 0 if given and index == 0 else 10
        rows.append({"stage": name, "role": outcome.role, "num_steps": outcome.num_steps, "num_updates": updates})
    held = {"recipe": recipe.model_dump(mode="json"), "plan": rows, "environment": {}}
    write_sealed(run / "recipe.json", held)
    return run


WITHOUT = {START: TEACHER, OWN: STUDENT}
WITH = {START: TEACHER, MATCHED: Outcome(role="matched"), OWN: STUDENT}
CONTINUED = {START: Outcome(role="student", num_steps=8, sampler=samplers.describe(RK4())), OWN: STUDENT}


@pytest.fixture(scope="module", params=["without", "with"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("outcomes") / "run", WITH if request.param == "with" else WITHOUT)


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run that continues from an 8-step student."""
    return write_run(tmp_path_factory.mktemp("continued") / "run", CONTINUED, given=True)


def names(run: Path) -> list[str]:
    return [stage.name for stage in RunFolder(run).stages()]


def test_stages_are_in_the_order_of_the_plan(run: Path, tmp_path: Path) -> None:
    assert names(run) == [row.name for row in RunFolder(run).plan]
    start = RunFolder(run).start
    assert start is not None
    assert (start.name, names(run)[-1]) == (START, OWN)
    # Without a plan, only names remain, and a start only if the first stage is a teacher.
    for outcome, found in ((TEACHER, "a"), (STUDENT, None)):
        bare = RunFolder(tmp_path / outcome.role)
        save_stage(bare.stage("a"), *made(outcome, "a"))
        save_stage(bare.stage("b"), *made(TEACHER, "b"))
        assert names(bare.path) == ["a", "b"]
        assert (bare.start.name if bare.start else None) == found


def test_the_report_puts_each_model_into_its_place(run: Path) -> None:
    facts = read_run(run)
    is_matched = MATCHED in names(run)
    assert [stage.name for stage in facts.students] == [OWN]
    assert facts.start is not None
    assert facts.start.name == START
    assert [(row.name, row.label) for row in stage_rows(facts)] == [
        (START, "teacher"),
        *([(MATCHED, "matched")] if is_matched else []),
        (OWN, "4"),
    ]
    (group,) = quality_groups(facts.stages, facts.start)
    # The student with Heun next to the teacher with its own DDIM, with the same number of steps.
    (student,) = [row for row in group.rows if row.steps == 4]
    assert student.teacher is not None
    assert student.student is not None
    assert (student.sampler, student.teacher.sampler) == ("Heun, teacher DDIM", "ddim")
    assert (student.measured.num_evals, student.student_stage) == (7, OWN)
    assert [(row.student_stage, row.is_matched) for row in group.rows if row.steps == 8] == [
        (MATCHED, True) if is_matched else (None, False)
    ]
    summary = summarise(facts, [group])
    assert summary.best is not None
    assert summary.best.steps == 4
    assert summary.lead.startswith("A student with 7 network calls instead of 8")
    assert headline(facts) == (OWN, 4)
    pictures = gallery(facts, summary, Sizes())
    assert pictures is not None
    shown = [picture.who if picture else None for picture in pictures.students]
    assert shown == ["matched" if is_matched else "teacher", "student"]
    html = page(facts)
    assert "Heun, teacher DDIM" in html
    assert html.index(f">{START}<") < html.index(f">{OWN}<")
    notes = [group.note_of(row) for row in group.rows if row.is_matched]
    assert bool(notes) == is_matched
    assert all("matched" in note and note in html for note in notes)


def test_a_chain_that_starts_from_a_student_is_compared_with_it(continued: Path) -> None:
    facts = read_run(continued)
    assert [stage.name for stage in facts.students] == [OWN]
    (group,) = quality_groups(facts.stages, facts.start)
    assert group.base is not None
    assert (group.base.num_steps, group.base.sampler) == (8, "rk4")
    rows = {row.name: row for row in stage_rows(facts)}
    assert (rows[START].label, rows[START].to_first, rows[START].num_compared) == ("8", None, 0)
    assert rows[OWN].to_first is not None
    assert rows[OWN].to_first > 0
    assert "given, not trained here" in page(facts)
    explorer = Explorer(continued)
    own, start = explorer.compare(OWN).shown
    assert (own.num_evals, start.stage, start.num_steps, start.num_evals) == (7, START, 8, RK4().num_evals(8))


def test_the_explorer_uses_each_models_own_sampler(run: Path) -> None:
    explorer = Explorer(run)
    assert [choice.name for choice in explorer.choices] == names(run)
    labels = [explorer.label(choice) for choice in explorer.choices]
    assert labels[:: len(names(run)) - 1] == ["Teacher", "4-step student"]
    own, start = explorer.compare(OWN, seed=3, num_samples=5).shown
    assert (own.num_steps, own.num_evals, own.sampler, own.is_start) == (4, 7, "heun", False)
    assert (start.stage, start.num_steps, start.num_evals, start.sampler, start.is_start) == (START, 8, 8, "ddim", True)
    stages = run / "stages"
    np.testing.assert_array_equal(own.samples, load(stages / OWN).sample(range(3, 8), sampler=Heun()).numpy())
    np.testing.assert_array_equal(start.samples, load(stages / START).sample(range(3, 8), 8, DDIM()).numpy())
    assert len(explorer.strip().shown) == len(names(run))
    # A single stage has no reference unless it is a teacher.
    assert Explorer(stages / OWN).start.missing is not None
    assert Explorer(stages / START).start.name == START


def test_the_explorer_draws_the_noise_of_a_stochastic_sampler_as_the_library_does(tmp_path: Path) -> None:
    outcome = Outcome(role="student", num_steps=4, sampler=samplers.describe(Ancestral(0.3)))
    run = write_run(tmp_path / "run", {START: TEACHER, OWN: outcome})
    own = Explorer(run).compare(OWN, num_samples=5).shown[0]
    np.testing.assert_array_equal(own.samples, load(run / "stages" / OWN).sample(range(5), 4, Ancestral(0.3)).numpy())
    frames = Explorer(run).walk(OWN, seed=2, other_seed=2, num_frames=2).shown[0].samples
    np.testing.assert_array_equal(frames[0], load(run / "stages" / OWN).sample([2]).numpy()[0])


def test_status_shows_the_roles(run: Path, capsys: Capture) -> None:
    main(["status", str(run), "--json"])
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(s["stage"], s["role"], s["num_steps"], s["state"]) for s in stages[:: len(stages) - 1]] == [
        (START, "teacher", None, "done"),
        (OWN, "student", 4, "done"),
    ]
    # The plan describes missing stages.
    assert read_status(run).stages[-1].role == "student"


def test_sample_takes_the_models_own_sampler(run: Path, tmp_path: Path, capsys: Capture) -> None:
    def drawn(*options: str) -> tuple[dict[str, Any], np.ndarray]:
        main(
            [
                "sample",
                str(run),
                "--num-samples",
                "6",
                "--json",
                "--overwrite",
                "--out",
                str(tmp_path / "s.npz"),
                *options,
            ]
        )
        held: dict[str, Any] = json.loads(capsys.readouterr().out)
        return held, np.load(tmp_path / "s.npz")["arr_0"]

    said, x0 = drawn()
    assert (said["model"], said["sampler"], said["num_steps"], said["num_evals"]) == (OWN, "heun", 4, 7)
    model = load(run)
    np.testing.assert_array_equal(x0, model.sample(range(6), 4, Heun()).numpy())
    said, by_ddim = drawn("--sampler", "ddim")
    assert (said["sampler"], said["num_evals"]) == ("ddim", 4)
    np.testing.assert_array_equal(by_ddim, model.sample(range(6), 4, DDIM()).numpy())
    assert np.abs(by_ddim - x0).max() > 1e-3
    error = refused(["sample", str(run), "--gamma", "0.5", "--out", str(tmp_path / "t.npz")], capsys)
    assert error.startswith("--gamma 0.5 has no effect on the sampler heun")


def evaluated(subject: Path, out: Path, capsys: Capture, *options: str) -> dict[str, Any]:
    capsys.readouterr()
    options = ("--num-samples", "16", "--extractors", "pixels", "--out", str(out), "--json", *options)
    main(["evaluate", str(subject), *options])
    held: dict[str, Any] = json.loads(capsys.readouterr().out)
    return held


def test_an_evaluation_uses_each_models_own_sampler(
    run: Path, continued: Path, tmp_path: Path, capsys: Capture
) -> None:
    held = evaluated(run, tmp_path / "whole", capsys)
    series = {one["name"]: (one["role"], one["sampler"]) for one in held["series"]}
    between = {"matched": ("other", "ddim")} if MATCHED in names(run) else {}
    teacher = {f"teacher-{sampler}": ("teacher", sampler) for sampler in ("ddim", "heun")}
    assert series == between | {"student": ("student", "heun"), **teacher}
    rows = {(row["series"], row["num_steps"]): (row["stage"], row["num_evals"]) for row in held["tables"][0]["rows"]}
    assert rows["student", 4] == (OWN, 7)
    assert rows["teacher-ddim", 8] == (START, 8)
    assert not between or rows["matched", 8] == (MATCHED, 8)
    assert "teacher-heun at 32 steps" in held["tables"][-1]["protocol"]["reference"], "the cell with most network calls"
    held = evaluated(continued, tmp_path / "continued", capsys)
    found = [(row["series"], row["stage"], row["num_steps"], row["num_evals"]) for row in held["tables"][0]["rows"]]
    assert found == [("student", OWN, 4, 7), ("teacher-rk4", START, 8, RK4().num_evals(8))]
    # For a single stage, its manifest decides, not its name.
    held = evaluated(run / "stages" / OWN, tmp_path / "one", capsys)
    assert [(row["series"], row["num_evals"]) for row in held["tables"][0]["rows"]] == [("student", 7)]


def test_a_model_is_measured_by_its_own_sampler(tmp_path: Path) -> None:
    evaluation = Evaluation(num_samples=8, num_reference=8, num_compared=4, features="pixels")
    reference = Reference(MemoryData("points", points()), evaluation)
    model = Model(*made(STUDENT))
    manifest = model.manifest
    source = ModelSource(manifest, lambda: model, sampler_of(manifest), torch.device("cpu"), reference.data)
    store, cell = Store(tmp_path), Cell(source, 4, range(8))
    result = store.result(cell, reference)
    assert (result.sampler, result.num_evals) == ("heun", 7)
    torch.testing.assert_close(store.samples(cell), model.sample(range(8), sampler=Heun()), rtol=0, atol=1e-6)


# --- Export ---


EXPORTED = [DDIM(), Heun(), RK4(), DPMSolverPP2M(), Heun(LogSNR())]


def assert_samples_by(sampler: Sampler, model: Model, x0: torch.Tensor) -> None:
    """Assert that x0 are the samples 0 to 6 with the model's own sampler, and not with DDIM."""
    torch.testing.assert_close(x0, model.sample(range(7)), rtol=0, atol=1e-5)
    if sampler != DDIM():
        assert float((x0 - model.sample(range(7), sampler=DDIM())).abs().max()) > 1e-3


def student_of(sampler: Sampler, num_steps: int) -> Model:
    """Return a student with random weights and its own sampler."""
    return Model(*made(Outcome(role="student", num_steps=num_steps, sampler=samplers.describe(sampler))))


@pytest.mark.parametrize("sampler", EXPORTED, ids=lambda s: type(s).__name__)
def test_the_unrolled_program_takes_the_steps_of_the_models_own_sampler(sampler: Sampler) -> None:
    model = student_of(sampler, 4)
    with torch.no_grad():
        assert_samples_by(sampler, model, UnrolledSampler(model, 4, ())(model.noise(range(7))))


# DPM-Solver++(2M) differs from DDIM only in the steps between its first and its last.
@pytest.mark.parametrize(
    ("sampler", "num_steps"),
    [
        (Heun(), 2),
        *(
            pytest.param(sampler, 3 if sampler == DPMSolverPP2M() else 2, marks=pytest.mark.slow)
            for sampler in EXPORTED
            if sampler != Heun()
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_a_graph_takes_the_steps_of_the_models_own_sampler(tmp_path: Path, sampler: Sampler, num_steps: int) -> None:
    import onnxruntime

    model = student_of(sampler, num_steps)
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path / "sampler.onnx")))
    x0 = session.run(["x0"], {"noise": model.noise(range(7)).numpy()})[0]
    assert_samples_by(sampler, model, torch.from_numpy(x0))


@pytest.mark.parametrize(("gamma", "num_steps"), [(0.0, 1), (0.5, 3), (0.0, 2)])
def test_a_graph_of_a_stochastic_sampler_takes_the_noise_of_its_steps(
    tmp_path: Path, gamma: float, num_steps: int
) -> None:
    """The graph takes the noise of all steps except the last, which draws none."""
    import onnxruntime

    sampler = {"type": "ancestral", "gamma": gamma}
    model = Model(*made(Outcome(role="student", num_steps=num_steps, sampler=sampler)))
    session = onnxruntime.InferenceSession(str(export_onnx(model, tmp_path / "sampler.onnx")))
    drawn = torch.randn(7, num_steps - 1, 2, generator=torch.Generator().manual_seed(3))
    x_1 = model.noise(range(7))
    inputs = {"noise": x_1} | ({"step_noise": drawn} if num_steps > 1 else {})
    assert [one.name for one in session.get_inputs()] == list(inputs)
    found = torch.from_numpy(session.run(["x0"], {name: value.numpy() for name, value in inputs.items()})[0])
    steps = [*drawn.unbind(1), torch.zeros(7, 2)]
    expected = sample(model, x_1, num_steps, Ancestral(gamma), noise=steps.__getitem__)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def images(sampler: Sampler, num_steps: int, num_classes: int, clip: bool = True) -> Model:
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(8, 16), layers_per_block=1, attention=(False, False), mid_attention=False, norm_num_groups=4
    )
    network = config.build((3, 8, 8), num_classes, 1)
    wake(network)
    outcome = Outcome(role="student", num_steps=num_steps, sampler=samplers.describe(sampler))
    facts: dict[str, Any] = {"shape": (3, 8, 8), "is_image": True, "num_classes": num_classes, "clip": clip}
    return Model(*made(outcome, network=network, **facts))


@pytest.mark.parametrize("num_steps", [1, 2, 4, 16])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("sampler", [DDIM(), DPMSolverPP2M()], ids=["ddim", "dpmpp_2m"])
def test_a_stock_scheduler_takes_the_steps_of_the_models_own_sampler(
    tmp_path: Path, sampler: Sampler, clip: bool, num_steps: int
) -> None:
    model = images(sampler, num_steps, 5, clip)
    pipe = quietly(diffusers.ConsistencyModelPipeline.from_pretrained(export_pipeline(model, tmp_path / "out")))
    x_1 = noise(3, 3, 8, 8)
    stock = pipe(3, class_labels=[0, 4, 2], num_inference_steps=num_steps, latents=x_1, output_type="np").images
    shown = {"class_labels": torch.tensor([0, 4, 2])}
    found = sample(model, x_1, num_steps, sampler, shown)
    assert_same(found.clamp(-1, 1), torch.as_tensor(stock).permute(0, 3, 1, 2) * 2 - 1)
    if sampler != DDIM() and num_steps > 2:
        assert float((found - sample(model, x_1, num_steps, DDIM(), shown)).abs().max()) > 1e-2


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_classes", "clip"), [(0, True), (0, False), (5, True), (5, False)])
def test_a_stock_pipeline_draws_the_steps_of_an_ancestral_student(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, num_classes: int, clip: bool, num_steps: int
) -> None:
    """With the same noise, its samples are ours."""
    from diffusers.pipelines.ddpm import pipeline_ddpm
    from diffusers.schedulers import scheduling_dpmsolver_multistep

    model = images(Ancestral(gamma=0.0), num_steps, num_classes, clip)
    folder = export_pipeline(model, tmp_path / "out")
    x_1, noises = (
        noise(3, 3, 8, 8),
        list(torch.randn(num_steps, 3, 3, 8, 8, generator=torch.Generator().manual_seed(1))),
    )
    drawn = iter(noises)
    monkeypatch.setattr(scheduling_dpmsolver_multistep, "randn_tensor", lambda *_, **__: next(drawn))
    monkeypatch.setattr(pipeline_ddpm, "randn_tensor", lambda *_, **__: x_1.clone())
    asked: dict[str, Any] = {"num_inference_steps": num_steps, "output_type": "np"}
    if num_classes:
        pipe = quietly(diffusers.ConsistencyModelPipeline.from_pretrained(folder))
        stock = pipe(3, class_labels=[0, 4, 2], latents=x_1, **asked).images
    else:
        stock = quietly(diffusers.DDPMPipeline.from_pretrained(folder))(3, **asked).images
    shown = {"class_labels": torch.tensor([0, 4, 2])} if num_classes else None
    found = sample(model, x_1, num_steps, Ancestral(gamma=0.0), shown, noise=noises.__getitem__)
    assert_same(found.clamp(-1, 1), torch.as_tensor(stock).permute(0, 3, 1, 2) * 2 - 1)
    assert not list(drawn)
    if num_steps > 1:
        assert float((found - sample(model, x_1, num_steps, DDIM(), shown)).abs().max()) > 1e-2


@pytest.mark.parametrize(("sampler", "num_classes"), [(Heun(), 5), (Ancestral(), 5), (DPMSolverPP2M(), 0)])
def test_a_sampler_without_a_stock_scheduler_is_refused(tmp_path: Path, sampler: Sampler, num_classes: int) -> None:
    with pytest.raises(ValueError, match=r"diffusers has no \w+ for this model's sampler .* Use --format onnx"):
        export_pipeline(images(sampler, 4, num_classes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("process", "prediction", "message"),
    [
        (FlowMatching(3.0), FlowVelocity(), r"for sde-dpmsolver\+\+ steps of order 1 .* flow-matching path\. Use"),
        (
            VPTable(zero_terminal_betas(linear_betas())),
            V(),
            "with zero terminal SNR. Use --format onnx",
        ),
    ],
    ids=["flow", "zero terminal"],
)
def test_processes_on_which_no_stock_scheduler_draws_an_ancestral_students_steps_are_refused(
    process: NoiseProcess, prediction: Prediction, message: str
) -> None:
    schedule = write_schedule(process, prediction, 1000, clip=False)
    with pytest.raises(ValueError, match=message):
        multistep(schedule, SOLVERS[Ancestral(gamma=0.0)], clip=False)
