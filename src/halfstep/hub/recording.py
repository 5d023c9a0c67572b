"""Record how a diffusers pipeline calls its denoiser, and verify the recording against runs of the pipeline.

The user's pipeline is run for a few steps with one prompt, with two prompts, and with guidance (hub/trace.py). Inputs
that change with the batch size have a batch axis, and inputs that differ between prompts are conditions. The inputs
that change from step to step are the sample and the time. The result is a network that replays the call
(`nets.Replay`).
"""

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE, NetworkDenoiser, ddim_step, output_gain
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.calls import Reading, call_in, conditions_in, difference, reached
from halfstep.hub.clock import fit_clock, grid_of, shown_time
from halfstep.hub.disk import known_fields
from halfstep.hub.schedulers import USE_ONNX, Schedule, config_of, first_order, read_schedule, sigmas_of
from halfstep.hub.trace import STEPS, Step, Trace, component_of, prompted, trace
from halfstep.models.model import Model
from halfstep.nets import Replay, nodes_of, read_output, takes_scale
from halfstep.samplers import sample

TOLERANCE: Final = 1e-4
"""Largest accepted relative difference between replayed and recorded values."""
EXPORT_TOLERANCE: Final = 1e-3
"""Largest accepted relative difference between an exported pipeline's samples and the model's samples."""
SCALE: Final = 3.0
"""Guidance scale of the guided recording."""
PROMPTS: Final = ("a", "a photograph of a small cat on a large mat, in the light of the morning")
"""Prompts of different lengths, so that their masks differ."""
GUIDANCES: Final = ("guidance_scale", "true_cfg_scale")
"""Names of the pipeline call arguments that set a guidance scale."""
START, END = "audio_start_in_s", "audio_end_in_s"
"""Names of the pipeline call arguments that set the start and the end of a sound, in seconds."""


@final
@dataclass(frozen=True)
class Recording:
    """A pipeline's recorded call."""

    network: Replay
    """The network that replays the call, with the weights of the pipeline's denoiser."""
    schedule: Schedule
    shape: tuple[int, ...]
    """Shape of one sample."""
    num_classes: int
    """Number of classes, or 0 for a network without classes."""
    null: dict[str, Tensor]
    """One sample's conditions in the unconditional branch; empty if the pipeline has no such branch. Conditions that
    depend on the end time are omitted, because they are the same in both branches."""
    guidance: str | None
    """The pipeline call argument that sets the guidance scale, or None if no guidance scale has an effect."""
    off: float | None
    """The value of the argument `guidance` that disables guidance, or None if the pipeline runs only one branch."""
    end: str | None
    """The pipeline call argument that sets the end time in seconds, or None if all samples end at the same time."""

    @property
    def scale(self) -> float | None:
        """The default value of the network's own guidance input, or None if the network has no such input."""
        return next((float(node["default"]) for node in nodes_of(self.network.call, "guidance", "embedding")), None)


