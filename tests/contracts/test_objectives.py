"""Contracts of every objective in each turn: 0 at its own map, gradients for one player only, independent of splits."""

import dataclasses

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.oracle import data_set_denoiser
from halfstep.core.prediction import X0, Constant, Denoised, Prediction, V, Weighting, predictions, weightings
from halfstep.nets import copy_denoiser
from halfstep.objectives import (
    STUDENT,
    Adversarial,
    Auxiliary,
    Batch,
    Denoising,
    Finishing,
    GuidanceRange,
    Halving,
    Losses,
    Matching,
    Models,
    Objective,
    objectives,
)
from support import (
    Landing,
    Watched,
    even_amplitudes,
    in_turn,
    landing_roundings,
    members,
    mixture,
    numbers,
    skip_where_x0_is_undefined,
    step_width,
    toy_denoiser,
)

every_objective = pytest.mark.parametrize("objective", members(objectives))
every_process = pytest.mark.parametrize("process", members(processes))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))
every_weighting = pytest.mark.parametrize("weighting", members(weightings))

SIZE = 96
LATE = 10**6
"""An update in which every player has its turns."""


def draw_for(places: range = range(SIZE), update: int = 3) -> Draw:
    return Draw(seed=11, stream="stage", update=update, batch_size=SIZE, places=places)


def data(count: int = SIZE) -> Tensor:
    return 0.5 * numbers(count, 3)


def with_helpers(objective: Objective, student: Denoiser, teacher: Denoiser) -> Models:
    """Return the models of a stage before its first update."""
    models, made = Models(student, teacher), dict[str, nn.Module]()
    for name, helper in objective.helpers.items():
        made[name] = helper.start(models, (3,)) if isinstance(helper, Auxiliary) else copy_denoiser(student)
    return Models(student, teacher, made)


def toy_models(objective: Objective, process: NoiseProcess, prediction: Prediction) -> Models:
    """Return a student, a teacher and helpers that differ and could all be trained."""
    models = with_helpers(
        objective, toy_denoiser(process, prediction, seed=1), toy_denoiser(process, prediction, seed=2)
    )
    with torch.no_grad():
        for place, helper in enumerate(models.helpers.values()):
            for parameter in helper.parameters():
                parameter += 0.3 * numbers(*parameter.shape, seed=3 + place)
    return models


class OffWhereItLearns(Denoiser):
    """One denoiser in passes with gradient, another in passes without."""

    def __init__(self, exact: Denoiser, off: Denoiser) -> None:
        super().__init__()
        self.process, self.exact, self.off = exact.process, exact, off

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        return (self.off if torch.is_grad_enabled() else self.exact)(x_t, t, cond)


@every_objective
@every_process
def test_the_loss_is_0_for_the_exact_denoiser_of_data_of_one_point(process: NoiseProcess, objective: Objective) -> None:
    """On data of one point, every target is the point, for any teacher and any number of its steps.

    The score matching loss of a helper is nowhere 0, because its target is the drawn noise, not the mean.
    """
    point = numbers(1, 3)
    exact = data_set_denoiser(process, point)
    if isinstance(objective, Adversarial):
        pytest.skip("a critic that cannot decide costs log 2 (see test_critic.py)")
    models = with_helpers(objective, exact, exact)
    for turn in objective.turns(LATE):
        if turn.trains != STUDENT and isinstance(objective, Finishing):
            continue
        result = turn.loss(models, Batch(point.expand(SIZE, 3)), draw_for())
        # Errors of one rounding, 1e-16, in x0, with the largest weight of any weighting, e^20 + 1.
        assert float((result.loss / (result.log_snr.exp() + 1)).max()) < 1e-30


@every_objective
@every_process
@every_prediction
def test_gradient_reaches_the_player_whose_turn_it_is_and_nothing_else(
    process: NoiseProcess, prediction: Prediction, objective: Objective
) -> None:
    for turn in objective.turns(LATE):
        models, batch = toy_models(objective, process, prediction), Batch(data().requires_grad_())
        skip_where_x0_is_undefined(models.student)
        turn.loss(models, batch, draw_for()).loss.mean().backward()
        assert models.teacher is not None
        players = {STUDENT: models.student, "teacher": models.teacher, **models.helpers}
        grads = [parameter.grad for parameter in players.pop(turn.trains).parameters()]
        assert all(grad is not None and bool(torch.isfinite(grad).all()) and bool(grad.any()) for grad in grads)
        for name, other in players.items():
            if name != "critic":  # The student's gradient passes through it; the engine drops its own (test_critic.py).
                assert all(parameter.grad is None for parameter in other.parameters()), (turn.trains, name)


@every_objective
@every_prediction
@given(cut=st.integers(1, SIZE - 1))
def test_parts_of_a_batch_have_the_losses_that_they_have_in_the_whole(
    prediction: Prediction, objective: Objective, cut: int
) -> None:
    models, x0 = toy_models(objective, VPCosine(), prediction), data()
    for turn in objective.turns(LATE):
        whole = turn.loss(models, Batch(x0), draw_for())
        parts = [
            turn.loss(models, Batch(x0[places.start : places.stop]), draw_for(places))
            for places in (range(cut), range(cut, SIZE))
        ]
        assert torch.equal(torch.cat([part.log_snr for part in parts]), whole.log_snr)
        torch.testing.assert_close(torch.cat([part.loss for part in parts]), whole.loss, rtol=1e-9, atol=1e-12)


