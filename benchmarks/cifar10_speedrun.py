"""From CIFAR-10 to a four-step student on one GPU, within ten minutes in all, and the table of what came out.

    python benchmarks/cifar10_speedrun.py RUN --data ../shared/data/cifar10 \
        --features ../shared/data/weights/resnet20-cifar10.safetensors
    python benchmarks/cifar10_speedrun.py RUN --tiny ...      # the same on a CPU, at a size that shows the way only

First batch and compilation are chosen by the samples a second that an update reaches here, and the numbers of updates
by the seconds that calibration, compilation and measuring leave of the budget (RUN.plan.json). Network, precision,
schedule and learning rates are set, not chosen: no GPU was at hand to choose them on. Then the teacher and its students
are trained, and all are measured with 10,000 samples in the features of --features against the test images, beside the
teacher's DDIM at 1 to 256 steps. A call ends in good order after --seconds; the same command goes on until the table is
there. The seconds of all calls are added up, and told beside the budget.
"""

import argparse
import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from common import RESULTS, facts, show
from halfstep.cli.main import main
from halfstep.data import DataConfig, open_data
from halfstep.recipes import build, recipes
from halfstep.recipes.schema import ChainConfig, EngineConfig, EvaluationConfig, Recipe, TeacherConfig, UNetConfig
from halfstep.runs import RunFolder, read_json, write_arrays, write_json
from halfstep.train.cost import count_forward
from halfstep.train.evaluate import samples_array
from halfstep.train.pipeline import trainer_for
from halfstep.train.processes import make_accelerator

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations a second, by a part of the card's name; from the makers' data sheets."""

SHARES = {"teacher": 0.6, "chain": 0.3}
"""Of what calibration, measuring and compilation leave of the budget; the rest is for what goes another way."""

CANDIDATES = [(256, False), (256, True), (512, True), (1024, True)]
"""Batch size, and whether the networks are compiled."""

NETWORK = UNetConfig(
    block_out_channels=(96, 192, 192), layers_per_block=2, attention=(False, True, False), attention_head_dim=64
)
TINY = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, attention=(False, False), mid_attention=False,
    attention_head_dim=8, norm_num_groups=4,
)  # fmt: skip


def recipe_of(data: str, batch: int, compiled: bool, updates: dict[str, int], tiny: bool) -> Recipe:
    """The recipe with this batch and these numbers of updates, for the teacher and for all students together."""
    chain = ChainConfig(
        start_steps=256 if not tiny else 16, students=(64, 16, 8, 4, 2, 1) if not tiny else (4, 2, 1),
        num_updates=max(1, updates["chain"] // (7 if not tiny else 4)), batch_size=batch, learning_rate=2e-4,
        updates_at={1: max(1, 2 * updates["chain"] // 7)} if not tiny else {}, adam_betas=(0.9, 0.99),
    )  # fmt: skip
    teacher = TeacherConfig(
        num_updates=updates["teacher"], batch_size=batch, learning_rate=5e-4, anneal=True, adam_betas=(0.9, 0.99),
        warmup_updates=updates["teacher"] // 20, ema_decay=0.999,
    )  # fmt: skip
    cuda = torch.cuda.is_available()
    return Recipe(
        name="cifar10-speedrun",
        data=DataConfig(source=data, flip=True),
        network=TINY if tiny else NETWORK,
        model=recipes["cifar10"]().model,
        teacher=teacher,
        chain=chain,
        evaluation=EvaluationConfig(enabled=False),
        engine=EngineConfig(
            precision="bf16" if cuda else "float32", compile=compiled, log_every=20, checkpoint_minutes=1.0
        ),
    )  # fmt: skip


def seconds_of_updates(recipe: Recipe, rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of an update of the teacher and of a student, after those that compile; and the seconds that
    those took."""
    spec = build(recipe, what="all")
    found, compiling = {}, 0.0
    for name, stage in (("teacher", spec.plan.stages[0]), ("chain", spec.plan.stages[1])):
        accelerator = make_accelerator(spec.precision, spec.cpu)
        parent = None
        if name == "chain":
            parent = _untrained(spec)
        trainer = trainer_for(spec, stage, f"calibrate-{name}", parent, accelerator)
        times = []
        start = time.perf_counter()
        for update in trainer.run():
            trainer.check_finite()
            now = time.perf_counter()
            times.append(now - start)
            start = now
            if update >= 3 + rounds:
                break
        found[name] = sorted(times[3:])[len(times[3:]) // 2]
        compiling += sum(times[:3])
    return found, compiling


def _untrained(spec: Any) -> Any:
    from halfstep.core.noise import processes
    from halfstep.core.prediction import predictions
    from halfstep.nets import describe_network
    from halfstep.runs import Manifest
    from halfstep.train.model import Model
    from halfstep.train.pipeline import fresh_denoiser

    made = fresh_denoiser(spec)
    manifest = Manifest(
        stage="00-denoise", objective="denoise", parent=None, num_steps=None, num_updates=0, seconds=0.0,
        shape=spec.data.shape, num_classes=spec.num_classes, is_image=True, clip=True,
        network=describe_network(made.network), process=processes.describe(made.process),
        prediction=predictions.describe(made.prediction), files={},
    )  # fmt: skip
    return Model(made, manifest)


def planned(options: argparse.Namespace) -> dict[str, Any]:
    """Batch, compilation and updates, by measurement; kept beside the run for the calls that go on with it."""
    file = options.run.with_name(options.run.name + ".plan.json")
    if file.is_file():
        return dict(read_json(file))
    begun = time.monotonic()
    rows = []
    for batch, compiled in [(16, False), (32, False)] if options.tiny else CANDIDATES:
        recipe = recipe_of(options.data, batch, compiled, {"teacher": 1000, "chain": 1000}, options.tiny)
        seconds, compiling = seconds_of_updates(recipe, 3 if options.tiny else 20)
        rows.append({"batch": batch, "compiled": compiled, **seconds, "samples / s": batch / seconds["teacher"],
                     "compiling": compiling})  # fmt: skip
    best = max(rows, key=lambda row: row["samples / s"])
    # An update of the teacher is three forward passes of a batch.
    measuring = COUNT[options.tiny] * evals_of_all(recipe, options.tiny) * best["teacher"] / best["batch"] / 3
    calibrating = time.monotonic() - begun
    left = options.budget - calibrating - best["compiling"] - measuring
    if left <= 0:
        raise SystemExit(f"a budget of {options.budget:g} s leaves nothing to train in: calibration took "
                         f"{calibrating:.0f} s, and measuring will take {measuring:.0f} s")  # fmt: skip
    updates = {name: max(1, int(share * left / best[name])) for name, share in SHARES.items()}
    plan = {"tried": rows, "batch": best["batch"], "compiled": best["compiled"], "updates": updates,
            "seconds": {name: best[name] for name in SHARES}, "calibrating": calibrating,
            "measuring, estimated": measuring, "environment": facts()}  # fmt: skip
    write_json(file, plan)
    show("calibration", rows)
    return plan


COUNT = {False: 10_000, True: 200}
"""Samples that are measured, by whether the run is a tiny one."""


def steps_of(tiny: bool) -> list[int]:
    """Steps at which the teacher is measured."""
    return [2**k for k in range(5 if tiny else 9)]


def evals_of_all(recipe: Recipe, tiny: bool) -> int:
    """Network calls for one sample of everything that the table holds."""
    return sum(steps_of(tiny)) + sum(recipe.chain.students or ())


@contextlib.contextmanager
def counted(run: Path) -> Iterator[Path]:
    """In here the time of this call is added to that of the calls before it, in the file that is given, however it
    ends."""
    file, begun = run.with_name(run.name + ".seconds.json"), time.monotonic()
    before = float(read_json(file)) if file.is_file() else 0.0
    try:
        yield file
    finally:
        write_json(file, round(before + time.monotonic() - begun, 1))


def stopped(number: int, frame: object) -> NoReturn:
    """Ends a call that is not in a run, with what it has measured so far."""
    raise SystemExit(128 + number)


def table(options: argparse.Namespace, plan: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """What came out: quality, images a second, and the share of the card's peak."""
    folder = RunFolder(options.run)
    sets = _sets(options.run / "evaluation")
    rows = []
    for row in sets["rows"]:
        distance = row["figures"]["frechet"]["mean"]
        rows.append(
            {
                "model": row["series"], "steps": row["num_steps"], "FD(resnet20)": distance,
                "images / s": round(1000 / row["seconds_per_1000"], 1),
            }
        )  # fmt: skip
    seconds = {stage.name: stage.manifest(verify=False).seconds for stage in folder.stages()}
    spec = build(recipe, what="all")
    forward = count_forward(spec)
    stage = spec.plan.stages[1]
    rate = forward.flops * stage.update_cost / plan["seconds"]["chain"]
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for part, value in PEAK_BF16.items() if part in name), None)
    return {
        "rows": rows, "protocol": sets["protocol"], "training seconds": seconds,
        "operations a second": rate, "share of the bf16 peak": None if peak is None else rate / peak,
    }  # fmt: skip


