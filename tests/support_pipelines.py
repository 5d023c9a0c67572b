"""Tiny diffusers pipelines, saved as diffusers saves them."""

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from halfstep.core.noise import FlowMatching
from halfstep.hub.schedulers import config_of, read_schedule

SD_SCHEDULER: Final = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def wake(module: nn.Module, scale: float = 0.3) -> nn.Module:
    """Give non-zero weights to layers that start at 0, so that every input affects the output."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and float(parameter.abs().max()) < 1e-3:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    return module.eval()


def replay(stock: str, config: dict[str, Any], conditions: dict[str, tuple[int, ...]], **items: Any) -> Any:
    """Return a diffusers network on a table with a hand-written call: its first argument is the sample."""
    from halfstep.nets import Replay

    side, channels = config["sample_size"], config["in_channels"]
    name = "sample" if stock.startswith("UNet") else "hidden_states"
    call = {
        name: {"is": "sample", "shape": [channels, side, side]},
        "timestep": {"is": "time", "dims": []},
        **{
            key: {"is": "condition", "name": key, "shape": list(shape), "dtype": "float32" if shape else "int64"}
            for key, shape in conditions.items()
        },
        **items,
    }
    return Replay(
        stock, config, {"is": "dict", "items": call}, {"of": "u", "scale": 1000.0, "offset": -1.0},
        {"sign": 1, "part": "all"},
    )  # fmt: skip


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
    """Save an unconditional pixel pipeline, by default with epsilon on linear betas and clipping."""
    import diffusers

    scheduler = scheduler or diffusers.DDPMScheduler()
    getattr(diffusers, kind)(unet=tiny_unet(**changes), scheduler=scheduler).save_pretrained(folder)
    return folder


def save_dit(folder: Path, num_classes: int = 1000, **scheduler: Any) -> Path:
    """Save a class-conditional DiT with a learned variance, and a VAE that halves the sides."""
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
    # The released pipelines store the names of their classes, which save_pretrained omits.
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
    """Return a CLIP tokenizer of single letters."""
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
    """Save a pipeline in Stable Diffusion's layout."""
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


def tiny_lcm(tokens: Path) -> Any:
    """Save a Stable Diffusion pipeline whose U-Net takes the guidance scale as an input, in sinusoids."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8, time_cond_proj_dim=32,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(tokens), unet=wake(unet),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, prediction_type="v_prediction", **SD_SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save_sd3(folder: Path, tokens: Path, shift: float = 3.0) -> Path:
    """Save a pipeline in Stable Diffusion 3's layout, without its third text encoder."""
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
    """Compare to 1e-4 of the range [-1, 1] of images, scaled up because untrained networks produce larger samples."""
    torch.testing.assert_close(found, stock, rtol=0, atol=1e-4 * max(1.0, float(stock.abs().max())))


def noise(*shape: int) -> Tensor:
    """Return standard normal noise, the same for the same shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


def quietly(pipe: Any) -> Any:
    """Return the pipeline without its progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def word_tokenizer(folder: Path) -> Any:
    """Return a fast tokenizer of single letters and short words, which pads and ends texts as T5's and Qwen's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(chr(code) for code in range(ord("a"), ord("z") + 1))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16,
        chat_template=template,
    )  # fmt: skip


def tiny_t5(width: int = 32, seed: int = 8) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    return T5EncoderModel(
        T5Config(vocab_size=60, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
    ).eval()


def tiny_sdxl(tokens: Path) -> Any:
    """Save Stable Diffusion XL: sizes, pooled texts, and zeros for no text."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(4)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8, norm_num_groups=8, addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=6 * 4 + 16,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(tokens), unet=wake(unet),
        text_encoder_2=tiny_text_encoder(projection=True, seed=6), tokenizer_2=tiny_tokenizer(tokens),
        scheduler=EulerDiscreteScheduler(**SD_SCHEDULER, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def tiny_flux(tokens: Path, embedded: bool = True) -> Any:
    """Save Flux.1: packed latents, positions, a shift that grows with the size, and (dev) a guidance input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(5)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=embedded,
    )  # fmt: skip
    return FluxPipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_text_encoder(), tokenizer=tiny_tokenizer(tokens),
        text_encoder_2=tiny_t5(), tokenizer_2=word_tokenizer(tokens),
    )  # fmt: skip


def tiny_flux_schnell(tokens: Path) -> Any:
    """Save Flux.1 schnell: no guidance input."""
    return tiny_flux(tokens, embedded=False)


def tiny_decoder(kind: str, **changes: Any) -> Any:
    """Return a transformers language model whose hidden states are an image model's texts."""
    import transformers

    torch.manual_seed(9)
    settings: dict[str, Any] = {
        "vocab_size": 140, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 1,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings | changes)
    return getattr(transformers, f"{kind}Model")(config).eval()


def letter_tokenizer() -> Any:
    """Return a `word_tokenizer` in which every character is a token, because chat templates are long."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", *(chr(code) for code in range(32, 127))]
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_max_length=512)


def tiny_pixart(tokens: Path) -> Any:
    """Save PixArt: a mask of the text, and a learned variance."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(5)
    transformer = PixArtTransformer2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, cross_attention_dim=16, out_channels=8, use_additional_conditions=False,
    )  # fmt: skip
    return PixArtAlphaPipeline(
        transformer=wake(transformer), vae=tiny_vae(), text_encoder=tiny_t5(), tokenizer=word_tokenizer(tokens),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )  # fmt: skip


