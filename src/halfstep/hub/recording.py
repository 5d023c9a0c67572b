"""Inputs of a diffusers pipeline's denoiser, recorded from the pipeline's own calls and verified against them.

The user's pipeline is run for a few steps with hooks on its denoiser and its scheduler: with one prompt, with two, and
with guidance. Inputs that change with the batch size have a batch axis. Inputs that differ between prompts are
conditions. Inputs that change from step to step are the sample and the time. The result is a description
(`Recording`), with which `nets.Replay` calls the network.
"""

import functools
import inspect
import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple, final

import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE, NetworkDenoiser, ddim_step
from halfstep.core.noise import processes
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.disk import known_fields
from halfstep.hub.schedulers import COSINE, Schedule, config_of, first_order, read_schedule, sigmas_of
from halfstep.hub.stock import in_one_line, quiet
from halfstep.models.model import Model
from halfstep.nets import LENGTH, Replay, nodes_of, takes_scale
from halfstep.runs import Manifest
from halfstep.samplers import sample

STEPS: Final = 4
"""Steps of a recording: two more than the unknowns of an affine clock."""
TOLERANCE: Final = 1e-4
"""Largest relative difference between replayed and recorded values."""
CLOCK_TOLERANCE: Final = 1e-6
EXPORT_TOLERANCE: Final = 1e-3
"""As `TOLERANCE`, after all steps of a sampler."""
SCALE: Final = 3.0
"""The guidance scale of the guided recording."""
PROMPTS: Final = ("a", "a photograph of a small cat on a large mat, in the light of the morning")
"""Prompts of different lengths, so that their masks differ."""
GUIDANCES: Final = ("guidance_scale", "true_cfg_scale")
"""Names of the guidance scale among pipeline arguments."""


@final
@dataclass(frozen=True)
class Call:
    """One call of the denoiser."""

    arguments: dict[str, Any]
    output: Tensor | None


@final
@dataclass(frozen=True)
class Step:
    """One step of the scheduler, and the calls of the denoiser since the previous step."""

    calls: tuple[Call, ...]
    output: Tensor
    """The model output that was passed to the scheduler."""
    timestep: float
    sigma: float | None
    """The sigma of a flow-matching scheduler."""
    before: Tensor
    after: Tensor


@final
@dataclass
class Trace:
    """A run of a pipeline up to the last step of its scheduler."""

    steps: list[Step] = field(default_factory=list)
    mu: float | None = None
    """The dynamic shift set by the pipeline."""


class Guiding(NamedTuple):
    """How a pipeline combines its branches."""

    more: float
    """Offset from its guidance scale to the s in u + s (c - u)."""
    is_rescaled: bool
    """Whether the result is rescaled to the norm of the conditioned output, over the last axis."""


@final
@dataclass(frozen=True)
class Recording:
    """A pipeline's call as data; a manifest contains `describe` of its network and process."""

    call: dict[str, Any]
    clock: dict[str, Any]
    output: dict[str, Any]
    schedule: Schedule
    constants: dict[str, Tensor]
    null: dict[str, Tensor]
    """The conditions of the unguided branch, for one sample; empty if the pipeline has none."""
    guidance: str | None
    """The pipeline's argument for the guidance scale, of either kind."""
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
        """The guidance scale that is an input of the network; None if there is none."""
        found = [*nodes_of(self.call, "guidance"), *nodes_of(self.call, "embedding")]
        return float(found[0]["default"]) if found else None


class _Enough(BaseException):
    """A pipeline has made the requested steps."""


def component_of(pipe: Any) -> str:
    """Return the name of a pipeline's only denoiser.

    Raises:
        ValueError: if it has none or several.
    """
    found = [
        name
        for name, part in pipe.components.items()
        if name in ("transformer", "transformer_2", "unet", "prior", "decoder") and part is not None
    ]
    if len(found) != 1 or found[0] not in ("transformer", "unet"):
        raise ValueError(
            f"a {type(pipe).__name__} has {', '.join(found) or 'no transformer or unet'}, but one denoiser is needed"
        )
    return found[0]


def prompted(pipe: Any, prompts: Sequence[Any]) -> dict[str, Any]:
    """Return the pipeline call argument that contains the conditions.

    Raises:
        ValueError: if the call takes neither prompts nor classes.
    """
    taken = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", "class_labels"):
        if name in taken:
            return {name: list(prompts)}
    raise ValueError(
        f"the call of a {type(pipe).__name__} has neither prompt nor class_labels, so it cannot be recorded"
    )


