"""Distances agree with closed forms and with their definitions in numpy, and the classifier is reproducible."""

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from halfstep.data import DataConfig, MemoryData, open_data
from halfstep.measure.evaluate import Evaluation, Reference
from halfstep.metrics import (
    METRICS,
    Pixels,
    distances,
    figures_of,
    frechet_distance,
    frechet_of_moments,
    inception_score,
    kernel_distance,
    lpips,
    moments_of,
    paired_figures,
    precision_recall,
    psnr,
    real_features,
    rmse,
    sliced_wasserstein,
    ssim,
    train_classifier,
    why_no_lpips,
)
from halfstep.metrics.reference import described, halves


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


@pytest.mark.parametrize(("n", "d"), [(400, 8), (40, 64)])
def test_frechet_equals_torchmetrics_also_where_the_covariance_is_singular(n: int, d: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = d

        def forward(self, features: Tensor) -> Tensor:
            return features

    a, b = _features(n, d, 1), _features(n, d, 2)
    metric = FrechetInceptionDistance(feature=Given(), normalize=False).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-4 if n < d else 1e-9)


@pytest.mark.parametrize(("n", "m", "d"), [(20, 30, 64), (20, 200, 64), (200, 20, 64), (64, 65, 64)])
def test_frechet_of_few_samples_equals_the_formula_of_moments(n: int, m: int, d: int) -> None:
    """With fewer samples than dimensions, no [d, d] matrices are needed."""
    a, b = _features(n, d, 1), _features(m, d, 2)
    dense = frechet_of_moments(moments_of(a), moments_of(b))
    assert frechet_distance(a, b) == pytest.approx(dense, rel=1e-8)
    assert frechet_distance(a, b, moments_of(a)) == frechet_distance(a, b)


def test_frechet_of_few_samples_in_many_dimensions_takes_no_square_matrix(monkeypatch) -> None:
    monkeypatch.setattr(distances, "moments_of", None)
    a = torch.randn(30, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(a, a + 0.5) == pytest.approx(0.25 * 20_000, rel=1e-9)


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
    # Each subset contains all samples here, so subsets only differ in their order.
    assert kernel_distance(a, b, subsets=3, subset_size=40) == pytest.approx(float(expected), rel=1e-9)


def test_kid_is_repeatable_and_leaves_the_global_generator_alone() -> None:
    a, b = _features(60, 3, 1), _features(60, 3, 2)
    torch.manual_seed(5)
    first = kernel_distance(a, b, subset_size=20)
    drawn = torch.rand(1)
    assert kernel_distance(a, b, subset_size=20) == first
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize(("n", "m", "d"), [(300, 200, 4), (1500, 1100, 2), (50, 60, 30)])
def test_precision_recall_density_and_coverage_are_those_of_prdc_exactly(n: int, m: int, d: int) -> None:
    from prdc import compute_prdc

    real, fake = _features(n, d, 0), _features(m, d, 0) * 0.4 + _features(m, d, 0)[0] * 0.4
    expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=5)
    found = precision_recall(real, fake)
    # Shares of the same counts are equal to the last digit. The density is a mean, computed in another order.
    for name in ("precision", "recall", "coverage"):
        assert getattr(found, name) == float(expected[name]), name
    assert found.density == pytest.approx(float(expected["density"]), rel=1e-12)
    # They differ, so swapping the two sets would be detected.
    assert found.precision != found.recall


def test_identical_sets_have_all_of_each_other_and_distant_ones_nothing() -> None:
    a = _features(60, 3, 0)
    same, far = precision_recall(a, a), precision_recall(a, a + 1e6)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert far == (0, 0, 0, 0)
    assert kernel_distance(a, a, subsets=2) == pytest.approx(0, abs=abs(kernel_distance(a, a + 5)) * 0.1)
    assert sliced_wasserstein(a, a) == 0
    with pytest.raises(ValueError, match="at least 7 samples, got 6"):
        precision_recall(a, a[:6])


