"""Convert diffusers' scheduler configs to our processes and predictions, and back.

Timestep k of T noise levels corresponds to our time t = (k + 1) / T, where t = 0 is clean data. On the straight path of
flow matching, a scheduler's sigma equals our sigma, and the scheduler's timestep is T sigma.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from halfstep.core.noise import (
    FlowMatching,
    NoiseProcess,
    VPCosine,
    VPTable,
    cosine_betas,
    linear_betas,
    scaled_linear_betas,
    zero_terminal_betas,
)
from halfstep.core.prediction import X0, Eps, FlowVelocity, Prediction, V
from halfstep.hub.stock import fields_of, in_one_line, quiet, stock, warn_of_fields
from halfstep.samplers import DDIM, Ancestral, DPMSolverPP2M, Sampler

TABLES: Final = (
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
)  # fmt: skip
"""Schedulers with a table of betas. They differ only in how they take a step, which is not a property of the model."""
SHIFTED_TABLES: Final = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
"""Schedulers that divide their table's signal-to-noise ratios by a constant."""
COSINE: Final = "CosineDPMSolverMultistepScheduler"
"""A scheduler with EDM preconditioning, which passes the angle of (alpha, sigma) to the network as the time."""
FLOW: Final = "FlowMatchEulerDiscreteScheduler"
"""The flow-matching scheduler."""
KNOWN: Final = (*TABLES, *SHIFTED_TABLES, COSINE, FLOW)
PREDICTIONS: Final[dict[str, Prediction]] = {"epsilon": Eps(), "sample": X0(), "v_prediction": V()}
"""diffusers' names for the prediction types of schedulers with a table of betas."""
GONE: Final = ("predict_epsilon", "tensor_format", "timestep_values")
"""Config fields that diffusers' schedulers had in 2022 but no longer have."""
USE_ONNX: Final = "Use --format onnx, or halfstep.load in Python"
MATCH_TO_COSINE: Final = (
    "Match the model to the cosine process first (halfstep distill --matching.process cosine), or use --format onnx"
)
_RAMPS: Final = {"linear": linear_betas, "scaled_linear": scaled_linear_betas}
"""diffusers' names for the beta schedules that are defined by the first and last beta."""


@final
@dataclass(frozen=True)
class Schedule:
    """The model properties that a scheduler's config contains."""

    process: NoiseProcess
    prediction: Prediction
    clip: bool
    """Whether sampling clips x0 to [-1, 1]."""
    num_train_timesteps: int
    learned_variance: bool
    """Whether the network also returns a variance."""
    last_time: float = 0.0
    """The time at which the last step ends: 0 (clean data) or the time of a table's first level."""

    @property
    def is_flow(self) -> bool:
        """Whether the path from data to noise is straight."""
        return isinstance(self.process, FlowMatching)

    def time_of(self, timestep: float, sigma: float | None) -> float:
        """Return the time of a scheduler's step, from `sigma` if the process uses it, and otherwise from `timestep`."""
        if sigma is not None and isinstance(self.process, VPCosine):
            return float(self.process.time_at(torch.tensor(-2 * math.log(sigma), dtype=torch.float64)))
        if sigma is not None and isinstance(self.process, FlowMatching):
            return sigma / (self.process.shift - (self.process.shift - 1) * sigma)
        return (timestep + 1) / self.num_train_timesteps


