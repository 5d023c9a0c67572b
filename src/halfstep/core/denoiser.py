"""Denoisers map (x_t, t, cond) to (x0, eps) for samples `[batch, *dims]` of any modality.

A denoiser is a network combined with a noise process and a prediction, or a wrapper around another denoiser. Samplers
and objectives call denoisers and never call networks directly.

Call a denoiser with clock times `[batch]`, or with a single time for all samples. `forward` receives a clock tensor in
both cases. Some of the library's classes also accept a plain number as the time, which saves a few small operations per
sampling step.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, final

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from halfstep.core.callable import CallableNetwork
from halfstep.core.door import check_denoiser, check_instance, check_real, got
from halfstep.core.noise import NoiseProcess, as_clock, per_sample
from halfstep.core.prediction import Denoised, Prediction, eps_from_x0
from halfstep.core.warnings import HalfstepWarning

Cond = Mapping[str, Tensor]
"""A mapping from names to conditions, each `[batch, ...]`, for example {"class_labels": int64 [batch]}."""


class Denoiser(nn.Module, ABC):
    """An estimator of the clean sample and the noise in x_t. Subclasses set `process` and define `forward`."""

    process: NoiseProcess
    num_steps: int | None = None
    """The number of sampler steps that this denoiser was distilled for, or None if it works with any number."""
    sampler: Any = None
    """The `Sampler` that this denoiser was distilled for, or None for DDIM.

    The type is Any to avoid importing samplers here."""
    shape: tuple[int, ...] | None = None
    """The shape of one sample, or None if it is unknown."""

    _takes_number: ClassVar[bool] = False
    """Whether `forward` also accepts a float as the time for all samples. For internal use."""

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        """Return x0 and eps, each shaped like `x_t` `[batch, *dims]`.

        Args:
            x_t: noisy samples.
            t: clock times in (0, 1], float64 `[batch]`.
            cond: conditions, keyed by name, or None.
        """

    def __call__(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        """Run `forward` and its hooks at the times `t`, either `[batch]` or a single time for all samples.

        Raises:
            ValueError: if `t` is neither a scalar nor a tensor of shape `[batch]`.
        """
        if not (self._takes_number and isinstance(t, float)):
            t = as_clock(t, x_t)
        result: Denoised = super().__call__(x_t, t, cond)
        return result

    def __repr__(self) -> str:
        """Return one line. To see the layers, print the network."""
        return f"{type(self).__name__}({self.extra_repr()})"

    def extra_repr(self) -> str:
        """Return the description of the denoiser that its `repr` shows in brackets."""
        # A denoiser of a user's own class may be printed before its process is set.
        process = [repr(self.process)] if getattr(self, "process", None) is not None else []
        known = {"num_steps": self.num_steps, "shape": self.shape}
        facts = [f"{name}={value}" for name, value in known.items() if value is not None]
        return ", ".join([*process, count_parameters(self), *facts])

    def guided(self, x_t: Tensor, t: Tensor | float, without: Denoised, with_: Denoised, scale: Tensor) -> Denoised:
        """Return without + scale (with_ - without) for both x0 and eps; a scale of 1 returns `with_`."""
        return Denoised(
            *(none + per_sample(scale, x_t) * (some - none) for none, some in zip(without, with_, strict=True))
        )


def count_parameters(module: nn.Module) -> str:
    """Return the number of a module's parameters as text, such as "1,024 parameters"."""
    parameters = list(module.parameters())
    if any(isinstance(parameter, UninitializedParameter) for parameter in parameters):
        return "lazy parameters"
    number = sum(parameter.numel() for parameter in parameters)
    return f"{number:,} parameter{'s' * (number != 1)}"


