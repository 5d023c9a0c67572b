"""The plan of a run: the chain of halvings, its budget and its learning rates."""

import dataclasses
import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.prediction import SNRPlusOne, TruncatedSNR
from halfstep.objectives import Adversarial, Denoising, EarlyEnd, Halving, Objective, Plan, Stage, Training
from halfstep.recipes import Recipe
from halfstep.samplers import Heun


def steps_of(plan: Plan) -> list[int | None]:
    return [stage.num_steps for stage in plan.stages]


def training_of(**changes: object) -> Training:
    usual = Training(num_updates=100, batch_size=8, learning_rate=1e-3)
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


@given(end=st.integers(1, 9), halvings=st.integers(1, 13))
def test_each_student_takes_half_the_steps_of_its_teacher_from_start_to_end(end: int, halvings: int) -> None:
    chain = [end * 2**halvings, *steps_of(Plan.halvings(end * 2**halvings, end))]
    assert len(chain) == halvings + 1
    assert chain[-1] == end
    assert all(student is not None and teacher == 2 * student for teacher, student in pairwise(chain))


@given(start=st.integers(2, 5000), end=st.integers(1, 600))
def test_a_chain_either_reaches_its_end_by_halving_or_names_a_start_that_does(start: int, end: int) -> None:
    ratio = Fraction(start, end)
    if ratio.denominator == 1 and ratio > 1 and ratio.numerator & (ratio.numerator - 1) == 0:
        assert steps_of(Plan.halvings(start, end))[-1] == end
    elif end >= start:
        with pytest.raises(
            ValueError, match=f"the end must be below the start, got a chain from {start} steps to {end}"
        ):
            Plan.halvings(start, end)
    else:
        with pytest.raises(ValueError, match=f"{start} steps cannot be halved to {end}") as error:
            Plan.halvings(start, end)
        named = re.search(r"for example (\d+)$", str(error.value))
        assert named
        assert start < int(named[1]) < 2 * start
        assert steps_of(Plan.halvings(int(named[1]), end))[-1] == end


@given(end=st.integers(1, 5), factors=st.lists(st.integers(2, 9), min_size=1, max_size=6))
def test_listed_students_replace_as_many_teacher_steps_as_the_list_says(end: int, factors: list[int]) -> None:
    """Every stage's teacher is the previous stage: the steps of a stage times its factor are the previous steps."""
    steps = [end]
    for factor in factors:
        steps.insert(0, steps[0] * factor)
    plan = Plan.halvings(steps[0], students=steps[1:])
    assert steps_of(plan) == steps[1:]
    objectives = [stage.objective for stage in plan.stages]
    assert all(isinstance(objective, Halving) for objective in objectives)
    assert [o.num_teacher_steps for o in objectives if isinstance(o, Halving)] == list(reversed(factors))


@given(end=st.integers(1, 5), factor=st.integers(2, 9), length=st.integers(1, 5))
def test_a_factor_is_the_list_that_it_makes(end: int, factor: int, length: int) -> None:
    start = end * factor**length
    students = [end * factor**k for k in reversed(range(length))]
    assert Plan.halvings(start, end, factor=factor) == Plan.halvings(start, students=students)


@given(start=st.integers(2, 5000), end=st.integers(1, 600), factor=st.integers(2, 6))
def test_factors_that_miss_the_end_are_refused_with_a_start_that_meets_it(start: int, end: int, factor: int) -> None:
    try:
        plan = Plan.halvings(start, end, factor=factor)
    except ValueError as error:
        if end < start:
            named = re.search(r"for example (\d+)$", str(error))
            assert named
            assert start < int(named[1]) < factor * start
            assert steps_of(Plan.halvings(int(named[1]), end, factor=factor))[-1] == end
    else:
        assert steps_of(plan)[-1] == end


@pytest.mark.parametrize("students", [[], [8], [16], [3], [4, 3], [4, 4], [0], [4, 2.0]])
def test_students_that_do_not_divide_their_teachers_are_refused(students: list[int]) -> None:
    with pytest.raises(ValueError, match=r"the list of students is empty|-step student cannot follow|whole number"):
        Plan.halvings(8, students=students)


@pytest.mark.parametrize("factor", [1, 0, -2, 2.0])
def test_a_factor_below_2_is_refused(factor: int) -> None:
    with pytest.raises(ValueError, match="factor of a stage must be a whole number of at least 2"):
        Plan.halvings(8, 1, factor=factor)