@torch.no_grad()
def record(pipe: Any, options: Mapping[str, Any]) -> Recording:
    """Record a pipeline's call.

    Args:
        pipe: the pipeline in float32. Its scheduler is replaced with one that takes DDIM steps at the same noise
            levels.
        options: additional pipeline call arguments, such as height and width.

    Raises:
        ValueError: if the call cannot be recorded, if the network's output does not determine x0 at the last noise
            level, or if the replay differs from the recording.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    declared = read_schedule(config_of(pipe.scheduler), mu=1.0)
    if output_gain(declared.process, declared.prediction) == math.inf:
        raise ValueError(
            f"the scheduler of this {type(pipe).__name__} has prediction_type epsilon and zero terminal SNR, so the "
            "network's output does not determine x0 in the first step. In the scheduler's config, set prediction_type "
            "to v_prediction if the network was trained with it. Otherwise, set rescale_betas_zero_snr to false, or "
            "choose trained_betas below 1"
        )
    pipe.scheduler = first_order(pipe.scheduler)
    labels = "class_labels" in taken
    prompts: Sequence[Any] = (0, 1) if labels else PROMPTS
    scales = [name for name in GUIDANCES if name in taken]
    plain = {**dict.fromkeys(scales, 1.0), **{k: v for k, v in options.items() if k not in scales}}
    one = trace(pipe, 1, **prompted(pipe, prompts[:1]), **plain)
    if _is_guided(one.steps[0]):
        # If the guided output is c + s (c - u), a scale of 0 disables guidance.
        plain |= dict.fromkeys(scales, 0.0)
        one = trace(pipe, 1, **prompted(pipe, prompts[:1]), **plain)
    two = trace(pipe, STEPS, **prompted(pipe, prompts), **plain)
    try:
        default = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
        reading = Reading(two.steps[0].before, options.get("max_sequence_length", default), labels)
        call = reading.node("", one.steps[0].calls[0].arguments, *(step.calls[0].arguments for step in two.steps[:2]))
        if others := [len(step.calls) for step in two.steps if len(step.calls) != 1]:
            raise ValueError(f"without guidance, the denoiser is called {others[0]} times per step, not once")
        schedule = replace(read_schedule(config_of(pipe.scheduler), two.mu), clip=declared.clip)
        output = _output(two.steps[0])
        end, shorter = None, dict[str, Any]()
        if END in taken:
            shorter = {END: options.get(START, taken[START].default if START in taken else 0.0)}
            short = trace(pipe, 1, **prompted(pipe, prompts), **(plain | shorter)).steps[0].calls[0].arguments
            end = END if _has_ends(call, two.steps[0].calls[0].arguments, short, reading.constants) else None
        alone = conditions_in(call, two.steps[0].calls[0].arguments, 2)
        guidance, off, null = None, None, dict[str, Tensor]()
        output["restores_norm"] = False
        for name in scales:
            # Pipelines with a second kind of guidance apply it only if a negative prompt is passed.
            needs_negative = name != GUIDANCES[0] and "negative_prompt" in taken and "negative_prompt" not in options
            negative = {"negative_prompt": [" ", " "]} if needs_negative else {}
            try:
                (guided,) = trace(pipe, 1, **prompted(pipe, prompts), **(plain | {name: SCALE} | negative)).steps
            except ValueError as error:
                if not labels:
                    raise
                # DiTPipeline always uses 1000 for the null class, so it fails with networks that have fewer classes.
                warnings.warn(f"the teacher is imported without guidance: {error}", HalfstepWarning, stacklevel=2)
                guidance, off = name, 1.0
                break
            if _is_guided(guided, 2):
                guidance = name
                off, output["restores_norm"], null = _guiding(call, alone, guided, output)
                if end is not None:
                    given = plain | {name: SCALE} | negative | shorter
                    (guided,) = trace(pipe, 1, **prompted(pipe, prompts), **given).steps
                    *_, other = _guiding(call, conditions_in(call, short, 2), guided, output)
                    null = _unshared(null, other, alone)
                break
            default = options.get(name, taken[name].default)
            if _embedded(call, guided.calls[0].arguments, float(default or 1.0), reading.constants):
                guidance = name
                break
        module = getattr(pipe, component_of(pipe))
        kind, place = type(module).__name__, Path(module.config.get("_name_or_path", ""))
        arguments = known_fields(module.config, place, kind), call, fit_clock(schedule, call, two), output
        with torch.device("meta"):
            network = Replay(kind, *arguments, schedule.num_train_timesteps)
        network.hold(module)
        for name, value in reading.constants.items():
            setattr(network.constants, name, value.clone())
        verify(network.eval(), schedule, two)
    except ValueError as error:
        raise ValueError(f"{type(pipe).__name__} cannot be replayed: {error}") from None
    num_classes = _num_classes(null, module.config) if set(alone) == {"class_labels"} else 0
    return Recording(network, schedule, tuple(two.steps[0].before.shape[1:]), num_classes, null, guidance, off, end)


def _num_classes(null: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Return a network's number of classes, which is also the index of its null class."""
    fields = (config.get(name) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    return int(null["class_labels"]) if null else next((int(number) for number in fields if number), 0)


def _is_guided(step: Step, batch: int = 1) -> bool:
    """Return whether the denoiser was run on several branches in a step."""
    return len(step.calls) > 1 or any(len(made.output) > batch for made in step.calls)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name].float(), other[name].float(), rtol=1e-4, atol=1e-5) for name in one)


