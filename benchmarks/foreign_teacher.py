"""Measure a third-party teacher with 8, 50 and 1,000 steps, and its students.

    python benchmarks/foreign_teacher.py ddpm_fashion.safetensors fashion-mnist/

This script runs `examples/someone_elses_teacher.py` and evaluates each model with the same noise. It measures the
Frechet distances from training and test images, and the RMSE relative to the teacher with 50 DDIM steps. The table is
written to docs/results/foreign-teacher.json, and an image of the first samples is written to
docs/pages/foreign-teacher.png.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import halfstep
from halfstep.metrics import frechet_distance, rmse, to_uint8, train_classifier
from halfstep.runtime.environment import environment

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from someone_elses_teacher import Theirs, students  # noqa: E402

AT_ONCE = 50


def drawn(
    model: halfstep.Denoiser, number: int, shape: tuple[int, ...], steps: int, method: halfstep.Sampler
) -> Tensor:
    """Return samples for the seeds 0, 1, ... The seeds also determine the noise that stochastic samplers add at each
    step.
    """
    parts = []
    for first in range(0, number, AT_ONCE):
        seeds = range(first, min(first + AT_ONCE, number))
        noise = halfstep.step_noise(seeds, shape) if method.stochastic else None
        parts.append(halfstep.sample(model, halfstep.sample_noise(seeds, shape), steps, method, noise=noise))
    return torch.cat(parts)


def picture(rows: list[Tensor], file: Path, columns: int = 16, scale: int = 2) -> None:
    """Write an image with one row for each set of samples `[n, 1, height, width]`."""
    grid = torch.cat([torch.cat([*to_uint8(x[:columns])[:, 0]], dim=1) for x in rows])
    image = Image.fromarray(grid.numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("images")
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--number", type=int, default=500, help="number of samples per model")
    parser.add_argument("--number-slow", type=int, default=100, help="number of samples with 1,000 steps")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "foreign-teacher.json")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "pages" / "foreign-teacher.png")
    asked = parser.parse_args()

    data, labelled = (
        halfstep.open_data(halfstep.DataConfig(source=asked.images, labels=kept)) for kept in (False, True)
    )
    held = halfstep.open_data(halfstep.DataConfig(source=asked.images, split="test"))
    teacher = halfstep.Clipped(halfstep.NetworkDenoiser(Theirs(asked.weights), halfstep.VPTable(), halfstep.Eps()))
    real, cond = labelled.fetch(torch.arange(10_000))
    test = held.fetch(torch.arange(len(held))).x0
    classifier = train_classifier(real, cond["class_labels"], labelled.num_classes, "foreign-teacher")
    seen = {"train": classifier.features(real), "test": classifier.features(test)}
    rows: list[dict[str, Any]] = []
    samples: dict[tuple[str, str, int], Tensor] = {}

    def measure(name: str, model: halfstep.Denoiser, steps: int, method: halfstep.Sampler, number: int) -> None:
        start = time.process_time()
        x0 = drawn(model, number, data.shape, steps, method)
        seconds = time.process_time() - start
        samples[name, type(method).__name__, steps] = x0
        compared = samples["teacher", "DDIM", 50]
        found = classifier.features(x0)
        few = found[: asked.number_slow]
        row = {
            "model": name,
            "sampler": type(method).__name__,
            "num_steps": steps,
            "num_samples": number,
            "frechet": frechet_distance(seen["train"], found) if number == asked.number else None,
            "frechet_test": frechet_distance(seen["test"], found) if number == asked.number else None,
            "frechet_few": frechet_distance(seen["train"], few),
            "teacher_rmse": rmse(x0, compared[:number]),
            "cpu_seconds_per_1000": 1000 * seconds / number,
        }
        print(json.dumps(row), flush=True)
        rows.append(row)
        write()

    def write() -> None:
        found = {
            "what": "a DDPM of Fashion-MNIST that was trained elsewhere, and its students",
            "command": "python " + " ".join(sys.argv),
            "environment": environment(),
            "updates_of_a_stage": asked.updates,
            "batch_size": asked.batch,
            "cpu_seconds_of_distillation": round(spent),
            "features": f"{classifier.name}, accuracy {classifier.accuracy:.4f}",
            "num_reference": {name: len(one) for name, one in seen.items()},
            "num_samples_few": asked.number_slow,
            "floor": {
                "test": frechet_distance(seen["train"], seen["test"][: asked.number]),
                "test, few": frechet_distance(seen["train"], seen["test"][: asked.number_slow]),
            },
            "results": rows,
        }
        asked.out.write_text(json.dumps(found, indent=1) + "\n")

    start = time.process_time()
    made = students(teacher, data, asked.updates, asked.batch)
    spent = time.process_time() - start
    measure("teacher", teacher, 50, halfstep.DDIM(), asked.number)
    for name, student in made.items():
        measure("student", student, int(name.split()[1]), halfstep.DDIM(), asked.number)
    measure("teacher", teacher, 8, halfstep.DDIM(), asked.number)
    shown = [("teacher", "DDIM", 50), ("teacher", "DDIM", 8), *(("student", "DDIM", steps) for steps in (8, 4, 1))]
    picture([samples[key] for key in shown], asked.picture)
    for steps in (50, 8):
        measure("teacher", teacher, steps, halfstep.Ancestral(0.0), asked.number)
    for method in (halfstep.Ancestral(), halfstep.DDIM()):
        measure("teacher", teacher, 1000, method, asked.number_slow)


if __name__ == "__main__":
    main()
