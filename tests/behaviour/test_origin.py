"""A run only uses its own unchanged files: manifests, stages, checkpoints, figures and caches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import halfstep.metrics.reference as references
from halfstep.core.warnings import HalfstepWarning
from halfstep.measure.evaluate import Evaluation
from halfstep.metrics import Pixels
from halfstep.models.folder import load, save_stage
from halfstep.run.runner import run
from halfstep.runs import RunFolder, StageFolder, read_log
from halfstep.runtime.files import DamagedFile, read_sealed, sha256_of, write_sealed
from halfstep.runtime.tensors import read_cached, read_tensors, write_cached
from storm import cut, samples
from toys import finish, points, toy_plan, toy_spec, weights

EVALUATION = Evaluation(num_samples=16, num_compared=8, num_shown=4, batch_size=8, teacher_heun_steps=())
SPEC = toy_spec(plan=toy_plan(8, 6), evaluation=EVALUATION)
OTHER = toy_spec(plan=toy_plan(8, 6), evaluation=EVALUATION, seed=1, recipe={"name": "toy", "seed": 1})
FIRST, SECOND, THIRD = "00-denoise", "01-halve-0002", "02-halve-0001"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build `uncut`, the run `other` with another seed, and `cut`, interrupted in the second stage."""
    folder = tmp_path_factory.mktemp("made")
    finish(SPEC, folder / "uncut")
    finish(OTHER, folder / "other")
    cut(SPEC, folder / "cut", SECOND, 5)
    return folder


@pytest.fixture
def path(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made / "uncut", tmp_path / "run")


def stage(path: Path, name: str) -> StageFolder:
    return RunFolder(path).stage(name)


def refusals(path: Path) -> set[str]:
    """Return the messages of running and loading, both of which must fail."""
    said = set()
    for call in (lambda: finish(SPEC, path), lambda: load(path)):
        with pytest.raises(DamagedFile) as error:
            call()
        said.add(str(error.value))
    return said


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("process", {"type": "vp_cosine", "log_snr_min": -30.0}),
        ("prediction", {"type": "eps"}),
        ("outcome", {"role": "student", "num_steps": 7}),
        ("files", {}),
        ("sha256", None),
    ],
)
def test_a_field_of_a_manifest_that_was_edited_is_refused(path: Path, field: str, value: object) -> None:
    file = stage(path, THIRD).manifest_path
    held = json.loads(file.read_text())
    assert held[field] != value
    if value is None:
        del held[field]
    else:
        held[field] = value
    file.write_text(json.dumps(held))
    for said in refusals(path):
        assert said.startswith(f"{file} was altered: " if value is not None else f"{file} has no sha256 of its content")
        assert f"remove {file.parent} and the stages after it" in said


def test_stages_of_another_place_seed_or_plan_are_refused(path: Path, made: Path) -> None:
    for source, said in (
        (stage(path, SECOND).path, f"belongs to stage {SECOND}: it was moved or copied here"),
        (stage(made / "other", THIRD).path, "belongs to another run"),
    ):
        shutil.rmtree(stage(path, THIRD).path)
        shutil.copytree(source, stage(path, THIRD).path)
        assert all(f"{stage(path, THIRD).manifest_path} {said}" in text for text in refusals(path))
    # It belongs to the run's recipe, but differs from the plan.
    shutil.rmtree(stage(path, THIRD).path)
    shutil.copytree(stage(path, SECOND).path, stage(path, THIRD).path)
    file = stage(path, THIRD).manifest_path
    write_sealed(file, read_sealed(file) | {"stage": THIRD})
    assert all("does not match any stage in the plan" in text for text in refusals(path))


def test_a_folder_next_to_the_plans_stages_is_no_model_of_the_run(path: Path) -> None:
    shutil.copytree(stage(path, FIRST).path, stage(path, "99-copy").path)
    assert load(path).manifest.stage == THIRD
    with pytest.raises(DamagedFile, match=r"99-copy/manifest\.json belongs to stage 00-denoise"):
        load(stage(path, "99-copy").path)


def test_an_unfinished_run_reports_the_stage_that_it_loads(path: Path) -> None:
    stage(path, THIRD).manifest_path.unlink()
    with pytest.warns(
        HalfstepWarning, match=f"is incomplete, because stage {THIRD} has not.*Using its last complete stage, {SECOND}"
    ):
        assert load(path).manifest.stage == SECOND


def test_an_unfinished_run_without_a_recipe_reports_the_stage_that_was_begun(path: Path) -> None:
    RunFolder(path).recipe_path.unlink()
    (path / "stages" / "notes.txt").write_text("not a stage")
    assert load(path).manifest.stage == THIRD
    stage(path, THIRD).manifest_path.unlink()
    with pytest.warns(HalfstepWarning, match=f"stage {THIRD} has not.*Using its last complete stage, {SECOND}"):
        assert load(path).manifest.stage == SECOND


