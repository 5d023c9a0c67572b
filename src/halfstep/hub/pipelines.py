"""Import of diffusers' pipelines, from a folder or the Hub, as teachers.

Process, prediction and clipping are read from the scheduler's config; what a network is fed, from its pipeline's own
calls. Only safetensors are read, and no code of a repository is run.
"""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from halfstep.core.denoiser import NetworkDenoiser, warn_of_signal
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.disk import (
    OLD_NAMES,
    averaged_beside,
    check_config,
    check_files,
    digest_of,
    known_fields,
    networks_below,
    open_part,
    open_pipeline,
    plain_network,
    read_config,
    refuse_single_file,
    scheduler_beside,
)
from halfstep.hub.recording import component_of, record
from halfstep.hub.schedulers import GONE, Schedule, read_schedule, renewed
from halfstep.hub.stock import quiet, stock
from halfstep.models.model import Model
from halfstep.nets import BasePrecision, StockNetwork, UNet2D, conditions_of, describe_network
from halfstep.runs import Manifest, Outcome, Pipeline
from halfstep.runtime.files import first_line, user_path

START_STEPS: Final = 128
"""Default DDIM steps of an imported teacher at the start of its chain: a compromise between what steps lose and stages
cost. No table of 1000 levels has them as whole timesteps, so times between levels are interpolated."""


PIXELS: Final = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
"""Image pipelines without a VAE, whose one network is identified by its config."""
UNET: Final = "UNet2DModel"
FETCHED: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Files of a repository that are not downloaded: pickles, code, and single-file weights beside the parts."""
NOT_FETCHED: Final = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
"""Variants of the weights; those in half precision are fetched where there are no others."""


def is_pipeline(path: str | Path) -> bool:
    """Return whether a path is a folder that diffusers has written: a pipeline, or a network with its config."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return True
    return plain_network(folder) is not None and not (folder / "manifest.json").is_file()


def fetch(source: str) -> Path:
    """Return the folder that `source` means: itself, or the copy of a repository on the Hub, without pickles and code.

    Raises:
        ValueError: if it is pickled weights, or neither a folder nor a repository that can be reached.
    """
    path = user_path(source)
    if not path.is_dir():
        refuse_single_file(source)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(
            f"{source} is a file: give a folder that diffusers has saved, or a name on the Hub (OWNER/NAME)"
        )
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist: give a folder, or a name on the Hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    def download(*ignored: str) -> Path:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), ignore_patterns=list(ignored)))

    try:
        path = download(*NOT_FETCHED)
        parts = [file.parent for file in path.glob("*/config.json")]
        if parts and not any(list(part.glob("*.safetensors")) for part in parts):
            path = download("*.non_ema.*", "*.non_ema-*")
        return path
    except Exception as error:  # the Hub's client has many errors of its own, and network libraries below it more
        raise ValueError(
            f"{source} is not a folder here and could not be fetched from the Hub ({first_line(error)})"
        ) from None


