"""Sampling finds the batch size that fits into memory, and half precision stays close."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from halfstep.cli.sampling import check_writable
from halfstep.core.denoiser import GUIDANCE
from halfstep.core.noise import VE
from halfstep.core.prediction import EDM
from halfstep.measure.samples import grid_image, keep_samples
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.objectives import Plan
from halfstep.runtime.files import read_arrays
from toys import finish, toy_plan, toy_spec


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("sampling") / "run"
    finish(toy_spec(), path)
    return load(path)


def _too_small(model: Model, monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """Make the network run out of memory above `room` samples, and return the sizes of its calls."""
    sizes: list[int] = []
    network = model.denoiser.network
    forward = network.forward

    def limited(x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x_t))
        if len(x_t) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(x_t, time)

    monkeypatch.setattr(network, "forward", limited)
    monkeypatch.setattr(model, "_fitting", None)
    return sizes


@pytest.mark.parametrize(("room", "asked"), [(400, 300), (20, 300), (1, 5)])
def test_a_batch_that_does_not_fit_is_halved_until_it_does(
    model: Model, monkeypatch: pytest.MonkeyPatch, room: int, asked: int
) -> None:
    expected = model.sample(range(asked), batch_size=max(1, min(room, 10)))
    sizes = _too_small(model, monkeypatch, room)
    found = model.sample(range(asked))
    assert torch.allclose(found, expected, atol=1e-5)
    fitting = [size for size in sizes if size <= room]
    assert sum(fitting) == asked
    # Sizes that did not fit are not tried again, and the chosen size is more than half of the largest that fits.
    assert len({size for size in sizes if size > room}) == sum(size > room for size in sizes)
    assert max(fitting) > min(room, asked) / 2
    # Later calls start with that size.
    sizes.clear()
    assert torch.equal(model.sample(range(asked)), found)
    assert max(sizes) <= room


def test_a_batch_that_was_asked_for_is_not_changed(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _too_small(model, monkeypatch, 20)
    with pytest.raises(torch.OutOfMemoryError):
        model.sample(range(64), batch_size=32)


def test_not_even_one_sample_fits(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    _too_small(model, monkeypatch, 0)
    with pytest.raises(torch.OutOfMemoryError):
        model.sample(range(64))


def test_half_precision_is_near_and_unknown_precisions_are_refused(model: Model) -> None:
    whole, half = model.sample(range(64)), model.sample(range(64), precision="bf16")
    assert half.dtype == torch.float32
    assert 0 < float((whole - half).square().mean().sqrt()) < 0.01
    with pytest.raises(ValueError, match="precision must be float32 or bf16, got 'fp8'"):
        model.sample(range(2), precision="fp8")


def test_the_noise_of_a_sample_has_the_size_that_the_process_has_at_its_start(tmp_path: Path) -> None:
    """Each row depends on its own seed, also on a process whose noise is not of unit scale."""
    process = VE(sigma_min=0.01, sigma_max=20.0)
    finish(toy_spec(process=process, prediction=EDM(), plan=Plan(toy_plan(6).stages[:1])), tmp_path)
    noise = load(tmp_path).noise(range(2000))
    assert float(noise.std()) == pytest.approx(20.0, rel=0.05)
    torch.testing.assert_close(load(tmp_path).noise([7, 1990]), noise[[7, 1990]], rtol=0, atol=0)


def test_a_model_of_a_range_of_scales_samples_at_its_own_or_at_the_middle_unless_told(model: Model) -> None:
    def scales(asked: float | None, **facts: object) -> list[float]:
        manifest = model.manifest.model_copy(update={"guidance": {"type": "range", "low": 1.0, "high": 4.0}, **facts})
        return Model(model.denoiser, manifest).cond(range(2), guidance_scale=asked)[GUIDANCE].tolist()

    assert scales(None) == [2.5, 2.5]
    assert scales(None, guidance_scale=1.5) == [1.5, 1.5]
    assert scales(4.0, guidance_scale=1.5) == [4.0, 4.0]


@pytest.mark.parametrize("size", [1, 16, 128])
def test_a_grid_repeats_the_pixels_of_small_images_until_it_is_wide_enough_to_judge(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
    grid = np.asarray(grid_image(pixels))
    factor, rest = divmod(grid.shape[1], 8 * size + 7)
    assert rest == 0
    assert abs(grid.shape[1] - 800) <= (8 * size + 7) / 2 or factor == 1
    small = grid[::factor, ::factor]
    assert np.array_equal(np.repeat(np.repeat(small, factor, 0), factor, 1), grid)
    assert np.array_equal(small[-size:, -size:], pixels[-1])


def test_images_with_more_channels_than_a_png_are_kept_whole_and_shown_as_their_first_three(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 13, 4, 6), np.uint8)
    name = keep_samples(tmp_path, "steps-0004", torch.from_numpy(pixels) / 127.5 - 1, True)
    held = read_arrays(tmp_path / name, "arr_0")["arr_0"]
    assert np.array_equal(held, pixels.transpose(0, 2, 3, 1))
    with Image.open((tmp_path / name).with_suffix(".png")) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(grid_image(held[..., :3])))
    model = SimpleNamespace(manifest=SimpleNamespace(is_image=True), shape=(13, 4, 6))
    with pytest.raises(ValueError, match=r"13 channels cannot be saved as \.png files\. Write a \.npz file"):
        check_writable(model, tmp_path / "folder")  # type: ignore[arg-type]
    for name in ("grid.png", "arrays.npz"):
        check_writable(model, tmp_path / name)  # type: ignore[arg-type]
