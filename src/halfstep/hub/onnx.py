"""Export of a whole sampler as one ONNX graph from noise to x0, with its steps unrolled.

The clock of every step is computed here in float64 and stored in the graph as constants. The graph only contains the
network's calls and a few sums, because a sampler is linear in the network's outputs and in the noise of its steps.
"""

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
from halfstep.models.model import Model
from halfstep.nets import merged
from halfstep.runtime.files import replacing, scratch
from halfstep.samplers import sample

LARGEST: Final = int(1.4 * 2**30)
"""Maximum bytes of weights in the graph's own file: a protobuf is limited to 2 GiB, and torch splits from 1.5 GiB."""


STEP_NOISE: Final = "step_noise"
"""Input with the noise that a stochastic sampler draws in each step except the last, which draws none."""


@final
class _Recorder(Denoiser):
    """A denoiser that records the calls of a sampler as coefficients, and returns unit vectors.

    A sampler step is a linear combination of x_t, of the denoiser's outputs (x0, eps) and of values kept from earlier
    steps. When run on coefficient vectors `[1, size]`, the sampler returns the coefficients of this combination.

    Args:
        size: number of values in the whole program: the noise, two per call, and two per step (its result and noise).
    """

    def __init__(self, process: NoiseProcess, size: int) -> None:
        super().__init__()
        self.process, self.size = process, size
        self.program: list[tuple[list[tuple[int, float]], float | None]] = []
        """Terms (value, coefficient) of a sum, and the time of the call with this sum; None for the end of a step."""
        self.known = 1

    def value(self) -> Tensor:
        """Return the unit vector of the next value."""
        self.known += 1
        return torch.eye(self.size, dtype=torch.float64)[None, self.known - 1]

    def record(self, x: Tensor, t: float | None) -> None:
        """Append the sum with the coefficients `x`."""
        self.program.append(([(int(j), float(x[0, j])) for j in x[0].nonzero().flatten()], t))

    def forward(self, x_t: Tensor, t: Tensor | float, cond: Cond | None = None) -> Denoised:
        self.record(x_t, float(torch.as_tensor(t, dtype=torch.float64).flatten()[0]))
        return Denoised(self.value(), self.value())


