"""The halving target: the student's single step lands on the teacher's K steps, also in float32, and it is a mean."""

import itertools
import re
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser, ddim_step
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.oracle import data_set_denoiser
from halfstep.core.prediction import Denoised, FlowVelocity, Prediction, V, eps_from_x0, predictions
from halfstep.objectives import Batch, Halving, Models, halving_target
from halfstep.samplers import DDIM, Ancestral, Angle, DataPredictionSampler, DPMSolverPP2M, Heun, Sampler, samplers
from support import (
    FURTHER_PROCESSES,
    Landing,
    Watched,
    clock,
    even_amplitudes,
    gaussian,
    in_turn,
    landing_roundings,
    members,
    members_and_further_processes,
    mixture,
    numbers,
    skip_where_x0_is_undefined,
    step_width,
    toy_denoiser,
    variants,
)

every_process = pytest.mark.parametrize("process", members(processes))
every_process_or_further = pytest.mark.parametrize("process", members_and_further_processes())
every_process_and_prediction = pytest.mark.parametrize(
    ("process", "prediction"),
    [
        pytest.param(process.values[0], prediction.values[0], id=f"{process.id}-{prediction.id}")
        for processes_, predictions_ in [
            (members(processes), members(predictions)),
            (FURTHER_PROCESSES, [pytest.param(V(), id="v"), pytest.param(FlowVelocity(), id="flow_velocity")]),
        ]
        for process, prediction in itertools.product(processes_, predictions_)
    ],
)
every_k = in_turn("num_teacher_steps", [1, 2, 3, 4, 8])