@every_objective
def test_each_update_draws_other_times_and_noise(objective: Objective) -> None:
    models, batch = toy_models(objective, VPCosine(), V()), Batch(data())
    for turn in objective.turns(LATE):
        first, second = (turn.loss(models, batch, draw_for(update=update)).loss for update in (0, 1))
        assert not bool((first == second).any())


@every_objective
def test_float32_data_give_the_same_training_up_to_rounding(
    objective: Objective,
) -> None:
    models, x0 = toy_models(objective, VPCosine(), X0()), data().float()
    for turn in objective.turns(LATE):
        with torch.no_grad():
            single = turn.loss(models, Batch(x0), draw_for())
            double = turn.loss(models, Batch(x0.double()), draw_for())
        assert single.loss.dtype == torch.float32
        assert single.log_snr.dtype == torch.float64
        assert torch.equal(single.log_snr, double.log_snr)
        torch.testing.assert_close(single.loss.double(), double.loss, rtol=1e-4, atol=0)


@every_objective
@every_weighting
def test_a_student_that_is_off_by_a_known_distance_pays_the_weight_of_its_square(
    objective: Objective, weighting: Weighting
) -> None:
    """The loss therefore belongs to the log-SNR that it reports, and is a mean over entries.

    The denoiser is off in the pass that learns, and exact in the pass without gradient, where it may be its own
    teacher. For objectives with helpers, which start with the same distance, a turn's loss is a fixed share of it.
    """
    if not any(field.name == "weighting" for field in dataclasses.fields(objective)):  # type: ignore[arg-type]
        pytest.skip("it has no weighting")
    process, point = VPCosine(), numbers(1, 3)
    exact = data_set_denoiser(process, point)
    off: Denoiser = data_set_denoiser(process, point + 0.25)
    if not objective.helpers:
        off = OffWhereItLearns(exact, off)
    weighted = dataclasses.replace(objective, weighting=weighting)  # type: ignore[type-var]
    models = Models(off, exact, with_helpers(weighted, off, off).helpers)
    for turn in weighted.turns(LATE):
        result = turn.loss(models, Batch(point.expand(SIZE, 3)), draw_for())
        share = float(result.loss[0] * 16 / weighting(result.log_snr[0])) if objective.helpers else 1.0
        assert share > 0.1
        torch.testing.assert_close(result.loss, share * weighting(result.log_snr) / 16, rtol=1e-11, atol=0)


