"""Import of diffusers' pipelines, from a folder or the Hub, as teachers.

Process, prediction and clipping are read from the scheduler's config; what a network is fed, from its pipeline's own
calls. Only safetensors are read, and no code of a repository is run.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.hub.recording import component_of, record
from halfstep.hub.schedulers import Schedule, read_schedule
from halfstep.hub.stock import PICKLED, check_weights, load_stock, quiet, stock
from halfstep.models.model import Model
from halfstep.nets import StockNetwork, UNet2D, describe_network
from halfstep.runs import Manifest, Outcome, Pipeline
from halfstep.runtime.files import DamagedFile, first_line, read_json, sha256_of, user_path
from halfstep.runtime.tensors import check_finite

START_STEPS: Final = 128
"""Default DDIM steps of an imported teacher at the start of its chain: a compromise between what steps lose and stages
cost. No table of 1000 levels has them as whole timesteps, so times between levels are interpolated."""


PIXELS: Final = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
"""The pipelines of images without a VAE, whose one network is told by its config."""
UNET: Final = "UNet2DModel"
FETCHED: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Of a repository: neither pickles nor code, and no weights beside the parts, where many keep them all in one file."""
NOT_FETCHED: Final = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
"""Variants of the weights, which are not read."""


def is_pipeline(path: str | Path) -> bool:
    """Return whether a path is a folder that diffusers has written: a pipeline, or a network with its config."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return True
    return _plain_network(folder) is not None and not (folder / "manifest.json").is_file()


def _plain_network(folder: Path) -> Path | None:
    """The folder of a network without a model_index.json."""
    places = (folder, folder / "unet", folder / "transformer")
    return next((place for place in places if (place / "config.json").is_file()), None)


def fetch(source: str) -> Path:
    """Return the folder that `source` means: itself, or the copy of a repository on the Hub, without pickles and code.

    Raises:
        ValueError: if it is pickled weights, or neither a folder nor a repository that can be reached.
    """
    path = user_path(source)
    if path.suffix in PICKLED:
        raise ValueError(
            f"{source} is pickled and could run code when it is read, so halfstep does not: convert it where you trust "
            "it, for example diffusers' StableDiffusionPipeline.from_single_file(...).save_pretrained(FOLDER)"
        )
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{source} is a file: give a folder that diffusers has saved, or a name on the Hub (OWNER/NAME)"
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist: give a folder, or a name on the Hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED)))
    except Exception as error:  # the Hub's client has many errors of its own, and network libraries below it more
        raise ValueError(
            f"{source} is no folder here and could not be fetched from the Hub ({first_line(error)})"
        ) from None


def import_pipeline(source: str | Path, options: Mapping[str, Any] | None = None) -> Model:
    """Load the network of a pipeline as a teacher, on the CPU in float32.

    A pipeline with conditions is run for a few steps, to see what it feeds its network (hub/recording.py).

    Args:
        source: a folder that diffusers has saved, or a name on the Hub.
        options: arguments of the pipeline's call that stay the same for all samples, such as height and width.

    Raises:
        ValueError: if it is pickled, wants code of its own, or a part of it is missing or not understood.
    """
    folder = fetch(str(source))
    # A folder by its full path, and a name on the Hub as it is.
    origin = str(folder.resolve()) if folder == user_path(source) else str(source)
    kind = read_kind(folder) if (folder / "model_index.json").is_file() else None
    if kind is not None and kind not in PIXELS:
        return _recorded(source, folder, Pipeline(kind=kind, folder=origin, component="", options=dict(options or {})))
    if options:
        raise ValueError(f"{source} is a pipeline of pixels, whose call has no {', '.join(options)}: remove --call")
    network_folder, scheduler = _parts(folder) if kind else _plain_parts(folder)
    if not scheduler.is_file():
        raise ValueError(f"{folder} has no {scheduler.relative_to(folder)}: the pipeline was not saved whole")
    schedule = read_schedule(_json(scheduler))
    network = _network(network_folder, schedule)
    pipeline = None if kind is None else Pipeline(kind=kind, folder=origin, component="unet")
    return _teacher(
        folder.name, network, schedule, pipeline, f"{source} (weights sha256 {_digest(network_folder)})",
        shape=shape_of(network.config), num_classes=int(network.config.get("num_class_embeds") or 0), is_image=True,
    )  # fmt: skip


def _recorded(source: str | Path, folder: Path, pipeline: Pipeline) -> Model:
    """The teacher that a recording of its pipeline's call makes."""
    pipe = load_pipeline(folder, pipeline.kind)
    component = component_of(pipe)
    try:
        recording, network = record(pipe, pipeline.options)
    except ValueError as error:
        missing = sorted(name for name, part in pipe.components.items() if part is None and name not in OPTIONAL)
        raise ValueError(f"{folder} has no {', '.join(missing)}: {error}" if missing else str(error)) from None
    null = dict(recording.null)
    labels = null.get("class_labels") if set(recording.conditions) == {"class_labels"} else None
    return _teacher(
        folder.name, network, recording.schedule,
        pipeline.model_copy(
            update={
                "component": component, "guidance": recording.guidance, "off": recording.off, "scale": recording.scale
            }
        ),
        f"{source} (weights sha256 {_digest(folder / component)})",
        shape=recording.shape, num_classes=0 if labels is None else int(labels),
        conditions={} if labels is not None else recording.conditions, is_image=False, null=null,
    )  # fmt: skip


