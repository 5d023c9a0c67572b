"""Consistency: its target is halving's, its fixed point is the exact flow, and its anchor is the teacher."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser, Guided, NetworkDenoiser
from halfstep.core.draw import Asked, Draw
from halfstep.core.noise import FlowMatching, NoiseProcess, VPCosine, per_sample, processes
from halfstep.core.oracle import GaussianDenoiser, data_set_denoiser
from halfstep.core.prediction import Constant, Denoised, V, eps_from_x0
from halfstep.data import MemoryData, training_batch
from halfstep.nets import MLP, copy_denoiser
from halfstep.objectives import (
    Average,
    Batch,
    Consistency,
    FixedGuidance,
    GuidanceRange,
    Models,
    PseudoHuber,
    Squared,
    Stage,
    Training,
    consistency_target,
    halving_target,
    loss_metrics,
    objectives,
)
from halfstep.runtime.processes import make_accelerator
from halfstep.samplers import DDIM, Ancestral, Heun, Sampler, samplers
from halfstep.train.engine import StageTrainer
from support import (
    Watched,
    clock,
    gaussian,
    in_turn,
    members,
    members_and_further_processes,
    mixture,
    numbers,
    toy_denoiser,
    variants,
)
from toys import points

every_process = pytest.mark.parametrize("process", members(processes))
every_process_or_further = pytest.mark.parametrize("process", members_and_further_processes())
every_deterministic = pytest.mark.parametrize(
    "sampler", [parameter for parameter in variants() if not parameter.values[0].stochastic]
)
FINE = 24
"""Size of the teacher's grid in tests of all its times."""


