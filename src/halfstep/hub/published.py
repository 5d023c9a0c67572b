"""Published networks without weights, for dry runs on the meta device.

The configs were checked against public copies: SDXL against its authors' sd_xl_base.yaml, Flux.1 dev against
Open-Sora's config of the same network, and Wan 2.1 against copies of its config.json and its published shifts. Tests
check the number of parameters. The calls match those that each pipeline makes at the network's usual sample size.
"""

import math
from typing import Any, Final, NamedTuple, final

import torch

from halfstep.core.noise import processes
from halfstep.hub.pipelines import teacher_of
from halfstep.hub.schedulers import read_schedule
from halfstep.models.model import Model
from halfstep.nets import BasePrecision, Replay, conditions_of
from halfstep.runs import Pipeline


@final
class Published(NamedTuple):
    """A released network at its usual sample size."""

    title: str
    kind: str
    """The pipeline's class."""
    stock: str
    config: dict[str, Any]
    call: dict[str, Any]
    """The recorded call."""
    scheduler: dict[str, Any]
    options: dict[str, Any]
    """Pipeline call arguments that set the sample shape."""
    off: float | None = 1.0
    """The guidance scale that disables guidance, or None if the scale is a network input."""


def _call(**items: Any) -> dict[str, Any]:
    return {"is": "dict", "items": items}


def _condition(name: str, *shape: int) -> dict[str, Any]:
    return {"is": "condition", "name": name, "shape": list(shape), "dtype": "float32"}


def _constant(name: str, *shape: int, **rows: bool) -> dict[str, Any]:
    return {"is": "constant", "name": name, "shape": list(shape), "dtype": "float32", **rows}


_NONE: Final = {"is": "value", "value": None}
_TIME: Final = {"is": "time", "dims": []}


def _wan(title: str, heads: int, ffn: int, layers: int, height: int, width: int, shift: float) -> Published:
    """Return a Wan 2.1 network for 81-frame videos."""
    return Published(
        title, "WanPipeline", "WanTransformer3DModel",
        {
            "patch_size": [1, 2, 2], "num_attention_heads": heads, "attention_head_dim": 128, "in_channels": 16,
            "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": ffn, "num_layers": layers,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
        },
        _call(
            hidden_states={"is": "sample", "shape": [16, 21, height // 8, width // 8]}, timestep=_TIME,
            encoder_hidden_states=_condition("encoder_hidden_states", 512, 4096), attention_kwargs=_NONE,
        ),
        {
            "_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction",
            "flow_shift": shift,
        },
        {"height": height, "width": width, "num_frames": 81},
    )  # fmt: skip


PUBLISHED: Final = {
    "sdxl": Published(
        "SDXL, 1024 x 1024", "StableDiffusionXLPipeline", "UNet2DConditionModel",
        {
            "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "layers_per_block": 2,
            "cross_attention_dim": 2048, "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20], "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        _call(
            sample={"is": "sample", "shape": [4, 128, 128]}, timestep=_TIME,
            encoder_hidden_states=_condition("encoder_hidden_states", 77, 2048), timestep_cond=_NONE,
            cross_attention_kwargs=_NONE,
            added_cond_kwargs=_call(
                text_embeds=_condition("text_embeds", 1280), time_ids=_constant("time_ids", 1, 6, rows=True)
            ),
        ),
        {
            "_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "beta_end": 0.012,
        },
        {"height": 1024, "width": 1024},
    ),
    "flux.1-dev": Published(
        "Flux.1 dev, 1024 x 1024", "FluxPipeline", "FluxTransformer2DModel",
        {
            "patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 4096, "pooled_projection_dim": 768,
            "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
        },
        _call(
            hidden_states={"is": "sample", "shape": [4096, 64]},
            encoder_hidden_states=_condition("encoder_hidden_states", 512, 4096),
            pooled_projections=_condition("pooled_projections", 768), timestep=_TIME,
            img_ids=_constant("img_ids", 4096, 3), txt_ids=_constant("txt_ids", 512, 3),
            guidance={"is": "guidance", "factor": 1.0, "default": 3.5}, joint_attention_kwargs=_call(),
        ),
        # The pipeline sets this shift for 4096 tokens.
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": math.exp(1.15)},
        {"height": 1024, "width": 1024},
        None,
    ),
    "wan2.1-1.3b": _wan("Wan 2.1 1.3B, 81 frames of 832 x 480", 12, 8960, 30, 480, 832, 3.0),
    "wan2.1-14b": _wan("Wan 2.1 14B, 81 frames of 1280 x 720", 40, 13824, 40, 720, 1280, 5.0),
}  # fmt: skip
"""Published networks, keyed by name, for `halfstep distill NAME --dry-run`."""


def published(name: str, precision: BasePrecision = "float32") -> Model:
    """Return a published model on the meta device."""
    held = PUBLISHED[name]
    schedule = read_schedule(held.scheduler)
    clock: dict[str, Any] = {"of": "u", "scale": 1000.0, "offset": -1.0}
    if schedule.is_flow:
        process, scale = processes.describe(schedule.process), 1.0 if held.off is None else 1000.0
        clock = {"of": "sigma", "scale": scale, "offset": 0.0, "process": process}
    with torch.device("meta"):
        network = Replay(held.stock, held.config, held.call, clock, {"sign": 1, "part": "all"}, precision=precision)
    conditions = conditions_of(held.call)
    component = "transformer" if "Transformer" in held.stock else "unet"
    pipeline = Pipeline(
        kind=held.kind, folder=name, component=component, options=held.options, guidance="guidance_scale",
        off=held.off, scale=3.5 if held.off is None else None,
    )  # fmt: skip
    null = {} if held.off is None else {name: torch.zeros(shape) for name, shape in conditions.items()}
    return teacher_of(
        network, schedule, network.sample["shape"], conditions=conditions, null=null, stage=name, pipeline=pipeline,
        source=held.title,
    )  # fmt: skip
