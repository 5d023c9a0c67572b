"""`halfstep sample`: draws samples from a model and writes them to an image grid, an array file or a folder."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import tyro
from PIL import Image
from pydantic import Field
from pydantic.dataclasses import dataclass

from halfstep.cli.arguments import device_of, processes_of
from halfstep.cli.usage import Count, Guidance, Share, Steps, Switch, UsageError, parse
from halfstep.cli.words import Screen, print_json
from halfstep.hub import decoder_of, release_texts, text_conditions
from halfstep.measure.samples import MOST_CHANNELS, grid_image, samples_array, write_png
from halfstep.models.folder import load
from halfstep.models.model import Model, samples_at_once
from halfstep.report.words import count
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.files import refuse_file, refuse_taken, replacing_folder, write_arrays
from halfstep.samplers import Ancestral, Sampler, samplers

if TYPE_CHECKING:
    SamplerName = str
else:
    SamplerName = tyro.extras.literal_type_from_choices(samplers)


@dataclass
class SampleArguments:
    """Draw samples from a model with any number of steps. The seeds of the samples are --seed, --seed + 1, and so on.
    Each sample depends only on its seed, not on the batch. A given seed yields the same noise for all models and all
    numbers of steps.
    """

    model: tyro.conf.Positional[Path]
    """Folder of a stage or run. For a run, the last stage is used."""
    num_steps: Steps | None = None
    """Number of sampler steps; by default, the number of steps that the student was distilled for."""
    num_samples: Count = 64
    """Number of samples to draw."""
    seed: Annotated[int, Field(ge=0, le=2**62)] = 0
    """Seed of the first sample."""
    class_label: Annotated[int, Field(ge=0, le=2**31)] | None = None
    """Class of all samples; by default, the samples cycle through all classes."""
    guidance_scale: Guidance | None = None
    """Scale in uncond + scale (cond - uncond), for models that support guidance; by default, the model's own scale. A
    scale of 1 disables guidance."""
    prompt: str | None = None
    """Prompt for a text-conditioned model."""
    sampler: SamplerName | None = None
    """Sampler (see `halfstep ls samplers`); by default, the model's own sampler."""
    gamma: Share | None = None
    """Variance of ancestral sampling, from the lower bound (0) to the upper bound (1, the default)."""
    batch_size: Count | None = None
    """Number of samples drawn at once; by default, as many as fit in memory."""
    precision: Literal["float32", "bf16"] = "float32"
    """Precision of the network (bf16 is bfloat16)."""
    device: str | None = None
    """cpu or cuda; by default, cuda if it is available, otherwise cpu."""
    out: Path = Path("samples.png")
    """A .png file (one grid, in which small images are enlarged), a .npz file (arr_0, uint8 [n, h, w, c]), or a folder
    of .png files."""
    overwrite: Switch = False
    """Replace --out if it already exists; in a folder, replace only the samples (such as 000012.png)."""
    json: Switch = False
    """Print a description of the samples as one JSON document."""


def sample(argv: Sequence[str]) -> None:
    arguments = parse(SampleArguments, argv, "halfstep sample")
    out = arguments.out
    as_file = out.suffix.lower() in (".png", ".npz")
    if out.suffix and not as_file:
        raise UsageError(
            f"--out {out} is not in a supported format. Choose a .png file, a .npz file, or a folder (a name without a "
            "suffix)"
        )
    if arguments.overwrite:
        refuse_file(out.parent if as_file else out)
    else:
        refuse_taken(out, as_file, "choose another --out, or add --overwrite")
    processes = processes_of(arguments.device == "cpu")
    model = load(arguments.model, device_of(arguments.device, processes))
    check_writable(model, out)
    # Sampling can take long, so a missing decoder is reported first.
    decode = decoder_for(model, out) if processes.is_main else None
    method = _sampler(arguments.sampler, arguments.gamma, model.sampler)
    seeds = range(arguments.seed, arguments.seed + arguments.num_samples)
    cond = _prompted(model, arguments.prompt, len(seeds))
    # In a single process, the model finds a batch size that fits in memory. Several processes use the size that the
    # model would try first, because on a GPU the batch size affects the least significant bits of the samples.
    share = len(seeds) if processes.count == 1 else arguments.batch_size or samples_at_once(model.device)

    def drawn(first: int) -> tuple[torch.Tensor]:
        part = seeds[first : first + share]
        x0 = model.sample(
            part,
            arguments.num_steps,
            method,
            arguments.class_label,
            arguments.batch_size,
            arguments.guidance_scale,
            {name: value[: len(part)] for name, value in cond.items()},
            arguments.precision,
        )
        return (x0,)

    started = time.perf_counter()
    parts = processes.spread(range(0, len(seeds), share), drawn)
    if parts is None:
        return
    x0 = torch.cat([part for (part,) in parts])
    if bad := int((~x0.isfinite()).flatten(1).any(1).sum()):
        raise NonFinite(
            f"{bad} of {len(x0)} samples are not finite, so {out} was not written. Choose another stage, sampler or "
            "number of steps"
        )
    seconds = time.perf_counter() - started
    write_samples(x0, model, seeds, out, decode)
    steps = model.check_steps(arguments.num_steps)
    if arguments.json:
        print_json(
            {
                "out": str(out),
                "model": model.manifest.stage,
                "num_samples": arguments.num_samples,
                "first_seed": arguments.seed,
                "shape": list(model.shape),
                "num_steps": steps,
                "sampler": samplers.name_of(method),
                "num_evals": model.num_evals(method, steps, arguments.guidance_scale),
                "seconds": round(seconds, 3),
            }
        )
        return
    Screen().say(f"{count(arguments.num_samples, 'sample')} in {count(steps, 'step')}: {out}")