def grid_steps(num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the start and end times of all steps of the student's grid."""
    index = torch.arange(num_steps, dtype=torch.float64)
    return (index + 1) / num_steps, index / num_steps


def noisy(process: NoiseProcess, t: Tensor, *dims: int) -> Tensor:
    """Return noisy samples `[len(t), *dims]` of data of unit scale."""
    return process.mix(0.5 * numbers(len(t), *dims), numbers(len(t), *dims, seed=1), t)


class Answers(Denoiser):
    """A teacher whose k-th call returns the k-th of the given samples, whatever its input."""

    def __init__(self, process: NoiseProcess, answers: Tensor) -> None:
        super().__init__()
        self.process = process
        self.left = list(answers)

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        x0 = self.left.pop(0).expand_as(x_t)
        return Denoised(x0, torch.zeros_like(x_t))


def weights_of(process: NoiseProcess, t: Tensor, s: Tensor, num_teacher_steps: int) -> Tensor:
    """Return the weight of each of the teacher's predictions, `[batch, num_teacher_steps]`.

    The teacher's k-th x0 is the k-th unit vector, so the target is the row of weights.
    """
    marked = torch.eye(num_teacher_steps, dtype=torch.float64)
    x_t = numbers(len(t), num_teacher_steps)
    return halving_target(Answers(process, marked), x_t, t, s, num_teacher_steps=num_teacher_steps)


@every_process_and_prediction
@every_k
@in_turn("num_steps", [1, 2, 4, 64, 4096])
@torch.no_grad()
def test_one_step_of_the_student_lands_where_the_teacher_s_steps_land(
    process: NoiseProcess, prediction: Prediction, num_teacher_steps: int, num_steps: int
) -> None:
    """Test every step of the grid, from t = 1 and to s = 0, with a teacher that is not an exact denoiser.

    The step shrinks an error of the target by about 1 / num_steps, so only landing within a few roundings is
    significant: those of the sums on the way, twice, for the student's own. For K = 3, the two call the teacher at
    times that agree only up to rounding. Its effect is 1e-13 where an x0 is divided by alpha = 0.006.
    """
    t, s = grid_steps(num_steps)
    teacher, x_t = toy_denoiser(process, prediction), noisy(process, t, 2)
    skip_where_x0_is_undefined(teacher)
    x0 = halving_target(teacher, x_t, t, s, num_teacher_steps=num_teacher_steps)
    student = Denoised(x0, eps_from_x0(x_t, x0, *process.alpha_sigma(t)))
    alpha, sigma = process.landing(s)
    landed = alpha[:, None] * student.x0 + sigma[:, None] * student.eps
    expected = Landing(teacher, num_steps, num_teacher_steps).landing(x_t, t)
    error = (landed - expected).abs()
    floor = 2e-13 if num_teacher_steps == 3 else 2e-14
    assert bool((error <= 2 * landing_roundings(teacher, x_t, t, s, num_teacher_steps) + floor).all())
    # Rounding errors grow with noise of 80 and with the number of steps; halving stays below this for every member.
    assert num_teacher_steps > 2 or float(error.max()) < 1e-9
    if even_amplitudes(process):
        assert bool((error <= 2e-13 * (1 + expected.abs())).all())


@every_process_or_further
@every_k
@in_turn("num_steps", [1, 2, 4, 64, 4096])
def test_the_target_is_the_x0_that_the_subtractive_formula_solves_for_in_float64(
    process: NoiseProcess, num_teacher_steps: int, num_steps: int
) -> None:
    """Solving divides by the width of a step: a rounding error of 1e-16 grows by a few times num_steps.

    The factor is larger for large samples, and where the angle falls fast in t and the steps near the data or the noise
    are shorter. The tolerance is therefore the rounding error of each sample's landing point, divided by the width of
    its step.
    """
    t, s = grid_steps(num_steps)
    teacher, x_t = mixture(process), noisy(process, t, 2)
    solved = Landing(teacher, num_steps, num_teacher_steps)(x_t, t).x0
    target = halving_target(teacher, x_t, t, s, num_teacher_steps=num_teacher_steps)
    error = (target - solved).abs()
    roundings = landing_roundings(teacher, x_t, t, s, num_teacher_steps)
    assert bool((error <= 2 * roundings / step_width(process, t, s) + 1e-14).all())
    if even_amplitudes(process):
        assert bool((error <= 2e-15 * num_steps + 1e-14).all())


@every_process_or_further
@given(
    num_teacher_steps=st.integers(1, 9),
    steps=st.lists(st.tuples(st.just(0.0) | st.floats(1e-3, 0.999), st.floats(1e-3, 1)), min_size=1, max_size=16),
)
def test_the_target_is_a_mean_of_the_teacher_s_predictions(
    process: NoiseProcess, num_teacher_steps: int, steps: list[tuple[float, float]]
) -> None:
    s = clock(*(start for start, _ in steps))
    t = s + (1 - s) * clock(*(share for _, share in steps))
    weights = weights_of(process, t, s, num_teacher_steps)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(len(t), dtype=torch.float64), rtol=0, atol=1e-14)
    # Only the last prediction counts if the step ends at clean data, and only there.
    last_alone = weights[:, -1] == 1
    assert torch.equal(last_alone, (s == 0) | torch.tensor(num_teacher_steps == 1))


@every_process
def test_the_last_step_of_the_student_aims_at_the_teacher_s_last_x0_itself(process: NoiseProcess) -> None:
    teacher, x_t = Watched(toy_denoiser(process, V())), numbers(5, 3)
    for num_steps, num_teacher_steps in [(1, 2), (4, 2), (4096, 2), (8, 3)]:
        target = halving_target(teacher, x_t, 1 / num_steps, 0.0, num_teacher_steps=num_teacher_steps)
        assert torch.equal(target, teacher.answers[-1].x0)


def test_short_steps_far_from_the_data_weight_the_two_predictions_equally() -> None:
    weights = weights_of(VPCosine(), clock(0.5, 0.9), clock(0.5 - 2**-13, 0.9 - 2**-13), 2)
    torch.testing.assert_close(weights, torch.full((2, 2), 0.5, dtype=torch.float64), rtol=0, atol=1e-3)


