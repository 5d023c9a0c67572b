"""`halfstep export` and `halfstep encode`: export models for other tools, encode data as latents."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from halfstep.cli.arguments import device_of, processes_of
from halfstep.cli.importing import imported
from halfstep.cli.usage import Count, Rate, Side, Steps, Switch, UsageError, in_own_words, parse
from halfstep.cli.words import Screen, duration
from halfstep.data import (
    CaptionedClips,
    CaptionedImages,
    LatentData,
    Prompts,
    read_captions,
    read_classes,
    read_clips,
    read_prompts,
)
from halfstep.data import encode as encode_images
from halfstep.data.images import Preparation
from halfstep.hub import (
    PIXELS,
    Autoencoder,
    autoencoder_of,
    encoder_of,
    export_lora,
    export_onnx,
    export_pipeline,
    export_web,
    fetch,
    prompts_of,
    push_to_hub,
    read_kind,
    release_texts,
)
from halfstep.models.folder import find_stage, load
from halfstep.models.model import Model
from halfstep.nets import BasePrecision, precision_of
from halfstep.report.words import count
from halfstep.run.own_samples import NUM_STEPS, prompted_by
from halfstep.runs import RunFolder, StageFolder
from halfstep.runtime.files import read_json, refuse_file, refuse_taken
from halfstep.runtime.processes import Processes


@dataclass
class ExportArguments:
    """Export a model for other tools: halfstep export runs/digits --format diffusers --out digits-4."""

    model: tyro.conf.Positional[Path]
    """Folder of a run (its last stage is used) or of a stage."""
    out: Path
    """diffusers, lora, web: a folder. onnx: a .onnx file. web with --single-file: an .html file."""
    format: Literal["diffusers", "lora", "onnx", "web"] = "diffusers"
    """diffusers: a stock pipeline with its scheduler and a model card. lora: the weights of a LoRA student, for
    pipe.load_lora_weights. onnx: the whole sampler as one graph from noise to x0. web: a page that samples in the
    browser.
    """
    num_steps: Steps | None = None
    """onnx, web: sampler steps; the model's own by default. Without it, web exports every student of a run."""
    push_to_hub: str | None = None
    """diffusers, lora: upload the folder to this repository on the Hub, OWNER/NAME."""
    single_file: Switch = False
    """web: write a single HTML file, which also works from disk."""
    runtime: Path | None = None
    """web: local copy of the npm package onnxruntime-web; downloaded once by default."""


def export(argv: Sequence[str]) -> None:
    """Export a model for other tools."""
    arguments = parse(ExportArguments, argv, "halfstep export")
    is_onnx, is_web = arguments.format == "onnx", arguments.format == "web"
    if not (is_onnx or is_web) and arguments.num_steps is not None:
        raise UsageError(
            f"--num-steps {arguments.num_steps} has no effect on --format {arguments.format}: the exported pipeline "
            f"takes the number of steps at each call. Remove it"
        )
    if (is_onnx or is_web) and arguments.push_to_hub is not None:
        raise UsageError(f"--push-to-hub only uploads model folders, not --format {arguments.format}: remove it")
    for option, is_given in (("--single-file", arguments.single_file), ("--runtime", arguments.runtime is not None)):
        if is_given and not is_web:
            raise UsageError(f"{option} only applies to --format web. Remove it.")
    if is_onnx and arguments.out.suffix != ".onnx":
        raise UsageError(f"--out {arguments.out}: give a file that ends in .onnx")
    if is_web:
        _export_page(arguments)
        return
    stage = find_stage(arguments.model)
    model = load(stage.path)
    if is_onnx:
        refuse_taken(arguments.out, is_file=True)
        export_onnx(model, arguments.out, arguments.num_steps)
        steps = model.check_steps(arguments.num_steps)
        Screen().say(f"{arguments.out}: {count(steps, 'step')} from noise to x0, checked against torch")
        return
    if arguments.format == "lora":
        base = model.manifest.base
        added_to = None if base is None else StageFolder(stage.path.parent / base).manifest(verify=False)
        export_lora(model, arguments.out, added_to, arguments.push_to_hub)
        Screen().say(f"{arguments.out}: LoRA weights; see README.md for how to use them")
    else:
        export_pipeline(model, arguments.out, stage.metrics(), arguments.push_to_hub)
        kind = read_json(arguments.out / "model_index.json")["_class_name"]
        Screen().say(f"{arguments.out}: a {kind}; see README.md for how to use it")
    if arguments.push_to_hub is not None:
        Screen().say(push_to_hub(arguments.out, arguments.push_to_hub))


