"""Train an eps teacher on linear betas with diffusers, match it to v, and halve it to 4 steps.

    python benchmarks/eps_teacher.py /tmp/eps-teacher

This script trains diffusers' `UNet2DModel` on the digits, with diffusers' DDPM noise and the plain eps loss, and
saves it as a `DDPMPipeline`. It then runs `halfstep distill TEACHER --data digits --to 4` with the demo's budgets. The
metrics are written to docs/results/eps-teacher.json.
"""

import json
import sys
import time
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from halfstep.cli.main import main
from halfstep.data import DataConfig, open_data
from halfstep.nets import unet2d_config
from halfstep.recipes import UNetConfig, recipes

UPDATES, BATCH, RATE, DECAY = 1500, 128, 2e-3, 0.995
"""The hyperparameters of the demo's own teacher."""


def train_teacher(folder: Path) -> None:
    """Train a DDPM on the digits and save it to the folder with diffusers."""
    torch.manual_seed(0)
    network = recipes["digits"]().network
    assert isinstance(network, UNetConfig)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, **network.model_dump(exclude={"type", "num_train_timesteps"})
    )
    unet = UNet2DModel(**config | {"sample_size": 8})
    average = {name: value.clone() for name, value in unet.state_dict().items()}
    scheduler = DDPMScheduler()
    x0 = open_data(DataConfig(source="digits")).fetch(torch.arange(1797)).x0
    optimizer = torch.optim.AdamW(unet.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    for update in range(UPDATES):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - update / UPDATES) * min(1, (update + 1) / 50)
        clean = x0[torch.randint(len(x0), (BATCH,))]
        eps, step = torch.randn_like(clean), torch.randint(1000, (BATCH,))
        loss = (unet(scheduler.add_noise(clean, eps, step), step).sample - eps).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(DECAY, (1 + update) / (10 + update))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - decay)
    unet.load_state_dict(average)
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(folder)


def distill(teacher: Path, run: Path) -> list[str]:
    """Run the distillation command with the demo's budgets, and return its arguments."""
    training = recipes["digits"]().chain.training
    words = [
        *("distill", str(teacher), "--data", "digits", "--to", "4", "--start", "64", "--out", str(run)),
        *("--matching.num-updates", "4000", "--matching.learning-rate", "2e-3"),
        *("--matching.warmup-updates", "50", "--matching.adam-betas", "0.9", "0.99", "--matching.ema-decay", "0.995"),
        *("--chain.num-updates", str(training.num_updates), "--chain.batch-size", str(training.batch_size)),
        *("--chain.learning-rate", str(training.learning_rate), "--chain.warmup-updates", "20"),
        *("--chain.adam-betas", "0.9", "0.99", "--evaluation.batch-size", "500"),
        *("--chain.updates-at", "32", "100", "16", "200", "8", "650"),
        *("--chain.learning-rate-at", "32", "1.5e-4", "16", "2e-4", "8", "4e-4"),
    ]
    main(words)
    return words


if __name__ == "__main__":
    out = Path(sys.argv[1])
    began = time.time()
    there = (out / "teacher").is_dir()
    if not there:
        train_teacher(out / "teacher")
    trained = time.time()
    words = distill(out / "teacher", out / "run")
    stages = {
        file.parent.name: json.loads(file.read_text()) for file in sorted((out / "run").glob("stages/*/metrics.json"))
    }
    recipe = json.loads((out / "run" / "recipe.json").read_text())
    result = {
        "command": f"python benchmarks/eps_teacher.py {out}",
        "distill": "halfstep " + " ".join(words),
        "teacher": {"updates": UPDATES, "batch": BATCH, "rate": RATE, "ema_decay": DECAY},
        "environment": recipe["environment"],
        "seconds": {"teacher": None if there else round(trained - began), "distill": round(time.time() - trained)},
        "stages": stages,
    }
    Path("docs/results/eps-teacher.json").write_text(json.dumps(result, indent=1) + "\n")