def _guiding(
    call: Mapping[str, Any], alone: Mapping[str, Tensor], step: Step, output: Mapping[str, Any]
) -> tuple[float, bool, dict[str, Tensor]]:
    """Return how a guided step combines its branches.

    The result contains the guidance scale that disables guidance, whether the guided output is rescaled to the
    conditional output's norm over the last axis, and one sample's conditions in the unconditional branch.

    Args:
        alone: the conditions of both samples without guidance.
        output: which part of the denoiser's output is used, as in `Replay`.

    Raises:
        ValueError: if the step does not use classifier-free guidance.
    """
    branches = [
        (conditions_in(call, made.arguments, 2, first), made.output[first : first + 2])
        for made in step.calls
        for first in range(0, len(made.output), 2)
    ]
    others = [branch for branch in branches if not _same(branch[0], alone)]
    if len(branches) != 2 or len(others) != 1:
        raise ValueError(
            f"a guided step has {len(branches)} branches, {len(others)} of which have conditions that differ from "
            "those of a step without guidance"
        )
    ((null, unconditional),) = others
    (conditional,) = (made for cond, made in branches if _same(cond, alone))
    if not _same({n: v[:1] for n, v in null.items()}, {n: v[1:] for n, v in null.items()}):
        raise ValueError("the unconditional branch differs between two prompts")
    wanted = step.output[:2]
    c, u = (read_output(made, wanted, output) for made in (conditional, unconditional))
    for more, is_rescaled in itertools.product((0.0, 1.0), (False, True)):
        found = u + (SCALE + more) * (c - u)
        if is_rescaled:
            found = found * (c.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))
        if difference(found, wanted) <= TOLERANCE:
            return 1 - more, is_rescaled, {name: value[0] for name, value in null.items()}
    raise ValueError(
        f"at a guidance scale of {SCALE:g}, the output is neither u + s (c - u) nor c + s (c - u), where c is the "
        "conditional and u the unconditional output, with or without rescaling to the norm of c"
    )


def _has_ends(
    call: Mapping[str, Any], arguments: Mapping[str, Any], shorter: Mapping[str, Any], constants: dict[str, Tensor]
) -> bool:
    """Mark the arguments that change with the end time as conditions, and return whether any exist.

    If one of them has no batch axis, none is marked and the result is False.

    Args:
        arguments: the arguments of the recorded call, for two prompts.
        shorter: the arguments of a call with a different end time.
    """
    pairs = zip(reached(call, arguments), reached(call, shorter), strict=True)
    changed = [node for (node, one), (_, other) in pairs if node["is"] != "time" and not _equal(node, one, other)]
    if not all(node["is"] == "condition" or node.get("rows") for node in changed):
        return False
    for node in changed:
        if node["is"] == "constant":
            assert isinstance(node, dict)
            node.update({"is": "condition", "shape": node["shape"][1:]})
            del node["rows"], constants[node["name"]]
    return bool(changed)


def _equal(node: Mapping[str, Any], one: Any, other: Any) -> bool:
    """Return whether a node has the same value in two calls. For samples, only the shapes are compared."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (node["is"] == "sample" or bool(one == other))
    return one.shape == other.shape if node["is"] == "sample" else torch.equal(one, other)


def _unshared(null: dict[str, Tensor], other: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the unconditional branch's conditions that do not depend on a sound's end time.

    Args:
        other: the conditions of the unconditional branch in a call with a different end time.
        alone: the conditions of two samples without guidance.

    Raises:
        ValueError: if a condition depends on the end time, but differs between the two branches.
    """
    changed = {name: value for name, value in null.items() if not torch.equal(value, other[name])}
    if not _same(changed, {name: alone[name][0] for name in changed}):
        raise ValueError(
            f"the unconditional branch's {', '.join(changed)} changes with {END}, but differs from the conditional "
            "branch's"
        )
    return {name: value for name, value in null.items() if name not in changed}


def _embedded(call: dict[str, Any], arguments: Mapping[str, Any], scale: float, constants: dict[str, Tensor]) -> bool:
    """Mark the argument of the recorded call that changes with the guidance scale. Return whether one exists."""
    for path, node in call["items"].items():
        value = arguments[path]
        if node["is"] != "constant" or not node.get("rows") or torch.equal(value[:1], constants[node["name"]]):
            continue
        if node["shape"] == [1]:
            call["items"][path] = {"is": "guidance", "factor": float(value[0]) / SCALE, "default": scale}
        elif path == "timestep_cond":
            call["items"][path] = {"is": "embedding", "width": node["shape"][-1], "default": scale}
        else:
            raise ValueError(f"the argument {path} changes with the guidance scale, but has the shape {node['shape']}")
        del constants[node["name"]]
        return True
    return False


