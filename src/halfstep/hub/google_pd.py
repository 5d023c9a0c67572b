"""Convert the checkpoints released by the authors of progressive distillation to stock diffusers networks.

The files are in flax's msgpack format. They contain the number `num_sample_steps` and, under `ema_params`, a tree of
arrays, each with a shape, a dtype name and bytes. The authors' U-Net differs from `UNet2DModel` in two ways, both of
which are folded exactly into the weights:

* The authors' clock is 1000 u with u = 2 / pi arctan(exp(-log_snr / 2)), whereas our network is called at timestep
  1000 u - 1. For a sinusoid of frequency f, (sin((k + 1) f), cos((k + 1) f)) is (sin(k f), cos(k f)) rotated by f.
  The first linear layer of our time embedding therefore includes this rotation.
* The authors' class embedding has a bias, which is added to every row of our class embedding.

Sources: Salimans & Ho 2022 (arXiv:2202.00512); the authors' unet.py, model.py and checkpoints.py; flax's
serialization.py.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, final

import msgpack
import numpy as np
import torch
from pydantic import NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import Tensor

from halfstep.core.noise import VPCosine
from halfstep.core.prediction import predictions
from halfstep.hub.pipelines import teacher_of
from halfstep.hub.schedulers import Schedule
from halfstep.hub.stock import in_one_line
from halfstep.models.folder import save_stage
from halfstep.nets import UNet2D, unet2d_config
from halfstep.registry import nearest
from halfstep.runs import Manifest, Outcome, StageFolder
from halfstep.runs.record import Record, problem_of
from halfstep.runtime.files import DamagedFile, read_json, refuse_taken, sha256_of

PROCESS: Final = VPCosine()
"""The noise process of all released models: the clipped cosine process."""


@final
class GooglePDConfig(Record):
    """A network's configuration for the authors' unet.py, and other settings that its checkpoint does not contain."""

    image_size: PositiveInt
    """Height and width."""
    ch: PositiveInt
    """Number of channels at the finest level."""
    multipliers: tuple[int, ...]
    """Number of channels at each level as a multiple of `ch`, from the finest level."""
    layers_per_block: PositiveInt
    """Number of residual blocks per level of the encoder. The decoder has one more block per level."""
    attention: tuple[bool, ...]
    """Whether each level has self-attention."""
    attention_head_dim: PositiveInt
    """Number of channels per attention head."""
    time_embedding_dim: PositiveInt
    """Width of the time and class embeddings."""
    num_classes: NonNegativeInt = 0
    """Number of classes, or 0 for an unconditional network."""
    prediction: Literal["x0", "eps", "v", "both"]
    """The network's prediction type."""
    start_steps: PositiveInt
    """Number of steps of the first teacher in the chain."""

    @model_validator(mode="after")
    def _same_length(self) -> "GooglePDConfig":
        one, other = len(self.multipliers), len(self.attention)
        if one == 0 or one != other:
            raise ValueError(f"multipliers and attention need one entry per level, but have {one} and {other} entries")
        return self


_LSUN: Final = GooglePDConfig(
    image_size=128, ch=64, multipliers=(1, 2, 4, 6, 8), layers_per_block=3, attention=(False, False, True, True, True),
    attention_head_dim=64, time_embedding_dim=768, prediction="both", start_steps=1024,
)  # fmt: skip
CONFIGS: Final[dict[str, GooglePDConfig]] = {
    "cifar10": GooglePDConfig(
        image_size=32, ch=256, multipliers=(1, 1, 1), layers_per_block=3, attention=(False, True, True),
        attention_head_dim=256, time_embedding_dim=1024, prediction="x0", start_steps=8192,
    ),
    "imagenet64": GooglePDConfig(
        image_size=64, ch=192, multipliers=(1, 2, 3, 4), layers_per_block=3, attention=(False, True, True, True),
        attention_head_dim=64, time_embedding_dim=768, num_classes=1000, prediction="both", start_steps=1024,
    ),
    "bedroom128": _LSUN,
    "church128": _LSUN,
}  # fmt: skip
"""The released models' configurations."""


def config_of(text: str) -> GooglePDConfig:
    """Return the configuration called `text` in `CONFIGS`, or read a `GooglePDConfig` from the .json file `text`.

    Raises:
        ValueError: if the name is unknown or if the file is not valid.
    """
    if text in CONFIGS:
        return CONFIGS[text]
    if not text.endswith(".json"):
        known = ", ".join(CONFIGS)
        raise ValueError(f"unknown configuration {text!r}{nearest(text, CONFIGS)} (known: {known}, or a .json file)")
    try:
        return GooglePDConfig.model_validate(read_json(Path(text)))
    except ValidationError as error:
        raise ValueError(f"{text}: {problem_of(error)}") from None


