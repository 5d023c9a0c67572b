"""The standard integrators for the probability-flow ODE: Euler, midpoint, Heun and the classical RK4.

A rule integrates the ODE in one of the coordinates that `coordinates.py` defines. In the noise-to-signal coordinate,
Euler is DDIM, and Heun is the sampler of Karras et al. and of diffusers. That sampler needs a grid that does not start
at zero SNR.

The network cannot be called on clean data. A method that calls the network at the end of each step therefore uses a
rule one order lower for its last step: Euler for Heun, and Heun's third-order rule for RK4. The method keeps its order,
because only one of its N steps uses the lower-order rule. In the log-SNR coordinate, the last step would be infinitely
long, so that step uses the angle instead, which has the same y. If a process keeps some noise at t = 0, a stage of the
last step can have less noise than the process ever reaches. The network is then called at the time that corresponds to
the stage's share of the step, and the sample moves only to that time.

With clock times `[batch]`, the rule for each sample is chosen on the device. Every step then makes the same number of
network calls as a step that lands at s > 0.

Source: Salimans & Ho 2022 (arXiv:2202.00512), appendices A to D; Karras et al. 2022 (arXiv:2206.00364), algorithm 1.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import Cond, Denoiser
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised
from halfstep.samplers.base import Memory, Noise, Sampler, Time, samplers
from halfstep.samplers.coordinates import Angle, Coordinate

Share = float | Tensor
"""One number for all samples, or a clock tensor `[batch]`."""


class Rule(NamedTuple):
    """An explicit Runge-Kutta rule in which each stage depends only on the slope of the previous stage.

    The nodes are the positions of the stages as fractions of the step. The weights of the slopes sum to 1.
    """

    nodes: tuple[Share, ...]
    weights: tuple[Share, ...]


EULER: Final = Rule((0.0,), (1.0,))
MIDPOINT: Final = Rule((0.0, 1 / 2), (0.0, 1.0))
TRAPEZOID: Final = Rule((0.0, 1.0), (1 / 2, 1 / 2))
HEUN_3: Final = Rule((0.0, 1 / 3, 2 / 3), (1 / 4, 0.0, 3 / 4))
CLASSICAL_4: Final = Rule((0.0, 1 / 2, 1 / 2, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def runge_kutta_step(
    rule: Rule, coordinate: Coordinate, denoiser: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond | None
) -> Tensor:
    """Return x_s `[batch, *dims]` after one step of `rule` along the probability-flow ODE."""
    process = denoiser.process
    alpha, sigma = process.alpha_sigma(t)
    start, scale_t = coordinate.place(alpha, sigma)
    end, scale_s = coordinate.place(*process.landing(s))
    y, width = x_t / per_sample(scale_t, x_t), end - start
    x, time = x_t, t
    way = slope = torch.zeros_like(y)
    for number, (node, weight) in enumerate(zip(rule.nodes, rule.weights, strict=True)):
        if number:
            time = _time_of(node, start + node * width, coordinate, process, t, s)
            alpha, sigma = process.alpha_sigma(time)
            tau, scale = coordinate.place(alpha, sigma)
            x = (y + per_sample(tau - start, y) * slope) * per_sample(scale, y)
        slope = coordinate.slope(denoiser(x, time, cond), alpha, sigma)
        if isinstance(weight, Tensor) or weight:
            way = way + per_sample(weight, y) * slope
    return (y + per_sample(width, y) * way) * per_sample(scale_s, y)


def _time_of(node: Share, tau: Tensor, coordinate: Coordinate, process: NoiseProcess, t: Tensor, s: Tensor) -> Tensor:
    """Return the clock times `[batch]` of the stage at `tau`, at the fraction `node` of the step from t to s."""
    # t and s are returned unchanged, because conversion would round them.
    if not isinstance(node, Tensor) and node == 1:
        return s
    time = process.time_at(coordinate.log_snr(tau))
    time = torch.where(time > s, time, t + node * (s - t))
    if isinstance(node, Tensor):
        time = torch.where(node == 1, s, torch.where(node == 0, t, time))
    return time


def _rule_for_each(clean: Tensor, last: Rule, rule: Rule) -> Rule:
    """Return one rule that applies `last` to the samples marked in `clean` `[batch]` and `rule` to all others.

    If `last` has fewer stages than `rule`, the additional calls are made at the start of the step and have weight 0.
    """

    def shares(of_last: tuple[Any, ...], of_rule: tuple[Any, ...]) -> tuple[Share, ...]:
        padded = of_last + (0.0,) * (len(of_rule) - len(of_last))
        pairs = zip(padded, of_rule, strict=True)
        return tuple(b if a == b else torch.full_like(clock, b).masked_fill(clean, a) for a, b in pairs)

    clock = torch.empty_like(clean, dtype=torch.float64)
    return Rule(shares(last.nodes, rule.nodes), shares(last.weights, rule.weights))


@final
@dataclass(frozen=True)
class _AngleOntoClean(Coordinate):
    """The angle for samples that land on clean data, and `coordinate` for all others.

    `clean` `[batch]` marks the samples that land on clean data.
    """

    coordinate: Coordinate
    clean: Tensor
    reaches_clean: ClassVar[bool] = True

    def place(self, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        tau, scale = self.coordinate.place(alpha, sigma)
        angle, radius = Angle().place(alpha, sigma)
        return torch.where(self.clean, angle, tau), torch.where(self.clean, radius, scale)

    def log_snr(self, tau: Tensor) -> Tensor:
        return torch.where(self.clean, Angle().log_snr(tau), self.coordinate.log_snr(tau))

    def slope(self, denoised: Denoised, alpha: Tensor, sigma: Tensor) -> Tensor:
        in_angle, slope = (each.slope(denoised, alpha, sigma) for each in (Angle(), self.coordinate))
        return torch.where(per_sample(self.clean, slope).bool(), in_angle, slope)


@dataclass(frozen=True)
class RungeKutta(Sampler):
    """A Runge-Kutta method in a coordinate. Subclasses set the rule and the rule for the last step."""

    coordinate: Coordinate = field(default_factory=Angle)

    rule: ClassVar[Rule]
    last: ClassVar[Rule]
    """The rule for the step onto clean data. It has no more stages than `rule`."""

    def __init_subclass__(cls) -> None:
        cls.evals_per_step, cls.evals_last_step = len(cls.rule.nodes), len(cls.last.nodes)

    @final
    def step(
        self, denoiser: Denoiser, x_t: Tensor, t: Time, s: Time, cond: Cond | None, memory: Memory, noise: Noise = None
    ) -> tuple[Tensor, Memory]:
        start, end = as_clock(t, x_t), as_clock(s, x_t)
        rule, coordinate = self.rule, self.coordinate
        if isinstance(s, Tensor):
            clean = end == 0
            rule = _rule_for_each(clean, self.last, rule)
            if not coordinate.reaches_clean:
                coordinate = _AngleOntoClean(coordinate, clean)
        elif s == 0:
            rule = self.last
            if not coordinate.reaches_clean:
                coordinate = Angle()
        return runge_kutta_step(rule, coordinate, denoiser, x_t, start, end, cond), None


@final
@samplers.register("euler")
@dataclass(frozen=True)
class Euler(RungeKutta):
    """A first-order, deterministic sampler with one network call per step."""

    rule: ClassVar[Rule] = EULER
    last: ClassVar[Rule] = EULER
    order: ClassVar[int] = 1


@final
@samplers.register("midpoint")
@dataclass(frozen=True)
class Midpoint(RungeKutta):
    """A second-order, deterministic sampler that uses the slope at the midpoint, with two network calls per step."""

    rule: ClassVar[Rule] = MIDPOINT
    last: ClassVar[Rule] = MIDPOINT
    order: ClassVar[int] = 2


@final
@samplers.register("heun")
@dataclass(frozen=True)
class Heun(RungeKutta):
    """A second-order, deterministic sampler that averages the slopes at both ends of a step, with two network calls per
    step and one in the last step.

    Source: Karras et al. 2022 (arXiv:2206.00364), algorithm 1, in the noise-to-signal coordinate.
    """

    rule: ClassVar[Rule] = TRAPEZOID
    last: ClassVar[Rule] = EULER
    order: ClassVar[int] = 2


@final
@samplers.register("rk4")
@dataclass(frozen=True)
class RK4(RungeKutta):
    """The classical fourth-order Runge-Kutta method, a deterministic sampler with four network calls per step and three
    in the last step."""

    rule: ClassVar[Rule] = CLASSICAL_4
    last: ClassVar[Rule] = HEUN_3
    order: ClassVar[int] = 4
