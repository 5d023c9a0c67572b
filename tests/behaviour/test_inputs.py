"""Warnings about data and packages come before the first update, and a run accepts changed evaluation settings."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.cli import main
from halfstep.cli.dry_run import data_line
from halfstep.cli.training import _prepared
from halfstep.cli.usage import UsageError, in_own_words
from halfstep.core.warnings import HalfstepWarning
from halfstep.data import DataConfig, MemoryData, warn_of_scale
from halfstep.measure.evaluate import Evaluation, few_samples
from halfstep.recipes import ChainConfig, MLPConfig, Recipe, build, recipes
from halfstep.recipes.building import FREE_FIELDS, check_fit
from halfstep.run.folder import DifferentRecipe
from halfstep.runs import Manifest, RunFolder, RunStatus, StageStatus, best
from halfstep.runs.schema import Result
from toys import finish, points, toy_plan, toy_spec, weights

os.environ["HF_HUB_OFFLINE"] = "1"


def arrays(*shape: int) -> MemoryData:
    return MemoryData("mine.npy", torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def recipe(**evaluation: object) -> Recipe:
    settings = Evaluation(**evaluation)  # type: ignore[arg-type]
    return Recipe(name="r", network=MLPConfig(width=8, depth=1), evaluation=settings)


# Before training


@pytest.mark.parametrize(
    ("data", "features", "words"),
    [
        (arrays(20, 5000), "auto", "5000.*4096.*--evaluation.no-enabled"),
        (arrays(1, 2), "auto", "mine.npy contains only 1 sample.*--evaluation.no-enabled"),
        (arrays(30, 2), "classifier", "need labels.*--evaluation.features pixels"),
        (arrays(30, 2), "resnet20-cifar10=/no/such/file", "no such file"),
        (arrays(30, 2), "dinov2=/no/such/folder", "cannot load a DINOv2 model"),
    ],
)
def test_impossible_measurements_are_rejected_before_training(data, features, words):
    with pytest.raises(ValueError, match=words):
        build(recipe(features=features), data=data)
    build(recipe(features=features, enabled=False), data=data)


def test_few_labelled_samples_are_measured_in_pixels():
    labels = torch.arange(12) % 2
    data = replace(arrays(12, 2), labels=labels, class_names=("a", "b"))
    build(recipe(), data=data)
    with pytest.raises(ValueError, match="20 samples and 2 classes, but the data has 12 and 2"):
        build(recipe(features="classifier"), data=data)


def test_lora_weights_that_fit_no_network_are_rejected_before_training():
    with pytest.raises(ValueError, match=r"networks of diffusers|low-rank|lora"):
        build(recipe().model_copy(update={"chain": ChainConfig(start_steps=4, lora_rank=2)}), data=arrays(30, 2))


@pytest.mark.parametrize(("scale", "is_odd"), [(1.0, False), (0.3, False), (4.0, False), (100.0, True), (0.01, True)])
def test_arrays_far_from_the_noise_give_a_warning(scale, is_odd):
    data = replace(arrays(300, 3), x=scale * arrays(300, 3).x)
    if not is_odd:
        warn_of_scale(data)
        return
    with pytest.warns(HalfstepWarning, match=r"mine\.npy has values .* \(x - mean\) / std"):
        warn_of_scale(data)


def test_images_and_zeros_have_no_scale_to_warn_of():
    warn_of_scale(MemoryData("white", torch.full((4, 1, 2, 2), 255, dtype=torch.uint8)))
    warn_of_scale(MemoryData("zeros", torch.zeros(4, 2)))


def test_a_run_prints_its_data():
    labels = torch.arange(30) % 2
    data = replace(arrays(30, 2), labels=labels, class_names=("cat", "dog"))
    line = data_line(build(recipe(), data=data).data)
    assert line == "data: mine.npy, 30 samples of shape [2], 2 classes (cat, dog)"
    assert data_line(build(recipe(), data=arrays(30, 2)).data).endswith("no classes")


# Resuming


def measured(**settings: object) -> Evaluation:
    return Evaluation(**{"num_samples": 20, "num_compared": 4, "num_shown": 2, "teacher_heun_steps": (), **settings})  # type: ignore[arg-type]


def test_measuring_may_change_on_a_finished_run_and_models_are_measured_again(tmp_path):
    free = {"free": FREE_FIELDS, "evaluation": measured()}
    spec = toy_spec(recipe={"name": "toy", "evaluation": {"num_samples": 20}}, **free)
    notes = finish(spec, tmp_path / "run")
    assert [note for note in notes if "20 samples to 200 real samples" in note]
    folder = RunFolder(tmp_path / "run")
    before = [stage.manifest().files for stage in folder.stages()]
    again = replace(
        spec, recipe={"name": "toy", "evaluation": {"num_samples": 30}}, evaluation=measured(num_samples=30)
    )
    finish(again, tmp_path / "run")
    assert [stage.manifest().files for stage in folder.stages()] == before
    for stage in folder.stages():
        metrics = stage.metrics()
        assert metrics is not None
        assert metrics.protocol["num_samples"] == 30
        assert metrics.note is not None
    assert folder.recipe()["recipe"]["evaluation"] == {"num_samples": 30}
    assert folder.recipe()["environment"]


def test_changed_data_are_listed_and_can_be_accepted(tmp_path):
    source = tmp_path / "x.npy"
    np.save(source, points().numpy())

    def spec(x: torch.Tensor, accept: bool = False, where: Path = source):
        settings = {"source": str(where), "accept_changed": accept}
        return toy_spec(data=MemoryData(str(where), x), recipe={"name": "toy", "data": settings}, free=FREE_FIELDS)

    finish(spec(points()), tmp_path / "run")
    # The same data in another place are the same run.
    finish(spec(points(), where=tmp_path / "y.npy"), tmp_path / "run")
    time.sleep(0.02)
    np.save(source, points(199).numpy())
    with pytest.raises(DifferentRecipe, match=r"x\.npy.*num samples changed from 200 to 199.*--data\.accept-changed"):
        finish(spec(points(199)), tmp_path / "run")
    with pytest.raises(DifferentRecipe, match=r"1 changed file: .*x\.npy"):
        finish(spec(points(199)), tmp_path / "run")
    with pytest.warns(HalfstepWarning, match="resumes with changed data"):
        finish(spec(points(199), accept=True), tmp_path / "run")
    finish(spec(points(199)), tmp_path / "run")
    with pytest.raises(DifferentRecipe, match="shape") as refused:
        finish(spec(torch.zeros(20, 3), accept=True), tmp_path / "run")
    assert "accept" not in str(refused.value)


def test_a_lost_recipe_of_a_run_with_changed_data_is_written_again(tmp_path):
    path = tmp_path / "run"

    def spec(x: torch.Tensor, accept: bool = False, seed: int = 0):
        recipe = {"name": "toy", "seed": seed, "data": {"source": "x.npy", "accept_changed": accept}}
        return toy_spec(plan=toy_plan(8, 6), data=MemoryData("x.npy", x), recipe=recipe, free=FREE_FIELDS)

    finish(spec(points()), path)
    shutil.rmtree(path / "stages" / "02-halve-0001")
    with pytest.warns(HalfstepWarning, match="resumes with changed data"):
        finish(spec(points(199), accept=True), path)
    before, held = weights(path), RunFolder(path).recipe()
    RunFolder(path).recipe_path.unlink()
    with pytest.raises(DifferentRecipe, match=r"trained on other data than x\.npy.*--data\.accept-changed"):
        finish(spec(points(199)), path)
    with pytest.raises(ValueError, match="not a run folder"):
        finish(spec(points(199), accept=True, seed=1), path)
    assert not RunFolder(path).recipe_path.exists()
    shutil.rmtree(path / "stages" / "02-halve-0001")
    with pytest.warns(HalfstepWarning, match="resumes with changed data"):
        finish(spec(points(199), accept=True), path)
    assert weights(path) == before
    now = RunFolder(path).recipe()
    assert (now["run"], now["data_fingerprint"]) == (held["run"], held["data_fingerprint"])


# Words


def test_an_error_names_only_options_of_its_verb():
    def said(message: str, *options: str) -> str:
        with pytest.raises(ValueError, match=r".") as caught, in_own_words(*options):
            raise ValueError(message)
        return str(caught.value)

    assert said("sizes differ; resize with --data.image-size 32", "image-size") == (
        "sizes differ; resize with --image-size 32"
    )
    assert said("sizes differ; resize with --data.image-size 32") == (
        "sizes differ; resize, convert or remove the files themselves"
    )
    assert said("a is broken: repair or remove it; or use --data.skip-broken") == "a is broken: repair or remove it"
    assert said("a thing: choose --data.split") == "a thing; resize, convert or remove the files themselves"
    assert said("nothing of it") == "nothing of it"


@pytest.mark.parametrize(
    ("num_samples", "size", "words"), [(60, 64, "is unreliable"), (100, 64, "biased"), (60_000, 64, None)]
)
def test_messages_about_few_samples(num_samples, size, words):
    note = few_samples("pixels", num_samples, 70_000, size)
    assert note is None if words is None else words in str(note)


def model_of(shape: tuple[int, ...], is_image: bool = True, pipeline: dict[str, str] | None = None) -> Manifest:
    fields = {"objective": "denoising", "parent": None, "outcome": {"role": "teacher"}, "num_updates": 0, "seconds": 0}
    rest = {"clip": False, "network": {}, "process": {}, "prediction": {}, "files": {}}
    return Manifest.model_validate(
        {"stage": "t", "shape": shape, "is_image": is_image, "pipeline": pipeline, **fields, **rest}
    )


class Named:
    """The parts of a model that the caller reads."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.shape = manifest, manifest.shape


