"""Reading and checking of pipeline parts on disk; no other module opens their folders.

Only safetensors are read: nothing is unpickled, no code from a folder is run, and no file outside it is opened. A part
is rejected unless its tensors are exactly those of its class; diffusers and transformers would fill missing tensors
with random values.
"""

import hashlib
import importlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.stock import in_one_line, quiet, stock
from halfstep.runtime.files import DamagedFile, check_regular, read_json, sha256_of, user_path
from halfstep.runtime.tensors import check_finite

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that can run code when loaded."""
WRAPPERS: Final = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "ema_model.": "an average of the weights",
    "model.": "a training module",
    "net.": "a training module",
}
"""Prefixes that wrappers add to all tensor names, and the wrapper of each."""
ADAPTER: Final = ".base_layer."
"""Name part that peft inserts for adapted layers."""
AVERAGED: Final = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
"""Config fields that diffusers' `EMAModel` adds."""
OLD_NAMES: Final = {"Transformer2DModel": ("DiTTransformer2DModel", "PixArtTransformer2DModel")}
"""Class names in older files, and the classes that read them today."""


def read_config(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DamagedFile: if it does not contain one.
    """
    data = read_json(file)
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not contain a config")
    return data


def refuse_single_file(source: str) -> None:
    """Raise ValueError if `source` is a single-file checkpoint; the message has the diffusers call that converts it."""
    path = user_path(source)
    convert = f'diffusers\' StableDiffusionPipeline.from_single_file("{path}").save_pretrained("FOLDER")'
    if path.suffix in PICKLED:
        raise ValueError(
            f"{source} is pickled and could run code when loaded, so halfstep does not read it. If you trust it, "
            f"convert it, for example with {convert}"
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{source} is a single-file checkpoint without configs. Convert it with its pipeline's class, for example "
            f"with {convert}, and give that folder"
        )


def check_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the config in `folder` of a network of the diffusers class `name`.

    Raises:
        ValueError: if it is missing, requires custom code, or declares another class.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the pipeline was not saved completely")
    config = read_config(folder / "config.json")
    if "auto_map" in config:
        raise ValueError(f"{folder} requires custom code (auto_map), which halfstep does not run")
    declared = config.get("_class_name")
    if declared != name and name not in OLD_NAMES.get(str(declared), ()):
        raise ValueError(f"{folder} contains a {declared}, but a {name} is needed here")
    return config


def known_fields(config: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Return the config fields that the diffusers class `name` accepts; warn about the others, as diffusers does.

    Fields of `EMAModel`, and disabled fields of an older class, have no effect and are ignored silently.
    """
    takes = set(inspect.signature(stock(name).__init__).parameters)
    config = {field: value for field, value in config.items() if field != "quantization_config"}
    once = {
        field
        for old, new in OLD_NAMES.items()
        if name in new
        for field in inspect.signature(stock(old).__init__).parameters
    }
    foreign = [
        field
        for field, value in config.items()
        if field not in takes | AVERAGED and not field.startswith("_") and not (field in once and not value)
    ]
    if foreign:
        fields = ", ".join(f"{field} = {config[field]!r}" for field in foreign)
        warnings.warn(
            f"{folder}/config.json has fields that {name} in this diffusers version does not support, so they are "
            f"ignored: {fields}. Update diffusers if they matter",
            HalfstepWarning,
            stacklevel=3,
        )
    return {field: value for field, value in config.items() if field in takes}


HALVES: Final = ("fp16", "bf16")
"""Variants that are read if there are no weights without a variant."""


def weights_of(folder: Path) -> list[Path]:
    """Return the safetensors files of a part, sorted by name: without a variant, otherwise in half precision."""
    held = sorted(folder.glob("*.safetensors"))
    variant = variant_of(folder) or ""
    return [file for file in held if _variant(file.name) == variant]


def variant_of(folder: Path) -> str | None:
    """Return the variant of the weights that are read; None if they have none."""
    held = {_variant(file.name) for file in folder.glob("*.safetensors")}
    return None if "" in held else next((variant for variant in HALVES if variant in held), None)


def without_variant(text: str, folder: Path) -> str:
    """Remove the variant from the name of a part's file, or from the text of its index."""
    variant = variant_of(folder)
    return text if variant is None else text.replace(f".{variant}.", ".").replace(f".{variant}-", "-")


def digest_of(folder: Path) -> str:
    """Return the digest of a part's weights, so that a run with different weights in the same folder is detected."""
    digests = [sha256_of(file) for file in weights_of(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _variant(name: str) -> str:
    """Return the variant in a file name: fp16 in model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    _, _, behind = name.removesuffix(".safetensors").partition(".")
    return behind.split("-")[0]


def check_files(folder: Path, kind: str) -> None:
    """Check that a part has safetensors weights with the names that are read, and that no other files would be read.

    Args:
        kind: library and class of the part, such as "diffusers.UNet2DModel".

    Raises:
        ValueError: if it has no weights, only pickled ones, or only a variant other than fp16 and bf16 (the message
            says how to convert them); if an index or config refers to other files; or if the tensors of a shard are
            not those that the index lists.
    """
    _check_indirection(folder)
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if weights_of(folder):
        return
    if found:
        variant = _variant(found[0])
        raise ValueError(
            f"{folder} only has weights of the variant {variant} ({found[0]}): save them without it, for example "
            f'{kind}.from_pretrained(FOLDER, variant="{variant}").save_pretrained(FOLDER)'
        )
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has pickled weights ({pickled[0]}), which could run code when loaded: if you trust them, "
            f"convert them, for example with {kind}.from_pretrained(FOLDER).save_pretrained(FOLDER, "
            "safe_serialization=True)"
        )
    raise ValueError(
        f"{folder} has no weights (.safetensors): save the pipeline with them. If you trust the source, which may be "
        f"pickled, use {kind}.from_pretrained(SOURCE).save_pretrained(FOLDER)"
    )


def _check_indirection(folder: Path) -> None:
    """Reject anything that makes a library read files other than the safetensors in this folder."""
    for file in sorted(folder.glob("*.safetensors")):
        if not file.is_file():
            raise ValueError(f"{file} is not a file. Save the pipeline again")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} contains an adapter (adapter_config.json), which refers to its base weights. Merge it "
            "(model.merge_and_unload()), and save the result"
        )
    config = folder / "config.json"
    for field in ("auto_map", "transformers_weights"):
        if config.is_file() and read_config(config).get(field) is not None:
            raise ValueError(f"{config} refers to other files ({field}), which halfstep does not read. Remove it")
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        listed = read_config(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise DamagedFile(f"{index} lists no tensors (weight_map). Save the pipeline again")
        shards: dict[str, set[str]] = {}
        for tensor, name in listed.items():
            shards.setdefault(str(name), set()).add(tensor)
        # Check all names first, because a name outside the folder is a clearer error than a shard that does not match.
        for name in sorted(shards):
            _check_shard_name(index, name)
        for name, tensors in sorted(shards.items()):
            _check_shard(index, name, tensors)


def _check_shard_name(index: Path, name: str) -> None:
    if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(
            f"{index} lists the shard {name!r}, but only .safetensors files next to it are read. If you trust it, save "
            "the pipeline again with save_pretrained(FOLDER, safe_serialization=True)"
        )
    if not index.with_name(name).is_file():
        raise DamagedFile(f"{index.with_name(name)}, a shard of {index.name}, is missing. Copy the whole folder")


def _check_shard(index: Path, name: str, tensors: set[str]) -> None:
    file = index.with_name(name)
    held = _names_in(file)
    if held != tensors:
        lacks, extra = tensors - held, held - tensors
        what = f"lacks {min(lacks)}" if lacks else f"contains {min(extra)}"
        raise DamagedFile(f"{file} {what}, unlike its index ({index.name}). Save the pipeline again")


def _names_in(file: Path) -> set[str]:
    check_regular(file)
    try:
        with safe_open(file, "pt") as held:
            return set(held.keys())
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file} cannot be read ({in_one_line(error)}). Copy or save it again") from None


def open_part(folder: Path, kind: str) -> Any:
    """Load the network, VAE or text encoder of the class `kind` in `folder`, in float32 on the CPU.

    Its tensors must be exactly those of its class, and finite.

    Args:
        kind: library and class, such as "transformers.CLIPTextModel".

    Raises:
        ValueError: if its files are rejected (see `check_files`), or (DamagedFile) its weights cannot be read, are not
            those of its class, or are not finite; the message gives the first such tensor.
    """
    check_files(folder, kind)
    library, _, name = kind.rpartition(".")
    held = set().union(*map(_names_in, weights_of(folder)))
    with quiet():
        made = getattr(importlib.import_module(library), name, None)
    if made is None:
        raise ValueError(f"{folder} contains a {name}, which this {library} does not support. Update {library}")
    if (quantised := read_config(folder / "config.json").get("quantization_config")) is not None:
        part, missing, unexpected = _opened_quantised(folder, made, quantised)
        _check_names(folder, name, held, missing, unexpected)
        check_finite(part.state_dict(), folder)
        return part
    # Classes that keep some layers in float32 do not support low_cpu_mem_usage=False.
    is_plain = issubclass(made, stock("ModelMixin")) and not made._keep_in_fp32_modules
    options: dict[str, Any] = {"low_cpu_mem_usage": False} if is_plain else {}
    if (variant := variant_of(folder)) is not None:
        options["variant"] = variant
    try:
        with quiet():
            part, facts = made.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # any error of diffusers, transformers, safetensors, or from a wrong shape
        raise DamagedFile(f"{folder} cannot be read as a {name} ({in_one_line(error)})") from None
    if type(part).__name__ != name:
        raise ValueError(f"{folder} contains a {type(part).__name__}, but a {name} is needed here")
    _check_names(folder, name, held, facts["missing_keys"], facts["unexpected_keys"])
    check_finite(part.state_dict(), folder)
    return part


def _opened_quantised(folder: Path, made: Any, told: Mapping[str, Any]) -> tuple[Any, list[str], list[str]]:
    """Return a quantised part, dequantised to float32, and its missing and unexpected tensors.

    Raises:
        ValueError: if it was not quantised by bitsandbytes, or bitsandbytes is not installed.
    """
    method = told.get("quant_method")
    if method != "bitsandbytes":
        raise ValueError(
            f"{folder} is quantised by {method}, but only bitsandbytes is supported. Save it in full precision"
        )
    try:
        state = _dequantised({name: value for file in weights_of(folder) for name, value in load_file(file).items()})
    except ImportError:
        raise ValueError(f"{folder} is quantised by {method}: pip install {method}") from None
    with quiet():
        if issubclass(made, stock("ModelMixin")):
            config = read_config(folder / "config.json")
            del config["quantization_config"]
            part = made.from_config(config).eval()
            missing, unexpected = part.load_state_dict(state, strict=False)
            return part, missing, unexpected
        config = made.config_class.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        part, facts = made.from_pretrained(
            None, config=config, state_dict=state, torch_dtype=torch.float32, output_loading_info=True
        )
        return part.eval(), sorted(facts["missing_keys"]), sorted(facts["unexpected_keys"])


def _dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors that bitsandbytes saved in 8 or 4 bits to float32."""
    from bitsandbytes import functional

    found: dict[str, Tensor] = {}
    for name, value in state.items():
        is_code = value.dtype in (torch.uint8, torch.int8)
        facts = {key: part for key, part in state.items() if is_code and key.startswith(f"{name}.")}
        scale = state.get(f"{name.removesuffix('weight')}SCB")
        if facts:
            quantised = functional.QuantState.from_dict(facts, device=torch.device("cpu"))
            found[name] = functional.dequantize_4bit(value, quantised).float()
        elif value.dtype == torch.int8 and scale is not None:
            found[name] = value.float() * (scale.float().reshape(-1, 1) / 127)
        elif ".weight." not in name and not name.endswith((".SCB", ".weight_format")):
            found[name] = value.float() if value.is_floating_point() else value
    return found


def _check_names(folder: Path, name: str, held: set[str], missing: Iterable[str], unexpected: Iterable[str]) -> None:
    missing, unexpected = sorted(missing), sorted(unexpected)
    if not missing and not unexpected:
        return
    facts = [
        f"{what} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for what, names in (("no tensor", missing), ("no place for", unexpected))
        if names
    ]
    wrapper = next((prefix for prefix in WRAPPERS if held and all(one.startswith(prefix) for one in held)), None)
    remedy = f"Save the {name} again with save_pretrained, or copy the whole folder"
    if wrapper is not None:
        # The command reads all bytes first, because load_file would map the file that it overwrites.
        remedy = f"All names start with {wrapper!r}, which {WRAPPERS[wrapper]} adds. Save the module inside it" + (
            ""
            if any(folder.glob("*.index.json"))
            else ', or rename the tensors by running in that folder: python -c "import glob, safetensors.torch as s; '
            f"[s.save_file({{k.removeprefix('{wrapper}'): v for k, v in s.load(open(f, 'rb').read()).items()}}, f, "
            "{'format': 'pt'}) for f in glob.glob('*.safetensors')]\""
        )
    elif any(ADAPTER in one for one in held):
        remedy = (
            f"The weights contain an adapter (names with {ADAPTER[1:-1]}): merge it before saving, with "
            "pipe.fuse_lora() and pipe.unload_lora_weights(), or model.merge_and_unload()"
        )
    raise DamagedFile(f"{folder} has {' and '.join(facts)} as a {name}. {remedy}")


def open_pipeline(folder: Path, kind: str, parts: Mapping[str, Any]) -> Any:
    """Load the pipeline `kind` in `folder` with these parts, opened by `open_part` or None if absent; all others have
    no weights.

    Raises:
        DamagedFile: if it cannot be read.
    """
    try:
        with quiet():
            return stock(kind).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **parts
            )
    except Exception as error:  # any error of diffusers and transformers
        raise DamagedFile(f"the pipeline in {folder} cannot be read ({in_one_line(error)})") from None


def plain_network(folder: Path) -> Path | None:
    """Return the folder of a network saved without a pipeline: `folder` itself, its unet or its transformer."""
    places = [place for name in ("unet", "transformer") for place in (folder / name, folder / f"{name}_ema")]
    return next((place for place in (folder, *places) if (place / "config.json").is_file()), None)


def averaged_beside(network: Path) -> Path | None:
    """Return the folder of averaged weights (EMA) next to a network's folder, or None."""
    place = network.with_name(f"{network.name}_ema")
    return place if (place / "config.json").is_file() else None


def scheduler_beside(folder: Path, network: Path) -> Path | None:
    """Return the scheduler config for a network without a pipeline, in `folder` or next to the network."""
    places = (folder / "scheduler", folder, network, network.parent / "scheduler", network.parent)
    return next((file for place in places if (file := place / "scheduler_config.json").is_file()), None)


def networks_below(folder: Path) -> list[Path]:
    """Return the direct sub-folders with a pipeline or a network, such as checkpoint-500, the latest last."""
    below = [place for place in folder.iterdir() if place.is_dir()] if folder.is_dir() else []
    found = [p for p in below if (p / "model_index.json").is_file() or plain_network(p) is not None]
    return sorted(found, key=lambda place: (place.stat().st_mtime, place.name))
