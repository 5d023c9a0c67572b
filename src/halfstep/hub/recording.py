"""The recorded call of a diffusers pipeline's denoiser: derived from runs of the pipeline and verified against them.

The user's pipeline is run for a few steps with one prompt, with two, and with guidance (hub/trace.py). Inputs that
change with the batch size have a batch axis; those that differ between prompts are conditions; those that change from
step to step are the sample and the time. The result is a description (`Recording`), with which `nets.Replay` calls the
network.
"""

import functools
import inspect
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor

from halfstep.core.denoiser import GUIDANCE, NetworkDenoiser, ddim_step
from halfstep.core.noise import processes
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.disk import known_fields
from halfstep.hub.schedulers import Schedule, config_of, first_order, read_schedule, sigmas_of
from halfstep.hub.trace import STEPS, Step, Trace, component_of, prompted, trace
from halfstep.models.model import Model
from halfstep.nets import LENGTH, Replay, nodes_of, read_output, takes_scale
from halfstep.runs import Manifest
from halfstep.samplers import sample

TOLERANCE: Final = 1e-4
"""Largest relative difference between replayed and recorded values."""
CLOCK_TOLERANCE: Final = 1e-6
EXPORT_TOLERANCE: Final = 1e-3
"""As `TOLERANCE`, after all steps of a sampler."""
SCALE: Final = 3.0
"""Guidance scale of the guided recording."""
PROMPTS: Final = ("a", "a photograph of a small cat on a large mat, in the light of the morning")
"""Prompts of different lengths, so that their masks differ."""
GUIDANCES: Final = ("guidance_scale", "true_cfg_scale")
"""Names of the guidance scale among a pipeline's call arguments."""


class Guiding(NamedTuple):
    """How a pipeline combines its branches."""

    more: float
    """Offset from its guidance scale to the s in u + s (c - u)."""
    is_rescaled: bool
    """Whether the result is rescaled to the norm of the conditional output, over the last axis."""


@final
@dataclass(frozen=True)
class Recording:
    """A pipeline's recorded call, as data."""

    call: dict[str, Any]
    clock: dict[str, Any]
    output: dict[str, Any]
    schedule: Schedule
    constants: dict[str, Tensor]
    null: dict[str, Tensor]
    """One sample's conditions in the unconditional branch; empty if the pipeline has none."""
    guidance: str | None
    """The pipeline's call argument for the guidance scale; None if it has no effect."""
    guiding: Guiding | None
    """How its branches are combined; None for one branch."""
    num_classes: int
    """Number of classes; 0 for none."""
    shape: tuple[int, ...]
    """Shape of one sample."""

    @property
    def off(self) -> float | None:
        """The value of `guidance` that disables it."""
        return None if self.guiding is None else 1 - self.guiding.more

    @property
    def scale(self) -> float | None:
        """The default of the network's own guidance input; None if it has none."""
        return next((float(node["default"]) for node in nodes_of(self.call, "guidance", "embedding")), None)


