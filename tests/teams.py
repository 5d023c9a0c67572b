"""Several processes on this machine's CPU, and the functions that they run in the tests.

A fork server imports torch once, so each team costs a fraction of a second per process.
"""

import contextlib
import importlib
import io
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torchmetrics.image.fid  # noqa: F401  (seconds that each process would need for its first figures)
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group
from torch.distributed.tensor import DTensor

from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import Encoder, MemoryData, Prompts, encode, training_batch
from halfstep.measure import curve, store
from halfstep.measure.evaluate import Evaluation
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import MLP, UNet2D, copy_denoiser, unet2d_config
from halfstep.objectives import EarlyEnd, Finishing, Plan, Stage, Training, objectives
from halfstep.run.events import Progress
from halfstep.run.own_samples import samples_of
from halfstep.run.runner import run
from halfstep.runs import RunFolder
from halfstep.runtime.processes import FailedElsewhere, Processes, exit_code, leave, make_accelerator
from halfstep.runtime.stop import Interrupted, StopSignal
from halfstep.train.engine import StageTrainer
from halfstep.train.settings import Engine, Sharding
from toys import Poisoned, finish, one_stage, points, toy_plan, toy_spec, tuned

Work = Callable[..., Any]


def context() -> ForkServerContext:
    """Return the fork server, with the modules that the tests need imported."""
    made = multiprocessing.get_context("forkserver")
    # All tests of a process share one server, whose imports depend only on its environment.
    tests = str(Path(__file__).parent)
    if tests not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), tests)))
    made.set_forkserver_preload(["torture"])
    return made


def _member(work: Work, index: int, count: int, port: int, folder: str, arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        "RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    torch.set_num_threads(1)
    try:
        torch.save({"result": work(*arguments)}, f"{folder}/{index}.pt")
    except BaseException as error:
        traceback.print_exc()
        torch.save({"error": f"{type(error).__name__}: {error}"}, f"{folder}/{index}.pt")
        os._exit(1)
    leave()


def start(count: int, work: Work, folder: Path, *arguments: Any) -> list[BaseProcess]:
    """Start processes that run `work(*arguments)` together and leave their results or errors in the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    team = [
        context().Process(target=_member, args=(work, index, count, port, str(folder), arguments))
        for index in range(count)
    ]
    for process in team:
        process.start()
    return team


def ended(team: list[BaseProcess], folder: Path, seconds: float = 120) -> list[dict[str, Any]]:
    """Return each process's result: {"result": ...} or {"error": ...}, or empty for a killed process."""
    for process in team:
        process.join(seconds)
        if process.is_alive():
            for other in team:
                other.kill()
            raise AssertionError("the processes of a team hang")
    files = [folder / f"{index}.pt" for index in range(len(team))]
    return [torch.load(file, weights_only=True) if file.is_file() else {} for file in files]


def together(count: int, work: Work, folder: Path, *arguments: Any) -> list[Any]:
    """Return the results of `work(*arguments)` in each of `count` processes."""
    left = ended(start(count, work, folder, *arguments), folder)
    assert all("result" in one for one in left), left
    return [one["result"] for one in left]


# ---------------------------------------------------------------------------------------------------------------------


def denoiser(seed: int = 0, width: int = 16) -> NetworkDenoiser:
    """Return a small network with layers that split unevenly: 3 classes, widths divisible by 2 but not by 3."""
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP((2,), width=width, depth=2), VPCosine(), V())


def trainer(stage: Stage, sharding: Sharding = "none", micro_batch: int | None = None) -> StageTrainer:
    """Return a stage of about 24 updates on the toy's points, the same on any number of processes."""
    student = denoiser()
    teacher = copy_denoiser(student) if stage.objective.needs_teacher else None
    data = MemoryData("toy", points())
    return StageTrainer(
        student,
        teacher,
        stage,
        lambda draw: training_batch(data, draw, False),
        data.shape,
        seed=0,
        stream="01",
        accelerator=make_accelerator(cpu=True),
        engine=Engine(micro_batch=micro_batch, sharding=sharding),
    )


def halving(num_updates: int = 24, **changes: Any) -> Stage:
    """Return a halving of 4 steps to 2, with a moving average and clipped gradients."""
    stage = Plan.halvings(4, 2, Training(num_updates, 1e-3, batch_size=24), updates_at={}).stages[0]
    return tuned(stage, **({"ema_decay": 0.9, "grad_clip": 0.05} | changes))


def finishing() -> Stage:
    """Return a finish of the 2-step student, in which most updates have turns of both players."""
    training = Training(24, 1e-3, batch_size=24, ema_decay=0.9, grad_clip=0.05)
    return Stage(Finishing(2, lead_updates=6), training)