@given(
    losses=st.lists(st.floats(0.1, 10), max_size=12),
    patience=st.integers(1, 4),
    min_drop=st.sampled_from([0.0, 0.01, 0.3]),
)
def test_a_loss_has_stopped_falling_after_patience_windows_without_a_new_low(
    losses: list[float], patience: int, min_drop: float
) -> None:
    """Compare with the definition: the last window with a sufficient new low is at least `patience` windows back."""
    lows: list[int] = []
    for index, loss in enumerate(losses):
        if not lows or loss < losses[lows[-1]] * (1 - min_drop):
            lows.append(index)
    expected = bool(lows) and len(losses) - 1 - lows[-1] >= patience
    assert EarlyEnd(patience, 10, min_drop).has_stopped_falling(losses) == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"patience": 2, "window": 0},
        {"patience": -1},
        {"patience": 0.5},
        {"patience": 2, "window": 2.5},
        {"patience": 2, "min_drop": 1.0},
        {"patience": 2, "min_drop": -1},
        {"window": 10},
        {"min_drop": 0.5},
    ],
)
def test_an_invalid_early_end_is_rejected(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=rf"^early_end\.{list(wrong)[-1]} "):
        EarlyEnd(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(("start", "end"), [(0, 1), (8, 0), (-8, -16), (8.0, 1)])
def test_a_chain_of_steps_that_are_not_positive_integers_is_rejected(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="whole number of at least 1"):
        Plan.halvings(start, end)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "end", "num_updates"),
    [(8192, 4, 550_000), (8192, 1, 750_000), (1024, 4, 400_000), (1024, 1, 600_000)],
)
def test_the_defaults_cost_what_the_paper_s_chains_cost(start: int, end: int, num_updates: int) -> None:
    """Compare with section 5.2: 50,000 updates per stage, 100,000 at 2 and 1, from 8192 (CIFAR-10) or 1024 steps."""
    assert Plan.halvings(start, end).num_updates == num_updates


def test_the_stages_of_2_steps_and_1_step_get_twice_the_updates() -> None:
    plan = Plan.halvings(16, training=Training(30, 1e-3))
    assert [(stage.num_steps, stage.training.num_updates) for stage in plan.stages] == [
        (8, 30),
        (4, 30),
        (2, 60),
        (1, 60),
    ]


def test_exceptions_replace_the_doubling() -> None:
    training = Training(30, 1e-3)
    given = Plan.halvings(16, training=training, updates_at={4: 7})
    assert [stage.training.num_updates for stage in given.stages] == [30, 7, 30, 30]
    even = Plan.halvings(16, training=training, updates_at={})
    assert [stage.training.num_updates for stage in even.stages] == [30] * 4


def test_the_doubling_may_name_steps_that_the_chain_does_not_reach() -> None:
    plan = Plan.halvings(32, 8, Training(30, 1e-3))
    assert [stage.training.num_updates for stage in plan.stages] == [30, 30]


@pytest.mark.parametrize("foreign", [16, 3, 64])
def test_an_exception_outside_the_chain_is_refused(foreign: int) -> None:
    """The first teacher's own number of steps is rejected too, because the chain does not train the teacher."""
    with pytest.raises(ValueError, match=rf"updates_at has an entry for {foreign} steps, but .* take \[8, 4, 2, 1\]"):
        Plan.halvings(16, updates_at={4: 7, foreign: 9})


def test_the_settings_of_a_chain_reach_every_stage() -> None:
    settings = {
        "batch_size": 3,
        "learning_rate": 0.25,
        "weight_decay": 0.5,
        "adam_betas": (0.1, 0.2),
        "grad_clip": 4.0,
        "ema_decay": 0.75,
        "dropout": 0.125,
    }
    training = Training(num_updates=5, warmup_updates=2, anneal=False, early_end=EarlyEnd(3), **settings)  # type: ignore[arg-type]
    for stage in Plan.halvings(8, training=training, updates_at={}, weighting=SNRPlusOne()).stages:
        assert stage.training == training
        assert stage.objective.weighting == SNRPlusOne()  # type: ignore[attr-defined]
    # Every field of `Training` differs from its default here, so that none can be lost.
    assert all(getattr(training, each.name) != each.default for each in dataclasses.fields(Training))


