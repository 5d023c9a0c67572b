"""Shared code of the mathematical tests: numbers, members of a registry, teachers, an integrator."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Final, final

import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from halfstep.core.denoiser import Cond, Denoiser, NetworkDenoiser
from halfstep.core.noise import (
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    cosine_betas,
    linear_betas,
    per_sample,
    processes,
    zero_terminal_betas,
)
from halfstep.core.oracle import GaussianDenoiser, MixtureDenoiser
from halfstep.core.prediction import Denoised, Prediction, eps_from_x0
from halfstep.nets import EncoderHalf, encoder_half
from halfstep.objectives import Halving
from halfstep.registry import Registry
from halfstep.samplers import DDIM, coordinates, samplers

REQUIRED: Final[dict[str, Any]] = {"num_steps": 4, "objective": Halving(4)}
"""Values for arguments of registered classes that have no default."""


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Return standard normal float64 numbers, the same for the same arguments."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def clock(*times: float) -> Tensor:
    """Return the times as a float64 clock tensor."""
    return torch.tensor(times, dtype=torch.float64)


def interior_times(count: int = 97) -> Tensor:
    """Return times strictly inside (0, 1), where every process has finite amplitudes of signal and noise."""
    return torch.linspace(0, 1, count + 2, dtype=torch.float64)[1:-1]


def build(member: type[Any]) -> Any:
    """Return an instance of a registered class with its defaults, and `REQUIRED` for fields without one."""
    missing = [
        field.name
        for field in dataclasses.fields(member)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return member(**{name: REQUIRED[name] for name in missing})


def members(registry: Registry[Any]) -> list[Any]:
    """Return an instance of every registered member as a pytest parameter with its name."""
    found = [pytest.param(build(member), id=name) for name, member in registry.items()]
    assert found, f"no {registry.family} is registered, so its contract would pass silently"
    return found


def variants() -> list[Any]:
    """Return every registered sampler; those that integrate in a coordinate, in every registered coordinate."""
    found = []
    for name, member in samplers.items():
        if "coordinate" in {field.name for field in dataclasses.fields(member)}:
            for where, coordinate in coordinates.items():
                found.append(pytest.param(member(coordinate=coordinate()), id=f"{name}-{where}"))  # type: ignore[call-arg]
        else:
            found.append(pytest.param(build(member), id=name))
    return found


FURTHER_PROCESSES: Final = [
    pytest.param(FlowMatching(3.0), id="flow_shift_3"),
    pytest.param(VPTable(cosine_betas()), id="vp_table_cosine"),
    pytest.param(VPTable(zero_terminal_betas(linear_betas())), id="vp_table_zero_terminal"),
    pytest.param(VPTable((0.02, 0.1, 0.3, 0.5)), id="vp_table_of_4"),
]
"""Registered processes with arguments that change more than numbers."""


def members_and_further_processes() -> list[Any]:
    """Return every registered process with its defaults, and `FURTHER_PROCESSES`."""
    return [*members(processes), *FURTHER_PROCESSES]


def even_amplitudes(process: NoiseProcess) -> bool:
    """Return whether a process has samples of unit size and an angle that falls evenly in t, so that fixed bounds on
    rounding are valid at every step of the uniform grid."""
    return process in (VPCosine(), FlowMatching())


def in_turn(name: str, values: Sequence[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each value of an argument within one test: `parametrize` for cases that are faster than pytest's
    overhead per test. A failure names the value."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**arguments: Any) -> None:
            skipped = []
            for value in values:
                try:
                    test(**arguments, **{name: value})
                except pytest.skip.Exception as skip:
                    skipped.append(skip)
                except Exception as error:
                    error.add_note(f"with {name} = {value!r}")
                    raise
            if len(skipped) == len(values):
                raise skipped[0]

        signature = inspect.signature(test)
        kept = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        assert len(kept) == len(signature.parameters) - 1, f"the test has no argument {name}"
        run.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
        return run

    return decorate


class ToyNetwork(nn.Module):
    """A smooth function of x_t and t without symmetries, with the number of outputs that a prediction needs."""

    def __init__(self, prediction: Prediction, seed: int = 0) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(0.7 * numbers(prediction.channels, 4, seed=seed))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        t = per_sample(time, x_t)
        rows = self.coefficients.to(x_t)
        return torch.cat([c[0] * x_t + torch.sin(2 * x_t + 3 * c[1] * t + c[2]) + c[3] * t for c in rows], dim=1)


def toy_denoiser(process: NoiseProcess, prediction: Prediction, seed: int = 0) -> NetworkDenoiser:
    """Return a `ToyNetwork` with the process and the prediction, which is not an exact denoiser of anything."""
    return NetworkDenoiser(ToyNetwork(prediction, seed), process, prediction)


class ToyHalf(EncoderHalf):
    """Smooth features of noisy samples of any shape, for networks without blocks."""

    channels = 5

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(numbers(self.channels, 3, seed=8))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        t, rows = per_sample(time, x_t), self.coefficients.to(x_t)
        return torch.stack([torch.sin(c[0] * x_t + c[1] * t + c[2]) for c in rows], dim=1)


@encoder_half.register(ToyNetwork)
@encoder_half.register(MixtureDenoiser)
def _(network: Any) -> EncoderHalf:
    return ToyHalf()


def skip_where_x0_is_undefined(denoiser: Denoiser) -> None:
    """Skip a prediction of noise on a process with alpha(1) = 0, because it does not determine x0 there."""
    if not bool(torch.isfinite(denoiser(numbers(1, 1), 1.0).x0).all()):
        pytest.skip("at t = 1 this output says nothing about x0 on this process")


def gaussian(process: NoiseProcess) -> GaussianDenoiser:
    """Return the exact denoiser of a Gaussian that is neither centred nor of unit width."""
    return GaussianDenoiser(process, mean=0.3, std=0.5)


def mixture(process: NoiseProcess) -> MixtureDenoiser:
    """Return the exact denoiser of three Gaussians in the plane, with different widths and weights."""
    means = torch.tensor([[-0.8, 0.1], [0.6, 0.7], [0.4, -0.9]], dtype=torch.float64)
    return MixtureDenoiser(process, means, std=clock(0.3, 0.4, 0.35), weights=clock(0.5, 0.2, 0.3))


@final
class Watched(Denoiser):
    """Another denoiser that records the times and outputs of its calls."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = denoiser.process
        self.times: list[Tensor] = []
        self.answers: list[Denoised] = []

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        self.times.append(t.clone())
        self.answers.append(self.denoiser(x_t, t, cond))
        return self.answers[-1]