def test_sliced_wasserstein_of_a_shift_is_the_mean_length_of_its_projections() -> None:
    """For a shift v, W1 along a direction u is |u . v|, and its mean over the sphere in d dimensions is known."""
    a = _features(200, 2, 0)
    shift = torch.tensor([3.0, -4.0], dtype=torch.float64)
    # In the plane: |v| 2 / pi, up to the finite number of directions.
    assert sliced_wasserstein(a, a + shift, num_directions=4000) == pytest.approx(5 * 2 / np.pi, rel=0.02)
    # Sets of different sizes are compared as distributions: a set with each point twice is equal.
    assert sliced_wasserstein(a, a.repeat(2, 1)) == pytest.approx(0, abs=1e-12)
    b = _features(200, 2, 5)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a), rel=1e-12)


def test_the_inception_score_has_its_closed_forms_and_its_definition() -> None:
    sure = torch.nn.functional.one_hot(torch.arange(400) % 4, 4).double() * 100
    assert inception_score(sure, splits=2) == pytest.approx(4, rel=1e-2)
    assert inception_score(torch.zeros(50, 7)) == pytest.approx(1, rel=1e-12)
    logits = _features(90, 5, 3) / 10
    p = torch.softmax(logits, 1).numpy()
    # Two parts with the same samples: each is scored separately, so the order does not matter.
    divergence = (p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()
    assert inception_score(logits, splits=1) == pytest.approx(np.exp(divergence), rel=1e-9)
    with pytest.raises(ValueError, match="at least 10 samples"):
        inception_score(logits[:9])


def test_the_distances_from_the_same_noise_have_their_closed_forms() -> None:
    a = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    # An error of 0.2 everywhere on a range of 2 is 20 dB below it.
    assert psnr(a, a + 0.2) == pytest.approx(20, rel=1e-6)
    assert np.isinf(psnr(a, a))
    assert ssim(a, a) == pytest.approx(1, rel=1e-9)
    # For constant images x and y, only the term of the means remains: (2 x y + c) / (x^2 + y^2 + c), on [0, 2].
    x, y, c = 0.5, 1.5, (0.01 * 2) ** 2
    flat = torch.full((2, 1, 20, 20), x - 1), torch.full((2, 1, 20, 20), y - 1)
    assert ssim(*flat) == pytest.approx((2 * x * y + c) / (x * x + y * y + c), rel=1e-6)
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(a[..., :10], a[..., :10])
    figures = paired_figures(a, a, is_image=True)
    assert figures.values["rmse"] == 0
    assert "psnr" not in figures.values
    assert any("PSNR is omitted because it is infinite" in text for text in figures.missing)
    assert set(paired_figures(a, a, is_image=False).values) == {"rmse"}


def test_lpips_reports_its_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.util

    a = torch.zeros(2, 3, 32, 32)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    if importlib.util.find_spec("torchvision") is None:
        with pytest.raises(ValueError, match="torchvision is not installed"):
            lpips(a, a)
    monkeypatch.setattr("halfstep.metrics.paired.importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="its AlexNet is not at"):
        lpips(a, a)
    assert any("LPIPS is omitted" in text for text in paired_figures(a, a, is_image=True).missing)
    # torchvision would unpickle any file with this name.
    file = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"another file")
    with pytest.raises(ValueError, match="is not torchvision's AlexNet"):
        lpips(a, a)
    # AlexNet's pooling leaves nothing of small images, with or without its weights.
    assert "at least 31 x 31 pixels" in str(why_no_lpips((1, 28, 28)))
    assert "4 channels" in str(why_no_lpips((4, 64, 64)))


def test_ssim_of_many_pairs_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(7, 3, 16, 16, generator=generator) * 2 - 1 for _ in range(2))
    together = ssim(a, b)
    monkeypatch.setattr("halfstep.metrics.paired.AT_ONCE", 3)
    assert ssim(a, b) == pytest.approx(together, rel=1e-12)
    assert together == pytest.approx(sum(ssim(x[None], y[None]) for x, y in zip(a, b, strict=True)) / 7, rel=1e-12)


def test_all_figures_of_a_set_exist_and_those_without_enough_samples_are_listed() -> None:
    real = described(_features(100, 4, 0).float())
    figures = figures_of(Pixels(), _features(50, 4, 1).float(), real)
    assert list(figures.values) == [name for name in METRICS if name in figures.values]
    assert set(METRICS) - set(figures.values) == {"inception_score", "rmse", "psnr", "ssim", "lpips"}
    assert figures.missing == []
    few = figures_of(Pixels(), _features(5, 4, 1).float(), real)
    assert set(few.values) == {"frechet", "kid", "sliced_wasserstein"}
    assert few.missing == ["Precision, recall, density and coverage need at least 7 samples, but there are only 5."]


