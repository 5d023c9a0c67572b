"""Distil Stable Diffusion to 4 steps with LoRA, using a folder of captioned images.

    python examples/latent_text_to_image_lora.py PIPELINE IMAGES OUT

PIPELINE is the folder of a StableDiffusionPipeline (or a name on the Hub). IMAGES is a folder with a .txt file for each
image.
"""

import sys
from pathlib import Path

from halfstep.cli import main as halfstep

BUDGET = (
    *("--matching.num-updates", "4000", "--matching.batch-size", "16", "--matching.learning-rate", "1e-4"),
    *("--chain.start-steps", "32", "--chain.num-updates", "4000", "--chain.batch-size", "16"),
    *("--chain.lora-rank", "64", "--engine.gradient-checkpointing", "--engine.precision", "bf16"),
)
"""An untuned starting point for one GPU. To see the cost, run `halfstep distill` with these options and --dry-run."""


def main(pipeline: str, images: str, out: Path, budget: tuple[str, ...] = BUDGET) -> tuple[Path, Path]:
    """Return the folders of the run and of the LoRA weights."""
    latents, run, lora = out / "latents", out / "run", out / "lora"
    halfstep(["encode", pipeline, "--data", images, "--out", str(latents)])
    halfstep(
        [
            *("distill", pipeline, "--data", str(latents), "--to", "4", "--out", str(run)),
            *("--matching.guidance-scale", "7.5", *budget),
        ]
    )
    halfstep(["export", str(run), "--format", "lora", "--out", str(lora)])
    return run, lora


def use(pipeline: str, lora: Path, prompt: str) -> None:
    """Sample with four network calls, without using halfstep."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline)
    pipe.scheduler = DDIMScheduler.from_pretrained(lora, subfolder="scheduler")
    pipe.load_lora_weights(str(lora))
    pipe(prompt, num_inference_steps=4, guidance_scale=1.0).images[0].save("sample.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    _, additions = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    use(sys.argv[1], additions, "a cat on a bench")
