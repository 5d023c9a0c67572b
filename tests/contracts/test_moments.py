"""Moment matching: exact posterior samplers are stationary, others are pushed back, and each turn is as derived."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Final

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, VPCosine, per_sample
from halfstep.core.oracle import data_set_denoiser
from halfstep.core.prediction import Constant, Denoised, V, eps_from_x0
from halfstep.nets import MLP
from halfstep.objectives import (
    AUXILIARY,
    STUDENT,
    Batch,
    EarlyEnd,
    Evals,
    GuidanceRange,
    Models,
    MomentMatching,
    Role,
    Stage,
    Training,
)
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import Ancestral
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine
from support import Watched, gaussian, in_turn, members_and_further_processes, mixture, numbers, toy_denoiser
from toys import points

every_process = pytest.mark.parametrize("process", members_and_further_processes())

SIZE: Final = 4096
MEAN, STD = 0.3, 0.5
"""Mean and standard deviation of each entry of the data, as in `gaussian`."""


def draw_for(size: int = SIZE, update: int = 0) -> Draw:
    return Draw(seed=5, stream="stage", update=update, batch_size=size, places=range(size))


def data(size: int = SIZE) -> Batch:
    return Batch(MEAN + STD * numbers(size, 3, seed=1))


class PosteriorSampler(Denoiser):
    """A student that draws x0 from the data's own q(x0 | x_t) and adds `shift`, which is 0 for a perfect student."""

    def __init__(self, process: NoiseProcess, shift: float = 0.0) -> None:
        super().__init__()
        self.process = process
        self.exact = gaussian(process)
        self.shift = nn.Parameter(torch.tensor(shift, dtype=torch.float64))
        self.made: Tensor

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        alpha, sigma = (per_sample(a, x_t) for a in self.process.alpha_sigma(t))
        spread = STD * sigma / torch.sqrt((alpha * STD) ** 2 + sigma**2)
        x0 = self.exact(x_t, t).x0 + spread * numbers(*x_t.shape, seed=2) + self.shift
        self.made = x0
        if x0.requires_grad:
            x0.retain_grad()
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


class Moved(Denoiser):
    """Another denoiser, with its x0 moved by a parameter `[batch, *dims]` that starts at a given value."""

    def __init__(self, denoiser: Denoiser, by: Tensor) -> None:
        super().__init__()
        self.denoiser, self.process = denoiser, denoiser.process
        self.by = nn.Parameter(by)
        self.shown: Tensor

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0, eps = self.denoiser(x_t, t)
        self.shown = x_t
        return Denoised(x0 + self.by, eps)


