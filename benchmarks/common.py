"""Shared code of the benchmarks: networks, results, and interleaved timing, which spreads noise over all parts."""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine, processes
from halfstep.core.prediction import V, predictions
from halfstep.data import MemoryData
from halfstep.models.model import Model
from halfstep.nets import UNet2D, describe_network, unet2d_config
from halfstep.objectives import Halving, Plan, Stage, Training
from halfstep.recipes import UNetConfig, recipes
from halfstep.run.spec import RunSpec
from halfstep.runs import Manifest, Outcome
from halfstep.runtime.environment import environment
from halfstep.train.settings import Engine

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "benchmarks"

SIZES = {"digits": (1, 8), "fashion_mnist": (1, 28), "cifar10": (3, 32), "tiny": (1, 8)}
"""The number of channels and the side length of each network's images."""


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the common options of the benchmarks."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="run for a minute in total, with the smallest networks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None, help="number of CPU threads for torch")
    parser.add_argument(
        "--out", type=Path, default=None, help="JSON file to write; by default in docs/results/benchmarks"
    )
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, set the number of threads and return the options."""
    found = parser.parse_args()
    if found.threads:
        torch.set_num_threads(found.threads)
    return found


def network(name: str) -> UNet2D:
    """Return the unconditional U-Net of a recipe with new random weights from a fixed seed."""
    channels, side = SIZES[name]
    if name == "tiny":
        shape: dict[str, Any] = {
            "block_out_channels": (8, 16), "layers_per_block": 1, "attention": (False, False),
            "mid_attention": False, "attention_head_dim": 8, "norm_num_groups": 4,
        }  # fmt: skip
    else:
        config = recipes[name]().network
        assert isinstance(config, UNetConfig)
        shape = config.model_dump(exclude={"type", "num_train_timesteps"})
    torch.manual_seed(0)
    made = UNet2D(unet2d_config(size=(side, side), in_channels=channels, out_channels=channels, **shape), 1024)
    with torch.no_grad():
        # In some networks, the weights of the last layer start at zero. An output of 0 would not be a realistic load.
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)
    return made


def denoiser(name: str, device: str = "cpu") -> NetworkDenoiser:
    """Return the network as a v-prediction denoiser on the cosine process."""
    return NetworkDenoiser(network(name).to(device), VPCosine(), V())


def model_of(name: str) -> Model:
    """Return the network as a model that clips x0, as in an image recipe."""
    made = denoiser(name).eval()
    channels, side = SIZES[name]
    manifest = Manifest(
        stage="benchmark", objective="denoise", parent=None, outcome=Outcome(role="teacher"), num_updates=1,
        seconds=0.0, shape=(channels, side, side), is_image=True, clip=True, network=describe_network(made.network),
        process=processes.describe(made.process), prediction=predictions.describe(made.prediction), files={},
    )  # fmt: skip
    return Model(made, manifest)


def halving(batch: int, num_updates: int = 10**9, ema_decay: float = 0.999, num_steps: int = 8) -> Stage:
    """Return a halving stage with a moving average. Its updates cost the same with any number of steps."""
    return Stage(Halving(num_steps), Training(num_updates, 1e-4, batch, anneal=False, ema_decay=ema_decay))


def spec_of(name: str, stage: Stage, **changes: Any) -> RunSpec:
    """Return a run with one stage on random images. `changes` sets fields of `RunSpec` and `Engine`."""
    changes.setdefault("data", images(name))
    engine = {each.name: changes.pop(each.name) for each in fields(Engine) if each.name in changes}
    return RunSpec(
        recipe={"name": "benchmark"}, plan=Plan((stage,)), process=VPCosine(), prediction=V(), clip=True,
        engine=Engine(trackers=(), **engine), **changes,
    )  # fmt: skip


def images(name: str, count: int = 2048) -> MemoryData:
    """Return random images of the network's size. Timings do not depend on the content of images."""
    channels, side = SIZES[name]
    generator = torch.Generator().manual_seed(0)
    return MemoryData(
        "noise", torch.randint(256, (count, channels, side, side), generator=generator, dtype=torch.uint8)
    )


def synchronise(device: str) -> None:
    """Wait until the device has finished all work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def repeated(part: Callable[[], Any], times: int) -> Callable[[], Any]:
    """Return a function that calls a part `times` times in a row."""

    def call() -> None:
        for _ in range(times):
            part()

    return part if times == 1 else call


def timed(
    parts: Mapping[str, Callable[[], Any]], rounds: int, device: str = "cpu", warm_up: int = 2
) -> dict[str, list[float]]:
    """Return the time of each part in each round, in seconds. The parts take turns, so that disturbances of the machine
    affect all parts. The order changes in each round, because a part is faster if the previous part left its weights in
    the cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for number in range(warm_up + rounds):
        order = list(parts)
        random.Random(number).shuffle(order)
        for name in order:
            part = parts[name]
            synchronise(device)
            start = time.perf_counter()
            part()
            synchronise(device)
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median(values: list[float]) -> float:
    return statistics.median(values)


def median_ratio(top: list[float], bottom: list[float]) -> float:
    """Return the median, over all rounds, of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(top, bottom, strict=True))


def facts() -> dict[str, Any]:
    """Return a description of the machine, the versions, the commit and the command."""
    return environment() | {"command": " ".join(["python", *sys.orig_argv[1:]])}


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right" if isinstance(rows[0][name], int | float) else "left")
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=200).print(table)


def write(name: str, rows: list[dict[str, Any]], options: argparse.Namespace, **more: Any) -> None:
    """Print the table and write it as JSON with a description of the machine. --short writes a file only with --out."""
    show(name, rows)
    path = options.out or (None if options.short else RESULTS / f"{name}.json")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"benchmark": name, "environment": facts(), **more, "rows": rows}, indent=1) + "\n")
        print(f"wrote {path}")
