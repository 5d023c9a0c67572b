"""Import of diffusers' pipelines, from a folder or the Hub, as teachers.

Process, prediction, clipping and conditions are read from the configs of scheduler and network; what they do not say is
asked for by name. Only safetensors are read, and no code of a repository is run.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from halfstep.core.denoiser import NetworkDenoiser, warn_of_signal
from halfstep.core.noise import FlowMatching, processes
from halfstep.core.prediction import predictions
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub.disk import (
    averaged_beside,
    check_config,
    digest_of,
    known_fields,
    networks_below,
    open_part,
    plain_network,
    read_config,
    refuse_single_file,
    scheduler_beside,
)
from halfstep.hub.encoding import release_texts, text_conditions
from halfstep.hub.schedulers import Schedule, read_schedule
from halfstep.models.model import Model
from halfstep.nets import SD3, DiT, StockNetwork, UNet2D, UNet2DCondition, describe_network
from halfstep.runs import Manifest, Outcome, Pipeline
from halfstep.runtime.files import first_line

START_STEPS: Final = 128
"""Default DDIM steps of an imported teacher at the start of its chain: a compromise between what steps lose and stages
cost. No table of 1000 levels has them as whole timesteps, so times between levels are interpolated."""


class Layout(NamedTuple):
    """How a pipeline of diffusers is laid out."""

    component: str
    """The folder of the network."""
    network: type[StockNetwork]
    is_image: bool
    """Whether the network makes images; latents if not."""
    text: bool = False
    """Whether it is shown a text."""


LAYOUTS: Final[dict[str, Layout]] = {
    "DDPMPipeline": Layout("unet", UNet2D, is_image=True),
    "DDIMPipeline": Layout("unet", UNet2D, is_image=True),
    "ConsistencyModelPipeline": Layout("unet", UNet2D, is_image=True),
    "DiTPipeline": Layout("transformer", DiT, is_image=False),
    "StableDiffusionPipeline": Layout("unet", UNet2DCondition, is_image=False, text=True),
    "StableDiffusion3Pipeline": Layout("transformer", SD3, is_image=False, text=True),
}
"""The pipelines that can be imported."""
FETCHED: Final = ("*.json", "*.txt", "*.model", "*/*.safetensors", "diffusion_pytorch_model*.safetensors")
"""Of a repository: neither pickles nor code, and no weights beside the parts, where many keep them all in one file."""
NOT_FETCHED: Final = ("*.fp16.*", "*.fp16-*", "*.bf16.*", "*.bf16-*", "*.non_ema.*", "*.non_ema-*")
"""Variants of the weights, which are not read."""


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
    path = Path(source).expanduser()
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

    try:
        return Path(snapshot_download(source, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED)))
    except Exception as error:  # the Hub's client has many errors of its own, and network libraries below it more
        raise ValueError(
            f"{source} is no folder here and could not be fetched from the Hub ({first_line(error)})"
        ) from None


def import_pipeline(source: str | Path, *, ema: bool = False) -> Model:
    """Load the network of a pipeline as a teacher, on the CPU in float32.

    Warns of averaged weights beside those that are taken, and of a last noise level that is no pure noise.

    Args:
        source: a folder that diffusers has saved, or a name on the Hub.
        ema: whether to take the averaged weights beside the network's own, such as unet_ema.

    Raises:
        ValueError: if it is pickled, wants code of its own, or a part of it is missing or not understood.
    """
    folder = fetch(str(source))
    kind, layout, network_folder, scheduler_file = _parts(folder)
    if not scheduler_file.is_file():
        raise ValueError(f"{folder} has no {scheduler_file.relative_to(folder)}: the pipeline was not saved whole")
    if (averaged := averaged_beside(network_folder)) is not None or ema:
        if averaged is None:
            raise ValueError(f"{folder} has no averaged weights ({network_folder.name}_ema). Remove --ema")
        if ema:
            network_folder = averaged
        else:
            warnings.warn(
                f"the weights in {network_folder} are taken, and averaged ones (EMA) lie in {averaged}. To take those, "
                f"run halfstep import diffusers {source} --ema",
                HalfstepWarning,
                stacklevel=2,
            )
    scheduler = read_config(scheduler_file)
    schedule = read_schedule(scheduler)
    warn_of_signal(schedule.process)
    if kind == "StableDiffusionPipeline" and not scheduler.get("thresholding"):
        # Latents have no bounds, and that pipeline turns clipping off where its scheduler's config leaves it on.
        schedule = replace(schedule, clip=False)
    network = _network(network_folder, layout, schedule)
    conditions: dict[str, tuple[int, ...]] = {}
    null: dict[str, Tensor] = {}
    num_classes = 0
    if layout.text:
        null = {name: value[0] for name, value in text_conditions(folder, [""]).items()}
        # Training needs the memory that the text encoders take.
        release_texts()
        conditions = {name: tuple(value.shape) for name, value in null.items()}
        needed = network.config.get("cross_attention_dim", network.config.get("joint_attention_dim"))
        found = conditions["encoder_hidden_states"][-1]
        if isinstance(needed, int) and needed != found:
            raise ValueError(
                f"the network takes texts of width {needed}, but the pipeline's text encoder makes {found}: the parts "
                "do not belong together"
            )
    elif isinstance(network, UNet2D):
        num_classes = int(network.config.get("num_class_embeds") or 0)
    elif isinstance(network, DiT):
        num_classes = int(network.config["num_embeds_ada_norm"])
        null = {"class_labels": torch.tensor(num_classes)}
    # A folder by its full path, and a name on the Hub as it is.
    origin = str(folder.resolve()) if folder == Path(source).expanduser() else str(source)
    manifest = Manifest(
        stage=folder.name,
        objective="imported",
        parent=None,
        outcome=Outcome(role="teacher"),
        start_steps=START_STEPS,
        num_updates=0,
        seconds=0.0,
        shape=shape_of(network.config),
        num_classes=num_classes,
        conditions=conditions,
        is_image=layout.is_image,
        clip=schedule.clip,
        network=describe_network(network),
        process=processes.describe(schedule.process),
        prediction=predictions.describe(schedule.prediction),
        pipeline=None if kind is None else Pipeline(kind=kind, folder=origin, component=layout.component),
        files={},
        source=f"{source} (weights sha256 {digest_of(network_folder)})",
    )
    return Model(NetworkDenoiser(network.eval(), schedule.process, schedule.prediction), manifest, null)


def _parts(folder: Path) -> tuple[str | None, Layout, Path, Path]:
    """The pipeline's class, its layout, the folder of the network and the config of the scheduler."""
    if not (folder / "model_index.json").is_file():
        return _plain_parts(folder)
    kind, layout = read_layout(folder)
    # As diffusers does: where a part has no folder of its own, it lies in the root.
    network, scheduler = (
        folder / name if (folder / name).is_dir() else folder for name in (layout.component, "scheduler")
    )
    return kind, layout, network, scheduler / "scheduler_config.json"


