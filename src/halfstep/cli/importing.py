"""`halfstep import`: imports models as stages."""

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
    """Import a model as a stage, so that you can sample from it or distil it. The model is either a diffusers pipeline
    or a checkpoint published by the paper's authors (flax msgpack).
    """

    format: tyro.conf.Positional[Literal["diffusers", "google-pd"]]
    """diffusers: a text- or class-conditional pipeline with one denoiser, a DDPM or DDIM pipeline, or a UNet2DModel
    with a scheduler. google-pd: one of the checkpoints
    gs://gresearch/diffusion-distillation/{cifar,imagenet,bedroom,church}_{original,64,...,1}."""
    source: tyro.conf.Positional[str]
    """diffusers: a folder, or a name on the Hub. google-pd: a .msgpack file."""
    config: str | None = None
    """google-pd: cifar10, imagenet64, bedroom128, church128, or a .json file with image_size, ch, multipliers,
    layers_per_block, attention, attention_head_dim, time_embedding_dim, num_classes, prediction and start_steps."""
    call: tuple[str, ...] = ()
    """diffusers: arguments of the pipeline call for all samples, such as height=512 width=512."""
    ema: bool = False
    """diffusers: use the network's averaged weights (unet_ema) instead of its unaveraged weights."""
    base_precision: BasePrecision = "float32"
    """diffusers: precision of the weights; if it is below float32, only LoRA students can be trained."""
    out: Path | None = None
    """Folder to write the stage to; imported/NAME by default."""


def _options_from(words: Sequence[str]) -> dict[str, Any]:
    """Parse words of the form NAME=VALUE into arguments for the pipeline. A value that is not valid JSON becomes a
    string.
    """
    options: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not (name.isidentifier() and equals):
            raise UsageError(f"--call {word} is not of the form NAME=VALUE. Use, for example, --call height=512")
        if name in options:
            raise UsageError(f"--call sets {name} twice. Remove one of them")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def imported(
    source: str, call: Sequence[str], screen: Screen, *, ema: bool = False, precision: BasePrecision = "float32"
) -> Model:
    """Print a notice that the import may take a while, then import a pipeline.

    Args:
        call: the pipeline arguments as typed by the user, each in the form NAME=VALUE.
    """
    options = _options_from(call)
    # Any other source is rejected immediately.
    if user_path(source).is_dir() or source.count("/") == 1:
        screen.say(f"importing {source}: loading it and recording its calls (this takes minutes for a large pipeline)")
    return import_pipeline(source, options, ema=ema, precision=precision)


def import_(argv: Sequence[str]) -> None:
    arguments = parse(ImportArguments, argv, "halfstep import")
    source = user_path(arguments.source)
    # A folder or a name on the Hub may contain a dot, and "." or ".." has no name of its own.
    name = source.stem if source.suffix == ".msgpack" else source.resolve().name
    out = arguments.out or Path("imported") / name
    if arguments.format == "diffusers":
        refuse_idle(arguments, "with diffusers", ("config",), {"config": "a pipeline's folder contains its config"})
        refuse_taken(out)
        model = imported(
            arguments.source, arguments.call, Screen(), ema=arguments.ema, precision=arguments.base_precision
        )
        manifest = model.manifest.model_copy(update={"stage": out.name})
        manifest = save_stage(StageFolder(out), model.denoiser, manifest, model.null)
    else:
        why = {"ema": "the checkpoints already contain averaged weights"}
        refuse_idle(arguments, "with google-pd", ("call", "base_precision", "ema"), why)
        if arguments.config is None:
            raise UsageError("--config is missing. Use cifar10, imagenet64, bedroom128, church128 or a .json file")
        manifest = import_google_pd(Path(arguments.source), config_of(arguments.config), out)
    kind = f"a {manifest.outcome.role}" + (f" of {count(manifest.num_steps, 'step')}" if manifest.num_steps else "")
    classes = count(manifest.num_classes, "class") if manifest.num_classes else "no classes"
    shown = f", conditioned on {', '.join(manifest.conditions)}" if manifest.conditions else ""
    meaning = f"predicts {manifest.prediction['type']}"
    Screen().say(f"{out}: {kind}, samples of shape {list(manifest.shape)}, {classes}, {meaning}{shown}")
