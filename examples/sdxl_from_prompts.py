"""Distil SDXL to 4 steps, using only a file of prompts, and export the student as a stock pipeline.

    python examples/sdxl_from_prompts.py PIPELINE PROMPTS OUT

PIPELINE is the folder of a StableDiffusionXLPipeline (or a name on the Hub). PROMPTS is a text file with one prompt per
line.
"""

import sys
from pathlib import Path

from halfstep.cli import main as halfstep

BUDGET = (
    *("--matching.num-updates", "4000", "--matching.batch-size", "16", "--matching.learning-rate", "1e-4"),
    *("--chain.start-steps", "32", "--chain.num-updates", "4000", "--chain.batch-size", "16"),
    *("--chain.lora-rank", "64", "--base-precision", "bf16", "--engine.micro-batch", "auto"),
    *("--engine.gradient-checkpointing", "--evaluation.no-enabled", "--call", "height=1024", "width=1024"),
)
"""An untuned starting point for one GPU. To see the cost, run `halfstep distill` with these options and --dry-run."""


def main(pipeline: str, prompts: str, out: Path, budget: tuple[str, ...] = BUDGET) -> tuple[Path, Path]:
    """Return the folders of the run and of the exported pipeline."""
    run, exported = out / "run", out / "sdxl-4-steps"
    halfstep(
        [
            *("distill", pipeline, "--prompts", prompts, "--to", "4", "--out", str(run)),
            *("--matching.guidance-scale", "5", *budget),
        ]
    )
    halfstep(["export", str(run), "--out", str(exported)])
    return run, exported


def use(exported: Path, prompt: str) -> None:
    """Sample with four network calls, without using halfstep."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(exported)
    pipe(prompt, num_inference_steps=4, guidance_scale=1.0).images[0].save("sample.png")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    _, folder = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    use(folder, "a cat on a bench")