def tiny_umt5(width: int = 32) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(8)
    return UMT5EncoderModel(
        UMT5Config(vocab_size=60, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, tie_word_embeddings=False)
    ).eval()


def tiny_wan(tokens: Path) -> Any:
    """Save Wan 2.1: video, two calls per step with guidance, a multistep solver on the flow-matching path."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

    torch.manual_seed(5)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return WanPipeline(
        transformer=wake(transformer), vae=vae, scheduler=scheduler, text_encoder=tiny_umt5(),
        tokenizer=word_tokenizer(tokens), transformer_2=None,
    )  # fmt: skip


def tiny_qwen(tokens: Path) -> Any:
    """Save Qwen-Image: packed latents, texts of their own lengths, lists of sizes, guidance with restored norm."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(5)
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": 140,
            "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        vocab_size=140,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        transformer=wake(transformer), vae=vae, scheduler=scheduler, tokenizer=letter_tokenizer(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
    )  # fmt: skip


def tiny_sana(tokens: Path) -> Any:
    """Save Sana: DPM-Solver on the flow-matching path, a mask of the text."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    torch.manual_seed(5)
    transformer = SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=32,
    )  # fmt: skip
    vae = AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2, encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=[1, 1], downsample_block_type="conv",
        upsample_block_type="interpolate", decoder_norm_types="rms_norm", decoder_act_fns="silu",
        scaling_factor=0.41407,
    )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(
        transformer=wake(transformer), vae=vae, scheduler=scheduler, tokenizer=word_tokenizer(tokens),
        text_encoder=tiny_decoder("Gemma2", num_hidden_layers=1),
    )  # fmt: skip


def tiny_cogvideox(tokens: Path) -> Any:
    """Save CogVideoX: video with frames first, rotary tables, a table with divided ratios that ends without signal."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    torch.manual_seed(5)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=2, sample_height=2, sample_frames=9, patch_size=2,
        max_text_seq_length=16, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        snr_shift_scale=3.0, rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip
    return CogVideoXPipeline(
        transformer=wake(transformer), vae=vae, scheduler=scheduler, text_encoder=tiny_t5(),
        tokenizer=word_tokenizer(tokens),
    )  # fmt: skip


def tiny_lumina2(tokens: Path) -> Any:
    """Save Lumina 2: a reversed clock, a negated output, two calls per step, guidance with restored norm."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    torch.manual_seed(5)
    transformer = Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=12, num_layers=2, num_refiner_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )  # fmt: skip
    return Lumina2Pipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_decoder("Gemma2"), tokenizer=word_tokenizer(tokens),
    )  # fmt: skip


def tiny_z_image(tokens: Path) -> Any:
    """Save Z-Image: lists of samples and texts, a reversed clock, a negated output, c + s (c - u)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    torch.manual_seed(5)
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=1, n_kv_heads=1, qk_norm=True, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    return ZImagePipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_decoder("Qwen3"), tokenizer=word_tokenizer(tokens),
    )  # fmt: skip