def test_photos_are_resized_to_the_teachers_samples(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    before = Recipe(name="r")
    other = before.model_copy(update={"data": DataConfig(source=str(tmp_path))})
    made = _prepared(other, before, Named(model_of((1, 8, 8))), "teacher").data  # type: ignore[arg-type]
    assert (made.image_size, made.channels) == (8, 1)
    asked = other.model_copy(update={"data": DataConfig(source=str(tmp_path), image_size=16, channels=3)})
    made = _prepared(asked, before, Named(model_of((1, 8, 8))), "teacher").data  # type: ignore[arg-type]
    assert (made.image_size, made.channels) == (16, 3)
    assert _prepared(before, before, Named(model_of((3, 9, 9))), "teacher") == before  # type: ignore[arg-type]
    pipeline = {"kind": "StableDiffusionPipeline", "folder": "sd", "component": "unet"}
    latent = model_of((4, 4, 4), False, pipeline)
    with pytest.raises(UsageError, match=f"halfstep encode sd --data {tmp_path}"):
        _prepared(other, before, Named(latent), "sd")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="halfstep encode sd --data white"):
        check_fit(latent, MemoryData("white", torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)))


@pytest.mark.parametrize(
    ("known", "names", "fits"),
    [
        (("cat", "dog", "eel"), ("cat", "dog"), True),
        (("cat", "dog", "eel"), ("dog", "eel"), False),
        ((), ("dog", "eel"), True),
        ((), ("0", "1"), True),
        ((), ("3", "5"), False),
    ],
)
def test_classes_keep_the_numbers_that_the_model_knows(known, names, fits):
    model = model_of((2,), False).model_copy(update={"num_classes": 3, "class_names": known})
    data = replace(arrays(30, 2), labels=torch.arange(30) % 2, class_names=names)
    if fits:
        check_fit(model, data)
        return
    with pytest.raises(ValueError, match=f"first classes are .*but those of mine.npy are {names[0]}, {names[1]}"):
        check_fit(model, data)


