"""A network seen through a process and a prediction, and the clipping of its x0."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep.core.denoiser import Clipped, NetworkDenoiser, ddim_step
from halfstep.core.noise import NoiseProcess, VPCosine, processes
from halfstep.core.prediction import X0, Both, Denoised, Prediction, V, predictions
from support import clock, interior_times, members, mixture, numbers, toy_denoiser

every_process = pytest.mark.parametrize("process", members(processes))
every_prediction = pytest.mark.parametrize("prediction", members(predictions))


@every_process
@every_prediction
def test_a_perfect_network_denoises_to_the_x0_and_eps_that_were_mixed(
    process: NoiseProcess, prediction: Prediction
) -> None:
    t = interior_times()
    x0, eps = numbers(len(t), 3, 2), numbers(len(t), 3, 2, seed=1)

    def perfect(x_t: Tensor, time: Tensor) -> Tensor:
        return prediction.target(x0, eps, *process.alpha_sigma(time))

    found = NetworkDenoiser(perfect, process, prediction)(process.mix(x0, eps, t), t)
    torch.testing.assert_close(found, Denoised(x0, eps), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_network_is_told_the_time_exactly_on_every_grid_of_a_power_of_two(dtype: torch.dtype) -> None:
    heard: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor) -> Tensor:
        heard.append(time)
        return x_t

    index = torch.arange(1, 8193)
    x_t = torch.ones(8192, 1, dtype=dtype)
    NetworkDenoiser(network, VPCosine(), X0())(x_t, index.double() / 8192)
    assert heard[0].dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal((heard[0] * 8192).long(), index)
    assert torch.equal(heard[0].double() * 8192, index.double())


def test_the_network_is_shown_the_conditions_by_name() -> None:
    heard: dict[str, Tensor] = {}

    def network(x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        heard.update(cond)
        return x_t

    labels = torch.tensor([3, 1])
    Clipped(NetworkDenoiser(network, VPCosine(), X0()))(numbers(2, 1), 0.5, {"class_labels": labels})
    assert list(heard) == ["class_labels"]
    assert heard["class_labels"] is labels


@every_prediction
@pytest.mark.parametrize("wrong", ["channels", "batch", "size", "axes"])
def test_an_output_of_the_wrong_shape_is_refused_with_both_shapes(prediction: Prediction, wrong: str) -> None:
    right = (4, 3 * prediction.channels, 2)
    shape = {"channels": (4, 4, 2), "batch": (5, *right[1:]), "size": (*right[:2], 3), "axes": right[:2]}[wrong]
    denoiser = NetworkDenoiser(lambda x_t, time: torch.zeros(shape), VPCosine(), prediction)
    with pytest.raises(ValueError, match="needs") as error:
        denoiser(numbers(4, 3, 2), 0.5)
    for part in (str(shape), str(right), str((4, 3, 2)), type(prediction).__name__):
        assert part in str(error.value)


def test_a_network_of_one_output_is_refused_where_both_are_needed() -> None:
    with pytest.raises(ValueError, match=r"put out \(4, 3\) for an input of \(4, 3\); Both needs \(4, 6\)"):
        NetworkDenoiser(lambda x_t, time: x_t, VPCosine(), Both())(numbers(4, 3), 0.5)


@every_prediction
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_brought_to_the_precision_of_x_t(
    prediction: Prediction, half: torch.dtype
) -> None:
    """The answer is that of the rounded output, with the algebra round it in x_t's own precision."""
    t, x_t = interior_times(32), numbers(32, 3)
    output = numbers(32, 3 * prediction.channels, seed=1).to(half)
    found = NetworkDenoiser(lambda x, time: output, VPCosine(), prediction)(x_t, t)
    wanted = NetworkDenoiser(lambda x, time: output.double(), VPCosine(), prediction)(x_t, t)
    assert found.x0.dtype == found.eps.dtype == torch.float64
    assert torch.equal(found.x0, wanted.x0)
    assert torch.equal(found.eps, wanted.eps)


def test_data_without_further_axes_is_denoised() -> None:
    x0, eps, t = numbers(5), numbers(5, seed=1), interior_times(5)
    process = VPCosine()
    target = V().target(x0, eps, *process.alpha_sigma(t))
    found = NetworkDenoiser(lambda x_t, time: target, process, V())(process.mix(x0, eps, t), t)
    torch.testing.assert_close(found, Denoised(x0, eps), rtol=0, atol=1e-13)


@every_process
@every_prediction
@given(seed=st.integers(0, 1000), low=st.floats(-2, 0), width=st.floats(0.01, 3))
def test_clipping_keeps_x0_in_range_and_splits_the_same_x_t(
    process: NoiseProcess, prediction: Prediction, seed: int, low: float, width: float
) -> None:
    t = interior_times(31)
    inner, x_t = toy_denoiser(process, prediction, seed), 2 * numbers(31, 2, seed=seed)
    x0, eps = Clipped(inner, low, low + width)(x_t, t)
    assert bool(((x0 >= low) & (x0 <= low + width)).all())
    torch.testing.assert_close(process.mix(x0, eps, t), x_t, rtol=0, atol=1e-12)
    raw = inner(x_t, t).x0
    inside = (raw >= low) & (raw <= low + width)
    assert torch.equal(x0[inside], raw[inside])
    # What was outside lies on the bound that it was beyond.
    assert bool((x0[raw > low + width] == low + width).all())
    assert bool((x0[raw < low] == low).all())


def test_clipping_that_meets_nothing_changes_nothing() -> None:
    denoiser, t = mixture(VPCosine()), interior_times(31)
    x_t = numbers(31, 2)
    torch.testing.assert_close(Clipped(denoiser, -50.0, 50.0)(x_t, t), denoiser(x_t, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (0.5, 0.5), (float("nan"), 1.0)])
def test_clipping_refuses_a_range_that_is_empty(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=f"low must be below high, got {low} and {high}"):
        Clipped(mixture(VPCosine()), low, high)


@every_process
def test_a_ddim_step_with_the_true_x0_and_eps_is_the_noisy_sample_of_the_landing_time(
    process: NoiseProcess,
) -> None:
    x0, eps = numbers(4, 2), numbers(4, 2, seed=1)
    s = clock(0.9, 0.5, 1e-4, 0.0)
    landed = ddim_step(Denoised(x0, eps), process, s)
    torch.testing.assert_close(landed[:3], process.mix(x0, eps, s)[:3], rtol=0, atol=1e-15)
    assert torch.equal(landed[3], x0[3])