@final
class NetworkDenoiser(Denoiser):
    """A network together with its noise process and its prediction.

    The network is any callable `(x_t, time, **cond) -> output`. If the callable is not itself a module, the modules
    that it calls are found and trained (see `CallableNetwork`). `time` is t itself: a tensor `[batch]` with values in
    [0, 1], in the dtype of x_t or in float32 if that is more precise. A network that expects a different clock, such as
    diffusers' timesteps or the log-SNR, must convert `time`. The output has `prediction.channels` channels for each
    channel of x_t. The output is cast to the dtype of x_t, so half precision can only be used inside the network. If
    the network's attribute `restores_norm` is true, guidance rescales the guided output so that its norm over the last
    axis equals that of the conditional output.

    Raises:
        ValueError: if an argument has the wrong type or, during a call, if the network's output has the wrong shape.
    """

    _takes_number: ClassVar[bool] = True

    def __init__(
        self, network: nn.Module | Callable[..., Tensor], process: NoiseProcess, prediction: Prediction
    ) -> None:
        super().__init__()
        if isinstance(network, type) or not callable(network):
            raise ValueError(
                f"the network must be a module or a function (x_t, time, **cond) -> output, got {got(network)}. Pass "
                "an instance"
            )
        if isinstance(network, Denoiser):
            raise ValueError(f"the network is already a denoiser (a {type(network).__name__}). Use it directly")
        check_instance("the process", process, NoiseProcess, "halfstep.VPCosine()")
        check_instance("the prediction", prediction, Prediction, "halfstep.V()")
        self.network: Any = network if isinstance(network, nn.Module) else CallableNetwork(network)
        self.process = process
        self.prediction = prediction

    def extra_repr(self) -> str:
        called: Any = self.network.function if isinstance(self.network, CallableNetwork) else self.network
        name = getattr(called, "__name__", type(called).__name__)
        return f"{name}, {self.prediction!r}, {super().extra_repr()}"

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        precision = torch.promote_types(x_t.dtype, torch.float32)
        if isinstance(t, float):
            time = torch.full(x_t.shape[:1], t, dtype=precision, device=x_t.device)
        else:
            time = t.to(device=x_t.device, dtype=precision)
        output: Tensor = self.network(x_t, time, **(cond or {}))
        needed = tuple(x_t.shape)
        if x_t.ndim > 1:
            needed = (needed[0], needed[1] * self.prediction.channels, *needed[2:])
        if tuple(output.shape) != needed:
            raise ValueError(
                f"the network returned the shape {tuple(output.shape)} for an input of shape {tuple(x_t.shape)}, but "
                f"{type(self.prediction).__name__} needs the shape {needed}"
            )
        return self.prediction.denoised(output.to(x_t.dtype), x_t, *self.process.amplitudes(t))

    def guided(self, x_t: Tensor, t: Tensor | float, without: Denoised, with_: Denoised, scale: Tensor) -> Denoised:
        if not getattr(self.network, "restores_norm", False):
            return super().guided(x_t, t, without, with_, scale)
        alpha, sigma = self.process.alpha_sigma(as_clock(t, x_t))
        none, some = (self.prediction.target(*pair, alpha, sigma) for pair in (without, with_))
        moved = none + per_sample(scale, x_t) * (some - none)
        moved = moved * (some.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
        return self.prediction.denoised(moved, x_t, alpha, sigma)


@final
class Clipped(Denoiser):
    """A denoiser for sampling images, which clips x0 to [low, high] and recomputes eps from the clipped x0.

    During training, only the targets of the matching stage are clipped. Source: the authors' dpm.py (arXiv:2202.00512).

    Raises:
        ValueError: if low >= high.
    """

    _takes_number: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        check_real(low=low, high=high)
        if not low < high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        check_denoiser("the model to clip", denoiser, Denoiser)
        self.denoiser = denoiser
        self.process = denoiser.process
        self.num_steps, self.sampler, self.shape = denoiser.num_steps, denoiser.sampler, denoiser.shape
        self.low = low
        self.high = high

    def extra_repr(self) -> str:
        return f"{self.denoiser!r}, low={self.low:g}, high={self.high:g}"

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        x0 = self.denoiser(x_t, t, cond).x0.clamp(self.low, self.high)
        return Denoised(x0, eps_from_x0(x_t, x0, *self.process.amplitudes(t)))


@final
class Reprocessed(Denoiser):
    """An exact conversion of a denoiser to a different noise process.

    The original denoiser is called at the time at which its own process has the same log-SNR, on a sample rescaled to
    match that process. Both denoisers have the same probability flow, up to a change of time and scale.

    Raises:
        ValueError: if the process reaches noise levels outside the range of the denoiser's process.
    """

    def __init__(self, denoiser: Denoiser, process: NoiseProcess) -> None:
        super().__init__()
        check_denoiser("the first argument of Reprocessed", denoiser, Denoiser)
        check_instance("the process", process, NoiseProcess, "halfstep.VPCosine()")
        known, asked = (
            [float(p.log_snr(torch.tensor([t], dtype=torch.float64))) for t in (0.0, 1.0)]
            for p in (denoiser.process, process)
        )
        slack = 1e-9
        if asked[0] > known[0] + slack or asked[1] < known[1] - slack:
            raise ValueError(
                f"the denoiser covers log-SNRs from {known[1]:.6g} to {known[0]:.6g}, but the process goes from "
                f"{asked[1]:.6g} to {asked[0]:.6g}. Choose bounds within the denoiser's range"
            )
        self.denoiser = denoiser
        self.process = process

    def extra_repr(self) -> str:
        return f"{self.denoiser!r}, {self.process!r}"

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        own = self.denoiser.process
        there = own.time_at(self.process.log_snr(t)).clamp(max=1)
        scale = torch.hypot(*own.alpha_sigma(there)) / torch.hypot(*self.process.alpha_sigma(t))
        return self.denoiser(per_sample(scale, x_t) * x_t, there, cond)


GUIDANCE: Final = "guidance_scale"
"""The name of the condition that contains each sample's guidance scale, `[batch]`."""


@final
class Guided(Denoiser):
    """A denoiser that applies classifier-free guidance, uncond + scale (cond - uncond), to both x0 and eps.

    A scale of 1 disables guidance, and a scale of 0 drops the conditions. The denoiser is called only once, on a
    doubled batch.

    Args:
        null: for each condition to drop, the value that represents "no condition" for one sample. Other conditions are
            kept.
        scale: one scale for all samples. If None, each sample's scale is read from the condition `guidance_scale`,
            which is not passed to the denoiser.

    Source: Ho & Salimans 2022 (arXiv:2207.12598), where w = scale - 1.

    Raises:
        ValueError: if `null` is empty or, during a call, if the scale or a condition in `null` is missing.
    """

    _takes_number: ClassVar[bool] = True

    def __init__(self, denoiser: Denoiser, null: Mapping[str, Tensor], scale: float | None = None) -> None:
        super().__init__()
        if not null:
            raise ValueError(
                "guidance needs a value that replaces each dropped condition. Pass null, such as {'class_labels': 10}"
            )
        check_denoiser("the model to guide", denoiser, Denoiser)
        if scale is not None:
            check_real(scale=scale)
            if not math.isfinite(scale):
                raise ValueError(f"a guidance scale must be finite, got {scale}")
        self.denoiser = denoiser
        self.process = denoiser.process
        self.num_steps, self.sampler, self.shape = denoiser.num_steps, denoiser.sampler, denoiser.shape
        self.null = {name: torch.as_tensor(value) for name, value in null.items()}
        self._null_held: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}
        self.scale = scale

    def extra_repr(self) -> str:
        scale = f"the condition {GUIDANCE}" if self.scale is None else f"{self.scale:g}"
        return f"{self.denoiser!r}, null={sorted(self.null)}, scale={scale}"

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        shown = dict(cond or {})
        scale = x_t.new_full((len(x_t),), self.scale) if self.scale is not None else shown.pop(GUIDANCE, None)
        missing = [name for name in self.null if name not in shown]
        if scale is None or missing:
            wanted = missing[0] if missing else GUIDANCE
            raise ValueError(f"guidance needs the condition {wanted!r}, got {', '.join(sorted(cond or {})) or 'none'}")
        both = {name: torch.cat([self._null(name, value), value]) for name, value in shown.items()}
        found = self.denoiser(torch.cat([x_t, x_t]), t if isinstance(t, float) else t.repeat(2), both)
        without, with_ = (Denoised(*pair) for pair in zip(found.x0.chunk(2), found.eps.chunk(2), strict=True))
        return self.denoiser.guided(x_t, t, without, with_, scale)

    def _null(self, name: str, like: Tensor) -> Tensor:
        if name not in self.null:
            return like
        # Copied to each device only once, because each copy blocks the host.
        place = (name, like.device, like.dtype)
        if place not in self._null_held:
            self._null_held[place] = self.null[name].to(like)
        return self._null_held[place].expand_as(like)


