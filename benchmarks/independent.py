"""Evaluate students with independent features and new noise.

    python benchmarks/independent.py runs/digits runs/digits-1 runs/digits-2 --out docs/results/digits-independent.json

A run evaluates its models in the features of its own classifier, with noise seeds that start at 0. The plans were tuned
on these results. This script trains a perceptron with hidden layers of 256 and 64 units on the run's labelled data. It
then evaluates samples with other seeds in the 64 features of the perceptron. If you have changed a plan after seeing
such results, choose another --perceptron-seed and --first-seed. The table also contains the metrics in the run's own
features with the new seeds. If several runs with different seeds are given, their values are averaged. Ratios are
relative to the teacher at its best, with 256 DDIM steps or 32 Heun steps, whichever is better in the same features.
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import halfstep
from common import parsed, write
from halfstep.core.draw import generator_for
from halfstep.data import Data, open_data
from halfstep.measure.evaluate import Evaluation, Method, Reference, features_for
from halfstep.metrics import FeatureExtractor, extractors, rmse
from halfstep.metrics.features import RealData, in_batches
from halfstep.metrics.images import from_uint8, to_uint8
from halfstep.models.model import Model
from halfstep.recipes import Recipe
from halfstep.runs import RunFolder
from halfstep.runtime.files import cache_folder
from halfstep.runtime.tensors import digest_of
from halfstep.studies.roads import AT_BEST

FIRST_SEED: Final = 1_000_000
PERCEPTRON_SEED: Final = 4321
NUM_UPDATES: Final = 3000
"""The number of training updates for the perceptron. Each update uses 128 samples."""
KEPT: Final = ("frechet", "recall", "coverage")
"""The metrics in the table."""


@final
class Perceptron(FeatureExtractor):
    """The 64 features before a perceptron's last nonlinearity and layer."""

    def __init__(self, x: Tensor, labels: Tensor, num_classes: int, seed: int = PERCEPTRON_SEED) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 256), nn.Tanh(), nn.Linear(256, 64))
            head = nn.Sequential(nn.Tanh(), nn.Linear(64, num_classes))
        network = nn.Sequential(self.body, head)
        order = torch.randperm(len(x), generator=generator_for("independent split"))
        held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
        optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=NUM_UPDATES)
        for update in range(NUM_UPDATES):
            generator = generator_for("independent", update)
            rows = kept[torch.randint(len(kept), (128,), generator=generator)]
            noisy = x[rows] + 0.1 * torch.randn(x[rows].shape, generator=generator)
            optimizer.zero_grad()
            F.cross_entropy(network(noisy), labels[rows]).backward()
            optimizer.step()
            schedule.step()
        network.eval()
        with torch.no_grad():
            accuracy = (network(x[held_out]).argmax(1) == labels[held_out]).double().mean().item()
        self.name = f"perceptron-{digest_of(network.state_dict())[:12]}"
        self.facts = {"accuracy": round(accuracy, 4)}
        self.resize = "none"

    def features(self, samples: Tensor) -> Tensor:
        return in_batches(self.body, samples, "cpu", 1000)


@extractors.register("perceptron")
def perceptron(path: str | None, measured: RealData) -> FeatureExtractor:
    """Return 64 features of a perceptron. `perceptron=SEED` selects the seed of its initial weights."""
    return Perceptron(*measured.labelled(), measured.num_classes, int(path or PERCEPTRON_SEED))


def drawn(model: Model, count: int, first: int = FIRST_SEED, **method: Any) -> Tensor:
    """Return samples for the seeds from `first`, rounded as in the run."""
    seeds = range(first, first + count)
    x0 = model.sample(seeds, batch_size=500, **method)
    return from_uint8(to_uint8(x0)) if model.manifest.is_image else x0


def rows_of(
    run: RunFolder,
    references: Sequence[Reference],
    count: int,
    methods: Sequence[Method],
    first_seed: int = FIRST_SEED,
) -> list[dict[str, Any]]:
    """Return a row for the teacher at its best and a row for each student of a run."""
    first, *others = run.stages()
    teacher = halfstep.load(first.path)
    at_best = [drawn(teacher, count, first_seed, sampler=one.sampler, num_steps=one.num_steps) for one in methods]
    rows: list[dict[str, Any]] = [{"run": run.path.name, "model": "teacher at its best", "steps": None}]
    best = []
    for name, reference in zip(("own", "other"), references, strict=True):
        figures = [reference.figures(samples).values for samples in at_best]
        least = min(figures, key=lambda one: one["frechet"])
        best.append(least)
        rows[0] |= {f"{name} ratio": 1.0} | {f"{name} {each}": round(least[each], 4) for each in KEPT}
    for folder in others:
        model = halfstep.load(folder.path)
        if model.num_steps is None:
            continue
        samples = drawn(model, count, first_seed)
        row: dict[str, Any] = {"run": run.path.name, "model": folder.name, "steps": model.num_steps}
        for name, reference, least in zip(("own", "other"), references, best, strict=True):
            found = reference.figures(samples).values
            row[f"{name} ratio"] = round(found["frechet"] / least["frechet"], 4)
            row |= {f"{name} {each}": round(found[each], 4) for each in KEPT}
        row["rmse"] = round(rmse(samples, at_best[-1]), 4)
        rows.append(row)
        print(row, flush=True)
    return rows


def averaged(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each model, the mean of each metric over the runs."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        numbers = [name for name, value in own[0].items() if isinstance(value, float)]
        found.append(
            {"model": model, "steps": own[0]["steps"], "runs": len(own)}
            | {name: round(fmean(row[name] for row in own), 4) for name in numbers}
        )
    return found


def references_of(data: Data, evaluation: Evaluation, seed: int = PERCEPTRON_SEED) -> list[Reference]:
    """Return the references in the run's own features and in those of the perceptron with this seed."""
    own, other = (replace(evaluation, features=one) for one in (features_for(data, evaluation), f"perceptron={seed}"))
    return [Reference(data, own, cache_folder()), Reference(data, other)]


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of one recipe with different seeds")
    parser.add_argument(
        "--num-samples", type=int, help="number of samples per model; default: that of the runs' recipe"
    )
    parser.add_argument(
        "--heun-only", action="store_true", help="skip DDIM with 256 steps, which takes 4 times as long"
    )
    parser.add_argument(
        "--perceptron-seed", type=int, default=PERCEPTRON_SEED, help="seed of the perceptron's initial weights"
    )
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED, help="first seed of the samples")
    parser.add_argument("--threads", type=int, help="number of CPU threads for torch")
    parser.add_argument("--short", action="store_true", help="write a file only if --out is given")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; default: docs/results/benchmarks/independent.json"
    )
    options = parsed(parser)
    rows: list[dict[str, Any]] = []
    references: list[Reference] = []
    methods = AT_BEST[-1:] if options.heun_only else AT_BEST
    for path in options.runs:
        recipe = Recipe.model_validate(RunFolder(path).recipe()["recipe"])
        data = open_data(recipe.data)
        references = references or references_of(data, recipe.evaluation, options.perceptron_seed)
        count = options.num_samples or recipe.evaluation.num_samples
        rows += rows_of(RunFolder(path), references, count, methods, options.first_seed)
    facts = {one.extractor.name: dict(one.extractor.facts) for one in references}
    write("independent", rows, options, features=facts, first_seed=options.first_seed, mean=averaged(rows))


if __name__ == "__main__":
    main()