def test_a_student_anneals_and_keeps_no_average_where_a_teacher_does_the_reverse() -> None:
    """Compare with the authors' configurations: in distillation, the learning rate falls to 0 instead of averaging."""
    teacher = Recipe(name="default").teacher_plan().stages[0]
    student = Plan.halvings(2).stages[0]
    assert (teacher.training.anneal, teacher.training.ema_decay) == (False, 0.9999)
    own = student.training
    assert (own.anneal, own.ema_decay, own.dropout, own.weight_decay) == (True, 0.0, 0.0, 0.0)
    for stage in (teacher, student):
        assert stage.objective.weighting == TruncatedSNR()  # type: ignore[attr-defined]


def test_folders_are_named_by_place_and_steps_and_sort_in_the_order_in_which_they_run() -> None:
    plan = Plan.of(Denoising(), training_of()) + Plan.halvings(8192)
    names = plan.names()
    assert names[:3] == ["00-denoise", "01-halve-4096", "02-halve-2048"]
    assert names[-1] == "13-halve-0001"
    assert names == sorted(set(names))
    assert Plan().names() == []


def test_plans_add_up_in_order() -> None:
    first, second = Plan.halvings(16, 4, training_of(num_updates=3)), Plan.halvings(4, 1, training_of(num_updates=5))
    assert steps_of(first + second) == steps_of(Plan.halvings(16))
    assert (first + second).num_updates == first.num_updates + second.num_updates


@given(num_updates=st.integers(1, 500), rate=st.floats(1e-6, 1))
def test_an_annealed_rate_falls_linearly_and_would_be_0_at_the_update_after_the_last(
    num_updates: int, rate: float
) -> None:
    training = training_of(num_updates=num_updates, learning_rate=rate)
    rates = [training.rate_at(update) for update in range(num_updates)]
    assert rates[0] == rate
    assert min(rates) > 0
    falls = [a - b for a, b in zip(rates, [*rates[1:], 0.0], strict=True)]
    assert falls == pytest.approx([rate / num_updates] * num_updates, rel=1e-9)


@given(num_updates=st.integers(1, 200), data=st.data())
def test_a_warm_up_rises_evenly_from_above_0_to_the_full_rate_and_stays(num_updates: int, data: st.DataObject) -> None:
    warmup = data.draw(st.integers(1, num_updates))
    training = training_of(num_updates=num_updates, warmup_updates=warmup, anneal=False, learning_rate=0.5)
    rates = [training.rate_at(update) for update in range(num_updates)]
    rises = [b - a for a, b in zip([0.0, *rates], rates, strict=False)]
    assert rises[:warmup] == pytest.approx([0.5 / warmup] * warmup, rel=1e-9)
    assert rates[warmup - 1 :] == [0.5] * (num_updates - warmup + 1)


def test_a_rate_that_warms_up_and_anneals_is_the_product_of_the_two() -> None:
    both = training_of(warmup_updates=10, learning_rate=2.0)
    warming, falling = training_of(warmup_updates=10, anneal=False), training_of()
    for update in range(100):
        product = warming.rate_at(update) * falling.rate_at(update) / 1e-3**2 * 2
        assert both.rate_at(update) == pytest.approx(product, rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_updates": 0}, "num_updates must be a whole number of at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be a whole number of at least 1, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0, got nan"),
        ({"grad_clip": 0.0}, "grad_clip must be a finite number above 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.5}, r"dropout must be in \[0, 1\)"),
        ({"warmup_updates": -1}, "warmup_updates must be a whole number of at least 0"),
    ],
)
def test_a_stage_refuses_a_budget_that_makes_no_sense(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training_of(**changes)


def test_a_halving_stage_is_made_for_its_students_steps_and_a_teacher_for_any() -> None:
    def steps(objective: Objective) -> int | None:
        return Stage(objective, training_of()).num_steps

    assert steps(Halving(4, num_teacher_steps=3)) == 4
    assert steps(Denoising()) is None


def test_a_plan_knows_how_many_steps_its_first_halving_asks_of_the_teacher() -> None:
    assert Plan.halvings(16, 2, teacher_sampler=Heun(), teacher_steps=3).start_steps == 24
    assert (Plan.finishes([2]) + Plan.halvings(8, 4)).start_steps == 8
    assert Plan.finishes([2, 1]).start_steps is None
    with_critic = Plan.halvings(16, 1, training_of()).changed(Adversarial)
    assert with_critic.start_steps == Plan.halvings(16, 1, training_of()).start_steps
    assert Plan.finishes([2, 1]).changed(Adversarial).start_steps is None