LARGEST_GAIN: Final = 1000.0
"""The gain (see `output_gain`) above which an output that is accurate to 1% does not determine x0."""


def output_gain(process: NoiseProcess, prediction: Prediction, t: float = 1.0) -> float:
    """Return the gain from output error to x0 error at t: sigma / alpha for eps, 1 for x0.

    For "both", the two heads are assumed to have the same error, whose effects on x0 partly cancel out.
    """
    alpha, sigma = process.alpha_sigma(torch.tensor([t], dtype=torch.float64, device="cpu"))
    output = torch.ones(1, prediction.channels, dtype=torch.float64, device="cpu")
    x_t = torch.zeros(1, 1, dtype=torch.float64, device="cpu")
    gain = float(prediction.denoised(output, x_t, alpha, sigma).x0.abs())
    # Dividing by a signal of 0 may result in NaN, which would pass any check against an upper limit.
    return math.inf if math.isnan(gain) else gain


def warn_of_gain(process: NoiseProcess, prediction: Prediction, *, given: bool = False) -> None:
    """Warn if the first step from t = 1 amplifies the network's error too much, as eps prediction does at zero SNR.

    Args:
        given: whether the network is already trained, in which case its settings cannot be changed.
    """
    gain = output_gain(process, prediction)
    if gain > LARGEST_GAIN:
        log_snr = float(process.log_snr(torch.ones(1, dtype=torch.float64)))
        error = (
            f"an error in its output is {gain:.2g} times as large in x0"
            if gain < math.inf
            else "its output does not determine x0"
        )
        remedies = ["match it to v first (halfstep distill --matching.prediction v)"]
        if not given:
            remedies = [
                "train it to predict x0, v or both (--model.prediction)",
                "match it to v first (--matching.prediction v)",
                "start from a higher SNR (--model.log-snr-min)",
            ]
        warnings.warn(
            f"this network predicts {type(prediction).__name__.lower()}, and at t = 1, where the log-SNR is "
            f"{log_snr:.3g}, {error}, so few-step sampling and distillation fail. To fix this, "
            f"{', or '.join(remedies)}",
            HalfstepWarning,
            stacklevel=3,
        )


