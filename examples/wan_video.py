"""Distil the video model Wan 2.1 to 4 steps, using only a file of prompts.

    python examples/wan_video.py PIPELINE PROMPTS OUT

PIPELINE is the folder of a WanPipeline (or a name on the Hub). PROMPTS is a text file with one prompt per line.
"""

import sys
from functools import partial
from pathlib import Path

from halfstep.cli import main as halfstep

SIZE = {"height": 480, "width": 832, "num_frames": 81}
BUDGET = (
    *("--matching.num-updates", "2000", "--matching.batch-size", "8", "--matching.learning-rate", "1e-4"),
    *("--chain.start-steps", "32", "--chain.num-updates", "2000", "--chain.batch-size", "8"),
    *("--chain.lora-rank", "64", "--base-precision", "bf16", "--engine.micro-batch", "1"),
    *("--engine.gradient-checkpointing", "--evaluation.no-enabled"),
    *("--call", *(f"{name}={value}" for name, value in SIZE.items())),
)
"""An untuned starting point for one GPU. To see the cost, run `halfstep distill` with these options and --dry-run."""


def main(pipeline: str, prompts: str, out: Path, budget: tuple[str, ...] = BUDGET) -> tuple[Path, Path]:
    """Return the folders of the run and of the exported pipeline."""
    run, exported = out / "run", out / "wan-4-steps"
    halfstep(
        [
            *("distill", pipeline, "--prompts", prompts, "--to", "4", "--out", str(run)),
            *("--matching.guidance-scale", "5", *budget),
        ]
    )
    halfstep(["export", str(run), "--out", str(exported)])
    return run, exported


def use(exported: Path, prompt: str) -> None:
    """Sample with four network calls, without using halfstep. The sigmas are set in the scheduler, not in the call."""
    from diffusers import WanPipeline
    from diffusers.utils import export_to_video

    pipe = WanPipeline.from_pretrained(exported)
    pipe.scheduler.set_timesteps = partial(pipe.scheduler.set_timesteps, sigmas=[1.0, 0.75, 0.5, 0.25])
    export_to_video(pipe(prompt, num_inference_steps=4, guidance_scale=1.0, **SIZE).frames[0], "sample.mp4", fps=16)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    _, folder = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    use(folder, "a cat on a bench")