@every_process
@in_turn("num_steps", [2**k for k in range(13)])
@every_k
def test_the_teacher_is_called_exactly_on_its_own_grid(
    process: NoiseProcess, num_steps: int, num_teacher_steps: int
) -> None:
    """Times are multiples of 1 / (K num_steps): to the last bit if K is a power of two, otherwise up to rounding."""
    t, s = grid_steps(num_steps)
    teacher = Watched(gaussian(process))
    halving_target(teacher, noisy(process, t, 1), t, s, num_teacher_steps=num_teacher_steps)
    fine = num_steps * num_teacher_steps
    first = torch.arange(1, num_steps + 1) * num_teacher_steps
    assert len(teacher.times) == num_teacher_steps
    for k, asked in enumerate(teacher.times):
        wanted = (first - k).double() / fine
        torch.testing.assert_close(asked, wanted, rtol=0, atol=0 if num_teacher_steps in (1, 2, 4, 8) else 2e-16)


def teacher_of(kind: str, process: NoiseProcess) -> Denoiser:
    return {
        "gaussian": gaussian(process),
        "mixture": mixture(process),
        "network": toy_denoiser(process, V()),
    }[kind]


@every_process
@pytest.mark.parametrize("kind", ["gaussian", "mixture", "network"])
@torch.no_grad()
def test_the_float32_target_of_a_teacher_of_8192_steps_is_the_float64_one_to_1e_6(
    process: NoiseProcess, kind: str
) -> None:
    """Test the claim of samplers/ddim.py at every step of the student, including the first and the last."""
    t, s = grid_steps(4096)
    teacher, x_t = teacher_of(kind, process), noisy(process, t, 2).float()
    target = halving_target(teacher, x_t, t, s)
    assert target.dtype == torch.float32
    assert float((target - halving_target(teacher, x_t.double(), t, s)).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["gaussian", "mixture", "network"])
@torch.no_grad()
def test_the_subtractive_formula_in_float32_is_off_by_1e_3_to_1e_2(kind: str) -> None:
    """The other half of the claim, 2e-3: the reason not to solve for the target."""
    t, s = grid_steps(4096)
    teacher, x_t = teacher_of(kind, VPCosine()), noisy(VPCosine(), t, 2).float()
    solved = Landing(teacher, 4096)(x_t, t).x0
    assert solved.dtype == torch.float32
    assert 1e-3 < float((solved - halving_target(teacher, x_t.double(), t, s)).abs().max()) < 1e-2


@every_process
def test_one_teacher_step_is_no_distillation(process: NoiseProcess) -> None:
    t, s = grid_steps(8)
    teacher, x_t = mixture(process), noisy(process, t, 2)
    assert torch.equal(halving_target(teacher, x_t, t, s, num_teacher_steps=1), teacher(x_t, t).x0)


@every_process
@every_k
def test_a_teacher_that_is_already_consistent_is_its_own_target(process: NoiseProcess, num_teacher_steps: int) -> None:
    """On data of one point, every number of steps lands at the same point."""
    point = numbers(1, 3)
    t, s = grid_steps(16)
    x_t = noisy(process, t, 3)
    target = halving_target(data_set_denoiser(process, point), x_t, t, s, num_teacher_steps=num_teacher_steps)
    torch.testing.assert_close(target, point.expand(16, 3), rtol=0, atol=1e-14)


@every_process
def test_halving_a_halved_teacher_is_quartering(process: NoiseProcess) -> None:
    """Two successive stages with K = 2 and perfect students end where one stage with K = 4 does."""
    t, s = grid_steps(16)
    teacher, x_t = mixture(process), noisy(process, t, 2)
    twice = halving_target(Landing(teacher, 32), x_t, t, s)
    torch.testing.assert_close(halving_target(teacher, x_t, t, s, num_teacher_steps=4), twice, rtol=0, atol=1e-12)


def test_one_time_for_all_is_that_time_for_each() -> None:
    teacher, x_t = mixture(VPCosine()), numbers(5, 2)
    each = halving_target(teacher, x_t, clock(*[0.5] * 5), clock(*[0.25] * 5))
    assert torch.equal(halving_target(teacher, x_t, 0.5, 0.25), each)


def test_the_target_carries_no_gradient_and_conditions_reach_the_teacher() -> None:
    heard: list[Cond | None] = []

    class Listening(Denoiser):
        process = VPCosine()

        def __init__(self) -> None:
            super().__init__()
            self.inner = toy_denoiser(VPCosine(), V())

        def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
            heard.append(cond)
            return self.inner(x_t, t)

    cond = {"class_labels": torch.tensor([1, 2])}
    assert not halving_target(Listening(), numbers(2, 2).requires_grad_(), 0.5, 0.25, cond).requires_grad
    assert len(heard) == 2
    assert all(each is cond for each in heard)