def _teacher(
    stage: str, network: StockNetwork, schedule: Schedule, pipeline: Pipeline | None, source: str, *,
    shape: tuple[int, ...], num_classes: int, is_image: bool, conditions: Mapping[str, tuple[int, ...]] | None = None,
    null: Mapping[str, Tensor] | None = None,
) -> Model:  # fmt: skip
    manifest = Manifest(
        stage=stage,
        objective="imported",
        parent=None,
        outcome=Outcome(role="teacher"),
        start_steps=START_STEPS,
        num_updates=0,
        seconds=0.0,
        shape=shape,
        num_classes=num_classes,
        conditions=dict(conditions or {}),
        is_image=is_image,
        clip=schedule.clip,
        network=describe_network(network),
        process=processes.describe(schedule.process),
        prediction=predictions.describe(schedule.prediction),
        pipeline=pipeline,
        files={},
        source=source,
    )
    return Model(NetworkDenoiser(network.eval(), schedule.process, schedule.prediction), manifest, null)


def _digest(folder: Path) -> str:
    """The digest of all weights of a network, so that another teacher in the same folder makes another run."""
    digests = [sha256_of(file) for file in sorted(folder.glob("*.safetensors"))]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _json(file: Path) -> dict[str, Any]:
    data = read_json(file)
    if not isinstance(data, dict):
        raise DamagedFile(f"{file} does not hold a config")
    return data


