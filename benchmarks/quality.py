"""Measure the time to quality: the distillation time until students with few steps (by default, 4 and 1) are good
enough.

    python benchmarks/quality.py RUNS                          # the digits, minutes to an hour on two cores
    python benchmarks/quality.py RUNS --scale small --data ../shared/data/fashion-mnist

A student is good enough if its Frechet distance is at most 1.1 times that of the teacher at its best (with 256 DDIM
steps or 32 Heun steps). Three methods start from the same teacher:

- the paper's chain, which uses DDIM and halves from many steps;
- the new plan, which is that of the recipe: a first student that learns from Heun steps, then halvings, and finishes;
- the paper's chain with updates as in public re-implementations, which use float32 and the subtractive target, and have
  no warm-up, learning rate decay, fused optimiser or batched noise.

Each method is run with several budgets, which are shares of the method's full number of updates. The time to quality is
the time of the smallest budget at which a student is good enough. The seconds include all stages that lead to a
student, but not the evaluation of the student. Everything is stored in RUNS. To resume, rerun the same command.
"""

import argparse
import copy
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from common import parsed, write
from halfstep.core.denoiser import NetworkDenoiser, per_sample
from halfstep.metrics import frechet_distance
from halfstep.models.model import Model
from halfstep.objectives import Halving, Plan, Stage
from halfstep.recipes import Recipe, recipes
from halfstep.runs import Outcome
from halfstep.runtime.files import read_json, write_json
from halfstep.studies.base import Bench
from halfstep.studies.roads import AT_BEST, way_to
from halfstep.studies.scales import SCALES, Scale

MARK: Final = 1.1
"""A student is good enough if its distance is at most this multiple of its teacher's best distance."""
PAPER: Final = "the paper's chain"
NEW: Final = "the new plan"
NAIVE: Final = f"{PAPER}, naive"
STEPS: Final = (4, 1)
"""The numbers of steps of the students that are timed."""
SHARES: Final = (0.25, 0.5, 1.0, 2.0)
"""The budgets, as shares of the updates of a plan."""


