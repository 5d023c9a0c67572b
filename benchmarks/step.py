"""Seconds of an update: ours, the bare sum of its network calls and optimiser, and a halving step written naively.

    python benchmarks/step.py                  # digits, Fashion-MNIST, CIFAR-10; float32 and bf16; eager and compiled
    python benchmarks/step.py --networks digits --short
    python benchmarks/step.py --objective consistency   # without the naive step, which is a halving's

Bare is the objective's own network calls (for halving two teacher forwards, one forward and backward pass of the
student) and one optimiser step, on tensors that are there, in the same precision and compiled alike: no data, noise,
target, loss, clipping. Naive is what public
re-implementations do, in float32: images decoded at every update, one conversion function for each pair of
parameterisations, the subtractive target, an optimiser without fusion, a loop over parameters for the moving average,
the loss fetched at every update. All take turns in one process. On a GPU a turn is several updates: ours
are fed by a thread that is some ahead, and would else have its work done in the others' turns.
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
from halfstep.objectives import STUDENT, Consistency, Halving, Objective
from halfstep.runtime.processes import make_accelerator
from halfstep.train.engine import StageTrainer, compile_networks
from halfstep.train.optimizers import make_optimizer
from halfstep.train.settings import Engine

NUM_STEPS = 8
OBJECTIVES: dict[str, Objective] = {"halve": Halving(NUM_STEPS), "consistency": Consistency(NUM_STEPS)}
"""Objectives without helpers."""
BATCH = {"digits": 64, "fashion_mnist": 64, "cifar10": 16, "tiny": 8}


def ours(
    name: str, data: MemoryData, precision: str, compiled: bool, device: str, batch: int, objective: Objective
) -> Callable[[], Any]:
    """One update of a `StageTrainer`."""
    teacher = denoiser(name, device)
    accelerator = make_accelerator(precision, cpu=device == "cpu")
    near = held_on(accelerator.device, data)
    trainer = StageTrainer(
        copy_denoiser(teacher), teacher, replace(halving(batch), objective=objective),
        lambda draw: training_batch(near, draw, False),
        seed=0, stream="bench", accelerator=accelerator, engine=Engine(compile=compiled),
        ahead=0 if device == "cpu" else 3,
    )  # fmt: skip
    updates = trainer.run()
    return lambda: next(updates)


def bare(
    name: str,
    data: MemoryData,
    precision: str,
    compiled: bool,
    device: str,
    batch: int,
    micro_batches: int = 1,
    objective: Objective = OBJECTIVES["halve"],
) -> Callable[[], Any]:
    """The network calls and the optimiser of an update, of so many micro batches of `batch` samples each."""
    teacher, student = denoiser(name, device).eval().requires_grad_(False), denoiser(name, device).train()
    set_dropout(student.network, 0.0)
    if compiled:
        compile_networks(teacher)
        compile_networks(student)
    optimizer = make_optimizer("adamw", list(student.parameters()), halving(batch).training)
    x0 = data.fetch(torch.arange(batch)).x0.to(device)
    time = torch.full((batch,), 0.5, device=device)
    kind = torch.device(device).type
    own = objective.evals[STUDENT]
    assert own.backward == 1

    def update() -> None:
        for _ in range(micro_batches):
            with torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16"):
                with torch.no_grad():
                    for _ in range(round(objective.evals["teacher"].forward)):
                        teacher.network(x0, time)
                    for _ in range(round(own.forward) - 1):
                        student.network(x0, time)
                output = student.network(x0, time)
            output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def naive(name: str, data: MemoryData, device: str, batch: int) -> Callable[[], Any]:
    """The same update as it is usually written."""
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


def measured(
    name: str, device: str, batch: int, rounds: int, settings: list[tuple[str, bool]], objective: str
) -> list[dict[str, Any]]:
    """A row for each setting, beside the naive step if it is halving."""
    data, method = images(name), OBJECTIVES[objective]
    parts: dict[str, Callable[[], Any]] = {}
    if objective == "halve":
        parts["naive"] = naive(name, data, device, batch)
    for precision, compiled in settings:
        kind = f"{precision}{' compiled' if compiled else ''}"
        parts[f"bare {kind}"] = bare(name, data, precision, compiled, device, batch, objective=method)
        parts[f"ours {kind}"] = ours(name, data, precision, compiled, device, batch, method)
    each = 1 if device == "cpu" else 20
    turns = timed({part: repeated(call, each) for part, call in parts.items()}, rounds, device, warm_up=3)
    seconds = {part: [one / each for one in found] for part, found in turns.items()}
    millions = sum(p.numel() for p in denoiser(name).parameters()) / 1e6
    rows = []
    for precision, compiled in settings:
        kind = f"{precision}{' compiled' if compiled else ''}"
        mine, base = seconds[f"ours {kind}"], seconds[f"bare {kind}"]
        row = {
            "network": name, "M parameters": round(millions, 3), "batch": batch, "precision": precision,
            "compiled": compiled, "seconds": median(mine), "bare": median(base),
            "ours / bare": round(median_ratio(mine, base), 4),
        }  # fmt: skip
        if "naive" in seconds:
            row["naive"] = median(seconds["naive"])
            row["naive / ours"] = round(median_ratio(seconds["naive"], mine), 3)
        rows.append(row)
    return rows


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=None)
    parser.add_argument("--objective", choices=OBJECTIVES, default="halve")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--batch", type=int, default=None, help="in the place of each network's own")
    parser.add_argument("--eager", action="store_true", help="leave the compiled networks out")
    options = parsed(parser)
    names = options.networks or (["digits"] if options.short else ["digits", "fashion_mnist", "cifar10"])
    settings = [("float32", False), ("bf16", False)]
    if not (options.eager or options.short):
        settings += [("float32", True), ("bf16", True)]
    rows: list[dict[str, Any]] = []
    for name in names:
        # Torch keeps eight graphs of one class of networks, and runs what comes after them without a word as it is.
        torch._dynamo.reset()
        rounds = options.rounds or (60 if name in ("digits", "tiny") else 8)
        rows += measured(name, options.device, options.batch or BATCH[name], rounds, settings, options.objective)
        # After each network: to compile them can take an hour of a CPU's time, and what was measured stays.
        write(
            "step" if options.objective == "halve" else f"step_{options.objective}",
            rows,
            options,
            threads=torch.get_num_threads(),
            num_steps=NUM_STEPS,
        )


if __name__ == "__main__":
    main()