def edges(num_steps: int, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return all times of the grid: t, s and the boundary of the segment."""
    index = torch.arange(grid, dtype=torch.float64)
    return (index + 1) / grid, index / grid, (index // (grid // num_steps)) / num_steps


def noisy(process: NoiseProcess, t: Tensor, *dims: int) -> Tensor:
    return process.mix(0.5 * numbers(len(t), *dims), numbers(len(t), *dims, seed=1), t)


def draw_for(size: int = 64, update: int = 3) -> Draw:
    return Draw(seed=11, stream="stage", update=update, batch_size=size, places=range(size))


class Away(Denoiser):
    """A denoiser that returns NaN."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        return Denoised(torch.full_like(x_t, math.nan), torch.full_like(x_t, math.nan))


class FlowMap(Denoiser):
    """The exact student of N steps: one DDIM step from t ends at a Gaussian's flow at the segment's boundary.

    `shift`, its only parameter, is added to its x0.
    """

    def __init__(self, exact: GaussianDenoiser, num_steps: int) -> None:
        super().__init__()
        self.exact, self.process, self.num_steps = exact, exact.process, num_steps
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        end = ((t * self.num_steps - 1e-9).ceil() - 1) / self.num_steps
        alpha_t, sigma_t = self.process.alpha_sigma(t)
        alpha_s, sigma_s = self.process.landing(end)
        q = sigma_s / sigma_t
        landed = self.exact.flow(x_t, t, end)
        x0 = (landed - per_sample(q, x_t) * x_t) / per_sample(alpha_s - q * alpha_t, x_t) + self.shift
        return Denoised(x0, eps_from_x0(x_t, x0, alpha_t, sigma_t))


@every_process_or_further
@in_turn("num_steps", [1, 2, 4, 64])
@torch.no_grad()
def test_with_the_teacher_as_student_and_two_times_a_step_it_is_the_halving_target(
    process: NoiseProcess, num_steps: int
) -> None:
    """Start from the beginning of each step. From its middle, one teacher step remains, and the target is its x0."""
    t, s, boundary = edges(num_steps, 2 * num_steps)
    teacher, x_t = toy_denoiser(process, V()), noisy(process, t, 2)
    target = consistency_target(teacher, teacher, x_t, t, s, boundary)
    torch.testing.assert_close(
        target[1::2], halving_target(teacher, x_t[1::2], t[1::2], boundary[1::2]), rtol=1e-14, atol=1e-14
    )
    assert torch.equal(target[::2], teacher(x_t[::2], t[::2]).x0)


@every_process_or_further
@every_deterministic
@torch.no_grad()
def test_one_ddim_step_lands_where_the_teacher_s_step_and_the_student_s_do(
    process: NoiseProcess, sampler: Sampler
) -> None:
    t, s, boundary = (0.95 * times for times in edges(4, FINE))
    teacher, student = toy_denoiser(process, V(), seed=1), toy_denoiser(process, V(), seed=2)
    x_t = noisy(process, t, 2)
    x0 = consistency_target(teacher, student, x_t, t, s, boundary, sampler=sampler)
    for row, (start, middle, end) in enumerate(zip(t.tolist(), s.tolist(), boundary.tolist(), strict=True)):
        x = x_t[row : row + 1]
        expected, _ = sampler.step(teacher, x, start, middle, None, None)
        if middle > end:
            expected, _ = DDIM().step(student, expected, middle, end, None, None)
        target = x0[row : row + 1]
        alpha, sigma = process.landing(clock(end))
        landed = alpha * target + sigma * eps_from_x0(x, target, *process.alpha_sigma(clock(start)))
        torch.testing.assert_close(landed, expected, rtol=1e-9, atol=1e-9)


@every_process_or_further
@torch.no_grad()
def test_the_student_is_ignored_if_the_teachers_step_ends_on_the_boundary(process: NoiseProcess) -> None:
    """The student's prediction is ignored there, finite or not; at every other time it counts."""
    t, s, boundary = edges(4, FINE)
    teacher, x_t = toy_denoiser(process, V()), noisy(process, t, 2)
    target = consistency_target(teacher, Away(process), x_t, t, s, boundary)
    anchored = s == boundary
    assert anchored.tolist() == [index % (FINE // 4) == 0 for index in range(FINE)]
    assert torch.equal(target[anchored], teacher(x_t, t).x0[anchored])
    assert bool(target[~anchored].isnan().all())


@every_process
def test_the_anchor_holds_in_training_and_the_student_is_called_at_no_time_0(process: NoiseProcess) -> None:
    teacher, student = toy_denoiser(process, V(), seed=1), Watched(toy_denoiser(process, V(), seed=2))
    objective = Consistency(4, 8, 8, weighting=Constant())
    whole = objective.loss(Models(student, teacher), Batch(0.5 * numbers(64, 2)), draw_for())
    reference, learning = student.times
    assert bool((reference > 0).all())
    anchored = (learning * 8).round() % 2 == 1
    x_t = process.mix(*student.answers[1], learning)
    error = (student.answers[1].x0 - teacher(x_t, learning).x0).square().mean(1)
    torch.testing.assert_close(whole.loss[anchored], error[anchored], rtol=1e-9, atol=1e-12)
    assert 16 < int(anchored.sum()) < 48


def order_of(process: NoiseProcess, sampler: Sampler, num_steps: int) -> float:
    """Return the order in 1 / T of the largest difference between the target and the exact student, over all edges of
    the grid, from T = 256 to 1024."""
    exact = gaussian(process)
    student, largest = FlowMap(exact, num_steps), []
    for grid in (256, 1024):
        t, s, boundary = edges(num_steps, grid)
        x_t = exact.process.mix(torch.full((grid, 1), 0.9).double(), torch.full((grid, 1), -0.7).double(), t)
        target = consistency_target(exact, student, x_t, t, s, boundary, sampler=sampler)
        largest.append(float((target - student(x_t, t).x0).detach().abs().max()))
    return math.log(largest[0] / largest[1]) / math.log(4)


@pytest.mark.parametrize("process", [VPCosine(), FlowMatching(), FlowMatching(3.0)], ids=["cosine", "flow", "shifted"])
@pytest.mark.parametrize(
    ("sampler", "num_steps", "order"),
    [(DDIM(), 2, 1), (DDIM(), 4, 1), (DDIM(), 1, 2), (Heun(), 1, 2), (Heun(), 2, 2), (Heun(), 4, 2)],
)
def test_the_exact_flow_is_the_fixed_point_to_the_order_of_the_teacher_s_steps(
    process: NoiseProcess, num_steps: int, sampler: Sampler, order: int
) -> None:
    """A step's error has one more order, and the x0 of an anchor above 0 divides it by the step's width. The lowest
    segment has no such division, so DDIM gains an order if it is the only segment."""
    assert order_of(process, sampler, num_steps) == pytest.approx(order, abs=0.1)


@every_process
@pytest.mark.parametrize("shift", [0.3, -0.3])
def test_a_student_off_the_flow_is_pushed_back(process: NoiseProcess, shift: float) -> None:
    """The student is off by its full distance at the anchors, and by less or nothing elsewhere, where it is its own
    teacher."""
    exact = GaussianDenoiser(process, mean=0.3, std=0.5)
    student = Watched(FlowMap(exact, 4))
    (shifted,) = student.parameters()
    objective = Consistency(4, 64, 64, weighting=Constant(), teacher_sampler=Heun())

    def slopes(by: float) -> Tensor:
        with torch.no_grad():
            shifted.fill_(by)
        losses = objective.loss(Models(student, exact), Batch(0.3 + 0.5 * numbers(64, 1)), draw_for()).loss
        return torch.stack([torch.autograd.grad(loss, shifted, retain_graph=True)[0] for loss in losses])

    push = (slopes(shift) - slopes(0.0)) / (2 * shift)
    anchors = (student.times[-1] * 64).round() % 16 == 1
    assert bool(((push > -1e-9) & (push < 1 + 1e-9)).all())
    torch.testing.assert_close(push[anchors], torch.ones_like(push[anchors]), rtol=0, atol=1e-9)
    assert bool(anchors.any())
    # Between the anchors, the push is the share of the segment that the teacher's step covers: 0 in the lowest segment.
    assert bool((push[~anchors] < 0.9).all())
    assert float(slopes(shift).mean() * shift) > 0


@pytest.mark.parametrize(
    ("num_steps", "start", "end", "updates"), [(1, 64, 1280, 100_000), (4, 8, 1024, 50), (3, 96, 6, 7), (2, 50, 50, 0)]
)
def test_the_grid_grows_at_an_even_rate_in_its_logarithm(num_steps: int, start: int, end: int, updates: int) -> None:
    objective = Consistency(num_steps, start, end, **({"anneal_updates": updates} if updates else {}))
    assert objective.grid_steps(0) == start
    every = max(1, updates // 50)
    for update in range(0, updates + 3 * every, every):
        grid = objective.grid_steps(update)
        assert grid % num_steps == 0
        assert grid >= 2 * num_steps
        done = min(1.0, update / updates) if updates else 1.0
        exact = math.exp((1 - done) * math.log(start) + done * math.log(end))
        assert abs(grid - exact) <= num_steps / 2 + 1e-9 * exact
    assert objective.grid_steps(updates) == objective.grid_steps(10 * updates + 10) == end


@pytest.mark.parametrize("num_steps", [1, 3, 4])
def test_times_are_drawn_evenly_from_the_teacher_s_grid(num_steps: int) -> None:
    process = VPCosine()
    student = Watched(data_set_denoiser(process, numbers(1, 2)))
    objective = Consistency(num_steps, 24, 24)
    for update in range(40):
        objective.loss(Models(student, student.denoiser), Batch(numbers(64, 2)), draw_for(update=update))
    times, counts = torch.cat(student.times[1::2]).unique(return_counts=True)
    assert times.tolist() == [index / 24 for index in range(1, 25)]
    expected = 64 * 40 / 24
    # With 23 degrees of freedom, chi-squared stays below 49.7 in 999 of 1000 cases.
    assert float((counts - expected).square().sum()) / expected < 49.7


@in_turn("num_steps", [1, 3, 7, 24, 640])
def test_teacher_and_student_are_called_on_the_grid_to_the_last_bit(num_steps: int) -> None:
    """Rounding leaves no step empty and creates none of a rounding's width."""
    process = VPCosine()
    teacher, student = (Watched(data_set_denoiser(process, numbers(1, 2))) for _ in range(2))
    grid = 35 * num_steps
    Consistency(num_steps, grid, grid).loss(Models(student, teacher), Batch(numbers(256, 2)), draw_for(256))
    (asked,), (middle, t) = teacher.times, student.times
    index = (t * grid).round()
    assert torch.equal(asked, index / grid)
    assert torch.equal(t, asked)
    anchored = (index - 1) % 35 == 0
    assert torch.equal(middle[~anchored], (index - 1)[~anchored] / grid)


def test_draws_of_an_update_can_be_prepared_however_the_grid_grows() -> None:
    """The calls are those of every other update, and the losses depend only on the update's number."""
    process, x0 = VPCosine(), 0.5 * numbers(64, 2)
    models = Models(toy_denoiser(process, V(), seed=1), toy_denoiser(process, V(), seed=2))
    objective = Consistency(2, 4, 512, anneal_updates=10)
    asked: list[list[Asked]] = []
    for update in (0, 5, 20):
        draw = dataclasses.replace(draw_for(update=update), asked=[])
        loss = objective.loss(models, Batch(x0), draw).loss
        assert draw.asked is not None
        asked.append(draw.asked)
        ahead = draw_for(update=update).made_ahead(asked[0], lambda drawn: drawn)
        assert torch.equal(Consistency(2, 4, 512, anneal_updates=10).loss(models, Batch(x0), ahead).loss, loss)
        assert not ahead._ahead
    assert asked[0] == asked[1] == asked[2]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_both_passes_of_the_student_drop_the_same_and_the_next_batch_drops_others(dropout: float) -> None:
    network = MLP((2,), width=16, depth=1, dropout=dropout)
    dropped: list[Tensor] = []
    network.drop.register_forward_hook(lambda _layer, given, made: dropped.append(made == 0))
    student = NetworkDenoiser(network.train(), VPCosine(), V())
    teacher = NetworkDenoiser(MLP((2,), width=16, depth=1), VPCosine(), V()).eval()
    torch.manual_seed(0)
    for update in range(2):
        Consistency(2).loss(Models(student, teacher), Batch(numbers(32, 2).float()), draw_for(32, update))
    first, again, second, again_second = dropped
    assert bool(first.any()) == bool(dropout)
    assert torch.equal(first, again)
    assert torch.equal(second, again_second)
    assert torch.equal(first, second) == (not dropout)


def test_autocast_s_cache_keeps_the_gradient() -> None:
    """The pass without gradient comes first and casts the same weights."""
    student, teacher = (NetworkDenoiser(MLP((2,), width=16, depth=1), VPCosine(), V()) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        losses = Consistency(2).loss(Models(student, teacher), Batch(numbers(32, 2).float()), draw_for(32))
    losses.loss.mean().backward()
    grads = [p.grad for p in student.parameters()]
    assert all(grad is not None for grad in grads)
    assert any(bool(grad.any()) for grad in grads if grad is not None)


def test_the_average_replaces_the_student_in_predictions_and_only_the_student_learns() -> None:
    process = VPCosine()
    student, teacher, average = (Watched(toy_denoiser(process, V(), seed=seed)) for seed in (1, 2, 3))
    objective = Consistency(2, 8, 8, self_teacher=0.95)
    assert objective.helpers == {"reference": Average(0.95)}
    assert objective.evals.keys() == {"student", "teacher", "reference"}
    models = Models(student, teacher, {"reference": average})
    objective.loss(models, Batch(0.5 * numbers(64, 2)), draw_for()).loss.mean().backward()
    calls = {"student": len(student.times), "teacher": len(teacher.times), "reference": len(average.times)}
    assert calls == {name: evals.forward for name, evals in objective.evals.items()}
    assert all(p.grad is None for other in (teacher, average) for p in other.parameters())
    assert all(p.grad is not None for p in student.parameters())


@pytest.mark.parametrize("sampler", [each for each in members(samplers) if each.values[0].order > 1])
def test_a_sampler_of_higher_order_changes_the_target_or_is_refused(sampler: Sampler) -> None:
    if sampler.multistep:
        with pytest.raises(ValueError, match=r"^DPMSolverPP2M needs several steps in a row .*, such as Heun\(\)"):
            Consistency(2, teacher_sampler=sampler)
        return
    models = Models(toy_denoiser(VPCosine(), V(), seed=1), toy_denoiser(VPCosine(), V(), seed=2))
    losses = [
        Consistency(2, 8, 8, teacher_sampler=each).loss(models, Batch(numbers(64, 2)), draw_for()).loss
        for each in (sampler, DDIM())
    ]
    assert not torch.allclose(*losses, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "sampler", [each for each in variants() if not (each.values[0].stochastic or each.values[0].multistep)]
)
def test_an_update_calls_the_networks_as_often_as_it_says(sampler: Sampler) -> None:
    process = VPCosine()
    student, teacher = (Watched(mixture(process)) for _ in range(2))
    objective = Consistency(4, teacher_sampler=sampler)
    objective.loss(Models(student, teacher), Batch(0.5 * numbers(32, 2)), draw_for(32))
    assert {"student": len(student.times), "teacher": len(teacher.times)} == {
        name: evals.forward for name, evals in objective.evals.items()
    }
    assert bool((torch.stack(teacher.times) > 0).all())


def test_a_guided_teacher_is_guided_once_and_the_student_is_shown_the_scale() -> None:
    process, null = VPCosine(), {"class_labels": torch.tensor(10)}
    lcm = Consistency(
        1, 50, 50, weighting=Constant(), metric=PseudoHuber(1e-3), guidance=GuidanceRange(2, 8), guide_teacher=True,
        self_teacher=0.95,
    )  # fmt: skip
    raw = NetworkDenoiser(MLP((2,), num_classes=11, width=16, depth=1), process, V())
    student = lcm.start(raw)
    assert isinstance(student, NetworkDenoiser)
    assert student.network.guided
    assert lcm.start(student) is student
    seen = lcm.view(raw, student, null)
    assert isinstance(seen, Guided)
    assert lcm.evals["teacher"].forward == 2
    batch = Batch(numbers(32, 2).float(), {"class_labels": torch.arange(32) % 10})
    losses = lcm.loss(Models(student, seen, {"reference": copy_denoiser(student)}), batch, draw_for(32))
    losses.loss.mean().backward()
    learned = dataclasses.replace(lcm, guide_teacher=False)
    assert learned.view(student, student, null) is student
    assert learned.evals["teacher"].forward == 1


def test_the_boundary_scaling_of_lcm_is_the_identity_on_its_grid() -> None:
    """The claim of consistency.py: c_skip at the lowest of 50 times, timestep 20 of 1000, scaled by 10."""
    assert 0.5**2 / ((10 * 20) ** 2 + 0.5**2) < 6.3e-6


@pytest.mark.parametrize("metric", members(loss_metrics))
def test_a_loss_metric_rises_from_0_in_the_dtype_that_it_gets(metric: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        square = torch.tensor([0.0, 1e-12, 1e-6, 1.0, 1e8], dtype=dtype, requires_grad=True)
        loss = metric(square)
        assert loss.dtype == dtype
        assert loss[0] == 0
        assert bool((loss.diff() > 0).all())
        assert bool(torch.autograd.grad(loss.sum(), square)[0].isfinite().all())


def test_the_pseudo_huber_loss_is_the_norm_above_c_and_quadratic_below() -> None:
    error = torch.tensor([1e-7, 10.0], dtype=torch.float64)
    below, above = PseudoHuber(1e-3)(error**2).tolist()
    assert below == pytest.approx(1e-14 / 2e-3, rel=1e-6)
    assert above == pytest.approx(10.0 - 1e-3, rel=1e-6)


def test_the_metric_is_of_the_weighted_error() -> None:
    process = VPCosine()
    models = Models(toy_denoiser(process, V(), seed=1), toy_denoiser(process, V(), seed=2))
    squared, norm = (
        Consistency(2, metric=metric).loss(models, Batch(numbers(64, 2)), draw_for()).loss
        for metric in (Squared(), PseudoHuber(1e-9))
    )
    torch.testing.assert_close(norm, squared.sqrt(), rtol=1e-5, atol=1e-8)


def test_a_description_holds_all_settings() -> None:
    full = Consistency(
        2, 8, 64, 300, Constant(), PseudoHuber(1e-3), GuidanceRange(1, 4), True, Heun(), self_teacher=0.5
    )  # fmt: skip
    for objective in (full, Consistency(1), Consistency(4, guidance=FixedGuidance(3.0))):
        assert objectives.rebuild(objectives.describe(objective)) == objective
    assert objectives.describe(full)["type"] == "consistency"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_steps": 0}, "num_steps must be a whole number"),
        ({"num_steps": 4, "grid_start": 4}, "grid_start must be a whole number of at least 8, got 4"),
        ({"num_steps": 3}, "grid_start 64 is not a multiple of num_steps 3. Choose 66"),
        ({"num_steps": 4, "grid_end": 1281}, "grid_end 1281 is not a multiple of num_steps 4. Choose 1284"),
        ({"num_steps": 4, "anneal_updates": 0}, "anneal_updates must be a whole number of at least 1"),
        ({"num_steps": 1, "grid_end": 64, "anneal_updates": 9}, "anneal_updates 9 has no effect .* Remove it"),
        ({"num_steps": 4, "guide_teacher": True}, "guide_teacher has no effect without guidance. Add guidance"),
        ({"num_steps": 4, "teacher_sampler": Ancestral()}, "Ancestral draws noise"),
        ({"num_steps": 4, "self_teacher": 1.0}, r"self_teacher must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_setting_out_of_range_or_without_effect_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Consistency(**settings)


@pytest.mark.parametrize("times", [(0.5, 0.5, 0.25), (0.5, 0.25, 0.3), (0.5, 0.25, -0.1)])
def test_times_that_do_not_fall_to_the_boundary_are_refused(times: tuple[float, float, float]) -> None:
    teacher = mixture(VPCosine())
    with pytest.raises(ValueError, match="0 <= boundary <= s < t"):
        consistency_target(teacher, teacher, numbers(2, 2), *times)


def test_the_example_of_the_page_on_targets_runs() -> None:
    page = Path(__file__).parents[2] / "docs" / "pages" / "target.md"
    *_, example = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(example, names)
    (stage,) = names["plan"].stages
    assert stage.objective == Consistency(2, 64, 1280, 10_000, metric=PseudoHuber(), teacher_sampler=Heun())
    assert stage.num_steps == 2


def _trainer(objective: Consistency) -> StageTrainer:
    torch.manual_seed(0)
    teacher, student = (NetworkDenoiser(MLP((2,), width=16, depth=1), VPCosine(), V()) for _ in range(2))
    data = MemoryData("toy", points())
    return StageTrainer(
        student,
        teacher,
        Stage(objective, Training(12, 1e-2, 16, dropout=0.2, ema_decay=0.9)),
        lambda draw: training_batch(data, draw, False),
        data.shape,
        seed=0,
        stream="01-consistency-0002",
        accelerator=make_accelerator(cpu=True),
    )


@pytest.mark.parametrize("self_teacher", [0.0, 0.5])
def test_a_stage_that_is_cut_while_the_grid_grows_resumes_bit_for_bit(self_teacher: float) -> None:
    objective = Consistency(2, 4, 64, anneal_updates=10, self_teacher=self_teacher)
    whole = _trainer(objective)
    before = [p.clone() for p in whole.student.network.parameters()]
    held, results = None, []
    for update in whole.run():
        if update == 5:
            held = whole.state()
    assert held is not None
    resumed = _trainer(objective)
    resumed.load_state(held, 5, 0.0)
    list(resumed.run())
    for trainer in (whole, resumed):
        results.append(list(trainer.finish().parameters()))
    for ours, theirs, first in zip(*results, before, strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(ours, first)
