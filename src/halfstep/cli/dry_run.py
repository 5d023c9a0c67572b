"""The output of `--dry-run`: the plan of a run and its cost in FLOPs, memory and time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from rich.table import Column, Table

from halfstep.cli.usage import UsageError
from halfstep.cli.words import Screen, print_json
from halfstep.data import LATENTS, Data, Forecast
from halfstep.models.model import Model
from halfstep.objectives import Role, guidances
from halfstep.report.words import count, duration, number
from halfstep.run.cost import count_forward, helper_sizes, memory_of_update, time_updates, update_flops
from halfstep.run.folder import check_recipe
from halfstep.run.measuring import calls_of_measuring
from halfstep.run.spec import RunSpec
from halfstep.runs import RunFolder
from halfstep.runs.schema import shortened
from halfstep.runtime.devices import default_accelerator
from halfstep.runtime.launch import world_size

LONG_SECONDS: Final = 86400.0
"""The estimated time of a run, in seconds, above which a warning is printed."""
DEVICES: Final = (24, 48, 80)
"""The memory sizes of common devices, in GiB."""
SHARE: Final = 0.9
"""The share of a device's memory that an update may use. The allocator and workspaces need the rest."""
LITTLE: Final = 2**30
"""The memory, in bytes, that any machine has. If a plan for the CPU needs less, the output does not mention devices."""
FEW_SAMPLES: Final = 5000
MANY_PASSES: Final = 500.0
"""A memorisation warning is printed if a stage makes more than this number of passes over fewer than FEW_SAMPLES
samples.
"""


def check_alone() -> None:
    """Raise UsageError if there are several processes, because a dry run only times a single process."""
    if world_size() > 1:
        raise UsageError("a dry run uses a single process. Start it without torchrun or accelerate launch")


def show_encoding(found: Forecast, num_samples: int, source: str, verb: str) -> None:
    """Print what `halfstep encode` would write and how long it would take; `verb` is "encoded" or "sampled"."""
    screen, tensors = Screen(), dict(found.tensors)
    shapes = {name: f"{list(entry.shape)} {entry.dtype}" for name, entry in tensors.items()}
    screen.say(f"dry run of {source}: {found.pending:,} of {count(num_samples, 'sample')} would be {verb}")
    screen.say(f"latent: {shapes.pop(LATENTS)}")
    screen.say(f"conditions: {', '.join(f'{name} {shape}' for name, shape in shapes.items()) or 'none'}")
    screen.say(f"size of the folder: {gibibytes(found.num_bytes)} ({found.num_bytes:,} bytes)")
    if found.timed:
        pace = f"{number(found.seconds / found.pending)} s per sample, timed on {count(found.timed, 'sample')}"
        screen.say(f"estimated time on this machine: {duration(found.seconds)} ({pace})")
    screen.say("nothing was written")


def _conflict(spec: RunSpec, out: Path) -> str | None:
    """Return the reason why the run cannot use the folder `out`, or None if it can."""
    try:
        check_recipe(spec, RunFolder(out))
    except ValueError as error:
        return str(error)
    return None


