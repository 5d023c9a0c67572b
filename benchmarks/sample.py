"""Compare the sampling speed of halfstep, bare network calls and diffusers' DDIMPipeline at 1 to 256 steps.

    python benchmarks/sample.py                   # the digits network at 1 to 256 steps, the CIFAR-10 network at 1 to 4
    python benchmarks/sample.py --short

"Ours" is `Model.sample`, from the seeds to samples on the CPU, in float32 and bfloat16. "Bare" makes the same number of
calls to the same network in float32, with existing noise. diffusers runs the exported model in float32 without a
progress bar, draws its own noise and returns arrays. The three take turns in one process.
"""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from common import arguments, median, median_ratio, model_of, parsed, repeated, timed, write
from halfstep.hub import export_pipeline

TIMES = 8
"""The number of 4-step draws per turn that a draw with more than FEW steps is compared with."""

FEW = 8
"""The largest number of steps for which a turn has only one 4-step draw."""

ROUNDS = {"digits": 240, "cifar10": 16, "tiny": 20}
"""The number of rounds with one step. With n steps, it is divided by n, but there are at least three rounds."""

STEPS = {"digits": [1, 2, 4, 8, 16, 32, 64, 128, 256], "cifar10": [1, 2, 4], "tiny": [1, 4, 16]}


def measured(name: str, batch: int, steps: list[int], device: str, rounds: int | None) -> list[dict[str, Any]]:
    """Return a row for each number of steps."""
    from diffusers import DDIMPipeline

    model = model_of(name)
    with tempfile.TemporaryDirectory() as folder:
        export_pipeline(model, Path(folder) / "exported")
        pipeline = DDIMPipeline.from_pretrained(Path(folder) / "exported").to(device)
    pipeline.set_progress_bar_config(disable=True)
    model = model.to(device)
    if device.startswith("cuda"):
        pipeline.unet = pipeline.unet.to(memory_format=torch.channels_last)
    noise = model.noise(range(batch))
    time = torch.full((batch,), 0.5, device=device)

    def bare(num: int) -> Callable[[], Any]:
        @torch.no_grad()
        def call() -> None:
            for _ in range(num):
                model.denoiser.network(noise, time)

        return call

    def stock(num: int) -> Callable[[], Any]:
        settings = {"num_inference_steps": num, "output_type": "np", "use_clipped_model_output": True}
        return lambda: pipeline(batch_size=batch, generator=torch.Generator(device).manual_seed(0), **settings)

    def ours(num: int, precision: str = "float32") -> Callable[[], Any]:
        return lambda: model.sample(range(batch), num, batch_size=batch, precision=precision)

    seconds: dict[int, dict[str, list[float]]] = {}
    over: dict[int, float] = {}
    for num in steps:
        # The parts of a comparison run close together in time, so the load of the machine is the same for all of them.
        parts = {"ours": ours(num), "half": ours(num, "bf16"), "bare": bare(num), "stock": stock(num)}
        times = 1 if num <= FEW else TIMES
        if num != 4:
            parts["at 4"] = repeated(ours(4), times)
        seconds[num] = timed(parts, rounds or max(3, ROUNDS[name] // num), device, warm_up=1)
        over[num] = 1.0 if num == 4 else times * median_ratio(seconds[num]["ours"], seconds[num]["at 4"])
    rows = []
    for num in steps:
        mine, half, base, theirs = (seconds[num][kind] for kind in ("ours", "half", "bare", "stock"))
        rows.append(
            {
                "network": name, "batch": batch, "steps": num, "images / s": round(batch / median(mine), 3),
                "bare images / s": round(batch / median(base), 3),
                "diffusers images / s": round(batch / median(theirs), 3),
                "ours / bare": round(median_ratio(mine, base), 4),
                "diffusers / ours": round(median_ratio(theirs, mine), 4),
                "ours / ours in bf16": round(median_ratio(mine, half), 4),
                "time / time at 4": round(over[num], 2),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning)
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=STEPS, default=None)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=None, help="numbers of steps; default: those listed for each network"
    )
    options = parsed(parser)
    rows: list[dict[str, Any]] = []
    for name in options.networks or (["tiny"] if options.short else ["digits", "cifar10"]):
        rows += measured(name, options.batch, options.steps or STEPS[name], options.device, options.rounds)
    write("sample", rows, options, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
