"""A user's own `Denoiser`, based only on `process.alpha_sigma(t)`, can be trained, distilled and sampled."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.core.noise import NoiseProcess, VPCosine, per_sample
from halfstep.core.prediction import Denoised
from halfstep.nets import MLP
from halfstep.samplers import samplers
from support import members
from toys import points


class Linear(halfstep.Denoiser):
    """x0 = gain(t) x_t + shift(t), the form of the optimal denoiser of a Gaussian, with learned mean and spread."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        self.mean = nn.Parameter(torch.zeros(2))
        self.log_std = nn.Parameter(torch.zeros(2))

    def forward(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Denoised:
        alpha, sigma = self.process.alpha_sigma(t)
        assert alpha.shape == x_t.shape[:1]
        alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
        power = (2 * self.log_std).exp()
        rest = x_t - alpha * self.mean
        variance = alpha**2 * power + sigma**2
        return Denoised(self.mean + alpha * power / variance * rest, sigma / variance * rest)


@pytest.fixture(scope="module")
def fitted() -> Linear:
    torch.manual_seed(0)
    own = Linear(VPCosine())
    found = halfstep.fit(own, points(), halfstep.Training(400, 2e-2, batch_size=64, ema_decay=0.9))
    assert found is own
    return own


def test_it_is_trained_to_the_mean_and_spread_of_the_data(fitted: Linear) -> None:
    data = points()
    torch.testing.assert_close(fitted.mean.detach(), data.mean(0), atol=0.05, rtol=0)
    torch.testing.assert_close(fitted.log_std.exp().detach(), data.std(0), atol=0.08, rtol=0)


@pytest.mark.parametrize("sampler", members(samplers))
def test_every_sampler_brings_noise_to_the_fitted_gaussian(fitted: Linear, sampler: halfstep.Sampler) -> None:
    seeds = range(400)
    noise = halfstep.step_noise(seeds, (2,)) if sampler.stochastic else None
    x_1 = halfstep.sample_noise(seeds, (2,))
    steps = list(halfstep.trajectory(fitted, x_1, 16, sampler, noise=noise))
    x0 = steps[-1].x_s.detach()
    torch.testing.assert_close(x0, halfstep.sample(fitted, x_1, 16, sampler, noise=noise))
    torch.testing.assert_close(x0.mean(0), fitted.mean.detach(), atol=0.1, rtol=0)
    torch.testing.assert_close(x0.std(0), fitted.log_std.exp().detach(), atol=0.1, rtol=0)


def test_a_student_is_distilled_from_it_and_it_stays_as_it_was(fitted: Linear) -> None:
    before = [parameter.clone() for parameter in fitted.parameters()]
    training = halfstep.Training(600, 2e-2, batch_size=64)
    student = halfstep.distill(fitted, points(), start=4, to=2, training=training)
    assert isinstance(student, Linear)
    assert student is not fitted
    assert all(torch.equal(a, b) for a, b in zip(before, fitted.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in fitted.parameters())
    x_1 = halfstep.sample_noise(range(400), (2,))
    two, four = halfstep.sample(student, x_1, 2), halfstep.sample(fitted, x_1, 4)
    undistilled = halfstep.sample(fitted, x_1, 2)
    # A line fitted to the teacher's landing points, closer to them than the teacher's own two steps.
    assert (two - four).square().mean() < 0.3 * (undistilled - four).square().mean()


def test_its_student_is_distilled_again_like_a_model(fitted: Linear) -> None:
    training = halfstep.Training(2, 1e-2, batch_size=8)
    network = halfstep.NetworkDenoiser(MLP((2,), width=8, depth=1), VPCosine(), halfstep.V())
    for teacher in (fitted, network):
        student, names = halfstep.distill(teacher, points(), to=4, start=8, training=training), list[str]()
        last = halfstep.distill(
            student, points(), to=1, training=training, on_stage=lambda name, _, names=names: names.append(name)
        )
        assert names == ["01-halve-0002", "02-halve-0001"]
        assert last.num_steps == 1
        with pytest.raises(ValueError, match="distilled for 4 steps"):
            halfstep.distill(student, points(), to=1, start=16, training=training)


def test_a_network_that_was_distilled_elsewhere_is_a_student(tmp_path: Path) -> None:
    training = halfstep.Training(2, 1e-2, batch_size=8)
    student = halfstep.NetworkDenoiser(MLP((2,), width=8, depth=1), VPCosine(), halfstep.V())
    student.num_steps, student.sampler = 4, halfstep.Heun()
    for out in (None, tmp_path / "run"):
        with pytest.raises(ValueError, match="distilled for 4 steps of Heun"):
            halfstep.distill(student, points(), to=2, training=training, out=out)
    student.sampler = None
    last = halfstep.distill(student, points(), to=1, training=training, out=tmp_path / "run")
    assert last.num_steps == 1
    assert halfstep.load(tmp_path / "run" / "stages" / "00-teacher").num_steps == 4
    assert (tmp_path / "run" / "stages" / "02-halve-0001").exists()


def test_options_that_need_a_network_are_rejected(fitted: Linear) -> None:
    with pytest.raises(ValueError, match="the teacher has no prediction to match: pass a NetworkDenoiser"):
        halfstep.distill(fitted, points(), start=4, to=2, prediction=halfstep.X0())


def test_engine_settings_that_need_a_network_are_rejected(fitted: Linear) -> None:
    training = halfstep.Training(2, 1e-2, batch_size=8)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"gradient_checkpointing": True}, r"Linear does not support .*Remove --engine\.gradient-checkpointing"),
        ({"compile": True}, r"can be compiled, got a Linear\. Remove --engine\.compile"),
        ({"teacher_precision": "bf16"}, r"stored in bf16, but .* is a Linear\. Remove --engine\.teacher-precision"),
    )
    for settings, words in cases:
        engine = halfstep.Engine(cpu=True, **settings)
        with pytest.raises(ValueError, match=words) as caught:
            halfstep.distill(fitted, points(), start=4, to=2, training=training, engine=engine)
        assert "\n" not in str(caught.value)
        if "teacher_precision" not in settings:
            own = Linear(VPCosine())
            with pytest.raises(ValueError, match=words):
                halfstep.fit(own, points(), training, engine=engine)
            assert not own.mean.any(), "it was rejected before training"
