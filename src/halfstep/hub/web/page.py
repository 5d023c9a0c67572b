"""Write a model as a web page that contains graphs, onnxruntime-web, and scripts that draw the same noise as torch."""

import base64
import gzip
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import Any, Final

import numpy as np
from markupsafe import Markup, escape

from halfstep.core.denoiser import GUIDANCE
from halfstep.hub.onnx import distance_from_torch, example_conditions, export_onnx, step_noise, whole_on_cpu
from halfstep.hub.web import runtime
from halfstep.models.model import Model
from halfstep.objectives import GuidanceRange
from halfstep.runtime.files import refuse_irreplaceable, refuse_taken, replacing, replacing_folder

MOST_BYTES: Final = 256 * 2**20
"""Maximum size in bytes of a model's weights. Browsers fail to load larger pages."""
NEAR: Final = 5e-4
"""Maximum accepted difference from torch's samples if weights are stored with 16 bits."""
SMALLEST: Final = 256
"""Minimum number of values for a tensor to be stored with 16 bits per value."""
LICENCES: Final = "onnxruntime-licences.txt"


def export_web(
    models: Sequence[tuple[Model, int | None]],
    out: Path,
    title: str,
    single_file: bool = False,
    runtime_source: Path | None = None,
) -> int:
    """Write a page that samples in the browser, and return its size in bytes.

    Args:
        models: the models to choose from, each with a number of steps, or None for the model's own number.
        out: a folder to serve or, with `single_file`, an HTML file that can also be opened from disk.
        runtime_source: the npm package onnxruntime-web (see `read_runtime`).

    Raises:
        ValueError: if samples are not grey or colour images, if the page does not support a condition, if a model is
            too large, if a graph cannot be exported (see `export_onnx`), or if the runtime is missing. In each case,
            nothing is written.
    """
    refuse_taken(out, is_file=single_file)
    if not single_file:
        refuse_irreplaceable(out)
    for model, _ in models:
        _check(model)
    held = runtime.read_runtime(runtime_source)
    graphs, assets = [], {}
    for model, num_steps in models:
        steps = model.check_steps(num_steps)
        file = f"sampler-{steps}.onnx"
        assets[file] = _graph(model, steps)
        inputs = [*step_noise(model, steps, 1), *example_conditions(model, 1)]
        graphs.append({"steps": steps, "file": file, "inputs": inputs})
    assets[runtime.MODULE] = held[runtime.MODULE]
    assets[f"{runtime.BINARY}.gz"] = gzip.compress(held[runtime.BINARY], mtime=0)
    assets[LICENCES] = runtime.licences().encode()
    html = _html(title, models[0][0], graphs, assets if single_file else {})
    if single_file:
        with replacing(out) as temporary:
            temporary.write_bytes(html)
        return len(html)
    with replacing_folder(out) as into:
        for name, content in ({"index.html": html} | assets).items():
            (into / name).write_bytes(content)
    return len(html) + sum(map(len, assets.values()))


def _check(model: Model) -> None:
    """Raise ValueError if the page does not support the model's samples, conditions or size."""
    if not model.manifest.is_image or len(model.shape) != 3 or model.shape[0] not in (1, 3):
        raise ValueError(f"samples of shape {list(model.shape)} are not grey or colour images. Use --format onnx.")
    if model.manifest.conditions:
        name = next(iter(model.manifest.conditions))
        raise ValueError(f"the page has no field for the condition {name}. Use --format onnx.")
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size > MOST_BYTES:
        raise ValueError(
            f"{size / 1e6:,.0f} MB of weights are too large for a web page, which may contain at most "
            f"{MOST_BYTES / 1e6:,.0f} MB. Use --format onnx."
        )


def _graph(model: Model, num_steps: int) -> bytes:
    """Return the sampler as a graph, with 16-bit weights unless they change the samples too much."""
    with TemporaryDirectory() as folder:
        whole, halved = Path(folder) / "whole.onnx", Path(folder) / "halved.onnx"
        model = whole_on_cpu(model)
        export_onnx(model, whole, num_steps)
        halve_weights(whole, halved)
        distance = distance_from_torch(halved, model, num_steps, example_conditions(model, 2), (16,))
        return (halved if distance <= NEAR else whole).read_bytes()


def halve_weights(graph_file: Path, out: Path) -> None:
    """Copy the graph in `graph_file` to `out`, with large float32 tensors stored as 16-bit integers.

    Each output channel (the first axis) has a separate scale. The weights take as little space as float16, but are
    several times more accurate: the error is at most 2^-16 of the channel's largest weight, whereas float16 rounds to
    11 bits. onnxruntime converts the weights back once, when it loads the graph.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(graph_file)
    graph, kept, nodes = model.graph, [], []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < SMALLEST:
            kept.append(tensor)
            continue
        largest = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True)
        scale = np.where(largest > 0, largest / (2**15 - 1), 1).astype(np.float32)
        whole = np.rint(values / scale).astype(np.int16)
        name, names = tensor.name, [f"{tensor.name}.{part}" for part in ("whole", "scale", "float")]
        kept += [numpy_helper.from_array(whole, names[0]), numpy_helper.from_array(scale, names[1])]
        nodes += [
            helper.make_node("Cast", [names[0]], [names[2]], to=TensorProto.FLOAT),
            helper.make_node("Mul", [names[2], names[1]], [name]),
        ]
    nodes += graph.node
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(nodes)
    onnx.save(model, out)


def _html(title: str, model: Model, graphs: Sequence[Mapping[str, Any]], assets: Mapping[str, bytes]) -> bytes:
    """Return the page with `assets` embedded."""
    guidance = None
    if isinstance(model.guidance, GuidanceRange):
        default = float(model.cond([0])[GUIDANCE])
        guidance = {"min": model.guidance.low, "max": model.guidance.high, "value": default}
    facts = {
        "shape": model.shape,
        "classes": model.manifest.classes_shown or model.num_classes,
        "guidance": guidance,
        "graphs": graphs,
        "module": runtime.MODULE,
        "binary": f"{runtime.BINARY}.gz",
        "licences": LICENCES,
        "worker": _text("worker.js"),
    }
    script = f"{_text('noise.js')}\n{_text('page.js')}"
    holder = Markup('<script type="text/plain" data-file="{}">{}</script>\n')
    html = Template(_text("page.html")).substitute(
        title=escape(title),
        # Only "<" can end a script element.
        facts=json.dumps(facts).replace("<", "\\u003c"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        connect="'none'" if assets else "'self'",
        style=files("halfstep.report").joinpath("templates/colours.css").read_text(encoding="utf-8")
        + _text("style.css"),
        assets="".join(holder.format(name, _packed(content)) for name, content in assets.items()),
        licences=LICENCES,
        version=version("halfstep"),
        runtime=runtime.VERSION,
    )
    return html.encode()


def _packed(content: bytes) -> str:
    """Return the content in base64, compressed unless it is already compressed."""
    is_packed = content.startswith(b"\x1f\x8b")
    return base64.b64encode(content if is_packed else gzip.compress(content, mtime=0)).decode()


def _text(name: str) -> str:
    return files("halfstep.hub.web").joinpath(name).read_text(encoding="utf-8")