@pytest.mark.parametrize("of", ["other run", "other stage", "other update"])
def test_a_checkpoint_of_another_origin_is_set_aside(made: Path, tmp_path: Path, of: str) -> None:
    path = shutil.copytree(made / "cut", tmp_path / "run")
    folder = stage(path, SECOND)
    (latest,) = folder.checkpoints()
    if of == "other run":
        cut(OTHER, tmp_path / "other", SECOND, 5)
        shutil.rmtree(latest)
        shutil.copytree(stage(tmp_path / "other", SECOND).checkpoints()[0], latest)
    elif of == "other stage":
        cut(SPEC, tmp_path / "other", FIRST, 5)
        shutil.rmtree(latest)
        shutil.copytree(stage(tmp_path / "other", FIRST).checkpoints()[0], latest)
    else:
        latest.rename(latest.with_name("checkpoint-00000004"))
    notices = finish(SPEC, path)
    assert any("belongs to another run, stage or update" in notice for notice in notices)
    assert weights(path) == weights(made / "uncut")


def test_a_lost_recipe_is_written_again_and_a_foreign_one_refused(path: Path, made: Path) -> None:
    file = RunFolder(path).recipe_path
    before = read_sealed(file)
    file.unlink()
    finish(SPEC, path)
    after = read_sealed(file)
    assert {k: v for k, v in after.items() if k != "environment"} == {
        k: v for k, v in before.items() if k != "environment"
    }
    file.unlink()
    with pytest.raises(ValueError, match="is not empty, but it is not a run folder"):
        finish(OTHER, path)
    shutil.copy(RunFolder(made / "other").recipe_path, file)
    with pytest.raises(ValueError, match="different recipe"):
        finish(SPEC, path)
    with pytest.raises(DamagedFile, match="belongs to another run"):
        load(path)


def test_a_run_that_an_earlier_version_named_is_resumed(path: Path, made: Path) -> None:
    recipe = RunFolder(path).recipe_path
    for file in (recipe, *path.glob("stages/*/m*.json")):
        held = read_sealed(file)
        # Earlier versions did not record the digest of the recipe alone.
        write_sealed(file, held | {"run": held["run"].partition("-")[0]})
    for _ in range(2):
        shutil.rmtree(path / "stages" / THIRD)
        finish(SPEC, path)
        assert weights(path) == weights(made / "uncut")
        recipe.unlink()
    with pytest.raises(ValueError, match="is not empty, but it is not a run folder"):
        finish(OTHER, path)


@pytest.mark.parametrize("content", ['{"recipe": null}', '{"recipe": {"seed": 1}}', "[]", "{"])
def test_a_damaged_recipe_is_reported_with_a_remedy(path: Path, content: str) -> None:
    file = RunFolder(path).recipe_path
    file.write_text(content)
    for said in refusals(path):
        assert str(file) in said
        assert "restore it from a copy, or remove it and rerun the run's command" in said


@pytest.mark.parametrize("damage", ["cut", "altered", "other stage", "samples"])
def test_damaged_figures_and_samples_are_regenerated_with_a_notice(path: Path, made: Path, damage: str) -> None:
    file = stage(path, SECOND).metrics_path
    if damage == "cut":
        file.write_text(file.read_text()[:50])
    elif damage == "altered":
        file.write_text(file.read_text().replace('"frechet": ', '"frechet": 1'))
    elif damage == "other stage":
        shutil.copy(stage(path, THIRD).metrics_path, file)
    else:
        np.savez(file.parent / "samples" / "steps-0002.npz", arr_0=np.zeros((4, 2), np.float32))
    # The other notice reports figures from few samples.
    (notice,) = [said for said in finish(SPEC, path) if said.endswith("; the stage is measured again")]
    assert str(file.parent) in notice
    found, uncut = stage(path, SECOND).metrics(), stage(made / "uncut", SECOND).metrics()
    assert found is not None
    assert uncut is not None
    assert found.model_copy(update={"seconds": uncut.seconds}) == uncut
    assert all(np.array_equal(array, samples(path)[name]) for name, array in samples(made / "uncut").items())
    assert not any(said.endswith("again") for said in finish(SPEC, path))