class Checkpoint(NamedTuple):
    """The parts of a checkpoint that an import needs."""

    params: Mapping[str, np.ndarray]
    """Arrays by path, such as "down_0.block_0/conv1/kernel"."""
    num_steps: int
    """The model's number of sampler steps, or 0 if unknown."""


def _array(code: int, data: bytes) -> np.ndarray:
    """Decode flax's extension types for arrays (1) and scalars (3). Checkpoints contain no complex numbers (2)."""
    if code not in (1, 3):
        raise ValueError(f"an entry has the msgpack extension type {code}, which is not a flax array")
    shape, name, content = msgpack.unpackb(data, raw=False)
    kind = np.dtype(name)
    if kind.kind not in "fiub":
        raise ValueError(f"an array has the dtype {name!r}, which is not a plain numeric type")
    if any(not isinstance(length, int) or length < 0 for length in shape):
        raise ValueError(f"an array has the invalid shape {shape!r}")
    # The array is a view of the file's bytes, so a wrong shape raises an error without allocating memory.
    return np.frombuffer(content, dtype=kind).reshape(shape)


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value.get("__msgpack_chunked_array__"):
            chunks = [value["chunks"][str(index)] for index in range(len(value["chunks"]))]
            shape = [int(value["shape"][str(index)]) for index in range(len(value["shape"]))]
            yield path, np.concatenate([chunk.ravel() for chunk in chunks]).reshape(shape)
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{path}/")
        elif isinstance(value, np.ndarray):
            yield path, value
        else:
            raise ValueError(f"{path} is not an array")


def read_checkpoint(file: Path) -> Checkpoint:
    """Read the checkpoint in `file`.

    Raises:
        DamagedFile: if the file does not exist, is truncated, or is not a checkpoint written by the authors' code.
    """
    if not file.is_file():
        raise DamagedFile(f"{file} {'is a folder' if file.is_dir() else 'does not exist'}: pass a .msgpack checkpoint")
    try:
        tree = msgpack.unpackb(file.read_bytes(), ext_hook=_array, raw=False, strict_map_key=False)
        if not isinstance(tree, Mapping) or not isinstance(tree.get("ema_params"), Mapping):
            raise ValueError("it has no ema_params")
        params = dict(_flat(tree["ema_params"]))
        steps = tree.get("num_sample_steps") or 0
        if isinstance(steps, np.ndarray):
            steps = steps.item()
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"its num_sample_steps is {steps!r}")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, msgpack.UnpackException) as error:
        raise DamagedFile(
            f"{file} is truncated, or was not written by the authors' code ({in_one_line(error)}). Pass one of the "
            "authors' .msgpack files"
        ) from None
    return Checkpoint(params, steps)


class _Place(NamedTuple):
    """The location of one of our tensors in the authors' tree."""

    path: str
    shape: tuple[int, ...]
    """Expected shape of the array, up to joined axes and axes of length 1."""
    axes: tuple[int, ...]
    """Axis permutation that turns the array into the tensor."""


_NAMES: Final = {
    "time_embedding.linear_1": "dense0",
    "time_embedding.linear_2": "dense1",
    "class_embedding": "class_emb",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}
