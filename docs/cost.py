"""Write docs/pages/cost.md: docs/cost.md with tables generated from the benchmarks' JSON and from the recipes.

    python docs/cost.py

Each line `{{name}}` of docs/cost.md is replaced with the table `name`. Everything else is copied.
"""

import json
import re
from pathlib import Path
from typing import Any

from halfstep.objectives import Role
from halfstep.recipes import build, recipes
from halfstep.recipes.building import data_or_stand_in
from halfstep.run.cost import count_forward

DOCS = Path(__file__).parent
RESULTS = DOCS / "results" / "benchmarks"
PAPER = {"cifar10_paper": 8, "imagenet64_paper": 64, "lsun_bedroom128_paper": 64, "lsun_church128_paper": 64}
"""The paper's recipes, and the number of devices on which the authors trained each (from a secondary source)."""
PEAK = 989e12
"""Dense bfloat16 operations per second of an H100 or H200, from the data sheet."""
SHARE = 0.35
"""Assumed utilisation of the peak: no GPU was available to measure it."""
LINK = 50e9
"""Assumed bytes per second that a device sends and receives in an all-reduce between machines with a fast network."""


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table."""

    def cell(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    names = list(rows[0])
    numeric = [all(isinstance(row[name], int | float | None) for row in rows) for name in names]
    lines = ["| " + " | ".join(names) + " |", "|" + "|".join("---:" if right else "---" for right in numeric) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell(row[name]) for name in names) + " |" for row in rows])


def measured(name: str, columns: list[str]) -> str:
    """Return the table of a benchmark, with the machine on which it was measured."""
    held = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [{column: row.get(column) for column in columns} for row in held["rows"]]
    environment = held["environment"]
    return (
        f"{markdown(rows)}\n\n*`{environment['command']}`, {environment['cpu_count']} CPU cores "
        f"({environment['device']}), torch {environment['versions']['torch']}, commit "
        f"{environment['git_commit'] or 'unknown'}, {environment['started'][:10]}: "
        f"docs/results/benchmarks/{name}.json.*"
    )


def priced() -> str:
    """Return the table of the paper's recipes, on one device and on the number that the authors used."""
    rows = []
    for name, devices in PAPER.items():
        recipe = recipes[name]()
        spec = build(recipe, what="all", data=data_or_stand_in(recipe)[0])
        forward = count_forward(spec)
        work = {"train": 0.0, "distil": 0.0}
        updates = {"train": 0, "to 4": 0}
        to_four = 0.0
        for stage in spec.plan.stages:
            number = stage.training.num_updates
            flops = forward.flops * stage.update_cost * number
            if stage.objective.outcome.role is Role.TEACHER:
                work["train"] += flops
                updates["train"] += number
                continue
            work["distil"] += flops
            if (stage.num_steps or 0) >= 4:
                updates["to 4"] += number
                to_four += flops
        stage = spec.plan.stages[-1]
        update = forward.flops * stage.update_cost / devices / (PEAK * SHARE)
        traffic = 2 * (devices - 1) / devices * 4 * forward.parameters / LINK
        rows.append(
            {
                "recipe": name, "M parameters": forward.parameters / 1e6, "GFLOP per forward pass": forward.flops / 1e9,
                "batch": stage.training.batch_size, "EFLOP to train": work["train"] / 1e18,
                "EFLOP to distil": work["distil"] / 1e18, "distil / train": work["distil"] / work["train"],
                "to 4 steps / train": to_four / work["train"],
                "in updates": updates["to 4"] / updates["train"],
                "GPU days to train": work["train"] / (PEAK * SHARE) / 86400,
                "GPU days to distil": work["distil"] / (PEAK * SHARE) / 86400,
                "devices": devices, "all-reduce / computing": traffic / update,
            }
        )  # fmt: skip
    return markdown(rows)


def speedrun() -> str:
    """Return the table of the speedrun on one GPU, or of its tiny form if no GPU has run it."""
    full = RESULTS / "cifar10_speedrun.json"
    file = full if full.is_file() else RESULTS / "cifar10_speedrun-tiny.json"
    held = json.loads(file.read_text())
    columns = ["model", "steps", "precision", "FD(resnet20)", "images / s"]
    environment = held["environment"]
    return (
        f"{markdown([{column: row[column] for column in columns} for row in held['rows']])}\n\n"
        f"*The run took {held['seconds in all']:.0f} seconds of its budget of {held['budget']:.0f}. The same number of "
        f"training images has a distance of {held['floor']:.3g}. {environment['cpu_count']} CPU cores "
        f"({environment['device']}), "
        f"commit {environment['git_commit']}, {environment['started'][:10]}: docs/results/benchmarks/{file.name}.*"
    )


def reading() -> str:
    """Return the table of reading speeds."""
    return markdown(json.loads((RESULTS / "io.json").read_text())["reading"]).replace("brought to", "resized to")


def growth() -> str:
    """Return a sentence on the memory growth of a long run."""
    held = json.loads((RESULTS / "memory.json").read_text())["growth"]
    return (
        f"In a run of the {held['network']} network with {held['updates']:,} updates and a checkpoint every 20 "
        f"updates, live tensors grew by {held['growth, bytes of live tensors']:,} bytes after the first 50 updates. "
        f"The memory of the process grew from {held['MB at 50']:.1f} MB to {held['MB then']:.1f} MB at update "
        f"{held['settled at']}, because of the allocator and the first checkpoints, and to "
        f"{held['MB at the end']:.1f} MB at the end."
    )


TABLES = {
    "step": lambda: measured(
        "step", ["network", "M parameters", "batch", "precision", "compiled", "seconds", "ours / bare", "naive / ours"]
    ),
    "sample": lambda: measured(
        "sample",
        [
            "network",
            "batch",
            "steps",
            "images / s",
            "ours / bare",
            "diffusers / ours",
            "ours / ours in bf16",
            "time / time at 4",
        ],
    ),
    "io": lambda: measured(
        "io", ["network", "batch", "MB", "checkpoint, s", "resume, s", "waits, s", "costs, s", "costs / 60 s"]
    ),
    "scale": lambda: measured(
        "scale",
        [
            "network",
            "batch",
            "processes",
            "threads of each",
            "micro batches of each",
            "seconds",
            "ours / bare",
            "against 1",
        ],
    ),
    "memory": lambda: measured(
        "memory",
        [
            "network",
            "stage",
            "setting",
            "batch",
            "measured weights",
            "measured moments",
            "measured pass",
            "measured peak",
            "measured / counted",
        ],
    ),
    "growth": growth,
    "reading": reading,
    "speedrun": speedrun,
    "priced": priced,
}


def page() -> str:
    """Return the text of the page."""
    text = (DOCS / "cost.md").read_text(encoding="utf-8")
    return re.sub(r"^\{\{(\w+)\}\}$", lambda match: TABLES[match[1]](), text, flags=re.MULTILINE)


if __name__ == "__main__":
    (DOCS / "pages" / "cost.md").write_text(page(), encoding="utf-8")