@pytest.mark.parametrize("damage", ["empty", "zeros", "swapped", "figures", "facts"])
def test_a_damaged_cell_is_measured_again_with_a_line(path: Path, made: Path, damage: str) -> None:
    cells = sorted(path.glob("evaluation/cells/0[01]-*-0002-*"))
    samples_of_first = cells[0] / "samples.npz"
    if damage == "empty":
        samples_of_first.write_bytes(b"")
    elif damage == "zeros":
        np.savez(samples_of_first, arr_0=np.zeros((16, 2), np.float32))
    elif damage == "swapped":
        shutil.copy(cells[1] / "samples.npz", samples_of_first)
    elif damage == "figures":
        first, second = (next(path.glob(f"evaluation/figures/{cell.name}-*")) for cell in cells)
        shutil.copy(second, first)
    else:
        file = cells[0] / "cell.json"
        file.write_text(file.read_text().replace('"num_evals": ', '"num_evals": 9'))
    for name in (FIRST, SECOND):
        stage(path, name).metrics_path.unlink()
        for file in stage(path, name).samples.iterdir():
            file.unlink()
    with pytest.warns(HalfstepWarning, match="it will be recomputed"):
        finish(SPEC, path)
    for name in (FIRST, SECOND):
        mine, true = (stage(place, name).metrics().model_dump()["results"] for place in (path, made / "uncut"))  # type: ignore[union-attr]
        assert [row | {"seconds_per_1000": 0} for row in mine] == [row | {"seconds_per_1000": 0} for row in true]


def test_a_damaged_row_of_the_log_is_dropped(made: Path, tmp_path: Path) -> None:
    path = shutil.copytree(made / "cut", tmp_path / "run")
    log = RunFolder(path).log_path
    with open(log, "a", encoding="utf-8") as file:
        file.write(json.dumps({"stage": SECOND, "update": "7"}) + "\n" + json.dumps({"stage": SECOND}) + "\n")
    finish(SPEC, path)
    assert [row["update"] for row in read_log(log) if row["stage"] == SECOND] == [3, 5, 6]
    assert weights(path) == weights(made / "uncut")


@pytest.mark.parametrize(
    "name", ["log.jsonl", f"stages/{THIRD}/manifest.json", f"stages/{THIRD}/metrics.json", ".lock"]
)
def test_a_folder_instead_of_a_file_is_no_lost_disk(path: Path, name: str) -> None:
    (path / name).unlink()
    (path / name / "deeper").mkdir(parents=True)
    shutil.rmtree(stage(path, SECOND).path)
    with pytest.raises(DamagedFile) as error:
        list(run(SPEC, path))
    assert str(path / name) in str(error.value)


def test_weights_that_are_not_finite_are_refused_by_the_name_of_their_tensor(path: Path, tmp_path: Path) -> None:
    folder = stage(path, THIRD)
    model, tensors = load(folder.path), read_tensors(folder.model)
    name = sorted(tensors)[2]
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, folder.model)
    held = read_sealed(folder.manifest_path)
    write_sealed(folder.manifest_path, held | {"files": {folder.model.name: sha256_of(folder.model)}})
    with pytest.raises(
        DamagedFile, match=rf"model\.safetensors contains weights that are not finite \(tensor {name}\)"
    ):
        load(path)
    dict(model.denoiser.network.named_parameters())[name].data.view(-1)[0] = torch.inf
    with pytest.raises(DamagedFile, match=rf"not finite \(tensor {name}\)"):
        save_stage(StageFolder(tmp_path / "imported"), model.denoiser, model.manifest)
    assert not (tmp_path / "imported" / "manifest.json").exists()


def test_any_bit_of_a_cache_that_differs_makes_it_void(tmp_path: Path) -> None:
    file = tmp_path / "held.safetensors"
    held = {"x": torch.arange(3.0), "y": torch.tensor(2), "z": torch.zeros(0, dtype=torch.bfloat16)}
    write_cached(file, held)
    sound = file.read_bytes()
    assert {name: value.tolist() for name, value in read_cached(file).items()} == {
        name: value.tolist() for name, value in held.items()
    }
    other = file.with_name("other.safetensors")
    other.write_bytes(sound)
    assert read_cached(other) == {}
    for bit in range(0, 8 * len(sound), 3):
        content = bytearray(sound)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        assert read_cached(file) == {} or all(torch.equal(held[n], value) for n, value in read_cached(file).items())
    # Complete, but not written by this version: as an earlier halfstep left it.
    save_file(held, file)
    assert read_cached(file) == {}


def test_a_flipped_bit_in_the_reference_cache_changes_no_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = points()

    def described() -> references.RealFeatures:
        return references.real_features(Pixels(), lambda: real, "toy", tmp_path)

    first = described()
    (file,) = (tmp_path / "reference").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x20
    file.write_bytes(content)
    again = described()
    assert torch.equal(again.features, first.features)
    assert torch.equal(again.moments.covariance, first.moments.covariance)
    monkeypatch.setattr(references, "described", None)
    assert torch.equal(described().features, first.features), "what was measured again is not kept"
