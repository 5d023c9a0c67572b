"""Export of a whole sampler as one ONNX graph: noise in, x0 out, its steps unrolled.

The clock of every step is computed here in float64 and enters the graph as constants; what remains are the network's
calls and a few sums between them.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from halfstep.core.clock import per_sample
from halfstep.core.denoiser import GUIDANCE
from halfstep.core.grids import uniform_times
from halfstep.core.prediction import eps_from_x0
from halfstep.models.model import Model
from halfstep.nets import merged
from halfstep.runtime.files import replacing, scratch
from halfstep.samplers import sample

LARGEST: Final = int(1.4 * 2**30)
"""Bytes of weights that lie in the graph's own file; a protobuf cannot hold 2 GiB, and torch parts them from 1.5 on."""
CLOSE: Final = 1e-4
"""Largest difference between graph and torch, for samples on [-1, 1]."""


@final
class UnrolledSampler(nn.Module):
    """DDIM in a fixed number of steps, from unit noise and conditions to x0.

    Args:
        model: whose own clipping is part of the graph.
        num_steps: of the sampler.
        names: of the conditions, in the order in which the call takes them.
    """

    def __init__(self, model: Model, num_steps: int, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network: Any = merged(model.denoiser.network)
        self.prediction = model.denoiser.prediction
        self.clip = model.manifest.clip
        self.start_scale = model.process.start_scale
        self.names = names
        times = uniform_times(num_steps)
        alpha, sigma = model.process.alpha_sigma(times)
        alpha_s, sigma_s = model.process.landing(times)
        self.steps = [
            (float(times[k]), alpha[k : k + 1], sigma[k : k + 1], alpha_s[k + 1 : k + 2], sigma_s[k + 1 : k + 2])
            for k in range(num_steps)
        ]

    def forward(self, noise: Tensor, *conditions: Tensor) -> Tensor:
        """x0 `[batch, *dims]` from unit noise `[batch, *dims]` and conditions `[batch, ...]`."""
        x_t = noise * self.start_scale
        cond = dict(zip(self.names, conditions, strict=True))
        for t, alpha, sigma, alpha_s, sigma_s in self.steps:
            # Filled from the input, so that the length of the batch stays open in the graph.
            time = torch.zeros_like(x_t).flatten(1)[:, 0] + t
            x0, eps = self.prediction.denoised(self.network(x_t, time, **cond), x_t, alpha, sigma)
            if self.clip:
                x0 = x0.clamp(-1, 1)
                eps = eps_from_x0(x_t, x0, alpha, sigma)
            x_t = per_sample(alpha_s, x0) * x0 + per_sample(sigma_s, x0) * eps
        return x_t


@contextmanager
def _silent() -> Iterator[None]:
    """Within it the exporter says nothing: its hints are for those who call it directly."""
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
    """The sampler of a model as a graph in the file `out`, compared with torch before it appears there.

    Inputs are `noise` float32 `[batch, *shape]`, of unit variance, and the conditions that the model is shown, each
    `[batch, ...]`; the output is `x0` `[batch, *shape]`. The length of a batch is open.

    Args:
        num_steps: the model's own number if None.
        example: conditions of two samples, each `[2, ...]`; made up from the manifest if None.

    Raises:
        ValueError: if a package is missing, the number of steps is not known, or the graph's samples are not torch's;
            nothing is written then.
    """
    missing = [name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"export to ONNX needs the packages onnx, onnxruntime and onnxscript, and {missing[0]} is missing: pip "
            "install 'halfstep[onnx]'"
        )
    steps = model.check_steps(num_steps)
    model = model.cpu().eval()
    cond = dict(example) if example is not None else example_conditions(model, 2)
    noise = torch.randn(2, *model.shape, generator=torch.Generator().manual_seed(0))
    sampler = UnrolledSampler(model, steps, tuple(cond)).eval()
    batch = torch.export.Dim("batch")
    shapes: tuple[Any, ...] = ({0: batch}, tuple({0: batch} for _ in cond)) if cond else ({0: batch},)
    with scratch(out) as place:
        place.mkdir()
        # Under its own name, for a graph names the file of its weights beside it.
        made = place / out.name
        with _silent(), torch.no_grad():
            program: Any = torch.onnx.export(
                sampler,
                (noise, *cond.values()),
                dynamo=True,
                input_names=["noise", *cond],
                output_names=["x0"],
                dynamic_shapes=shapes,
            )
        facts = {
            "halfstep": version("halfstep"),
            "num_steps": str(steps),
            "shape": str(list(model.shape)),
            "prediction": str(model.manifest.prediction["type"]),
            "process": str(model.manifest.process["type"]),
            "clip": str(model.manifest.clip),
        }
        program.model.metadata_props.update(facts)
        size = sum(parameter.numel() * parameter.element_size() for parameter in sampler.parameters())
        program.save(made, external_data=size > LARGEST)
        check_graph(made, model, steps, cond)
        # The weights before the graph, whose appearance says that all is there.
        for file in sorted(place.iterdir(), reverse=True):
            with replacing(out.parent / file.name) as temporary:
                file.rename(temporary)
    return out


def example_conditions(model: Model, number: int) -> dict[str, Tensor]:
    """Conditions that a model can be shown, `[number, ...]` each: classes in turn, and numbers without meaning."""
    generator = torch.Generator().manual_seed(1)
    others = {
        name: torch.randn(number, *shape, generator=generator) for name, shape in model.manifest.conditions.items()
    }
    cond = model.cond(range(number), others=others)
    if model.manifest.guidance is None:
        # A guidance scale for a teacher means two calls, which the graph does not make.
        cond.pop(GUIDANCE, None)
    return cond


def check_graph(file: Path, model: Model, num_steps: int, cond: Mapping[str, Tensor]) -> None:
    """Passes if the graph in `file` samples as torch does, for batches of two lengths.

    Raises:
        ValueError: if it does not, by more than 1e-4 of what [-1, 1] is to images.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for length in (1, 3):
        rows = torch.arange(length) % 2
        noise = torch.randn(length, *model.shape, generator=torch.Generator().manual_seed(length))
        shown = {name: value[rows] for name, value in cond.items()}
        expected = sample(model, noise * model.process.start_scale, num_steps, cond=shown)
        found = session.run(["x0"], {"noise": noise.numpy(), **{name: v.numpy() for name, v in shown.items()}})[0]
        apart = float((torch.from_numpy(found) - expected).abs().max())
        if not apart <= CLOSE * max(1.0, float(expected.abs().max())):
            raise ValueError(
                f"the exported graph's samples differ from torch's by up to {apart:.2g}: it was not written"
            )
