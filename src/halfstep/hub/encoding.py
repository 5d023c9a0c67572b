"""A pipeline's encoders and decoder as callables: images to latents and back, and texts to conditions."""

import inspect
import json
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from halfstep.data import Encoder
from halfstep.hub.autoencoder import Autoencoder, autoencoder_in
from halfstep.hub.calls import call_in, conditions_in
from halfstep.hub.disk import open_part, read_config, read_files
from halfstep.hub.pipelines import fetch_pipeline, load_pipeline
from halfstep.hub.recording import GUIDANCES
from halfstep.hub.stock import check_transformers
from halfstep.hub.trace import first_arguments, prompted
from halfstep.models.model import Model
from halfstep.runs import Manifest, Pipeline
from halfstep.runtime.files import rounded_digest, sha256_of

TEXT_PARTS: Final = ("text_encoder*", "tokenizer*", "projection_model*")
"""The folders of the parts that encode texts."""


def autoencoder_of(model: Model, device: str | torch.device = "cpu") -> Autoencoder:
    """Return the VAE of an imported model's pipeline, along with the mapping between latents and the network's samples.

    Raises:
        ValueError: if the pipeline has no VAE, or if its VAE does not encode to the network's samples.
    """
    pipeline = _pipeline_of(model.manifest)
    folder, device = fetch_pipeline(pipeline), torch.device(device)
    if model.num_classes:
        pipe = load_pipeline(folder, pipeline.kind, device, is_whole=False)
    else:
        pipe = _text_pipeline(folder, pipeline.kind, device)
    return autoencoder_in(pipe, folder, model.shape, device, _unguided(pipe, pipeline))


def encoder_of(
    model: Model, autoencoder: Autoencoder, device: str | torch.device = "cpu", class_names: Sequence[str] = ()
) -> Encoder:
    """Return the encoder of an imported model's pipeline.

    Args:
        class_names: the captions of a class-conditional model, which are encoded as `class_labels`. The empty caption
            is encoded as the null class, whose index is one past the network's last class.

    Raises:
        ValueError: if a part is missing, or if the network has fewer classes than `class_names`.
    """
    manifest, pipeline = model.manifest, _pipeline_of(model.manifest)
    folder = fetch_pipeline(pipeline)
    if manifest.num_classes < len(class_names):
        raise ValueError(
            f"the network in {folder} has {manifest.num_classes} classes, but the images have {len(class_names)}"
        )
    numbers = {name: number for number, name in enumerate(class_names)} | {"": manifest.num_classes}

    def texts(captions: list[str]) -> dict[str, Tensor]:
        if class_names:
            return {"class_labels": torch.tensor([numbers[name] for name in captions])}
        return text_conditions(manifest, captions, device=device)

    options = json.dumps(pipeline.options, sort_keys=True)
    key = f"{pipeline.kind} {_hashes(folder, 'vae', *TEXT_PARTS)} {options}"
    null = model.null or None
    if pipeline.end is None:
        return Encoder(autoencoder.encode, texts, key, null)
    return Encoder(autoencoder.encode, texts, key, null, partial(text_conditions, manifest, device=device))


def prompts_of(model: Model, device: str | torch.device = "cpu") -> Encoder:
    """Return the text-only encoder of an imported model's pipeline, whose key also identifies the model.

    Raises:
        ValueError: if the pipeline is missing or, when the encoder is called, if a text encoder is missing.
    """
    manifest, pipeline = model.manifest, _pipeline_of(model.manifest)

    def texts(captions: list[str]) -> dict[str, Tensor]:
        return text_conditions(manifest, captions, device=device)

    def images(pixels: Tensor) -> Tensor:
        raise NotImplementedError("a text-only encoder cannot encode images")

    # The source identifies only the weights of the imported network.
    identity = [manifest.network, manifest.process, manifest.prediction, manifest.clip, manifest.files]
    facts = rounded_digest(identity, 12)
    options = json.dumps(pipeline.options, sort_keys=True)
    key = f"{pipeline.kind} {manifest.source} {facts} {_hashes(fetch_pipeline(pipeline), *TEXT_PARTS)} {options}"
    return Encoder(images, texts, key, model.null or None)


