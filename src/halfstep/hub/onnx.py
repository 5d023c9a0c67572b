"""Export a whole sampler, with its steps unrolled, as a single ONNX graph that maps noise to x0.

A sampler is linear in the network's outputs and in the noise drawn at each step, so the graph contains only the network
calls and a few sums. The times of all steps are computed in float64 and stored as constants.
"""

import copy
import functools
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Final, final

import numpy as np
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE, Cond, Denoiser
from halfstep.core.grids import uniform_times
from halfstep.core.noise import NoiseProcess
from halfstep.core.prediction import Denoised, eps_from_x0
from halfstep.hub.calls import difference
from halfstep.models.model import Model
from halfstep.nets import merged
from halfstep.runtime.files import refuse_taken, replacing, scratch
from halfstep.samplers import sample

LARGEST: Final = int(1.4 * 2**30)
"""Maximum size in bytes of weights stored in the graph file itself. A protobuf is limited to 2 GiB, and torch splits
the file at 1.5 GiB."""
STEP_NOISE: Final = "step_noise"
"""Name of the input that contains a stochastic sampler's noise for each step except the last, which draws none."""


@final
class _Recorder(Denoiser):
    """A denoiser that records a sampler's calls as coefficients and returns unit vectors.

    A sampler step is a linear combination of x_t, the denoiser's outputs (x0, eps) and values kept from earlier steps.
    Applied to coefficient vectors `[1, size]`, the sampler therefore returns the coefficients of this combination.

    Args:
        size: number of values in the whole program: the initial noise, two values per call, and two values per step
            (the step's result and noise).
    """

    def __init__(self, process: NoiseProcess, size: int) -> None:
        super().__init__()
        self.process, self.size = process, size
        self.program: list[tuple[list[tuple[int, float]], tuple[Any, ...] | None]] = []
        """Sums of (value, coefficient) pairs. Each sum is the input of a call, stored with its (t, alpha, sigma), or a
        step's result, stored with None."""
        self.known = 1

    def value(self) -> Tensor:
        """Return the unit vector of the next value."""
        self.known += 1
        return torch.eye(self.size, dtype=torch.float64)[None, self.known - 1]

    def record(self, x: Tensor, call: tuple[Any, ...] | None = None) -> None:
        """Append the sum with the coefficients `x` to the program."""
        self.program.append(([(int(j), float(x[0, j])) for j in x[0].nonzero().flatten()], call))

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        t = t.flatten()[:1]
        self.record(x_t, (float(t), *self.process.alpha_sigma(t)))
        return Denoised(self.value(), self.value())


@final
class UnrolledSampler(nn.Module):
    """A sampler with a fixed number of steps that maps unit noise, step noise (if any) and conditions to x0.

    Args:
        model: the model, whose sampler and clipping become part of the graph.
        num_steps: number of sampler steps.
        names: names of the inputs after the first, in order: `STEP_NOISE` (if the sampler draws noise before its last
            step), then the conditions.
    """

    def __init__(self, model: Model, num_steps: int, names: tuple[str, ...]) -> None:
        super().__init__()
        sampler = model.sampler
        self.network: Any = merged(model.denoiser.network)
        self.prediction = model.denoiser.prediction
        self.clip = model.manifest.clip
        self.start_scale = model.process.start_scale
        self.names = names
        recorder = _Recorder(model.process, 1 + 2 * sampler.num_evals(num_steps) + 2 * num_steps)
        x_t, memory = torch.eye(recorder.size, dtype=torch.float64)[None, 0], None
        self.drawn = num_steps - 1 if sampler.stochastic else 0
        noises = [recorder.value() for _ in range(self.drawn)]
        for (t, s), noise in itertools.zip_longest(itertools.pairwise(uniform_times(num_steps).tolist()), noises):
            # The last step does not draw noise.
            drawn = torch.zeros_like(x_t) if sampler.stochastic and noise is None else noise
            x_s, memory = sampler.step(recorder, x_t, t, s, None, memory, drawn)
            recorder.record(x_s)
            x_t = recorder.value()
        self.program = recorder.program

    def forward(self, noise: Tensor, *others: Tensor) -> Tensor:
        """Return x0 `[batch, *dims]` for unit noise, step noise `[batch, steps, *dims]` (if any) and conditions."""
        values = [noise * self.start_scale]
        cond = dict(zip(self.names, others, strict=True))
        if self.drawn:
            values += cond.pop(STEP_NOISE).unbind(1)
        for terms, call in self.program:
            parts = [values[place] if share == 1 else share * values[place] for place, share in terms]
            x = functools.reduce(torch.add, parts)
            if call is None:
                values.append(x)
                continue
            t, alpha, sigma = call
            # The time is derived from the input to keep the graph's batch size dynamic.
            time = torch.zeros_like(x).flatten(1)[:, 0] + t
            x0, eps = self.prediction.denoised(self.network(x, time, **cond), x, alpha, sigma)
            if self.clip:
                x0 = x0.clamp(-1, 1)
                eps = eps_from_x0(x, x0, alpha, sigma)
            values += [x0, eps]
        return values[-1]


