"""Import diffusers pipelines, from a folder or the Hub, as teachers.

The process, prediction and clipping are read from the scheduler's config, and the network's inputs are recorded from
the pipeline's own calls. Only safetensors files are read, and no code in a repository is run.
"""

import inspect
import shlex
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from halfstep.core.denoiser import NetworkDenoiser, warn_of_signal
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub import disk
from halfstep.hub.recording import GUIDANCES, record
from halfstep.hub.schedulers import GONE, Schedule, read_schedule, renewed
from halfstep.hub.stock import check_transformers, quiet, stock
from halfstep.hub.trace import component_of
from halfstep.models.model import Model
from halfstep.nets import BasePrecision, StockNetwork, UNet2D, conditions_of
from halfstep.registry import nearest
from halfstep.runs import Pipeline
from halfstep.runtime.files import first_line, user_path

START_STEPS: Final = 128
"""Default number of DDIM steps for an imported teacher at the start of a chain. More steps are more accurate, but
require more stages. With a table of 1000 noise levels, times between levels are interpolated."""
PIXELS: Final = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
"""Image pipelines without a VAE. Their only network is fully described by its config."""
UNET: Final = "UNet2DModel"
FETCHED: Final = ("*.json", "*.txt", "*.model", "*.jinja", "*/*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Files to download, excluding pickles, code and single-file weights."""
NON_EMA: Final = ("*.non_ema.*", "*.non_ema-*")
HALF_PRECISION: Final = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*")
"""Half-precision weights, downloaded only for parts that have no full-precision weights."""
UNNEEDED: Final = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts that are loaded and exported only if they are complete, because pipelines sample from prompts without them."""
OPTIONAL: Final = ("vae", *UNNEEDED)
"""Parts that do not affect a denoiser's inputs."""
DENOISERS: Final = ("transformer", "unet")
OWN_ARGUMENTS: Final = (
    *("prompt", "class_labels", "num_inference_steps", "timesteps", "sigmas", "generator", "latents", "output_type"),
    *("return_dict", "num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt"),
)
"""Pipeline call arguments that halfstep sets itself."""
SIZES: Final = frozenset({"height", "width", "num_frames"})
"""Pipeline call arguments that count pixels or frames."""


def is_pipeline(path: str | Path) -> bool:
    """Return whether a path is a diffusers folder that contains a pipeline, or a network and its config."""
    folder = Path(path)
    is_network = disk.plain_network(folder) is not None and not (folder / "manifest.json").is_file()
    return is_network or (folder / "model_index.json").is_file()


def fetch(source: str) -> Path:
    """Return the local folder of `source`, downloading a Hub repository without its pickles and code.

    Raises:
        ValueError: if `source` is a file, such as pickled weights, or is neither a folder nor a reachable repository.
    """
    path = user_path(source)
    if path.is_dir():
        return path
    disk.refuse_single_file(source)
    if path.exists():
        raise ValueError(f"{source} is a file: pass a folder saved by diffusers, or a name on the Hub (OWNER/NAME)")
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source} does not exist: pass a folder, or a name on the Hub (OWNER/NAME)")
    from huggingface_hub import snapshot_download

    def download(*ignored: str) -> Path:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), ignore_patterns=list(ignored)))

    try:
        path = download(*NON_EMA, *HALF_PRECISION)
        parts = [file.parent for file in path.glob("*/config.json")] or [path]
        complete = {part.name for part in parts if list(part.glob("[!.]*.safetensors"))}
        if any(part.name not in complete.union(UNNEEDED) for part in parts):
            path = download(*NON_EMA, *(f"{name}/{half}" for name in complete for half in HALF_PRECISION))
        return path
    except Exception as error:  # the Hub's client and its network libraries raise many exception types
        raise ValueError(f"{source} could not be downloaded from the Hub ({first_line(error)})") from None