def import_pipeline(
    source: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    ema: bool = False,
    precision: BasePrecision = "float32",
) -> Model:
    """Load the network of a pipeline as a teacher, on the CPU.

    A pipeline with conditions is run for a few steps, to see what it feeds its network (hub/recording.py). Warns of
    averaged weights beside those that are taken, and of a last noise level that is not pure noise.

    Args:
        source: a folder that diffusers has saved, or a name on the Hub.
        options: arguments of the pipeline's call that stay the same for all samples, such as height and width.
        ema: whether to take the averaged weights beside the network's own, such as unet_ema.
        precision: how its weights are stored after the check in float32; any but float32 needs low-rank students.

    Raises:
        ValueError: if it is pickled, wants code of its own, or a part of it is missing or not understood.
    """
    folder = fetch(str(source))
    # A folder by its full path, and a name on the Hub as it is.
    origin = str(folder.resolve()) if folder == user_path(source) else str(source)
    kind = read_kind(folder) if (folder / "model_index.json").is_file() else None
    if kind is not None and kind not in PIXELS:
        told = Pipeline(kind=kind, folder=origin, component="", options=dict(options or {}))
        return _recorded(source, folder, told, ema, precision)
    if options:
        raise ValueError(f"{source} is a pipeline of pixels, whose call has no {', '.join(options)}: remove --call")
    if precision != "float32":
        raise ValueError(f"{source} makes pixels, whose network stays in float32. Remove --base-precision")
    network_folder, scheduler = _parts(folder) if kind else _plain_parts(folder)
    if not scheduler.is_file():
        raise ValueError(f"{folder} has no {scheduler.relative_to(folder)}: the pipeline was not saved whole")
    network_folder = _weights(source, network_folder, ema)
    schedule = read_schedule(read_config(scheduler))
    network = _network(network_folder, schedule)
    pipeline = None if kind is None else Pipeline(kind=kind, folder=origin, component="unet")
    return teacher_of(
        folder.name, network, schedule, pipeline, f"{source} (weights sha256 {digest_of(network_folder)})",
        shape=shape_of(network.config), num_classes=int(network.config.get("num_class_embeds") or 0), is_image=True,
    )  # fmt: skip


def _weights(source: str | Path, network: Path, ema: bool) -> Path:
    """The folder of a network's weights, or of its averaged ones."""
    averaged = averaged_beside(network)
    if ema and averaged is None:
        raise ValueError(f"{network.parent} has no averaged weights ({network.name}_ema). Remove --ema")
    if averaged is None:
        return network
    if not ema:
        warnings.warn(
            f"the weights in {network} are taken, and averaged ones (EMA) lie in {averaged}. To take those, run "
            f"halfstep import diffusers {source} --ema",
            HalfstepWarning,
            stacklevel=3,
        )
        return network
    return averaged


def _recorded(source: str | Path, folder: Path, pipeline: Pipeline, ema: bool, precision: BasePrecision) -> Model:
    """The teacher that a recording of its pipeline's call makes."""
    places = {name: _weights(source, folder / name, ema) for name in DENOISERS if (folder / name).is_dir()}
    if (folder / "vae").is_dir() and not list((folder / "vae").glob("*.safetensors")):
        check_files(folder / "vae", "diffusers.AutoencoderKL")
    pipe = load_pipeline(folder, pipeline.kind, places=places)
    component = component_of(pipe)
    try:
        recording, network = record(pipe, pipeline.options)
    except ValueError as error:
        missing = sorted(name for name, part in pipe.components.items() if part is None and name not in OPTIONAL)
        raise ValueError(f"{folder} has no {', '.join(missing)}: {error}" if missing else str(error)) from None
    network.lower(precision)
    return teacher_of(
        folder.name, network, recording.schedule,
        pipeline.model_copy(
            update={
                "component": component, "guidance": recording.guidance, "off": recording.off,
                "scale": recording.scale, "averaged": ema,
            }
        ),
        f"{source} (weights sha256 {digest_of(places[component])})",
        shape=recording.shape, num_classes=recording.num_classes,
        conditions={} if recording.num_classes else conditions_of(recording.call), is_image=False,
        null=dict(recording.null),
    )  # fmt: skip


def teacher_of(
    stage: str, network: StockNetwork, schedule: Schedule, pipeline: Pipeline | None, source: str, *,
    shape: tuple[int, ...], num_classes: int, is_image: bool, conditions: Mapping[str, tuple[int, ...]] | None = None,
    null: Mapping[str, Tensor] | None = None,
) -> Model:  # fmt: skip
    """Return the model of an imported network; arguments as the fields of its manifest."""
    warn_of_signal(schedule.process)
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
        raise ValueError(
            f"{folder} is not a pipeline (no model_index.json): give a folder that diffusers has saved whole"
        )
    index = read_config(folder / "model_index.json")
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
    code += ["auto_map"] * any("auto_map" in read_config(file) for file in folder.glob("*/config.json"))
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
DENOISERS: Final = ("transformer", "unet")


