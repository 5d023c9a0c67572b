"""The explorer's responses and errors, without its page."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from halfstep import load
from halfstep.core.draw import between, sample_noise
from halfstep.explore.explorer import Bounds, Explorer
from halfstep.measure.samples import samples_array
from halfstep.runtime.files import read_json, write_sealed
from report.asked_run import write_asked_run
from support import numbers


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_asked_run(tmp_path_factory.mktemp("asked") / "run")


@pytest.fixture(scope="module")
def explorer(run: Path) -> Explorer:
    return Explorer(run)


def drawn(run: Path, stage: str, seeds: list[int], steps: int, class_label: int | None = None) -> np.ndarray:
    """Return the same samples from a direct call of the library."""
    return samples_array(load(run / "stages" / stage).sample(seeds, steps, class_label=class_label), True)


def test_both_models_receive_the_same_noise_and_class(run: Path, explorer: Explorer) -> None:
    student, teacher = explorer.compare("02-halve-0002", 2, 8, 5, 3, 1).shown
    np.testing.assert_array_equal(student.samples, drawn(run, "02-halve-0002", [5, 6, 7], 2, 1))
    np.testing.assert_array_equal(teacher.samples, drawn(run, "00-denoise", [5, 6, 7], 8, 1))
    assert (student.num_evals, teacher.num_evals, teacher.is_start) == (2, 8, True)
    assert student.seconds > 0
    assert not np.array_equal(student.samples, explorer.compare("02-halve-0002", 2, 8, 5, 3, 2).shown[0].samples)


def test_each_models_own_steps_are_the_default(explorer: Explorer) -> None:
    assert [shown.num_steps for shown in explorer.compare("01-halve-0004").shown] == [4, 8]


def test_the_strip_is_one_noise_through_all_stages(run: Path, explorer: Explorer) -> None:
    answer = explorer.strip(9)
    assert [(shown.stage, shown.num_steps) for shown in answer.shown] == [
        ("00-denoise", 8),
        ("01-halve-0004", 4),
        ("02-halve-0002", 2),
    ]
    for shown in answer.shown:
        np.testing.assert_array_equal(shown.samples, drawn(run, shown.stage, [9], shown.num_steps))
    assert answer.notes == ["03-halve-0001 is missing: it has not been trained yet."]


def test_a_walk_ends_at_the_samples_of_its_two_seeds(run: Path, explorer: Explorer) -> None:
    for class_label in (0, 2):
        student, teacher = explorer.walk("02-halve-0002", 2, 3, 8, 5, class_label).shown
        for shown, steps in ((student, 2), (teacher, 8)):
            assert len(shown.samples) == 5
            np.testing.assert_array_equal(shown.samples[:1], drawn(run, shown.stage, [3], steps, class_label))
            np.testing.assert_array_equal(shown.samples[-1:], drawn(run, shown.stage, [8], steps, class_label))


def test_the_path_between_two_noises_is_an_arc_of_constant_speed() -> None:
    first, second = numbers(3, 4, seed=1), numbers(3, 4, seed=2)
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    way = between(first, second, shares)
    torch.testing.assert_close(way[0], first, rtol=0, atol=1e-15)
    torch.testing.assert_close(way[-1], second, rtol=0, atol=1e-15)
    # For unit vectors: all points are unit vectors in one plane, and the angle from the first grows evenly.
    a, b = first / first.norm(), second / second.norm()
    unit = between(a, b, shares).flatten(1)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-14)
    angles = torch.arccos((unit @ a.flatten()).clamp(-1, 1))
    whole = math.acos(float((a * b).sum()))
    torch.testing.assert_close(angles, whole * torch.tensor(shares, dtype=torch.float64), rtol=0, atol=1e-7)
    assert torch.linalg.matrix_rank(unit) == 2


class Elsewhere(Tensor):
    """A tensor on a device that can only copy to and from the CPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (Tensor.cpu, Tensor.to, Tensor.shape.__get__):  # type: ignore[attr-defined]
            raise RuntimeError(f"this device cannot compute {func}")
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
            return found.as_subclass(Tensor if func is Tensor.cpu else cls) if isinstance(found, Tensor) else found


def test_noise_on_a_device_is_interpolated_on_the_cpu_and_returned_there() -> None:
    ends = sample_noise([3, 8], (1, 4))
    found = between(*(end.as_subclass(Elsewhere) for end in ends), [0.25, 1.0])
    assert isinstance(found, Elsewhere)
    assert torch.equal(found.as_subclass(Tensor), between(*ends, [0.25, 1.0]))


