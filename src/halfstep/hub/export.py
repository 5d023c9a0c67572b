"""Export a stage as a stock diffusers pipeline with a model card.

An image model without classes becomes a `DDIMPipeline`, or a `DDPMPipeline` if its sampler draws noise. An image model
with classes becomes a `ConsistencyModelPipeline`, which diffusers uses for a `UNet2DModel` with class labels. Other
models keep their pipeline's class, and the pipeline's other parts are copied. The exported folder contains no code.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

import torch

from halfstep.hub.card import call_of, lora_card, model_card
from halfstep.hub.disk import check_files, unused_indices, weights_of, without_variant
from halfstep.hub.pipelines import UNNEEDED, fetch_pipeline, is_light, load_pipeline
from halfstep.hub.recording import verify_export
from halfstep.hub.schedulers import (
    FLOW,
    MATCH_TO_COSINE,
    SOLVERS,
    USE_ONNX,
    StockSchedule,
    exact_steps,
    is_exact,
    multistep,
    write_schedule,
)
from halfstep.hub.stock import quiet, stock
from halfstep.models.model import Model
from halfstep.nets import (
    LoRA,
    Replay,
    StockNetwork,
    UNet2D,
    bare,
    has_fourier_clock,
    has_movable_clock,
    merged,
    on_integers,
    precision_of,
)
from halfstep.runs import Manifest, Metrics
from halfstep.runtime.files import (
    first_line,
    read_json,
    refuse_irreplaceable,
    refuse_taken,
    replacing_folder,
    write_json,
    write_text,
)
from halfstep.samplers import DDIM


def export_pipeline(model: Model, out: Path, metrics: Metrics | None = None, name: str | None = None) -> Path:
    """Export the model as a stock pipeline to the folder `out`, and return `out`.

    Args:
        metrics: quality measurements for the card.
        name: the name that the card uses to load the model, or None to use the folder's name.

    Raises:
        ValueError: if diffusers has no pipeline, exact grid or scheduler for the model's sampler, if a part of the
            original pipeline is missing, or if `out` is not empty. In each case, nothing is written.
    """
    refuse_taken(out)
    refuse_irreplaceable(out)
    whole = model.merged()
    network = whole.network
    if not isinstance(network, StockNetwork):
        kind = model.manifest.network.get("type")
        raise ValueError(f"diffusers has no pipeline for a network of type {kind}. {USE_ONNX}")
    is_flow = model.manifest.process["type"] == "flow"
    if isinstance(network, Replay) and not is_flow and not network.is_on_table and has_fourier_clock(network):
        # Stable Audio's own scheduler draws noise in each step. DDIMScheduler does not, but it needs integer timesteps.
        network = on_integers(network)
    schedule, kind, component = _layout(model, network)
    index: dict[str, Any] = {}
    copies: dict[str, Path] = {}
    # An image model does not need its original pipeline, which may no longer exist.
    if not model.manifest.is_image:
        if model.manifest.pipeline is None:
            raise ValueError("this model generates latents, and its original pipeline is unknown. Use --format onnx")
        origin = fetch_pipeline(model.manifest.pipeline)
        index = read_json(origin / "model_index.json")
        copies = _other_parts(origin, index, component)
    left_out = [name for name in UNNEEDED if name in index and name not in copies]
    index |= {name: [None, None] for name in left_out}
    if "safety_checker" in left_out:
        index["requires_safety_checker"] = False
    # diffusers requires these parts unless None is passed for them.
    optional = stock(kind)._optional_components
    absent = [n for n, value in index.items() if isinstance(value, list) and value[0] is None and n not in optional]

    import diffusers

    index |= {"_class_name": kind, "_diffusers_version": diffusers.__version__}
    index |= {component: ["diffusers", network.stock], "scheduler": ["diffusers", schedule.kind]}
    with replacing_folder(out) as into:
        _save_network(network, into / component)
        _save_scheduler(schedule, into / "scheduler")
        for part, folder in copies.items():
            (into / part).mkdir()
            kept = [file for file in folder.glob("[!.]*") if file.suffix in (".json", ".txt", ".model", ".jinja")]
            unused = unused_indices(folder)
            for file in (*(file for file in kept if file not in unused), *weights_of(folder)):
                plain = without_variant(file.name, folder)
                if plain.endswith(".index.json"):
                    write_text(into / part / plain, without_variant(file.read_text(encoding="utf-8"), folder))
                else:
                    shutil.copyfile(file, into / part / plain)
        write_json(into / "model_index.json", index)
        write_text(into / "README.md", model_card(name or out.name, model.manifest, kind, schedule, metrics, absent))
        if isinstance(network, Replay) and not model.sampler.stochastic:
            verify_export(load_pipeline(into, kind), whole, **call_of(model.manifest, model.num_steps or 2))
    return out


def export_lora(model: Model, out: Path, base: Manifest | None = None, name: str | None = None) -> Path:
    """Write a LoRA student's weights (for `pipe.load_lora_weights`) and scheduler to `out`, and return `out`.

    Args:
        base: manifest of the stage whose weights the LoRA adapts, or None for the imported model.
        name: the name that the card uses to load the weights, or None to use the folder's name.

    Raises:
        ValueError: if the model is not a LoRA or was not trained on the pipeline's own weights, if the pipeline cannot
            load LoRA weights, if no exact grid exists for the number of steps, or if `out` is not empty.
    """
    refuse_taken(out)
    refuse_irreplaceable(out)
    network, pipeline = model.denoiser.network, model.manifest.pipeline
    if not isinstance(network, LoRA):
        raise ValueError("this model was not trained with LoRA and has no LoRA weights. Use --format diffusers")
    kind: Any = None if pipeline is None else stock(pipeline.kind)
    if pipeline is None or not hasattr(kind, "save_lora_weights"):
        where = "an unknown pipeline" if pipeline is None else pipeline.kind
        raise ValueError(
            f"diffusers cannot load LoRA weights into {where}: use --format diffusers, which merges the weights"
        )
    schedule, _, component = _layout(model, network.base)
    if pipeline.averaged:
        raise ValueError(
            f"the LoRA was trained on the averaged weights (EMA) in {pipeline.folder}/{component}_ema, but a "
            f"{pipeline.kind} loads the weights in {component}. Use --format diffusers, which merges the LoRA weights"
        )
    if base is not None and base.num_updates:
        raise ValueError(
            f"the LoRA was trained on the weights of {base.stage}, not on those of {pipeline.folder}. Use --format "
            "diffusers, which merges the LoRA weights"
        )
    # These are peft's names without the adapter name ("...to_q.lora_A.weight"), which diffusers reads unchanged. Under
    # diffusers' older names, the LoRA weights of attention layers would be ignored.
    state = {
        name.removeprefix("base.model.").replace(".default.", "."): value.detach().cpu().float().contiguous()
        for name, value in network.own()
    }
    with replacing_folder(out) as into:
        with quiet():
            kind.save_lora_weights(into, **{f"{component}_lora_layers": state})
        _save_scheduler(schedule, into / "scheduler")
        precision = precision_of(network)
        write_text(into / "README.md", lora_card(name or out.name, model.manifest, pipeline, schedule, precision))
        if not model.sampler.stochastic:
            pipe = load_pipeline(fetch_pipeline(pipeline), pipeline.kind)
            if precision != "float32":
                base_network: Any = merged(bare(network))
                getattr(pipe, component).load_state_dict(base_network.model.state_dict())
                # The reference is also float32, so that rounding is not reported as an export error.
                model = model.merged()
            pipe.scheduler = stock(schedule.kind)(**schedule.config)
            with quiet():
                pipe.load_lora_weights(into)
            verify_export(pipe, model, **call_of(model.manifest, model.num_steps or 2))
    return out


def push_to_hub(folder: Path, name: str) -> str:
    """Upload `folder` to the repository `name` (OWNER/NAME) on the Hub and return its URL.

    Raises:
        ValueError: if the Hub rejects the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder)
    except Exception as error:  # the Hub's client and its network libraries raise many exception types
        raise ValueError(f"{folder} is complete, but was not pushed to {name} ({first_line(error)})") from None
    return str(address)