def read_schedule(config: Mapping[str, Any], mu: float | None = None) -> Schedule:
    """Return the schedule that a scheduler's config describes, with diffusers' defaults for missing fields.

    Args:
        mu: the dynamic shift that the pipeline set for its sample size.

    Raises:
        ValueError: if the scheduler's class or a field is not supported.
    """
    kind = config.get("_class_name")
    if kind not in KNOWN:
        fields = ", ".join(name for name in config if not name.startswith("_")) or "none"
        raise ValueError(f"the scheduler {kind} is not supported (fields: {fields}). Use one of {', '.join(KNOWN)}")
    try:
        with quiet():
            full: dict[str, Any] = dict(stock(kind).from_config(current := renewed(config)).config)
        # Configs are passed between schedulers, so they contain fields that only some schedulers support.
        foreign = [n for n in current if n[0] != "_" and not any(n in fields_of(one) for one in (kind, *KNOWN))]
        warn_of_fields("the scheduler's config", current, foreign)
        return _read(kind, full, mu)
    except (TypeError, RuntimeError, OverflowError) as error:  # raised by diffusers and torch for a wrong type
        raise ValueError(
            f"the config of the {kind} is not valid ({in_one_line(error)}). Compare its fields with those of "
            f"diffusers.{kind}().config"
        ) from None


def renewed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's config with its fields from 2022 replaced by current ones.

    Raises:
        ValueError: if `predict_epsilon` and `prediction_type` contradict each other.
    """
    current = {name: value for name, value in config.items() if name not in GONE}
    if (was := config.get("predict_epsilon")) is not None:
        meant = "epsilon" if was else "sample"
        # Some diffusers releases wrote both fields, with the old field at its default.
        if not was and current.setdefault("prediction_type", meant) != meant:
            raise ValueError(
                f"the scheduler's config has predict_epsilon {was!r} and prediction_type "
                f"{current['prediction_type']!r}, which contradict each other. Remove the wrong one"
            )
    return current


def _read(kind: str, full: Mapping[str, Any], mu: float | None) -> Schedule:
    num = int(full["num_train_timesteps"])
    name = full.get("prediction_type", "epsilon")
    if kind == FLOW or full.get("use_flow_sigmas"):
        _refuse(kind, full, {"invert_sigmas": False, "stochastic_sampling": False})
        if kind != FLOW:
            _refuse(kind, full, {"prediction_type": "flow_prediction"})
        shift = float(full["shift"] if kind == FLOW else full["flow_shift"])
        if full.get("use_dynamic_shifting"):
            if mu is None:
                raise ValueError(f"{kind} has use_dynamic_shifting True, but the sample size is unknown")
            shift = mu if full["time_shift_type"] == "linear" else math.exp(mu)
        return Schedule(FlowMatching(shift), FlowVelocity(), False, num, False)
    if kind == COSINE:
        _refuse(kind, full, {"sigma_data": 1.0, "prediction_type": "v_prediction", "final_sigmas_type": "zero"})
        # This scheduler's samples are variance-preserving if they are scaled like the network's input.
        noisiest, cleanest = (-2 * math.log(float(full[name])) for name in ("sigma_max", "sigma_min"))
        return Schedule(VPCosine(noisiest, cleanest), V(), False, num, False)
    if name == "flow_prediction":
        raise ValueError(f"{kind} has prediction_type {name!r} on a table of betas. Set use_flow_sigmas to true")
    if name not in PREDICTIONS:
        raise ValueError(f"{kind} has prediction_type {name!r}, which is not one of {', '.join(PREDICTIONS)}")
    # A network with continuous time does not use a table's clock.
    _refuse(kind, full, {"timestep_type": "discrete"})
    # With a maximum of 1, thresholding is the same as clipping.
    bounds = {"clip_sample": "clip_sample_range", "thresholding": "sample_max_value"}
    # A scheduler ignores another scheduler's settings, and CogVideoX's schedulers also ignore their own.
    taken = fields_of(kind) if kind in TABLES else set()
    used = [bound for setting, bound in bounds.items() if setting in taken and full.get(setting)]
    _refuse(kind, full, dict.fromkeys(used, 1.0))
    learned = "learned" in str(full.get("variance_type"))
    last = 0.0 if full.get("set_alpha_to_one", True) else 1 / num
    return Schedule(VPTable(_betas(kind, full, num)), PREDICTIONS[name], bool(used), num, learned, last)


def _refuse(kind: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    for name, value in needed.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"{kind} has {name} {config[name]!r}, but only {value!r} is supported")


def _betas(kind: str, config: Mapping[str, Any], num: int) -> tuple[float, ...]:
    schedule = config["beta_schedule"]
    if config.get("trained_betas") is not None:
        betas = tuple(float(beta) for beta in config["trained_betas"])
        if len(betas) != num:
            raise ValueError(
                f"{kind} has {len(betas)} trained_betas, but num_train_timesteps is {num}. Correct one of the two"
            )
    elif schedule in _RAMPS:
        betas = _RAMPS[schedule](num, float(config["beta_start"]), float(config["beta_end"]))
    elif schedule == "squaredcos_cap_v2":
        betas = cosine_betas(num)
    else:
        raise ValueError(
            f"{kind} has beta_schedule {schedule!r}, which is not one of {', '.join(_RAMPS)}, squaredcos_cap_v2. Write "
            "its betas into trained_betas"
        )
    if kind in SHIFTED_TABLES:
        power = np.cumprod(1 - np.asarray(betas))
        power /= config["snr_shift_scale"] + (1 - config["snr_shift_scale"]) * power
        betas = tuple((1 - power / np.append(1.0, power[:-1])).tolist())
    return zero_terminal_betas(betas) if config.get("rescale_betas_zero_snr") else betas


def config_of(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's class and config fields, without private fields.

    The private field `_use_default_values` would make `from_config` reset fields to another scheduler's defaults.
    """
    fields = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return {"_class_name": type(scheduler).__name__, **fields}