def scaled(plan: Plan, share: float) -> Plan:
    """Return the plan with a share of the updates of each stage, including the warm-up."""

    def cut(stage: Stage) -> Stage:
        training = stage.training
        updates = max(1, round(share * training.num_updates))
        changed = replace(training, num_updates=updates, warmup_updates=min(updates, training.warmup_updates))
        objective = stage.objective
        if (lead := getattr(objective, "lead_updates", None)) is not None:
            objective = replace(objective, lead_updates=min(lead, updates // 4))  # type: ignore[type-var]
        return Stage(objective, changed)

    return Plan(tuple(map(cut, plan.stages)))


def plans(scale: Scale, new: Recipe) -> dict[str, Plan]:
    """Return the library's plans with the full budget: the scale's chain, and the chain and finishes of a recipe."""
    return {PAPER: scale.recipe.chain_plan(), NEW: new.chain_plan() + new.finish.plan()}


def naive_chain(bench: Bench, plan: Plan) -> Iterator[tuple[int, float, NetworkDenoiser]]:
    """Train students as public re-implementations do. Yield (number of steps, seconds so far, student)."""
    model = bench.model(bench.teacher)
    denoiser = model.denoiser
    assert isinstance(denoiser, NetworkDenoiser)
    data, process, prediction = bench.data(bench.scale.recipe.data), denoiser.process, denoiser.prediction
    generator = torch.Generator().manual_seed(0)

    def at(t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = process.alpha_sigma(t.double())
        return per_sample(alpha.float(), like), per_sample(sigma.float(), like)

    def called(network: NetworkDenoiser, x_t: Tensor, t: Tensor, cond: Any) -> tuple[Tensor, Tensor]:
        """Return x0, and eps computed from x0."""
        alpha, sigma = at(t, x_t)
        x0 = prediction.denoised(network.network(x_t, t, **cond), x_t, alpha, sigma).x0
        return x0, (x_t - alpha * x0) / sigma

    teacher, seconds = denoiser, 0.0
    for stage in plan.stages:
        assert isinstance(stage.objective, Halving)
        num_steps, training = stage.objective.num_steps, stage.training
        start = time.perf_counter()
        student = copy.deepcopy(teacher).train().requires_grad_(True)
        optimizer = torch.optim.AdamW(
            student.parameters(), training.learning_rate, training.adam_betas, foreach=False, fused=False
        )
        for _ in range(training.num_updates):
            chosen = torch.randint(len(data), (training.batch_size,), generator=generator)
            x0, cond = data.fetch(chosen)
            cond = cond if model.num_classes else {}
            index = torch.randint(1, num_steps + 1, (len(x0),), generator=generator)
            t, middle, s = ((index - back) / num_steps for back in (0.0, 0.5, 1.0))
            alpha, sigma = at(t, x0)
            x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
            x_s = x_t
            with torch.no_grad():
                for before, after in ((t, middle), (middle, s)):
                    clean, eps = called(teacher, x_s, before, cond)
                    alpha_s, sigma_s = at(after, x0)
                    x_s = alpha_s * clean + sigma_s * eps
            target = (x_s - sigma_s / sigma * x_t) / (alpha_s - sigma_s / sigma * alpha)
            found, _ = called(student, x_t, t, cond)
            loss = (torch.clamp((alpha / sigma) ** 2, min=1) * (found - target) ** 2).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), training.grad_clip, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        seconds += time.perf_counter() - start
        teacher = student.eval().requires_grad_(False)
        yield num_steps, seconds, teacher


def library_row(
    bench: Bench, name: str, plan: Plan, share: float, best: float, students: Sequence[int]
) -> dict[str, Any]:
    """Train the stages that lead to the timed students with a share of their budget, and measure these students."""
    short = name.replace("'", "").replace(" ", "-")
    wanted = sorted({place for steps in students for place in way_to(plan, steps)})
    changed = scaled(Plan(tuple(plan.stages[place] for place in wanted)), share)
    stages = bench.distil(f"{short}-{share:g}-{'-'.join(map(str, students))}", changed, seed=0).stages()[1:]
    row: dict[str, Any] = {"way": name, "share": share}
    for steps in students:
        way = way_to(changed, steps)
        seconds = sum(stages[place].manifest(verify=False).seconds for place in way)
        distance = bench.measured(stages[way[-1]], steps).frechet
        row |= {f"seconds to {steps}": round(seconds, 1), f"ratio at {steps}": round(distance / best, 3)}
    return row


def naive_row(bench: Bench, plan: Plan, share: float, best: float, students: Sequence[int]) -> dict[str, Any]:
    """Train the paper's chain with naive updates and measure its students."""
    file = bench.out / "naive" / f"{share:g}-{'-'.join(map(str, students))}.json"
    if file.is_file():
        held: dict[str, Any] = read_json(file)
        return held
    count, model = bench.scale.recipe.evaluation.num_samples, bench.model(bench.teacher)
    row: dict[str, Any] = {"way": NAIVE, "share": share}
    for steps, seconds, student in naive_chain(bench, scaled(plan, share)):
        if steps not in students:
            continue
        # These students are sampled like the library's own models, with the same seeds, classes and clipping.
        manifest = model.manifest.model_copy(update={"outcome": Outcome(role="student", num_steps=steps)})
        made = Model(student, manifest)
        x0 = torch.cat([made.sample(range(at, min(at + 500, count))) for at in range(0, count, 500)])
        distance = frechet_distance(bench.reference.real.features, bench.reference.extractor.features(x0))
        row |= {f"seconds to {steps}": round(seconds, 1), f"ratio at {steps}": round(distance / best, 3)}
    write_json(file, row)
    return row


def marks(rows: Sequence[dict[str, Any]], students: Sequence[int]) -> list[dict[str, Any]]:
    """Return, for each method, the seconds of the smallest budget that was good enough, or None if none was."""
    found = []
    for way in dict.fromkeys(row["way"] for row in rows):
        own = sorted((row for row in rows if row["way"] == way), key=lambda row: row["share"])
        reached = {
            steps: next((row[f"seconds to {steps}"] for row in own if row[f"ratio at {steps}"] <= MARK), None)
            for steps in students
        }
        found.append({"way": way} | {f"seconds to quality at {steps}": reached[steps] for steps in students})
    return found


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder for the teacher and the students")
    parser.add_argument("--scale", choices=sorted(SCALES), default="smoke")
    parser.add_argument("--data", help="data set; default: that of the recipe")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=SHARES, help="budgets, as shares of the full number of updates"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, help="numbers of steps of the timed students")
    parser.add_argument(
        "--only", choices=(PAPER, NEW, NAIVE), nargs="+", help="methods to measure; default: all methods"
    )
    parser.add_argument("--threads", type=int, help="number of CPU threads for torch")
    parser.add_argument("--short", action="store_true", help="write a file only if --out is given")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: docs/results/benchmarks/quality.json")
    options = parsed(parser)
    scale = SCALES[options.scale]()
    if options.data:
        data = scale.recipe.data.model_copy(update={"source": options.data})
        scale = replace(scale, recipe=scale.recipe.model_copy(update={"data": data}))
    measure(scale, recipes[scale.recipe.name](), options)


def measure(scale: Scale, new: Recipe, options: argparse.Namespace) -> None:
    """Train and evaluate all methods at a scale, and write the table. The recipe `new` contains the new plan."""
    bench = Bench(options.runs, scale, None, lambda event: None)
    best = min(bench.measured(bench.teacher, one.num_steps, one.sampler).frechet for one in AT_BEST)
    known = plans(scale, new)
    rows = []
    for share in sorted(options.shares):
        for name in options.only or (*known, NAIVE):
            if name == NAIVE:
                rows.append(naive_row(bench, known[PAPER], share, best, options.steps))
            else:
                rows.append(library_row(bench, name, known[name], share, best, options.steps))
            print(rows[-1], flush=True)
    write("quality", rows, options, scale=scale.name, mark=MARK, teacher_best=best, reached=marks(rows, options.steps))


if __name__ == "__main__":
    main()
