"""Parts of a pipeline on disk: the only place where their folders are opened and their weights checked.

Only safetensors are read: nothing is unpickled, no code of a folder is run, and no file outside it is opened. A part
whose tensors are not exactly those of its class is refused; diffusers and transformers would fill the gaps with random
values.
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
from halfstep.runtime.files import DamagedFile, read_json, sha256_of, user_path
from halfstep.runtime.tensors import check_finite

PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Suffixes of weights that run code when they are read."""
WRAPPERS: Final = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "ema_model.": "an average of the weights",
    "model.": "a training module",
    "net.": "a training module",
}
"""Prefixes that wrappers put before the names of all tensors, and which wrapper."""
ADAPTER: Final = ".base_layer."
"""Part that peft inserts into the names of layers with an adapter."""
AVERAGED: Final = {
    "decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup",
}  # fmt: skip
"""Fields that diffusers' `EMAModel` adds to a network's config."""
OLD_NAMES: Final = {"Transformer2DModel": ("DiTTransformer2DModel", "PixArtTransformer2DModel")}
"""Classes as which older files declare a network, and the classes that read it today."""


def read_config(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        DamagedFile: if it is none.
    """
    data = read_json(file)
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not hold a config")
    return data


def refuse_single_file(source: str) -> None:
    """Raise ValueError if `source` names a checkpoint in one file, with the call of diffusers that converts it."""
    path = user_path(source)
    convert = f'diffusers\' StableDiffusionPipeline.from_single_file("{path}").save_pretrained("FOLDER")'
    if path.suffix in PICKLED:
        raise ValueError(
            f"{source} is pickled and could run code when it is read, so halfstep does not. Convert it where you trust "
            f"it, for example by {convert}"
        )
    if path.suffix == ".safetensors":
        raise ValueError(
            f"{source} is a checkpoint in one file, without configs. Convert it with its pipeline's class, for example "
            f"by {convert}, and give that folder"
        )


def check_config(folder: Path, name: str) -> dict[str, Any]:
    """Return the config of the network of diffusers' class `name` in `folder`.

    Raises:
        ValueError: if it is missing, wants code of its own, or declares another class.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the pipeline was not saved whole")
    config = read_config(folder / "config.json")
    if "auto_map" in config:
        raise ValueError(f"{folder} wants code of its own to be run (auto_map), which halfstep refuses")
    declared = config.get("_class_name")
    if declared != name and name not in OLD_NAMES.get(str(declared), ()):
        raise ValueError(f"{folder} holds a {declared}, but a {name} is needed here")
    return config


def known_fields(config: Mapping[str, Any], folder: Path, name: str) -> dict[str, Any]:
    """Return the fields of a config that the class `name` of diffusers takes; warn of the others, as diffusers does.

    Fields of `EMAModel`, and fields of an older class that are off, have no effect and pass in silence.
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
            f"{folder}/config.json has fields that {name} of this diffusers does not know, and that are ignored: "
            f"{fields}. Update diffusers if they matter",
            HalfstepWarning,
            stacklevel=3,
        )
    return {field: value for field, value in config.items() if field in takes}


HALVES: Final = ("fp16", "bf16")
"""Variants whose weights are read where there are no others."""


def weights_of(folder: Path) -> list[Path]:
    """Return the safetensors of a part, sorted by name: without a variant, or else in half precision."""
    held = sorted(folder.glob("*.safetensors"))
    variant = variant_of(folder) or ""
    return [file for file in held if _variant(file.name) == variant]


def variant_of(folder: Path) -> str | None:
    """Return the variant of the weights that are read; None for those without."""
    held = {_variant(file.name) for file in folder.glob("*.safetensors")}
    return None if "" in held else next((variant for variant in HALVES if variant in held), None)


def without_variant(text: str, folder: Path) -> str:
    """Return the name of a file of a part, or the text of its index, as it is without a variant."""
    variant = variant_of(folder)
    return text if variant is None else text.replace(f".{variant}.", ".").replace(f".{variant}-", "-")


def digest_of(folder: Path) -> str:
    """Return the digest of all weights of a part, so that other weights in the same folder make another run."""
    digests = [sha256_of(file) for file in weights_of(folder)]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _variant(name: str) -> str:
    """The variant in a file's name: fp16 in model.fp16.safetensors and model.fp16-00001-of-00002.safetensors."""
    _, _, behind = name.removesuffix(".safetensors").partition(".")
    return behind.split("-")[0]


def check_files(folder: Path, kind: str) -> None:
    """Pass if a part has its weights as safetensors under the names that are read, and nothing else would be read.

    Args:
        kind: library and class of the part, such as "diffusers.UNet2DModel".

    Raises:
        ValueError: if it has none, only pickled ones, or only those of another variant than fp16 and bf16; saying how
            to convert them. If an
            index or config names other files, or the tensors of a shard are not those that the index lists.
    """
    _check_indirection(folder)
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if weights_of(folder):
        return
    if found:
        variant = _variant(found[0])
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


def _check_indirection(folder: Path) -> None:
    """Refuse what makes a library read other files than the safetensors that lie here."""
    for file in sorted(folder.glob("*.safetensors")):
        if not file.is_file():
            raise ValueError(f"{file} is not a file. Save the pipeline again")
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json), which names the weights it is added to. Merge it "
            "(model.merge_and_unload()), and save the result"
        )
    config = folder / "config.json"
    for field in ("auto_map", "transformers_weights"):
        if config.is_file() and read_config(config).get(field) is not None:
            raise ValueError(f"{config} names other files to be read ({field}), which halfstep refuses. Remove it")
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        listed = read_config(index).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise DamagedFile(f"{index} lists no tensors (weight_map). Save the pipeline again")
        shards: dict[str, set[str]] = {}
        for tensor, name in listed.items():
            shards.setdefault(str(name), set()).add(tensor)
        # All names first: one that leads elsewhere says more than a shard that does not fit.
        for name in sorted(shards):
            _check_shard_name(index, name)
        for name, tensors in sorted(shards.items()):
            _check_shard(index, name, tensors)


