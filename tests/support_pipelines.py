"""Pipelines of diffusers at a tiny size, saved as diffusers saves them."""

import json
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

SD_SCHEDULER: Final = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def wake(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Gives layers that start at 0 weights that matter, so that every input acts on the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-3:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return module.eval()


def tiny_unet(seed: int = 0, **changes: Any) -> Any:
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 8, "attention_head_dim": 8,
    }  # fmt: skip
    return wake(UNet2DModel(**settings | changes))


def save_ddpm(folder: Path, scheduler: Any = None, kind: str = "DDPMPipeline", **changes: Any) -> Path:
    """An unconditional pixel pipeline; epsilon on linear betas with clipping, unless told otherwise."""
    import diffusers

    scheduler = scheduler or diffusers.DDPMScheduler()
    getattr(diffusers, kind)(unet=tiny_unet(**changes), scheduler=scheduler).save_pretrained(folder)
    return folder


def save_dit(folder: Path, num_classes: int = 1000, **scheduler: Any) -> Path:
    """A DiT of classes with a learned variance, and a VAE that halves the sides."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=4,
        patch_size=2, num_embeds_ada_norm=num_classes, norm_num_groups=4,
    )  # fmt: skip
    pipe = DiTPipeline(
        transformer=wake(transformer), vae=tiny_vae(), scheduler=DDIMScheduler(clip_sample=False, **scheduler)
    )
    pipe.save_pretrained(folder)
    # The released pipelines hold the names of their classes, which save_pretrained leaves out.
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"id2label": {"0": "tench, fish", "1": "cat"}}))
    return folder


def tiny_vae(seed: int = 2, channels: int = 4, **changes: Any) -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": channels, "norm_num_groups": 4,
        "sample_size": 8,
    }  # fmt: skip
    return AutoencoderKL(**settings | changes).eval()


def tiny_tokenizer(folder: Path) -> Any:
    """A CLIP tokenizer that knows single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=7, unk_token="<|endoftext|>")


def tiny_text_encoder(projection: bool = False, width: int = 16, seed: int = 3) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=60,
        max_position_embeddings=7, projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def save_sd(folder: Path, tokens: Path, prediction: str = "epsilon", width: int = 16, **scheduler: Any) -> Path:
    """Stable Diffusion's layout."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(tokens), unet=wake(unet),
        scheduler=DDIMScheduler(clip_sample=False, prediction_type=prediction, **SD_SCHEDULER | scheduler),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def save_sd3(folder: Path, tokens: Path, shift: float = 3.0) -> Path:
    """Stable Diffusion 3's layout, without its third text encoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(5)
    transformer = SD3Transformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=32, pooled_projection_dim=32, out_channels=4,
        pos_embed_max_size=8,
    )  # fmt: skip
    StableDiffusion3Pipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=tiny_vae(shift_factor=0.0609, scaling_factor=1.5305, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_text_encoder(projection=True), tokenizer=tiny_tokenizer(tokens),
        text_encoder_2=tiny_text_encoder(projection=True, seed=6), tokenizer_2=tiny_tokenizer(tokens),
        text_encoder_3=None, tokenizer_3=None,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def assert_same(found: Tensor, stock: Tensor) -> None:
    """To 1e-4 of what [-1, 1] is to images: networks that know no data make larger samples."""
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-4 * max(1.0, float(stock.abs().max())))


def noise(*shape: int) -> Tensor:
    """Unit normal noise, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def quietly(pipe: Any) -> Any:
    """The pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe
