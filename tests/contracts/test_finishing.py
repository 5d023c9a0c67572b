"""The finish: the auxiliary denoiser learns the landing points' score, and the gradient closes the gap to the data."""

import dataclasses
import math
from collections.abc import Mapping

import pytest
import scipy.stats
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, VPCosine, per_sample, processes
from halfstep.core.oracle import GaussianDenoiser, data_set_denoiser
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.objectives import (
    FINISHING,
    STUDENT,
    Adversarial,
    Batch,
    Denoising,
    Finishing,
    FixedGuidance,
    Halving,
    Matching,
    Models,
    MomentMatching,
    Objective,
    Outcome,
    Parents,
    Plan,
    Role,
    Stage,
    Training,
    parents_of,
)
from halfstep.objectives.base import Step
from halfstep.objectives.landing_points import noised_landing
from halfstep.samplers import Heun
from support import Watched, members, numbers

MEAN, STD = 0.3, 0.5
SIZE = 20_000

every_process = pytest.mark.parametrize("process", members(processes))
several_steps = pytest.mark.parametrize("num_steps", [1, 2, 4])


def draw_for(count: int = SIZE, update: int = 3) -> Draw:
    return Draw(seed=5, stream="finish", update=update, batch_size=count, places=range(count))


def gaussian_data(count: int = SIZE) -> Batch:
    return Batch(MEAN + STD * numbers(count, 1, seed=9))


class AffineStudent(Denoiser):
    """A student with Gaussian landing points: its DDIM step follows the exact flow of Gaussian data, then adds `shift`.

    `shift` is in units of the step's width.
    """

    def __init__(self, process: NoiseProcess, num_steps: int, shift: float = 0.0) -> None:
        super().__init__()
        self.process, self.num_steps, self.shift = process, num_steps, shift

    def spread(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return torch.sqrt(alpha**2 * STD**2 + sigma**2)

    def width(self, t: Tensor) -> Tensor:
        """Return the derivative of x_s with respect to x0."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.ends(t)
        return alpha_s - sigma_s * alpha_t / sigma_t

    def ends(self, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        s = ((t * self.num_steps).round() - 1) / self.num_steps
        return self.process.alpha_sigma(t), self.process.landing(s)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.ends(t)
        scale = self.spread(alpha_s, sigma_s) / self.spread(alpha_t, sigma_t)
        x_s = per_sample(alpha_s * MEAN, x_t) + per_sample(scale, x_t) * (x_t - per_sample(alpha_t * MEAN, x_t))
        q = sigma_s / sigma_t
        x0 = (x_s - per_sample(q, x_t) * x_t) / per_sample(self.width(t), x_t) + self.shift
        return Denoised(x0, eps_from_x0(x_t, x0, alpha_t, sigma_t))


class OptimalAuxiliary(Denoiser):
    """The denoiser that minimises the auxiliary's loss for an `AffineStudent`: E[(z - sigma^2 eps' / b) / alpha | z].

    `bend` adds a function of z and tau to it.
    """

    def __init__(self, student: AffineStudent, bend: float = 0.0) -> None:
        super().__init__()
        self.process, self.student, self.bend = student.process, student, bend

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        end = torch.ceil(t * self.student.num_steps) / self.student.num_steps
        _, (alpha_s, _) = self.student.ends(end)
        alpha, sigma = self.process.alpha_sigma(t)
        k = alpha / alpha_s
        variance = alpha**2 * STD**2 + sigma**2
        mean = alpha * MEAN + k * self.student.width(end) * self.student.shift
        # The score of z, N(mean, variance), gives x0 by Tweedie's formula.
        score = -(x_t - per_sample(mean, x_t)) / per_sample(variance, x_t)
        x0 = (x_t + per_sample(sigma**2, x_t) * score) / per_sample(alpha, x_t)
        # Small at low noise, where samples would otherwise dominate all others.
        share = per_sample(sigma**2 / (alpha**2 + sigma**2), x_t)
        x0 = x0 + self.bend * share * (1 + x_t / per_sample(torch.hypot(alpha, sigma), x_t))
        return Denoised(x0, eps_from_x0(x_t, x0, alpha, sigma))


class Bent(Denoiser):
    """Another denoiser to which the bend of an `OptimalAuxiliary` is added."""

    def __init__(self, denoiser: Denoiser, student: AffineStudent, bend: float) -> None:
        super().__init__()
        self.process, self.denoiser = denoiser.process, denoiser
        self.bent, self.straight = OptimalAuxiliary(student, bend), OptimalAuxiliary(student)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t, t, cond).x0 + self.bent(x_t, t).x0 - self.straight(x_t, t).x0
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


def models_of(student: Denoiser, teacher: Denoiser, auxiliary: Denoiser, start: Denoiser | None = None) -> Models:
    helpers: Mapping[str, nn.Module] = {"auxiliary": auxiliary, "start": student if start is None else start}
    return Models(student, teacher, helpers)


class Mixed(Denoiser):
    """The weighted mean of two denoisers: `share` of the first."""

    def __init__(self, first: Denoiser, second: Denoiser, share: float) -> None:
        super().__init__()
        self.process, self.first, self.second, self.share = first.process, first, second, share

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = torch.lerp(self.second(x_t, t).x0, self.first(x_t, t).x0, self.share)
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


def slopes(objective: Finishing, student: Denoiser, teacher: Denoiser, known: AffineStudent, share: float) -> Tensor:
    """Return the slope of the auxiliary loss for each sample, at a denoiser with `share` of the teacher.

    The rest is the optimal denoiser for the student `known`. The loss is quadratic in the bend, so its slope at 0 is
    half the difference between +1 and -1.
    """
    up, down = (
        objective.auxiliary_loss(
            models_of(student, teacher, Mixed(Bent(teacher, known, bend), OptimalAuxiliary(known, bend), share)),
            gaussian_data(),
            draw_for(),
        ).loss
        for bend in (1.0, -1.0)
    )
    return (up - down) / 2


def in_deviations(values: Tensor) -> float:
    """Return the distance of the mean from 0, in standard errors."""
    return abs(float(values.mean() / (values.std() / math.sqrt(len(values)))))


@every_process
@several_steps
@pytest.mark.parametrize("data_weight", [0.0, 1.0])
def test_the_auxiliary_loss_is_smallest_at_the_score_of_the_landing_points(
    process: NoiseProcess, num_steps: int, data_weight: float
) -> None:
    """With an exact teacher, the control variate does not change where the expected loss is smallest."""
    student, teacher = AffineStudent(process, num_steps, shift=0.4), GaussianDenoiser(process, MEAN, STD)
    objective = Finishing(num_steps, data_weight=data_weight, inside_step=True)
    for shift, is_known in ((0.4, True), (0.0, False)):
        found = in_deviations(slopes(objective, student, teacher, AffineStudent(process, num_steps, shift), 0.0))
        assert found < 4 if is_known else found > 8, "only the score of the landing points may be a minimum"


@every_process
@several_steps
@pytest.mark.parametrize(("data_weight", "inside"), [(0.0, True), (0.5, False), (1.0, True), (1.0, False)])
def test_the_auxiliary_takes_on_the_error_of_an_inexact_teacher(
    process: NoiseProcess, num_steps: int, data_weight: float, inside: bool
) -> None:
    """With landing points distributed like data and weight 1, both denoisers agree, so the student does not move."""
    student, teacher = AffineStudent(process, num_steps), GaussianDenoiser(process, MEAN + 0.8, STD)
    objective = Finishing(num_steps, data_weight=data_weight, inside_step=inside)
    for share in (0.0, 0.5, 1.0):
        found = in_deviations(slopes(objective, student, teacher, student, share))
        assert found < 4 if share == data_weight else found > 8


@pytest.mark.parametrize(
    ("num_steps", "inside", "least"),
    [(2, True, 1.5), (4, True, 4.0), (8, True, 8.0), (2, False, 1.4), (4, False, 3.0), (8, False, 6.0)],
)
def test_data_removes_noise_from_the_auxiliary_loss_and_more_so_in_narrow_steps(
    num_steps: int, inside: bool, least: float
) -> None:
    process = VPCosine()
    student, teacher = AffineStudent(process, num_steps), GaussianDenoiser(process, MEAN, STD)
    without, with_data = (
        float(
            slopes(Finishing(num_steps, data_weight=weight, inside_step=inside), student, teacher, student, 0.0).std()
        )
        for weight in (0.0, 1.0)
    )
    assert without > least * with_data


def test_nothing_is_left_of_the_noise_if_the_student_returns_the_data() -> None:
    """The teacher is inexact, and both denoisers see the same points, so the control variate cancels the gradient."""
    process, point, count = VPCosine(), numbers(1, 3), 64
    student, teacher = data_set_denoiser(process, point), GaussianDenoiser(process, 2.0, 0.1)
    for weight in (0.0, 1.0):
        auxiliary = Moved(teacher, torch.zeros(3, dtype=torch.float64, requires_grad=True))
        objective = Finishing(4, data_weight=weight)
        batch = Batch(point.expand(count, 3))
        objective.auxiliary_loss(models_of(student, teacher, auxiliary), batch, draw_for(count)).loss.sum().backward()
        assert auxiliary.by.grad is not None
        assert (float(auxiliary.by.grad.abs().max()) < 1e-9) == (weight == 1.0)


@every_process
@several_steps
def test_data_gets_the_noise_of_the_landing_points_whatever_the_student_returns(
    process: NoiseProcess, num_steps: int
) -> None:
    """For data of one point, the exact denoiser finds the noise in the samples that the auxiliary denoiser sees."""
    point, count = numbers(1, 3), 4000
    exact = data_set_denoiser(process, point)
    found = []
    for offset in (0.0, 0.3):
        seen = Watched(exact)
        student = Moved(exact, torch.full((count, 3), offset, dtype=torch.float64))
        batch = Batch(point.expand(count, 3))
        Finishing(num_steps).auxiliary_loss(models_of(student, exact, seen), batch, draw_for(count))
        (answer,) = seen.answers
        on_landing, on_data = answer.eps.chunk(2)
        assert torch.allclose(on_landing, on_data) == (offset == 0)
        found.append(on_data)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)
    assert scipy.stats.kstest(found[0].flatten().numpy(), "norm").pvalue > 1e-3


@every_process
def test_the_slope_of_a_landing_point_is_its_derivative(process: NoiseProcess) -> None:
    count, num_steps = 32, 4
    x_t, x0 = numbers(count, 1), numbers(count, 1, seed=2).requires_grad_()
    t = (1 + torch.arange(count, dtype=torch.float64) % num_steps) / num_steps
    step = Step(x_t, t, t - 1 / num_steps, {})
    denoised = Denoised(x0, eps_from_x0(x_t, x0, *process.alpha_sigma(t)))
    landing = noised_landing(denoised, process, step, draw_for(count), until=t, purpose="")
    (slope,) = torch.autograd.grad(landing.y.sum(), x0)
    torch.testing.assert_close(slope[:, 0], landing.slope)


@every_process
@several_steps
def test_for_a_student_that_follows_the_flow_nothing_is_left_to_do(process: NoiseProcess, num_steps: int) -> None:
    teacher, student = GaussianDenoiser(process, MEAN, STD), AffineStudent(process, num_steps)
    models = models_of(student, teacher, OptimalAuxiliary(student))
    for inside in (True, False):
        objective = Finishing(num_steps, inside_step=inside, whitened=False)
        assert float(objective.loss(models, gaussian_data(200), draw_for(200)).loss.max()) < 1e-18


@every_process
@several_steps
@pytest.mark.parametrize("shift", [-0.3, 0.2])
def test_a_shifted_student_is_pushed_back_at_every_sample(process: NoiseProcess, num_steps: int, shift: float) -> None:
    teacher, student = GaussianDenoiser(process, MEAN, STD), AffineStudent(process, num_steps, shift)
    moved = Moved(student, torch.zeros(200, 1, dtype=torch.float64, requires_grad=True))
    models = models_of(moved, teacher, OptimalAuxiliary(student), start=student)
    Finishing(num_steps, inside_step=True).loss(models, gaussian_data(200), draw_for(200)).loss.sum().backward()
    assert moved.by.grad is not None
    assert bool((moved.by.grad * shift > 0).all()), "descent must reduce the shift"


class Moved(Denoiser):
    """Another denoiser with its x0 moved by a differentiable amount."""

    def __init__(self, denoiser: Denoiser, by: Tensor) -> None:
        super().__init__()
        self.denoiser, self.process, self.by = denoiser, denoiser.process, by

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t, t, cond).x0 + self.by
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.alpha_sigma(t)))


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize(
    ("num_steps", "map_weight", "weight"), [(3, 0.0, 0.0), (3, 0.7, 0.7), (3, None, 1.5), (1, None, 0.75)]
)
def test_the_gradient_is_the_difference_of_the_two_denoisers_and_the_way_back_to_the_start(
    whitened: bool, num_steps: int, map_weight: float | None, weight: float
) -> None:
    count, process = 64, VPCosine()
    point = numbers(1, 3)
    real, own = (Watched(data_set_denoiser(process, point + offset)) for offset in (0.0, numbers(1, 3, seed=4)))
    before = data_set_denoiser(process, point - 0.1)
    student = Moved(before, (0.2 * numbers(count, 3, seed=2)).requires_grad_())
    models = models_of(student, real, own, before)
    objective = Finishing(num_steps, map_weight=map_weight, whitened=whitened)
    objective.loss(models, Batch(point.expand(count, 3)), draw_for(count)).loss.sum().backward()
    x0, direction = point - 0.1 + student.by, own.answers[0].x0 - real.answers[0].x0
    if whitened:
        direction = direction / ((x0 - real.answers[0].x0).abs().mean(1, keepdim=True) + 1e-3)
    torch.testing.assert_close(student.by.grad, (direction + 2 * weight * student.by) / 3, rtol=1e-9, atol=1e-12)


@every_process
@several_steps
@pytest.mark.parametrize("inside", [True, False])
def test_landing_points_get_as_much_noise_as_data_has_at_tau(
    process: NoiseProcess, num_steps: int, inside: bool
) -> None:
    """For data of one point, the exact student keeps the noise that was mixed in, so z has the process's noise."""
    point, count = numbers(1, 3), 4000
    exact = data_set_denoiser(process, point)
    student, seen = Watched(exact), Watched(exact)
    objective, batch = Finishing(num_steps, data_weight=0.0, inside_step=inside), Batch(point.expand(count, 3))
    objective.auxiliary_loss(models_of(student, exact, seen), batch, draw_for(count))
    (t,), (tau,) = student.times, seen.times
    assert scipy.stats.kstest(seen.answers[0].eps.flatten().numpy(), "norm").pvalue > 1e-3
    s = t - 1 / num_steps
    share = (tau - s) / ((t if inside else 1.0) - s)
    assert scipy.stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    kept = process.log_snr(tau) <= process.log_snr(s.clamp(min=1e-12))
    assert bool(kept.all()), "noise can only be added"


