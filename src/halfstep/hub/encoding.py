"""A pipeline's own VAE and text encoders as callables: images to latents and back, texts to conditions."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from halfstep.data import Encoder
from halfstep.hub.disk import open_part, open_pipeline
from halfstep.hub.stock import stock
from halfstep.runtime.files import read_json, sha256_of


def encoder_of(kind: str, folder: Path, device: str | torch.device = "cpu", class_names: Sequence[str] = ()) -> Encoder:
    """Return the encoder of the latent pipeline of this kind in `folder`.

    The latent of an image is the mean of the VAE's distribution, shifted and scaled as the network takes it.

    Args:
        class_names: of a model of classes, whose captions are these names and become `class_labels`; the empty caption
            becomes the class behind the network's last, which stands for none.

    Raises:
        ValueError: if a part is missing, or the network has fewer classes.
    """
    config = read_json(folder / "transformer" / "config.json") if class_names else None
    known = int(config.get("num_embeds_ada_norm") or 0) if isinstance(config, dict) else 0
    if known < len(class_names):
        raise ValueError(f"the network in {folder} knows {known} classes, but the images have {len(class_names)}")
    numbers = {name: number for number, name in enumerate(class_names)} | {"": known}
    vae, shift, scale = _vae(folder, device)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        return (vae.encode(pixels.to(device)).latent_dist.mode() - shift) * scale

    def texts(captions: list[str]) -> dict[str, Tensor]:
        if class_names:
            return {"class_labels": torch.tensor([numbers[name] for name in captions])}
        return text_conditions(folder, captions, device)

    parts = sorted(file for name in ("vae", "text_encoder*", "tokenizer*") for file in folder.glob(f"{name}/*.*"))
    key = " ".join(f"{file.relative_to(folder)}:{sha256_of(file)[:12]}" for file in parts)
    return Encoder(images, texts, f"{kind} {key}")


def decoder_of(folder: Path, device: str | torch.device = "cpu") -> Callable[[Tensor], Tensor]:
    """Return the map from latents `[n, c, h, w]` to images `[n, 3, H, W]` in [-1, 1] by the pipeline's VAE.

    Raises:
        ValueError: if it has none.
    """
    vae, shift, scale = _vae(folder, device)

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        return vae.decode(latents.to(device) / scale + shift).sample.clamp(-1, 1)

    return decode


def _vae(folder: Path, device: str | torch.device) -> tuple[Any, float, float]:
    """The VAE of a pipeline, the shift and the scale of its latents."""
    place, kind = folder / "vae", "AutoencoderKL"
    if not place.is_dir():
        raise ValueError(f"{folder} has no vae, which makes images of latents and back: save the pipeline with it")
    vae = open_part(place, f"diffusers.{kind}").eval().to(device)
    return vae, float(vae.config.get("shift_factor") or 0.0), float(vae.config.scaling_factor)


@torch.no_grad()
def text_conditions(folder: Path, captions: list[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """Return the conditions of captions by name, each `[len(captions), ...]`, as the pipeline in `folder` makes them.

    Raises:
        ValueError: if the package transformers or a text encoder is missing.
    """
    pipe = _text_pipeline(folder).to(device)
    # One for each text encoder.
    prompts = ("prompt", "prompt_2", "prompt_3") if hasattr(pipe, "text_encoder_3") else ("prompt",)
    shown = pipe.encode_prompt(
        **dict.fromkeys(prompts, captions),
        device=torch.device(device),
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    conditions = {"encoder_hidden_states": shown[0]}
    return conditions | {"pooled_projections": shown[2]} if len(shown) == 4 else conditions


def release_texts() -> None:
    """Free the text encoders that `text_conditions` keeps from call to call."""
    _text_pipeline.cache_clear()


@lru_cache(maxsize=1)
def _text_pipeline(folder: Path) -> Any:
    """The pipeline with its tokenizers and text encoders alone."""
    if find_spec("transformers") is None:
        raise ValueError("a model of texts needs the package transformers: pip install 'halfstep[text]'")
    index = read_json(folder / "model_index.json")
    kind = index["_class_name"]
    held = {name for name, value in index.items() if name.startswith(("text_encoder", "tokenizer")) and value[0]}
    parts: dict[str, Any] = dict.fromkeys(set(stock(kind)._get_signature_types()) - held - {"scheduler"})
    for name in sorted(held):
        if name.startswith("text_encoder"):
            parts[name] = open_part(folder / name, ".".join(index[name]))
    pipe = open_pipeline(folder, kind, parts)
    if (config := folder / "transformer" / "config.json").is_file():
        # Stable Diffusion 3 asks its transformer's config how wide the text of a missing encoder would be.
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**read_json(config)))
    return pipe
