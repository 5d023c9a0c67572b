"""`halfstep export`: exports models for other tools. `halfstep encode`: encodes data as latents."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

import torch
import tyro
from pydantic.dataclasses import dataclass

from halfstep.cli.arguments import device_of, processes_of
from halfstep.cli.dry_run import check_alone, show_encoding
from halfstep.cli.importing import imported
from halfstep.cli.usage import Count, Guidance, Rate, Side, Steps, Switch, UsageError, in_own_words, parse, refuse_idle
from halfstep.cli.words import Screen
from halfstep.data import (
    CaptionedClips,
    CaptionedImages,
    Encoder,
    LatentData,
    Prompts,
    forecast,
    read_captions,
    read_classes,
    read_clips,
    read_prompts,
)
from halfstep.data import encode as encode_images
from halfstep.data.preparation import Preparation
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
from halfstep.report.words import count, duration
from halfstep.run.own_samples import NUM_STEPS, effective_scale, prompted_by, sampling_of
from halfstep.runs import RunFolder, StageFolder
from halfstep.runtime.failures import told_when_out_of_memory
from halfstep.runtime.files import read_json, refuse_file, refuse_taken
from halfstep.runtime.processes import Processes


@dataclass
class ExportArguments:
    """Export a model for use in other tools: halfstep export runs/digits --format diffusers --out digits-4."""

    model: tyro.conf.Positional[Path]
    """Folder of a stage or run. For a run, the last stage is used."""
    out: Path
    """Output folder; for onnx, a .onnx file; for web with --single-file, a .html file."""
    format: Literal["diffusers", "lora", "onnx", "web"] = "diffusers"
    """diffusers: a stock pipeline with its scheduler and a model card. lora: the weights of a LoRA student, for
    pipe.load_lora_weights. onnx: the whole sampler as one graph from noise to x0. web: a page that samples in the
    browser.
    """
    num_steps: Steps | None = None
    """For onnx and web: number of sampler steps. By default, onnx uses the model's own number of steps, and web exports
    every student of a run."""
    push_to_hub: str | None = None
    """For diffusers and lora: Hub repository, as OWNER/NAME, to upload the folder to."""
    single_file: Switch = False
    """For web: write a single HTML file, which a browser can also open from disk."""
    runtime: Path | None = None
    """For web: local copy of the npm package onnxruntime-web; by default, the package is downloaded once."""


IDLE: Final = {
    **dict.fromkeys(("diffusers", "lora"), ("num_steps", "single_file", "runtime")),
    "onnx": ("push_to_hub", "single_file", "runtime"),
    "web": ("push_to_hub",),
}
"""For each format, the options of `export` that have no effect."""
WHY_IDLE: Final = {
    "num_steps": "callers of the exported pipeline choose the number of steps",
    "push_to_hub": "only model folders can be uploaded",
}


def export(argv: Sequence[str]) -> None:
    arguments = parse(ExportArguments, argv, "halfstep export")
    out, repository, screen = arguments.out, arguments.push_to_hub, Screen()
    refuse_idle(arguments, f"with --format {arguments.format}", IDLE[arguments.format], WHY_IDLE)
    if arguments.format == "web":
        _export_page(arguments)
        return
    if arguments.format == "onnx" and out.suffix != ".onnx":
        raise UsageError(f"--out {out} is not an ONNX file. Choose a name that ends in .onnx")
    stage = find_stage(arguments.model)
    model = load(stage.path)
    if arguments.format == "onnx":
        refuse_taken(out, is_file=True)
        export_onnx(model, out, arguments.num_steps)
        steps = model.check_steps(arguments.num_steps)
        screen.say(f"{out}: {count(steps, 'step')} from noise to x0, checked against torch")
        return
    if arguments.format == "lora":
        base = model.manifest.base
        added_to = None if base is None else StageFolder(stage.path.parent / base).manifest(verify=False)
        export_lora(model, out, added_to, repository)
        screen.say(f"{out}: LoRA weights; README.md in this folder describes how to use them")
    else:
        export_pipeline(model, out, stage.metrics(), repository)
        kind = read_json(out / "model_index.json")["_class_name"]
        screen.say(f"{out}: a {kind}; README.md in this folder describes how to use it")
    if repository is not None:
        screen.say(push_to_hub(out, repository))


def _export_page(arguments: ExportArguments) -> None:
    if arguments.single_file and arguments.out.suffix != ".html":
        raise UsageError(f"--out {arguments.out} is not an HTML file. Choose a name that ends in .html")
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
    """Encode images, videos or sounds, with their captions or classes, using the VAE and text encoders of a latent
    pipeline: halfstep encode PIPELINE --data FOLDER --out latents. If you have no data, sample the latents from
    prompts: halfstep encode PIPELINE --prompts prompts.txt --out latents. To resume, run the same command again.
    """

    pipeline: tyro.conf.Positional[str]
    """Folder of the pipeline, or its name on the Hub."""
    out: Path | None = None
    """Folder to write the latents to; required unless --dry-run is set."""
    data: str | None = None
    """For a text-conditioned model: a folder of images, videos (files or folders of frames) or sounds, with captions in
    metadata.jsonl, .csv or .parquet, or in one .txt file per sample. For a class-conditional model: a folder that
    contains one folder of images per class, in the order of the class names.
    """
    prompts: Path | None = None
    """Text file with one prompt per line, from which the pipeline samples latents; replaces --data."""
    num_steps: Steps = NUM_STEPS
    """With --prompts: number of Heun steps per sample."""
    guidance_scale: Guidance | None = None
    """With --prompts: guidance scale, which the student must also learn; by default, no guidance is used."""
    seed: int = 0
    """With --prompts: seed of the noise."""
    image_size: Side | None = None
    """With --data: height and width to resize images to; by default, the images' common size."""
    frame_rate: Rate | None = None
    """With --data: number of frames to use per second of a video file; by default, all of them."""
    call: tuple[str, ...] = ()
    """Arguments of the pipeline call, such as height=512 width=512."""
    base_precision: BasePrecision = "float32"
    """With --prompts: precision of the pipeline's weights; the run must use the same precision."""
    batch_size: Count = 8
    """Number of samples or prompts to process at once."""
    device: str | None = None
    """Device to run on; by default, cuda if it is available."""
    dry_run: Switch = False
    """Print the number, shapes and size of the samples, and the estimated time; write nothing."""