def _export_page(arguments: ExportArguments) -> None:
    if arguments.single_file and arguments.out.suffix != ".html":
        raise UsageError(f"--out {arguments.out}: give a file that ends in .html")
    students: dict[int, StageFolder] = {}
    for folder in RunFolder(arguments.model).stages() if arguments.num_steps is None else ():
        manifest = folder.manifest(verify=False)
        if manifest.outcome.role == "student" and manifest.num_steps is not None and manifest.weights_kept:
            # A later student replaces an earlier one with the same number of steps.
            students[manifest.num_steps] = folder
    models: list[tuple[Model, int | None]] = [(load(students[steps].path), steps) for steps in sorted(students)]
    if not models:
        models = [(load(find_stage(arguments.model).path), arguments.num_steps)]
    title, out = arguments.model.resolve().name, arguments.out
    size = export_web(models, out, title, arguments.single_file, arguments.runtime)
    opened = "open it in a browser" if arguments.single_file else f"serve it: python -m http.server --directory {out}"
    Screen().say(f"{out}: {size / 1e6:.1f} MB; {opened}")


@dataclass
class EncodeArguments:
    """Encode images, videos or sounds with captions or classes once, with a latent pipeline's own VAE and text
    encoders: halfstep encode PIPELINE --data FOLDER --out latents. Without data, sample it from prompts: halfstep
    encode PIPELINE --prompts prompts.txt --out latents. To resume, run the same command again.
    """

    pipeline: tyro.conf.Positional[str]
    """Folder of the pipeline, or its name on the Hub."""
    out: Path
    """Folder of the latents."""
    data: str | None = None
    """Images, videos (files or folders of frames) or sounds with captions (metadata.jsonl, .csv or .parquet, or a .txt
    file for each) for a text-conditioned model; one folder of images per class, in the order of the class names, for a
    class-conditional model.
    """
    prompts: Path | None = None
    """Text file with one prompt per line, instead of images; the latents are the pipeline's own samples."""
    num_steps: Steps = NUM_STEPS
    """With --prompts: Heun steps per sample."""
    guidance_scale: float | None = None
    """With --prompts: guidance scale of the samples; none by default."""
    seed: int = 0
    """With --prompts: seed of the noise."""
    image_size: Side | None = None
    """Height and width to resize images to; by default their common size."""
    frame_rate: Rate | None = None
    """Frames per second to take from video files; all by default."""
    call: tuple[str, ...] = ()
    """Pipeline call arguments, such as height=512 width=512."""
    base_precision: BasePrecision = "float32"
    """With --prompts: precision of the weights, the same as in the run."""
    batch_size: Count = 8
    """Samples encoded at once."""
    device: str | None = None
    """Device of the encoders; by default cuda if available."""


def encode(argv: Sequence[str]) -> None:
    """Encode images and texts with a pipeline's own parts."""
    arguments = parse(EncodeArguments, argv, "halfstep encode")
    processes = processes_of(arguments.device == "cpu")
    device = device_of(arguments.device, processes)
    if (arguments.data is None) == (arguments.prompts is None):
        raise UsageError("give either --data with captioned images, or --prompts with texts")
    if arguments.data is not None and arguments.base_precision != "float32":
        raise UsageError("--base-precision only applies to --prompts. Remove it")
    refuse_file(arguments.out)
    kind = read_kind(fetch(arguments.pipeline))
    if kind in PIXELS:
        raise UsageError(
            f"{arguments.pipeline} contains a {kind}, which does not use latents: pass its images to distill directly"
        )
    screen = Screen()
    if arguments.prompts is not None:
        model = imported(arguments.pipeline, arguments.call, screen, precision=arguments.base_precision)
        found = sample_prompts(
            model, arguments.prompts, arguments.out, arguments.guidance_scale, arguments.num_steps, arguments.seed,
            arguments.batch_size, device, processes, screen,
        )  # fmt: skip
        latents = count(len(found), "latent")
        screen.say(f"{arguments.out}: {latents} of shape {list(found.shape)} sampled from their prompts")
        return
    model = imported(arguments.pipeline, arguments.call, screen)
    autoencoder = autoencoder_of(model, device)
    images, names = _data(arguments, autoencoder, model)
    encoder = encoder_of(model, autoencoder, device, names)
    # Detect unreadable parts before creating the folder, which is tied to these encoders.
    encoder.texts([""])
    encoder.images(images.x0([0]))
    with in_own_words("image-size"):
        found = encode_images(
            images,
            encoder,
            arguments.out,
            arguments.batch_size,
            on_progress=progress_of("encoded", screen),
            class_names=names,
            processes=processes,
        )
    release_texts()
    shown = f"of {count(len(names), 'class')}" if names else "with their texts"
    screen.say(f"{arguments.out}: {count(len(found), 'latent')} of shape {list(found.shape)} {shown}")