def test_the_noise_that_is_added_is_new() -> None:
    """Noise in proportion to that of x_s would have the right distribution at tau, but another score."""
    process, point, count = VPCosine(), numbers(1, 1), 20_000
    exact = data_set_denoiser(process, point)
    student, seen = Watched(exact), Watched(exact)
    models, batch = models_of(student, exact, seen), Batch(point.expand(count, 1))
    Finishing(4, data_weight=0.0).auxiliary_loss(models, batch, draw_for(count))
    (t,), (tau,) = student.times, seen.times
    s = t - 1 / 4
    late = s > 0
    k = process.alpha_sigma(tau)[0] / process.landing(s)[0]
    kept = k * process.landing(s)[1] / process.alpha_sigma(tau)[1]
    both = student.answers[0].eps[late, 0] * seen.answers[0].eps[late, 0] - kept[late]
    assert abs(float(both.mean() / (both.std() / math.sqrt(len(both))))) < 4


def test_data_does_not_count_where_it_differs_from_the_samples_of_a_guided_teacher() -> None:
    process, batch, draw = VPCosine(), gaussian_data(8), draw_for(8)
    guided = Finishing(2, guidance=FixedGuidance(3.0))
    seen = Watched(GaussianDenoiser(process, MEAN, STD))
    student = AffineStudent(process, 2)
    guided.auxiliary_loss(models_of(student, student, seen), batch, draw)
    assert [len(answer.x0) for answer in seen.answers] == [8]
    assert len(guided.turns(1000)) == 3
    assert dataclasses.replace(guided, data_weight=0.0).evals == guided.evals
    with pytest.raises(ValueError, match="data_weight 1 would pull the student away from its guided teacher"):
        dataclasses.replace(guided, data_weight=1.0)