@torch.no_grad()
def record(pipe: Any, options: Mapping[str, Any]) -> tuple[Recording, Replay]:
    """Record a pipeline's call, and return it with a network that replays it and reproduces the recorded outputs.

    Args:
        pipe: in float32; its scheduler is replaced by one that takes DDIM steps on the same noise levels.
        options: further pipeline call arguments, such as height and width.

    Raises:
        ValueError: if the replay differs; the message says where.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    clip = read_schedule(config_of(pipe.scheduler), mu=1.0).clip
    pipe.scheduler = first_order(pipe.scheduler)
    labels = "class_labels" in taken
    prompts: Sequence[Any] = (0, 1) if labels else PROMPTS
    scales = [name for name in GUIDANCES if name in taken]
    off = {**dict.fromkeys(scales, 1.0), **{k: v for k, v in options.items() if k not in scales}}
    one = trace(pipe, 1, **prompted(pipe, prompts[:1]), **off)
    if _is_guided(one.steps[0]):
        # If guidance is c + s (c - u), 0 disables it.
        off |= dict.fromkeys(scales, 0.0)
        one = trace(pipe, 1, **prompted(pipe, prompts[:1]), **off)
    two = trace(pipe, STEPS, **prompted(pipe, prompts), **off)
    try:
        default = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
        reading = _Reading(two.steps[0].before, options.get("max_sequence_length", default))
        call = reading.node("", one.steps[0].calls[0].arguments, *(step.calls[0].arguments for step in two.steps[:2]))
        if any(len(step.calls) != 1 for step in two.steps):
            raise ValueError(f"the denoiser is called {len(two.steps[0].calls)} times per step without guidance")
        schedule = replace(read_schedule(config_of(pipe.scheduler), two.mu), clip=clip)
        output = _output(two.steps[0])
        alone = conditions_in(call, two.steps[0].calls[0].arguments, 2)
        guidance, guiding, null = None, None, dict[str, Tensor]()
        for name in scales:
            negative = {"negative_prompt": [" ", " "]} if name != GUIDANCES[0] and "negative_prompt" in taken else {}
            try:
                (guided,) = trace(pipe, 1, **prompted(pipe, prompts), **(off | {name: SCALE} | negative)).steps
            except ValueError as error:
                if not labels:
                    raise
                # DiTPipeline always uses 1000 for the null class, and fails on networks with fewer classes.
                warnings.warn(f"the teacher is imported without guidance: {error}", HalfstepWarning, stacklevel=2)
                guidance, guiding = name, Guiding(0.0, False)
                break
            if _is_guided(guided, 2):
                guidance = name
                guiding, null = _guiding(call, alone, guided, output)
                break
            default = options.get(name, taken[name].default)
            if _embedded(call, guided.calls[0].arguments, float(default or 1.0), reading.constants):
                guidance = name
                break
        clock = fit_clock(schedule, call, two)
        output["restores_norm"] = guiding is not None and guiding.is_rescaled
        module = getattr(pipe, component_of(pipe))
        recording = Recording(
            call, clock, output, schedule, reading.constants, null, guidance, guiding,
            _num_classes(null, module.config) if set(alone) == {"class_labels"} else 0,
            tuple(two.steps[0].before.shape[1:]),
        )  # fmt: skip
        network = replayed(recording, module)
        verify(network, schedule, two)
    except ValueError as error:
        raise ValueError(f"{type(pipe).__name__} cannot be replayed: {error}") from None
    return recording, network


def _num_classes(null: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Return a network's number of classes, which is also the index of its null class."""
    fields = (config.get(name) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    return int(null["class_labels"]) if null else next((int(number) for number in fields if number), 0)


def replayed(recording: Recording, module: Any) -> Replay:
    """Return the network that replays a recording with the weights of the pipeline's `module`."""
    kind = type(module).__name__
    config = known_fields(module.config, Path(module.config.get("_name_or_path", "")), kind)
    with torch.device("meta"):
        network = Replay(
            kind, config, recording.call, recording.clock, recording.output, recording.schedule.num_train_timesteps
        )
    network.hold(module)
    for name, value in recording.constants.items():
        setattr(network.constants, name, value.clone())
    return network.eval()


@final
class _Reading:
    """Classifies the arguments of a denoiser's call.

    Args:
        latents: the samples of the batch of two.
        longest: the length of padded prompts, if known.
    """

    def __init__(self, latents: Tensor, longest: Any) -> None:
        self.latents, self.longest = latents, longest
        self.constants: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def node(self, path: str, one: Any, two: Any, later: Any) -> dict[str, Any]:
        """Return the node of an argument from its values for one prompt, for two, and for two at the next step."""
        if isinstance(two, Mapping):
            items = {name: self.node(f"{path}.{name}", one.get(name), two[name], later[name]) for name in two}
            return {"is": "dict", "items": items}
        if isinstance(two, list | tuple):
            return self._sequence(path, one, two, later)
        if isinstance(two, Tensor):
            return self._tensor(path, one, two, later)
        if two is None or isinstance(two, bool | int | float | str):
            if not one == two == later:
                raise ValueError(f"the argument {path[1:]} is {one} for one prompt, {two} for two, and later {later}")
            return {"is": "value", "value": two}
        raise ValueError(f"the argument {path[1:]} is a {type(two).__name__}, which is not data")

    def _sequence(self, path: str, one: Any, two: Any, later: Any) -> dict[str, Any]:
        if one is not None and (len(one), len(two)) == (1, 2):
            if not isinstance(two[0], Tensor):
                if not one[0] == two[0] == two[1]:
                    raise ValueError(
                        f"the argument {path[1:]} is {two[0]} and {two[1]} for two prompts, but is not a tensor"
                    )
                return {"is": "repeat", "item": self.node(path, one[0], two[0], later[0])}
            if two[0].shape == two[1].shape and self._is_sample(torch.stack(list(two))):
                return {"is": "sample", "shape": list(two[0].shape), "list": True}
            return self._condition(path, two[0], list=True)
        if len(one) != len(two):
            raise ValueError(f"the argument {path[1:]} has the length {len(one)} for one prompt and {len(two)} for two")
        items = [self.node(f"{path}.{i}", *parts) for i, parts in enumerate(zip(one, two, later, strict=True))]
        return {"is": "tuple" if isinstance(two, tuple) else "list", "items": items}

    def _tensor(self, path: str, one: Any, two: Tensor, later: Tensor) -> dict[str, Any]:
        if self._is_sample(two):
            return {"is": "sample", "shape": list(two.shape[1:])}
        if two.shape == later.shape and not torch.equal(two, later):
            if bool((two != two.flatten()[0]).any()):
                raise ValueError(f"the argument {path[1:]} changes from step to step and is neither sample nor time")
            return {"is": "time", "dims": list(two.shape[1:])}
        if two.ndim == 0 or len(two) != 2 or (one is not None and len(one) != 1):
            if one is None or one.shape != two.shape or not torch.equal(one, two):
                raise ValueError(f"the argument {path[1:]} has no batch axis and differs between one prompt and two")
            return self._constant(path, two)
        if one is None or one.shape[1:] != two.shape[1:]:
            return self._condition(path, two[0], ragged=True)
        return (
            self._constant(path, two[:1], rows=True) if torch.equal(two[0], two[1]) else self._condition(path, two[0])
        )

    def _is_sample(self, value: Tensor) -> bool:
        same = value.shape[:1] == self.latents.shape[:1] and value.numel() == self.latents.numel()
        return same and difference(value.reshape(self.latents.shape), self.latents) <= CLOCK_TOLERANCE

    def _constant(self, path: str, value: Tensor, **rows: bool) -> dict[str, Any]:
        node = self._leaf("constant", path, value) | rows
        self.constants[node["name"]] = value
        return node

    def _condition(self, path: str, row: Tensor, **padded: bool) -> dict[str, Any]:
        node = self._leaf("condition", path, row) | padded
        if padded:
            if not isinstance(self.longest, int):
                raise ValueError(
                    f"the argument {path[1:]} is as long as its prompt, and max_sequence_length does not limit it"
                )
            node["shape"][0] = self.longest
        return node

    def _leaf(self, kind: str, path: str, value: Tensor) -> dict[str, Any]:
        name = path.rpartition(".")[2]
        if name in self._names or name.isdigit():
            name = path[1:].replace(".", "_")
        self._names.add(name)
        return {"is": kind, "name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _reached(node: Mapping[str, Any], value: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield the leaves of a recorded call with their values in another call of the same kind."""
    items = node.get("items")
    if items is None:
        yield node, value
        return
    if isinstance(items, Mapping):
        items, value = items.values(), [value[name] for name in items]
    for item, part in zip(items, value, strict=True):
        yield from _reached(item, part)


def call_in(manifest: Manifest) -> dict[str, Any]:
    """Return the recorded call of an imported model, or of a LoRA on one."""
    call: dict[str, Any] = manifest.network.get("base", manifest.network)["call"]
    return call


def conditions_in(
    call: Mapping[str, Any], arguments: Mapping[str, Any], batch: int, first: int = 0
) -> dict[str, Tensor]:
    """Return the conditions in a call's arguments by name, each `[batch, ...]`, padded with zeros.

    Args:
        first: the first row of the batch; a guided call contains two batches.
    """
    found: dict[str, Tensor] = {}
    leaves = [(node, value) for node, value in _reached(call, arguments) if node["is"] == "condition"]
    lengths = [value.shape[1] for node, value in leaves if node.get("ragged") and value is not None]
    for node, value in leaves:
        name = node["name"]
        if value is None:
            # A mask of ones.
            value = torch.ones(first + batch, max(lengths), dtype=getattr(torch, node["dtype"]))
        rows = list(value[first : first + batch])
        if "list" in node:
            found[name + LENGTH] = torch.tensor([len(row) for row in rows])
        elif not node.get("ragged"):
            found[name] = torch.stack(rows)
            continue
        if (longest := max(len(row) for row in rows)) > node["shape"][0]:
            raise ValueError(f"the condition {name} of {longest} tokens is longer than max_sequence_length")
        found[name] = rows[0].new_zeros(batch, *node["shape"])
        for place, row in enumerate(rows):
            found[name][place, : len(row)] = row
    return found


def _is_guided(step: Step, batch: int = 1) -> bool:
    """Whether a step has several branches."""
    return len(step.calls) > 1 or any(len(made.output) > batch for made in step.calls)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name].float(), other[name].float(), rtol=1e-4, atol=1e-5) for name in one)