@pytest.mark.parametrize(
    ("t", "s"),
    [
        (0.5, 0.5),
        (0.5, 0.6),
        (0.5, -0.1),
        (0.0, 0.0),
        ([0.5, 0.5], [0.4, 0.5]),
        ([0.5, 0.5], [-1e-9, 0.4]),
        (0.5, nan),
        (nan, 0.5),
    ],
)
def test_a_step_that_does_not_go_down_to_0_or_above_is_refused(t: float | list[float], s: float | list[float]) -> None:
    with pytest.raises(ValueError, match="0 <= s < t"):
        halving_target(mixture(VPCosine()), numbers(2, 2), torch.tensor(t).double(), torch.tensor(s).double())


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_fewer_than_one_teacher_step_is_refused(count: float) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        halving_target(mixture(VPCosine()), numbers(2, 2), 0.5, 0.25, num_teacher_steps=count)  # type: ignore[arg-type]


def test_a_whole_trajectory_of_perfect_students_is_the_teacher_s_trajectory() -> None:
    """Four steps of a student that hits every target pass through every other point of the teacher's eight."""
    process = VPCosine()
    teacher, start = mixture(process), numbers(6, 2)
    x_teacher = x_student = start
    for index in range(4, 0, -1):
        t, m, s = (clock(value).expand(6) for value in (index / 4, index / 4 - 1 / 8, index / 4 - 1 / 4))
        x_teacher, _ = DDIM().step(teacher, x_teacher, t, m, None, None)
        x_teacher, _ = DDIM().step(teacher, x_teacher, m, s, None, None)
        student = Answers(process, halving_target(teacher, x_student, t, s)[None])
        x0 = student(x_student, t).x0
        alpha, sigma = process.landing(s)
        x_student = alpha[:, None] * x0 + sigma[:, None] * eps_from_x0(x_student, x0, *process.alpha_sigma(t))
        torch.testing.assert_close(x_student, x_teacher, rtol=0, atol=1e-13)


every_deterministic = pytest.mark.parametrize(
    "sampler", [parameter for parameter in variants() if not parameter.values[0].stochastic]
)
every_few = in_turn("num_teacher_steps", [1, 2, 3, 4])
NARROW: Final = VPCosine(-4.0, 4.0)
"""A process with less noise at t = 0 than at the stages of a step to clean data."""


