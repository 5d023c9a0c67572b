"""Clock tensors and step grids: exact times, one per sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.core.grids import uniform_times
from halfstep.core.noise import as_clock, clock_device, per_sample
from support import clock, numbers


@given(num_steps=st.integers(1, 8192))
def test_the_uniform_grid_falls_from_1_to_0_through_the_nearest_numbers_to_k_over_n(num_steps: int) -> None:
    times = uniform_times(num_steps)
    assert times.tolist() == [k / num_steps for k in range(num_steps, -1, -1)]
    assert times.dtype == torch.float64


@given(exponent=st.integers(1, 13))
def test_a_halved_grid_is_every_other_time_of_the_finer_one(exponent: int) -> None:
    assert torch.equal(uniform_times(2 ** (exponent - 1)), uniform_times(2**exponent)[::2])


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, 2.5, True, "4", None])
def test_a_number_of_steps_that_is_not_a_positive_integer_is_rejected(num_steps: object) -> None:
    with pytest.raises(ValueError, match=f"whole number of at least 1, got {num_steps!r}"):
        uniform_times(num_steps)  # type: ignore[arg-type]


def test_one_time_stands_for_every_sample() -> None:
    like = numbers(3, 2)
    for time in (0.3, torch.tensor(0.3, dtype=torch.float64), clock(0.3, 0.3, 0.3)):
        assert torch.equal(as_clock(time, like), clock(0.3, 0.3, 0.3))


def test_a_clock_is_float64_whatever_the_data_and_keeps_times_that_float32_has_exactly() -> None:
    times = torch.arange(8193, dtype=torch.float32) / 8192
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        taken = as_clock(times, torch.zeros(8193, 1, dtype=dtype))
        assert taken.dtype == torch.float64
        assert torch.equal(taken * 8192, torch.arange(8193, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(2,), (4,), (3, 1), (1,)])
def test_times_that_fit_neither_one_nor_the_batch_are_refused_with_both_sizes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"times have shape .* but the batch has 3 samples"):
        as_clock(torch.zeros(shape), numbers(3, 2))


def test_a_clock_meets_the_data_in_its_dtype_and_along_its_first_axis() -> None:
    like = torch.ones(2, 3, 4, dtype=torch.float32)
    met = per_sample(clock(1 / 3, 2.0), like)
    assert met.dtype == torch.float32
    assert met.shape == (2, 1, 1)
    assert met.flatten().tolist() == torch.tensor([1 / 3, 2.0], dtype=torch.float32).tolist()


def test_the_clock_stays_where_float64_exists() -> None:
    assert clock_device(torch.device("cpu")) == torch.device("cpu")
    assert clock_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert clock_device(torch.device("mps")) == torch.device("cpu")