def first_order(scheduler: Any) -> Any:
    """Return a scheduler that takes DDIM steps, without clipping, at a supported scheduler's noise levels."""
    config = config_of(scheduler)
    kind = config.pop("_class_name")
    fields = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False, "steps_offset": 1}
    if kind == FLOW:
        return scheduler
    if kind == COSINE:
        quieter: Any = type(kind, (type(scheduler),), {"step": _step_without_noise})
        return quieter.from_config(config)
    if config.get("use_flow_sigmas"):
        named = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type")
        kept = {name: config[name] for name in named if config.get(name) is not None}
        return stock(FLOW)(shift=config["flow_shift"], **kept)
    other = "CogVideoXDDIMScheduler" if kind in SHIFTED_TABLES else "DDIMScheduler"
    with quiet():
        return stock(other).from_config(config | fields)


def _step_without_noise(
    self: Any, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True
) -> Any:
    """Take a DDIM step without drawing noise."""
    from diffusers.schedulers.scheduling_utils import SchedulerOutput

    here, there = self.sigmas[self.step_index], self.sigmas[self.step_index + 1]
    x0 = self.precondition_outputs(sample, model_output, here)
    self._step_index += 1
    return SchedulerOutput(prev_sample=x0 + there / here * (sample - x0))


def sigmas_of(num_steps: int) -> list[float]:
    """Return our grid's sigmas before the shift, because flow-matching schedulers apply the shift themselves."""
    return [1 - k / num_steps for k in range(num_steps)]


class StockSchedule(NamedTuple):
    """A scheduler's class and constructor arguments."""

    kind: str
    config: dict[str, Any]


def write_schedule(
    process: NoiseProcess, prediction: Prediction, num_train_timesteps: int, clip: bool
) -> StockSchedule:
    """Return the stock scheduler that takes DDIM steps on our grids, which use trailing spacing and end at clean data.

    Raises:
        ValueError: if diffusers has no scheduler for this process or prediction.
    """
    if isinstance(process, FlowMatching) and isinstance(prediction, FlowVelocity):
        return StockSchedule(FLOW, {"num_train_timesteps": num_train_timesteps, "shift": process.shift})
    names = {type(member): name for name, member in PREDICTIONS.items()}
    if type(prediction) not in names:
        raise ValueError(
            f"diffusers has no scheduler for the prediction {type(prediction).__name__} and the process "
            f"{type(process).__name__}. Match the model to v or x0 first (halfstep distill --matching.prediction v), "
            "or use --format onnx"
        )
    return StockSchedule(
        "DDIMScheduler",
        {
            "num_train_timesteps": num_train_timesteps,
            **_stock_betas(process, num_train_timesteps),
            "prediction_type": names[type(prediction)],
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            # Trailing spacing ignores the offset, but Stable Diffusion's pipeline warns unless the offset is 1.
            "steps_offset": 1,
            "clip_sample": clip,
        },
    )