def _output(step: Step) -> dict[str, Any]:
    """Return which part of the denoiser's output is passed to the scheduler, and with which sign.

    Raises:
        ValueError: if the scheduler receives anything else.
    """
    made, wanted = step.calls[0].output, step.output
    channels = wanted.shape[1]
    for part, found in (("all", made), ("first", made[:, :channels]), ("last", made[:, -channels:])):
        for sign in (1, -1):
            if found.numel() == wanted.numel() and difference(sign * found.reshape(wanted.shape), wanted) <= TOLERANCE:
                return {"sign": sign, "part": part}
    raise ValueError(
        f"its denoiser returns {list(made.shape)}, but its scheduler receives {list(wanted.shape)}, and these "
        "values equal neither the whole output nor its first or last channels, even with the sign flipped"
    )


@torch.no_grad()
def verify(network: Replay, schedule: Schedule, made: Trace) -> None:
    """Replay each step of an unguided trace and compare it with the recording.

    Raises:
        ValueError: at the first step whose replay differs from the recording.
    """

    def check(found: Tensor, wanted: Tensor, problem: str) -> None:
        if not (off := difference(found, wanted)) <= TOLERANCE:
            raise ValueError(f"{problem} (relative difference: {off:.2g})")

    denoiser = NetworkDenoiser(network, schedule.process, schedule.prediction)
    grid = grid_of(schedule, made)
    for number, (step, t, s) in enumerate(zip(made.steps, grid[:-1], grid[1:], strict=True), start=1):
        x_t, batch = step.before, len(step.before)
        time = t.expand(batch).float()
        cond = conditions_in(network.call, step.calls[0].arguments, batch)
        if takes_scale(network.call):
            # Calls with a single branch were recorded at a guidance scale of 1.
            cond[GUIDANCE] = torch.ones(batch)
        told, shown = float(network.timestep(time)[0]), shown_time(network.call, step)
        if abs(told - shown) > TOLERANCE * max(1e-2, abs(shown)):
            raise ValueError(
                f"at step {number}, its denoiser received the time {shown:.6g}, but the clock gives {told:.6g}"
            )
        check(
            network.raw(x_t, time, **cond), step.calls[0].output,
            f"at step {number}, its denoiser, called with the recorded conditions ({', '.join(cond) or 'none'}), "
            "returns a different output from the recorded one",
        )  # fmt: skip
        negated = "negated " * (network.output["sign"] < 0)
        check(
            network(x_t, time, **cond), step.output,
            f"at step {number}, the scheduler did not receive the {negated}output, so the sign or the slice differs",
        )  # fmt: skip
        check(
            ddim_step(denoiser(x_t, t.expand(batch), cond), schedule.process, float(s)), step.after,
            f"step {number} from t = {float(t):.4g} to {float(s):.4g} on {schedule.process}, with the output "
            f"interpreted as {type(schedule.prediction).__name__}, gives a different sample from the scheduler's step",
        )  # fmt: skip


@torch.no_grad()
def verify_export(pipe: Any, model: Model, **call: Any) -> None:
    """Compare an exported pipeline's samples with the model's samples for the same noise and conditions.

    Args:
        call: the call arguments in the exported card, except prompts.

    Raises:
        ValueError: if the samples differ, or if a step takes several network calls.
    """
    manifest, count, kind = model.manifest, int(call.pop("num_inference_steps")), type(pipe).__name__
    if "sigmas" not in call and manifest.process["type"] == "flow":
        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=sigmas_of(count))
    made = trace(pipe, count, of=count, **prompted(pipe, (0, 1) if manifest.num_classes else PROMPTS), **call)
    if any(_is_guided(step, 2) for step in made.steps):
        raise ValueError(f"the exported {kind} calls its network more than once per step, with the arguments {call}")
    cond = conditions_in(call_in(manifest), made.steps[0].calls[0].arguments, 2)
    if manifest.guidance is not None and manifest.guidance["type"] == "range":
        cond[GUIDANCE] = torch.full((2,), float(call["guidance_scale"]))
    found = sample(model, made.steps[0].before, count, model.sampler, cond)
    if not (off := difference(found, made.steps[-1].after)) <= EXPORT_TOLERANCE:
        raise ValueError(
            f"with {count} steps, samples of the exported {kind} differ from the model's (relative difference: "
            f"{off:.2g}). {USE_ONNX}"
        )