def test_a_path_from_a_noise_to_itself_is_constant_and_to_its_opposite_is_rejected() -> None:
    noise = numbers(6)
    torch.testing.assert_close(between(noise, noise, [0.3]), noise[None], rtol=0, atol=1e-15)
    torch.testing.assert_close(between(noise, 3 * noise, [0.5]), 2 * noise[None], rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="opposite"):
        between(noise, -noise, [0.5])
    with pytest.raises(ValueError, match=r"\[6\] and \[5\]"):
        between(noise, noise[:5], [0.5])


WHOLE = "must be a whole number from"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stage": "../../../etc/passwd"}, "stage '../../../etc/passwd' does not exist. Choose one of 00-denoise,"),
        ({"stage": "stages/00-denoise"}, "stage 'stages/00-denoise' does not exist"),
        ({"stage": None}, "stage None does not exist"),
        ({"stage": ["00-denoise"]}, "stage ['00-denoise'] does not exist"),
        ({"stage": "03-halve-0001"}, "03-halve-0001 is missing: it has not been trained yet. Choose another stage"),
        ({"num_steps": 0}, f"steps {WHOLE} 1 to 1,024, got 0"),
        ({"num_steps": -4}, "got -4"),
        ({"num_steps": 1025}, "got 1025"),
        ({"num_steps": 10**400}, "steps must be"),
        ({"num_steps": 2.5}, "got 2.5"),
        ({"num_steps": math.nan}, "got nan"),
        ({"num_steps": math.inf}, "got inf"),
        ({"num_steps": True}, "got True"),
        ({"num_steps": "4"}, "got '4'"),
        ({"num_steps": {"a": [1]}}, "got {'a': [1]}"),
        ({"teacher_steps": -1}, "teacher's steps must be"),
        ({"seed": -1}, "seed must be"),
        ({"seed": 2**60}, "seed must be"),
        ({"seed": None}, "seed must be"),
        ({"num_samples": 0}, f"samples {WHOLE} 1 to 64, got 0"),
        ({"num_samples": 10**9}, "got 1000000000"),
        ({"class_label": 3}, f"class {WHOLE} 0 to 2, got 3"),
        ({"class_label": "x" * 1000}, "got 'xxx"),
        ({"guidance_scale": 2}, "has no guidance"),
        ({"guidance_scale": math.nan}, "guidance scale must be a number from 0 to 50, got nan"),
        ({"guidance_scale": -1}, "guidance scale must be"),
    ],
)
def test_hostile_values_are_refused_in_one_line(explorer: Explorer, values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        explorer.compare(**{"stage": "02-halve-0002", **values})
    text = str(refusal.value)
    assert said in text
    assert "\n" not in text
    assert len(text) < 250


def test_frames_are_bounded_and_whole_floats_are_numbers(explorer: Explorer) -> None:
    for frames in (1, 33):
        with pytest.raises(ValueError, match="frames must be a whole number from 2 to 32"):
            explorer.walk("02-halve-0002", num_frames=frames)
    assert explorer.compare("02-halve-0002", 2.0, 4.0, 0.0, 2.0).shown[0].num_steps == 2


def test_large_samples_are_requested_in_smaller_numbers() -> None:
    assert Bounds().samples((3, 512, 512)) == 5
    assert Bounds().samples((3, 4096, 4096)) == 1
    assert Bounds().frames((3, 4096, 4096)) == 2
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        Bounds(num_steps=0)


def test_sampling_is_stopped_when_its_time_is_up(run: Path) -> None:
    slow = Explorer(run, bounds=Bounds(seconds=1.0))
    # The time is checked after every step, so a jumping clock simulates a slow network.
    object.__setattr__(slow.bounds, "seconds", 0.0)
    with pytest.raises(ValueError, match="00-denoise was stopped at step 1 of 1000 because the request took 0 s"):
        slow.compare("00-denoise", 1000)
    assert len(Explorer(run).compare("00-denoise", 3).shown) == 2


def test_steps_other_than_a_students_own_get_a_notice(explorer: Explorer) -> None:
    (note,) = explorer.compare("02-halve-0002", 1).notes
    assert note == "The model was distilled for num_steps=2, not 1. Use a later stage of the chain."


def test_stages_without_weights_and_damaged_ones_are_reported_and_the_others_work(tmp_path: Path) -> None:
    run = write_asked_run(tmp_path / "run")
    weights = run / "stages/01-halve-0004/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    manifest = run / "stages/02-halve-0002/manifest.json"
    write_sealed(manifest, read_json(manifest) | {"weights_kept": False, "files": {}})
    explorer = Explorer(run)
    with pytest.raises(ValueError, match=r"01-halve-0004 cannot be sampled: stages/01-halve-0004/model"):
        explorer.compare("01-halve-0004")
    with pytest.raises(ValueError, match="02-halve-0002 is missing: its weights were not kept"):
        explorer.compare("02-halve-0002")
    assert len(explorer.compare("00-denoise", 2).shown[0].samples) == 16
    manifest.write_text("{", encoding="utf-8")
    assert "not readable JSON" in (Explorer(run).choices[2].missing or "")


def test_a_damaged_stage_does_not_affect_the_others(tmp_path: Path) -> None:
    run = write_asked_run(tmp_path / "run")
    for name in ("00-denoise", "01-halve-0004"):
        weights = run / "stages" / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-8])
    explorer = Explorer(run)
    for answer in (explorer.compare("02-halve-0002"), explorer.strip(0), explorer.walk("02-halve-0002")):
        assert [shown.stage for shown in answer.shown] == ["02-halve-0002"]
        assert any(note.startswith("00-denoise cannot be sampled: stages/00-denoise/model") for note in answer.notes)
    weights = run / "stages/02-halve-0002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be sampled"):
        Explorer(run).strip(0)