def test_the_auxiliary_learns_first_and_then_before_each_turn_of_the_student() -> None:
    objective = Finishing(2, auxiliary_turns=3, lead_updates=5)
    assert [[turn.trains for turn in objective.turns(update)] for update in (0, 4, 5, 99)] == [
        ["auxiliary"] * 3,
        ["auxiliary"] * 3,
        ["auxiliary"] * 3 + [STUDENT],
        ["auxiliary"] * 3 + [STUDENT],
    ]
    own = dataclasses.replace(FINISHING, learning_rate=2e-4)
    training = objective.helpers["auxiliary"].training(own)  # type: ignore[union-attr]
    assert (training.rate_at(0), training.rate_at(own.num_updates - 1)) == pytest.approx((30e-4, 30e-4))
    assert training.adam_betas == own.adam_betas


@pytest.mark.parametrize("data_weight", [0.0, 1.0])
def test_costs_count_every_call_of_an_update(data_weight: float) -> None:
    """Compare with the calls that are made: forward passes, and backward passes of each trained network."""
    objective = Finishing(2, data_weight=data_weight, auxiliary_turns=3)
    batch, draw = gaussian_data(8), draw_for(8)
    process = VPCosine()
    called = {
        name: Watched(GaussianDenoiser(process, MEAN, STD)) for name in (STUDENT, "teacher", "auxiliary", "start")
    }
    models = models_of(called[STUDENT], called["teacher"], called["auxiliary"], called["start"])
    turns = objective.turns(1000)
    for turn in turns:
        turn.loss(models, batch, draw)
    for name, evals in objective.evals.items():
        assert evals.forward == sum(len(answer.x0) for answer in called[name].answers) / 8
        own = [turn.trains for turn in turns].count(name)
        assert evals.backward == own * (2 if data_weight and name == "auxiliary" else 1)