def _layout(model: Model, network: StockNetwork) -> tuple[StockSchedule, str, str]:
    """Return the scheduler, the pipeline's class, and the name of the network's folder in the pipeline."""
    manifest = model.manifest
    if isinstance(network, UNet2D) and network.clock_range != (0.0, 1.0):
        raise ValueError(
            f"the network's clock has the range {list(network.clock_range)}, so no number of steps gives integer "
            f"timesteps in diffusers. {MATCH_TO_COSINE}"
        )
    process = model.denoiser.process
    schedule = write_schedule(process, model.denoiser.prediction, network.num_train_timesteps, manifest.clip)
    if isinstance(network, Replay) and schedule.kind != FLOW and not network.is_on_table:
        raise ValueError(
            f"a {network.stock} does not use the timesteps of a table, and every diffusers scheduler that supports its "
            "times draws noise in each step. Use --format onnx"
        )
    if isinstance(network, UNet2D) and schedule.kind == FLOW:
        raise ValueError(f"diffusers has no pipeline for a UNet2DModel on the flow-matching path. {USE_ONNX}")
    is_plain_image, sampler = manifest.is_image and not manifest.num_classes, model.sampler
    solver = SOLVERS.get(sampler)
    if solver is None or (solver["solver_order"] == 2 and is_plain_image):
        missing = "pipeline" if solver else "scheduler"
        raise ValueError(f"diffusers has no {missing} for this model's sampler {sampler}. {USE_ONNX}")
    if model.num_steps is not None and not is_exact(schedule, model.num_steps):
        exact = exact_steps(schedule)
        more = " and some larger numbers" * (exact[-1] < network.num_train_timesteps)
        remedy = "Export a stage with one of these numbers of steps, "
        if has_movable_clock(model.denoiser.network):
            remedy += (
                "match the teacher to the cosine process, where every power of two is exact (halfstep distill "
                "--matching.process cosine), "
            )
        raise ValueError(
            f"with {network.num_train_timesteps} timesteps, the exported grid cannot represent {model.num_steps} steps "
            f"exactly; it can only represent {', '.join(map(str, exact))}{more}. {remedy}or use --format onnx"
        )
    if is_plain_image and not sampler.stochastic:
        return schedule, "DDIMPipeline", "unet"
    if manifest.clip or sampler != DDIM():
        schedule = multistep(schedule, solver, manifest.clip)
    if is_plain_image:
        return schedule, "DDPMPipeline", "unet"
    if manifest.pipeline is not None and not manifest.is_image:
        return schedule, manifest.pipeline.kind, manifest.pipeline.component
    sides = manifest.shape[1:]
    if len(set(sides)) > 1:
        raise ValueError(
            "diffusers' only class-conditional image pipeline generates square images, but this model generates "
            f"images of size {list(sides)}. {USE_ONNX}"
        )
    return schedule, "ConsistencyModelPipeline", "unet"


