"""Distances agree with closed forms and with their definitions in numpy; the classifier is the same each time."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from halfstep.data import DataConfig, MemoryData, open_data
from halfstep.metrics import Pixels, frechet_distance, kernel_distance, rmse, train_classifier
from halfstep.train import Evaluation, Reference


def _features(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + seed


def test_frechet_equals_the_definition_with_scipys_matrix_root() -> None:
    a, b = _features(300, 6, 1), _features(200, 6, 2)
    x, y = a.numpy(), b.numpy()
    ca, cb = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_shifted_and_scaled_sets_has_its_closed_form() -> None:
    a = _features(500, 4, 0)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    assert frechet_distance(a, a + shift) == pytest.approx(float(shift.square().sum()), rel=1e-9)
    centred = a - a.mean(0)
    variance = float(centred.var(0).sum())
    # Scaling by 3 scales the root of the covariance by 3: tr(C) (3 - 1)^2.
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * variance, rel=1e-9)


def test_the_distance_of_a_set_to_itself_is_0_even_with_constant_features() -> None:
    a = _features(100, 5, 0)
    a[:, 2] = 0.7
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a) >= 0


def test_kid_equals_the_unbiased_definition_in_numpy() -> None:
    a, b = _features(40, 3, 1), _features(40, 3, 2)
    x, y = a.numpy(), b.numpy()

    def kernel(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.asarray((p @ q.T / p.shape[1] + 1) ** 3)

    n = len(x)
    off = ~np.eye(n, dtype=bool)
    expected = (
        kernel(x, x)[off].sum() / (n * (n - 1)) + kernel(y, y)[off].sum() / (n * (n - 1)) - 2 * kernel(x, y).mean()
    )
    # All samples are in each subset here, so that subsets differ in their order only.
    assert kernel_distance(a, b, subsets=3, subset_size=40) == pytest.approx(float(expected), rel=1e-9)


def test_kid_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    a, b = _features(60, 3, 1), _features(60, 3, 2)
    torch.manual_seed(5)
    first = kernel_distance(a, b, subset_size=20)
    drawn = torch.rand(1)
    assert kernel_distance(a, b, subset_size=20) == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


def test_rmse_is_the_root_of_the_mean_square() -> None:
    a = torch.zeros(2, 3)
    assert rmse(a, a + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx((25 / 3) ** 0.5, rel=1e-12)
    with pytest.raises(ValueError, match="paired samples must have one shape"):
        rmse(a, a[:1])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), "one d"),
        (torch.zeros(1, 2), torch.zeros(5, 2), "at least 2 samples"),
        (torch.full((5, 2), float("nan")), torch.zeros(5, 2), "not finite"),
    ],
)
def test_bad_features_are_refused(a: Tensor, b: Tensor, said: str) -> None:
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match=said):
            distance(a, b)


def test_the_classifier_knows_the_digits_is_repeatable_and_survives_a_damaged_cache(tmp_path: Path) -> None:
    data = open_data(DataConfig())
    x0, cond = data.fetch(torch.arange(len(data)))
    labels = cond["class_labels"]
    cache = tmp_path / "classifier.safetensors"
    first = train_classifier(x0, labels, 10, "digits", cache)
    assert first.accuracy > 0.95
    features = first.features(x0[:50])
    assert tuple(features.shape) == (50, 64)
    from_cache = train_classifier(x0, labels, 10, "digits", cache)
    assert torch.equal(from_cache.features(x0[:50]), features)
    cache.write_bytes(cache.read_bytes()[:1000])
    assert torch.equal(train_classifier(x0, labels, 10, "digits", cache).features(x0[:50]), features)


def test_a_classifier_of_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match="use the features `pixels`"):
        train_classifier(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64), 2, "few")


def test_large_images_are_averaged_before_their_pixels_are_compared() -> None:
    """The square matrix of 49,152 pixels would take 19 GB; 4,096 entries and fewer are taken as they are."""
    images = torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    averaged = Pixels().features(images).reshape(3, 3, 32, 32)
    torch.testing.assert_close(averaged[1, 2, 5, 7], images[1, 2, 10:12, 28:32].mean())
    small = torch.rand(3, 1, 64, 64)
    assert torch.equal(Pixels().features(small), small.flatten(1))
    with pytest.raises(ValueError, match="more entries than the 4096 that can be compared"):
        Pixels().features(torch.rand(2, 5000))


def test_the_reference_is_of_all_classes_where_the_data_is_sorted_by_class() -> None:
    labels = torch.arange(10).repeat_interleave(30)
    names = tuple(str(number) for number in range(10))
    data = MemoryData("sorted", labels[:, None].float().expand(300, 2).contiguous(), labels, names)
    reference = Reference(data, Evaluation(num_samples=4, num_reference=60, features="pixels"))
    assert len(set(reference.real.features[:, 0].tolist())) == 10
    assert reference.protocol["reference_rows"] == "a fixed random choice"
    whole = Reference(data, Evaluation(num_samples=4, num_reference=300, features="pixels"))
    assert torch.equal(whole.real.features[:, 0], labels.float())
    assert whole.protocol["reference_rows"] == "all"