def test_a_finish_starts_from_the_student_of_its_steps_and_learns_from_the_last_undistilled_model() -> None:
    teacher, matched = Outcome(Role.TEACHER), Outcome(Role.MATCHED)
    students = [Outcome(Role.STUDENT, steps) for steps in (8, 4, 2)]
    models = [teacher, matched, *students, Outcome(Role.STUDENT, 4)]
    assert parents_of(Finishing(8), models) == Parents(start=2, teacher=1)
    assert parents_of(Finishing(4), models) == Parents(start=5, teacher=1)
    assert parents_of(Halving(2), models) == Parents(start=5, teacher=5)
    assert parents_of(Denoising(), []) is None
    with pytest.raises(ValueError, match="refines a 3-step student, but the students before it take 8, 4, 2"):
        parents_of(Finishing(3), models)
    with pytest.raises(ValueError, match="no student before it samples"):
        parents_of(Finishing(3), [teacher])
    with pytest.raises(ValueError, match="learns from an undistilled teacher"):
        parents_of(Finishing(8), students)


def test_only_students_that_take_the_steps_of_a_stage_are_refined_and_teach() -> None:
    """An ancestral student has no map that DDIM's steps would follow, and a student is only valid at its own times."""
    teacher, ancestral = Outcome(Role.TEACHER), MomentMatching(4).outcome
    with pytest.raises(ValueError, match="no student before it samples with DDIM"):
        parents_of(Finishing(4), [teacher, ancestral])
    assert parents_of(Finishing(4), [teacher, Outcome(Role.STUDENT, 4), ancestral]) == Parents(start=1, teacher=0)
    for models, halving in (
        ([teacher, ancestral], Halving(2)),
        ([teacher, Outcome(Role.STUDENT, 4)], Halving(2, 3)),
        ([teacher, Outcome(Role.STUDENT, 4)], Halving(2, teacher_sampler=Heun())),
    ):
        for objective in (halving, Adversarial(halving)):
            with pytest.raises(ValueError, match=r"distilled for 4 steps of \w+ and can take no others"):
                parents_of(objective, models)
    assert parents_of(Halving(2, 3, teacher_sampler=Heun()), [teacher]) == Parents(0, 0)


