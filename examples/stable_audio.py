"""Distil Stable Audio to 4 steps, using captioned recordings or only a file of prompts, and write sounds as .wav files.

    python examples/stable_audio.py PIPELINE SOUNDS OUT

PIPELINE is the folder of a StableAudioPipeline (or a name on the Hub), for which diffusers needs the package torchsde.
SOUNDS is a folder with a .txt file for each recording, or a text file with one prompt per line.
"""

import sys
import wave
from pathlib import Path

from halfstep.cli import main as halfstep

SECONDS = 10.0
BUDGET = (
    *("--matching.num-updates", "2000", "--matching.batch-size", "8", "--matching.learning-rate", "1e-4"),
    *("--chain.start-steps", "32", "--chain.num-updates", "2000", "--chain.batch-size", "8"),
    *("--chain.lora-rank", "64", "--base-precision", "bf16", "--engine.micro-batch", "1"),
    *("--engine.gradient-checkpointing", "--evaluation.no-enabled"),
)
"""An untuned starting point for one GPU. To see the cost, run `halfstep distill` with these options and --dry-run."""


def main(
    pipeline: str, sounds: str, out: Path, budget: tuple[str, ...] = BUDGET, seconds: float = SECONDS
) -> tuple[Path, Path]:
    """Return the folders of the run and of the exported pipeline. Longer recordings are truncated to `seconds`."""
    run, exported, call = out / "run", out / "audio-4-steps", ("--call", f"audio_end_in_s={seconds}")
    data = ("--prompts", sounds)
    if Path(sounds).is_dir():
        data = ("--data", str(out / "latents"))
        halfstep(["encode", pipeline, "--data", sounds, "--out", data[1], *call])
    words = ("--to", "4", "--out", str(run), "--matching.guidance-scale", "7")
    halfstep(["distill", pipeline, *data, *words, *budget, *call])
    halfstep(["export", str(run), "--out", str(exported)])
    return run, exported


def use(exported: Path, prompts: list[str], out: Path, seconds: float = SECONDS) -> None:
    """Sample with four network calls, without using halfstep, and write `out`/0.wav, 1.wav, ... as 16-bit audio."""
    import torch
    from diffusers import StableAudioPipeline

    pipe = StableAudioPipeline.from_pretrained(exported)
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "audio_end_in_s": seconds}
    sounds = pipe(prompts, **call, generator=torch.manual_seed(0)).audios.clamp(-1, 1)  # [prompts, channels, samples]
    for number, sound in enumerate(sounds):
        with wave.open(str(out / f"{number}.wav"), "wb") as file:
            file.setparams((len(sound), 2, pipe.vae.config.sampling_rate, 0, "NONE", ""))
            file.writeframes((32767 * sound.T).round().numpy().astype("<i2").tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    _, folder = main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
    use(folder, ["rain on a tin roof", "a dog barks twice"], Path(sys.argv[3]))