def trace(pipe: Any, num_steps: int, *, of: int = STEPS, computed: bool = True, **call: Any) -> Trace:
    """Run the first steps of a pipeline and return the inputs and outputs of its denoiser and scheduler.

    Args:
        num_steps: number of steps to run.
        of: number of steps passed to the pipeline.
        computed: whether to run the denoiser; if not, it returns zeros, and its weights may be on any device.
        call: pipeline call arguments.

    Raises:
        ValueError: if the pipeline fails, or takes fewer steps.
    """
    found, calls = Trace(), list[Call]()
    module, scheduler = getattr(pipe, component_of(pipe)), pipe.scheduler
    signature = inspect.signature(type(module).forward)
    step, set_timesteps = scheduler.step, scheduler.set_timesteps
    stepped = inspect.signature(step)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        kept = {name: value for name, value in bound.items() if name not in ("self", "return_dict")}
        calls.append(Call(_kept(kept), None))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        first = output[0]
        first = torch.stack(list(first)) if isinstance(first, list | tuple) else first
        calls[-1] = Call(calls[-1].arguments, first.detach().clone())

    @functools.wraps(step)
    def seen(*args: Any, **kwargs: Any) -> Any:
        bound = stepped.bind(*args, **kwargs).arguments
        output, sample = bound["model_output"], bound["sample"]
        result = step(*args, **kwargs) if computed else (sample,)
        place = getattr(scheduler, "step_index", None)
        sigma = None if place is None else float(scheduler.sigmas[place - computed])
        moved = result[0] if isinstance(result, tuple) else result.prev_sample
        if type(scheduler).__name__ == COSINE and place is not None:
            # Its samples grow with their noise; the denoiser gets them at unit variance.
            sample, moved = (
                value / (float(scheduler.sigmas[at]) ** 2 + 1) ** 0.5
                for value, at in ((sample, place - computed), (moved, place))
            )
        found.steps.append(
            Step(tuple(calls), output.clone(), float(bound["timestep"]), sigma, sample.clone(), moved.clone())
        )
        calls.clear()
        if len(found.steps) == num_steps:
            raise _Enough
        return result

    @functools.wraps(set_timesteps)
    def set_seen(*args: Any, **kwargs: Any) -> Any:
        found.mu = kwargs.get("mu")
        return set_timesteps(*args, **kwargs)

    hooks = [module.register_forward_pre_hook(before, with_kwargs=True)]
    if computed:
        hooks.append(module.register_forward_hook(after))
    else:
        module.forward = zeros
    scheduler.step, scheduler.set_timesteps = seen, set_seen
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad(), quiet():
            pipe(num_inference_steps=of, generator=torch.Generator().manual_seed(0), **call)
    except _Enough:
        return found
    except Exception as error:  # a pipeline can raise any error for wrong arguments or parts
        raise ValueError(f"the call of {type(pipe).__name__} failed ({in_one_line(error)})") from None
    finally:
        for hook in hooks:
            hook.remove()
        for part, name in ((scheduler, "step"), (scheduler, "set_timesteps"), (module, "forward")):
            vars(part).pop(name, None)
    raise ValueError(
        f"{type(pipe).__name__} took {len(found.steps)} steps of its scheduler, but {num_steps} were requested"
    )