def fetch_pipeline(pipeline: Pipeline) -> Path:
    """Return the local folder of an imported model's pipeline, downloading it if it is a Hub repository.

    Raises:
        ValueError: if the folder has been moved or deleted, or if the repository cannot be reached.
    """
    # A folder is recorded with its absolute path.
    if Path(pipeline.folder).is_absolute() and not Path(pipeline.folder).is_dir():
        raise ValueError(
            f"the model's pipeline {pipeline.folder} is missing. Restore it at this path, for example with a symbolic "
            f"link: ln -s FOLDER {shlex.quote(pipeline.folder)}"
        )
    return fetch(pipeline.folder)


def import_pipeline(
    source: str | Path,
    options: Mapping[str, Any] | None = None,
    *,
    ema: bool = False,
    precision: BasePrecision = "float32",
) -> Model:
    """Load a pipeline's network onto the CPU as a teacher.

    Pipelines with conditions are run for a few steps to record the network's inputs (hub/recording.py). Warns if
    averaged weights exist but are not used, or if the last noise level is not pure noise.

    Args:
        source: a folder saved by diffusers, or a name on the Hub.
        options: pipeline call arguments for all samples, such as height and width.
        ema: whether to use the averaged weights, in a folder such as unet_ema, instead of the network's own weights.
        precision: precision in which the weights are stored. If it is lower than float32, students must use LoRA.

    Raises:
        ValueError: if the pipeline is pickled or requires custom code, or if a part is missing or not supported.
    """
    folder = fetch(str(source))
    # The path is resolved, so that relative paths and links to the same folder identify the same teacher.
    origin = str(folder.resolve()) if folder == user_path(source) else str(source)
    kind = read_kind(folder) if (folder / "model_index.json").is_file() else None
    if kind is not None and kind not in PIXELS:
        _check_options(kind, options or {})
        told = Pipeline(kind=kind, folder=origin, component="", options=dict(options or {}), averaged=ema)
        return _recorded(source, folder, told, precision)
    if options:
        raise ValueError(
            f"{source} is a pixel pipeline, which does not take the arguments {', '.join(options)}. Remove --call"
        )
    if precision != "float32":
        raise ValueError(f"{source} is a pixel pipeline, which is always float32. Remove --base-precision")
    network_folder, scheduler = _parts(folder) if kind else _plain_parts(folder)
    if not scheduler.is_file():
        raise ValueError(f"{folder} has no {scheduler.relative_to(folder)}: the pipeline was not saved completely")
    network_folder = _weights(source, network_folder, ema)
    schedule = read_schedule(disk.read_config(scheduler))
    network = _network(network_folder, schedule)
    pipeline = None if kind is None else Pipeline(kind=kind, folder=origin, component="unet")
    return teacher_of(
        network, schedule, shape_of(network.config), num_classes=int(network.config.get("num_class_embeds") or 0),
        stage=Path(origin).name, is_image=True, pipeline=pipeline, source=_identity(origin, network_folder),
    )  # fmt: skip