def read_layout(folder: Path) -> tuple[str, Layout]:
    """Return the class of the pipeline in a folder, and its layout; no file of the folder is code.

    Raises:
        ValueError: if there is none, it wants code of its own, is not understood, or lacks what it makes of texts.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} is no pipeline (no model_index.json): give a folder that diffusers has saved whole")
    index = read_config(folder / "model_index.json")
    kind = index.get("_class_name")
    foreign = [
        name
        for name, value in index.items()
        if isinstance(value, list)
        and not (name.isidentifier() and value[:1] in ([None], ["diffusers"], ["transformers"]))
        and not (value[:1] == ["stable_diffusion"] and name == "safety_checker")
    ]
    code = foreign or sorted(file.name for file in folder.rglob("*.py"))
    if not isinstance(kind, str):
        code = [f"its class is {kind}"]
    if code:
        raise ValueError(
            f"{folder} wants code of its own to be run ({', '.join(code)}), which halfstep refuses: save it as a "
            "pipeline that diffusers knows"
        )
    if kind not in LAYOUTS:
        raise ValueError(f"{folder} holds a {kind}, which is not understood: known are {', '.join(LAYOUTS)}")
    layout = LAYOUTS[kind]
    needed = ["text_encoder", "tokenizer"] if layout.text else []
    if kind == "StableDiffusion3Pipeline":
        # The third encoder of that pipeline may be left out, the second not.
        needed += ["text_encoder_2", "tokenizer_2"]
    for name in needed:
        if (index.get(name) or [None])[0] is None or not (folder / name).is_dir():
            raise ValueError(
                f"{folder} has no {name}, which a model of texts is conditioned by: save the pipeline with it"
            )
    return kind, layout


def _plain_parts(folder: Path) -> tuple[None, Layout, Path, Path]:
    network = plain_network(folder)
    if network is None:
        below = networks_below(folder)
        where = f". Give one of the folders in it, such as {below[-1]}" if below else ""
        raise ValueError(f"{folder} is no pipeline (no model_index.json) and holds no network (no config.json){where}")
    kind = read_config(network / "config.json").get("_class_name")
    if kind != UNet2D.stock:
        raise ValueError(
            f"{network} holds a {kind}, of which config.json does not say enough: give a whole pipeline (known without "
            f"one: {UNet2D.stock})"
        )
    scheduler = scheduler_beside(folder, network)
    if scheduler is None:
        raise ValueError(
            f"{folder} has no scheduler_config.json, and process and prediction are not guessed: write one, such as "
            'diffusers\' DDPMScheduler(beta_schedule="linear", prediction_type="epsilon").save_pretrained(FOLDER)'
        )
    return None, LAYOUTS["DDPMPipeline"], network, scheduler


def _network(folder: Path, layout: Layout, schedule: Schedule) -> StockNetwork:
    """The adapter with the weights in `folder`, without the channels of a learned variance."""
    name = layout.network.stock
    config = check_config(folder, name)
    if isinstance(schedule.process, FlowMatching) != (layout.network is SD3):
        raise ValueError(
            f"{folder} holds a {name}, whose clock of timesteps is not known for the process of its scheduler "
            f"({type(schedule.process).__name__}): known are tables of betas for U-Nets and DiT, and flow matching for "
            f"{SD3.stock}; in Python halfstep.distill takes any network"
        )
    # Inputs that no pipeline here feeds, or of which files do not say enough (the range of a learned guidance scale).
    for field in ("class_embed_type", "addition_embed_type", "encoder_hid_dim_type", "time_cond_proj_dim"):
        if config.get(field) is not None:
            raise ValueError(
                f"{folder} holds a {name} with {field} {config[field]!r}, an input that halfstep does not know: give "
                "a model without it, or distil it in Python (halfstep.distill), where conditions have any name"
            )
    stock_model = open_part(folder, f"diffusers.{name}")
    config = json.loads(json.dumps(known_fields(stock_model.config, folder, name)))
    state = dict(stock_model.state_dict())
    channels = int(config["in_channels"])
    puts_out = int(config.get("out_channels") or channels)
    if puts_out not in (channels, 2 * channels):
        raise ValueError(
            f"{folder} takes {channels} channels and puts out {puts_out}: as many are needed, or twice as many with a "
            "learned variance"
        )
    if puts_out == 2 * channels:
        if not schedule.learned_variance and layout.network is not DiT:
            raise ValueError(
                f"{folder} puts out {2 * channels} channels for {channels}, but its scheduler's variance_type says "
                'nothing of a learned variance: set variance_type to "learned_range" if the second half is one'
            )
        config["out_channels"] = channels
        last = "proj_out_2" if layout.network is DiT else "conv_out"
        for part in (f"{last}.weight", f"{last}.bias"):
            # DiT's last layer puts out (row of the patch, column, channel), channels fastest; a U-Net's channels alone.
            state[part] = state[part].unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)
    shift = {"shift": schedule.process.shift} if isinstance(schedule.process, FlowMatching) else {}
    network = layout.network(config, num_train_timesteps=schedule.num_train_timesteps, **shift)
    network.model.load_state_dict(state)
    return network


def read_sample_shape(folder: Path, layout: Layout) -> tuple[int, ...]:
    """Return the shape of a sample of the network of the pipeline in a folder."""
    return shape_of(read_config(folder / layout.component / "config.json"))


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
