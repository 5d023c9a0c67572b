"""What `--dry-run` prints: the plan, and what it costs in arithmetic, memory and time."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from halfstep.cli.words import console_for, duration, print_json
from halfstep.objectives import Halving
from halfstep.run.cost import count_forward, memory_of_update, time_updates
from halfstep.run.spec import RunSpec


def plan_facts(spec: RunSpec, out: Path, missing: str | None = None) -> dict[str, Any]:
    """What the run would do and cost, as data: bytes, seconds, and FLOPs counted as multiplications and additions."""
    forward = count_forward(spec)
    memory = max(
        (
            memory_of_update(stage, forward, spec.set_micro_batch, spec.optimizer, spec.teacher_precision)
            for stage in spec.plan.stages
        ),
        key=sum,
    )
    rate = time_updates(spec, forward)
    first = spec.plan.stages[0]
    unit = rate.seconds / first.update_cost
    is_guided = spec.guidance is not None and 2 in {stage.objective.teacher_evals for stage in spec.plan.stages}
    return {
        "name": spec.recipe["name"],
        "out": str(out),
        "stages": [
            {
                "stage": name,
                "num_steps": stage.num_steps,
                "num_teacher_steps": stage.objective.num_teacher_steps
                if isinstance(stage.objective, Halving)
                else None,
                "num_updates": stage.num_updates,
                "batch_size": stage.batch_size,
                "samples_seen": stage.num_updates * stage.batch_size,
                "learning_rate": stage.learning_rate,
                "update_flops": stage.update_cost * forward.flops,
                "estimated_seconds": stage.num_updates * stage.update_cost * unit,
            }
            for name, stage in zip(spec.plan.names(spec.teacher is not None), spec.plan.stages, strict=True)
        ],
        "data": {
            "source": spec.data.source,
            "num_samples": len(spec.data),
            "shape": list(spec.data.shape),
            "num_classes": spec.data.num_classes,
            "missing": missing,
        },
        "parameters": forward.parameters,
        "trainable_parameters": forward.trainable,
        "forward_flops": forward.flops,
        "memory_bytes": memory._asdict(),
        "micro_batch": min(spec.set_micro_batch or 2**62, max(stage.batch_size for stage in spec.plan.stages)),
        "guidance": list(spec.guidance) if is_guided and spec.guidance is not None else None,
        "seconds_an_update": rate.seconds,
        "timed_batch_size": rate.batch_size,
        "estimated_seconds": sum(stage.num_updates * stage.update_cost * unit for stage in spec.plan.stages),
    }


def show_plan(spec: RunSpec, out: Path, json: bool, missing: str | None = None) -> None:
    """Prints what the run would do and cost; writes nothing.

    Args:
        json: whether as one JSON document.
        missing: why the data is not at hand, if random pixels stand in for it.
    """
    facts = plan_facts(spec, out, missing)
    if json:
        print_json(facts)
    else:
        _print_plan(facts, console_for())


def _print_plan(facts: dict[str, Any], console: Console) -> None:
    stages, data = facts["stages"], facts["data"]
    table = Table(title=f"{facts['name']} -> {facts['out']}", title_justify="left")
    for heading in (
        "stage",
        "teacher steps",
        "updates",
        "batch",
        "samples seen",
        "learning rate",
        "FLOPs of an update",
    ):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in stages:
        table.add_row(
            stage["stage"],
            str(stage["num_teacher_steps"] or "-"),
            f"{stage['num_updates']:,}",
            f"{stage['batch_size']:,}",
            f"{stage['samples_seen']:,}",
            f"{stage['learning_rate']:g}",
            quantity(stage["update_flops"], "FLOP"),
        )
    console.print(table)
    lines = [
        f"data: {data['source']}, {data['num_samples']:,} samples of shape {data['shape']}, "
        f"{data['num_classes'] or 'no'} classes"
    ]
    if data["missing"] is not None:
        lines.append(f"the data is not at hand, random pixels stand in for it here ({data['missing']})")
    seen = sum(stage["samples_seen"] for stage in stages)
    parameters, trainable = facts["parameters"], facts["trainable_parameters"]
    lines.append(
        f"parameters: {parameters:,}    one forward pass of one sample: {quantity(facts['forward_flops'], 'FLOP')}"
    )
    lines.append(
        f"updates: {sum(stage['num_updates'] for stage in stages):,}    samples seen: {seen:,} "
        f"({seen / data['num_samples']:,.0f} times the data)"
    )
    if trainable != parameters:
        lines.append(
            f"trained: {trainable:,} of them ({trainable / parameters:.1%}); teacher and student share the others"
        )
    memory = facts["memory_bytes"]
    parts = " + ".join(f"{gibibytes(size)} {name}" for name, size in memory.items() if size)
    lines.append(
        f"memory of the largest update, counted: {gibibytes(sum(memory.values()))} = {parts} "
        f"(of a micro batch of {facts['micro_batch']:,})"
    )
    if facts["guidance"] is not None:
        low, high = facts["guidance"]
        scales = f"the scale {low:g}" if low == high else f"scales from {low:g} to {high:g}"
        lines.append(f"guidance: {scales} is taken into the student; one network call a step, the teacher needs two")
    timed = facts["timed_batch_size"]
    how = "measured here" if timed == stages[0]["batch_size"] else f"extrapolated from a batch of {timed}"
    lines.append(
        f"estimated training time on this machine: {duration(facts['estimated_seconds'])} "
        f"({facts['seconds_an_update']:.3g} s an update of the first stage, {how}; measuring the models comes on top)"
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def quantity(number: float, unit: str) -> str:
    """ "1.23 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} Z{unit}"


def gibibytes(number: float) -> str:
    """ "1.2 GiB"."""
    size = number / 2**30
    return f"{size:,.0f} GiB" if size >= 100 else f"{size:.3g} GiB"