def encode(argv: Sequence[str]) -> None:
    arguments = parse(EncodeArguments, argv, "halfstep encode")
    if arguments.dry_run:
        check_alone()
    elif arguments.out is None:
        raise UsageError("--out is missing; see halfstep encode --help")
    processes = processes_of(arguments.device == "cpu")
    device = device_of(arguments.device, processes)
    if (arguments.data is None) == (arguments.prompts is None):
        raise UsageError("use either --data or --prompts, but not both")
    if arguments.data is None:
        refuse_idle(arguments, "with --prompts", ("image_size", "frame_rate"))
    else:
        refuse_idle(arguments, "with --data", ("num_steps", "guidance_scale", "seed", "base_precision"))
    if arguments.out is not None:
        refuse_file(arguments.out)
    kind = read_kind(fetch(arguments.pipeline))
    if kind in PIXELS:
        raise UsageError(
            f"{arguments.pipeline} contains a {kind}, which does not use latents. Pass the images directly to halfstep "
            "distill"
        )
    screen = Screen()
    if arguments.prompts is not None:
        # The import can take minutes, so an invalid file is reported first.
        read_prompts(arguments.prompts)
        model = imported(arguments.pipeline, arguments.call, screen, precision=arguments.base_precision)
        if arguments.dry_run:
            _show_prompts(model, arguments.prompts, arguments, device)
            return
        assert arguments.out is not None
        found = sample_prompts(
            model, arguments.prompts, arguments.out, arguments.guidance_scale, arguments.num_steps, arguments.seed,
            arguments.batch_size, device, processes, screen, "Lower --batch-size, or use the CPU (--device cpu)",
        )  # fmt: skip
        latents = count(len(found), "latent")
        screen.say(f"{arguments.out}: {latents} of shape {list(found.shape)} sampled from the prompts")
        return
    model = imported(arguments.pipeline, arguments.call, screen)
    autoencoder = autoencoder_of(model, device)
    images, names = _data(arguments, autoencoder, model)
    encoder = encoder_of(model, autoencoder, device, names)
    # If the encoders cannot be loaded, fail before the folder is created.
    encoder.texts([""])
    encoder.images(images.x0([0]))
    with in_own_words("image-size"):
        if arguments.dry_run:
            cost = forecast(images, encoder, arguments.out, arguments.batch_size, class_names=names)
            show_encoding(cost, len(images), images.source, "encoded")
            return
        assert arguments.out is not None
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
    shown = f"in {count(len(names), 'class')}" if names else "with their captions"
    screen.say(f"{arguments.out}: {count(len(found), 'latent')} of shape {list(found.shape)} {shown}")