def _sampler(name: str | None, gamma: float | None, own: Sampler) -> Sampler:
    """Return the named sampler or, by default, the model's own sampler. Reject a gamma that would have no effect."""
    name = name or samplers.name_of(own)
    kind = samplers[name]
    if gamma is None:
        return own if kind is type(own) else kind()
    if kind is not Ancestral:
        raise UsageError(f"--gamma {gamma} has no effect on the sampler {name}. Remove it, or add --sampler ancestral")
    return Ancestral(gamma)


def _prompted(model: Model, prompt: str | None, number: int) -> dict[str, torch.Tensor]:
    """Return the conditions for a prompt, repeated for `number` samples. For a model that is not text-conditioned, the
    result is empty.
    """
    manifest = model.manifest
    if not manifest.conditions:
        if prompt is not None:
            raise UsageError("--prompt has no effect: this model is not text-conditioned. Remove it")
        return {}
    if prompt is None or manifest.pipeline is None:
        raise UsageError(
            f"this model is conditioned on {', '.join(manifest.conditions)}, so it needs a prompt. Add --prompt TEXT"
        )
    shown = text_conditions(manifest, [prompt])
    release_texts()
    return {name: value.expand(number, *value.shape[1:]) for name, value in shown.items()}


def check_writable(model: Model, out: Path) -> None:
    """Raise UsageError if the model's samples are not images and `out` is not a .npz file, or if their channels do not
    fit into the .png files of a folder."""
    if out.suffix.lower() == ".npz":
        return
    if not model.manifest.is_image and (model.manifest.pipeline is None or len(model.shape) != 3):
        raise UsageError(f"samples of shape {list(model.shape)} are not images. Write a .npz file")
    if model.manifest.is_image and model.shape[0] > MOST_CHANNELS and not out.suffix:
        raise UsageError(f"samples with {model.shape[0]} channels cannot be saved as .png files. Write a .npz file")


def decoder_for(model: Model, out: Path) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the decoder of a model's latents, or None if `out` needs no decoded images.

    Raises:
        ValueError: if the decoder is missing or not supported.
    """
    return None if model.manifest.is_image or out.suffix.lower() == ".npz" else decoder_of(model.manifest, model.device)


def write_samples(
    x0: torch.Tensor,
    model: Model,
    seeds: range,
    out: Path,
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Write samples of shape `[n, *shape]` in the format given by the suffix of `out` (see `check_writable`).

    Args:
        decode: the result of `decoder_for`.
    """
    if out.suffix.lower() == ".npz":
        write_arrays(out, arr_0=samples_array(x0, model.manifest.is_image))
        return
    if decode is not None:
        x0 = torch.cat([decode(part).cpu() for part in x0.split(1 if model.device.type == "cuda" else 8)])
    pixels = samples_array(x0, is_image=True)
    if out.suffix.lower() == ".png":
        write_png(out, grid_image(pixels))
        return
    # Existing files in the folder are kept, except the samples of an earlier call.
    with nullcontext(out) if out.exists() else replacing_folder(out) as folder:
        for seed, picture in zip(seeds, pixels, strict=True):
            image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
            write_png(folder / _sample_name(seed), image)
    for path in out.iterdir():
        number = int(path.stem) if path.stem.isdecimal() else -1
        if number not in seeds and path.name == _sample_name(number) and path.is_file():
            path.unlink()


def _sample_name(seed: int) -> str:
    return f"{seed:06d}.png"
