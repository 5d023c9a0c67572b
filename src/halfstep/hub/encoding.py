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
from halfstep.hub.quiet import quiet, stock
from halfstep.hub.weights import check_weights
from halfstep.runtime.files import DamagedFile, read_json, sha256_of


def encoder_of(kind: str, folder: Path, device: str | torch.device = "cpu", class_names: Sequence[str] = ()) -> Encoder:
    """The encoder of the latent pipeline of this kind in `folder`.

    The latent of an image is the mean of the VAE's distribution, shifted and scaled as the network takes it.

    Args:
        class_names: of a model of classes, whose captions are these names and become `class_labels`; the empty caption
            becomes the class behind the network's last, which stands for none.

    Raises:
        ValueError: if a part is missing, or the network knows fewer classes.
    """
    known = _classes_of(folder) if class_names else 0
    if known < len(class_names):
        raise ValueError(f"the network in {folder} knows {known} classes, but the images have {len(class_names)}")
    numbers = {name: number for number, name in enumerate(class_names)} | {"": known}
    vae = _vae(folder).to(device)
    shift = float(vae.config.get("shift_factor") or 0.0)
    scale = float(vae.config.scaling_factor)

    @torch.no_grad()
    def images(pixels: Tensor) -> Tensor:
        latents: Tensor = (vae.encode(pixels.to(device)).latent_dist.mode() - shift) * scale
        return latents

    def texts(captions: list[str]) -> dict[str, Tensor]:
        if class_names:
            return {"class_labels": torch.tensor([numbers[name] for name in captions])}
        return text_conditions(folder, captions, device)

    parts = sorted(file for name in ("vae", "text_encoder*", "tokenizer*") for file in folder.glob(f"{name}/*.*"))
    key = " ".join(f"{file.relative_to(folder)}:{sha256_of(file)[:12]}" for file in parts)
    return Encoder(images, texts, f"{kind} {key}")


def _classes_of(folder: Path) -> int:
    config = read_json(folder / "transformer" / "config.json")
    return int(config.get("num_embeds_ada_norm") or 0) if isinstance(config, dict) else 0


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

    if not (folder / "vae").is_dir():
        raise ValueError(f"{folder} has no vae, which makes images of latents and back: save the pipeline with it")
    check_weights(folder / "vae", "diffusers.AutoencoderKL")
    try:
        with quiet():
            return AutoencoderKL.from_pretrained(
                folder / "vae",
                use_safetensors=True,
                local_files_only=True,
                low_cpu_mem_usage=False,
                torch_dtype=torch.float32,
            ).eval()
    except Exception as error:  # whatever diffusers, safetensors or a wrong shape raise
        reason = " ".join(str(error).split())[:200]
        raise DamagedFile(f"{folder / 'vae'} cannot be read as an AutoencoderKL ({reason})") from None


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
        if name.startswith("text_encoder") and index[name][0] is not None:
            check_weights(folder / name, ".".join(index[name]))
    held = {name for name, value in index.items() if name.startswith(("text_encoder", "tokenizer")) and value[0]}
    absent = {name: None for name in kind._get_signature_types() if name not in {*held, "scheduler"}}
    try:
        with quiet():
            pipe = kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **absent
            )
    except Exception as error:  # whatever diffusers, transformers, safetensors or a wrong shape raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the text encoder in {folder} cannot be read ({reason})") from None
    if (config := folder / "transformer" / "config.json").is_file():
        # Stable Diffusion 3 asks its transformer's config how wide the text of a missing encoder would be.
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**read_json(config)))
    return pipe