def integrated_flow(denoiser: Denoiser, x_t: Tensor, s: float = 0.0, t: float = 1.0, rtol: float = 1e-12) -> Tensor:
    """Return the probability-flow ODE's solution from `x_t` at time t to time s, with an independent integrator.

    With u = x_t / sqrt(alpha^2 + sigma^2) and tan(phi) = sigma / alpha, every process obeys du / dphi = cos(phi) eps -
    sin(phi) x0. For s = 0, the integration stops at t = 1e-6 and returns the x0 there, which is off by the square of
    the remaining noise (4.7e-5 on the cosine process).
    """
    process = denoiser.process
    last = s or 1e-6

    def place(time: float) -> tuple[float, float]:
        alpha, sigma = (float(a) for a in process.alpha_sigma(clock(time)))
        return math.atan2(sigma, alpha), math.hypot(alpha, sigma)

    def state(phi: float, u: Any) -> tuple[Tensor, float]:
        time = float(process.time_at(clock(-2 * math.log(math.tan(phi)))).clamp(last, t))
        return torch.as_tensor(u, dtype=torch.float64).reshape(x_t.shape) * place(time)[1], time

    def slope(phi: float, u: Any) -> Any:
        x0, eps = denoiser(*state(phi, u))
        return (math.cos(phi) * eps - math.sin(phi) * x0).flatten().numpy()

    (start, radius), (end, _) = place(t), place(last)
    result = solve_ivp(slope, (start, end), (x_t / radius).flatten().numpy(), "DOP853", rtol=rtol, atol=rtol / 10)
    assert result.success
    x_s, time = state(end, result.y[:, -1])
    return x_s if s else denoiser(x_s, time).x0


