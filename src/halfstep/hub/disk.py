"""Load and check the parts of a pipeline on disk. No other module opens their folders.

Only safetensors files are read: nothing is unpickled, no code in a folder is run, and no file outside the folder is
opened. A part's tensors must exactly match its class, because diffusers and transformers initialise missing tensors
randomly.
"""

import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from halfstep.hub.stock import fields_of, in_one_line, quiet, stock, warn_of_fields
from halfstep.runtime.files import DamagedFile, check_regular, read_json, sha256_of, user_path
from halfstep.runtime.tensors import check_finite

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of files that can run code when loaded."""
WRAPPERS: Final = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "ema_model.": "an average of the weights",
    "model.": "a training module",
    "net.": "a training module",
}
"""Prefixes of tensor names, with the wrapper that adds each prefix to all names."""
ADAPTER: Final = ".base_layer."
"""The string that peft inserts into layer names."""
AVERAGED: Final = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
    "quantization_config",
}  # fmt: skip
"""Config fields added by diffusers' `EMAModel` and by quantisation."""
OLD_NAMES: Final = {"Transformer2DModel": ("DiTTransformer2DModel", "PixArtTransformer2DModel")}
"""Class names in older files, mapped to the current classes."""
HALVES: Final = ("fp16", "bf16")
"""Variants to read, in order of preference, if a part has no weights without a variant."""