def zeros(sample: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Stand-in for a denoiser that is not run."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    sample = next(value for name, value in {"": sample, **kwargs}.items() if value is not None)
    return Transformer2DModelOutput(sample=sample if isinstance(sample, list) else torch.zeros_like(sample))


def _kept(value: Any) -> Any:
    """Return a copy, so that later changes by the pipeline have no effect."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {name: _kept(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_kept(item) for item in value) if type(value) in (list, tuple) else [_kept(v) for v in value]
    return value


def record(pipe: Any, options: Mapping[str, Any]) -> tuple[Recording, Replay]:
    """Record a pipeline's call, and return it with a network that replays it and reproduces the recorded outputs.

    Args:
        pipe: in float32; its scheduler is replaced by one that takes DDIM steps on the same noise levels.
        options: further pipeline call arguments, such as height and width.

    Raises:
        ValueError: if the replay does not match; the message says where.
    """
    kind = type(pipe).__name__
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
        reading = _Reading(two, options, taken)
        call = reading.node("", one.steps[0].calls[0].arguments, *(step.calls[0].arguments for step in two.steps[:2]))
        if any(len(step.calls) != 1 for step in two.steps):
            raise ValueError(f"the denoiser is called {len(two.steps[0].calls)} times per step without guidance")
        schedule = replace(read_schedule(config_of(pipe.scheduler), two.mu), clip=clip)
        alone = conditions_in(call, two.steps[0].calls[0], 2)
        guidance, guiding, null = None, None, dict[str, Tensor]()
        for name in scales:
            negative = {"negative_prompt": [" ", " "]} if name != GUIDANCES[0] and "negative_prompt" in taken else {}
            try:
                guided = trace(pipe, 1, **prompted(pipe, prompts), **(off | {name: SCALE} | negative))
            except ValueError as error:
                if not labels:
                    raise
                # DiTPipeline always uses 1000 for the null class, and fails on networks with fewer classes.
                warnings.warn(f"the teacher is imported without guidance: {error}", HalfstepWarning, stacklevel=2)
                guidance, guiding = name, Guiding(0.0, False)
                break
            null = _unguided(call, guided.steps[0], alone)
            if null:
                guidance = name
                break
            default = options.get(name, taken[name].default)
            if _embedded(call, guided.steps[0].calls[0].arguments, float(default or 1.0), reading.constants):
                guidance = name
                break
        clock, output = fit_clock(schedule, call, two), _output(two.steps[0])
        if null:
            guiding = verify_guided(call, alone, guided.steps[0], output["sign"])
        output["restores_norm"] = guiding is not None and guiding.is_rescaled
        recording = Recording(
            call, clock, output, schedule, reading.constants, null, guidance, guiding,
            _num_classes(null, getattr(pipe, component_of(pipe)).config) if set(alone) == {"class_labels"} else 0,
            tuple(two.steps[0].before.shape[1:]),
        )  # fmt: skip
        network = replayed(recording, getattr(pipe, component_of(pipe)))
        verify(network, schedule, two)
    except ValueError as error:
        raise ValueError(f"{kind} cannot be replayed: {error}") from None
    return recording, network


def _num_classes(null: Mapping[str, Tensor], config: Mapping[str, Any]) -> int:
    """Return a network's number of classes, which is also the index of its null class."""
    fields = (config.get(name) for name in ("num_embeds_ada_norm", "num_class_embeds"))
    return int(null["class_labels"]) if null else next((int(number) for number in fields if number), 0)


def replayed(recording: Recording, module: Any) -> Replay:
    """Return the network that replays a recording, with the weights of the pipeline's network."""
    config = json.loads(
        json.dumps(known_fields(module.config, Path(module.config.get("_name_or_path", "")), type(module).__name__))
    )
    with torch.device("meta"):
        network = Replay(
            type(module).__name__, config, recording.call, recording.clock, recording.output,
            recording.schedule.num_train_timesteps,
        )  # fmt: skip
    network.hold(module)
    for name, value in recording.constants.items():
        setattr(network.constants, name, value.clone())
    return network.eval()


@final
class _Reading:
    """Classifies the arguments of a denoiser's call."""

    def __init__(self, two: Trace, options: Mapping[str, Any], taken: Mapping[str, inspect.Parameter]) -> None:
        self.latents = two.steps[0].before
        self.constants: dict[str, Tensor] = {}
        self._names: set[str] = set()
        default = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
        self._longest = options.get("max_sequence_length", default)

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
            stacked = torch.stack(list(two)) if two[0].shape == two[1].shape else None
            if stacked is not None and self._is_sample(stacked):
                return {"is": "sample", "shape": list(stacked.shape[1:]), "list": True}
            return self._condition(path, list(two), {"list": True})
        if len(one) != len(two):
            raise ValueError(f"the argument {path[1:]} has the length {len(one)} for one prompt and {len(two)} for two")
        kind = "tuple" if isinstance(two, tuple) else "list"
        return {
            "is": kind,
            "items": [self.node(f"{path}.{i}", *parts) for i, parts in enumerate(zip(one, two, later, strict=True))],
        }

    def _tensor(self, path: str, one: Any, two: Tensor, later: Tensor) -> dict[str, Any]:
        if self._is_sample(two):
            return {"is": "sample", "shape": list(two.shape[1:])}
        if two.shape == later.shape and not torch.equal(two, later):
            if bool((two != two.flatten()[0]).any()):
                raise ValueError(f"the argument {path[1:]} changes from step to step and is neither sample nor time")
            return {"is": "time", "dims": list(two.shape[1:])}
        rows = two.ndim > 0 and len(two) == 2 and (one is None or len(one) == 1)
        if not rows:
            if one is None or one.shape != two.shape or not torch.equal(one, two):
                raise ValueError(f"the argument {path[1:]} has no batch axis and differs between one prompt and two")
            return self._constant(path, two, False)
        if one is not None and one.shape[1:] == two.shape[1:] and torch.equal(two[0], two[1]):
            return self._constant(path, two[:1], True)
        is_ragged = one is None or one.shape[1:] != two.shape[1:]
        return self._condition(path, list(two), {"ragged": True} if is_ragged else {})

    def _is_sample(self, value: Tensor) -> bool:
        same = value.shape[:1] == self.latents.shape[:1] and value.numel() == self.latents.numel()
        return same and difference(value.reshape(self.latents.shape), self.latents) <= CLOCK_TOLERANCE

    def _constant(self, path: str, value: Tensor, rows: bool) -> dict[str, Any]:
        name = self._named(path)
        self.constants[name] = value
        return {"is": "constant", "name": name, "shape": list(value.shape), "dtype": _dtype(value)} | (
            {"rows": True} if rows else {}
        )

    def _condition(self, path: str, rows: list[Tensor], extra: dict[str, Any]) -> dict[str, Any]:
        shape = list(rows[0].shape)
        if extra:
            if not isinstance(self._longest, int):
                raise ValueError(
                    f"the argument {path[1:]} is as long as its prompt, and max_sequence_length does not limit it"
                )
            shape[0] = self._longest
        return {"is": "condition", "name": self._named(path), "shape": shape, "dtype": _dtype(rows[0]), **extra}

    def _named(self, path: str) -> str:
        last = path.rpartition(".")[2]
        name = path[1:].replace(".", "_") if last in self._names or last.isdigit() else last
        self._names.add(name)
        return name


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _reached(node: Mapping[str, Any], value: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield the leaves of a recorded call with their values in another call of the same kind."""
    items = node.get("items")
    if items is None:
        yield node, value
        return
    pairs = (
        ((items[name], value[name]) for name in items) if isinstance(items, Mapping) else zip(items, value, strict=True)
    )
    for item, part in pairs:
        yield from _reached(item, part)


def call_in(manifest: Manifest) -> dict[str, Any]:
    """Return the recorded call of an imported model, or of one with additions to it."""
    call: dict[str, Any] = manifest.network.get("base", manifest.network)["call"]
    return call


def conditions_in(call: Mapping[str, Any], made: Call, batch: int, first: int = 0) -> dict[str, Tensor]:
    """Return a call's conditions by name, each `[batch, ...]`; pads those as long as their prompt with zeros.

    Args:
        first: the first row of the batch; a guided call contains two batches.
    """
    found: dict[str, Tensor] = {}
    values = {
        node["name"]: (node, value) for node, value in _reached(call, made.arguments) if node["is"] == "condition"
    }
    lengths = [value.shape[1] for node, value in values.values() if node.get("ragged") and value is not None]
    for name, (node, value) in values.items():
        if value is None:
            # A mask of ones.
            value = torch.ones(first + batch, max(lengths), dtype=getattr(torch, node["dtype"]))
        rows = [value[place] for place in range(first, first + batch)]
        if "list" in node:
            found[name + LENGTH] = torch.tensor([len(row) for row in rows])
        if "list" in node or node.get("ragged"):
            if (longest := max(len(row) for row in rows)) > node["shape"][0]:
                raise ValueError(f"the condition {name} of {longest} tokens is longer than max_sequence_length")
            padded = rows[0].new_zeros(batch, *node["shape"])
            for place, row in enumerate(rows):
                padded[place, : len(row)] = row
            found[name] = padded
        else:
            found[name] = torch.stack(rows)
    return found


def _branches(call: Mapping[str, Any], step: Step, batch: int = 2) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return the conditions and outputs of a guided step's branches."""
    found = []
    for made in step.calls:
        assert made.output is not None
        for first in range(0, len(made.output), batch):
            found.append((conditions_in(call, made, batch, first), made.output[first : first + batch]))
    return found


def _is_guided(step: Step, batch: int = 1) -> bool:
    """Whether a step of a batch has several branches."""
    return len(step.calls) > 1 or any(made.output is not None and len(made.output) > batch for made in step.calls)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name].float(), other[name].float(), rtol=1e-4, atol=1e-5) for name in one)


