"""`halfstep export` and `halfstep encode`: models to other tools, images and texts to latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from halfstep.cli.arguments import device_of
from halfstep.cli.usage import UsageError, check_least, in_own_words, parse
from halfstep.cli.words import console_for
from halfstep.data import encode as encode_images
from halfstep.data import read_captions, read_classes
from halfstep.data.images import Preparation
from halfstep.hub import (
    encoder_of,
    export_lora,
    export_onnx,
    export_pipeline,
    fetch,
    push_to_hub,
    read_layout,
    read_sample_shape,
    release_texts,
)
from halfstep.models.folder import find_stage, load
from halfstep.runs import StageFolder
from halfstep.runtime.files import read_json, refuse_taken


@dataclass
class ExportArguments:
    """Write a model as other tools read it: halfstep export runs/digits --format diffusers --out digits-4."""

    model: tyro.conf.Positional[Path]
    """Folder of a run (its last stage is meant) or of a stage."""
    out: Path
    """diffusers, lora: a folder. onnx: a .onnx file."""
    format: Literal["diffusers", "lora", "onnx"] = "diffusers"
    """diffusers: a stock pipeline with its scheduler and a card. lora: the low-rank additions of a LoRA student, as
    pipe.load_lora_weights reads them. onnx: the whole sampler as one graph, noise in, x0 out."""
    num_steps: int | None = None
    """onnx: steps of the sampler; those that the model was distilled for by default."""
    push_to_hub: str | None = None
    """diffusers, lora: repository on the Hub, OWNER/NAME, that then gets the folder."""


def export(argv: Sequence[str]) -> None:
    """Write a model as other tools read it."""
    arguments = parse(ExportArguments, argv, "halfstep export")
    is_onnx = arguments.format == "onnx"
    if not is_onnx and arguments.num_steps is not None:
        raise UsageError(
            f"--num-steps {arguments.num_steps} says nothing to --format {arguments.format}, whose pipeline is "
            "told when it is called: leave it out"
        )
    if is_onnx and arguments.push_to_hub is not None:
        raise UsageError("--push-to-hub is for folders, not for --format onnx: leave it out")
    if is_onnx and arguments.out.suffix != ".onnx":
        raise UsageError(f"--out {arguments.out}: give a file that ends in .onnx")
    stage = find_stage(arguments.model)
    model = load(stage.path)
    if is_onnx:
        refuse_taken(arguments.out, is_file=True)
        export_onnx(model, arguments.out, arguments.num_steps)
        steps = model.check_steps(arguments.num_steps)
        print(f"{arguments.out}: {steps} steps, noise in, x0 out, checked against torch")
        return
    if arguments.format == "lora":
        base = model.manifest.base
        added_to = None if base is None else StageFolder(stage.path.parent / base).manifest(verify=False)
        export_lora(model, arguments.out, added_to, arguments.push_to_hub)
        print(f"{arguments.out}: low-rank additions; README.md says how to use them")
    else:
        export_pipeline(model, arguments.out, stage.metrics(), arguments.push_to_hub)
        kind = read_json(arguments.out / "model_index.json")["_class_name"]
        print(f"{arguments.out}: a {kind}; README.md says how to use it")
    if arguments.push_to_hub is not None:
        print(push_to_hub(arguments.out, arguments.push_to_hub))


@dataclass
class EncodeArguments:
    """Encode images, and their captions or classes, once, by a latent pipeline's own VAE and text encoders:
    halfstep encode PIPELINE --data FOLDER --out latents. The same command again continues where it was."""

    pipeline: tyro.conf.Positional[str]
    """Folder of the pipeline, or its name on the Hub."""
    data: str
    """Images with captions (metadata.jsonl, .csv, .parquet or a .txt beside each) for a model of texts; images in a
    folder for each class, in the order of the names of its classes, for a model of classes."""
    out: Path
    """Folder of the latents."""
    image_size: int | None = None
    """Height and width to resize images to; by default the size that they all have."""
    batch_size: int = 8
    """Images encoded at once."""
    device: str | None = None
    """Where the encoders run: cuda if there is one by default."""


def encode(argv: Sequence[str]) -> None:
    """Encode images and texts by a pipeline's own parts."""
    arguments = parse(EncodeArguments, argv, "halfstep encode")
    check_least(arguments, 1, "batch_size", "image_size")
    device = device_of(arguments.device)
    folder = fetch(arguments.pipeline)
    kind, layout = read_layout(folder)
    if layout.is_image:
        raise UsageError(f"{folder} holds a {kind}, which makes no latents: give its images to distill as they are")
    preparation, source = Preparation(arguments.image_size, channels=3), Path(arguments.data)
    with in_own_words("image-size"):
        images, names = (read_captions(source, preparation), ()) if layout.text else read_classes(source, preparation)
    encoder = encoder_of(kind, folder, device, names)
    # What cannot be read is found before the folder is begun, which belongs to these very encoders.
    encoder.texts([""])
    needed = read_sample_shape(folder, layout)
    made = tuple(encoder.images(images.loaded([0]).fetch(torch.tensor([0])).x0).shape[1:])
    if made != needed:
        raise UsageError(
            f"images as large as {images.files[0]} become latents of shape {list(made)}, but the network of {folder} "
            f"takes {list(needed)}: choose another --image-size"
        )
    console = console_for()
    with in_own_words("image-size"):
        found = encode_images(
            images,
            encoder,
            arguments.out,
            arguments.batch_size,
            on_progress=lambda done, total: console.print(f"encoded {done} of {total}", highlight=False),
            class_names=names,
        )
    release_texts()
    shown = f"of {len(names)} classes" if names else "with their texts"
    print(f"{arguments.out}: {len(found)} latents of shape {list(found.shape)} {shown}")