_PARTS: Final = {
    "group_norm": "norm",
    "time_emb_proj": "temb_proj",
    "conv_shortcut": "nin_shortcut",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_BLOCKS: Final = {
    "resnets": "block_{}", "attentions": "attn_{}", "downsamplers": "downsample", "upsamplers": "upsample",
}  # fmt: skip


def _place(name: str, shape: tuple[int, ...], levels: int) -> _Place:
    """Return the location of a UNet2DModel's tensor `name` in the authors' tree."""
    module, _, kind = name.rpartition(".")
    for ours, theirs in _NAMES.items():
        if module == ours or module.startswith(f"{ours}."):
            module = theirs + module.removeprefix(ours).replace(".", "/", 1)
            break
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", module):
        side, block, part, number, inner = found.groups()
        level = int(block) if side == "down" else levels - 1 - int(block)
        module = f"{side}_{level}.{_BLOCKS[part].format(number)}/{inner}"
    head, slash, part = module.rpartition("/")
    module = head + slash + _PARTS.get(part, part)
    if len(shape) == 1:
        return _Place(f"{module}/{'bias' if kind == 'bias' else 'scale'}", shape, (0,))
    if name == "class_embedding.weight":
        return _Place(f"{module}/kernel", shape, (0, 1))
    if len(shape) == 4 and shape[2:] != (1, 1):
        return _Place(f"{module}/kernel", (shape[2], shape[3], shape[1], shape[0]), (3, 2, 0, 1))
    return _Place(f"{module}/kernel", (shape[1], shape[0]), (1, 0))


def _regroups(got: tuple[int, ...], needed: tuple[int, ...]) -> bool:
    """Return whether two shapes differ only in joined axes and axes of length 1, as they do between flax versions."""

    def marks(shape: tuple[int, ...]) -> set[int]:
        return {math.prod(shape[: index + 1]) for index, length in enumerate(shape) if length != 1}

    a, b = marks(got), marks(needed)
    return math.prod(got) == math.prod(needed) and (a <= b or b <= a)


def convert(params: Mapping[str, np.ndarray], config: GooglePDConfig) -> UNet2D:
    """Return the stock network with the checkpoint's weights.

    Raises:
        ValueError: if a tensor is missing, is unused or has the wrong shape; the message names the first such tensor.
    """
    network = empty_network(config)
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in network.model.state_dict().items():
        place = _place(name, tuple(tensor.shape), len(config.multipliers))
        if (array := params.get(place.path)) is None:
            raise ValueError(f"it has no tensor {place.path} of shape {list(place.shape)}")
        if not _regroups(array.shape, place.shape):
            got, needed = list(array.shape), list(place.shape)
            raise ValueError(f"the tensor {place.path} has shape {got}, but {needed} is needed")
        used.add(place.path)
        value = torch.from_numpy(np.array(array, np.float64)).reshape(place.shape)
        state[name] = value.permute(place.axes).reshape(tensor.shape)
    if config.num_classes:
        used.add("class_emb/bias")
        if "class_emb/bias" not in params:
            raise ValueError("it has no tensor class_emb/bias")
        state["class_embedding.weight"] += torch.from_numpy(np.array(params["class_emb/bias"], np.float64))
    if left := sorted(set(params) - used):
        raise ValueError(f"the tensor {left[0]} of shape {list(params[left[0]].shape)} is not part of the network")
    weight = "time_embedding.linear_1.weight"
    state[weight] = _earlier_by_one(state[weight])
    network.to_empty(device="cpu")
    network.model.load_state_dict({name: value.float() for name, value in state.items()})
    return network.eval()


def _earlier_by_one(weight: Tensor) -> Tensor:
    """Return the weight `[embedding, channels]` that has the same effect at k as `weight` at k + 1."""
    sine, cosine = weight.chunk(2, dim=1)
    half = sine.shape[1]
    frequency = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000) / (half - 1)))
    turned = torch.complex(sine, cosine) * torch.polar(torch.ones_like(frequency), frequency)
    return torch.cat([turned.real, turned.imag], dim=1)


def empty_network(config: GooglePDConfig) -> UNet2D:
    """Return a configuration's network on the meta device."""
    first, last = (2 / math.pi * math.atan(math.exp(-bound / 2)) for bound in (20.0, -20.0))
    with torch.device("meta"):
        return UNet2D(
            unet2d_config(
                size=(config.image_size, config.image_size),
                in_channels=3,
                out_channels=3 * predictions[config.prediction].channels,
                block_out_channels=[config.ch * multiplier for multiplier in config.multipliers],
                layers_per_block=config.layers_per_block,
                attention=config.attention,
                attention_head_dim=config.attention_head_dim,
                norm_eps=1e-6,
                resample="resnet",
                time_embedding_dim=config.time_embedding_dim,
                flip_sin_to_cos=False,
                freq_shift=1,
                num_classes=config.num_classes,
            ),
            num_train_timesteps=1000,
            clock_range=(first, last),
        )


def import_google_pd(file: Path, config: GooglePDConfig, out: Path) -> Manifest:
    """Convert the checkpoint in `file` to a stage, and write the stage to the folder `out`.

    Raises:
        ValueError: if the file is damaged, contains non-finite values or does not match the configuration, or if `out`
            is not empty. In each case, nothing is written.
    """
    refuse_taken(out)
    checkpoint = read_checkpoint(file)
    for name, array in checkpoint.params.items():
        if not np.isfinite(np.asarray(array, np.float64)).all():
            raise ValueError(f"{file} has non-finite values in {name}. Use another checkpoint")
    try:
        network = convert(checkpoint.params, config)
    except ValueError as error:
        raise ValueError(f"{file} does not match the configuration: {error}. Choose another --config") from None
    schedule = Schedule(PROCESS, predictions[config.prediction](), True, network.num_train_timesteps, False)
    model = teacher_of(
        network, schedule, (3, config.image_size, config.image_size), num_classes=config.num_classes,
        stage=out.name, source=f"{file.name} sha256 {sha256_of(file)}",
    )  # fmt: skip
    told: dict[str, Any] = {"start_steps": config.start_steps}
    # The first teacher of a chain can be sampled with any number of steps.
    if 0 < checkpoint.num_steps < config.start_steps:
        told["outcome"] = Outcome(role="student", num_steps=checkpoint.num_steps)
    return save_stage(StageFolder(out), model.denoiser, model.manifest.model_copy(update=told))
