"""Time an update of each objective, and compare it with its network calls and optimiser steps alone.

A halving update is also compared with a naive implementation of the same update.

    python benchmarks/step.py                  # digits, Fashion-MNIST, CIFAR-10; float32 and bf16; eager and compiled
    python benchmarks/step.py --networks digits --short

"Bare" makes the number of network calls that the objective declares, with and without a backward pass, and takes an
optimiser step for each backward pass. It uses existing tensors, the same precision and the same compilation, and omits
data, noise, target, loss and clipping. (A halving needs two forward passes of the teacher, and one forward and one
backward pass of the student.)

"Naive" is an update as in public re-implementations, in float32. It decodes images and fetches the loss at every
update, and uses one conversion function for each pair of parameterisations, the subtractive target, an unfused
optimiser and a loop over the parameters for the moving average.

All of these take turns in one process. On a GPU, a turn consists of several updates, because a thread prepares the
inputs for halfstep's updates in advance and would otherwise do this during the turns of the other parts.
"""

import copy
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import arguments, denoiser, halving, images, median, median_ratio, parsed, repeated, timed, write
from halfstep.data import MemoryData, held_on, training_batch
from halfstep.nets import copy_denoiser, set_dropout
from halfstep.objectives import FINISHING, Consistency, Finishing, MomentMatching, Plan, Stage
from halfstep.runtime.processes import make_accelerator
from halfstep.train.engine import StageTrainer
from halfstep.train.optimizers import make_optimizer
from halfstep.train.player import compile_networks
from halfstep.train.settings import Engine

NUM_STEPS = 8
BATCH = {"digits": 64, "fashion_mnist": 64, "cifar10": 16, "tiny": 8}


def ours(name: str, data: MemoryData, stage: Stage, precision: str, compiled: bool, device: str) -> Callable[[], Any]:
    """Return a function that runs one update of a `StageTrainer`."""
    teacher = denoiser(name, device)
    accelerator = make_accelerator(precision, cpu=device == "cpu")
    near = held_on(accelerator.device, data)
    trainer = StageTrainer(
        copy_denoiser(teacher), teacher, stage,
        lambda draw: training_batch(near, draw, False), data.shape,
        seed=0, stream="bench", accelerator=accelerator, engine=Engine(compile=compiled),
        ahead=0 if device == "cpu" else 3,
    )  # fmt: skip
    updates = trainer.run()
    return lambda: next(updates)


def bare(
    name: str, data: MemoryData, stage: Stage, precision: str, compiled: bool, device: str, micro_batches: int = 1
) -> Callable[[], Any]:
    """Return a function that makes only the network calls and optimiser steps of an update on one micro batch."""
    evals = stage.objective.evals
    networks = {each: denoiser(name, device).eval().requires_grad_(False) for each in evals}
    optimizers = {}
    for each, made in networks.items():
        if evals[each].backward:
            set_dropout(made.network, 0.0)
            made.train().requires_grad_(True)
            optimizers[each] = make_optimizer("adamw", list(made.parameters()), stage.training)
        if compiled:
            compile_networks(made)
    batch = stage.training.batch_size
    x0 = data.fetch(torch.arange(batch)).x0.to(device)
    time = torch.full((batch,), 0.5, device=device)
    kind = torch.device(device).type

    def called(each: str, times: float) -> None:
        for _ in range(micro_batches * round(times)):
            networks[each].network(x0, time)

    def update() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"), torch.no_grad():
            for each, found in evals.items():
                called(each, found.forward - found.backward)
        for each, optimizer in optimizers.items():
            for _ in range(round(evals[each].backward)):
                for _ in range(micro_batches):
                    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                        output = networks[each].network(x0, time)
                    output.float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    return update


