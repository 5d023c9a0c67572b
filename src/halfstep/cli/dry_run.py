"""What `--dry-run` prints: the plan, and what it costs in arithmetic, memory and time."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from halfstep.cli.display import duration
from halfstep.objectives import Halving
from halfstep.train import RunSpec
from halfstep.train.cost import count_forward, memory_of_update, time_updates, update_cost


def show_plan(spec: RunSpec, out: Path, console: Console, missing: str | None = None) -> None:
    """Prints what the run would do and cost; writes nothing.

    Args:
        missing: why the data is not at hand, if random pixels stand in for it.
    """
    forward = count_forward(spec)
    table = Table(title=f"{spec.recipe['name']} -> {out}", title_justify="left")
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
    for name, stage in zip(spec.plan.names(spec.teacher is not None), spec.plan.stages, strict=True):
        table.add_row(
            name,
            str(stage.objective.num_teacher_steps) if isinstance(stage.objective, Halving) else "-",
            f"{stage.num_updates:,}",
            f"{stage.batch_size:,}",
            f"{stage.num_updates * stage.batch_size:,}",
            f"{stage.learning_rate:g}",
            quantity(update_cost(stage) * forward.flops, "FLOP"),
        )
    console.print(table)
    lines = [
        f"data: {spec.data.source}, {len(spec.data):,} samples of shape {list(spec.data.shape)}, "
        f"{spec.data.num_classes or 'no'} classes"
    ]
    if missing is not None:
        lines.append(f"the data is not at hand, random pixels stand in for it here ({missing})")
    seen = sum(stage.num_updates * stage.batch_size for stage in spec.plan.stages)
    lines.append(
        f"parameters: {forward.parameters:,}    one forward pass of one sample: {quantity(forward.flops, 'FLOP')}"
    )
    lines.append(
        f"updates: {spec.plan.num_updates:,}    samples seen: {seen:,} ({seen / len(spec.data):,.0f} times the data)"
    )
    if forward.trainable != forward.parameters:
        share = forward.trainable / forward.parameters
        lines.append(f"trained: {forward.trainable:,} of them ({share:.1%}); teacher and student share the others")
    memory = max(
        (
            memory_of_update(stage, forward, spec.set_micro_batch, spec.optimizer, spec.teacher_precision)
            for stage in spec.plan.stages
        ),
        key=sum,
    )
    parts = " + ".join(f"{gibibytes(size)} {name}" for name, size in memory._asdict().items() if size)
    samples = min(spec.set_micro_batch or 2**62, max(stage.batch_size for stage in spec.plan.stages))
    lines.append(
        f"memory of the largest update, counted: {gibibytes(sum(memory))} = {parts} (of a micro batch of {samples:,})"
    )
    evals = {stage.objective.teacher_evals for stage in spec.plan.stages}
    if spec.guidance is not None and 2 in evals:
        low, high = spec.guidance
        scales = f"the scale {low:g}" if low == high else f"scales from {low:g} to {high:g}"
        lines.append(f"guidance: {scales} is taken into the student; one network call a step, the teacher needs two")
    rate = time_updates(spec, forward)
    first = spec.plan.stages[0]
    unit = rate.seconds / update_cost(first)
    total = sum(stage.num_updates * update_cost(stage) * unit for stage in spec.plan.stages)
    how = "measured here" if rate.batch_size == first.batch_size else f"extrapolated from a batch of {rate.batch_size}"
    lines.append(
        f"estimated training time on this machine: {duration(total)} ({rate.seconds:.3g} s an update of the first "
        f"stage, {how}; measuring the models comes on top)"
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