def load_pipeline(
    folder: Path,
    kind: str,
    device: str | torch.device = "cpu",
    is_whole: bool = True,
    places: Mapping[str, Path] | None = None,
) -> Any:
    """Load a pipeline in float32, its parts with weights by hub/disk.py.

    Args:
        is_whole: whether with the weights of its denoiser and VAE; if not, it can make conditions only.
        places: folders of parts that are not read from `folder`, by name.

    Raises:
        ValueError: if a part of it cannot be read.
    """
    index, given = read_config(folder / "model_index.json"), dict[str, Any]()
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        if value[0] is None or (name in OPTIONAL and not list((folder / name).glob("*.safetensors"))):
            given[name] = None
        elif list((folder / name).glob("*.safetensors")) or not is_light(folder / name):
            given[name] = _part(kind, name, value, (places or {}).get(name, folder / name), is_whole, device)
        elif (file := folder / name / "scheduler_config.json").is_file() and set(GONE) & set(read_config(file)):
            # Today's schedulers pass over what those fields say.
            given[name] = stock(value[1]).from_config(renewed(read_config(file)))
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    return open_pipeline(folder, kind, given)


def _part(
    pipeline: str, part: str, declared: Sequence[str], folder: Path, is_whole: bool, device: str | torch.device
) -> Any:
    """A part with weights, of the library and class that the pipeline's index declares."""
    library, name = declared
    if library == "diffusers":
        if name in OLD_NAMES:
            taken = {kind.__name__ for kind in stock(pipeline)._get_signature_types()[part]}
            name = next((new for new in OLD_NAMES[name] if new in taken), name)
        config = check_config(folder, name)
        if not is_whole and part in (*DENOISERS, "vae"):
            check_files(folder, f"diffusers.{name}")
            config = {field: value for field, value in config.items() if field != "quantization_config"}
            return on_meta(name, config, device)
    elif library != "transformers":
        library = f"diffusers.pipelines.{library}"
    return open_part(folder, f"{library}.{name}").eval().to(device)


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
    network = plain_network(folder)
    if network is None:
        below = networks_below(folder)
        where = f". Give one of the folders in it, such as {below[-1]}" if below else ""
        raise ValueError(
            f"{folder} is not a pipeline (no model_index.json) and holds no network (no config.json){where}"
        )
    kind = read_config(network / "config.json").get("_class_name")
    if kind != UNET:
        raise ValueError(
            f"{network} holds a {kind}, of which config.json does not say enough: give a whole pipeline (known without "
            f"one: {UNET})"
        )
    scheduler = scheduler_beside(folder, network)
    if scheduler is None:
        raise ValueError(
            f"{folder} has no scheduler_config.json, and process and prediction are not guessed: write one, such as "
            'diffusers\' DDPMScheduler(beta_schedule="linear", prediction_type="epsilon").save_pretrained(FOLDER)'
        )
    return network, scheduler


def _network(folder: Path, schedule: Schedule) -> UNet2D:
    """The U-Net of pixels with the weights in `folder`, without the channels of a learned variance."""
    config = check_config(folder, UNET)
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
    stock_model = open_part(folder, f"diffusers.{UNET}")
    config = json.loads(json.dumps(known_fields(stock_model.config, folder, UNET)))
    state = dict(stock_model.state_dict())
    channels = int(config["in_channels"])
    puts_out = int(config.get("out_channels") or channels)
    if puts_out not in (channels, 2 * channels):
        raise ValueError(
            f"{folder} takes {channels} channels and returns {puts_out}: as many are needed, or twice as many with a "
            "learned variance"
        )
    if puts_out == 2 * channels:
        if not schedule.learned_variance:
            raise ValueError(
                f"{folder} returns {2 * channels} channels for {channels}, but its scheduler's variance_type does "
                'not declare a learned variance: set variance_type to "learned_range" if the second half is one'
            )
        config["out_channels"] = channels
        for part in ("conv_out.weight", "conv_out.bias"):
            state[part] = state[part][:channels]
    network = UNet2D(config, num_train_timesteps=schedule.num_train_timesteps)
    network.model.load_state_dict(state)
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