def naive(name: str, data: MemoryData, device: str, batch: int) -> Callable[[], Any]:
    """Return a function that runs a naive implementation of the same update."""
    teacher = denoiser(name).network.to(memory_format=torch.contiguous_format).to(device).eval()
    student = copy.deepcopy(teacher).train()
    ema = copy.deepcopy(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, foreach=False, fused=False)
    files = []
    for pixels in data.x[: 8 * batch]:
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy()).save(file, "PNG")
        files.append(file.getvalue())

    def decoded(index: int) -> Tensor:
        pixels = np.asarray(Image.open(io.BytesIO(files[index])), np.float32)
        return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1).copy()) / 127.5 - 1

    def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(-1, 1, 1, 1)
        return torch.cos(t * math.pi / 2), torch.sin(t * math.pi / 2)

    def x0_from_v(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return alpha * x_t - sigma * v

    def eps_from_v(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(t)
        return sigma * x_t + alpha * v

    def ddim(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        with torch.no_grad():
            v = teacher(x_t, t)
        alpha, sigma = alpha_sigma(s)
        return alpha * x0_from_v(x_t, v, t) + sigma * eps_from_v(x_t, v, t)

    def update() -> None:
        x0 = torch.stack([decoded(int(index)) for index in torch.randint(len(files), (batch,))]).to(device)
        index = torch.randint(1, NUM_STEPS, (batch,), device=device)
        t, middle, s = (index + 1) / NUM_STEPS, (index + 0.5) / NUM_STEPS, index / NUM_STEPS
        alpha, sigma = alpha_sigma(t)
        x_t = alpha * x0 + sigma * torch.randn_like(x0)
        x_s = ddim(ddim(x_t, t, middle), middle, s)
        alpha_s, sigma_s = alpha_sigma(s)
        target = (x_s - sigma_s / sigma * x_t) / (alpha_s - sigma_s / sigma * alpha)
        found = x0_from_v(x_t, student(x_t, t), t)
        weight = torch.clamp(alpha**2 / sigma**2, min=1)
        loss = (weight * (found - target) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, parameter in zip(ema.parameters(), student.parameters(), strict=True):
                average.copy_(0.999 * average + 0.001 * parameter)
        loss.item()

    return update


def finishing(batch: int) -> Stage:
    """Return a finishing stage in which every update also trains the student."""
    stage = Plan.finishes([NUM_STEPS], FINISHING, lambda steps: Finishing(steps, lead_updates=0)).stages[0]
    return replace(stage, training=replace(stage.training, num_updates=10**9, batch_size=batch, anneal=False))


def measured(name: str, device: str, batch: int, rounds: int, settings: list[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Return a row for each stage and setting. The rows for halving also contain the naive update."""
    data = images(name)
    halved = halving(batch, num_steps=NUM_STEPS)
    stages = {
        "halve": halved,
        "finish": finishing(batch),
        "consistency": replace(halved, objective=Consistency(NUM_STEPS)),
        "moments": replace(halved, objective=MomentMatching(NUM_STEPS)),
    }
    parts: dict[str, Callable[[], Any]] = {"naive": naive(name, data, device, batch)}
    kinds = {
        (update, precision, compiled): f"{update} {precision}{' compiled' if compiled else ''}"
        for update in stages
        for precision, compiled in settings
    }
    for (update, precision, compiled), kind in kinds.items():
        parts[f"bare {kind}"] = bare(name, data, stages[update], precision, compiled, device)
        parts[f"ours {kind}"] = ours(name, data, stages[update], precision, compiled, device)
    each = 1 if device == "cpu" else 20
    turns = timed({part: repeated(call, each) for part, call in parts.items()}, rounds, device, warm_up=3)
    seconds = {part: [one / each for one in found] for part, found in turns.items()}
    millions = sum(p.numel() for p in denoiser(name).parameters()) / 1e6
    rows = []
    for (update, precision, compiled), kind in kinds.items():
        mine, base = seconds[f"ours {kind}"], seconds[f"bare {kind}"]
        beside = seconds["naive"] if update == "halve" else None
        rows.append(
            {
                "network": name, "M parameters": round(millions, 3), "batch": batch, "update": update,
                "precision": precision, "compiled": compiled, "seconds": median(mine), "bare": median(base),
                "naive": beside and median(beside),
                "ours / bare": round(median_ratio(mine, base), 4),
                "naive / ours": beside and round(median_ratio(beside, mine), 3),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None, help="batch size; default: that of each network's recipe")
    parser.add_argument("--eager", action="store_true", help="skip compiled networks")
    options = parsed(parser)
    names = options.networks or (["digits"] if options.short else ["digits", "fashion_mnist", "cifar10"])
    settings = [("float32", False), ("bf16", False)]
    if not (options.eager or options.short):
        settings += [("float32", True), ("bf16", True)]
    rows: list[dict[str, Any]] = []
    for name in names:
        # torch keeps eight graphs per network class, and silently runs all later graphs without compilation.
        torch._dynamo.reset()
        rounds = options.rounds or (60 if name in ("digits", "tiny") else 8)
        rows += measured(name, options.device, options.batch or BATCH[name], rounds, settings)
        # On a CPU, compilation can take an hour, so the results are written after each network.
        write("step", rows, options, threads=torch.get_num_threads(), num_steps=NUM_STEPS)


if __name__ == "__main__":
    main()
