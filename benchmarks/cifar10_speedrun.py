"""Train a four-step CIFAR-10 student on one GPU within ten minutes in total, and write a table of the results.

    python benchmarks/cifar10_speedrun.py RUN --data ../shared/data/cifar10 \
        --features ../shared/data/weights/resnet20-cifar10.safetensors
    python benchmarks/cifar10_speedrun.py RUN --tiny ...      # a small demonstration on a CPU

Measurements on the machine determine these settings (RUN.plan.json):

- the precision with the fastest update;
- the largest network whose teacher can train on enough samples in its share of the budget, after subtracting the time
  to evaluate that network;
- the smallest batch size whose throughput is at least CLOSE times the highest throughput;
- whether to compile: only if more updates then fit, after the time to compile.

Learning rates and shares are fixed. The teacher and its students are then trained and evaluated: 10,000 samples are
compared with the test images in the features of the network --features. The teacher is also evaluated with DDIM at 1 to
256 steps.

A call stops cleanly after --seconds. Rerun the same command until the table is complete. Finished trials, updates and
rows are kept. The reported time is the sum over all calls, each measured from the start of its process. An interrupted
row of the table is repeated, so a single call is best. A row that does not fit into the rest of a call is left for the
next call. If the chosen precision is bfloat16, the last row is the four-step student sampled in float32, to show the
effect of the precision.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from common import RESULTS, facts, show
from halfstep.core.draw import generator_for
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions
from halfstep.data import Data, DataConfig, open_data
from halfstep.measure.evaluate import Evaluation, Reference
from halfstep.measure.sources import ModelSource, weights_of
from halfstep.measure.store import Cell, Store
from halfstep.metrics import frechet_of_moments, moments_of
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import describe_network
from halfstep.objectives import Training
from halfstep.recipes import ChainConfig, Recipe, UNetConfig, build, recipes
from halfstep.run.cost import count_forward
from halfstep.run.events import Progress, StageEnd
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.run.start import fresh_denoiser, trainer_for
from halfstep.runs import Manifest, Outcome, RunFolder
from halfstep.runtime.files import cache_folder, read_json, write_json
from halfstep.runtime.processes import make_accelerator
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.samplers import DDIM
from halfstep.train.settings import Engine, Precision

PEAK_BF16 = {"H100 80GB HBM3": 989e12, "H100 SXM": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second from the manufacturers' data sheets, keyed by part of the GPU's name."""

SHARES = {"teacher": 0.55, "chain": 0.3}
"""Shares of the budget that remains after calibration and evaluation. The rest is reserved for loading and checkpoints.
"""

CLOSE = 0.95
"""The sufficient share of the highest throughput. Larger batches would only reduce the number of updates."""

WORTH_COMPILING = 400.0
"""The minimum remaining time, in seconds, for trying compilation. Compilation takes a minute or two, which a shorter
training run cannot recover.
"""


class Size(NamedTuple):
    """The candidates and measurement settings for a run of one size."""

    networks: dict[str, UNetConfig]
    """The candidate networks, smallest first."""
    batches: tuple[int, ...]
    """The candidate batch sizes. Trials of networks and precisions use the first one."""
    enough: int
    """The minimum number of samples that a teacher must be trained on."""
    students: tuple[int, ...]
    start: int
    """The number of steps that the teacher of the first student takes."""
    count: int
    """The number of samples per row of the table, and the number of training images for the table's floor."""
    num_reference: int
    rounds: int
    """The number of updates that are timed in a trial, after the warm-up."""
    at_once: int
    """Sampling batch size."""

    @property
    def evals(self) -> int:
        """The number of network calls needed to draw one sample for every row of the table."""
        return sum(self.teacher_steps) + sum(self.students)

    @property
    def teacher_steps(self) -> list[int]:
        """The numbers of steps at which the teacher is evaluated, in increasing order."""
        return [2**k for k in range(self.start.bit_length())]


def unet(*widths: int) -> UNetConfig:
    """Return a network with attention at a resolution of 16 x 16."""
    return UNetConfig(
        block_out_channels=widths, layers_per_block=2, attention=(False, True, False), attention_head_dim=64
    )