def _other_parts(origin: Path, index: dict[str, Any], component: str) -> dict[str, Path]:
    """Return the folders of the original pipeline's parts, keyed by name, without the network and the scheduler."""
    parts = {}
    for name, value in index.items():
        if name in (component, "scheduler") or not isinstance(value, list) or value[0] is None:
            continue
        folder = origin / name
        # Older repositories have only pickled weights for some of these parts.
        can_be_loaded = folder.is_dir() if name == "feature_extractor" else any(folder.glob("[!.]*.safetensors"))
        if name in UNNEEDED and not can_be_loaded:
            continue
        if not folder.is_dir():
            raise ValueError(f"{origin} has no {name}, which the exported pipeline needs. Copy {name} into this folder")
        if not is_light(folder):
            # Only parts that can be loaded safely are copied.
            check_files(folder, ".".join(map(str, value)))
        parts[name] = folder
    if "feature_extractor" not in parts:
        # Pipelines reject a safety checker without a feature extractor.
        parts.pop("safety_checker", None)
    return parts


def _save_network(network: StockNetwork, folder: Path) -> None:
    # safetensors does not accept channels-last tensors.
    module = copy.deepcopy(network.model).cpu().float().to(memory_format=torch.contiguous_format)
    with quiet():
        module.save_pretrained(folder, safe_serialization=True)
    config: dict[str, Any] = read_json(folder / "config.json")
    size = config.get("sample_size")
    if isinstance(size, list) and len(set(size)) == 1:
        # Pipelines for square samples expect a single number.
        config["sample_size"] = size[0]
    config.pop("_name_or_path", None)
    write_json(folder / "config.json", config)


def _save_scheduler(schedule: StockSchedule, folder: Path) -> None:
    with quiet():
        stock(schedule.kind)(**schedule.config).save_pretrained(folder)
