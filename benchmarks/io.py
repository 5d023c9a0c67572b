"""Seconds of a checkpoint and of a resume against a plain write and read of the same bytes, and their cost to a run.

    python benchmarks/io.py                   # the digits and the CIFAR-10 network
    python benchmarks/io.py --short

`write` saves the same tensors with safetensors and syncs them; `read` loads them again (both files lie in the page
cache); these, `checkpoint` (from the call until it is on the disk, read back and found right) and `resume` (checksums,
reading, taking the state over) take turns. `waits` is the part of `checkpoint` for which an update waits, the copy of
the state; the rest is done beside the training. `costs` is what a run of updates takes longer for one checkpoint that
begins with it, everything counted: in turns with the same updates without one. The share is that of a run that saves
every 60 seconds.

`reading` is how many images a second come out of a folder that is too large for memory: opened, decoded and brought to
size for each batch, as a run's feed does it, by all cores, with nothing beside it.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from common import arguments, halving, median, median_ratio, model_of, parsed, show, spec_of, timed, write
from halfstep.data import DataConfig, open_data
from halfstep.run.start import trainer_for
from halfstep.runs import StageFolder
from halfstep.runtime.files import sync
from halfstep.runtime.processes import make_accelerator
from halfstep.runtime.tensors import read_tensors
from halfstep.train.checkpoint import CheckpointWriter, resume
from halfstep.train.engine import StageTrainer

EVERY_SECONDS = 60
BATCH = {"digits": 64, "cifar10": 16, "tiny": 8}


def cost(trainer: StageTrainer, writer: CheckpointWriter, rounds: int, seconds: float) -> list[float]:
    """Seconds that each of some checkpoints has cost a run that goes on for longer than one takes."""
    updates = trainer.run()
    next(updates)
    start = time.perf_counter()
    next(updates)
    number = max(2, int(1.5 * seconds / (time.perf_counter() - start)) + 1)

    def go_on() -> None:
        for _ in range(number):
            next(updates)
        trainer.check_finite()

    def go_on_and_save() -> None:
        writer.save(trainer)
        go_on()
        writer.wait()

    held = timed({"plain": go_on, "saved": go_on_and_save}, rounds, str(trainer.accelerator.device), warm_up=1)
    return [saved - plain for saved, plain in zip(held["saved"], held["plain"], strict=True)]


def measured(name: str, batch: int, device: str, rounds: int, where: Path | None) -> dict[str, Any]:
    """A network's row."""
    spec = spec_of(name, halving(batch, ema_decay=0.99), teacher=model_of(name), cpu=device == "cpu")
    trainer = trainer_for(spec, spec.plan.stages[0], "bench", spec.teacher, make_accelerator(cpu=spec.engine.cpu))
    next(trainer.run())
    state = trainer.state()
    with tempfile.TemporaryDirectory(dir=where, prefix="halfstep-io-") as made:
        folder, plain = StageFolder(Path(made) / "stage"), Path(made) / "plain"
        folder.path.mkdir()
        plain.mkdir()
        writer = CheckpointWriter(folder, "run", trainer.processes)
        waits: list[float] = []

        def write_plainly() -> None:
            for part, tensors in state.items():
                file = plain / f"{part}.safetensors"
                save_file(tensors, file)
                sync(file)

        def read_plainly() -> None:
            for part in state:
                for tensor in read_tensors(plain / f"{part}.safetensors").values():
                    tensor.clone()

        def save() -> None:
            # As in a run, where each checkpoint is another update's.
            trainer.update += 1
            waits.append(writer.save(trainer))
            writer.wait()

        def go_on() -> None:
            last = trainer.update
            resume(trainer, folder, "run", print)
            if trainer.update != last:
                raise RuntimeError(f"the checkpoint of update {last} was not the one that was resumed from")

        # Parts come in any order, so what they read is there from the start.
        write_plainly()
        save()
        waits.clear()
        parts = {"write": write_plainly, "checkpoint": save, "read": read_plainly, "resume": go_on}
        seconds = timed(parts, rounds, device, warm_up=1)
        size = sum(file.stat().st_size for file in plain.iterdir())
        costs = cost(trainer, writer, rounds, median(seconds["checkpoint"]))
        writer.close()
    return {
        "network": name, "batch": batch, "MB": round(size / 1e6, 2),
        **{f"{part}, s": round(median(held), 4) for part, held in seconds.items()},
        "waits, s": round(median(waits), 4),
        "checkpoint / write": round(median_ratio(seconds["checkpoint"], seconds["write"]), 3),
        "resume / read": round(median_ratio(seconds["resume"], seconds["read"]), 3),
        "costs, s": round(median(costs), 4),
        "costs / 60 s": round(median(costs) / EVERY_SECONDS, 5),
    }  # fmt: skip


IMAGES = {"PNG": (32, 32), "JPEG": (256, 64)}
"""Kinds of files, their side and the side that they are brought to."""


def reading(kind: str, rounds: int, where: Path | None, count: int = 256) -> dict[str, Any]:
    """Images a second from files of a kind, whose pages are in memory."""
    side, size = IMAGES[kind]
    generator = torch.Generator().manual_seed(0)
    # Noise that is smooth enough to take the bytes of a photograph: a decoder's time goes with them.
    small = torch.rand(count, 3, side // 4, side // 4, generator=generator)
    pixels = torch.nn.functional.interpolate(small, size=side, mode="bicubic").clamp(0, 1).mul(255).byte()
    with tempfile.TemporaryDirectory(dir=where, prefix="halfstep-io-") as folder:
        for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(Path(folder) / f"{number}.{kind.lower()}")
        data = open_data(DataConfig(source=folder, labels=False, image_size=size, channels=3, max_bytes=0))
        order = torch.randperm(count, generator=generator)
        bytes_ = sum(file.stat().st_size for file in Path(folder).iterdir()) / count
        seconds = timed({"fetch": lambda: data.fetch(order)}, rounds, warm_up=1)["fetch"]
    return {
        "files": f"{kind}, {side} x {side}", "kB each": round(bytes_ / 1e3, 1), "brought to": f"{size} x {size}",
        "images / s": round(count / median(seconds), 1),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--networks", nargs="+", choices=BATCH, default=None)
    parser.add_argument("--batch", type=int, default=None, help="in the place of each network's own")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; the system's temporary folder")
    options = parsed(parser)
    rows = [
        measured(name, options.batch or BATCH[name], options.device, options.rounds or (2 if options.short else 7),
                 options.folder)
        for name in options.networks or (["tiny"] if options.short else ["digits", "cifar10"])
    ]  # fmt: skip
    decoded = [reading(kind, options.rounds or (2 if options.short else 7), options.folder) for kind in IMAGES]
    show("reading", decoded)
    write("io", rows, options, reading=decoded, threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
