"""Ablate the finish by varying each setting separately, for several students of a run.

    python benchmarks/finish_ablation.py runs/digits                     # the students at 8, 4, 2 and 1 steps
    python benchmarks/finish_ablation.py runs/fashion_mnist --steps 4 --updates 250 --only "map weight 1" "map weight 4"

Each trial starts from the run's halved student with N steps, trains one finish on the run's data with the undistilled
teacher, and measures the finished student. The row "before" is the student without a finish. Each distance is divided
by that of the teacher at its best (256 DDIM steps or 32 Heun steps). Distances are measured with new noise seeds in the
features of the run's own classifier and of the perceptron in `independent.py`. `rmse` is the distance from the
teacher's Heun samples for the same noise. The file is written after each trial. To resume, rerun the same command.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, get_args

import torch

import halfstep
from common import RESULTS, facts, parsed, show
from halfstep.data import Data, open_data
from halfstep.measure.evaluate import Method
from halfstep.metrics import rmse
from halfstep.objectives import Finishing, Outcome, Plan, Role, Training
from halfstep.recipes import Recipe
from halfstep.run.call import Chain, call_of
from halfstep.runs import RunFolder, StageFolder
from halfstep.runtime.files import read_json, write_json
from halfstep.samplers import DDIM
from halfstep.studies.roads import AT_BEST
from halfstep.train.settings import Engine, Precision
from independent import KEPT, drawn, references_of

OWN: Final = ("map_weight", "data_weight", "auxiliary_turns", "auxiliary_rate", "lead_updates")
"""The settings of the finish that are taken from the recipe."""
VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "as in the recipe": {},
    "data weight 0": {"data_weight": 0.0},
    "data weight 0.5": {"data_weight": 0.5},
    "map weight 0": {"map_weight": 0.0},
    "map weight 0.25": {"map_weight": 0.25},
    "map weight 0.5": {"map_weight": 0.5},
    "map weight 0.75": {"map_weight": 0.75},
    "map weight 1": {"map_weight": 1.0},
    "map weight 2": {"map_weight": 2.0},
    "map weight 4": {"map_weight": 4.0},
    "1 auxiliary turn": {"auxiliary_turns": 1},
    "2 auxiliary turns": {"auxiliary_turns": 2},
    "4 auxiliary turns": {"auxiliary_turns": 4},
    "half the auxiliary rate": {"auxiliary": 0.5},
    "twice the auxiliary rate": {"auxiliary": 2.0},
    "no lead": {"lead_updates": 0},
    "lead of 20 updates": {"lead_updates": 20},
    "tau inside the step": {"inside_step": True},
    "not whitened": {"whitened": False},
    "half the student's rate": {"rate": 0.5, "auxiliary": 2.0},
    "twice the student's rate": {"rate": 2.0, "auxiliary": 0.5},
    "slower student": {"rate": 0.4, "auxiliary": 2.5},
    "faster student": {"rate": 2.5, "auxiliary": 0.4},
    "half of both rates": {"rate": 0.5},
    "half the updates": {"length": 0.5},
    "twice the updates": {"length": 2.0},
}
"""The settings in which each variant differs from the recipe. These are fields of `Finishing`, plus `rate`, `auxiliary`
and `length`, which multiply the learning rate, its ratio to the auxiliary denoiser's rate, and the number of updates.
"""


def trained(
    teacher: Any, student: Any, data: Any, plan: Plan, *, seed: int, precision: Precision
) -> tuple[Sequence[Any], float]:
    """Train a plan from a student and its undistilled teacher; return the models and the training time in seconds."""
    x0, cond = data.fetch(torch.arange(len(data)))
    source = (x0, dict(cond)) if teacher.num_classes else x0
    call = call_of(seed, Engine(cpu=True, precision=precision), None, None, None, None, None, False)
    with call.placed() as engine:
        chain = Chain(call, engine, call.opened(source), teacher.denoiser, Outcome(Role.TEACHER), teacher.null, student)
        chain.made.append(student.denoiser)
        chain.outcomes.append(Outcome(Role.STUDENT, student.num_steps, DDIM()))
        start = time.perf_counter()
        for _ in chain.run(plan, None):
            pass
        return chain.models[-len(plan.stages) :], time.perf_counter() - start


def measure_of(
    recipe: Recipe, data: Data, teacher: Any, methods: Sequence[Method], num_samples: int | None
) -> tuple[Callable[[Any], dict[str, Any]], dict[str, float]]:
    """Return a function that measures a model relative to the teacher's best method, and the teacher's distances."""
    references = dict(zip(("own", "other"), references_of(data, recipe.evaluation), strict=True))
    count = num_samples or recipe.evaluation.num_samples
    at_best = [drawn(teacher, count, sampler=one.sampler, num_steps=one.num_steps) for one in methods]
    best = {
        name: min(reference.figures(samples).values["frechet"] for samples in at_best)
        for name, reference in references.items()
    }

    def measured(model: Any) -> dict[str, Any]:
        samples = drawn(model, count)
        row: dict[str, Any] = {}
        for name, reference in references.items():
            found = reference.figures(samples).values
            row[f"{name} ratio"] = round(found["frechet"] / best[name], 4)
            row |= {f"{name} {each}": round(found[each], 4) for each in KEPT[1:]}
        return row | {"rmse": round(rmse(samples, at_best[-1]), 4)}

    return measured, best


def varied(steps: int, training: Training, settings: Mapping[str, Any]) -> Plan:
    """Return the plan for finishing a student with these settings, in the form of `VARIANTS`."""
    own = dict(settings)
    rate, length = own.pop("rate", 1.0), own.pop("length", 1.0)
    own["auxiliary_rate"] *= own.pop("auxiliary", 1.0)
    changed = replace(
        training, learning_rate=rate * training.learning_rate, num_updates=round(length * training.num_updates)
    )
    return Plan.of(Finishing(steps, **own), changed)


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--steps", type=int, nargs="+", default=(8, 4, 2, 1), help="students to finish")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(VARIANTS),
        default=list(VARIANTS),
        help="variants to train; default: all variants",
    )
    parser.add_argument(
        "--num-samples", type=int, help="number of samples per model; default: that of the run's recipe"
    )
    parser.add_argument("--updates", type=int, help="number of updates per finish; default: that of the run's recipe")
    parser.add_argument(
        "--heun-only", action="store_true", help="skip DDIM with 256 steps, which takes 4 times as long"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="training precision")
    parser.add_argument("--seed", type=int, default=0, help="seed for training")
    parser.add_argument("--threads", type=int, help="number of CPU threads for torch")
    parser.add_argument("--out", type=Path, default=RESULTS / "finish_ablation.json")
    options = parsed(parser)
    run = RunFolder(options.run)
    recipe = Recipe.model_validate(run.recipe()["recipe"])
    data = open_data(recipe.data)
    first, *others = run.stages()
    teacher = halfstep.load(first.path)
    halved: dict[int, StageFolder] = {}
    for folder in others:
        manifest = folder.manifest(verify=False)
        if manifest.num_steps is not None and manifest.objective == "halve":
            halved[manifest.num_steps] = folder

    held = read_json(options.out) if options.out.is_file() else {"rows": []}
    rows: list[dict[str, Any]] = held["rows"]
    methods = AT_BEST[-1:] if options.heun_only else AT_BEST
    measured, best = measure_of(recipe, data, teacher, methods, options.num_samples)
    finish = recipe.finish
    trainings = {
        steps: replace(
            finish.training,
            num_updates=options.updates or (finish.updates_at or {}).get(steps, finish.training.num_updates),
            learning_rate=(finish.learning_rate_at or {}).get(steps, finish.training.learning_rate),
        )
        for steps in options.steps
    }
    own = {name: getattr(finish, name) for name in OWN}
    for steps in options.steps:
        student = halfstep.load(halved[steps].path)
        training = trainings[steps]
        for name in ("before", *options.only):
            key = {"steps": steps, "variant": name, "seed": options.seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            model, seconds = student, 0.0
            if name != "before":
                plan = varied(steps, training, own | VARIANTS[name])
                (model,), seconds = trained(
                    teacher, student, data, plan, seed=options.seed, precision=options.precision
                )
            rows.append(key | measured(model) | {"seconds": round(seconds, 1)})
            print(rows[-1], flush=True)
            write_json(
                options.out,
                {
                    "benchmark": "finish_ablation",
                    "environment": facts(),
                    "run": run.path.name,
                    "recipe": recipe.name,
                    "settings": own,
                    "training": held.get("training", {})
                    | {str(steps): asdict(trainings[steps]) for steps in trainings},
                    "precision": options.precision,
                    "teacher at its best": best,
                    "rows": rows,
                },
            )
    show("finish_ablation", rows)


if __name__ == "__main__":
    main()
