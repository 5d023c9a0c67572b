"""A denoiser of a network, a process and a prediction, and its clipping, guidance and conversion to another process."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE, Clipped, Cond, Denoiser, Guided, NetworkDenoiser, Reprocessed, ddim_step
from halfstep.core.draw import step_noise
from halfstep.core.noise import (
    VE,
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    linear_betas,
    processes,
    zero_terminal_betas,
)
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser
from halfstep.core.prediction import X0, Both, Denoised, Prediction, V, predictions
from halfstep.objectives import halving_target
from halfstep.samplers import Sampler, sample, trajectory
from support import (
    Watched,
    clock,
    in_turn,
    integrated_flow,
    interior_times,
    members,
    mixture,
    numbers,
    pure_noise,
    toy_denoiser,
    variants,
)

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


class OwnDenoiser(Denoiser):
    """A user's denoiser: exact for x0 ~ N(0.3, 0.5^2), computed from the amplitudes at t, without clock tensors."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        self.times: list[Tensor] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        self.times.append(t)
        alpha, sigma = (a[:, None].to(x_t) for a in self.process.alpha_sigma(t))
        rest = (x_t - alpha * 0.3) / (alpha**2 * 0.25 + sigma**2)
        return Denoised(0.3 + alpha * 0.25 * rest, sigma * rest)


OWN_AND_EXACT: Final[dict[str, Callable[[Denoiser, NoiseProcess], Denoiser]]] = {
    "bare": lambda denoiser, process: denoiser,
    "clipped": lambda denoiser, process: Clipped(denoiser, -0.6, 0.7),
    "guided": lambda denoiser, process: Guided(denoiser, {"label": torch.tensor(0)}, 2.0),
    "reprocessed": lambda denoiser, process: Reprocessed(denoiser, VPCosine(-8.0, 9.0)),
    "clipped guided reprocessed": lambda denoiser, process: Clipped(
        Guided(Reprocessed(denoiser, VPCosine(-8.0, 9.0)), {"label": torch.tensor(0)}, 2.0), -0.6, 0.7
    ),
}
every_wrapping = pytest.mark.parametrize("wrapped", OWN_AND_EXACT.values(), ids=OWN_AND_EXACT)


@every_wrapping
@pytest.mark.parametrize("sampler", variants())
@pytest.mark.parametrize("process", [VPCosine(), VE()], ids=["vp_cosine", "ve"])
def test_a_denoiser_that_only_uses_the_process_samples_and_teaches(
    process: NoiseProcess, sampler: Sampler, wrapped: Callable[[Denoiser, NoiseProcess], Denoiser]
) -> None:
    """It behaves like the library's own exact denoiser, in sampling and in a target, inside every wrapper."""
    own, exact = OwnDenoiser(process), GaussianDenoiser(process, 0.3, 0.5)
    asked, known = wrapped(own, process), wrapped(exact, process)
    x_1, cond = pure_noise(asked.process, 5, 2), {"label": torch.ones(5)}
    noise = step_noise(range(5), (2,), torch.float64) if sampler.stochastic else None
    steps = list(trajectory(asked, x_1, 3, sampler, cond, noise=noise))
    for found, wanted in zip(steps, trajectory(known, x_1, 3, sampler, cond, noise=noise), strict=True):
        torch.testing.assert_close(found.x_s, wanted.x_s, rtol=1e-9, atol=1e-9)
    assert torch.equal(sample(asked, x_1, 3, sampler, cond, noise=noise), steps[-1].x_s)
    if not sampler.stochastic:
        for t, s in [(1.0, 0.5), (clock(1.0, 0.75, 0.5, 0.25, 0.25), clock(0.75, 0.5, 0.25, 0.0, 0.0))]:
            found, wanted = (halving_target(each, x_1, t, s, cond, sampler=sampler) for each in (asked, known))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    batch = 10 if isinstance(asked, Guided) or isinstance(getattr(asked, "denoiser", None), Guided) else 5
    assert own.times
    assert all(time.dtype == torch.float64 and time.shape == (batch,) for time in own.times)


def test_hooks_of_a_denoiser_and_of_what_it_wraps_run_for_one_time_and_for_each() -> None:
    inner = toy_denoiser(VPCosine(), V())
    outer, called = Clipped(inner), []
    for denoiser in (inner, outer):
        denoiser.register_forward_hook(lambda module, args, result: called.append(type(module).__name__))
    for t in (0.5, clock(0.5).expand(3)):
        outer(numbers(3, 2), t)
    assert called == ["NetworkDenoiser", "Clipped"] * 2


@every_process
@every_prediction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_time_for_all_gives_the_same_result_as_that_time_for_each(
    process: NoiseProcess, prediction: Prediction, dtype: torch.dtype
) -> None:
    x_t = numbers(5, 3, 2).to(dtype)
    heard: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        heard.append(time)
        return torch.cat([x * 0.3 - time[:, None, None]] * prediction.channels, dim=1)

    denoiser = NetworkDenoiser(network, process, prediction)
    exact = torch.finfo(dtype).eps
    for t in (0.013, 0.4, 0.77, 0.9):
        for asked in (denoiser, Clipped(denoiser)):
            one, each = asked(x_t, t), asked(x_t, clock(t).expand(5))
            assert torch.equal(heard[-1], heard[-2])
            for found, wanted in zip(one, each, strict=True):
                assert found.dtype == dtype
                torch.testing.assert_close(found, wanted, rtol=8 * exact, atol=8 * exact * float(wanted.abs().max()))
            for s in (0.0, t / 3):
                landed, wanted = ddim_step(each, process, s), ddim_step(each, process, clock(s).expand(5))
                torch.testing.assert_close(landed, wanted, rtol=8 * exact, atol=8 * exact * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_network_receives_exact_times_on_every_grid_of_a_power_of_two(dtype: torch.dtype) -> None:
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


def test_the_network_receives_the_conditions_by_name() -> None:
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
    message = r"returned the shape \(4, 3\) for an input of shape \(4, 3\), but Both needs the shape \(4, 6\)"
    with pytest.raises(ValueError, match=message):
        NetworkDenoiser(lambda x_t, time: x_t, VPCosine(), Both())(numbers(4, 3), 0.5)


@every_prediction
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_brought_to_the_precision_of_x_t(
    prediction: Prediction, half: torch.dtype
) -> None:
    """The result is that of the rounded output, with the algebra around it in x_t's own precision."""
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
    # Values outside are moved to the bound that they exceed.
    assert bool((x0[raw > low + width] == low + width).all())
    assert bool((x0[raw < low] == low).all())


def test_clipping_without_values_outside_changes_nothing() -> None:
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


TABLE = VPTable()
ZERO_TERMINAL = VPTable(zero_terminal_betas(linear_betas()))
TABLE_ENDS = [float(TABLE.log_snr(clock(t))) for t in (1.0, 1 / 1000)]
VE_ENDS = [-2 * math.log(80.0), -2 * math.log(0.002)]

EXCHANGES = {
    "table-cosine": (TABLE, VPCosine(*TABLE_ENDS)),
    "table-narrow": (TABLE, VPCosine(-4.0, 4.0)),
    "table-ve": (TABLE, VE(0.01, 80.0)),
    "zero_terminal-cosine": (ZERO_TERMINAL, VPCosine(-20.0, TABLE_ENDS[1])),
    "flow_shift_3-cosine": (FlowMatching(3.0), VPCosine()),
    "flow_shift_3-flow": (FlowMatching(3.0), FlowMatching()),
    "flow-zero_terminal": (FlowMatching(), ZERO_TERMINAL),
    "ve-cosine": (VE(), VPCosine(*VE_ENDS)),
    "cosine-ve": (VPCosine(), VE()),
    "cosine-cosine": (VPCosine(), VPCosine()),
}
every_exchange = pytest.mark.parametrize(("own", "process"), EXCHANGES.values(), ids=EXCHANGES)


def times_to_1(count: int = 64) -> Tensor:
    """Return times in (0, 1], including the last, where both processes may have no signal left."""
    return torch.arange(1, count + 1, dtype=torch.float64) / count


@every_exchange
def test_the_exact_denoiser_seen_through_another_process_is_that_process_s_exact_denoiser(
    own: NoiseProcess, process: NoiseProcess
) -> None:
    """E[x0 | x_t] of the same data: an oracle on the other process, without any conversion."""
    t = times_to_1()
    x0, eps = 0.5 * numbers(64, 2), numbers(64, 2, seed=1)
    x_t = process.mix(x0, eps, t)
    found, expected = Reprocessed(mixture(own), process)(x_t, t), mixture(process)(x_t, t)
    # A log-SNR is accurate to 2^-53 of about 20. At t = 1, the two may also differ by the angle's rounding.
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert Reprocessed(mixture(own), process).process is process


@every_exchange
def test_the_flow_from_the_same_noise_is_the_same_on_another_process(own: NoiseProcess, process: NoiseProcess) -> None:
    """An independent integrator takes both from the level of the new process's start to the same noise levels, where
    samples only differ in scale, and to the same clean data, relative to samples of unit size."""
    first = float(own.time_at(process.log_snr(clock(1.0))).clamp(max=1))
    radius = {which: lambda t, p=which: float(torch.hypot(*p.alpha_sigma(clock(t)))) for which in (own, process)}
    x_1 = pure_noise(process, 8, 2)
    inner, exchanged = mixture(own), Reprocessed(mixture(own), process)
    start = x_1 * radius[own](first) / radius[process](1.0)
    ours, theirs, t = x_1, start, 1.0
    for s in (0.6, 0.05, 1e-6):
        last = float(own.time_at(process.log_snr(clock(s))))
        ours, t = integrated_flow(exchanged, ours, s, t, rtol=1e-10), s
        theirs, first = integrated_flow(inner, theirs, last, first, rtol=1e-10), last
        torch.testing.assert_close(ours / radius[process](s), theirs / radius[own](last), rtol=0, atol=1e-8)
    torch.testing.assert_close(exchanged(ours, t).x0, inner(theirs, last).x0, rtol=0, atol=1e-8)


@every_exchange
@torch.no_grad()
def test_the_denoiser_is_asked_at_the_time_of_the_same_log_snr_about_a_sample_of_its_own_amplitudes(
    own: NoiseProcess, process: NoiseProcess
) -> None:
    """Its x0 and eps are passed on unchanged."""
    t = times_to_1()
    x0, eps = numbers(64, 2), numbers(64, 2, seed=1)
    asked: list[Tensor] = []

    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        asked.append(x_t)
        return torch.sin(x_t) + shift

    inner = Watched(NetworkDenoiser(network, own, V()))
    shift = numbers(64, 1, seed=2)
    answer = Reprocessed(inner, process)(process.mix(x0, eps, t), t, {"shift": shift})
    (times,) = inner.times
    assert bool(((times > 0) & (times <= 1)).all())
    levels, wanted = own.log_snr(times), process.log_snr(t)
    finite = wanted.isfinite()
    torch.testing.assert_close(levels[finite], wanted[finite], rtol=0, atol=1e-9)
    assert bool((times[~finite] == 1).all())
    torch.testing.assert_close(asked[0], own.mix(x0, eps, times), rtol=1e-11, atol=1e-11)
    assert answer is inner.answers[0]


@every_exchange
@every_prediction
@torch.no_grad()
def test_an_imperfect_denoiser_seen_through_another_process_splits_x_t_by_that_process(
    own: NoiseProcess, process: NoiseProcess, prediction: Prediction
) -> None:
    t = interior_times(31)
    x_t = process.mix(numbers(31, 2), numbers(31, 2, seed=1), t)
    x0, eps = Reprocessed(toy_denoiser(own, prediction), process)(x_t, t)
    alpha, sigma = (a[:, None] for a in process.alpha_sigma(t))
    # To the rounding of the terms. Those of a predicted eps may be far larger than x_t, and alpha and sigma have the
    # accuracy of a log-SNR near 20.
    allowed = 2e-14 * (1 + alpha * x0.abs() + sigma * eps.abs())
    assert bool(((process.mix(x0, eps, t) - x_t).abs() <= allowed).all())


@pytest.mark.parametrize(
    ("own", "process"),
    [
        pytest.param(TABLE, VPCosine(-20.0, 5.0), id="more_noise"),
        pytest.param(TABLE, VPCosine(-5.0, 20.0), id="less_noise"),
        pytest.param(VE(), FlowMatching(), id="no_signal"),
        pytest.param(VPCosine(), ZERO_TERMINAL, id="zero_terminal"),
        pytest.param(VPCosine(-4.0, 4.0), VPCosine(-4.0, 4.0 + 1e-6), id="by_a_little"),
        pytest.param(VPCosine(-4.0, 4.0), VPCosine(-4.0 - 1e-6, 4.0), id="by_a_little_below"),
    ],
)
def test_a_process_with_noise_levels_outside_the_denoisers_is_rejected(
    own: NoiseProcess, process: NoiseProcess
) -> None:
    with pytest.raises(ValueError, match=r"the denoiser covers log-SNRs from .* to .*, but the process goes from") as e:
        Reprocessed(mixture(own), process)
    for which in (own, process):
        low, high = (float(which.log_snr(clock(t))) for t in (1.0, 0.0))
        assert f"from {low:.6g} to {high:.6g}" in str(e.value)


def test_a_start_that_is_the_denoiser_s_own_but_for_a_rounding_asks_at_no_time_after_1() -> None:
    """Bounds may differ by 1e-9, the accuracy of log-SNRs; a network is never called beyond time 1."""
    inner = Watched(mixture(VPCosine(-4.0, 4.0)))
    Reprocessed(inner, VPCosine(-4.0 - 5e-10, 4.0))(numbers(3, 2), 1.0)
    assert float(VPCosine(-4.0, 4.0).time_at(clock(-4.0 - 5e-10))) > 1
    assert inner.times[0].tolist() == [1.0] * 3


MEANS = torch.tensor([[-0.8, 0.1], [0.6, 0.7], [0.4, -0.9]], dtype=torch.float64)
STDS = clock(0.3, 0.4, 0.35)
SHARES = clock(0.5, 0.2, 0.3)
NULL = 3
"""The label that stands for any class."""


@final
class ClassDenoiser(Denoiser):
    """The exact denoiser of a mixture with classes as components: of a sample's own class, or of all classes for
    `NULL`."""

    def __init__(self, process: NoiseProcess) -> None:
        super().__init__()
        self.process = process
        self.classes = [MixtureDenoiser(process, MEANS[k : k + 1], STDS[k]) for k in range(3)]
        self.classes.append(MixtureDenoiser(process, MEANS, STDS, SHARES))
        self.heard: list[dict[str, Tensor]] = []
        self.batches: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        self.heard.append(dict(cond or {}))
        self.batches.append(len(x_t))
        answers = [denoiser(x_t, t) for denoiser in self.classes]
        rows = torch.arange(len(x_t))
        labels = (cond or {})["class_labels"]
        return Denoised(*(torch.stack([each[part] for each in answers])[labels, rows] for part in (0, 1)))


SCALES = (0.0, 0.3, 1.0, 2.5, -1.0)


def labelled(process: NoiseProcess, count: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    """Return x_t `[count, 2]`, times and class labels."""
    t = interior_times(count)
    x_t = process.mix(0.5 * numbers(count, 2), numbers(count, 2, seed=1), t)
    return x_t, t, torch.arange(count) % 3


@every_process
@pytest.mark.parametrize("scale", SCALES)
def test_the_guided_eps_is_the_score_of_the_class_to_the_scale_times_that_of_all_to_the_rest(
    process: NoiseProcess, scale: float
) -> None:
    """Compare with -sigma d log(p(x_t | c)^w p(x_t)^(1 - w)) / d x_t, with torch's densities and derivatives."""
    x_t, t, labels = labelled(process)
    found = Guided(ClassDenoiser(process), {"class_labels": torch.tensor(NULL)}, scale)(
        x_t, t, {"class_labels": labels}
    )
    alpha, sigma = (a[:, None] for a in process.alpha_sigma(t))
    widths = torch.sqrt(alpha**2 * STDS**2 + sigma**2)
    at = x_t.clone().requires_grad_()
    each = (
        torch.distributions.Normal(alpha[..., None] * MEANS, widths[..., None]).log_prob(at[:, None]).sum(-1)
    )  # [batch, class]
    of_class = each[torch.arange(len(labels)), labels]
    of_all = torch.logsumexp(each + SHARES.log(), dim=1)
    (score,) = torch.autograd.grad((scale * of_class + (1 - scale) * of_all).sum(), at)
    torch.testing.assert_close(found.eps, -sigma * score, rtol=1e-10, atol=1e-10)
    x0 = (x_t + sigma**2 * score) / alpha
    torch.testing.assert_close(found.x0, x0, rtol=1e-10, atol=1e-9)


def guided_pair(process: NoiseProcess) -> tuple[Denoised, Denoised]:
    """Return the outputs of the class denoiser with and without the class, from direct calls."""
    x_t, t, labels = labelled(process)
    inner = ClassDenoiser(process)
    return (
        inner(x_t, t, {"class_labels": labels}),
        inner(x_t, t, {"class_labels": torch.full_like(labels, NULL)}),
    )


@every_process
def test_scale_1_is_the_conditional_output_and_scale_0_the_unconditional_one(process: NoiseProcess) -> None:
    x_t, t, labels = labelled(process)
    inner, null = ClassDenoiser(process), {"class_labels": torch.tensor(NULL)}
    with_, without = guided_pair(process)
    assert float((with_.x0 - without.x0).abs().max()) > 0.1
    zero, one = (Guided(inner, null, scale)(x_t, t, {"class_labels": labels}) for scale in (0.0, 1.0))
    torch.testing.assert_close(zero, without, rtol=0, atol=0)
    torch.testing.assert_close(one, with_, rtol=1e-14, atol=1e-14)


@every_process
def test_guidance_is_linear_in_the_scale_and_each_sample_may_have_its_own(process: NoiseProcess) -> None:
    x_t, t, labels = labelled(process)
    inner, null = ClassDenoiser(process), {"class_labels": torch.tensor(NULL)}
    scales = 2 * numbers(len(labels), seed=4)
    own = Guided(inner, null)(x_t, t, {"class_labels": labels, GUIDANCE: scales})
    for part, with_, without in zip(own, *guided_pair(process), strict=True):
        wanted = scales[:, None] * with_ + (1 - scales[:, None]) * without
        torch.testing.assert_close(part, wanted, rtol=1e-13, atol=1e-13)
    for row in (0, 17):
        fixed = Guided(inner, null, float(scales[row]))(x_t, t, {"class_labels": labels})
        for part, all_own in zip(fixed, own, strict=True):
            torch.testing.assert_close(part[row], all_own[row], rtol=1e-14, atol=1e-14)
            assert not torch.equal(part[row + 1], all_own[row + 1])


@every_process
@every_prediction
@in_turn("scale", SCALES)
@torch.no_grad()
def test_a_guided_denoiser_splits_the_same_x_t(process: NoiseProcess, prediction: Prediction, scale: float) -> None:
    """x_t = alpha x0 + sigma eps for any network and scale: both outputs satisfy it, and their weights sum to 1."""

    def network(x_t: Tensor, time: Tensor, *, shift: Tensor) -> Tensor:
        return toy.network(x_t, time) + shift

    toy = toy_denoiser(process, prediction)
    t = interior_times(31)
    x_t = process.mix(numbers(31, 2), numbers(31, 2, seed=1), t)
    inner = NetworkDenoiser(network, process, prediction)
    x0, eps = Guided(inner, {"shift": torch.zeros(1)}, scale)(x_t, t, {"shift": numbers(31, 1, seed=2)})
    alpha, sigma = (a[:, None] for a in process.alpha_sigma(t))
    allowed = 2e-14 * (1 + alpha * x0.abs() + sigma * eps.abs())
    assert bool(((process.mix(x0, eps, t) - x_t).abs() <= allowed).all())


@pytest.mark.parametrize("scale", [2.0, None])
def test_the_denoiser_is_asked_once_and_shown_the_null_beside_each_condition_that_has_one(scale: float | None) -> None:
    """The other conditions are passed twice unchanged. The scale, if it is among them, is not passed."""
    process = VPCosine()
    x_t, t, labels = labelled(process)
    inner = ClassDenoiser(process)
    text, size, empty = numbers(48, 5, 4, seed=5), numbers(48, 2, seed=6), numbers(5, 4, seed=7)
    cond = {"class_labels": labels, "text": text, "size": size}
    if scale is None:
        cond[GUIDANCE] = torch.full((48,), 2.0)
    before = {name: value.clone() for name, value in cond.items()}
    Guided(inner, {"class_labels": torch.tensor(NULL), "text": empty}, scale)(x_t, t, cond)
    assert inner.batches == [96]
    (heard,) = inner.heard
    assert set(heard) == {"class_labels", "text", "size"}
    assert torch.equal(heard["size"], torch.cat([size, size]))
    for name, null in [("class_labels", torch.full_like(labels, NULL)), ("text", empty.expand(48, 5, 4))]:
        halves = {tuple(half.flatten().tolist()) for half in heard[name].chunk(2)}
        assert halves == {tuple(null.flatten().tolist()), tuple(cond[name].flatten().tolist())}
        assert heard[name].dtype == cond[name].dtype
    assert set(cond) == set(before)
    assert all(torch.equal(cond[name], value) for name, value in before.items())


def test_a_null_takes_the_dtype_of_the_condition_and_a_scale_that_of_the_sample() -> None:
    process = VPCosine()
    x_t, t, labels = labelled(process)
    guided = Guided(ClassDenoiser(process), {"class_labels": torch.tensor(float(NULL))})
    single = guided(x_t.float(), t, {"class_labels": labels, GUIDANCE: torch.full((48,), 3.0, dtype=torch.float64)})
    double = guided(x_t.float().double(), t, {"class_labels": labels, GUIDANCE: torch.full((48,), 3.0)})
    assert single.x0.dtype == single.eps.dtype == torch.float32
    torch.testing.assert_close(single.x0.double(), double.x0, rtol=0, atol=1e-5)


def test_a_null_follows_a_condition_that_changes_its_dtype() -> None:
    process = VPCosine()
    x_t, t, labels = labelled(process)
    inner = ClassDenoiser(process)
    guided = Guided(inner, {"text": numbers(5, 4, seed=7)}, 2.0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        guided(x_t, t, {"class_labels": labels, "text": numbers(48, 5, 4, seed=5).to(dtype)})
        assert inner.heard[-1]["text"].dtype == dtype


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 2, 2)])
def test_guidance_weighs_samples_of_any_shape_by_their_own_scale(shape: tuple[int, ...]) -> None:
    """If a network returns its condition and the null is 0, x0 is the scale times the condition."""
    scales = clock(0, 0.5, 1, 2, 3, -1)

    def network(x_t: Tensor, time: Tensor, *, wanted: Tensor) -> Tensor:
        return wanted

    wanted = numbers(*shape, seed=1)
    guided = Guided(NetworkDenoiser(network, VPCosine(), X0()), {"wanted": torch.zeros(())})
    x0 = guided(numbers(*shape), 0.5, {"wanted": wanted, GUIDANCE: scales}).x0
    torch.testing.assert_close(x0, wanted * scales.reshape(-1, *[1] * (len(shape) - 1)), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    ("scale", "cond", "message"),
    [
        (2.0, None, "guidance needs the condition 'class_labels', got none"),
        (2.0, {"text": 0}, "guidance needs the condition 'class_labels', got text"),
        (None, {"class_labels": 0}, "guidance needs the condition 'guidance_scale', got class_labels"),
        (None, {"text": 0, "guidance_scale": 0}, "needs the condition 'class_labels', got guidance_scale, text"),
    ],
)
def test_guidance_without_its_condition_is_rejected(
    scale: float | None, cond: Mapping[str, Any] | None, message: str
) -> None:
    inner = ClassDenoiser(VPCosine())
    shown = None if cond is None else {name: torch.full((4,), value) for name, value in cond.items()}
    with pytest.raises(ValueError, match=message):
        Guided(inner, {"class_labels": torch.tensor(NULL)}, scale)(numbers(4, 2), 0.5, shown)
    assert not inner.batches


def test_guidance_without_a_null_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"guidance needs a value that replaces each dropped condition\. Pass null"):
        Guided(mixture(VPCosine()), {}, 2.0)


def test_a_guided_denoiser_is_seen_through_another_process_with_its_conditions() -> None:
    """The two wrappers commute."""
    own, process = FlowMatching(3.0), VPCosine()
    x_t, t, labels = labelled(process)
    null, cond = {"class_labels": torch.tensor(NULL)}, {"class_labels": labels}
    direct = Guided(ClassDenoiser(process), null, 2.0)(x_t, t, cond)
    for wrapped in (
        Reprocessed(Guided(ClassDenoiser(own), null, 2.0), process),
        Guided(Reprocessed(ClassDenoiser(own), process), null, 2.0),
    ):
        torch.testing.assert_close(wrapped(x_t, t, cond), direct, rtol=1e-11, atol=1e-11)