def _check_options(kind: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for call arguments that a pipeline would ignore, or that halfstep sets itself."""
    taken = inspect.signature(stock(kind).__call__).parameters.values()
    # Some pipelines take **kwargs and ignore unknown arguments.
    names = [made.name for made in taken if made.kind is not made.VAR_KEYWORD and made.name != "self"]
    for name in options:
        if name in OWN_ARGUMENTS:
            raise ValueError(f"halfstep sets the pipeline argument {name} itself. Remove --call {name}")
        if name not in names:
            hint = nearest(name, names)
            # Do not suggest an argument that halfstep sets itself, because it would be rejected too.
            is_own = any(repr(each) in hint for each in OWN_ARGUMENTS)
            remedy = hint if hint and not is_own else f". Remove --call {name}"
            raise ValueError(f"a {kind} call does not take the argument {name!r}{remedy}")
    for name in SIZES & options.keys():
        if type(options[name]) is not int or options[name] < 1:
            raise ValueError(f"--call {name} must be a positive whole number, got {options[name]}")
    # Some pipelines, such as Stable Diffusion's, use their default size if only the height or only the width is passed.
    defaults = {made.name: made.default for made in taken}
    for name, other in (("height", "width"), ("width", "height")):
        if name in options and other not in options and defaults.get(other, 0) is None:
            raise ValueError(f"--call {name}={options[name]} also needs the {other}. Pass both with --call")


def _weights(source: str | Path, network: Path, ema: bool) -> Path:
    """Return the folder of a network's weights or, if `ema` is true, of its averaged weights."""
    averaged = network.with_name(f"{network.name}_ema")
    exists = (averaged / "config.json").is_file()
    if ema and not exists:
        raise ValueError(f"{network.parent} has no averaged weights ({averaged.name}). Remove --ema")
    if exists and not ema:
        warnings.warn(
            f"the weights in {network} are used, but averaged weights (EMA) exist in {averaged}. To use the "
            f"averaged weights, run halfstep import diffusers {source} --ema",
            HalfstepWarning,
            stacklevel=3,
        )
    return averaged if ema else network


def _recorded(source: str | Path, folder: Path, pipeline: Pipeline, precision: BasePrecision) -> Model:
    """Record a pipeline's call, and return the teacher."""
    ema = pipeline.averaged
    places = {name: _weights(source, folder / name, ema) for name in DENOISERS if (folder / name).is_dir()}
    if (folder / "vae").is_dir() and not list((folder / "vae").glob("[!.]*.safetensors")):
        disk.check_files(folder / "vae", "diffusers.AutoencoderKL")
    if not (folder / "vae").is_dir() and disk.read_config(folder / "model_index.json").get("vae", [None])[0]:
        warnings.warn(
            f"{folder} has no vae, which decodes samples and belongs to an exported pipeline. Copy vae into this "
            "folder before you export a student",
            HalfstepWarning,
            stacklevel=3,
        )
    pipe = load_pipeline(folder, pipeline.kind, places=places)
    component = component_of(pipe)
    try:
        recording = record(pipe, pipeline.options)
    except ValueError as error:
        missing = sorted(name for name, part in pipe.components.items() if part is None and name not in OPTIONAL)
        raise ValueError(f"{folder} has no {', '.join(missing)}: {error}" if missing else str(error)) from None
    for name in GUIDANCES:
        if name in pipeline.options and (name != recording.guidance or recording.off is not None):
            raise ValueError(
                f"--call {name} has no effect, because the denoiser of this {pipeline.kind} does not take this scale "
                "as input. Remove it, and use --matching.guidance-scale (distill) or --guidance-scale (encode, sample)"
            )
    network = recording.network
    network.lower(precision)
    told = {"component": component, "guidance": recording.guidance, "off": recording.off, "scale": recording.scale}
    told["end"] = recording.end
    return teacher_of(
        network, recording.schedule, recording.shape, num_classes=recording.num_classes,
        conditions={} if recording.num_classes else conditions_of(network.call), null=recording.null,
        stage=Path(pipeline.folder).name, is_image=False, pipeline=pipeline.model_copy(update=told),
        source=_identity(pipeline.folder, places[component]),
    )  # fmt: skip


def _identity(origin: str, weights: Path) -> str:
    """Return the identity of a teacher: its folder name or its name on the Hub, and the digest of its weights.

    The folder's full path is omitted, because the same folder can have a different path on another machine.
    """
    name = Path(origin).name if Path(origin).is_absolute() else origin
    return f"{name} (weights sha256 {disk.digest_of(weights)})"


def teacher_of(network: StockNetwork, schedule: Schedule, shape: Sequence[int], **facts: Any) -> Model:
    """Return an imported network as a model; `facts` are further arguments of `Model.of`."""
    warn_of_signal(schedule.process)
    denoiser = NetworkDenoiser(network.eval(), schedule.process, schedule.prediction)
    return Model.of(denoiser, shape, clip=schedule.clip, objective="imported", start_steps=START_STEPS, **facts)


def _parts(folder: Path) -> tuple[Path, Path]:
    """Return the network folder and the scheduler config of a pixel pipeline."""
    # In diffusers, a part without its own folder is in the pipeline's root folder.
    network, scheduler = (folder / name if (folder / name).is_dir() else folder for name in ("unet", "scheduler"))
    return network, scheduler / "scheduler_config.json"


def read_kind(folder: Path) -> str:
    """Return the class of a folder's pipeline, after checking that the pipeline requires no custom code.

    Raises:
        ValueError: if the folder contains no pipeline, or if the pipeline requires custom code, is not a diffusers
            class, or lacks a part.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(
            f"{folder} has no model_index.json, so it is not a pipeline. Pass a pipeline saved by diffusers"
        )
    index = disk.read_config(folder / "model_index.json")
    kind = index.get("_class_name")
    foreign = [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and not (name.isidentifier() and value[:1] in ([None], ["diffusers"], ["transformers"]))
        # Parts that are specific to one pipeline are defined in that pipeline's module.
        and not (value and isinstance(value[0], str) and hasattr(stock("pipelines"), value[0]))
    ]
    code = foreign or sorted(file.name for file in folder.rglob("*.py"))
    if not isinstance(kind, str):
        code = [f"its class is {kind}"]
    code += ["auto_map"] * any("auto_map" in disk.read_config(file) for file in folder.glob("*/config.json"))
    if code:
        raise ValueError(f"{folder} requires custom code ({', '.join(code)}). Save it as a stock diffusers pipeline")
    if kind in PIXELS:
        return str(kind)
    if not isinstance(stock(str(kind), None), type):
        raise ValueError(f"{folder} contains a {kind}, which diffusers {stock('__version__')} does not have")
    if any(isinstance(value, list) and value[0] == "transformers" for value in index.values()):
        check_transformers(f"a {kind}")
    for name, value in index.items():
        if isinstance(value, list) and value[0] and name not in OPTIONAL and not (folder / name).is_dir():
            raise ValueError(f"{folder} has no {name}, a part of its pipeline. Save the pipeline with this part")
    return str(kind)


def load_pipeline(
    folder: Path,
    kind: str,
    device: str | torch.device = "cpu",
    is_whole: bool = True,
    places: Mapping[str, Path] | None = None,
) -> Any:
    """Load a pipeline in float32, without its safety checker.

    Args:
        is_whole: whether to load the weights of the denoiser and the VAE. Without these weights, the pipeline can only
            compute conditions.
        places: folders of the parts that are not in `folder`, by part name.

    Raises:
        ValueError: if a part cannot be read.
    """
    index, given = disk.read_config(folder / "model_index.json"), dict[str, Any]()
    for name, value in index.items():
        if not isinstance(value, list):
            continue
        # Pipelines reject a safety checker without a feature extractor, and neither affects the latents.
        is_left_out = name in OPTIONAL and not list((folder / name).glob("*.safetensors"))
        if value[0] is None or is_left_out or name == "safety_checker":
            given[name] = None
        elif list((folder / name).glob("*.safetensors")) or not is_light(folder / name):
            given[name] = _part(kind, name, value, (places or {}).get(name, folder / name), is_whole, device)
        elif (file := folder / name / "scheduler_config.json").is_file() and set(GONE) & set(disk.read_config(file)):
            # Current schedulers would ignore these old fields.
            given[name] = stock(value[1]).from_config(renewed(disk.read_config(file)))
    if "requires_safety_checker" in index:
        given["requires_safety_checker"] = False
    return disk.open_pipeline(folder, kind, given)


def _part(
    pipeline: str, part: str, declared: Sequence[str], folder: Path, is_whole: bool, device: str | torch.device
) -> Any:
    """Load a part with weights. `declared` contains its library and class from the pipeline's index."""
    library, name = declared
    if library == "diffusers":
        if name in disk.OLD_NAMES:
            taken = {kind.__name__ for kind in stock(pipeline)._get_signature_types()[part]}
            name = next((new for new in disk.OLD_NAMES[name] if new in taken), name)
        config = disk.check_config(folder, name)
        if not is_whole and part in (*DENOISERS, "vae"):
            disk.check_files(folder, f"diffusers.{name}")
            config = {field: value for field, value in config.items() if field != "quantization_config"}
            return on_meta(name, config, device)
    elif library != "transformers":
        library = f"diffusers.pipelines.{library}"
    return disk.open_part(folder, f"{library}.{name}").eval().to(device)


def is_light(folder: Path) -> bool:
    """Return whether a part has no weights, as is the case for tokenizers, processors and schedulers."""
    return not (folder / "config.json").is_file()


def on_meta(kind: str, config: Mapping[str, Any], device: str | torch.device) -> Any:
    """Return a network that reports `device` as its device, although its weights are on the meta device."""
    with quiet(), torch.device("meta"):
        network = stock(kind).from_config(dict(config))
    here, own = torch.device(device), type(network)
    network.__class__ = type(own.__name__, (own,), {"device": property(lambda _: here)})
    return network


def _plain_parts(folder: Path) -> tuple[Path, Path]:
    """Return the folder and scheduler config of a U-Net that was saved without a pipeline."""
    network = disk.plain_network(folder)
    if network is None:
        below = disk.networks_below(folder)
        where = f". Pass one of its subfolders, such as {below[-1]}" if below else ""
        raise ValueError(f"{folder} contains neither a pipeline (model_index.json) nor a network (config.json){where}")
    kind = disk.read_config(network / "config.json").get("_class_name")
    if kind != UNET:
        raise ValueError(f"{network} contains a {kind}, not a {UNET}. Pass the whole pipeline")
    for place in (folder / "scheduler", folder, network, network.parent / "scheduler", network.parent):
        if (place / "scheduler_config.json").is_file():
            return network, place / "scheduler_config.json"
    raise ValueError(
        f"{folder} has no scheduler_config.json, which defines the process and prediction. Write one, for example with "
        'diffusers\' DDPMScheduler(beta_schedule="linear", prediction_type="epsilon").save_pretrained(FOLDER)'
    )


def _network(folder: Path, schedule: Schedule) -> UNet2D:
    """Return the pixel U-Net in `folder`, without the output channels of a learned variance."""
    config = disk.check_config(folder, UNET)
    if schedule.is_flow:
        raise ValueError(
            f"{folder} contains a {UNET}, but the timesteps that this network expects for its scheduler's process "
            f"({type(schedule.process).__name__}) are unknown. Distil it in Python: halfstep.distill accepts any "
            "network"
        )
    if config.get("class_embed_type") is not None:
        raise ValueError(
            f"{folder} contains a {UNET} with class_embed_type {config['class_embed_type']!r}, an input that halfstep "
            "does not support. Distil it in Python: halfstep.distill accepts any conditions"
        )
    stock_model = disk.open_part(folder, f"diffusers.{UNET}")
    config = disk.known_fields(stock_model.config, folder, UNET)
    state = dict(stock_model.state_dict())
    channels = int(config["in_channels"])
    num_outputs = int(config.get("out_channels") or channels)
    if num_outputs not in (channels, 2 * channels):
        raise ValueError(
            f"{folder} takes {channels} channels and returns {num_outputs}: the two numbers must be equal, or the "
            "second must be twice the first if the variance is learned"
        )
    if num_outputs == 2 * channels:
        if not schedule.learned_variance:
            raise ValueError(
                f"{folder} returns {num_outputs} channels for {channels} input channels, but its scheduler's "
                "variance_type does not declare a learned variance. If the second half of the output is a learned "
                'variance, set variance_type to "learned_range"'
            )
        config["out_channels"] = channels
        for part in ("conv_out.weight", "conv_out.bias"):
            state[part] = state[part][:channels]
    network = UNet2D(config, num_train_timesteps=schedule.num_train_timesteps)
    network.model.load_state_dict(state)
    return network


def shape_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape of one sample, as declared in a network's config.

    Raises:
        ValueError: if the config does not contain a valid shape.
    """
    size = config.get("sample_size")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"the network's config has sample_size {size!r}: set it to the height and width of a sample")
    return int(config["in_channels"]), *sides