def floor(options: argparse.Namespace, count: int, extractor: str) -> float:
    """The distance of as many training images as a model draws: what a model that has learned all would come to."""
    images = options.run.with_name(options.run.name + ".train.npz")
    measured = images.with_suffix(".evaluation")
    if not images.is_file():
        data = open_data(DataConfig(source=options.data, labels=False))
        rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
        write_arrays(images, arr_0=samples_array(data.fetch(rows).x0, True))
    words = ["--extractors", extractor, "--data", options.data, "--split", "test", "--out", str(measured)]
    main(["evaluate", str(images), *words])
    return float(_sets(measured)["rows"][0]["figures"]["frechet"]["mean"])


def _sets(evaluation: Path) -> dict[str, Any]:
    """The table of distances to the data."""
    tables = read_json(evaluation / "evaluation.json")["tables"]
    (found,) = [table for table in tables if table["protocol"]["kind"] == "sets"]
    return dict(found)


def within(seconds: float) -> None:
    """Asks this process to stop in good order after so many seconds."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def made(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, up to the table."""
    plan = planned(options)
    recipe = recipe_of(options.data, plan["batch"], plan["compiled"], plan["updates"], options.tiny)
    file = options.run.with_name(options.run.name + ".recipe.json")
    file.write_text(recipe.model_dump_json(indent=1))
    main(["run", str(file), "--out", str(options.run)])
    count, extractor = COUNT[options.tiny], f"resnet20-cifar10={options.features}"
    steps = [str(number) for number in steps_of(options.tiny)]
    main(
        ["evaluate", str(options.run), "--num-steps", *steps, "--against", "teacher-ddim", "--num-samples", str(count),
         "--extractors", extractor, "--data", options.data, "--split", "test"]
    )  # fmt: skip
    return {"plan": plan, **table(options, plan, recipe), "floor": floor(options, count, extractor)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--data", required=True, help="CIFAR-10: a folder with splits train and test, or a Hub name")
    parser.add_argument("--features", required=True, help="resnet20-cifar10.safetensors")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds for all")
    parser.add_argument("--seconds", type=float, default=540.0, help="seconds of this call")
    parser.add_argument("--tiny", action="store_true", help="a size that a CPU goes through in two minutes")
    parser.add_argument("--out", type=Path, default=None, help="file for the JSON; docs/results/benchmarks by default")
    options = parser.parse_args()
    options.run.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stopped)
    within(options.seconds)
    with counted(options.run) as spent:
        result = made(options)
    result["seconds in all"], result["budget"] = read_json(spent), options.budget
    title = f"CIFAR-10 speedrun, {result['seconds in all']:.0f} s in all; training images: FD {result['floor']:.4g}"
    show(title, result["rows"])
    out = options.out or (None if options.tiny else RESULTS / "cifar10_speedrun.json")
    if out is not None:
        out.write_text(json.dumps({"environment": facts(), **result}, indent=1) + "\n")