def read_config(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DamagedFile: if the file does not contain a JSON object.
    """
    data = read_json(file)
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not contain a config")
    return data


def refuse_single_file(source: str) -> None:
    """Raise ValueError if `source` is a single-file checkpoint. The message contains a command that converts it."""
    path = user_path(source)
    convert = f'diffusers\' StableDiffusionPipeline.from_single_file("{path}").save_pretrained("FOLDER")'
    if path.suffix in PICKLED:
        raise ValueError(f"{source} is pickled and could run code. If you trust it, convert it, for example: {convert}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{source} is a single file. Convert it with its pipeline's class, for example: {convert}")


def check_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the config of the diffusers network `name` in `folder`.

    Raises:
        ValueError: if the config is missing or declares a different class.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the pipeline was not saved completely")
    config = read_config(folder / "config.json")
    declared = config.get("_class_name")
    if declared != name and name not in OLD_NAMES.get(str(declared), ()):
        raise ValueError(f"{folder} contains the class {declared}, but {name} is needed here")
    return config


def known_fields(config: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Return the config fields that the diffusers class `name` accepts, as JSON data, and warn about other fields.

    Fields of `EMAModel` and disabled fields of an older class have no effect and are silently ignored.
    """
    takes = fields_of(name)
    once = set().union(*(fields_of(old) for old, new in OLD_NAMES.items() if name in new))
    foreign = [
        field
        for field, value in config.items()
        if field not in takes | AVERAGED and not field.startswith("_") and not (field in once and not value)
    ]
    warn_of_fields(f"{folder}/config.json", config, foreign)
    known: dict[str, Any] = json.loads(json.dumps({field: config[field] for field in config if field in takes}))
    return known


def weights_of(folder: Path) -> list[Path]:
    """Return a part's safetensors files, sorted by name: half-precision files only if no others exist."""
    variant = variant_of(folder) or ""
    return [file for file in sorted(folder.glob("[!.]*.safetensors")) if _variant(file.name) == variant]


def unused_indices(folder: Path) -> list[Path]:
    """Return a part's indices of shards that are not read: pickled shards, and those of other variants."""
    read = {file.name for file in weights_of(folder)}
    others = [
        file
        for file in folder.glob("[!.]*.safetensors.index*.json")
        if not read.issuperset(read_config(file).get("weight_map", {}).values())
    ]
    return [*folder.glob("[!.]*.bin.index*.json"), *others]


def read_files(folder: Path) -> list[Path]:
    """Return the files that a part is loaded from, such as weights (see `weights_of`), configs and vocabularies."""
    unread = {*folder.glob("[!.]*.safetensors"), *unused_indices(folder)} - {*weights_of(folder)}
    return [file for file in folder.glob("[!.]*.*") if file not in unread and file.suffix not in PICKLED]


def variant_of(folder: Path) -> str | None:
    """Return the variant to read, or None to read files without a variant."""
    held = {_variant(file.name) for file in folder.glob("[!.]*.safetensors")}
    return None if "" in held else next((variant for variant in HALVES if variant in held), None)


def without_variant(text: str, folder: Path) -> str:
    """Remove the variant from a file name or from the text of an index."""
    variant = variant_of(folder)
    return text if variant is None else text.replace(f".{variant}.", ".").replace(f".{variant}-", "-")


def digest_of(folder: Path) -> str:
    """Return a digest that identifies a part's weights."""
    digests = [sha256_of(file) for file in weights_of(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _variant(name: str) -> str:
    """Return a file name's variant, such as fp16 in model.fp16.safetensors or model.fp16-00001-of-00002.safetensors."""
    _, _, behind = name.removesuffix(".safetensors").partition(".")
    return behind.split("-")[0]


def check_files(folder: Path, kind: str) -> None:
    """Check that a part has readable safetensors weights and does not refer to other files.

    Args:
        kind: library and class of the part, such as "diffusers.UNet2DModel".

    Raises:
        ValueError: if the part has no weights, or only weights that must be converted first (the message explains how);
            if an index or a config refers to other files; or if a shard's tensors differ from those in the index.
    """
    _check_indirection(folder)
    found = sorted(file.name for file in folder.glob("[!.]*.safetensors"))
    if weights_of(folder):
        return
    if found:
        variant = _variant(found[0])
        raise ValueError(
            f"{folder} has only weights of the variant {variant} ({found[0]}): save them without a variant, for "
            f'example: {kind}.from_pretrained(FOLDER, variant="{variant}").save_pretrained(FOLDER)'
        )
    pickled = sorted(file.name for file in folder.glob("[!.]*") if file.suffix in PICKLED)
    if pickled:
        raise ValueError(
            f"{folder} has pickled weights ({pickled[0]}), which could run code. If you trust them, convert them: "
            f"{kind}.from_pretrained(FOLDER).save_pretrained(FOLDER, safe_serialization=True)"
        )
    raise ValueError(
        f"{folder} has no weights (.safetensors): save the pipeline with its weights. If you trust the source, which "
        f"may be pickled, use {kind}.from_pretrained(SOURCE).save_pretrained(FOLDER)"
    )


def _check_indirection(folder: Path) -> None:
    """Reject anything that makes a library read files other than the safetensors files in this folder."""
    for file in sorted(folder.glob("[!.]*.safetensors")):
        if not file.is_file():
            raise ValueError(f"{file} is not a regular file. Save the pipeline again")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} contains an adapter (adapter_config.json), which needs its base weights. Merge the "
            "adapter (model.merge_and_unload()) and save the result"
        )
    config = folder / "config.json"
    for field in ("auto_map", "transformers_weights"):
        if config.is_file() and read_config(config).get(field) is not None:
            raise ValueError(
                f"{config} refers to other files ({field}), which halfstep does not read. Remove the field"
            )
    for index in sorted(folder.glob("[!.]*.safetensors.index*.json")):
        listed = read_config(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise DamagedFile(f"{index} lists no tensors (weight_map). Save the pipeline again")
        shards: dict[str, set[str]] = {}
        for tensor, name in listed.items():
            shards.setdefault(str(name), set()).add(tensor)
        # All file names are checked first, because a file outside the folder is the more serious problem.
        for name in sorted(shards):
            if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index} lists the shard {name!r}, but only .safetensors files next to the index are read. If you "
                    "trust the shard, save the pipeline again with save_pretrained(FOLDER, safe_serialization=True)"
                )
            if not index.with_name(name).is_file():
                raise DamagedFile(f"{index.with_name(name)}, a shard of {index.name}, is missing. Copy this file too")
        for name, tensors in sorted(shards.items()):
            file, held = index.with_name(name), _names_in(index.with_name(name))
            if held != tensors:
                what = f"lacks {min(tensors - held)}" if tensors - held else f"contains {min(held - tensors)}"
                raise DamagedFile(f"{file} {what}, contrary to its index ({index.name}). Save the pipeline again")


def _names_in(file: Path) -> set[str]:
    check_regular(file)
    try:
        with safe_open(file, "pt") as held:
            return set(held.keys())
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file} cannot be read ({in_one_line(error)}). Copy or save it again") from None


def open_part(folder: Path, kind: str) -> Any:
    """Load a network, VAE or text encoder of the class `kind` from `folder` onto the CPU in float32.

    Args:
        kind: library and class, such as "transformers.CLIPTextModel".

    Raises:
        ValueError: if `check_files` rejects the files.
        DamagedFile: if the weights cannot be read, do not exactly match the class, or are not finite. The message names
            the first such tensor.
    """
    check_files(folder, kind)
    library, _, name = kind.rpartition(".")
    held = set().union(*map(_names_in, weights_of(folder)))
    with quiet():
        made = getattr(importlib.import_module(library), name, None)
    if made is None:
        raise ValueError(
            f"{folder} contains a {name}, which the installed {library} does not support. Update {library}"
        )
    options: dict[str, Any] = {"torch_dtype": torch.float32, "output_loading_info": True}
    if (quantised := read_config(folder / "config.json").get("quantization_config")) is not None:
        part, facts = _opened_quantised(folder, made, quantised.get("quant_method"), options)
    else:
        # Classes that keep some layers in float32 do not support low_cpu_mem_usage=False.
        if issubclass(made, stock("ModelMixin")) and not made._keep_in_fp32_modules:
            options["low_cpu_mem_usage"] = False
        if (variant := variant_of(folder)) is not None:
            options["variant"] = variant
        try:
            with quiet():
                part, facts = made.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
        except Exception as error:  # diffusers, transformers and safetensors raise many exception types
            raise DamagedFile(f"{folder} cannot be read as a {name} ({in_one_line(error)})") from None
    if type(part).__name__ != name:
        raise ValueError(f"{folder} contains the class {type(part).__name__}, but {name} is needed here")
    _check_names(folder, name, held, facts["missing_keys"], facts["unexpected_keys"])
    check_finite(part.state_dict(), folder)
    return part