def flat(network: nn.Module) -> torch.Tensor:
    """Return all weights as one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def trained(sharding: Sharding, micro_batch: int | None, stage: Stage, cut_at: int | None = None) -> dict[str, Any]:
    """Return the results of training a stage, optionally interrupted after an update and resumed in a new trainer."""
    made = trainer(stage, sharding, micro_batch)
    for update in made.run():
        if update == cut_at:
            held, seconds = made.state(), made.seconds
            # Only the first process receives the state; the others read it from its files.
            held = _from_first(held)
            made = trainer(stage, sharding, micro_batch)
            made.load_state(held, update, seconds)
            break
    list(made.run())
    window, update = made.window(), made.update
    state = made.state()
    shapes = {f"{part}.{name}": list(value.shape) for part, tensors in state.items() for name, value in tensors.items()}
    student, auxiliary = (
        torch.cat([value.flatten() for value in state.get(part, {"": torch.zeros(0)}).values()])
        for part in ("student", "helper-auxiliary")
    )
    return {
        "student": student, "auxiliary": auxiliary, "result": flat(made.finish().network), "shapes": shapes,
        "updates": update, "loss": window.loss, "norm": window.grad_norm,
        "helpers": [value for helper in window.helpers.values() for value in helper],
    }  # fmt: skip


def _from_first(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, dict[str, torch.Tensor]]:
    processes = Processes(make_accelerator(cpu=True))
    if processes.count == 1:
        return state
    described = processes.on_main(
        lambda: {
            part: {name: [value.tolist(), str(value.dtype)[6:], list(value.shape)] for name, value in held.items()}
            for part, held in state.items()
        }
    )
    return {
        part: {
            name: torch.tensor(value, dtype=getattr(torch, dtype)).reshape(shape)
            for name, (value, dtype, shape) in held.items()
        }
        for part, held in described.items()
    }


def all_trainings(cases: list[tuple[Sharding, int | None, Stage, int | None]]) -> list[dict[str, Any]]:
    """Return `trained` of each case."""
    from halfstep.train import sharding

    # Shard blocks of the small network too.
    sharding.UNIT = 500
    return [trained(*case) for case in cases]


def shares() -> list[float]:
    """Return which part of teacher, student, average and moments this process stores with full sharding."""
    from halfstep.train import sharding

    sharding.UNIT = 500
    made = trainer(halving(2), "full")
    list(made.run())
    student = made.student
    assert made._teacher is not None
    assert student._ema is not None
    held = {
        "student": list(student.network.parameters()),
        "teacher": list(made._teacher.parameters()),
        "average": list(student._ema.state_dict().values()),
        "moments": [value for entry in student._optimizer.state_dict()["state"].values() for value in entry.values()],
    }
    return [
        sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in values)
        / sum(value.numel() for value in values)
        for values in held.values()
    ]


def sends(sharding: Sharding) -> list[int]:
    """Return the number of gradient reductions in each of three updates with three micro batches."""
    made = trainer(halving(4), sharding, micro_batch=4)
    counts = [0]
    wrapped = made.student.wrapped
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        average = made.processes.count

        def hook(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
            counts[-1] += 1
            sent = dist.all_reduce(bucket.buffer().div_(average), async_op=True).get_future()
            return sent.then(lambda done: done.value()[0])

        wrapped.register_comm_hook(None, hook)
    else:
        real = _fsdp_collectives.foreach_reduce

        def counted(*arguments: Any, **named: Any) -> Any:
            counts[-1] += 1
            return real(*arguments, **named)

        _fsdp_param_group.foreach_reduce = counted
    for _ in made.run():
        counts.append(0)
    return counts[:-1]


def early(cut_at: int | None = None) -> list[float]:
    """Return where a stage with an early end stops, and the losses that decide it."""
    rule = EarlyEnd(window=5, patience=2, min_drop=0.02)
    made = trainer(halving(200, early_end=rule, learning_rate=1e-4))
    for update in made.run():
        if update == cut_at:
            held = _from_first(made.state())
            made = trainer(halving(200, early_end=rule, learning_rate=1e-4))
            made.load_state(held, update, 0.0)
            break
    list(made.run())
    return [made.update, *made._window_losses]


def engine_cases() -> dict[str, Any]:
    """Run the two-process part of the engine's tests at once."""
    stage = halving()
    trainings: list[tuple[Sharding, int | None, Stage, int | None]] = [
        ("none", None, stage, None),
        ("none", 5, stage, 10),
        ("full", 5, stage, None),
        ("full", 5, stage, 10),
    ]
    finishes: list[tuple[Sharding, int | None, Stage, int | None]] = [
        ("none", None, finishing(), None),
        ("none", None, finishing(), 10),
        ("full", 5, finishing(), None),
        ("full", 5, finishing(), 10),
    ]
    held = {
        "trainings": all_trainings(trainings),
        "finishes": all_trainings(finishes),
        "early": early(),
        "early cut": early(7),
    }
    if Processes(make_accelerator(cpu=True)).count > 1:
        held |= {"sends": sends("none"), "sends sharded": sends("full"), "shares": shares()}
    return held