@dataclass
class FixedStep:
    """A draw with steps of a single length, so that s determines t."""

    draw: Draw
    share: float = 0.5

    def normal(self, purpose: str, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.draw.normal(purpose, shape, dtype)

    def uniform(self, purpose: str) -> Tensor:
        drawn = self.draw.uniform(purpose)
        return torch.full_like(drawn, self.share) if purpose == "step" else drawn


def is_zero(found: Tensor, errors: float = 4.5) -> bool:
    """Return whether each entry's mean over the batch is within `errors` standard errors of 0."""
    return bool((found.mean(0).abs() < errors * found.std(0) / len(found) ** 0.5).all())


@every_process
@in_turn("num_steps", [1, 2, 8])
def test_steps_of_a_perfect_student_are_distributed_as_noisy_data(process: NoiseProcess, num_steps: int) -> None:
    models = Models(PosteriorSampler(process), gaussian(process), {AUXILIARY: Watched(gaussian(process))})
    auxiliary = Moved(gaussian(process), torch.zeros(()))
    watched = Watched(auxiliary)
    MomentMatching(num_steps).auxiliary_loss(
        dataclasses.replace(models, helpers={AUXILIARY: watched}), data(), draw_for()
    )
    alpha, sigma = (a[:, None] for a in process.alpha_sigma(watched.times[0]))
    unit = (auxiliary.shown - alpha * MEAN) / torch.sqrt((alpha * STD) ** 2 + sigma**2)
    assert scipy.stats.kstest(unit.flatten().numpy(), "norm").pvalue > 1e-3


@every_process
def test_a_perfect_student_leaves_the_exact_denoiser_as_the_best_auxiliary_and_no_direction(
    process: NoiseProcess,
) -> None:
    """The auxiliary's gradient is 0 in expectation at any x_s, so its mean and its mean along x_s are 0."""
    objective, exact = MomentMatching(2, Constant()), gaussian(process)
    for off in (0.0, 0.1):
        student, auxiliary = PosteriorSampler(process), Moved(exact, torch.full((SIZE, 3), off, dtype=torch.float64))
        models = Models(student, exact, {AUXILIARY: auxiliary})
        objective.auxiliary_loss(models, data(), draw_for()).loss.sum().backward()
        grad = auxiliary.by.grad
        assert grad is not None
        along = grad * auxiliary.shown / auxiliary.shown.std()
        assert is_zero(grad) == (off == 0)
        assert off or is_zero(along)
        result = objective.loss(models, data(), draw_for())
        result.loss.sum().backward()
        # The direction follows the auxiliary for each sample, by 1 / 3, because a loss is a mean over 3 entries.
        torch.testing.assert_close(student.made.grad, torch.full_like(grad, off / 3))
        torch.testing.assert_close(result.loss, torch.full((SIZE,), off**2 / 2, dtype=torch.float64))


@every_process
def test_a_biased_student_is_pushed_back_by_its_own_best_auxiliary(process: NoiseProcess) -> None:
    """For data of one width and steps whose t is a function of s, E[x0 | x_s] of the shifted student is known. It is
    that of the data, moved by c (1 - A kappa), where x_s moves by kappa c and A is the slope of E[x0 | x_s]."""
    objective, exact, shift = MomentMatching(4, Constant()), gaussian(process), 0.4
    draw: Any = FixedStep(draw_for())
    s = draw.uniform("time")
    t = (s + 0.5 / 4).clamp(max=1)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.alpha_sigma(s)
    q = alpha_t * sigma_s / (sigma_t * alpha_s)
    kappa = alpha_s * (1 - q**2)
    slope = alpha_s * STD**2 / ((alpha_s * STD) ** 2 + sigma_s**2)
    known = (shift * (1 - slope * kappa))[:, None].expand(SIZE, 3)
    for share, is_best in ((0.5, True), (1.0, False)):
        student, auxiliary = PosteriorSampler(process, shift), Moved(exact, share * known)
        models = Models(student, exact, {AUXILIARY: auxiliary})
        objective.auxiliary_loss(models, data(), draw).loss.sum().backward()
        grad = auxiliary.by.grad
        assert grad is not None
        # With the teacher's term, half of the way is best.
        assert is_zero(grad) == is_best
        assert not is_best or is_zero(grad * auxiliary.shown / auxiliary.shown.std())
    objective.loss(Models(student, exact, {AUXILIARY: Moved(exact, known / 2)}), data(), draw).loss.sum().backward()
    torch.testing.assert_close(student.made.grad, known / 2 / 3)
    assert bool((known > 0).all())


@every_process
def test_the_step_is_that_of_ancestral_sampling_with_the_lower_variance(process: NoiseProcess) -> None:
    """Compare with the sampler, and with the posterior's mean and variance, which are written out here."""
    objective, size = MomentMatching(4), 64
    student, auxiliary = Watched(mixture(process)), Watched(mixture(process))
    batch, draw = Batch(0.5 * numbers(size, 2)), draw_for(size)
    found = Moved(auxiliary, torch.zeros(()))
    objective.loss(Models(student, mixture(process), {AUXILIARY: found}), batch, draw)
    (t,), (s,) = student.times, auxiliary.times
    eps, noise = (draw.normal(purpose, (2,)).double() for purpose in ("noise", "posterior"))
    x_t = process.mix(batch.x0, eps, t)
    by_sampler, _ = Ancestral(gamma=0.0).step(mixture(process), x_t, t, s, None, None, noise)
    assert torch.equal(found.shown, by_sampler)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([a[:, None] for a in process.alpha_sigma(time)] for time in (t, s))
    q = alpha_t * sigma_s / (sigma_t * alpha_s)
    mean = alpha_s * (1 - q**2) * student.answers[0].x0 + sigma_s * q / sigma_t * x_t
    torch.testing.assert_close(found.shown, mean + sigma_s * torch.sqrt(1 - q**2) * noise, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_steps_land_at_any_time_and_none_is_longer_than_the_student_s(num_steps: int) -> None:
    process = VPCosine()
    for turn in MomentMatching(num_steps).turns(0):
        student, auxiliary = (Watched(data_set_denoiser(process, numbers(1, 3))) for _ in range(2))
        models = Models(student, student.denoiser, {AUXILIARY: auxiliary})
        turn.loss(models, data(), draw_for())
        (t,), (s,) = student.times, auxiliary.times
        assert scipy.stats.kstest(s.numpy(), "uniform").pvalue > 1e-3
        inside = t < 1
        assert bool((t > s).all())
        if num_steps > 1:
            assert (
                scipy.stats.kstest((t - s)[inside & (s < 1 - 1 / num_steps)].numpy() * num_steps, "uniform").pvalue
                > 1e-3
            )
        # P(s + d > 1) = 1 / (2 k).
        share = 1 / (2 * num_steps)
        assert abs(float((~inside).double().mean()) - share) < 4 * math.sqrt(share * (1 - share) / SIZE)


def test_its_result_is_an_ancestral_student_and_its_costs_are_those_of_its_calls() -> None:
    objective = MomentMatching(4)
    assert objective.outcome == (Role.STUDENT, 4, Ancestral(gamma=0.0))
    process = VPCosine()
    models = {
        name: Watched(toy_denoiser(process, V(), seed)) for seed, name in enumerate((STUDENT, "teacher", AUXILIARY))
    }
    backward = dict.fromkeys(models, 0)
    for turn in objective.turns(0):
        result = turn.loss(
            Models(models[STUDENT], models["teacher"], {AUXILIARY: models[AUXILIARY]}), data(8), draw_for(8)
        )
        result.loss.sum().backward()
        for name, model in models.items():
            backward[name] += any(parameter.grad is not None for parameter in model.parameters())
            model.zero_grad()
    assert objective.evals == {name: Evals(len(model.times), backward[name]) for name, model in models.items()}
    assert sum(evals.cost for evals in objective.evals.values()) == 10


def test_a_guidance_scale_is_shown_to_all_three() -> None:
    seen: list[Tensor] = []

    class Shown(Denoiser):
        process = VPCosine()

        def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
            seen.append((cond or {})["guidance_scale"])
            return mixture(self.process)(x_t, t)

    for turn in MomentMatching(2, guidance=GuidanceRange(1.0, 4.0)).turns(0):
        seen.clear()
        turn.loss(Models(Shown(), Shown(), {AUXILIARY: Shown()}), Batch(numbers(64, 2)), draw_for(64))
        assert len(seen) == 3
        assert all(torch.equal(scale, seen[0]) for scale in seen)
        assert 1 <= float(seen[0].min()) < float(seen[0].max()) <= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "whole number of at least 1"),
        ({"num_steps": 2, "auxiliary_rate": 0.0}, "auxiliary_rate must be a finite number above 0, got 0.0"),
        ({"num_steps": 2, "auxiliary_rate": math.inf}, "auxiliary_rate must be a finite number above 0, got inf"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MomentMatching(**settings)


def denoiser(seed: int) -> NetworkDenoiser:
    torch.manual_seed(seed)
    network = MLP((2,), width=8, depth=1)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return NetworkDenoiser(network, VPCosine(), V())


def trainer() -> StageTrainer:
    """Return a trainer of a student that has left its teacher, with settings that a helper does not support."""
    early = EarlyEnd(patience=1, window=2, min_drop=0.9)
    training = Training(8, 1e-2, batch_size=12, adam_betas=(0.5, 0.9), ema_decay=0.7, early_end=early)
    return StageTrainer(
        denoiser(1), denoiser(0), Stage(MomentMatching(2, auxiliary_rate=3.0), training),
        lambda draw: Batch(points()[draw.order(200)]), (2,),
        seed=0, stream="moments", accelerator=make_accelerator(cpu=True), engine=Engine(),
    )  # fmt: skip


def test_the_auxiliary_starts_as_the_teacher_and_trains_at_its_own_rate() -> None:
    made = trainer()
    for one, other in zip(made.players[AUXILIARY].model.parameters(), denoiser(0).parameters(), strict=True):
        assert torch.equal(one, other)
    own = made.players[AUXILIARY].training
    assert (own.learning_rate, own.adam_betas) == (pytest.approx(3e-2), (0.5, 0.9))
    assert [turn.trains for turn in made.stage.objective.turns(0)] == [AUXILIARY, STUDENT]


def test_it_resumes_bit_for_bit() -> None:
    whole, first, rest = trainer(), trainer(), trainer()
    for _ in whole.run():
        pass
    # A loss that must fall would have ended the stage early.
    assert whole.update == 8
    for update in first.run():
        if update == 3:
            break
    rest.load_state(first.state(), first.update, 0.0)
    for _ in rest.run():
        pass
    for name, player in whole.players.items():
        for one, other in zip(player.model.parameters(), rest.players[name].model.parameters(), strict=True):
            assert torch.equal(one, other), name