def test_time_is_up_for_a_request_not_for_each_of_its_models(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = Explorer(run, bounds=Bounds(seconds=5.0))
    ticks = iter(range(10**6))
    # Each reading of the clock is a second later. The strip's stages take 14 steps in total, each less than the limit.
    monkeypatch.setattr("halfstep.explore.explorer.time.perf_counter", lambda: float(next(ticks)))
    with pytest.raises(ValueError, match=r"because the request took 5 s"):
        explorer.strip(0)


def test_a_student_alone_is_not_called_the_teacher(run: Path) -> None:
    answer = Explorer(run / "stages" / "02-halve-0002").compare("02-halve-0002")
    assert [shown.is_start for shown in answer.shown] == [False]
    assert answer.notes == ["Samples are not compared with the teacher: it is not in this folder."]


def test_without_a_teacher_students_are_shown_alone(tmp_path: Path) -> None:
    run = write_asked_run(tmp_path / "run")
    (run / "stages/00-denoise/model.safetensors").unlink()
    answer = Explorer(run).compare("02-halve-0002")
    assert [shown.stage for shown in answer.shown] == ["02-halve-0002"]
    assert answer.notes == ["Samples are not compared with 00-denoise: its model.safetensors does not exist."]


def test_unsupported_models_are_reported_immediately(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        Explorer(tmp_path / "nothing")
    run = write_asked_run(tmp_path / "run", trained=1)
    manifest = run / "stages/00-denoise/manifest.json"
    held = read_json(manifest)
    write_sealed(manifest, held | {"is_image": False, "shape": [1, 160]})
    with pytest.raises(ValueError, match=r"samples of shape \[1, 160\] are not supported"):
        Explorer(run)
    for channels in (2, 4):
        write_sealed(manifest, held | {"shape": [channels, 8, 8]})
        with pytest.raises(ValueError, match=rf"samples of shape \[{channels}, 8, 8\] are not supported"):
            Explorer(run)
    write_sealed(manifest, held | {"conditions": {"prompt": [4, 8]}})
    with pytest.raises(ValueError, match="need prompt, for which the explorer has no field"):
        Explorer(run)
    write_sealed(manifest, held | {"weights_kept": False, "files": {}})
    with pytest.raises(ValueError, match="contains no model that can be sampled"):
        Explorer(run)


def test_models_beyond_the_memory_limit_are_freed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.explore.explorer.KEPT_BYTES", 1)
    explorer = Explorer(run)
    first = explorer.strip(1)
    again = explorer.strip(1)
    assert len(explorer._models) == 1
    for one, other in zip(first.shown, again.shown, strict=True):
        np.testing.assert_array_equal(one.samples, other.samples)


def test_points_are_explored_too(tmp_path: Path) -> None:
    explorer = Explorer(write_asked_run(tmp_path / "run", points=True))
    student, teacher = explorer.compare("02-halve-0002", num_samples=64).shown
    assert student.samples.shape == teacher.samples.shape == (64, 2)
    with pytest.raises(ValueError, match="these models are not class-conditional"):
        explorer.compare("02-halve-0002", class_label=0)
