"""Distillation without data trains on the teacher's samples, whose seeds no evaluation uses."""

import math
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import halfstep
from halfstep import GaussianDenoiser, Model, NetworkDenoiser, Training, V, VPCosine, distill, sample, samples_of
from halfstep.core.noise import VE, NoiseProcess
from halfstep.data import MemoryData
from halfstep.models.folder import load
from halfstep.nets import MLP, describe_network
from halfstep.objectives import Finishing, Plan
from halfstep.run.distill import Call
from halfstep.run.folder import DifferentRecipe
from halfstep.run.own_samples import NUM_SAMPLES, expected_from, read_samples, write_samples
from halfstep.runs import Manifest, Outcome, RunFolder
from halfstep.samplers import DDIM, Ancestral
from toys import finish, toy_spec


@pytest.mark.parametrize("process", [VPCosine(), VE(0.01, 20.0)])
def test_they_have_the_teachers_distribution(process: NoiseProcess) -> None:
    drawn = samples_of(GaussianDenoiser(process, mean=0.3, std=0.5), 20_000, (1,))
    assert len(drawn) == 20_000
    # Five standard errors of each.
    assert float(drawn.x.mean()) == pytest.approx(0.3, abs=5 * 0.5 / math.sqrt(20_000))
    assert float(drawn.x.std()) == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(2 * 20_000))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "run"
    finish(toy_spec(), path)
    return path


def test_none_of_them_is_a_sample_of_an_evaluation(run: Path) -> None:
    teacher = load(run / "stages" / "00-denoise")
    evaluated = teacher.sample(range(300), 16, DDIM())
    own = samples_of(teacher, 300, num_steps=16, sampler=DDIM()).x
    assert float(torch.cdist(evaluated, evaluated).topk(2, largest=False).values[:, 1].min()) > 1e-6
    assert float(torch.cdist(own, evaluated).min()) > 1e-6
    assert float(torch.cdist(own, samples_of(teacher, 300, num_steps=16, sampler=DDIM(), seed=1).x).min()) > 1e-6
    assert torch.equal(own, samples_of(teacher, 300, num_steps=16, sampler=DDIM()).x)


def test_a_student_draws_with_its_own_steps_and_a_mode_is_restored(run: Path) -> None:
    student = load(run)
    student.train()
    assert student.num_steps == 1
    drawn = samples_of(student, 5).x
    assert student.training
    torch.testing.assert_close(drawn, samples_of(student, 5, num_steps=1, sampler=DDIM()).x, rtol=0, atol=0)
    assert float((drawn - samples_of(student, 5, num_steps=4).x).abs().max()) > 1e-4


def of_classes(null: bool) -> Model:
    """Return a model with 3 classes, of which the data contained 2."""
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=1, num_classes=4 if null else 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    manifest = Manifest(
        stage="t", objective="denoise", parent=None, outcome=Outcome(role="teacher"), num_updates=1, seconds=1.0,
        shape=(2,), num_classes=3, classes_shown=2, guidance_scale=3.0 if null else None, is_image=False, clip=False,
        network=describe_network(network), process={"type": "vp_cosine"}, prediction={"type": "v"}, files={},
    )  # fmt: skip
    denoiser = NetworkDenoiser(network, VPCosine(), V())
    return Model(denoiser, manifest, {"class_labels": torch.tensor(3)} if null else None)


@pytest.mark.parametrize("null", [False, True])
def test_a_model_of_classes_draws_them_in_turn_without_guidance(null: bool) -> None:
    model = of_classes(null)
    drawn = samples_of(model, 6, num_steps=4)
    batch = drawn.fetch(torch.arange(6))
    assert batch.cond["class_labels"].tolist() == [0, 1, 0, 1, 0, 1]
    noise = halfstep.Draw(0, "samples of the teacher", 0, 6, range(6)).normal("noise", (2,))
    plain = sample(model.denoiser, noise, 4, halfstep.Heun(), cond=batch.cond)
    torch.testing.assert_close(batch.x0, plain, rtol=0, atol=1e-6)


def test_distill_without_data_is_distill_with_these_samples() -> None:
    model = of_classes(False)
    training = Training(3, 1e-3, batch_size=16)
    after = Plan.finishes([2], training, lambda steps: Finishing(steps, lead_updates=1))
    settings = {"start": 4, "to": 2, "training": training, "finish": after}
    without = distill(model, **settings)  # type: ignore[arg-type]
    given = distill(model, samples_of(model), **settings)  # type: ignore[arg-type]
    for one, other in zip(without.parameters(), given.parameters(), strict=True):
        assert torch.equal(one, other)


def test_impossible_samples_are_rejected_in_one_line() -> None:
    bare = GaussianDenoiser(VPCosine(), 0.0, 1.0)
    with pytest.raises(ValueError, match=r"the sample shape is unknown\. Pass data=samples_of"):
        distill(bare)
    with pytest.raises(ValueError, match=r"Ancestral draws noise at each step\. Choose a deterministic sampler"):
        samples_of(bare, 2, (1,), sampler=Ancestral())
    with pytest.raises(ValueError, match="number of samples must be a whole number of at least 1"):
        samples_of(bare, 0, (1,))
    model = of_classes(False)
    with pytest.raises(ValueError, match=r"samples have the shape \[2\], got \[3\]"):
        samples_of(model, 2, (3,))
    told = Model(model.denoiser, model.manifest.model_copy(update={"conditions": {"text": (3,)}}))
    with pytest.raises(ValueError, match="the teacher cannot be sampled without text"):
        samples_of(told)