def plan_facts(spec: RunSpec, out: Path, missing: str | None = None) -> dict[str, Any]:
    """Return the plan of a run and its cost in bytes, seconds and FLOPs (multiplications and additions).

    The times do not include stages that are already complete in the folder `out`. If the folder contains another run,
    no stage counts as complete, and "conflict" is the message that the run itself would end with. Whether the run was
    trained on the same data is not checked.
    """
    folder, conflict = RunFolder(out), _conflict(spec, out)
    complete = {name for name, _ in spec.stages if conflict is None and folder.stage(name).is_complete()}
    forward = count_forward(spec)
    stages = [(name, stage, helper_sizes(spec, stage)) for name, stage in spec.stages if stage is not None]
    memory = max((memory_of_update(stage, forward, spec.engine, helpers) for _, stage, helpers in stages), key=sum)
    # The weights of a published model are not available, so no update can be timed.
    is_counted = spec.teacher is not None and spec.teacher.device.type == "meta"
    rate = None if is_counted else time_updates(spec, forward)
    flops = [update_flops(stage, forward, helpers) for _, stage, helpers in stages]
    seconds_a_flop = None if rate is None else rate.seconds / max(1.0, flops[0])
    rows: list[dict[str, Any]] = [
        {
            "stage": name,
            "num_steps": stage.num_steps,
            "role": stage.objective.outcome.role,
            "evals": {network: evals._asdict() for network, evals in stage.objective.evals.items()},
            "num_updates": stage.training.num_updates,
            "batch_size": stage.training.batch_size,
            "samples_seen": stage.training.num_updates * stage.training.batch_size,
            "learning_rate": stage.training.learning_rate,
            "update_flops": flops_of_update,
            "complete": name in complete,
            "estimated_seconds": None
            if seconds_a_flop is None
            else (name not in complete) * stage.training.num_updates * flops_of_update * seconds_a_flop,
        }
        for (name, stage, _), flops_of_update in zip(stages, flops, strict=True)
    ]
    # Sampling accounts for most of the measuring time.
    measuring = spec.evaluation.num_samples * calls_of_measuring(spec, complete) * forward.flops
    matched = [stage.objective for _, stage, _ in stages if stage.objective.outcome.role is Role.MATCHED]
    guidance = matched[0].guidance if matched else None
    return {
        "name": spec.recipe["name"],
        "out": str(out),
        "conflict": conflict,
        "stages": rows,
        "data": {
            "source": spec.data.source,
            "num_samples": len(spec.data),
            "shape": list(spec.data.shape),
            "num_classes": spec.data.num_classes,
            "class_names": list(spec.data.class_names),
            "missing": missing,
        },
        "parameters": forward.parameters,
        "trainable_parameters": forward.trainable,
        "forward_flops": forward.flops,
        "memory_bytes": memory._asdict(),
        "micro_batch": min(spec.engine.set_micro_batch or 2**62, max(row["batch_size"] for row in rows)),
        "guidance": None if guidance is None else guidances.describe(guidance),
        "fits_gib": [size for size in DEVICES if sum(memory) <= SHARE * size * 2**30],
        "seconds_an_update": None if rate is None else rate.seconds,
        "timed_batch_size": None if rate is None else rate.batch_size,
        "estimated_seconds": None if rate is None else sum(row["estimated_seconds"] for row in rows),
        "estimated_seconds_of_measuring": None if seconds_a_flop is None else measuring * seconds_a_flop,
    }


def show_plan(spec: RunSpec, out: Path, json: bool, missing: str | None = None) -> None:
    """Print the plan and cost of a run, as one JSON document or as text.

    Args:
        missing: why the data is not available, in which case random numbers replace it.
    """
    facts = plan_facts(spec, out, missing)
    if json:
        print_json(facts)
        return
    screen = Screen()
    screen.show(_stage_table(facts))
    for line in _lines(facts, spec):
        screen.say(line)


def _stage_table(facts: dict[str, Any]) -> Table:
    numbers = ("teacher calls", "updates", "batch", "samples seen", "learning rate", "FLOPs per update")
    columns = [Column(heading, justify="right") for heading in numbers]
    table = Table("stage", *columns, title=f"{facts['name']} -> {facts['out']}", title_justify="left")
    for stage in facts["stages"]:
        table.add_row(
            stage["stage"] + " (complete)" * stage["complete"],
            f"{stage['evals']['teacher']['forward']:g}" if "teacher" in stage["evals"] else "-",
            f"{stage['num_updates']:,}",
            f"{stage['batch_size']:,}",
            f"{stage['samples_seen']:,}",
            f"{stage['learning_rate']:g}",
            quantity(stage["update_flops"], "FLOP"),
        )
    return table