def _data(
    arguments: EncodeArguments, autoencoder: Autoencoder, model: Model
) -> tuple[CaptionedImages | CaptionedClips, tuple[str, ...]]:
    """Return the data to encode and the class names. Checks that would decode all the data are skipped."""
    assert arguments.data is not None
    source, size = Path(arguments.data), autoencoder.image_size
    is_video = size is None and len(autoencoder.decoded) == 4
    idle = [name for name, is_used in (("image_size", size is not None), ("frame_rate", is_video)) if not is_used]
    refuse_idle(arguments, "on this pipeline", idle)
    if size is None:
        assert model.manifest.pipeline is not None
        preparation = autoencoder.preparation(arguments.frame_rate, model.manifest.pipeline.options)
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
    """Return a function that prints how many samples are finished and how much time is left at the current pace."""
    start: tuple[int, float] | None = None

    def progress(done: int, total: int) -> None:
        nonlocal start
        now = time.monotonic()
        start = start or (done, now)
        made, spent = done - start[0], now - start[1]
        left = f", {duration(spent / made * (total - done))} left" if made and done < total else ""
        screen.say(f"{verb} {done} of {total}{left}")

    return progress


def _prompts_for(model: Model, prompts: Path, guidance_scale: float | None, num_steps: int, seed: int) -> Prompts:
    """Return the prompts in a file and the samples that the model draws for them.

    Raises:
        ValueError: if there are no prompts, or the model does not take prompts.
    """
    if not model.manifest.conditions:
        raise UsageError(f"{model.manifest.stage} does not take prompts. Use --data instead")
    captions = read_prompts(prompts)
    sampled = prompted_by(model, len(captions), num_steps=num_steps, guidance_scale=guidance_scale, seed=seed)
    return Prompts(str(prompts), captions, sampled, effective_scale(model, guidance_scale))


def _encoder_of_prompts(
    model: Model, guidance_scale: float | None, num_steps: int, seed: int, device: torch.device
) -> Encoder:
    """Return the prompt encoder, whose key identifies the samples drawn for the prompts."""
    encoder = prompts_of(model, device)
    lowered = precision_of(model.denoiser.network)
    key = encoder.key if lowered == "float32" else f"{encoder.key} {lowered}"
    return replace(encoder, key=f"{key} steps {num_steps} guidance {guidance_scale} seed {seed}")


def _show_prompts(model: Model, prompts: Path, arguments: EncodeArguments, device: torch.device) -> None:
    """Print the cost of sampling latents from prompts. The time is estimated from one-step samples."""
    scale, num_steps, seed = arguments.guidance_scale, arguments.num_steps, arguments.seed
    texts = _prompts_for(model.to(device), prompts, scale, 1, seed)
    encoder = _encoder_of_prompts(model, scale, num_steps, seed, device)
    _, sampler = sampling_of(model)
    repeats = sampler.num_evals(num_steps) / sampler.num_evals(1)
    cost = forecast(texts, encoder, arguments.out, arguments.batch_size, repeats=repeats)
    show_encoding(cost, len(texts), texts.source, "sampled")


def sample_prompts(
    model: Model, prompts: Path, out: Path, guidance_scale: float | None, num_steps: int, seed: int, batch_size: int,
    device: torch.device, processes: Processes, screen: Screen, remedy: str,
) -> LatentData:  # fmt: skip
    """Sample latents from prompts with a teacher and write them to a folder, skipping samples that already exist.
    Afterwards, the text encoders are freed.

    Args:
        remedy: what the user can do if `batch_size` samples do not fit in memory.

    Raises:
        ValueError: if there are no prompts, the model does not take prompts, or the folder contains other data.
        OutOfMemory: if a batch does not fit in memory.
    """
    try:
        with told_when_out_of_memory(f"out of memory while sampling {count(batch_size, 'prompt')} at once. {remedy}"):
            texts = _prompts_for(model.to(device), prompts, guidance_scale, num_steps, seed)
            encoder = _encoder_of_prompts(model, guidance_scale, num_steps, seed, device)
            return encode_images(
                texts,
                encoder,
                out,
                batch_size,
                on_progress=progress_of("sampled", screen),
                processes=processes,
            )
    finally:
        release_texts()
        model.to("cpu")