def _guiding(
    call: Mapping[str, Any], alone: Mapping[str, Tensor], step: Step, output: Mapping[str, Any]
) -> tuple[Guiding, dict[str, Tensor]]:
    """Return how a guided step combines its branches, and one sample's conditions in the unconditional branch.

    Args:
        alone: the conditions of both samples without guidance.
        output: which part of the denoiser's output is used, as in `Replay`.

    Raises:
        ValueError: if it is not classifier-free guidance.
    """
    branches = [
        (conditions_in(call, made.arguments, 2, first), made.output[first : first + 2])
        for made in step.calls
        for first in range(0, len(made.output), 2)
    ]
    others = [branch for branch in branches if not _same(branch[0], alone)]
    if len(branches) != 2 or len(others) != 1:
        raise ValueError(f"a guided step has {len(branches)} branches, {len(others)} of which have other conditions")
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
            return Guiding(more, is_rescaled), {name: value[0] for name, value in null.items()}
    raise ValueError(
        f"at a guidance scale of {SCALE:g} it uses neither u + s (c - u) nor c + s (c - u) of its conditional output c "
        "and unconditional output u, with or without rescaling to the norm of c"
    )


def _embedded(call: dict[str, Any], arguments: Mapping[str, Any], scale: float, constants: dict[str, Tensor]) -> bool:
    """Mark the argument that changes with the guidance scale in the recorded call; return whether there is one."""
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


def fit_clock(schedule: Schedule, call: Mapping[str, Any], two: Trace) -> dict[str, Any]:
    """Return the clock, which maps noise levels to the times passed to the denoiser.

    Raises:
        ValueError: if no clock matches to 1e-6.
    """
    shown = [_shown(call, step) for step in two.steps]
    times, seen = grid_of(schedule, two)[:-1], torch.tensor(shown, dtype=torch.float64)
    alpha, sigma = schedule.process.alpha_sigma(times)
    rules = {"u": times, "sigma": sigma, "angle": torch.atan2(sigma, alpha) * (2 / math.pi)}
    allowed = CLOCK_TOLERANCE * max(1.0, float(seen.abs().max()))
    for of in ("sigma", "u", "angle") if schedule.is_flow else ("u", "angle", "sigma"):
        design = torch.stack([rules[of], torch.ones_like(times)], dim=1)
        scale, offset = (_snapped(float(number), allowed) for number in torch.linalg.lstsq(design, seen).solution)
        if float((scale * rules[of] + offset - seen).abs().max()) <= allowed:
            clock = {"of": of, "scale": scale, "offset": offset}
            return clock if of == "u" else clock | {"process": processes.describe(schedule.process)}
    raise ValueError(
        f"its denoiser gets the times {', '.join(f'{x:.6g}' for x in shown)} at the noise levels "
        f"{', '.join(f'{float(x):.6g}' for x in sigma)}, which are not affine in t, sigma or the angle"
    )


def _snapped(number: float, allowed: float) -> float:
    """Return the nearest round number if it is within `allowed`, which removes float32 rounding errors."""
    near = round(number, 3)
    return near + 0.0 if abs(near - number) <= allowed else number