def _parts(folder: Path) -> tuple[Path, Path]:
    """The folder of the network and the config of the scheduler of a pipeline of pixels."""
    # As diffusers does: where a part has no folder of its own, it lies in the root.
    network, scheduler = (folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler"))
    return network, scheduler / "scheduler_config.json"


def read_kind(folder: Path) -> str:
    """Return the class of the pipeline in a folder; no file of the folder is code.

    Raises:
        ValueError: if there is none, it wants code of its own, is none of diffusers', or lacks a part.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline (no model_index.json): give a folder that diffusers has saved whole")
    index = _json(folder / "model_index.json")
    kind = index.get("_class_name")
    foreign = [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and not (name.isidentifier() and value[:1] in ([None], ["diffusers"], ["transformers"]))
        # Parts that a pipeline of diffusers brings along lie in its module.
        and not (value and isinstance(value[0], str) and hasattr(stock("pipelines"), value[0]))
    ]
    code = foreign or sorted(file.name for file in folder.rglob("*.py"))
    if not isinstance(kind, str):
        code = [f"its class is {kind}"]
    code += ["auto_map"] * any("auto_map" in _json(file) for file in folder.glob("*/config.json"))
    if code:
        raise ValueError(
            f"{folder} wants code of its own to be run ({', '.join(code)}), which halfstep refuses: save it as a "
            "pipeline that diffusers knows"
        )
    if kind in PIXELS:
        return str(kind)
    if not isinstance(stock(str(kind), None), type):
        raise ValueError(f"{folder} holds a {kind}, which diffusers {stock('__version__')} does not have")
    for name, value in index.items():
        if isinstance(value, list) and value[0] and name not in OPTIONAL and not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}, which its pipeline is made of: save the pipeline with it")
    return str(kind)


OPTIONAL: Final = ("vae", "safety_checker", "feature_extractor", "image_encoder")
"""Parts that no denoiser is fed from."""


def load_pipeline(folder: Path, kind: str, device: str | torch.device = "cpu", is_whole: bool = True) -> Any:
    """Load a pipeline in float32, by safetensors only.

    Args:
        is_whole: whether with the weights of its denoiser; if not, it can make conditions and decode latents.

    Raises:
        ValueError: if a part of it cannot be read.
    """
    index, given = _json(folder / "model_index.json"), dict[str, Any]()
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        if value[0] is None or (name in OPTIONAL and not list((folder / name).glob("*.safetensors"))):
            given[name] = None
        elif list((folder / name).glob("*.safetensors")) or not is_light(folder / name):
            check_weights(folder / name, ".".join(map(str, value)))
            if not is_whole and name in ("transformer", "unet"):
                given[name] = on_meta(value[1], _json(folder / name / "config.json"), device)
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    pipe = load_stock(kind, folder, f"the pipeline in {folder} cannot be read", **given)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and given.get(name) is None:
            part.eval().to(device)
    return pipe


def is_light(folder: Path) -> bool:
    """Whether a part has no weights: a tokenizer, a processor or a scheduler."""
    return not (folder / "config.json").is_file()


def on_meta(kind: str, config: Mapping[str, Any], device: str | torch.device) -> Any:
    """Return a network without memory for its weights, which says that it is on `device`."""
    with quiet(), torch.device("meta"):
        network = stock(kind).from_config(dict(config))
    here, own = torch.device(device), type(network)
    network.__class__ = type(own.__name__, (own,), {"device": property(lambda _: here)})
    return network


def _plain_parts(folder: Path) -> tuple[Path, Path]:
    network = _plain_network(folder)
    if network is None:
        raise ValueError(f"{folder} is no pipeline (no model_index.json) and holds no network (no config.json)")
    kind = _json(network / "config.json").get("_class_name")
    if kind != UNET:
        raise ValueError(
            f"{network} holds a {kind}, of which config.json does not say enough: give a whole pipeline (known without "
            f"one: {UNET})"
        )
    files = [folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"]
    scheduler = next((file for file in files if file.is_file()), None)
    if scheduler is None:
        raise ValueError(
            f"{folder} has no scheduler_config.json, and process and prediction are not guessed: write one, such as "
            'diffusers\' DDPMScheduler(beta_schedule="linear", prediction_type="epsilon").save_pretrained(FOLDER)'
        )
    return network, scheduler


def _network(folder: Path, schedule: Schedule) -> UNet2D:
    """The U-Net of pixels with the weights in `folder`, without the channels of a learned variance."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: the pipeline was not saved whole")
    config = _json(folder / "config.json")
    if "auto_map" in config:
        raise ValueError(f"{folder} wants code of its own to be run (auto_map), which halfstep refuses")
    if config.get("_class_name") != UNET:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, but a {UNET} is needed here")
    if schedule.is_flow:
        raise ValueError(
            f"{folder} holds a {UNET}, whose clock of timesteps is not known for the process of its scheduler "
            f"({type(schedule.process).__name__}): in Python halfstep.distill takes any network"
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{folder} holds a {UNET} with class_embed_type {config['class_embed_type']!r}, an input that halfstep "
            "does not know: distil it in Python (halfstep.distill), where conditions have any name"
        )
    check_weights(folder, f"diffusers.{UNET}")
    stock_model = load_stock(UNET, folder, f"{folder} cannot be read as a {UNET}", low_cpu_mem_usage=False)
    config = json.loads(json.dumps({k: v for k, v in stock_model.config.items() if not k.startswith("_")}))
    state = dict(stock_model.state_dict())
    channels = int(config["in_channels"])
    puts_out = int(config.get("out_channels") or channels)
    if puts_out not in (channels, 2 * channels):
        raise ValueError(
            f"{folder} takes {channels} channels and puts out {puts_out}: as many are needed, or twice as many with a "
            "learned variance"
        )
    if puts_out == 2 * channels:
        if not schedule.learned_variance:
            raise ValueError(
                f"{folder} puts out {2 * channels} channels for {channels}, but its scheduler's variance_type says "
                'nothing of a learned variance: set variance_type to "learned_range" if the second half is one'
            )
        config["out_channels"] = channels
        for part in ("conv_out.weight", "conv_out.bias"):
            state[part] = state[part][:channels]
    network = UNet2D(config, num_train_timesteps=schedule.num_train_timesteps)
    network.model.load_state_dict(state)
    check_finite(network.model.state_dict(), folder)
    return network


def shape_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of a sample of the network with this config.

    Raises:
        ValueError: if it does not contain one.
    """
    size = config.get("sample_size")
    if size is None:
        raise ValueError("the network's config has no sample_size: write the height and width of its samples into it")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"the network's config has sample_size {size!r}: their height and width are needed")
    return int(config["in_channels"]), *sides