def steps_of(process: NoiseProcess, sampler: Sampler, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return all steps from t = 1 to clean data, or from t = 0.95 if the coordinate is infinite at t = 1."""
    t, s = grid_steps(num_steps)
    no_signal = float(process.alpha_sigma(clock(1.0))[0]) == 0
    first = 0.95 if no_signal and not isinstance(getattr(sampler, "coordinate", Angle()), Angle) else 1.0
    return first * t, first * s


def landing(teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, num_teacher_steps: int, sampler: Sampler) -> Tensor:
    """Return the end of the teacher's steps for each sample alone, between times that are plain numbers."""
    rows = []
    for x, start, end in zip(x_t.split(1), t.tolist(), s.tolist(), strict=True):
        memory = None
        times = [start + (end - start) * (k / num_teacher_steps) for k in range(num_teacher_steps)]
        for here, there in itertools.pairwise([*times, end]):
            x, memory = sampler.step(teacher, x, here, there, None, memory)
        rows.append(x)
    return torch.cat(rows)


@every_process_or_further
@every_deterministic
@every_few
@in_turn("num_steps", [1, 3])
@torch.no_grad()
def test_one_ddim_step_of_the_student_lands_where_the_teachers_steps_with_any_sampler_land(
    process: NoiseProcess, sampler: Sampler, num_teacher_steps: int, num_steps: int
) -> None:
    """Test steps from t = 1, between interior times and to clean data in one batch; to 1e-9 of the sample's size."""
    teacher = toy_denoiser(process, V())
    t, s = steps_of(process, sampler, num_steps)
    x_t = noisy(process, t, 2)
    x0 = halving_target(teacher, x_t, t, s, None, num_teacher_steps, sampler)
    landed = ddim_step(Denoised(x0, eps_from_x0(x_t, x0, *process.alpha_sigma(t))), process, s)
    expected = landing(teacher, x_t, t, s, num_teacher_steps, sampler)
    size = torch.maximum(expected.abs(), x_t.abs()).clamp(min=1)
    assert bool(((landed - expected).abs() <= 1e-9 * size).all())


@every_process_or_further
@every_deterministic
@torch.no_grad()
def test_the_target_of_a_sample_does_not_depend_on_its_batch(process: NoiseProcess, sampler: Sampler) -> None:
    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        return torch.sin(2 * x_t + 3 * time[:, None]) + shift

    teacher = NetworkDenoiser(network, process, V())
    t, s = steps_of(process, sampler, 6)
    x_t, cond = noisy(process, t, 2), {"shift": numbers(6, 1, seed=2)}
    together = halving_target(teacher, x_t, t, s, cond, 2, sampler)
    for row in range(6):
        part = slice(row, row + 1)
        alone = halving_target(teacher, x_t[part], t[part], s[part], {"shift": cond["shift"][part]}, 2, sampler)
        torch.testing.assert_close(together[part], alone, rtol=1e-10, atol=1e-10)


@every_process_or_further
@every_deterministic
@in_turn("kind", ["mixture", "network"])
@in_turn("num_steps", [64, 4096])
@torch.no_grad()
def test_the_float32_target_of_any_sampler_is_the_float64_one_to_1e_5(
    process: NoiseProcess, sampler: Sampler, kind: str, num_steps: int
) -> None:
    t, s = steps_of(process, sampler, num_steps)
    teacher, x_t = teacher_of(kind, process), noisy(process, t, 2).float()
    target = halving_target(teacher, x_t, t, s, None, 2, sampler)
    assert target.dtype == torch.float32
    assert float((target - halving_target(teacher, x_t.double(), t, s, None, 2, sampler)).abs().max()) < 1e-5


def ddim_by_hand(process: NoiseProcess, x_t: Tensor, found: list[Tensor], times: Tensor) -> Tensor:
    """Take a DDIM step: x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0."""
    alpha, sigma = (a[:, None, None] for a in process.alpha_sigma(times))
    q = sigma[-1] / sigma[-2]
    return q * x_t + (alpha[-1] - q * alpha[-2]) * found[-1]


def dpmpp_2m_by_hand(process: NoiseProcess, x_t: Tensor, found: list[Tensor], times: Tensor) -> Tensor:
    """Take a step of algorithm 2 of Lu et al. 2022 (arXiv:2211.01095), with lambda = log(alpha / sigma)."""
    alpha, sigma = (a[:, None, None] for a in process.alpha_sigma(times))
    h = (alpha / sigma).log().diff(dim=0)
    d = found[-1]
    if len(found) > 1:
        r = h[-2] / h[-1]
        d = (1 + 1 / (2 * r)) * found[-1] - 1 / (2 * r) * found[-2]
    return sigma[-1] / sigma[-2] * x_t - alpha[-1] * torch.expm1(-h[-1]) * d


BY_HAND: Final[dict[type[Sampler], Callable[..., Tensor]]] = {DDIM: ddim_by_hand, DPMSolverPP2M: dpmpp_2m_by_hand}


@every_process
@pytest.mark.parametrize("sampler", [each for each in variants() if isinstance(each.values[0], DataPredictionSampler)])
def test_the_effective_prediction_makes_a_ddim_step_of_the_method_s_own(
    process: NoiseProcess, sampler: DataPredictionSampler
) -> None:
    """Three steps agree with the published formula, and the effective prediction splits x_t like any other."""
    teacher, memory = mixture(process), None
    times, found = clock(0.9, 0.7, 0.45, 0.25), []
    x_t = noisy(process, times[:1].expand(5), 2)
    for k in range(3):
        here, there = times[k].expand(5), times[k + 1].expand(5)
        found.append(teacher(x_t, here).x0)
        stepped, _ = sampler.step(teacher, x_t, here, there, None, memory)
        effective, memory = sampler.effective(teacher, x_t, here, there, None, memory)
        torch.testing.assert_close(process.mix(*effective, here), x_t, rtol=1e-13, atol=1e-13)
        wanted = BY_HAND[type(sampler)](process, x_t, found, times[: k + 2])
        x_t = ddim_step(effective, process, there)
        torch.testing.assert_close(x_t, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(stepped, x_t, rtol=0, atol=0)


@every_deterministic
@in_turn("num_teacher_steps", [2, 3, 4])
@pytest.mark.parametrize("process", [VPCosine(), NARROW], ids=["vp_cosine", "narrow"])
def test_an_update_calls_the_teacher_as_often_as_it_says_and_never_at_time_0(
    process: NoiseProcess, sampler: Sampler, num_teacher_steps: int
) -> None:
    teacher, exact = Watched(mixture(process)), mixture(process)
    objective = Halving(4, num_teacher_steps, teacher_sampler=sampler)
    objective.loss(Models(exact, teacher), Batch(0.5 * numbers(32, 2)), Draw(0, "stage", 0, 32, range(32)))
    assert len(teacher.times) == objective.evals["teacher"].forward
    times = torch.stack(teacher.times)
    assert times.shape == (objective.evals["teacher"].forward, 32)
    assert bool(((times > 0) & (times <= 1)).all())


def test_a_teacher_that_draws_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^Ancestral draws noise, .*Choose a deterministic sampler"):
        halving_target(mixture(VPCosine()), numbers(2, 2), 0.5, 0.25, sampler=Ancestral())
    with pytest.raises(ValueError, match=r"^Ancestral draws noise, .*Choose a deterministic sampler"):
        Halving(4, teacher_sampler=Ancestral())


@pytest.mark.parametrize("sampler", [each for each in members(samplers) if each.values[0].order > 1])
@in_turn("num_teacher_steps", [1, 2, 3])
@in_turn("num_steps", [1, 2])
@torch.no_grad()
def test_a_sampler_of_higher_order_changes_the_target_or_is_refused(
    sampler: Sampler, num_teacher_steps: int, num_steps: int
) -> None:
    def build() -> Halving:
        return Halving(num_steps, num_teacher_steps, teacher_sampler=sampler)

    if sampler.multistep and num_teacher_steps < (3 if num_steps == 1 else 2):
        with pytest.raises(
            ValueError, match=r" needs at least [23] teacher steps .* DDIM, got [12]\. Take more teacher"
        ):
            build()
        return
    models = Models(toy_denoiser(VPCosine(), V(), seed=3), toy_denoiser(VPCosine(), V()))
    batch, draw = Batch(0.5 * numbers(32, 2)), Draw(0, "stage", 0, 32, range(32))
    losses = [each.loss(models, batch, draw).loss for each in (build(), Halving(num_steps, num_teacher_steps))]
    assert not torch.allclose(*losses, rtol=1e-6, atol=0)


def test_the_teacher_s_sampler_is_ddim_unless_another_is_named() -> None:
    teacher, (t, s) = mixture(VPCosine()), grid_steps(4)
    x_t = noisy(VPCosine(), t, 2)
    assert torch.equal(halving_target(teacher, x_t, t, s), halving_target(teacher, x_t, t, s, sampler=DDIM()))
    assert Halving(4).teacher_sampler == DDIM()
    losses = [
        Halving(4, teacher_sampler=sampler)
        .loss(Models(teacher, teacher), Batch(0.5 * numbers(8, 2)), Draw(0, "stage", 0, 8, range(8)))
        .loss
        for sampler in (DDIM(), Heun())
    ]
    assert not bool((losses[0] == losses[1]).any())


def test_the_example_of_the_page_on_targets_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "pages" / "target.md"
    example, *_ = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names = {"teacher": mixture(VPCosine()), "x_t": numbers(3, 2)}
    exec(example, names)
    assert torch.equal(names["target"], halving_target(names["teacher"], names["x_t"], 0.5, 0.25, sampler=Heun()))
    assert names["objective"] == Halving(4, teacher_sampler=DPMSolverPP2M())
