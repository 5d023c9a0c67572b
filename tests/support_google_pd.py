"""A checkpoint in the layout of the paper's authors, from this file's own description of their U-Net."""

from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np

from halfstep.hub import GooglePDConfig

TINY = GooglePDConfig(
    image_size=8, ch=32, multipliers=(1, 2), layers_per_block=1, attention=(False, True), attention_head_dim=32,
    time_embedding_dim=64, num_classes=3, prediction="both", start_steps=16,
)  # fmt: skip


def shapes(config: GooglePDConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return every array of the authors' tree, from paper.md (f) and the toy checkpoints, block by block."""
    emb, heads = config.time_embedding_dim, config.attention_head_dim
    channels = [config.ch * multiplier for multiplier in config.multipliers]
    out = 6 if config.prediction == "both" else 3

    def layer(name: str, *kernel: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}/kernel", kernel
        yield f"{name}/bias", kernel[-1:]

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}/scale", (width,)
        yield f"{name}/bias", (width,)

    def block(name: str, c_in: int, c_out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}/norm1", c_in)
        yield from layer(f"{name}/conv1", 3, 3, c_in, c_out)
        yield from layer(f"{name}/temb_proj", emb, 2 * c_out)
        yield from norm(f"{name}/norm2", c_out)
        yield from layer(f"{name}/conv2", 3, 3, c_out, c_out)
        if c_in != c_out:
            yield from layer(f"{name}/nin_shortcut", c_in, c_out)

    def attention(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield from norm(f"{name}/norm", width)
        for part in "qkv":
            yield f"{name}/{part}/kernel", (width, width // heads, heads)
            yield f"{name}/{part}/bias", (width // heads, heads)
        yield f"{name}/proj_out/kernel", (width // heads, heads, width)
        yield f"{name}/proj_out/bias", (width,)

    yield from layer("dense0", config.ch, emb)
    yield from layer("dense1", emb, emb)
    if config.num_classes:
        yield from layer("class_emb", config.num_classes, emb)
    yield from layer("conv_in", 3, 3, 3, config.ch)
    kept, width = [config.ch], config.ch
    last = len(channels) - 1
    for level, here in enumerate(channels):
        for index in range(config.layers_per_block):
            yield from block(f"down_{level}.block_{index}", width, here)
            width = here
            if config.attention[level]:
                yield from attention(f"down_{level}.attn_{index}", width)
            kept.append(width)
        if level != last:
            yield from block(f"down_{level}.downsample", width, width)
            kept.append(width)
    yield from block("mid.block_1", width, width)
    yield from attention("mid.attn_1", width)
    yield from block("mid.block_2", width, width)
    for level in range(last, -1, -1):
        for index in range(config.layers_per_block + 1):
            yield from block(f"up_{level}.block_{index}", width + kept.pop(), channels[level])
            width = channels[level]
            if config.attention[level]:
                yield from attention(f"up_{level}.attn_{index}", width)
        if level:
            yield from block(f"up_{level}.upsample", width, width)
    yield from norm("norm_out", width)
    yield from layer("conv_out", 3, 3, width, out)


def params(config: GooglePDConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return small random weights, with norms near 1."""
    dice = np.random.default_rng(seed)
    return {
        path: (0.1 * dice.standard_normal(shape) + path.endswith("/scale")).astype(np.float32)
        for path, shape in shapes(config)
    }


def packed(value: Any) -> Any:
    """Encode an array for msgpack as flax does."""
    if isinstance(value, np.ndarray):
        content = (list(value.shape), value.dtype.name, value.tobytes())
        return msgpack.ExtType(1, msgpack.packb(content, use_bin_type=True))
    raise TypeError(str(type(value)))


def tree_of(flat: dict[str, Any]) -> dict[str, Any]:
    """Nest arrays by the names between slashes."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split("/")
        here = tree
        for folder in folders:
            here = here.setdefault(folder, {})
        here[name] = value
    return tree


def checkpoint_bytes(flat: dict[str, Any], **top: Any) -> bytes:
    """Return a checkpoint file's bytes; `top` replaces or adds entries next to `ema_params`."""
    tree = {"step": 1, "optimizer": None, "ema_params": tree_of(flat), "num_sample_steps": 8} | top
    data: bytes = msgpack.packb(tree, default=packed, use_bin_type=True)
    return data
