"""diffusers' classes and the files of its pipelines, read quietly: safetensors, and no code of others."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from halfstep.runtime.files import DamagedFile

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that run code when they are read."""


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of diffusers and transformers, which are for those who call them."""
    from diffusers.utils import logging

    libraries = [logging]
    with suppress(ImportError):
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def stock(name: str, *default: Any) -> Any:
    """Return the class of diffusers with that name, imported quietly, or the default."""
    import diffusers

    with quiet():
        return getattr(diffusers, name, *default)


def load_stock(name: str, folder: Path, failure: str, **options: Any) -> Any:
    """Load the network or pipeline of the class `name` in `folder`, in float32.

    Raises:
        DamagedFile: if it cannot be read; its message is `failure` and the reason.
    """
    kind = stock(name)
    try:
        with quiet():
            return kind.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **options
            )
    except Exception as error:  # whatever diffusers, transformers, safetensors or a wrong shape raise
        raise DamagedFile(f"{failure} ({in_one_line(error)})") from None


def in_one_line(error: BaseException) -> str:
    """Return the start of an error's text without line breaks, for a message of ours."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_weights(folder: Path, kind: str) -> None:
    """Pass if a part of a pipeline has its weights as safetensors under the name that is read.

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