def _hashes(folder: Path, *parts: str) -> str:
    """Return the files of a pipeline's parts with their hashes, without weights that are not read."""
    files = sorted(file for part in parts for place in folder.glob(part) for file in read_files(place))
    return " ".join(f"{file.relative_to(folder)}:{sha256_of(file)[:12]}" for file in files)


def _pipeline_of(manifest: Manifest) -> Pipeline:
    if manifest.pipeline is None:
        raise ValueError(f"the pipeline of {manifest.stage} is unknown: import the model from its pipeline")
    return manifest.pipeline


def _vae(folder: Path, device: str | torch.device) -> tuple[Any, float, float]:
    """Return a pipeline's VAE, along with the shift and scale of its latents."""
    place, kind = folder / "vae", "AutoencoderKL"
    if not place.is_dir():
        raise ValueError(
            f"{folder} has no vae, which is needed to encode and decode images. Save the pipeline with its VAE"
        )
    declared = read_config(place / "config.json").get("_class_name", kind)
    if declared != kind:
        raise ValueError(
            f"{place} contains the class {declared}, which halfstep cannot decode. Write a .npz file, or export the "
            "student"
        )
    vae = open_part(place, f"diffusers.{kind}").eval().to(device)
    return vae, float(vae.config.get("shift_factor") or 0.0), float(vae.config.scaling_factor)


@torch.no_grad()
def text_conditions(
    manifest: Manifest,
    captions: Sequence[str],
    ends: Sequence[float] | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """Compute the captions' conditions with the model's pipeline, and return them by name, each `[len(captions), ...]`.

    Args:
        ends: the end time of each sound in seconds. By default, all sounds end at the time set in the pipeline's call.

    Raises:
        ValueError: if the package transformers or a text encoder is missing, or if `ends` is passed for a pipeline
            whose samples must all end at the same time.
    """
    pipeline = _pipeline_of(manifest)
    pipe = _text_pipeline(fetch_pipeline(pipeline), pipeline.kind, torch.device(device))
    call, unguided = call_in(manifest), _unguided(pipe, pipeline)
    if ends is None:
        return conditions_in(call, first_arguments(pipe, **prompted(pipe, captions), **unguided), len(captions))
    if pipeline.end is None:
        raise ValueError(f"{pipeline.kind} does not accept an end time for each sample. Remove ends")
    rows: dict[int, dict[str, Tensor]] = {}
    for end in dict.fromkeys(ends):
        # The pipeline takes one end time per call.
        places = [place for place, other in enumerate(ends) if other == end]
        given = prompted(pipe, [captions[place] for place in places]) | unguided | {pipeline.end: end}
        found = conditions_in(call, first_arguments(pipe, **given), len(places))
        rows |= {place: {name: value[row] for name, value in found.items()} for row, place in enumerate(places)}
    return {name: torch.stack([rows[place][name] for place in range(len(captions))]) for name in rows[0]}


def _unguided(pipe: Any, pipeline: Pipeline) -> dict[str, Any]:
    """Return the arguments of a pipeline call without guidance, except the prompts."""
    taken = inspect.signature(type(pipe).__call__).parameters
    call = {name: 1.0 for name in GUIDANCES if name in taken} | pipeline.options
    return call | ({} if pipeline.guidance is None or pipeline.off is None else {pipeline.guidance: pipeline.off})


def release_texts() -> None:
    """Free the text encoders that `text_conditions` caches between calls."""
    _text_pipeline.cache_clear()


@lru_cache(maxsize=1)
def _text_pipeline(folder: Path, kind: str, device: torch.device) -> Any:
    """Load and cache a pipeline without the weights of its denoiser and VAE."""
    check_transformers("a text-conditioned model")
    return load_pipeline(folder, kind, device, is_whole=False)


def decoder_of(manifest: Manifest, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """Return a function that decodes latents `[n, c, h, w]` to images `[n, 3, H, W]` in [-1, 1] with the model's VAE.

    Raises:
        ValueError: if the pipeline has no VAE, or if the VAE is not an `AutoencoderKL`.
    """
    vae, shift, scale = _vae(fetch_pipeline(_pipeline_of(manifest)), device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.to(device) / scale + shift).sample.clamp(-1, 1)

    return decode