def tiny_stable_audio(tokens: Path) -> Any:
    """Save Stable Audio: audio on EDM's noise levels, with the angle as the network's time."""
    from diffusers import (
        AutoencoderOobleck,
        CosineDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    torch.manual_seed(5)
    transformer = StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=2, attention_head_dim=4, num_attention_heads=4,
        num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=4, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    vae = AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    projection = StableAudioProjectionModel(text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32)
    return StableAudioPipeline(
        transformer=wake(transformer), vae=vae, scheduler=CosineDPMSolverMultistepScheduler(solver_order=2),
        text_encoder=tiny_t5(), tokenizer=word_tokenizer(tokens), projection_model=projection,
    )  # fmt: skip


def tiny_encoding_stable_audio(tokens: Path) -> Any:
    """Save Stable Audio with a VAE that encodes a sound of 2 s, at 8 Hz, to the length that it decodes.

    With its other VAE, whose first layer keeps the length, a sound is one value longer than what it decodes to.
    """
    pipe = tiny_stable_audio(tokens)
    config = dict(pipe.vae.config) | {"downsampling_ratios": [2, 2], "sampling_rate": 8}
    pipe.register_modules(vae=type(pipe.vae).from_config(config).eval())
    return pipe


def tiny_audioldm(tokens: Path) -> Any:
    """Save AudioLDM: audio as spectrograms, and text embeddings in the argument of the classes."""
    from diffusers import AudioLDMPipeline, DDIMScheduler, UNet2DConditionModel
    from transformers import ClapTextConfig, ClapTextModelWithProjection, SpeechT5HifiGan, SpeechT5HifiGanConfig

    torch.manual_seed(5)
    unet = UNet2DConditionModel(
        sample_size=4, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(16, 32), attention_head_dim=8, norm_num_groups=8, class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=8, class_embeddings_concat=True,
    )  # fmt: skip
    texts = ClapTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=1, num_hidden_layers=1, projection_dim=8,
        vocab_size=60, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    sounds = SpeechT5HifiGanConfig(
        model_in_dim=8, sampling_rate=16, upsample_initial_channel=16, upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
        normalize_before=False,
    )  # fmt: skip
    return AudioLDMPipeline(
        unet=wake(unet), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1, **SD_SCHEDULER),
        vae=tiny_vae(in_channels=1, out_channels=1), tokenizer=word_tokenizer(tokens),
        text_encoder=ClapTextModelWithProjection(texts).eval(), vocoder=SpeechT5HifiGan(sounds).eval(),
    )  # fmt: skip


def tiny_auraflow(tokens: Path) -> Any:
    """Save AuraFlow, for which the library has no specific code."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(5)
    transformer = AuraFlowTransformer2DModel(
        sample_size=4, patch_size=1, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, pos_embed_max_size=256,
    )  # fmt: skip
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.mul_(3)
    return AuraFlowPipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73), vae=tiny_vae(),
        text_encoder=tiny_umt5(), tokenizer=word_tokenizer(tokens),
    )  # fmt: skip


def tiny_chroma(tokens: Path) -> Any:
    """Save Chroma, for which the library has no specific code: Flux with a mask and two calls."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(5)
    transformer = ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return ChromaPipeline(
        transformer=wake(transformer), scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=0.36, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=tiny_t5(), tokenizer=word_tokenizer(tokens),
    )  # fmt: skip


def times_of(scheduler: Any, num_steps: int) -> Tensor:
    """Return the `num_steps + 1` times at which a stock scheduler's steps start and end, float64.

    Raises:
        ValueError: if a step of the scheduler does not start where the previous step ended.
    """
    schedule = read_schedule(config_of(scheduler))
    scheduler.set_timesteps(num_steps)
    num = schedule.num_train_timesteps
    if isinstance(schedule.process, FlowMatching):
        sigmas: Tensor = scheduler.sigmas.double().cpu()
        return sigmas / (schedule.process.shift - (schedule.process.shift - 1) * sigmas)
    starts = np.asarray(scheduler.timesteps.cpu(), dtype=np.float64)
    lands = starts - num // num_steps if type(scheduler).__name__ == "DDIMScheduler" else np.append(starts[1:], -1)
    if len(apart := np.flatnonzero(lands[:-1] != starts[1:])):
        raise ValueError(
            f"{num_steps} steps on {num} timesteps: {type(scheduler).__name__} lands at {lands[apart[0]]:g}, but the "
            f"next step starts from {starts[apart[0] + 1]:g}; choose a number that divides {num}"
        )
    last = 0.0 if lands[-1] < 0 and scheduler.config.get("set_alpha_to_one", True) else max(lands[-1], 0) + 1
    return torch.from_numpy(np.append(starts + 1, last) / num)