def pure_noise(process: NoiseProcess, *shape: int, seed: int = 0) -> Tensor:
    """Return samples at t = 1: noise with the process's own amplitude there."""
    return float(process.alpha_sigma(clock(1.0))[1]) * numbers(*shape, seed=seed)


@final
class Landing(Denoiser):
    """The exact student: its x0 makes one step of 1 / num_steps land where the teacher's DDIM steps land.

    It solves for the x0 with the subtractive form of the paper's algorithm 2, in the dtype of x_t, with steps taken by
    `DDIM`. It uses no weights and means, and is therefore an independent check of `halving_target`.
    """

    def __init__(self, teacher: Denoiser, num_steps: int, num_teacher_steps: int = 2, offset: float = 0.0) -> None:
        super().__init__()
        self.teacher = teacher
        self.process = teacher.process
        self.num_steps = num_steps
        self.num_teacher_steps = num_teacher_steps
        self.offset = offset

    def landing(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the teacher's x_s at s = t - 1 / num_steps."""
        fine = self.num_steps * self.num_teacher_steps
        first = (t * fine).round()
        for k in range(self.num_teacher_steps):
            here, there = (first - k) / fine, (first - k - 1) / fine
            x_t, _ = DDIM().step(self.teacher, x_t, here, there, None, None)
        return x_t

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        alpha_t, sigma_t = self.process.alpha_sigma(t)
        alpha_s, sigma_s = self.process.landing(((t * self.num_steps).round() - 1) / self.num_steps)
        ratio = sigma_s / sigma_t
        x0 = (self.landing(x_t, t) - per_sample(ratio, x_t) * x_t) / per_sample(alpha_s - ratio * alpha_t, x_t)
        return Denoised(x0 + self.offset, eps_from_x0(x_t, x0 + self.offset, alpha_t, sigma_t))


def landing_roundings(teacher: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, num_teacher_steps: int) -> Tensor:
    """Return the largest sum of rounding errors of 2^-52 in x_s, `[batch, 1]`, after K DDIM steps of the teacher.

    A step computes alpha x0 + sigma eps, with an error of 2^-52 of |alpha x0| + |sigma eps|, which may be far above the
    sum: for noise of 80 times the data, or for an x0 that is sigma / alpha times an output. As x / sigma adds up along
    the steps, an error at noise sigma_k is one of sigma_s / sigma_k in x_s. The single step that does the same
    multiplies x0 by its width, alpha_s - alpha_t sigma_s / sigma_t, which is off by 2^-52 of alpha_s.
    """
    process = teacher.process
    alpha_s, sigma_s = process.landing(s)
    sum_size = per_sample(sigma_s / process.alpha_sigma(t)[1], x_t) * x_t.abs()
    x0_size = torch.zeros_like(x_t)
    for k in range(num_teacher_steps):
        here, there = (t + (s - t) * (share / num_teacher_steps) for share in (k, k + 1))
        there = s if k == num_teacher_steps - 1 else there
        denoised = teacher(x_t, here)
        alpha, sigma = process.landing(there)
        down = torch.where(sigma > 0, sigma_s / sigma, 1.0)
        here_size = per_sample(alpha, x_t) * denoised.x0.abs() + per_sample(sigma, x_t) * denoised.eps.abs()
        sum_size = sum_size + per_sample(down, x_t) * here_size
        x0_size = torch.maximum(x0_size, denoised.x0.abs())
        x_t, _ = DDIM().step(teacher, x_t, here, there, None, None)
    largest = sum_size.amax(1, keepdim=True) + per_sample(alpha_s, x_t) * x0_size.amax(1, keepdim=True)
    return 2**-52 * largest


def step_width(process: NoiseProcess, t: Tensor, s: Tensor) -> Tensor:
    """Return the factor of x0 in a step from t to s, alpha_s - alpha_t sigma_s / sigma_t, `[batch, 1]`."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.alpha_sigma(t), process.landing(s)
    return (alpha_s - alpha_t * sigma_s / sigma_t)[:, None]