def warn_of_signal(process: NoiseProcess) -> None:
    """Warn if the process retains more than 5% of the signal's power at t = 1, because the network was then never
    trained on pure noise."""
    end = torch.ones(1, dtype=torch.float64)
    log_snr = float(process.log_snr(end))
    # The limit is ten times the signal power that remains at the end of Stable Diffusion's table.
    if (power := float(process.alpha_sigma(end)[0].square())) > 0.05:
        warnings.warn(
            f"the teacher's last noise level retains {power:.2f} of the signal's power (log-SNR {log_snr:.2g}), so "
            "sampling from pure noise starts at a level on which the network was never trained. Check the scheduler's "
            "betas and num_train_timesteps, or train the teacher on noise levels that end in pure noise",
            HalfstepWarning,
            stacklevel=3,
        )


def ddim_step(denoised: Denoised, process: NoiseProcess, s: Tensor | float) -> Tensor:
    """Return x_s = alpha_s x0 + sigma_s eps, `[batch, *dims]`, which is x0 itself at s = 0.

    Source: Song et al. 2020 (arXiv:2010.02502) with eta = 0; Salimans & Ho 2022, equations 7 and 8.
    """
    alpha, sigma = process.landing(s)
    return per_sample(alpha, denoised.x0) * denoised.x0 + per_sample(sigma, denoised.x0) * denoised.eps
