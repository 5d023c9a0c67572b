"""Compare two orders at the end of a chain: halving the 2-step student before or after finishing it.

    python benchmarks/finish_order.py runs/digits                     # a run with halved students of 2 steps and 1 step

Both orders start from the run's halved 2-step student. "At the end" halves this student to 1 step and finishes the
result. "In the chain" finishes the 2-step student first, then halves the finished student to 1 step and finishes the
result. The settings are those of the run's recipe. Each distance is divided by that of the teacher with 32 Heun steps.
Distances are measured with new noise seeds in the features of the run's own classifier and of the perceptron in
`independent.py`. `rmse` is the distance from the teacher's samples for the same noise.
"""

import argparse
import warnings
from pathlib import Path
from typing import get_args

import halfstep
from common import parsed, write
from finish_ablation import measure_of, trained
from halfstep.data import open_data
from halfstep.objectives import Plan
from halfstep.recipes import Recipe
from halfstep.runs import RunFolder
from halfstep.studies.roads import AT_BEST
from halfstep.train.settings import Precision


def main() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run with a chain to 1 step")
    parser.add_argument(
        "--num-samples", type=int, help="number of samples per model; default: that of the run's recipe"
    )
    parser.add_argument("--precision", choices=get_args(Precision), default="float32", help="training precision")
    parser.add_argument("--seed", type=int, default=0, help="seed for training")
    parser.add_argument("--threads", type=int, help="number of CPU threads for torch")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write; default: docs/results/benchmarks/finish_order.json"
    )
    options = parsed(parser)
    run = RunFolder(options.run)
    recipe = Recipe.model_validate(run.recipe()["recipe"])
    data = open_data(recipe.data)
    first, *others = run.stages()
    teacher = halfstep.load(first.path)
    two = next(one for one in others if one.manifest().objective == "halve" and one.manifest().num_steps == 2)
    halving = Plan(recipe.chain_plan().stages[-1:])
    finish = recipe.finish.model_copy(update={"steps": (2, 1)})
    finishes = recipe.model_copy(update={"finish": finish}).fitted({"finish.steps"}).finish.plan()
    measured, _ = measure_of(recipe, data, teacher, AT_BEST[-1:], options.num_samples)
    rows = []
    of_two, of_one = (Plan((stage,)) for stage in finishes.stages)
    for order, plan in {"at the end": halving + of_one, "in the chain": of_two + halving + of_one}.items():
        models, _ = trained(
            teacher, halfstep.load(two.path), data, plan, seed=options.seed, precision=options.precision
        )
        for stage, model in zip(plan.stages, models, strict=True):
            name = f"{stage.objective.label} {stage.num_steps}"
            rows.append({"order": order, "model": name} | measured(model))
            print(rows[-1], flush=True)
    write("finish_order", rows, options, precision=options.precision, seed=options.seed)


if __name__ == "__main__":
    main()