def _opened_quantised(
    folder: Path, made: Any, method: str | None, options: Mapping[str, Any]
) -> tuple[Any, Mapping[str, Any]]:
    """Load a quantised part, dequantise it to float32, and return it with its missing and unexpected tensors.

    Raises:
        ValueError: if the part was not quantised with bitsandbytes, or if bitsandbytes is not installed.
    """
    if method != "bitsandbytes":
        raise ValueError(
            f"{folder} is quantised with {method}, but only bitsandbytes is supported. Save it unquantised"
        )
    try:
        state = _dequantised({name: value for file in weights_of(folder) for name, value in load_file(file).items()})
    except ImportError:
        raise ValueError(f"{folder} is quantised with {method}, which is not installed: pip install {method}") from None
    with quiet():
        if issubclass(made, stock("ModelMixin")):
            fields = read_config(folder / "config.json")
            del fields["quantization_config"]
            part = made.from_config(fields).eval()
            return part, part.load_state_dict(state, strict=False)._asdict()
        config = made.config_class.from_pretrained(folder, local_files_only=True)
        del config.quantization_config
        part, facts = made.from_pretrained(None, config=config, state_dict=state, **options)
        return part.eval(), facts


def _dequantised(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert bitsandbytes' 8-bit and 4-bit tensors to float32."""
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
        for what, names in (("lacks the tensor", missing), ("has the unexpected tensor", unexpected))
        if names
    ]
    wrapper = next((prefix for prefix in WRAPPERS if held and all(one.startswith(prefix) for one in held)), None)
    remedy = f"Save the {name} again with save_pretrained, or copy the whole folder"
    if wrapper is not None:
        remedy = f"All tensor names start with {wrapper!r}, which {WRAPPERS[wrapper]} adds. Save the wrapped module"
        if not any(folder.glob("*.index.json")):
            # The command reads all bytes first, because load_file would memory-map the file that save_file overwrites.
            remedy += (
                ', or rename the tensors by running in that folder: python -c "import glob, safetensors.torch as s; '
                f"[s.save_file({{k.removeprefix('{wrapper}'): v for k, v in s.load(open(f, 'rb').read()).items()}}, f, "
                "{'format': 'pt'}) for f in glob.glob('*.safetensors')]\""
            )
    elif any(ADAPTER in one for one in held):
        remedy = (
            f"The weights contain an adapter (names with {ADAPTER[1:-1]}): merge it before saving "
            "(pipe.fuse_lora(), then pipe.unload_lora_weights(); or model.merge_and_unload())"
        )
    raise DamagedFile(f"{folder}, read as a {name}, {' and '.join(facts)}. {remedy}")


def open_pipeline(folder: Path, kind: str, parts: Mapping[str, Any]) -> Any:
    """Load a pipeline of the class `kind` from `folder`.

    Args:
        parts: the parts with weights, as loaded by `open_part`, or None for missing parts.

    Raises:
        DamagedFile: if the pipeline cannot be read.
    """
    try:
        with quiet():
            return stock(kind).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **parts
            )
    except Exception as error:  # diffusers and transformers raise many exception types
        raise DamagedFile(f"the pipeline in {folder} cannot be read ({in_one_line(error)})") from None


def plain_network(folder: Path) -> Path | None:
    """Return the folder of a network saved without a pipeline (`folder`, or a subfolder such as unet), or None."""
    places = [place for name in ("unet", "transformer") for place in (folder / name, folder / f"{name}_ema")]
    return next((place for place in (folder, *places) if (place / "config.json").is_file()), None)


def networks_below(folder: Path) -> list[Path]:
    """Return the direct subfolders with a pipeline or a network, such as checkpoint-500, oldest first."""
    below = [place for place in folder.iterdir() if place.is_dir()] if folder.is_dir() else []
    found = [p for p in below if (p / "model_index.json").is_file() or plain_network(p) is not None]
    return sorted(found, key=lambda place: (place.stat().st_mtime, place.name))