def _check_shard_name(index: Path, name: str) -> None:
    if name != Path(name).name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(
            f"{index} names the shard {name!r}, and only .safetensors beside it are read. Save the pipeline again with "
            "save_pretrained(FOLDER, safe_serialization=True), where you trust it"
        )
    if not index.with_name(name).is_file():
        raise DamagedFile(f"{index.with_name(name)} is missing, a shard of {index.name}. Copy the whole folder")


def _check_shard(index: Path, name: str, tensors: set[str]) -> None:
    file = index.with_name(name)
    held = _names_in(file)
    if held != tensors:
        lacks, extra = tensors - held, held - tensors
        what = f"lacks {min(lacks)}" if lacks else f"holds {min(extra)}"
        raise DamagedFile(f"{file} {what}, unlike its index ({index.name}). Save the pipeline again")


def _names_in(file: Path) -> set[str]:
    try:
        with safe_open(file, "pt") as held:
            return set(held.keys())
    except (SafetensorError, OSError) as error:
        raise DamagedFile(f"{file} cannot be read ({in_one_line(error)}). Copy or save it again") from None


def open_part(folder: Path, kind: str) -> Any:
    """Load the network, VAE or text encoder of the class `kind` in `folder`, in float32 on the CPU.

    Its tensors are exactly those of its class, and finite.

    Args:
        kind: library and class, such as "transformers.CLIPTextModel".

    Raises:
        ValueError: if its files are refused (see `check_files`), or (DamagedFile) its weights cannot be read, are not
            those of its class, or are not finite; the message names the first such tensor.
    """
    check_files(folder, kind)
    library, _, name = kind.rpartition(".")
    held = set().union(*map(_names_in, weights_of(folder)))
    with quiet():
        made = getattr(importlib.import_module(library), name, None)
    if made is None:
        raise ValueError(f"{folder} holds a {name}, which this {library} does not know. Update {library}")
    if (quantised := read_config(folder / "config.json").get("quantization_config")) is not None:
        part, missing, unexpected = _opened_quantised(folder, made, quantised)
        _check_names(folder, name, held, missing, unexpected)
        check_finite(part.state_dict(), folder)
        return part
    # diffusers wants the other way for classes that keep some layers in float32.
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
    except Exception as error:  # whatever diffusers, transformers, safetensors or a wrong shape raise
        raise DamagedFile(f"{folder} cannot be read as a {name} ({in_one_line(error)})") from None
    if type(part).__name__ != name:
        raise ValueError(f"{folder} holds a {type(part).__name__}, but a {name} is needed here")
    _check_names(folder, name, held, facts["missing_keys"], facts["unexpected_keys"])
    check_finite(part.state_dict(), folder)
    return part