def _lines(facts: dict[str, Any], spec: RunSpec) -> Iterator[str]:
    stages, data = facts["stages"], facts["data"]
    yield data_line(spec.data)
    if data["missing"] is not None:
        yield f"the data is not available ({data['missing']}), so random numbers are used instead"
    seen = sum(stage["samples_seen"] for stage in stages)
    parameters, trainable = facts["parameters"], facts["trainable_parameters"]
    yield f"parameters: {parameters:,}    one forward pass of one sample: {quantity(facts['forward_flops'], 'FLOP')}"
    updates = sum(stage["num_updates"] for stage in stages)
    yield f"updates: {updates:,}    samples seen: {seen:,} (passes over the data: {seen / data['num_samples']:,.0f})"
    if trainable != parameters:
        share = f"{trainable / parameters:.1%}"
        yield f"trained parameters: {trainable:,} ({share}); teacher and student share the rest"
    memory = facts["memory_bytes"]
    parts = " + ".join(f"{gibibytes(size)} {name}" for name, size in memory.items() if size)
    total = gibibytes(sum(memory.values()))
    yield f"estimated memory of the largest update: {total} = {parts} (micro batch of {facts['micro_batch']:,})"
    on_cpu = spec.engine.cpu or default_accelerator() is None
    if not on_cpu or sum(memory.values()) >= LITTLE:
        fits = facts["fits_gib"]
        yield f"fits on a device with {fits[0]} GiB" if fits else f"does not fit on a device with {DEVICES[-1]} GiB"
    if (guidance := facts["guidance"]) is not None:
        is_fixed = guidance["type"] == "fixed"
        scales = f"the scale {guidance['scale']:g}" if is_fixed else f"{guidance['low']:g} to {guidance['high']:g}"
        yield f"guidance: {scales}, baked into the student, which calls its network once per step instead of twice"
    if (timed := facts["timed_batch_size"]) is not None:
        batch = stages[0]["batch_size"]
        how = "timed here" if timed == batch else f"extrapolated from updates of {timed // 2} and {timed} samples"
        seconds = f"{number(facts['seconds_an_update'])} s per update of {batch} samples in the first stage, {how}"
        measuring = facts["estimated_seconds_of_measuring"]
        time = duration(facts["estimated_seconds"] + measuring)
        share = f"of which {duration(measuring)} to measure the models; " if measuring else ""
        without = "without the complete stages; " if any(stage["complete"] for stage in stages) else ""
        yield f"estimated time on this machine: {time} ({without}{share}{seconds})"
    if (facts["estimated_seconds"] or 0) + (facts["estimated_seconds_of_measuring"] or 0) > LONG_SECONDS:
        advice = shorter([stage["role"] for stage in stages], spec.teacher)
        yield f"warning: this will take more than a day. Use a GPU, or {advice}"
    passes = max(stage["samples_seen"] for stage in stages) / data["num_samples"]
    if data["num_samples"] < FEW_SAMPLES and passes > MANY_PASSES:
        yield (
            f"warning: a stage sees each of the {data['num_samples']:,} samples {passes:,.0f} times, so models may "
            "memorise them (to check, see the nearest training samples in the report). Use more data or fewer updates"
        )
    if facts["conflict"] is not None:
        yield f"warning: without --dry-run, this command is refused: {facts['conflict']}"


def shorter(roles: Sequence[str], teacher: Model | None) -> str:
    """Return advice on how to shorten a run. A given teacher's network and image size are fixed."""
    if teacher is None:
        return "fewer updates, a smaller network and smaller images, as in the recipe images_small"
    options = ["--matching.num-updates"] * (Role.MATCHED in roles) + ["--chain.num-updates"]
    # If the given teacher is itself a student, the chain must start at its number of steps.
    options += ["--start"] * (teacher.num_steps is None)
    return f"lower {', '.join(options)}"


def data_line(data: Data) -> str:
    """Return a one-line description of the training data: source, sample count, sample shape and class names."""
    classes = (
        f"{count(data.num_classes, 'class')} ({shortened(data.class_names)})" if data.num_classes else "no classes"
    )
    return f"data: {data.source}, {count(len(data), 'sample')} of shape {list(data.shape)}, {classes}"


def quantity(amount: float, unit: str) -> str:
    """Format an amount with an SI prefix, as in "1.23 GFLOP"."""
    for prefix in ("", "k", "M", "G", "T", "P", "E"):
        # A number that rounds to 1,000 is shown in the next larger unit.
        if amount < 999.5:
            return f"{number(float(amount))} {prefix}{unit}"
        amount /= 1000
    return f"{number(float(amount))} Z{unit}"


def gibibytes(num_bytes: float) -> str:
    """Format a number of bytes in GiB ("1.20 GiB") or, below 0.1 GiB, in MiB ("34.5 MiB")."""
    size = num_bytes / 2**30
    return f"{number(size)} GiB" if size >= 0.1 else f"{number(num_bytes / 2**20)} MiB"