@contextmanager
def _silent() -> Iterator[None]:
    """Silence torch's exporter."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def export_onnx(
    model: Model, out: Path, num_steps: int | None = None, example: Mapping[str, Tensor] | None = None
) -> Path:
    """Write the model's sampler as a graph to the file `out`, after comparing the graph with torch, and return `out`.

    The inputs are float32 `noise` `[batch, *shape]`, of unit variance, and the model's conditions, each `[batch, ...]`.
    The output is `x0` `[batch, *shape]`. The batch size is dynamic. A stochastic sampler with several steps also takes
    `step_noise` `[batch, num_steps - 1, *shape]`, of unit variance.

    Args:
        num_steps: number of sampler steps, or None for the model's own number.
        example: conditions for two samples, each `[2, ...]`, or None to generate them from the manifest.

    Raises:
        ValueError: if a package is missing, if the number of steps is unknown, if large weights would replace those of
            another graph, or if the graph's samples differ from torch's. In each case, nothing is written.
    """
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if find_spec(name) is None:
            raise ValueError(f"ONNX export needs the package {name}: pip install 'halfstep[onnx]'")
    steps = model.check_steps(num_steps)
    model = whole_on_cpu(model)
    cond = example_conditions(model, 2) if example is None else dict(example)
    noise = _normal(0, 2, *model.shape)
    inputs = step_noise(model, steps, 2) | cond
    sampler = UnrolledSampler(model, steps, tuple(inputs)).eval()
    has_own_file = sum(parameter.nbytes for parameter in sampler.parameters()) > LARGEST
    if has_own_file:
        # A graph keeps the name of its weights file, even if the graph itself is renamed.
        refuse_taken(out.with_name(f"{out.name}.data"), is_file=True, remedy="choose another name for the graph")
    batch = {0: torch.export.Dim("batch")}
    with scratch(out) as place:
        place.mkdir()
        # A graph stores the name of its weights file, so the file must already have its final name.
        made = place / out.name
        with _silent(), torch.no_grad():
            program: Any = torch.onnx.export(
                sampler,
                (noise, *inputs.values()),
                dynamo=True,
                input_names=["noise", *inputs],
                output_names=["x0"],
                dynamic_shapes=(batch, (batch,) * len(inputs)) if inputs else (batch,),
            )
        facts = {
            "halfstep": version("halfstep"),
            "num_steps": str(steps),
            "sampler": str(model.sampler),
            "shape": str(list(model.shape)),
            "prediction": str(model.manifest.prediction["type"]),
            "process": str(model.manifest.process["type"]),
            "clip": str(model.manifest.clip),
        }
        # torch writes a stack trace with local paths into every node.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.model.metadata_props.update(facts)
        program.save(made, external_data=has_own_file)
        apart = distance_from_torch(made, model, steps, cond)
        if not apart <= 1e-4:
            raise ValueError(
                f"the graph's samples differ from torch's by up to {apart:.2g}, so the graph was not written"
            )
        # The weights are written first, because the graph file marks the export as complete.
        for file in sorted(place.iterdir(), reverse=True):
            with replacing(out.parent / file.name) as temporary:
                file.rename(temporary)
    return out


def whole_on_cpu(model: Model) -> Model:
    """Return the model on the CPU in float32, with its LoRA weights merged, without moving the given model."""
    whole = model.merged()
    if whole is model and model.device.type != "cpu":
        # Copy to the CPU at once, because the device may not have memory for two models.
        tensors = [*model.parameters(), *model.buffers()]
        whole = copy.deepcopy(model, {id(tensor): _on_cpu(tensor) for tensor in tensors})
    return whole.cpu().eval()


def _on_cpu(tensor: Tensor) -> Tensor:
    moved = tensor.detach().cpu()
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def step_noise(model: Model, num_steps: int, length: int) -> dict[str, Tensor]:
    """Return `{STEP_NOISE: [length, num_steps - 1, *shape]}`, the noise of all steps but the last, if any is drawn."""
    if not model.sampler.stochastic or num_steps == 1:
        return {}
    return {STEP_NOISE: _normal(100 + length, length, num_steps - 1, *model.shape)}


def example_conditions(model: Model, number: int) -> dict[str, Tensor]:
    """Return example conditions for a model, each `[number, ...]`: consecutive classes, and random values otherwise."""
    generator = torch.Generator().manual_seed(1)
    others = {
        name: torch.randn(number, *shape, generator=generator) for name, shape in model.manifest.conditions.items()
    }
    cond = model.cond(range(number), others=others)
    if model.manifest.guidance is None:
        # Guiding a teacher takes two network calls per evaluation, but the graph makes only one.
        cond.pop(GUIDANCE, None)
    return cond


def distance_from_torch(
    file: Path, model: Model, num_steps: int, cond: Mapping[str, Tensor], lengths: Sequence[int] = (1, 3)
) -> float:
    """Return the largest difference between a graph's samples and torch's, scaled as in `difference`.

    Args:
        cond: conditions for two samples, each `[2, ...]`, repeated to fill a batch.
        lengths: batch sizes to test.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    distances = []
    for length in lengths:
        rows = torch.arange(length) % 2
        noise, drawn = _normal(length, length, *model.shape), step_noise(model, num_steps, length)
        shown = {name: value[rows] for name, value in cond.items()}
        inputs = {"noise": noise, **drawn, **shown}
        parts = [*(drawn[STEP_NOISE].unbind(1) if drawn else ()), torch.zeros_like(noise)]
        steps = parts.__getitem__ if model.sampler.stochastic else None
        expected = sample(model, noise * model.process.start_scale, num_steps, model.sampler, cond=shown, noise=steps)
        found = session.run(["x0"], {name: value.numpy() for name, value in inputs.items()})[0]
        distances.append(difference(torch.from_numpy(found), expected))
    # Unlike max, np.max returns NaN if any distance is NaN.
    return float(np.max(distances))
