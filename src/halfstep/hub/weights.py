"""What may be read of others' folders: safetensors, and no code."""

from pathlib import Path
from typing import Final

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that run code when they are read."""


def check_weights(folder: Path, kind: str) -> None:
    """Passes if a part of a pipeline has its weights as safetensors under the name that is read.

    Args:
        kind: library and class of the part, such as "diffusers.UNet2DModel".

    Raises:
        ValueError: if it has none, only pickled ones, or only those of a variant; saying how to convert them.
    """
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    # A variant stands behind the first dot: model.fp16.safetensors, or model.fp16-00001-of-00002.safetensors.
    if any("." not in name.removesuffix(".safetensors") for name in found):
        return
    if found:
        variant = found[0].split(".")[1].split("-")[0]
        raise ValueError(
            f"{folder} has weights of the variant {variant} alone ({found[0]}): save them without it, for example "
            f'{kind}.from_pretrained(FOLDER, variant="{variant}").save_pretrained(FOLDER)'
        )
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has its weights pickled ({pickled[0]}), which could run code when they are read: convert them "
            f"where you trust them, for example {kind}.from_pretrained(FOLDER).save_pretrained(FOLDER, "
            "safe_serialization=True)"
        )
    raise ValueError(
        f"{folder} has no weights (.safetensors): save the pipeline with them, as {kind}.from_pretrained(SOURCE)"
        ".save_pretrained(FOLDER) does, where you trust what it may have pickled"
    )


def pickled_message(source: str | Path) -> str:
    """What is said of a file of pickled weights in the place of a folder."""
    return (
        f"{source} is pickled and could run code when it is read, so halfstep does not: convert it where you trust it, "
        "for example diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
    )
