"""`halfstep import`: import models as stages."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from halfstep.cli.usage import UsageError, parse, refuse_idle
from halfstep.cli.words import Screen
from halfstep.hub import config_of, import_google_pd, import_pipeline
from halfstep.models.folder import save_stage
from halfstep.models.model import Model
from halfstep.nets import BasePrecision
from halfstep.report.words import count
from halfstep.runs import StageFolder
from halfstep.runtime.files import refuse_taken, user_path


@dataclass
class ImportArguments:
    """Import a model as a stage, to sample or distil: a diffusers pipeline, or a checkpoint of the paper's authors
    (flax msgpack).
    """

    format: tyro.conf.Positional[Literal["diffusers", "google-pd"]]
    """diffusers: a text- or class-conditional pipeline with one denoiser, DDPM, DDIM or a UNet2DModel with a scheduler.
    google-pd: gs://gresearch/diffusion-distillation/{cifar,imagenet,bedroom,church}_{original,64,...,1}."""
    source: tyro.conf.Positional[str]
    """diffusers: a folder, or a name on the Hub. google-pd: a .msgpack file."""
    config: str | None = None
    """google-pd: cifar10, imagenet64, bedroom128, church128, or a .json with image_size, ch, multipliers,
    layers_per_block, attention, attention_head_dim, time_embedding_dim, num_classes, prediction, start_steps."""
    call: tuple[str, ...] = ()
    """diffusers: pipeline call arguments shared by all samples, such as height=512 width=512."""
    ema: bool = False
    """diffusers: use the averaged weights (unet_ema) instead of the network's own."""
    base_precision: BasePrecision = "float32"
    """diffusers: precision of the weights; below float32, students must be LoRA."""
    out: Path | None = None
    """Folder of the stage; imported/NAME by default."""


def _options_from(words: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE words into pipeline call arguments; a value that is not JSON is kept as text."""
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise UsageError(f"--call {word}: give NAME=VALUE, such as --call height=512 width=512")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def imported(
    source: str, call: Sequence[str], screen: Screen, *, ema: bool = False, precision: BasePrecision = "float32"
) -> Model:
    """Import a pipeline, after printing that this may take a while.

    Args:
        call: pipeline call arguments as typed, NAME=VALUE.
    """
    options = _options_from(call)
    # A folder, or a name on the Hub.
    if user_path(source).is_dir() or source.count("/") == 1:
        screen.say(f"importing {source}: loading it and recording its calls (minutes for a large pipeline)")
    return import_pipeline(source, options, ema=ema, precision=precision)


def import_(argv: Sequence[str]) -> None:
    arguments = parse(ImportArguments, argv, "halfstep import")
    out = arguments.out or Path("imported") / Path(arguments.source).stem
    if arguments.format == "diffusers":
        refuse_idle(arguments, "on diffusers", ("config",), {"config": "its folders have their own config"})
        refuse_taken(out)
        model = imported(
            arguments.source, arguments.call, Screen(), ema=arguments.ema, precision=arguments.base_precision
        )
        manifest = model.manifest.model_copy(update={"stage": out.name})
        manifest = save_stage(StageFolder(out), model.denoiser, manifest, model.null)
    else:
        why = {"ema": "its checkpoints contain averaged weights"}
        refuse_idle(arguments, "on google-pd", ("call", "base_precision", "ema"), why)
        if arguments.config is None:
            raise UsageError("--config is missing: cifar10, imagenet64, bedroom128, church128, or a .json file")
        manifest = import_google_pd(Path(arguments.source), config_of(arguments.config), out)
    kind = f"a {manifest.outcome.role}" + (f" of {count(manifest.num_steps, 'step')}" if manifest.num_steps else "")
    classes = count(manifest.num_classes, "class") if manifest.num_classes else "no classes"
    shown = f", conditioned on {', '.join(manifest.conditions)}" if manifest.conditions else ""
    meaning = f"predicts {manifest.prediction['type']}"
    Screen().say(f"{out}: {kind}, samples of shape {list(manifest.shape)}, {classes}, {meaning}{shown}")