@every_objective
def test_the_noise_level_that_the_losses_report_is_shown(objective: Objective) -> None:
    """Noisy samples go to the student, or to the helpers that judge it. Their noise matches their time: networks are
    called at the mixed samples."""
    if isinstance(objective, Adversarial):
        pytest.skip("its critic is not a denoiser (see test_critic.py)")
    process, point = VPCosine(), numbers(1, 3)
    exact = data_set_denoiser(process, point)
    for turn in objective.turns(LATE):
        student = Watched(exact)
        helpers = {name: Watched(exact) for name in objective.helpers}
        result = turn.loss(Models(student, exact, helpers), Batch(point.expand(SIZE, 3)), draw_for())
        judges = [helpers[name] for name, helper in objective.helpers.items() if isinstance(helper, Auxiliary)]
        for shown in judges or [student]:
            # A judge may see landing points and data in one call, at the same noise levels.
            for times in shown.times[-1].chunk(len(shown.times[-1]) // SIZE):
                assert torch.equal(process.log_snr(times), result.log_snr)
        # On data of one point, the exact denoiser returns the noise that was mixed in, which would not be of unit scale
        # if it had been mixed at another time.
        for shown in (student, *judges):
            assert scipy.stats.kstest(shown.answers[-1].eps.flatten().numpy(), "norm").pvalue > 0.01


def test_an_objective_that_needs_a_teacher_declares_it() -> None:
    with pytest.raises(ValueError, match="a student learns from a teacher, but none is given"):
        Halving(4).loss(Models(mixture(VPCosine())), Batch(numbers(4, 2)), Draw(0, "", 0, 4, range(4)))
    assert {name: member.needs_teacher for name, member in objectives.items()}["halve"]
    assert not Denoising.needs_teacher


@pytest.mark.parametrize(("num_steps", "num_teacher_steps"), [(0, 2), (-4, 2), (2.5, 2), (4, 0), (4, 1.5)])
def test_halving_refuses_numbers_of_steps_below_1(num_steps: float, num_teacher_steps: float) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Halving(num_steps, num_teacher_steps)  # type: ignore[arg-type]


@every_process
@in_turn("num_steps", [1, 2, 4, 16])
@pytest.mark.parametrize("num_teacher_steps", [2, 3, 4])
def test_the_halving_loss_is_0_for_the_student_that_lands_on_the_teacher_s_steps(
    process: NoiseProcess, num_steps: int, num_teacher_steps: int
) -> None:
    """The student solves for its x0 from DDIM's own landing points, without any code of the target."""
    teacher = mixture(process)
    student = Watched(Landing(teacher, num_steps, num_teacher_steps))
    objective = Halving(num_steps, num_teacher_steps, Constant())
    result = objective.loss(Models(student, teacher), Batch(0.5 * numbers(SIZE, 2)), draw_for())
    # The square of the rounding error that solving divides by the width of the step, for each sample: 1e-13 at most
    # where the angle falls evenly. The loss of a student that copies the teacher is above 1e-6.
    (t,), (answer,) = student.times, student.answers
    s = ((t * num_steps).round() - 1) / num_steps
    roundings = landing_roundings(teacher, process.mix(*answer, t), t, s, num_teacher_steps)
    assert bool((result.loss <= (2 * (roundings / step_width(process, t, s))[:, 0] + 1e-14) ** 2).all())
    assert float(result.loss.max()) < (1e-26 if even_amplitudes(process) else 1e-24)
    copying = objective.loss(Models(teacher, teacher), Batch(0.5 * numbers(SIZE, 2)), draw_for())
    assert float(copying.loss.mean()) > 1e-6


@every_process
def test_the_halving_loss_of_a_student_off_its_target_is_the_square_of_the_distance(
    process: NoiseProcess,
) -> None:
    teacher = mixture(process)
    student = Landing(teacher, 4, offset=0.5)
    result = Halving(4, weighting=Constant()).loss(Models(student, teacher), Batch(0.5 * numbers(SIZE, 2)), draw_for())
    torch.testing.assert_close(result.loss, torch.full((SIZE,), 0.25, dtype=torch.float64), rtol=1e-11, atol=0)


@pytest.mark.parametrize("num_steps", [1, 2, 8])
def test_halving_draws_every_time_of_the_student_s_grid_and_no_other(num_steps: int) -> None:
    process = VPCosine()
    exact = data_set_denoiser(process, numbers(1, 3))
    student = Watched(exact)
    Halving(num_steps).loss(Models(student, exact), Batch(data()), draw_for())
    assert student.times[0].unique().tolist() == [k / num_steps for k in range(1, num_steps + 1)]


@pytest.mark.parametrize("guidance", [None, GuidanceRange(1.0, 3.0)], ids=["plain", "range"])
def test_matching_draws_every_time_of_its_grid_and_no_other(guidance: GuidanceRange | None) -> None:
    """Times range from 1 / num_times to t = 1, all with the same frequency, and both networks are called at the same
    times."""
    process = VPCosine()
    student, teacher = (Watched(data_set_denoiser(process, numbers(1, 3))) for _ in range(2))
    for num_times in (1, 2, 8):
        student.times.clear()
        teacher.times.clear()
        for update in range(20):
            Matching(num_times, guidance=guidance).loss(
                Models(student, teacher), Batch(data()), draw_for(update=update)
            )
        times = torch.cat(student.times)
        assert torch.equal(times, torch.cat(teacher.times))
        drawn, counts = times.unique(return_counts=True)
        assert drawn.tolist() == [k / num_times for k in range(1, num_times + 1)]
        # With 7 degrees of freedom, chi-squared stays below 24.3 in 999 of 1000 cases.
        expected = len(times) / num_times
        assert float((counts - expected).square().sum()) / expected < 24.3


def test_denoising_draws_times_over_all_of_the_unit_interval() -> None:
    process = VPCosine()
    student = Watched(data_set_denoiser(process, numbers(1, 3)))
    for update in range(20):
        Denoising().loss(Models(student), Batch(data()), draw_for(update=update))
    times = torch.cat(student.times).sort().values
    # Kolmogorov's distance of 1920 uniform numbers stays below 1.63 / sqrt(1920) = 0.037 in 99 of 100 cases.
    assert float((times - torch.arange(len(times)) / len(times)).abs().max()) < 0.037


def test_denoising_ignores_a_teacher_and_the_posterior_mean_minimises_it() -> None:
    """No student beats E[x0 | x_t]: moving it in either direction increases the loss, on data from the same mixture."""
    process = VPCosine()
    points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    exact = data_set_denoiser(process, points)
    x0 = points[torch.arange(SIZE) % 2]

    def mean_loss(stretch: float) -> float:
        student = data_set_denoiser(process, points * stretch)
        losses: list[Losses] = [
            Denoising(Constant()).loss(Models(student, exact), Batch(x0), draw_for(update=update))
            for update in range(40)
        ]
        return float(torch.cat([each.loss for each in losses]).mean())

    assert mean_loss(1.0) < min(mean_loss(0.9), mean_loss(1.1))


def test_a_student_on_another_process_than_its_teacher_is_refused() -> None:
    student, teacher = toy_denoiser(VPCosine(), V()), toy_denoiser(VPCosine(log_snr_min=-10), V())
    draw = Draw(0, "stage", 0, 4, range(4))
    with pytest.raises(ValueError, match=r"both need the same noise process\. .*log_snr_min=-10.*log_snr_min=-20"):
        Halving(2).loss(Models(student, teacher), Batch(numbers(4, 2)), draw)