def _data(
    arguments: EncodeArguments, autoencoder: Autoencoder, model: Model
) -> tuple[CaptionedImages | CaptionedClips, tuple[str, ...]]:
    """Return the data to encode, checked as far as possible without decoding all of it, and the class names."""
    assert arguments.data is not None
    source, size = Path(arguments.data), autoencoder.image_size
    for option, value, is_used in (
        ("--image-size", arguments.image_size, size is not None),
        ("--frame-rate", arguments.frame_rate, len(autoencoder.decoded) == 4 and size is None),
    ):
        if value is not None and not is_used:
            raise UsageError(f"{option} has no effect on this pipeline. Remove it")
    if size is None:
        assert model.manifest.pipeline is not None
        preparation = autoencoder.preparation(
            arguments.frame_rate, model.manifest.pipeline.options.get("audio_end_in_s")
        )
        clips = read_clips(source, preparation)
        clips.check()
        return clips, ()
    with in_own_words("image-size"):
        pixels = Preparation(arguments.image_size, channels=3)
        images, names = read_classes(source, pixels) if model.num_classes else (read_captions(source, pixels), ())
        height, width = images.x0([0]).shape[2:]
    if (height, width) != size:
        remedy = f"add --image-size {size[0]}" if size[0] == size[1] else "resize the images"
        raise UsageError(
            f"{images.files[0]} has {width} x {height} pixels, but {arguments.pipeline} takes {size[1]} x {size[0]}: "
            f"{remedy}, or change the pipeline's size with --call height={height} width={width}"
        )
    return images, names


def progress_of(verb: str, screen: Screen) -> Callable[[int, int], None]:
    """Return a function of the finished and of all samples that prints them, with the time left at the pace so far."""
    start: tuple[int, float] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal start
        now = time.monotonic()
        start = start or (done, now)
        made, spent = done - start[0], now - start[1]
        left = f", {duration(spent / made * (total - done))} left" if made and done < total else ""
        screen.say(f"{verb} {done} of {total}{left}")

    return progress


def sample_prompts(
    model: Model, prompts: Path, out: Path, guidance_scale: float | None, num_steps: int, seed: int, batch_size: int,
    device: torch.device, processes: Processes, screen: Screen,
) -> LatentData:  # fmt: skip
    """Sample prompts with a teacher into a folder, skipping existing samples, and free the text encoders.

    Args:
        processes: those that share the sampling.

    Raises:
        ValueError: if there are no prompts, the model takes none, or the folder contains other data.
    """
    if not model.manifest.conditions:
        raise UsageError(f"{model.manifest.stage} takes no prompts: give --data")
    captions = read_prompts(prompts)
    encoder = prompts_of(model, device)
    lowered = precision_of(model.denoiser.network)
    key = encoder.key if lowered == "float32" else f"{encoder.key} {lowered}"
    told = f"{key} steps {num_steps} guidance {guidance_scale} seed {seed}"
    sampled = prompted_by(
        model.to(device), len(captions), num_steps=num_steps, guidance_scale=guidance_scale, seed=seed
    )
    try:
        return encode_images(
            Prompts(str(prompts), captions, sampled),
            replace(encoder, key=told),
            out,
            batch_size,
            on_progress=progress_of("sampled", screen),
            processes=processes,
        )
    finally:
        release_texts()
        model.to("cpu")