def _stock_betas(process: NoiseProcess, num: int) -> dict[str, Any]:
    if isinstance(process, VPCosine):
        t = torch.arange(1, num + 1, dtype=torch.float64) / num
        power = process.alpha_sigma(t)[0].square()
        before = torch.cat([torch.ones(1, dtype=torch.float64), power[:-1]])
        return {"trained_betas": (1 - power / before).tolist()}
    if not isinstance(process, VPTable) or len(process.betas) != num:
        raise ValueError(f"diffusers has no table of {num} noise levels for {process}. {MATCH_TO_COSINE}")
    betas = process.betas
    for name, ramp in _RAMPS.items():
        if np.allclose(betas, ramp(num, betas[0], betas[-1]), rtol=1e-12, atol=0):
            return {"beta_schedule": name, "beta_start": betas[0], "beta_end": betas[-1]}
    if np.allclose(betas, cosine_betas(num), rtol=1e-12, atol=0):
        return {"beta_schedule": "squaredcos_cap_v2"}
    return {"trained_betas": list(betas)}


SOLVERS: Final[dict[Sampler, dict[str, Any]]] = {
    DDIM(): {"algorithm_type": "dpmsolver++", "solver_order": 1},
    DPMSolverPP2M(): {"algorithm_type": "dpmsolver++", "solver_order": 2},
    Ancestral(gamma=0.0): {"algorithm_type": "sde-dpmsolver++", "solver_order": 1},
}
"""Settings that make diffusers' DPM-Solver++ take the same steps as each of our samplers."""


def multistep(schedule: StockSchedule, solver: Mapping[str, Any], clip: bool) -> StockSchedule:
    """Return the DPM-Solver++ scheduler that takes the steps of `solver` on a DDIM scheduler's table.

    Order 1 is DDIM with the noise recomputed from the clipped x0. `DDIMScheduler` recomputes the noise only if the
    pipeline passes `use_clipped_model_output`. Order 2 is our DPM-Solver++(2M). The SDE solver of order 1 draws from
    the same posterior as ancestral sampling with gamma = 0.

    Raises:
        ValueError: if the scheduler is not DDIM, or if its table has zero terminal SNR, because this solver would then
            divide by zero.
    """
    if schedule.kind != "DDIMScheduler":
        # With use_flow_sigmas, DPM-Solver++ starts at sigma = 1 - 1 / T and truncates timesteps to integers.
        steps = f"{solver['algorithm_type']} steps of order {solver['solver_order']}"
        raise ValueError(
            f"diffusers has no scheduler for {steps} at this model's times on the flow-matching path. Use --format onnx"
        )
    config = {k: v for k, v in schedule.config.items() if k not in ("set_alpha_to_one", "clip_sample")}
    if config.get("trained_betas") and config["trained_betas"][-1] == 1:
        raise ValueError("diffusers has no scheduler for these steps with zero terminal SNR. Use --format onnx")
    config |= {**solver, "final_sigmas_type": "zero", "thresholding": clip, "sample_max_value": 1.0}
    return StockSchedule("DPMSolverMultistepScheduler", config)


def is_exact(schedule: StockSchedule, num_steps: int) -> bool:
    """Return whether the scheduler's times match our grid of `num_steps` steps exactly."""
    return schedule.kind == FLOW or int(schedule.config["num_train_timesteps"]) % num_steps == 0


def exact_steps(schedule: StockSchedule) -> list[int]:
    """Return the numbers of steps, up to 64, for which the scheduler's times match our grid exactly."""
    return [num_steps for num_steps in range(1, 65) if is_exact(schedule, num_steps)]
