"""Random numbers depend only on their purpose."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep.core.draw import SHARD, Draw, sample_labels, sample_noise, step_noise

Kind = Callable[[Draw], Tensor]

KINDS: dict[str, Kind] = {
    "normal": lambda draw: draw.normal("noise", (2, 3)),
    "normal64": lambda draw: draw.normal("noise", (2,), torch.float64),
    "uniform": lambda draw: draw.uniform("time"),
    "integers": lambda draw: draw.integers("time", 8192),
    "order": lambda draw: draw.order(37),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def draw(size: int, places: range | None = None, *, seed: int = 0, stream: str = "a", update: int = 0) -> Draw:
    return Draw(seed, stream, update, size, range(size) if places is None else places)


@every_kind
@given(
    size=st.integers(2, 5 * SHARD),
    cuts=st.sets(st.integers(1, 5 * SHARD), max_size=6),
    update=st.integers(0, 9),
)
def test_any_split_of_the_places_draws_the_numbers_of_the_whole(
    kind: Kind, size: int, cuts: set[int], update: int
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < size), size]
    parts = [kind(draw(size, range(a, b), update=update)) for a, b in itertools.pairwise(edges)]
    assert torch.equal(torch.cat(parts), kind(draw(size, update=update)))


@pytest.mark.parametrize("kind", [KINDS["normal"], KINDS["uniform"], KINDS["integers"]])
def test_a_place_keeps_its_numbers_in_a_larger_batch(kind: Kind) -> None:
    assert torch.equal(kind(draw(400))[:100], kind(draw(100)))


@every_kind
def test_drawing_neither_reads_nor_moves_torch_s_own_generator(kind: Kind) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = kind(draw(100))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(kind(draw(100)), first)


def test_no_number_is_drawn_twice_for_another_seed_stream_update_purpose_or_place() -> None:
    """The float64 numbers have 64 random bits, so two equal ones come from the same state of a generator."""
    uniforms, normals = [], []
    for seed, stream, update, purpose in itertools.product((0, 1), ("a", "b", "ab"), (0, 1, 10), ("x", "y", "bx")):
        source = draw(3 * SHARD, seed=seed, stream=stream, update=update)
        uniforms.append(source.uniform(purpose))
        normals.append(source.normal(purpose, (2,), torch.float64).flatten())
    for drawn in (torch.cat(uniforms), torch.cat(normals)):
        assert len(drawn.unique()) == len(drawn)


def test_keys_that_would_agree_when_strung_together_do_not() -> None:
    same_letters = [
        draw(32, stream="a", update=11).uniform("x"),
        draw(32, stream="a1", update=1).uniform("x"),
        draw(32, stream="a", update=1).uniform("1x"),
    ]
    assert len(torch.cat(same_letters).unique()) == 3 * 32


def test_normal_numbers_are_normal() -> None:
    numbers = torch.cat([draw(256, update=update).normal("noise", (8,)).flatten() for update in range(10)])
    assert scipy.stats.kstest(numbers.numpy(), "norm").pvalue > 0.01
    # Neighbouring places, shards and updates are independent.
    for lag in (1, 8, 8 * SHARD, 8 * 256):
        assert abs(float((numbers[lag:] * numbers[:-lag]).mean())) < 4 / len(numbers) ** 0.5


def test_uniform_numbers_are_uniform_float64_below_1() -> None:
    numbers = torch.cat([draw(256, update=update).uniform("time") for update in range(40)])
    assert numbers.dtype == torch.float64
    assert float(numbers.max()) < 1
    assert float(numbers.min()) >= 0
    assert scipy.stats.kstest(numbers.numpy(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("high", [1, 2, 7, 64])
def test_integers_are_uniform_below_their_bound(high: int) -> None:
    numbers = torch.cat([draw(256, update=update).integers("time", high) for update in range(40)])
    assert numbers.dtype == torch.int64
    counts = torch.bincount(numbers, minlength=high)
    assert len(counts) == high
    if high > 1:
        assert scipy.stats.chisquare(counts.numpy()).pvalue > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normal_numbers_come_in_the_dtype_and_shape_asked_for(dtype: torch.dtype) -> None:
    numbers = draw(70, range(10, 50)).normal("noise", (3, 1, 2), dtype)
    assert numbers.shape == (40, 3, 1, 2)
    assert numbers.dtype == dtype


@given(size=st.integers(1, 40), length=st.integers(1, 60))
def test_every_epoch_passes_once_through_the_data_set_whatever_the_batch_size(size: int, length: int) -> None:
    updates = -(-3 * length // size)
    seen = torch.cat([draw(size, update=update).order(length) for update in range(updates)])
    for epoch in range(3):
        assert seen[epoch * length : (epoch + 1) * length].sort().values.tolist() == list(range(length))


def test_every_epoch_seed_and_stream_has_an_order_of_its_own() -> None:
    orders = [
        tuple(draw(64, seed=seed, stream=stream, update=epoch).order(64).tolist())
        for seed, stream, epoch in itertools.product((0, 1), ("a", "b"), (0, 1, 2))
    ]
    assert len(set(orders)) == len(orders)
    assert tuple(range(64)) not in orders


@pytest.mark.parametrize("places", [range(-1, 4), range(9), range(0, 8, 2), range(7, -1, -1), range(3, 3), range(5, 2)])
def test_places_outside_the_batch_are_refused(places: range) -> None:
    with pytest.raises(ValueError, match="are not within a batch of 8"):
        draw(8, places)


@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=12), data=st.data())
def test_a_sample_s_noise_is_a_function_of_its_own_seed(seeds: list[int], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(seeds) - 1))
    assert torch.equal(sample_noise(seeds, (2, 3))[row], sample_noise([seeds[row]], (2, 3))[0])


def test_a_seed_is_its_number_whatever_its_type() -> None:
    plain = sample_noise([3, 5], (4,))
    for seeds in (np.array([3, 5]), torch.tensor([3, 5])):
        assert torch.equal(sample_noise(seeds, (4,)), plain)  # type: ignore[arg-type]
        assert torch.equal(sample_labels(seeds, 4), sample_labels([3, 5], 4))  # type: ignore[arg-type]


def test_samples_of_different_seeds_share_no_noise_and_are_normal() -> None:
    noise = sample_noise(range(300), (4, 4), torch.float64)
    assert len(noise.unique()) == noise.numel()
    assert scipy.stats.kstest(noise.flatten().numpy(), "norm").pvalue > 0.01


def test_sample_noise_is_not_the_training_noise_of_the_same_seed() -> None:
    trained = draw(32, seed=3).normal("noise", (8,), torch.float64)
    assert not bool(torch.isin(sample_noise([3], (8,), torch.float64), trained).any())


@given(seeds=st.lists(st.integers(0, 2**40), min_size=1, max_size=12), number=st.integers(0, 8191), data=st.data())
def test_a_step_s_noise_is_a_function_of_the_sample_s_seed_and_the_step_s_number(
    seeds: list[int], number: int, data: st.DataObject
) -> None:
    """They do not depend on the other samples or on previously drawn steps."""
    row = data.draw(st.integers(0, len(seeds) - 1))
    together = step_noise(seeds, (2, 3), torch.float64)
    together(number + 1)
    assert torch.equal(together(number)[row], step_noise([seeds[row]], (2, 3), torch.float64)(number)[0])


def test_no_number_is_drawn_twice_for_another_seed_or_step_or_for_the_start() -> None:
    noise = step_noise(range(30), (4, 4), torch.float64)
    drawn = torch.stack([sample_noise(range(30), (4, 4), torch.float64), *(noise(number) for number in range(12))])
    assert len(drawn.unique()) == drawn.numel()
    assert scipy.stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 0.01
    # The noise of a step is independent of the next step's and of the start's.
    assert abs(float((drawn[1:] * drawn[:-1]).mean())) < 4 / drawn[1:].numel() ** 0.5
    trained = torch.cat([draw(32, seed=seed).normal("noise", (16,), torch.float64) for seed in range(30)])
    assert not bool(torch.isin(drawn, trained).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_s_noise_comes_in_the_dtype_and_shape_asked_for_and_leaves_torch_s_generator_alone(
    dtype: torch.dtype,
) -> None:
    state = torch.get_rng_state()
    noise = step_noise(np.array([3, 5]), (4, 1), dtype)(2)  # type: ignore[arg-type]
    assert noise.dtype == dtype
    assert noise.shape == (2, 4, 1)
    assert torch.equal(noise, step_noise([3, 5], (4, 1), dtype)(2))
    assert torch.equal(torch.get_rng_state(), state)


@given(start=st.integers(0, 1000), num_classes=st.integers(1, 20), rounds=st.integers(1, 5))
def test_consecutive_seeds_show_every_class_equally_often(start: int, num_classes: int, rounds: int) -> None:
    labels = sample_labels(range(start, start + rounds * num_classes), num_classes)
    assert torch.bincount(labels, minlength=num_classes).tolist() == [rounds] * num_classes
    assert labels.dtype == torch.int64
