"""What `--dry-run` prints: the plan, and what it costs in arithmetic, memory and time."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from halfstep.cli.words import console_for, duration, print_json
from halfstep.objectives import Role, guidances
from halfstep.run.cost import count_forward, helper_sizes, memory_of_update, time_updates, update_flops
from halfstep.run.spec import RunSpec


def plan_facts(spec: RunSpec, out: Path, missing: str | None = None) -> dict[str, Any]:
    """What the run would do and cost, as data: bytes, seconds, and FLOPs counted as multiplications and additions."""
    forward = count_forward(spec)
    sizes = [helper_sizes(spec, stage) for stage in spec.plan.stages]
    micro_batch = spec.engine.set_micro_batch
    memory = max(
        (
            memory_of_update(stage, forward, spec.engine, helpers)
            for stage, helpers in zip(spec.plan.stages, sizes, strict=True)
        ),
        key=sum,
    )
    rate = time_updates(spec, forward)
    stages = [(name, stage) for name, stage in spec.stages if stage is not None]
    each = [update_flops(stage, forward, helpers) for (_, stage), helpers in zip(stages, sizes, strict=True)]
    unit = rate.seconds / max(1.0, each[0])
    learned = [s.objective.guidance for _, s in stages if s.objective.outcome.role is Role.MATCHED]
    return {
        "name": spec.recipe["name"],
        "out": str(out),
        "stages": [
            {
                "stage": name,
                "num_steps": stage.num_steps,
                "role": stage.objective.outcome.role,
                "evals": {
                    network: {"forward": evals.forward, "backward": evals.backward}
                    for network, evals in stage.objective.evals.items()
                },
                "num_updates": stage.training.num_updates,
                "batch_size": stage.training.batch_size,
                "samples_seen": stage.training.num_updates * stage.training.batch_size,
                "learning_rate": stage.training.learning_rate,
                "update_flops": flops,
                "estimated_seconds": stage.training.num_updates * flops * unit,
            }
            for (name, stage), flops in zip(stages, each, strict=True)
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
        "micro_batch": min(micro_batch or 2**62, max(stage.training.batch_size for _, stage in stages)),
        "guidance": guidances.describe(learned[0]) if learned and learned[0] is not None else None,
        "seconds_an_update": rate.seconds,
        "timed_batch_size": rate.batch_size,
        "estimated_seconds": sum(
            stage.training.num_updates * flops * unit for (_, stage), flops in zip(stages, each, strict=True)
        ),
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
        "teacher calls",
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
            f"{stage['evals']['teacher']['forward']:g}" if "teacher" in stage["evals"] else "-",
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
        found = facts["guidance"]
        scales = (
            f"the scale {found['scale']:g}" if found["type"] == "fixed" else f"{found['low']:g} to {found['high']:g}"
        )
        lines.append(f"guidance: {scales}, baked into the student; one network call a step, the teacher needs two")
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
