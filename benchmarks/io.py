"""Measure the time to save and load checkpoints, compared with plain writes and reads, and their cost for a run.

    python benchmarks/io.py                   # the digits and the CIFAR-10 network
    python benchmarks/io.py --short

Four parts take turns:

- `write` saves the same tensors with safetensors and syncs them;
- `read` loads the same tensors (the files of both parts are in the page cache);
- `checkpoint` is the time from the call until the checkpoint is on the disk and verified;
- `resume` verifies the checksums, reads the files and loads the state.

`waits` is the part of `checkpoint` during which training waits for the state to be copied. The rest runs in the
background. `costs` is the time that a checkpoint adds to the updates after it. `costs / 60 s` is the share of the
training time that checkpoints take in a run that saves one every 60 seconds.

`reading` is the number of images per second that a run opens, decodes and resizes for its batches. As with a folder
that is too large for memory, the images are decoded again for each batch. All cores are used, and the machine has no
other load.
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
    """Return the seconds that each checkpoint adds to a series of updates that takes longer than saving it."""
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
    """Return the row of a network."""
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
            # As in a run, each checkpoint is for a different update.
            trainer.update += 1
            waits.append(writer.save(trainer))
            writer.wait()

        def go_on() -> None:
            last = trainer.update
            resume(trainer, folder, "run", print)
            if trainer.update != last:
                raise RuntimeError(f"the run did not resume from the checkpoint of update {last}")

        # The parts run in any order, so the input files of each part must exist from the start.
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
"""The side length of the images before and after resizing, by file type."""


def reading(kind: str, rounds: int, where: Path | None, count: int = 256) -> dict[str, Any]:
    """Return the number of images read per second from files of one kind in the page cache."""
    side, size = IMAGES[kind]
    generator = torch.Generator().manual_seed(0)
    # The decoding time depends on the file size, so the noise is smoothed until the files are as large as photographs.
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
    parser.add_argument("--batch", type=int, default=None, help="batch size; default: that of each network's recipe")
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--folder", type=Path, default=None, help="folder to write to; default: a temporary folder")
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