def _opened_quantised(folder: Path, made: Any, told: Mapping[str, Any]) -> tuple[Any, list[str], list[str]]:
    """Return a part that was saved in fewer bits, in float32 as what its weights stand for, and its missing and
    unexpected tensors.

    Raises:
        ValueError: if its weights are not those of bitsandbytes, or that is not installed.
    """
    method = told.get("quant_method")
    if method != "bitsandbytes":
        raise ValueError(
            f"{folder} is quantised by {method}, and only weights of bitsandbytes are read. Save it in full precision"
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
    """Return tensors in float32, of those that bitsandbytes has saved in 8 or 4 bits."""
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
        # Reading all bytes first, because load_file maps the file that is written.
        remedy = f"All names start with {wrapper!r}, which {WRAPPERS[wrapper]} adds. Save the module inside it" + (
            ""
            if any(folder.glob("*.index.json"))
            else ', or rename the tensors by running in that folder: python -c "import glob, safetensors.torch as s; '
            f"[s.save_file({{k.removeprefix('{wrapper}'): v for k, v in s.load(open(f, 'rb').read()).items()}}, f, "
            "{'format': 'pt'}) for f in glob.glob('*.safetensors')]\""
        )
    elif any(ADAPTER in one for one in held):
        remedy = (
            f"The weights carry an adapter (names with {ADAPTER[1:-1]}): merge it before saving, by "
            "pipe.fuse_lora() and pipe.unload_lora_weights(), or model.merge_and_unload()"
        )
    raise DamagedFile(f"{folder} has {' and '.join(facts)} as a {name}. {remedy}")


def open_pipeline(folder: Path, kind: str, parts: Mapping[str, Any]) -> Any:
    """Load the pipeline `kind` in `folder` with these parts, opened by `open_part`, or None for none; other parts hold
    no weights.

    Raises:
        DamagedFile: if it cannot be read.
    """
    try:
        with quiet():
            return stock(kind).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **parts
            )
    except Exception as error:  # whatever diffusers and transformers raise
        raise DamagedFile(f"the pipeline in {folder} cannot be read ({in_one_line(error)})") from None


def plain_network(folder: Path) -> Path | None:
    """Return the folder of a network without a model_index.json: `folder` itself, its unet or its transformer."""
    places = [place for name in ("unet", "transformer") for place in (folder / name, folder / f"{name}_ema")]
    return next((place for place in (folder, *places) if (place / "config.json").is_file()), None)


def averaged_beside(network: Path) -> Path | None:
    """Return the folder of the averaged weights (EMA) beside those of a network; None if there is none."""
    place = network.with_name(f"{network.name}_ema")
    return place if (place / "config.json").is_file() else None


def scheduler_beside(folder: Path, network: Path) -> Path | None:
    """Return the scheduler's config of a network without a pipeline: in `folder`, or beside the network."""
    places = (folder / "scheduler", folder, network, network.parent / "scheduler", network.parent)
    return next((file for place in places if (file := place / "scheduler_config.json").is_file()), None)


def networks_below(folder: Path) -> list[Path]:
    """Return the folders directly below `folder` that hold a pipeline or a network, such as checkpoint-500, the latest
    last."""
    below = [place for place in folder.iterdir() if place.is_dir()] if folder.is_dir() else []
    found = [p for p in below if (p / "model_index.json").is_file() or plain_network(p) is not None]
    return sorted(found, key=lambda place: (place.stat().st_mtime, place.name))
