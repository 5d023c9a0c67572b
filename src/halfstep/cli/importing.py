"""`halfstep import`: models from elsewhere, as stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from halfstep.cli.arguments import UsageError, parse
from halfstep.hub import config_of, import_google_pd


@dataclass
class ImportArguments:
    """Turn a checkpoint of the paper's authors (flax msgpack) into a stage that samples and continues the chain."""

    format: tyro.conf.Positional[Literal["google-pd"]]
    """google-pd: gs://gresearch/diffusion-distillation/{cifar,imagenet,bedroom,church}_{original,64,...,1}."""
    file: tyro.conf.Positional[Path]
    """The .msgpack file."""
    config: str | None = None
    """cifar10, imagenet64, bedroom128, church128, or a .json with image_size, ch, multipliers, layers_per_block,
    attention, attention_head_dim, time_embedding_dim, num_classes, prediction, start_steps."""
    out: Path | None = None
    """Folder of the stage; imported/NAME by default."""


def import_(argv: Sequence[str]) -> None:
    """Imports a checkpoint and says what it is."""
    arguments = parse(ImportArguments, argv, "halfstep import")
    if arguments.config is None:
        raise UsageError("--config is missing: cifar10, imagenet64, bedroom128, church128, or a .json file")
    out = arguments.out or Path("imported") / arguments.file.stem
    manifest = import_google_pd(arguments.file, config_of(arguments.config), out)
    kind = "a teacher" if manifest.num_steps is None else f"a student of {manifest.num_steps} steps"
    classes = f"{manifest.num_classes} classes" if manifest.num_classes else "no classes"
    print(f"{out}: {kind}, samples of shape {list(manifest.shape)}, {classes}, predicts {manifest.prediction}")