def test_a_references_statistics_are_kept_by_content_in_float64(tmp_path: Path) -> None:
    samples = _features(80, 3, 0).float()
    calls: list[int] = []

    def fetch() -> Tensor:
        calls.append(1)
        return samples

    first = real_features(Pixels(), fetch, "a", tmp_path)
    again = real_features(Pixels(), fetch, "a", tmp_path)
    assert len(calls) == 1
    assert first.moments.covariance.dtype == torch.float64
    for one, other in ((first.features, again.features), (first.radii, again.radii)):
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    assert torch.equal(first.moments.mean, again.moments.mean)
    assert torch.equal(first.moments.covariance, again.moments.covariance)
    np.testing.assert_allclose(first.moments.covariance, np.cov(samples.double().numpy().T), rtol=1e-12)
    real_features(Pixels(), fetch, "b", tmp_path)
    assert len(calls) == 2
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(real_features(Pixels(), fetch, "a", tmp_path).features, first.features)
    assert len(calls) == 3


def test_the_halves_of_a_set_are_disjoint_and_of_one_size() -> None:
    first, second = halves(torch.arange(41)[:, None])
    assert len(first) == len(second) == 20
    assert len(set(first.flatten().tolist()) | set(second.flatten().tolist())) == 40


def test_the_classifiers_features_do_not_depend_on_how_many_real_samples_are_compared(tmp_path: Path) -> None:
    """They were trained on the rows that were compared, and stored under a name without the number of rows."""
    labels = torch.arange(300) % 2
    data = MemoryData("points", torch.randn(300, 3) + 3 * labels[:, None], labels, ("a", "b"))
    one = Reference(data, Evaluation(num_samples=4, num_reference=100), tmp_path / "a")
    other = Reference(data, Evaluation(num_samples=4, num_reference=200), tmp_path / "b")
    assert one.extractor.name == other.extractor.name
    x0 = data.fetch(torch.arange(5)).x0
    assert torch.equal(one.extractor.features(x0), other.extractor.features(x0))


def test_rmse_is_the_root_of_the_mean_square() -> None:
    a = torch.zeros(2, 3)
    assert rmse(a, a + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx((25 / 3) ** 0.5, rel=1e-12)
    with pytest.raises(ValueError, match="paired samples must have the same shape"):
        rmse(a, a[:1])


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 3), "the same d"),
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
    first = train_classifier(x0, labels, 10, "digits", cache, num_updates=200)
    assert first.accuracy > 0.95
    features = first.features(x0[:50])
    assert tuple(features.shape) == (50, 64)
    from_cache = train_classifier(x0, labels, 10, "digits", cache, num_updates=200)
    assert torch.equal(from_cache.features(x0[:50]), features)
    cache.write_bytes(cache.read_bytes()[:1000])
    again = train_classifier(x0, labels, 10, "digits", cache, num_updates=200)
    assert torch.equal(again.features(x0[:50]), features)


def test_a_classifier_of_too_little_data_is_refused() -> None:
    with pytest.raises(ValueError, match="Use the features `pixels`"):
        train_classifier(torch.zeros(10, 2), torch.zeros(10, dtype=torch.int64), 2, "few")


def test_large_images_are_averaged_before_their_pixels_are_compared() -> None:
    """The square matrix of 49,152 pixels would take 19 GB. Up to 4,096 entries are used unchanged."""
    images = torch.rand(3, 3, 64, 128, generator=torch.Generator().manual_seed(0))
    averaged = Pixels().features(images).reshape(3, 3, 32, 32)
    torch.testing.assert_close(averaged[1, 2, 5, 7], images[1, 2, 10:12, 28:32].mean())
    small = torch.rand(3, 1, 64, 64)
    assert torch.equal(Pixels().features(small), small.flatten(1))
    with pytest.raises(ValueError, match="more entries than the 4096 that the features `pixels` can compare"):
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