def test_the_recipe_for_few_images_fits_a_small_machine():
    small, large = recipes["images_small"](), recipes["images"]()
    assert small.data.flip
    data = MemoryData("photos", torch.zeros(301, 3, 32, 32, dtype=torch.uint8))
    spec = build(small.model_copy(update={"evaluation": replace(small.evaluation, enabled=False)}), data=data)
    seen = [stage.training.num_updates * stage.training.batch_size / len(data) for stage in spec.plan.stages]
    # The teacher sees no sample more often than a few hundred times.
    assert max(seen) < 300
    assert sum(stage.training.num_updates for stage in spec.plan.stages) < large.teacher.num_updates / 10


def test_the_tutorials_recipe_ends_at_four_steps_and_uses_kid():
    """Its images are small, but they still have more dimensions than samples."""
    recipe = recipes["images_tiny"]()
    data = MemoryData("photos", torch.zeros(301, 3, 16, 16, dtype=torch.uint8))
    spec = build(recipe, data=data)
    assert [stage.num_steps for stage in spec.plan.stages] == [None, 8, 4]
    assert best.too_few(recipe.evaluation.num_samples, len(data), 3 * 16 * 16)


# Time left


def test_measuring_counts_in_the_time_left():
    result = Result(sampler="ddim", num_steps=1, num_evals=1, frechet=1.0, kid=0.0, seconds_per_1000=1.0)
    teacher = StageStatus("t", None, 10, state="done", update=10, seconds=20.0, results=[result] * 4)
    students = [StageStatus(f"s{k}", k, 10) for k in (2, 1)]
    status = RunStatus(Path(), "r", [teacher, *students])
    assert status.seconds_left == status.training_seconds_left == 40.0
    teacher.measuring_seconds = 12.0
    assert status.measuring_seconds_left == 2 * 3.0
    assert status.seconds_left == 46.0
    students[0].state, students[0].update, students[0].num_unmeasured = "measuring", 10, 5
    assert status.seconds_left == 20.0 + 6 * 3.0
    students[0].results, students[0].measuring_seconds, students[0].num_unmeasured = [result], 1.0, 0
    assert status.measuring_seconds_left == 1.0


def test_a_dry_run_warns_of_memorising_a_handful_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Use 60 photos with the preset for few images, which is sized for several hundred."""
    for number in (60, 300):
        np.savez(tmp_path / "photos.npz", arr_0=np.random.default_rng(0).integers(0, 256, (number, 8, 8, 3), np.uint8))
        words = ["--data.image-size", "None", "--network.block-out-channels", "8", "8", "8", "--engine.threads", "1"]
        words += ["--network.attention-head-dim", "8"]
        main(["run", "images_small", "--data", str(tmp_path / "photos.npz"), "--dry-run", *words])
        said = "sees each of the 60 samples 800 times, so models may memorise them" in capsys.readouterr().out
        assert said == (number == 60)
