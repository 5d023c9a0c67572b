"""A pipeline's own VAE and text encoders as callables: images to latents and back, texts to conditions."""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from halfstep.data import Encoder
from halfstep.hub.quiet import quiet, stock
from halfstep.runs import Pipeline, read_json, sha256_of


def encoder_of(pipeline: Pipeline, folder: Path, device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a latent pipeline in `folder`.

    The latent of an image is the mean of the VAE's distribution, shifted and scaled as the network takes it.

    Raises:
        ValueError: if a part is missing.
    """
    vae = _vae(folder).to(device)
    shift = float(vae.config.get("shift_factor") or 0.0)
    scale = float(vae.config.scaling_factor)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        latents: Tensor = (vae.encode(pixels.to(device)).latent_dist.mode() - shift) * scale
        return latents

    def texts(captions: list[str]) -> dict[str, Tensor]:
        return text_conditions(folder, captions, device)

    parts = sorted(file for name in ("vae", "text_encoder*", "tokenizer*") for file in folder.glob(f"{name}/*.*"))
    key = " ".join(f"{file.relative_to(folder)}:{sha256_of(file)[:12]}" for file in parts)
    return Encoder(images, texts, f"{pipeline.kind} {key}")


def decoder_of(folder: Path, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """From latents `[n, c, h, w]` to images `[n, 3, H, W]` in [-1, 1], by the VAE of the pipeline in `folder`.

    Raises:
        ValueError: if it has none.
    """
    vae = _vae(folder).to(device)
    shift = float(vae.config.get("shift_factor") or 0.0)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        pixels: Tensor = vae.decode(latents.to(device) / float(vae.config.scaling_factor) + shift).sample
        return pixels.clamp(-1, 1)

    return decode


def _vae(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    if not list((folder / "vae").glob("*.safetensors")):
        raise ValueError(f"{folder} has no vae with .safetensors: save the pipeline with it")
    with quiet():
        return AutoencoderKL.from_pretrained(
            folder / "vae", use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False
        ).eval()


@torch.no_grad()
def text_conditions(folder: Path, captions: list[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The conditions of captions by name, each `[len(captions), ...]`, as the pipeline in `folder` makes them.

    Raises:
        ValueError: if the package transformers or a text encoder is missing.
    """
    pipe = _text_pipeline(folder).to(device)
    shown = pipe.encode_prompt(
        **dict.fromkeys(_prompts(pipe), captions),
        device=torch.device(device),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    if len(shown) == 4:
        return {"encoder_hidden_states": shown[0], "pooled_projections": shown[2]}
    return {"encoder_hidden_states": shown[0]}


def _prompts(pipe: Any) -> tuple[str, ...]:
    """Names of the arguments of `encode_prompt` that take the texts: one for each text encoder of the pipeline."""
    return ("prompt", "prompt_2", "prompt_3") if hasattr(pipe, "text_encoder_3") else ("prompt",)


def release_texts() -> None:
    """Lets go of the text encoders that `text_conditions` keeps from call to call."""
    _text_pipeline.cache_clear()


@lru_cache(maxsize=1)
def _text_pipeline(folder: Path) -> Any:
    """The pipeline with its tokenizers and text encoders alone."""
    if find_spec("transformers") is None:
        raise ValueError("a model of texts needs the package transformers: pip install 'halfstep[text]'")
    index = read_json(folder / "model_index.json")
    kind = stock(index["_class_name"])
    for name in index:
        part = folder / name
        if name.startswith("text_encoder") and index[name][0] is not None and not list(part.glob("*.safetensors")):
            raise ValueError(f"{part} has no weights (.safetensors): save the pipeline with them")
    held = {name for name, value in index.items() if name.startswith(("text_encoder", "tokenizer")) and value[0]}
    absent = {name: None for name in kind._get_signature_types() if name not in {*held, "scheduler"}}
    try:
        with quiet():
            pipe = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **absent)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the text encoder in {folder} cannot be read ({reason})") from None
    if (config := folder / "transformer" / "config.json").is_file():
        # Stable Diffusion 3 asks its transformer's config how wide the text of a missing encoder would be.
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**read_json(config)))
    return pipe