def _unguided(call: Mapping[str, Any], step: Step, alone: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one sample's conditions in the branch without a prompt; empty if the step has one branch."""
    branches = [cond for cond, _ in _branches(call, step)]
    if len(branches) == 1:
        return {}
    others = [cond for cond in branches if not _same(cond, alone)]
    if len(branches) != 2 or len(others) != 1:
        raise ValueError(f"a guided step has {len(branches)} branches, {len(others)} of which have other conditions")
    (null,) = others
    if not _same({n: v[:1] for n, v in null.items()}, {n: v[1:] for n, v in null.items()}):
        raise ValueError("the unconditional branch differs between two prompts")
    return {name: value[0] for name, value in null.items()}


def _embedded(call: dict[str, Any], arguments: Mapping[str, Any], scale: float, constants: dict[str, Tensor]) -> bool:
    """Mark the argument that changes with the guidance scale in the recorded call; return whether there is one."""
    for path in list(call["items"]):
        node, value = call["items"][path], arguments[path]
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
    times = torch.tensor([schedule.time_of(step.timestep, step.sigma) for step in two.steps], dtype=torch.float64)
    seen = torch.tensor(shown, dtype=torch.float64)
    alpha, sigma = schedule.process.alpha_sigma(times)
    rules = {"u": times, "sigma": sigma, "angle": torch.atan2(sigma, alpha) * (2 / math.pi)}
    order = ("sigma", "u", "angle") if schedule.is_flow else ("u", "angle", "sigma")
    for of in order:
        design = torch.stack([rules[of], torch.ones_like(times)], dim=1)
        solved = torch.linalg.lstsq(design, seen).solution
        scale, offset = (_snapped(float(number), float(seen.abs().max())) for number in solved)
        if float((scale * rules[of] + offset - seen).abs().max()) <= CLOCK_TOLERANCE * max(
            1.0, float(seen.abs().max())
        ):
            clock = {"of": of, "scale": scale, "offset": offset}
            return clock if of == "u" else clock | {"process": processes.describe(schedule.process)}
    raise ValueError(
        f"its denoiser gets the times {', '.join(f'{x:.6g}' for x in shown)} at the noise levels "
        f"{', '.join(f'{float(x):.6g}' for x in sigma)}, which are not affine in t, sigma or the angle"
    )


def _snapped(number: float, size: float) -> float:
    """Return the number without float32 rounding errors, if it is close to a round number at this size."""
    near = round(number, 3)
    return near + 0.0 if abs(near - number) <= CLOCK_TOLERANCE * max(1.0, size) else number


def _shown(call: Mapping[str, Any], step: Step) -> float:
    """Return the time passed to the denoiser."""
    found = [
        float(value.flatten()[0]) for node, value in _reached(call, step.calls[0].arguments) if node["is"] == "time"
    ]
    if not found:
        raise ValueError("no argument of its denoiser changes from step to step like a time")
    return found[0]


def _output(step: Step) -> dict[str, Any]:
    """Return which part of the denoiser's output was passed to the scheduler, and its sign.

    Raises:
        ValueError: if something else was passed.
    """
    made = step.calls[0].output
    assert made is not None
    wanted = step.output
    channels = wanted.shape[1]
    for part, found in (("all", made), ("first", made[:, :channels]), ("last", made[:, -channels:])):
        if found.numel() == wanted.numel():
            for sign in (1, -1):
                if _near(sign * found.reshape(wanted.shape), wanted):
                    return {"sign": sign, "part": part}
    raise ValueError(
        f"its denoiser returns {list(made.shape)}, but its scheduler gets {list(wanted.shape)}, which is neither this "
        "output nor its first or last channels, with either sign"
    )


def _near(found: Tensor, wanted: Tensor) -> bool:
    return difference(found, wanted) <= TOLERANCE


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
        ValueError: if anything does not match; the message says what.
    """
    denoiser = NetworkDenoiser(network, schedule.process, schedule.prediction)
    grid = grid_of(schedule, made)
    for place, step in enumerate(made.steps):
        x_t, batch = step.before, len(step.before)
        time = grid[place].expand(batch).float()
        cond = conditions_in(network.call, step.calls[0], batch)
        if takes_scale(network.call):
            # Calls with a single branch were recorded at scale 1.
            cond[GUIDANCE] = torch.ones(batch)
        told, shown = float(network.timestep(time)[0]), _shown(network.call, step)
        if abs(told - shown) > TOLERANCE * max(1e-2, abs(shown)):
            raise ValueError(
                f"at step {place + 1} its denoiser got the time {shown:.6g}, but the clock gives {told:.6g}"
            )
        recorded = step.calls[0].output
        assert recorded is not None
        if (off := difference(network.raw(x_t, time, **cond), recorded)) > TOLERANCE:
            raise ValueError(
                f"at step {place + 1} its denoiser, called with the recorded conditions "
                f"({', '.join(cond) or 'none'}), returns a different output than before (by {off:.2g} of its size)"
            )
        if (off := difference(network(x_t, time, **cond), step.output)) > TOLERANCE:
            raise ValueError(
                f"at step {place + 1} the scheduler did not get the "
                f"{'negated ' if network.output['sign'] < 0 else ''}output (it differs by {off:.2g} of its size): the "
                "sign or the slice is different"
            )
        landed = ddim_step(denoiser(x_t, grid[place].expand(batch), cond), schedule.process, float(grid[place + 1]))
        if (off := difference(landed, step.after)) > TOLERANCE:
            raise ValueError(
                f"step {place + 1} from t = {float(grid[place]):.4g} to {float(grid[place + 1]):.4g} on "
                f"{schedule.process} with the output as {type(schedule.prediction).__name__} gives a different sample "
                f"than the scheduler's step (by {off:.2g} of its size)"
            )


def verify_guided(call: Mapping[str, Any], alone: Mapping[str, Tensor], step: Step, sign: int) -> Guiding:
    """Return how the two branches of a guided step were combined.

    Raises:
        ValueError: if it is not classifier-free guidance.
    """
    branches = _branches(call, step)
    (with_,) = (made for cond, made in branches if _same(cond, alone))
    (without,) = (made for cond, made in branches if not _same(cond, alone))
    wanted = sign * step.output[: len(alone[next(iter(alone))])]
    with_, without = (_cut(made, wanted) for made in (with_, without))
    for more in (0.0, 1.0):
        for rescale in (False, True):
            found = without + (SCALE + more) * (with_ - without)
            if rescale:
                found = found * (with_.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True))
            if _near(found, wanted):
                return Guiding(more, rescale)
    raise ValueError(
        f"at a guidance scale of {SCALE:g} it uses neither u + s (c - u) nor c + s (c - u) of its conditional output c "
        "and unconditional output u, with or without rescaling to the norm of c"
    )


def _cut(made: Tensor, like: Tensor) -> Tensor:
    return made.reshape(like.shape) if made.numel() == like.numel() else made[:, : like.shape[1]]


@torch.no_grad()
def verify_export(pipe: Any, model: Model, **call: Any) -> None:
    """Compare the samples of an exported pipeline with the model's own, from the same noise and conditions.

    Args:
        call: the call arguments in its card, without prompts.

    Raises:
        ValueError: if they differ, or a step takes several network calls.
    """
    manifest, count = model.manifest, int(call.pop("num_inference_steps"))
    if "sigmas" not in call and manifest.process["type"] == "flow":
        pipe.scheduler.set_timesteps = functools.partial(pipe.scheduler.set_timesteps, sigmas=sigmas_of(count))
    prompts: Sequence[Any] = (0, 1) if manifest.num_classes else PROMPTS
    made = trace(pipe, count, of=count, **prompted(pipe, prompts), **call)
    if any(len(step.calls) != 1 or _is_guided(step, 2) for step in made.steps):
        raise ValueError(
            f"the exported {type(pipe).__name__} calls its network more than once per step, with the arguments {call}"
        )
    cond = conditions_in(call_in(manifest), made.steps[0].calls[0], 2)
    if manifest.guidance is not None and manifest.guidance["type"] == "range":
        cond[GUIDANCE] = torch.full((2,), float(call["guidance_scale"]))
    found = sample(model, made.steps[0].before, count, model.sampler, cond)
    if not (off := difference(found, made.steps[-1].after)) <= EXPORT_TOLERANCE:
        raise ValueError(
            f"samples of the exported {type(pipe).__name__} in {count} steps differ from the model's by {off:.2g} of "
            "their size. Use --format onnx, or halfstep.load in Python"
        )