@final
class UnrolledSampler(nn.Module):
    """A sampler with a fixed number of steps: maps unit noise, its steps' noise (if it draws any) and conditions to x0.

    Args:
        model: the model; its own sampler and clipping are part of the graph.
        num_steps: number of sampler steps.
        names: names of the inputs after the first, in order of the call: `STEP_NOISE` if the sampler draws noise before
            its last step, and the conditions.
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
            # The last step draws none.
            drawn = torch.zeros_like(x_t) if sampler.stochastic and noise is None else noise
            x_s, memory = sampler.step(recorder, x_t, t, s, None, memory, drawn)
            recorder.record(x_s, None)
            x_t = recorder.value()
        self.program = [
            (terms, None if t is None else (t, *model.process.alpha_sigma(torch.tensor([t], dtype=torch.float64))))
            for terms, t in recorder.program
        ]

    def forward(self, noise: Tensor, *others: Tensor) -> Tensor:
        """Return x0 `[batch, *dims]` from unit noise, step noise `[batch, steps, *dims]` if any, and conditions."""
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
            # Derived from the input, so that the batch size stays dynamic in the graph.
            time = torch.zeros_like(x).flatten(1)[:, 0] + t
            x0, eps = self.prediction.denoised(self.network(x, time, **cond), x, alpha, sigma)
            if self.clip:
                x0 = x0.clamp(-1, 1)
                eps = eps_from_x0(x, x0, alpha, sigma)
            values += [x0, eps]
        return values[-1]


@contextmanager
def _silent() -> Iterator[None]:
    """Silence torch's exporter, which prints hints for direct callers."""
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
    """Write the model's own sampler as a graph to the file `out`, after comparing it with torch, and return `out`.

    Inputs are `noise` float32 `[batch, *shape]`, of unit variance, and the model's conditions, each `[batch, ...]`; the
    output is `x0` `[batch, *shape]`. The batch size is dynamic. A stochastic sampler of two or more steps also takes
    `step_noise` `[batch, num_steps - 1, *shape]`, of unit variance.

    Args:
        num_steps: the model's own number if None.
        example: conditions of two samples, each `[2, ...]`; generated from the manifest if None.

    Raises:
        ValueError: if a package is missing, the number of steps is unknown, or the graph's samples differ from torch's;
            nothing is written then.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export to ONNX needs the packages onnx, onnxruntime and onnxscript, but {missing[0]} is missing: pip "
            "install 'halfstep[onnx]'"
        )
    steps = model.check_steps(num_steps)
    model = model.cpu().eval()
    cond = example_conditions(model, 2) if example is None else dict(example)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    drawn = {STEP_NOISE: _drawn(model, steps, 2)} if model.sampler.stochastic and steps > 1 else {}
    inputs = {**drawn, **cond}
    sampler = UnrolledSampler(model, steps, tuple(inputs)).eval()
    batch = {0: torch.export.Dim("batch")}
    with scratch(out) as place:
        place.mkdir()
        # The file name must be the final one, because a graph refers to the file of its weights by name.
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
        # torch writes a stack trace, with local paths, into every node.
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()
        program.model.metadata_props.update(facts)
        size = sum(parameter.nbytes for parameter in sampler.parameters())
        program.save(made, external_data=size > LARGEST)
        apart = distance_from_torch(made, model, steps, cond)
        if not apart <= 1e-4:
            raise ValueError(
                f"the exported graph's samples differ from torch's by up to {apart:.2g}: it was not written"
            )
        # Weights first: the graph file marks the export as complete.
        for file in sorted(place.iterdir(), reverse=True):
            with replacing(out.parent / file.name) as temporary:
                file.rename(temporary)
    return out


def _drawn(model: Model, num_steps: int, length: int) -> Tensor:
    """Return standard normal noise for all steps except the last, `[length, num_steps - 1, *shape]`."""
    generator = torch.Generator().manual_seed(100 + length)
    return torch.randn(length, num_steps - 1, *model.shape, generator=generator)


def example_conditions(model: Model, number: int) -> dict[str, Tensor]:
    """Return example conditions for a model, each `[number, ...]`: cycling classes, and random numbers."""
    generator = torch.Generator().manual_seed(1)
    others = {
        name: torch.randn(number, *shape, generator=generator) for name, shape in model.manifest.conditions.items()
    }
    cond = model.cond(range(number), others=others)
    if model.manifest.guidance is None:
        # A guidance scale for a teacher needs two calls, which the graph does not make.
        cond.pop(GUIDANCE, None)
    return cond


def distance_from_torch(
    file: Path, model: Model, num_steps: int, cond: Mapping[str, Tensor], lengths: Sequence[int] = (1, 3)
) -> float:
    """Return the largest difference between the samples of the graph in `file` and torch's, relative to the largest
    value (at least 1), for batches of these sizes.

    Args:
        cond: conditions of two samples, each `[2, ...]`, which are repeated to fill a batch.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    distances = []
    for length in lengths:
        rows = torch.arange(length) % 2
        noise = torch.randn(length, *model.shape, generator=torch.Generator().manual_seed(length))
        shown = {name: value[rows] for name, value in cond.items()}
        steps, inputs = None, {"noise": noise, **shown}
        if model.sampler.stochastic:
            drawn = _drawn(model, num_steps, length)
            steps = [*drawn.unbind(1), torch.zeros_like(noise)].__getitem__
            inputs |= {STEP_NOISE: drawn} if num_steps > 1 else {}
        expected = sample(model, noise * model.process.start_scale, num_steps, model.sampler, cond=shown, noise=steps)
        found = session.run(["x0"], {name: value.numpy() for name, value in inputs.items()})[0]
        apart = float((torch.from_numpy(found) - expected).abs().max())
        distances.append(apart / max(1.0, float(expected.abs().max())))
    # np.max returns NaN if any distance is NaN.
    return float(np.max(distances))