def test_guidance_that_a_teacher_has_learned_reaches_every_student_of_the_plan() -> None:
    training = Training(2, 1e-3)
    plan = (
        Plan.of(Matching(), training)
        + Plan.halvings(4, 1, training, updates_at={})
        + Plan.finishes([2, 1], training, lambda number: Finishing(number, lead_updates=0))
    )
    guided = plan.guided(FixedGuidance(3.0))
    assert [stage.objective.guidance for stage in guided.stages] == [None] + [FixedGuidance(3.0)] * 4
    assert plan.guided(None) == plan


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "at least 1"),
        ({"map_weight": -1.0}, "map_weight must be finite and at least 0"),
        ({"map_weight": math.nan}, "map_weight must be finite"),
        ({"data_weight": 1.5}, "data_weight must be at most 1, got 1.5"),
        ({"data_weight": -0.1}, "data_weight must be a finite number of at least 0"),
        ({"data_weight": math.nan}, "data_weight must be a finite number"),
        ({"data_weight": "1"}, "data_weight must be a finite number"),
        ({"auxiliary_turns": 0}, "auxiliary_turns must be a whole number of at least 1"),
        ({"auxiliary_rate": 0.0}, "auxiliary_rate must be a finite number above 0"),
        ({"lead_updates": -1}, "lead_updates must be a whole number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Finishing(**{"num_steps": 4, **wrong})  # type: ignore[arg-type]


def test_a_finish_that_would_not_train_its_student_is_refused() -> None:
    lead = Finishing(4, lead_updates=60)
    assert Stage(lead, Training(61, 1e-4)).num_steps == 4
    with pytest.raises(
        ValueError, match="a stage of Finishing ends before its student's first turn, because num_updates is 60"
    ):
        Stage(lead, Training(60, 1e-4))


def test_a_student_is_finished_once() -> None:
    with pytest.raises(ValueError, match="finished only once, got 4, 4"):
        Plan.finishes([4, 4])


def test_only_the_first_student_learns_from_another_sampler() -> None:
    from halfstep.samplers import DDIM, Heun

    plan = Plan.halvings(16, 2, teacher_sampler=Heun(), teacher_steps=3)
    found = [stage.objective for stage in plan.stages]
    kinds = [(h.num_steps, h.num_teacher_steps, h.teacher_sampler) for h in found if isinstance(h, Halving)]
    assert kinds == [(8, 3, Heun()), (4, 2, DDIM()), (2, 2, DDIM())]
    objective: Objective = Stage(found[0], Training(1, 1.0)).objective
    assert objective.evals["teacher"].forward == 6