def small_unet(*widths: int) -> UNetConfig:
    """Return a network that trains in seconds on a CPU but learns little."""
    return UNetConfig(
        block_out_channels=widths, layers_per_block=1, attention=(False, False), mid_attention=False,
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


FULL = Size(
    networks={"narrow": unet(64, 128, 128), "middle": unet(96, 192, 192), "wide": unet(128, 256, 256)},
    batches=(256, 128, 512), enough=1_000_000, students=(64, 16, 8, 4, 2, 1), start=256, count=10_000,
    num_reference=10_000, rounds=20, at_once=1000,
)  # fmt: skip
TINY = Size(
    networks={"narrow": small_unet(8, 16), "middle": small_unet(16, 32)}, batches=(32, 16), enough=20_000,
    students=(4, 2, 1), start=16, count=200, num_reference=1000, rounds=3, at_once=100,
)  # fmt: skip


class Setting(NamedTuple):
    """The settings that are chosen by measurement."""

    network: str
    precision: Precision
    batch: int
    compiled: bool


def recipe_of(data: str, size: Size, setting: Setting, updates: dict[str, int]) -> Recipe:
    """Return the recipe for a setting, with these numbers of updates for the teacher and for all students in total."""
    parts = len(size.students) + 1
    each = max(1, updates["chain"] // parts)
    return Recipe(
        name="cifar10-speedrun",
        data=DataConfig(source=data, flip=True),
        network=size.networks[setting.network],
        model=recipes["cifar10"]().model,
        teacher=Training(
            num_updates=updates["teacher"], batch_size=setting.batch, learning_rate=5e-4,
            adam_betas=(0.9, 0.99), warmup_updates=updates["teacher"] // 20, ema_decay=0.999,
        ),
        chain=ChainConfig(
            start_steps=size.start, students=size.students, updates_at={1: 2 * each},
            training=Training(each, 2e-4, setting.batch, adam_betas=(0.9, 0.99)),
        ),
        evaluation=Evaluation(enabled=False),
        engine=Engine(precision=setting.precision, compile=setting.compiled, log_every=20, checkpoint_minutes=1.0),
    )  # fmt: skip


def untrained(spec: RunSpec) -> Model:
    """Return an untrained teacher for trials."""
    made = fresh_denoiser(spec)
    manifest = Manifest(
        stage="00-denoise", objective="denoise", parent=None, outcome=Outcome(role="teacher"), num_updates=0,
        seconds=0.0, shape=spec.data.shape, num_classes=spec.num_classes, is_image=True, clip=True,
        network=describe_network(made.network), process=processes.describe(made.process),
        prediction=predictions.describe(made.prediction), files={},
    )  # fmt: skip
    return Model(made, manifest)


def synchronise() -> None:
    """Wait until the device has finished all work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trial(options: argparse.Namespace, size: Size, setting: Setting, data: Data) -> dict[str, Any]:
    """Return the measured times of a setting in seconds: an update of the teacher, an average update of a student, a
    network call per sample, the other sampling time per sample, and the first updates, which include compilation.
    """
    spec = build(recipe_of(options.data, size, setting, {"teacher": 1000, "chain": 1000}), what="all", data=data)
    found: dict[str, Any] = setting._asdict() | {"first": 0.0}
    for name, stage in (("teacher", spec.plan.stages[0]), ("chain", spec.plan.stages[1])):
        accelerator = make_accelerator(spec.engine.precision, spec.engine.cpu)
        parent = untrained(spec).to(accelerator.device) if name == "chain" else None
        trainer = trainer_for(spec, stage, f"trial-{name}", parent, accelerator)
        updates = trainer.run()
        begun = time.perf_counter()
        for _ in range(3):
            next(updates)
        synchronise()
        first = time.perf_counter()
        for _ in range(size.rounds):
            next(updates)
        synchronise()
        found[name] = (time.perf_counter() - first) / size.rounds
        found["first"] += first - begun
        trainer.check_finite()
        updates.close()
    # Average over all students, because a larger factor between two students requires more teacher calls.
    costs = [stage.update_cost * stage.training.num_updates for stage in spec.plan.stages[1:]]
    updates_ = sum(stage.training.num_updates for stage in spec.plan.stages[1:])
    found["chain"] *= sum(costs) / updates_ / spec.plan.stages[1].update_cost
    model = untrained(spec).to(accelerator.device)
    drawn(model, size, 1, setting.precision)
    one, five = (drawn(model, size, steps, setting.precision) for steps in (1, 5))
    found["call"] = (five - one) / 4 / size.at_once
    found["sample"] = max(0.0, one / size.at_once - found["call"])
    found["samples / s"] = setting.batch / found["teacher"]
    return found


def drawn(model: Model, size: Size, steps: int, precision: str) -> float:
    """Return the time in seconds to draw one batch of samples."""
    begun = time.perf_counter()
    model.sample(range(size.at_once), steps, batch_size=size.at_once, precision=precision)
    return time.perf_counter() - begun


FORMAT = 2
"""The format of RUN.plan.json. A file in another format is replaced."""


class Plan:
    """The trials and the chosen setting. RUN.plan.json is written after each trial, so that later calls can resume."""

    def __init__(self, options: argparse.Namespace, size: Size, data: Data, clock: "Clock", stop: StopSignal) -> None:
        self.options, self.size, self.data, self.clock, self.stop = options, size, data, clock, stop
        self.file = options.run.with_name(options.run.name + ".plan.json")
        held = read_json(self.file) if self.file.is_file() else {}
        self.held: dict[str, Any] = held if held.get("format") == FORMAT else {"format": FORMAT, "tried": []}

    def tried(self, setting: Setting) -> dict[str, Any]:
        """Return a setting's trial results, running the trial if necessary."""
        for row in self.held["tried"]:
            if all(row[name] == value for name, value in setting._asdict().items()):
                return dict(row)
        with self.stop.at_once():
            row = trial(self.options, self.size, setting, self.data)
        self.held["tried"].append(row)
        write_json(self.file, self.held)
        self.clock.keep()
        return row

    def left(self, row: dict[str, Any]) -> float:
        """Return the number of seconds left for training, after reserving the estimated time of the evaluation and of
        another compilation, because the run compiles its networks again."""
        compiling = row["first"] if row["compiled"] else 0.0
        return self.options.budget - self.clock.now() - self.measuring(row) - compiling

    def measuring(self, row: dict[str, Any]) -> float:
        """Return the estimated time in seconds to draw all samples for the table."""
        rows = len(self.size.teacher_steps) + len(self.size.students)
        return self.size.count * (self.size.evals * row["call"] + rows * row["sample"])

    def updates(self, row: dict[str, Any]) -> dict[str, int]:
        """Return the numbers of updates that fit in the budget."""
        return {name: int(share * self.left(row) / row[name]) for name, share in SHARES.items()}

    def made(self) -> tuple[Setting, dict[str, int]]:
        """Return the chosen setting and the numbers of updates with this setting."""
        if "updates" not in self.held:
            self._choose()
        return Setting(*self.held["chosen"]), self.held["updates"]

    def _choose(self) -> None:
        size, names = self.size, list(self.size.networks)
        batch = size.batches[0]
        both = [self.tried(Setting(names[1], precision, batch, False)) for precision in ("bf16", "float32")]
        precision = min(both, key=lambda row: row["teacher"])["precision"]
        rows = [self.tried(Setting(name, precision, batch, False)) for name in names]
        seen = [self.updates(row)["teacher"] * batch for row in rows]
        row = next((r for r, n in reversed(list(zip(rows, seen, strict=True))) if n >= size.enough), rows[0])
        rows = [self.tried(Setting(row["network"], precision, other, False)) for other in sorted(size.batches)]
        most = max(row["samples / s"] for row in rows)
        row = next(row for row in rows if row["samples / s"] >= CLOSE * most)
        if torch.cuda.is_available() and self.left(row) > WORTH_COMPILING:
            # Sampling is not compiled, so its time does not change.
            sampling = {name: row[name] for name in ("call", "sample")}
            compiled = self.tried(Setting(row["network"], precision, row["batch"], True)) | sampling
            row = max((row, compiled), key=lambda one: self.updates(one)["teacher"])
        if min(updates := self.updates(row).values()) < len(size.students) + 1:
            raise SystemExit(
                f"a budget of {self.options.budget:g} s leaves {max(0.0, self.left(row)):.0f} s for training, enough "
                f"for {min(updates)} updates: {self.clock.now():.0f} s have been used, and evaluation will take "
                f"{self.measuring(row):.0f} s. Increase --budget"
            )
        self.held |= {
            "chosen": [row[name] for name in Setting._fields], "updates": self.updates(row),
            "seconds": {name: row[name] for name in SHARES}, "calibrated after": round(self.clock.now(), 1),
            "measuring, estimated": self.measuring(row), "environment": facts(),
            **{name: row[name] for name in ("call", "sample")},
        }  # fmt: skip
        write_json(self.file, self.held)
        show("tried", self.held["tried"])


class Clock:
    """A clock that counts the seconds of this call and all earlier calls, each from the start of its process."""

    def __init__(self, run: Path, seconds: float) -> None:
        self.file, self.seconds = run.with_name(run.name + ".seconds.json"), seconds
        self._before = float(read_json(self.file)) if self.file.is_file() else 0.0
        self._begun = psutil.Process().create_time()

    def call(self) -> float:
        """Return the number of seconds since this call started."""
        return time.time() - self._begun

    def left_of_call(self) -> float:
        """Return the number of seconds until this call must end."""
        return self.seconds - self.call()

    def now(self) -> float:
        """Return the total number of seconds of all calls."""
        return self._before + self.call()

    def keep(self) -> None:
        """Store the total number of seconds for the next call."""
        write_json(self.file, round(self.now(), 1))


def trained(options: argparse.Namespace, spec: RunSpec, clock: Clock, stop: StopSignal) -> None:
    """Train the missing stages in the run folder."""
    for event in run(spec, options.run, stop):
        if isinstance(event, Progress) and event.num_updates == event.window.update:
            print(f"{event.name}: {event.num_updates} updates, loss {event.window.loss:.4g}", flush=True)
        elif isinstance(event, StageEnd):
            clock.keep()
            print(f"{event.name}: {event.seconds:.1f} s{', already existed' if event.was_there else ''}", flush=True)


def measured(
    options: argparse.Namespace, size: Size, setting: Setting, plan: dict[str, Any], data: Data, clock: Clock,
    stop: StopSignal,
) -> dict[str, Any]:  # fmt: skip
    """Return the rows of the table, with students first, and the floor. RUN.figures.json is updated after each row."""
    file = options.run.with_name(options.run.name + ".figures.json")
    held: dict[str, Any] = read_json(file) if file.is_file() else {"rows": []}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    evaluation = Evaluation(
        num_samples=size.count, num_reference=size.num_reference, num_compared=1,
        features=f"resnet20-cifar10={options.features}", batch_size=size.at_once, precision=setting.precision,
    )  # fmt: skip
    with stop.at_once():
        test = open_data(DataConfig(source=options.data, split="test"))
        reference = Reference(test, evaluation, cache_folder(), device)
    store = Store(RunFolder(options.run).evaluation_path.parent, batch_size=size.at_once, own_device=True)
    floor_of = {"features": reference.extractor.name, "data": data.fingerprint, "count": size.count}
    if held.get("floor of") != floor_of:
        with stop.at_once():
            rows = torch.randperm(len(data), generator=generator_for("floor"))[: size.count]
            features = reference.extractor.features(data.fetch(rows).x0)
        held |= {
            "floor": frechet_of_moments(reference.real.moments, moments_of(features)), "floor of": floor_of,
            "protocol": reference.protocol,
        }  # fmt: skip
        write_json(file, held)
    teacher, *students = RunFolder(options.run).stages()
    asked = [(stage, stage.manifest(verify=False).num_steps or 0, setting.precision) for stage in reversed(students)]
    asked += [(teacher, steps, setting.precision) for steps in size.teacher_steps]
    if setting.precision != "float32":
        asked += [(stage, steps, "float32") for stage, steps, _ in asked if stage is not teacher and steps == 4]
    loaded: dict[str, Model] = {}
    shown_rows = []
    for stage, steps, precision in asked:
        # Includes the weights and the features, so that rows of earlier runs in the same folder are not used.
        place = {
            "model": "teacher" if stage is teacher else "student", "steps": steps, "precision": precision,
            "weights": weights_of(stage.manifest(verify=False))[:12], "features": reference.extractor.name,
        }  # fmt: skip
        there = [row for row in held["rows"] if place.items() <= row.items()]
        if there:
            shown_rows += there[:1]
            continue
        # A row that is too long for any call is started anyway.
        if clock.left_of_call() < 1.2 * size.count * (steps * plan["call"] + plan["sample"]) < 0.8 * clock.seconds:
            raise Interrupted(signal.SIGTERM)
        with stop.at_once():
            if stage.name not in loaded:
                loaded = {stage.name: load(stage.path, device)}
            model = loaded[stage.name]
            # The first batch is slower than all other batches, so it is not timed.
            drawn(model, size, model.num_steps or 1, precision)
            source = ModelSource(
                model.manifest,
                partial(loaded.__getitem__, stage.name),
                DDIM(),
                torch.device(device),
                data,
                precision=precision,
            )
            result = store.result(Cell(source, steps, range(size.count)), reference)
        row = place | {
            "FD(resnet20)": result.frechet, "images / s": round(1000 / result.seconds_per_1000, 1),
            "device": facts()["device"],
        }  # fmt: skip
        held["rows"].append(row)
        shown_rows.append(row)
        write_json(file, held)
        clock.keep()
        shown = f"FD {row['FD(resnet20)']:.4g}, {row['images / s']} images per second"
        print(f"{row['model']} at {steps} steps in {precision}: {shown}", flush=True)
    return held | {"rows": shown_rows}


def table(options: argparse.Namespace, size: Size, clock: Clock, stop: StopSignal) -> dict[str, Any]:
    """Choose the settings, train, evaluate, and return the result with the table."""
    with stop.at_once():
        data = open_data(DataConfig(source=options.data, flip=True))
    plan = Plan(options, size, data, clock, stop)
    setting, updates = plan.made()
    spec = build(recipe_of(options.data, size, setting, updates), what="all", data=data)
    trained(options, spec, clock, stop)
    held = measured(options, size, setting, plan.held, data, clock, stop)
    seconds = {stage.name: stage.manifest(verify=False).seconds for stage in RunFolder(options.run).stages()}
    about = {
        "training images": len(data), "training data": data.fingerprint, "recipe": dict(spec.recipe),
        "parameters": count_forward(spec).parameters,
    }  # fmt: skip
    return {"plan": plan.held, **about, **held, "training seconds": seconds} | share_of_peak(spec, plan.held["seconds"])


def share_of_peak(spec: RunSpec, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the operations per second of teacher and student updates in the trials, in absolute terms and as shares of
    the GPU's peak. Only network calls are counted, and a backward pass counts as two forward passes.
    """
    each = count_forward(spec).flops
    teacher, *students = spec.plan.stages
    updates = sum(stage.training.num_updates for stage in students)
    costs = {
        "teacher": teacher.update_cost,
        "chain": sum(stage.update_cost * stage.training.num_updates for stage in students) / updates,
    }
    rates = {name: each * cost / seconds[name] for name, cost in costs.items()}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for part, value in PEAK_BF16.items() if part in name), None)
    shares = None if peak is None else {name: rate / peak for name, rate in rates.items()}
    return {"operations a second": rates, "share of the bf16 peak": shares}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Send this process a signal to stop cleanly if the block takes longer than `seconds`."""
    timer = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument(
        "--data", required=True, help="CIFAR-10, as a folder with the splits train and test, or as a Hub name"
    )
    parser.add_argument("--features", required=True, help="path of resnet20-cifar10.safetensors")
    parser.add_argument(
        "--budget", type=float, default=None, help="total number of seconds; default: 600, or 200 with --tiny"
    )
    parser.add_argument("--seconds", type=float, default=580.0, help="maximum number of seconds for this call")
    parser.add_argument("--tiny", action="store_true", help="use a small size that takes a few minutes on a CPU")
    parser.add_argument("--out", type=Path, default=None, help="file for the JSON; docs/results/benchmarks by default")
    options = parser.parse_args()
    options.budget = options.budget or (200.0 if options.tiny else 600.0)
    options.run.parent.mkdir(parents=True, exist_ok=True)
    clock = Clock(options.run, options.seconds)
    try:
        with StopSignal() as stop, within(clock.left_of_call()):
            result = table(options, TINY if options.tiny else FULL, clock, stop)
    except Interrupted as error:
        print(f"{error}. Rerun the same command to resume ({clock.now():.0f} s in total so far)", file=sys.stderr)
        raise SystemExit(error.code) from None
    finally:
        clock.keep()
    result = {"tiny": options.tiny, "seconds in all": round(clock.now(), 1), "budget": options.budget, **result}
    title = f"CIFAR-10 speedrun, {result['seconds in all']:.0f} s in total; training images: FD {result['floor']:.4g}"
    show(title, result["rows"])
    out = options.out or RESULTS / f"cifar10_speedrun{'-tiny' if options.tiny else ''}.json"
    out.write_text(json.dumps({"environment": facts(), **result}, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