def run_with(path: str, sharding: str, cut: tuple[str, int] | None, changes: dict[str, Any]) -> str:
    """Run the toy plan without dropout, optionally interrupted after an update of a stage and resumed."""
    spec = toy_spec(plan=toy_plan(dropout=0.0), sharding=sharding, checkpoint_updates=10, **changes)
    if cut is not None:
        events = run(spec, Path(path))
        for event in events:
            if isinstance(event, Progress) and (event.name, event.window.update) == cut:
                break
        events.close()  # type: ignore[attr-defined]
    return str(finish(spec, Path(path)))


def run_cases(folder: str, one: str) -> list[Any]:
    """Run the two-process part of the run tests at once."""
    cut = ("01-halve-0002", 15)
    evaluation = {"evaluation": Evaluation(num_samples=50, num_compared=10, num_shown=4, batch_size=8)}
    for name, sharding, where, changes in (
        ("plain", "none", None, evaluation), ("plain cut", "none", cut, {}),
        ("sharded", "full", None, {}), ("sharded cut", "full", cut, {}),
    ):  # fmt: skip
        run_with(f"{folder}/{name}", sharding, where, changes)
    # One process started these and two continue, and vice versa.
    run_with(f"{folder}/from one", "none", None, {})
    events = run(
        toy_spec(plan=toy_plan(dropout=0.0), sharding="full", checkpoint_updates=10), Path(f"{folder}/for one")
    )
    for event in events:
        if isinstance(event, Progress) and (event.name, event.window.update) == ("01-halve-0002", 15):
            break
    events.close()  # type: ignore[attr-defined]
    processes = Processes(make_accelerator(cpu=True))
    model = load(one)
    parts = processes.spread([[3, 1], [7], [8, 2], [4, 5], [6]], lambda seeds: (model.sample(seeds, 2),))
    return [] if parts is None else [part for (part,) in parts]


def prompted(folder: str, batch_size: int, fails_at: int | None = None) -> list[list[int]]:
    """Encode samples of 11 prompts in shards of 6; return the places that this process sampled."""
    mine: list[list[int]] = []

    def sampled(places: range, conditions: Any) -> torch.Tensor:
        mine.append(list(places))
        if fails_at in places:
            raise ValueError(f"place {fails_at} failed")
        rows = [torch.full((2, 3), float(place)) + conditions["text"][i] for i, place in enumerate(places)]
        return torch.stack(rows)

    def texts(captions: list[str]) -> dict[str, torch.Tensor]:
        return {"text": torch.tensor([[float(len(caption))] for caption in captions])}

    processes = Processes(make_accelerator(cpu=True)) if dist.is_initialized() or "RANK" in os.environ else Processes()
    data = Prompts("prompts.txt", tuple("a" * number for number in range(1, 12)), sampled)
    encoder = Encoder(lambda pixels: pixels, texts, "toy")
    encode(data, encoder, Path(folder), batch_size, 6, processes=processes)
    return mine


def without_data(folder: str) -> tuple[int, torch.Tensor]:
    """Return how often this process draws samples of the teacher, and a weight of a student distilled from them."""
    count = 0

    def counted(*args: Any, **kwargs: Any) -> MemoryData:
        nonlocal count
        count += 1
        return samples_of(*args, **kwargs)

    distilling = importlib.import_module("halfstep.run.distill")
    vars(distilling)["samples_of"] = counted
    teacher, training = Model.of(denoiser(), (2,)), Training(2, 1e-3, batch_size=16)
    student = distilling.distill(teacher, start=2, to=1, training=training, engine=Engine(cpu=True), out=folder)
    return count, next(student.parameters()).detach()