def test_a_teacher_takes_32_heun_steps(run: Path) -> None:
    teacher = load(run / "stages" / "00-denoise")
    torch.testing.assert_close(
        samples_of(teacher, 4).x, samples_of(teacher, 4, num_steps=32, sampler=halfstep.Heun()).x
    )


# With `out`, the samples are drawn only once.


class Killed(BaseException):
    """An exception that ends a call like a signal."""


class Drawing:
    """A `samples_of` that counts its calls and whose samples differ in the last bit from those of other hardware."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.is_other_hardware = False
        patched.setattr("halfstep.run.distill.samples_of", self)

    def __call__(self, *args: Any, **kwargs: Any) -> MemoryData:
        self.count += 1
        drawn = samples_of(*args, **kwargs)
        if self.is_other_hardware:
            drawn.x[7] = drawn.x[7].nextafter(torch.tensor(10.0))
        return drawn


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Drawing:
    return Drawing(monkeypatch)


def into(out: Path | None, model: Model, seed: int = 0, **more: Any) -> Any:
    training = Training(3, 1e-3, batch_size=16)
    engine = halfstep.Engine(cpu=True)
    return distill(model, start=4, to=1, training=training, seed=seed, engine=engine, out=out, progress=False, **more)


def brief(classes: bool = True) -> Model:
    """Return a teacher that draws its samples with one network call for each batch."""
    model = of_classes(False)
    changes: dict[str, Any] = {"outcome": Outcome(role="student", num_steps=4)}
    if not classes:
        network = MLP((2,), width=16, depth=1)
        changes |= {"network": describe_network(network), "num_classes": 0, "classes_shown": None}
        return Model(NetworkDenoiser(network, VPCosine(), V()), model.manifest.model_copy(update=changes))
    return Model(model.denoiser, model.manifest.model_copy(update=changes))


def killed(*_: Any) -> NoReturn:
    raise Killed


@pytest.mark.parametrize("after", ["drawing", "a stage"])
def test_a_killed_call_resumes_on_other_hardware_from_the_stored_samples(
    after: str, drawing: Drawing, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = brief(), tmp_path / "run"
    with monkeypatch.context() as patched:
        if after == "drawing":
            patched.setattr(Call, "into_folder", killed)
        with pytest.raises(Killed):
            into(out, model, on_stage=killed)
    assert RunFolder(out).recipe_path.exists() == (after == "a stage")
    # A call can also be killed while it writes the samples.
    (out / f".{RunFolder(out).own_samples_path.name}.0123456789ab.tmp").write_bytes(b"half")
    drawing.is_other_hardware = True
    again = into(out, model)
    assert drawing.count == 1
    for one, other in zip(again.parameters(), into(None, model, data=samples_of(model)).parameters(), strict=True):
        assert torch.equal(one, other)

    calls: list[int] = []
    model.network.register_forward_hook(lambda _, args, __: calls.append(len(args[0])))
    into(out, model)
    assert drawing.count == 1
    assert sum(calls) < NUM_SAMPLES / 10


def test_samples_that_the_run_was_not_trained_on_are_refused_and_not_stored(drawing: Drawing, tmp_path: Path) -> None:
    model, out = brief(), tmp_path / "run"
    file = RunFolder(out).own_samples_path
    into(out, model)
    held = file.read_bytes()
    file.write_bytes(held[:-1])  # damaged samples are drawn again
    into(out, model)
    assert file.read_bytes() == held
    file.unlink()
    drawing.is_other_hardware = True
    with pytest.raises(DifferentRecipe, match="samples of the teacher has changed since"):
        into(out, model)
    assert not file.exists()


def test_other_samples_are_neither_read_nor_drawn_for_another_run(drawing: Drawing, tmp_path: Path) -> None:
    model, other, out = brief(), brief(), tmp_path / "run"
    with torch.no_grad():
        next(other.parameters()).mul_(1.001)
    into(out, model)
    held = RunFolder(out).own_samples_path.read_bytes()
    for changed, seed, what in ((other, 0, "teacher"), (model, 1, "seed")):
        with pytest.raises(DifferentRecipe, match=f"Differences: {what}"):
            into(out, changed, seed)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="is not empty, but it is not a run folder"):
        into(tmp_path / "letters", model)
    assert drawing.count == 1
    assert RunFolder(out).own_samples_path.read_bytes() == held
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["letter.txt"]
    # Without a run, the samples of another teacher are replaced.
    RunFolder(tmp_path / "new").own_samples_path.parent.mkdir()
    RunFolder(tmp_path / "new").own_samples_path.write_bytes(held)
    made = into(tmp_path / "new", other)
    assert drawing.count == 2
    for one, two in zip(made.parameters(), into(None, other, data=samples_of(other)).parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("classes", [True, False])
def test_stored_samples_are_the_same_data(classes: bool, tmp_path: Path) -> None:
    model = brief(classes)
    drawn = samples_of(model)
    write_samples(tmp_path / "x", "ab" * 32, drawn)
    again = read_samples(tmp_path / "x", "ab" * 32)
    assert again is not None
    assert again.fingerprint == drawn.fingerprint
    assert read_samples(tmp_path / "x", "ba" * 32) is None
    for known in (again, expected_from(model)):
        assert (known.source, len(known), known.shape, known.is_image) == (drawn.source, NUM_SAMPLES, (2,), False)
