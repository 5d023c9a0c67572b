"""A run folder that follows the schema, with invented figures and real digits with noise as images."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from halfstep.runs import Manifest, Metrics, Outcome, RunFolder
from halfstep.runs.schema import Result
from halfstep.runtime.files import sha256_of, write_sealed

TEACHER_STEPS = (256, 64, 8, 4, 2, 1)
STUDENT_STEPS = (128, 64, 32, 16, 8, 4, 2, 1)
PROTOCOL = {"features": "classifier-1a2b", "reference": "digits", "num_samples": 2000, "device": "cpu"}


def frechet(steps: int, student: bool) -> float:
    """Return a value that gets worse with fewer steps, slowly for a student."""
    return 0.1234567 * (1 + (2.2 / steps if student else 300 / steps**1.6))


def digit_samples(steps: int, student: bool, count: int = 64) -> np.ndarray:
    """Return uint8 `[count, 8, 8, 1]`: digits with an error that grows as the number of steps falls."""
    clean = load_digits().images[:count] / 16 * 255
    noise = np.random.default_rng(0).normal(size=clean.shape)
    size = 45 / steps if student else 25 + 280 / steps
    mean = np.full_like(clean, 80.0)
    share = 0.02 if student else min(0.85, 1.6 / steps)
    pixels = (1 - share) * clean + share * mean + size * noise * 0.4
    return np.clip(pixels, 0, 255).astype(np.uint8)[..., None]


def point_samples(steps: int, student: bool, count: int = 256) -> np.ndarray:
    """Return float32 `[count, 2]`: two moons, as sampled with few steps."""
    random = np.random.default_rng(1)
    angle = random.uniform(0, np.pi, count)
    upper = random.random(count) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    points = np.stack([x, y], 1) + 0.05 * random.normal(size=(count, 2))
    shrink = (0.1 if student else 0.9) / steps
    return ((1 - shrink) * points).astype(np.float32)


HEUN = Result(
    sampler="heun",
    num_steps=32,
    num_evals=63,
    frechet=frechet(256, False) * 0.93,
    kid=0.0001,
    precision=0.91,
    recall=0.955,
    coverage=0.944,
    teacher_rmse=0.02,
    seconds_per_1000=1.41,
)
"""The teacher at its best."""


def result(steps: int, student: bool, *, is_most: bool = False, factor: float = 1.0) -> Result:
    """Return the figures of a model at its steps."""
    return Result(
        sampler="ddim",
        num_steps=steps,
        num_evals=steps,
        frechet=frechet(steps, student) * factor,
        kid=frechet(steps, student) / 40 - 0.003,
        precision=0.9 - 0.1 / steps,
        recall=0.95 - 0.05 / steps,
        coverage=0.94 - 0.2 / steps,
        teacher_rmse=None if is_most else (0.3 if student else 0.7) / steps**0.5,
        seconds_per_1000=0.013 + 0.0217 * steps,
        samples=f"samples/steps-{steps:04d}.npz",
    )


def write_stage(
    run: Path,
    name: str,
    num_steps: int | None,
    results: Sequence[Result],
    samples: dict[int, np.ndarray],
    *,
    protocol: dict[str, Any] = PROTOCOL,
    seconds: float = 93.5,
    parent: str = "before",
) -> None:
    """Write a complete stage."""
    folder = RunFolder(run).stage(name)
    folder.samples.mkdir(parents=True)
    folder.model.write_bytes(b"weights")
    manifest = Manifest(
        stage=name,
        objective="denoise" if num_steps is None else "halve",
        parent=None if num_steps is None else parent,
        teacher=None if num_steps is None else parent,
        outcome=Outcome(role="teacher" if num_steps is None else "student", num_steps=num_steps),
        start_steps=256,
        num_updates=2000 if num_steps is None else 400,
        seconds=seconds,
        shape=(1, 8, 8),
        num_classes=10,
        is_image=True,
        clip=True,
        network={"type": "unet2d"},
        process={"type": "vp_cosine"},
        prediction={"type": "v"},
        files={"model.safetensors": hashlib.sha256(b"weights").hexdigest()},
    )
    write_sealed(folder.manifest_path, manifest.model_dump(mode="json"))
    files = {}
    for steps, array in samples.items():
        path = folder.samples / f"steps-{steps:04d}.npz"
        np.savez(path, arr_0=array)
        files[f"samples/{path.name}"] = sha256_of(path)
    metrics = Metrics(stage=name, protocol=protocol, results=list(results), files=files)
    write_sealed(folder.metrics_path, metrics.model_dump(mode="json"))


def write_fake_run(
    run: Path,
    students: Sequence[int] = STUDENT_STEPS,
    planned: Sequence[int] = STUDENT_STEPS,
    samples: Any = digit_samples,
    name: str = "digits",
) -> Path:
    """Write a run whose plan has the students `planned`, of which the first `students` are complete."""
    names = ["00-denoise", *(f"{i:02d}-halve-{n:04d}" for i, n in enumerate(planned, 1))]
    steps: list[int | None] = [None, *planned]
    write_sealed(
        run / "recipe.json",
        {
            "recipe": {"name": name, "seed": 0, "data": {"source": "digits"}, "chain": {"start_steps": 256}},
            "plan": [
                {
                    "stage": stage,
                    "role": "teacher" if n is None else "student",
                    "num_steps": n,
                    "num_updates": 2000 if n is None else 400,
                }
                for stage, n in zip(names, steps, strict=True)
            ],
            "environment": {
                "versions": {"halfstep": "0.1.0", "torch": "2.6.0"},
                "git_commit": "358dafb",
                "device": "NVIDIA H100",
                "cpu_count": 16,
                "command": f"halfstep run {name} --out runs/{name}",
                "started": "2025-01-02 03:04:05 +0000",
            },
        },
    )
    write_stage(
        run,
        names[0],
        None,
        [*(result(n, False, is_most=n == max(TEACHER_STEPS)) for n in TEACHER_STEPS), HEUN],
        {n: samples(n, False) for n in TEACHER_STEPS},
        seconds=411.0,
    )
    for index, n in enumerate(students, 1):
        write_stage(run, names[index], n, [result(n, True)], {n: samples(n, True)}, parent=names[index - 1])
    random = np.random.default_rng(2)
    rows = []
    for index, stage in enumerate(names[: len(students) + 1]):
        updates = 2000 if index == 0 else 400
        for update in range(20, updates + 1, 20):
            loss = (0.9 if index == 0 else 0.02 * 1.5**index) * (0.08 + (update / 20) ** -0.7)
            rows.append(
                {
                    "stage": stage,
                    "update": update,
                    "loss": float(loss * np.exp(0.1 * random.normal())),
                    "learning_rate": 1e-3,
                    "grad_norm": 0.5,
                    "seconds": 0.2 * update,
                    "samples_per_second": 640.0,
                }
            )
    (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return run


def figure(mean: float, spread: float | None = None) -> dict[str, Any]:
    """Return a figure of evaluation.json."""
    return {"mean": mean, "spread": spread, "values": [mean] if spread is None else [mean - spread, mean + spread]}


def fake_evaluation(complete: bool = True) -> dict[str, Any]:
    """Return the content of an evaluation.json: students, two of the teacher's samplers, two protocols."""
    protocol = {
        "kind": "sets",
        "extractor": "classifier-1-abc",
        "extractor_facts": {"dimension": 64},
        "resize": "none",
        "reference": "digits",
        "reference_split": "train",
        "reference_fingerprint": "ab",
        "num_reference": 1797,
        "reference_rows": "all",
        "num_samples": 2000,
        "seeds": ["0-1999", "2000-3999"],
        "images": "rounded to uint8",
    }

    def row(series: str, steps: int, figures: dict[str, Any]) -> dict[str, Any]:
        stage = (
            "00-denoise" if series.startswith("teacher") else f"{STUDENT_STEPS.index(steps) + 1:02d}-halve-{steps:04d}"
        )
        seconds = 0.013 + 0.0217 * steps
        calls = 2 * steps - 1 if series == "teacher-heun" else steps
        return {
            "series": series, "num_steps": steps, "num_evals": calls, "stage": stage, "seconds_per_1000": seconds,
            "figures": figures,
        }  # fmt: skip

    sets = [row("student", n, {"frechet": figure(frechet(n, True), 0.01), "precision": figure(0.8)}) for n in (8, 4, 1)]
    sets += [row("teacher-ddim", n, {"frechet": figure(frechet(n, False), 0.02)}) for n in (256, 64, 4, 1)]
    sets += [row("teacher-heun", n, {"frechet": figure(2 * frechet(n, False), 0.02)}) for n in (64, 4)]
    near = [row("student", n, {"rmse": figure(0.3 / n**0.5)}) for n in (8, 4, 1)]
    return {
        "format": 1,
        "subject": "runs/digits",
        "kind": "run",
        "complete": complete,
        "metrics": {
            "frechet": {"label": "Frechet distance", "better": "lower", "meaning": "How far apart."},
            "precision": {"label": "Precision", "better": "higher", "meaning": "How many are real."},
            "rmse": {"label": "RMSE", "better": "lower", "meaning": "How different."},
        },
        "series": [
            {"name": "student", "label": "student", "role": "student", "sampler": "ddim"},
            {"name": "teacher-ddim", "label": "teacher, DDIM", "role": "teacher", "sampler": "ddim"},
            {"name": "teacher-heun", "label": "teacher, Heun", "role": "teacher", "sampler": "heun"},
        ],
        "tables": [
            {"protocol": protocol, "rows": sets, "halves": {"num_each": 898, "figures": {"frechet": 0.6}}},
            {
                "protocol": {**protocol, "kind": "same_noise", "extractor": "none", "reference": "the teacher"},
                "rows": near,
            },
        ],
        "notices": ["Distances of small sets are too large."],
        "environment": {},
        "seconds": 240.1,
    }


def write_fake_evaluation(run: Path, **settings: Any) -> None:
    """Write RUN/evaluation/evaluation.json."""
    write_sealed(RunFolder(run).evaluation_path, fake_evaluation(**settings))