def refusals(folder: str) -> list[str]:
    """Return how the errors of one process reach the others."""
    said = []
    objectives["poisoned"] = Poisoned
    processes = Processes(make_accelerator(cpu=True))

    def work(item: int) -> tuple[torch.Tensor]:
        if item == 1:
            raise ValueError("no such item")
        return (torch.zeros(1),)

    def slow(item: int) -> tuple[torch.Tensor]:
        time.sleep(1.5 * item)
        return (torch.zeros(1),)

    for attempt in (
        lambda: finish(toy_spec(), Path(folder)),
        lambda: processes.spread(range(6), work),
        lambda: trainer(halving(batch_size=25)),
        lambda: run_with(f"{folder}/new", "full", None, {"optimizer": "adamw8bit"}),
        lambda: finish(toy_spec(data=MemoryData("toy", points() + processes.index)), Path(folder + "-data")),
        lambda: finish(toy_spec(plan=one_stage(Poisoned(7, (12,), math.nan))), Path(folder + "-nan")),
        lambda: Processes(make_accelerator(cpu=True), timeout_minutes=0.005).spread(range(2), slow),
        lambda: processes.check_same("classifier-1", "their classifier", "share the cache"),
        lambda: processes.check_same(f"classifier-{processes.index}", "their classifier", "share the cache"),
    ):
        try:
            attempt()
        except (ValueError, RuntimeError, FailedElsewhere) as error:
            code = exit_code(error)
            said.append(f"{type(error).__name__} {code}: {error}")
        else:
            said.append("nothing")
    return said


UNETS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small": {"precision": "bf16", "gradient_checkpointing": True, "lora_rank": 2, "teacher_precision": "bf16"},
}
"""Settings that can be combined with sharding, for diffusers networks."""


def unet_runs(folder: str, sharding: str) -> None:
    """Run short runs of a U-Net without attention in the middle, each with the settings of `UNETS`."""
    from halfstep.train import sharding as module

    unit, module.UNIT = module.UNIT, 5000
    pixels = torch.randint(256, (32, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shape = {
        "block_out_channels": (8, 16), "layers_per_block": 1, "attention": (False, True), "mid_attention": False,
        "attention_head_dim": 8, "norm_num_groups": 4,
    }  # fmt: skip
    for name, changes in UNETS.items():
        spec = toy_spec(
            plan=toy_plan(5, 1, dropout=0.0), data=MemoryData("noise", pixels), clip=True, sharding=sharding,
            checkpoint_updates=100,
            network=lambda: UNet2D(unet2d_config(size=(8, 8), in_channels=1, out_channels=1, **shape), 1024),
            **changes,
        )  # fmt: skip
        finish(spec, Path(folder) / name)
    module.UNIT = unit


def scaled(benchmarks: str, name: str, batch: int, number: int, rounds: int, device: str, out: str) -> None:
    """Run one setting of `benchmarks/scale.py` as one of its processes."""
    sys.path.insert(0, benchmarks)
    importlib.import_module("scale").worker(name, batch, number, rounds, device, Path(out))


def printed(*argv: str) -> str:
    """Return the output of this process for a command."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(list(argv))
    return out.getvalue()


def evaluated(folder: str, out: str) -> list[str]:
    """Return the names of the files and folders that this process writes in an evaluation."""
    wrote = []

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Path, *rest: Any) -> Any:
            wrote.append(path.name)
            return write(path, *rest)

        return call

    curve.write_sealed = store.write_sealed = noting(store.write_sealed)
    store.replacing_folder = noting(store.replacing_folder)
    main(["evaluate", folder, "--num-steps", "2", "1", "--num-samples", "24", "--out", out])
    return wrote


def evaluated_till(folder: str, out: str, rounds: int) -> str:
    """Return the errors of an evaluation that fails on both processes after a given number of figures."""
    made, timed = [0], store._timed

    def failing(make: Callable[[], Any]) -> dict[str, Any]:
        made[0] += 1
        if made[0] > rounds:
            raise ValueError("no more")
        return timed(make)

    store._timed = failing
    try:
        main(["evaluate", folder, "--num-steps", "2", "1", "--num-samples", "24", "--out", out])
    except SystemExit as ended:
        return f"{ended.code}"
    finally:
        store._timed = timed
    return "nothing"


def terminated(folder: str) -> list[Any]:
    """Return the end of a run in which only the second process receives SIGTERM."""
    processes = Processes(make_accelerator(cpu=True))
    with StopSignal() as stop:
        try:
            for event in run(toy_spec(plan=toy_plan(100_000)), Path(folder), stop):
                if isinstance(event, Progress) and event.window.update == 10 and processes.index == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
        except Interrupted as stopped:
            return [stopped.signal, RunFolder(Path(folder)).stage("00-denoise").checkpoints()[0].name]
    return []


def endless(folder: str, sharding: str) -> None:
    """Run until the process is killed."""
    finish(toy_spec(plan=toy_plan(10**9), sharding=sharding, checkpoint_updates=5), Path(folder))