def _shown(call: Mapping[str, Any], step: Step) -> float:
    """Return the time passed to the denoiser."""
    for node, value in _reached(call, step.calls[0].arguments):
        if node["is"] == "time":
            return float(value.flatten()[0])
    raise ValueError("no argument of its denoiser changes from step to step like a time")


def _output(step: Step) -> dict[str, Any]:
    """Return which part of the denoiser's output is passed to the scheduler, and its sign.

    Raises:
        ValueError: if something else is passed.
    """
    made, wanted = step.calls[0].output, step.output
    channels = wanted.shape[1]
    for part, found in (("all", made), ("first", made[:, :channels]), ("last", made[:, -channels:])):
        for sign in (1, -1):
            if found.numel() == wanted.numel() and difference(sign * found.reshape(wanted.shape), wanted) <= TOLERANCE:
                return {"sign": sign, "part": part}
    raise ValueError(
        f"its denoiser returns {list(made.shape)}, but its scheduler gets {list(wanted.shape)}, which is neither this "
        "output nor its first or last channels, with either sign"
    )


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value (at least 1)."""
    return float((found.float() - wanted.float()).abs().max()) / max(1.0, float(wanted.abs().max()))


def grid_of(schedule: Schedule, made: Trace) -> Tensor:
    """Return the times at which a trace's steps start and end, float64."""
    starts = [schedule.time_of(step.timestep, step.sigma) for step in made.steps]
    return torch.tensor([*starts, schedule.last_time], dtype=torch.float64)


@torch.no_grad()
def verify(network: Replay, schedule: Schedule, made: Trace) -> None:
    """Replay each step of a trace without guidance and compare it with the recording.

    Raises:
        ValueError: if anything differs; the message says what.
    """

    def check(found: Tensor, wanted: Tensor, problem: str) -> None:
        if not (off := difference(found, wanted)) <= TOLERANCE:
            raise ValueError(f"{problem} (by {off:.2g} of its size)")

    denoiser = NetworkDenoiser(network, schedule.process, schedule.prediction)
    grid = grid_of(schedule, made)
    for number, (step, t, s) in enumerate(zip(made.steps, grid[:-1], grid[1:], strict=True), start=1):
        x_t, batch = step.before, len(step.before)
        time = t.expand(batch).float()
        cond = conditions_in(network.call, step.calls[0].arguments, batch)
        if takes_scale(network.call):
            # Calls with a single branch were recorded at scale 1.
            cond[GUIDANCE] = torch.ones(batch)
        told, shown = float(network.timestep(time)[0]), _shown(network.call, step)
        if abs(told - shown) > TOLERANCE * max(1e-2, abs(shown)):
            raise ValueError(f"at step {number} its denoiser got the time {shown:.6g}, but the clock gives {told:.6g}")
        check(
            network.raw(x_t, time, **cond), step.calls[0].output,
            f"at step {number} its denoiser, called with the recorded conditions ({', '.join(cond) or 'none'}), "
            "returns a different output than before",
        )  # fmt: skip
        negated = "negated " * (network.output["sign"] < 0)
        check(
            network(x_t, time, **cond), step.output,
            f"at step {number} the scheduler did not get the {negated}output, so the sign or the slice is different",
        )  # fmt: skip
        check(
            ddim_step(denoiser(x_t, t.expand(batch), cond), schedule.process, float(s)), step.after,
            f"step {number} from t = {float(t):.4g} to {float(s):.4g} on {schedule.process} with the output as "
            f"{type(schedule.prediction).__name__} gives a different sample than the scheduler's step",
        )  # fmt: skip


@torch.no_grad()
def verify_export(pipe: Any, model: Model, **call: Any) -> None:
    """Compare an exported pipeline's samples with the model's own, from the same noise and conditions.

    Args:
        call: the call arguments in its card, without prompts.

    Raises:
        ValueError: if they differ, or a step takes several network calls.
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
            f"samples of the exported {kind} in {count} steps differ from the model's by {off:.2g} of their size. Use "
            "--format onnx, or halfstep.load in Python"
        )
