"""The chain, stage by stage: what was trained, how long it took, and how far each student is from its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.quality import Group
from halfstep.report.reading import RunFacts, StageFacts
from halfstep.report.summary import Summary
from halfstep.report.words import count, duration, number, ratio
from halfstep.runs import is_finite

NOT_BEGUN = "not begun"


@dataclass(frozen=True)
class StageRow:
    """One stage, complete or not."""

    name: str
    label: str
    """The role, a student's steps, or "?" if neither is known."""
    status: str
    complete: bool
    damaged: bool
    objective: str | None
    num_updates: int
    seconds: float | None
    share: float
    """Of the longest stage's time, 0 to 1."""
    first_loss: float | None
    last_loss: float | None
    learning_rate: float | None
    """The highest that the log holds."""
    samples_per_second: float | None
    to_parent: float | None
    """Root mean square difference from its teacher's samples of the same seeds, each at its own steps."""
    to_first: float | None
    """The same from the model where the chain starts."""
    num_compared: int
    """Samples behind these two; 0 for none."""


def stage_rows(facts: RunFacts) -> list[StageRow]:
    """All stages that the plan, the folder or the log names, in order."""
    stages = {stage.name: stage for stage in facts.stages}
    planned = {row.name: row for row in facts.plan}
    longest = max((stage.manifest.seconds for stage in facts.stages), default=0.0)
    rows = []
    for name in dict.fromkeys([*planned, *sorted({*stages, *facts.log, *facts.damaged})]):
        stage, plan, log = stages.get(name), planned.get(name), facts.log.get(name, ())
        num_updates = stage.manifest.num_updates if stage else plan.num_updates if plan else 0
        steps = stage.manifest.num_steps if stage else plan.num_steps if plan else None
        role = stage.role if stage else plan.role if plan else None
        if stage:
            status = "complete"
        elif name in facts.damaged:
            status = "damaged"
        elif log:
            status = f"{log[-1].update:,}" + (f" of {num_updates:,}" if num_updates else "") + " updates done"
        else:
            status = NOT_BEGUN
        seconds = stage.manifest.seconds if stage and is_finite(stage.manifest.seconds) else None
        share = ratio(seconds, longest) or 0.0
        to_parent, to_first, num_compared = _distances(stage, stages, facts.start)
        rows.append(
            StageRow(
                name=name,
                label=role or "?" if steps is None else str(steps),
                status=status,
                complete=stage is not None,
                damaged=name in facts.damaged,
                objective=stage.manifest.objective if stage else None,
                num_updates=num_updates,
                seconds=seconds,
                share=min(1.0, max(0.0, share)),
                first_loss=log[0].loss if log else None,
                last_loss=log[-1].loss if log else None,
                learning_rate=max((p.learning_rate for p in log if p.learning_rate is not None), default=None),
                samples_per_second=log[-1].samples_per_second if log else None,
                to_parent=to_parent,
                to_first=to_first,
                num_compared=num_compared,
            )
        )
    return rows


def _distances(
    stage: StageFacts | None, stages: Mapping[str, StageFacts], first: StageFacts | None
) -> tuple[float | None, float | None, int]:
    """The distances of a student's samples to its teacher's and to the first one's, and how many were compared."""
    if stage is None or stage is first or stage.role != "student" or stage.manifest.num_steps is None:
        return None, None, 0
    own = stage.samples.get(stage.manifest.num_steps)
    parent = stages.get(stage.manifest.parent or "")
    found = []
    for teacher in (parent, first):
        start = None if teacher is None else teacher.manifest.num_steps or stage.manifest.start_steps
        theirs = None if teacher is None or start is None else teacher.samples.get(start)
        found.append(_rmse(own, theirs))
    return found[0], found[1], 0 if own is None or found == [None, None] else len(own)


def _rmse(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return None
    scale = 127.5 if a.dtype == np.uint8 else 1.0
    value = float(np.sqrt(np.mean(np.square((a.astype(np.float64) - b.astype(np.float64)) / scale))))
    return value if is_finite(value) else None


def progress(rows: Sequence[StageRow]) -> str | None:
    """The sentence about a run that is not at its end; None for one that is."""
    missing = [row for row in rows if not row.complete and not row.damaged]
    if not missing:
        return None
    done = sum(row.complete for row in rows)
    text = f"This run is not at its end: {done} of {count(len(rows), 'stage')} complete. Missing: "
    return text + ", ".join(f"{r.name} ({r.status})" if r.status != NOT_BEGUN else r.name for r in missing) + "."


def loss_figure(facts: RunFacts, rows: Sequence[StageRow]) -> Markup | None:
    """Loss and learning rate of all stages, None if none has a loss that can be drawn."""
    stages = []
    for row in rows:
        log = facts.log.get(row.name, ())
        length = max([row.num_updates, *(point.update for point in log)])
        if length <= 0:
            continue
        losses = [(point.update, point.loss) for point in log if point.loss > 0]
        rates = [(p.update, p.learning_rate) for p in log if p.learning_rate is not None and p.learning_rate >= 0]
        stages.append(
            (figures.Curve.through(row.label, losses), figures.Curve.through(row.label, rates), float(length))
        )
    return figures.chain_figure("chain", stages)


def distance_figure(rows: Sequence[StageRow]) -> Markup | None:
    """The students' distances against their steps; None if there is none above 0."""
    students = [row for row in rows if row.complete and row.label.isdecimal()]

    def curve(label: str, name: str) -> figures.Curve | None:
        points = sorted((int(row.label), value) for row in students if (value := getattr(row, name)))
        return figures.Curve.through(label, points) if points else None

    return figures.steps_figure(
        "distance",
        curve("from the start of the chain", "to_first"),
        curve("from its own teacher", "to_parent"),
        (),
        None,
        "RMSE, same noise",
    )


# --- What it cost ---

SECTIONS: Final = (
    ("Teacher", "teacher", "teacher"),
    ("Matching", "matched", "matching"),
    ("Students", "student", "chain"),
)
"""What is trained, its role, and the section of the recipe that holds its hyperparameters."""


def cost(facts: RunFacts, groups: Sequence[Group], summary: Summary) -> tuple[list[tuple[str, str]], str | None]:
    """What was spent, as names and texts, and the sentence about when the students have paid for themselves."""
    pairs = []
    given = {row.name for row in facts.plan if row.num_updates == 0}
    given |= {stage.name for stage in facts.stages if stage.manifest.num_updates == 0}
    if facts.start is not None and facts.start_name in given:
        what = "Teacher" if facts.start.role == "teacher" else "Start of the chain"
        pairs.append((what, "given, not trained here"))
    for what, role, section in SECTIONS:
        stages = [stage for stage in facts.stages if stage.role == role and stage.name not in given]
        if not stages:
            continue
        updates = sum(stage.manifest.num_updates for stage in stages)
        seconds = sum(stage.manifest.seconds for stage in stages)
        text = f"{duration(seconds)}, {count(updates, 'update')}"
        batch = _batch_size(facts.recipe, section)
        if batch is not None:
            text += f" of {count(batch, 'sample')}"
        if len(stages) > 1:
            text += f", {count(len(stages), 'stage')}"
        pairs.append((what, text))
    network = next((s for s in reversed(facts.stages) if s.num_parameters is not None), None)
    if network is not None:
        kind = network.manifest.network.get("type", "network")
        pairs.append(("Network", f"{kind}, {network.num_parameters:,} parameters in {network.name}"))
    hardware = [str(facts.environment[name]) for name in ("device", "platform") if facts.environment.get(name)]
    for name, noun in (("cpu_count", "CPU core"), ("threads", "thread of torch")):
        value = facts.environment.get(name)
        if isinstance(value, int) and value > 0:
            hardware.append(count(value, noun) if noun != "thread of torch" else f"torch on {count(value, 'thread')}")
    if hardware:
        pairs.append(("Hardware", ", ".join(hardware)))
    if isinstance(facts.environment.get("started"), str):
        pairs.append(("Begun", facts.environment["started"]))
    return pairs, _paid(facts, groups, summary)


def _batch_size(recipe: Mapping[str, Any], section: str) -> int | None:
    part = recipe.get(section)
    size = part.get("batch_size") if isinstance(part, Mapping) else None
    return size if isinstance(size, int) and size > 0 else None


def _paid(facts: RunFacts, groups: Sequence[Group], summary: Summary) -> str | None:
    """After how many samples the training of the summary's student has been won back."""
    group = next((g for g in groups if g.most is not None), None)
    if group is None or group.most is None or summary.best is None:
        return None
    row = next(
        (r for r in group.rows if r.student is not None and not r.is_matched and r.steps == summary.best.steps), None
    )
    if row is None or row.student is None or row.student_stage is None:
        return None
    names = [stage.name for stage in facts.others]
    trained = sum(stage.manifest.seconds for stage in facts.others[: names.index(row.student_stage) + 1])
    saved = (group.most.seconds_per_1000 - row.student.seconds_per_1000) / 1000
    if not (is_finite(saved) and saved > 0 and is_finite(trained)):
        return None
    return (
        f"Training the chain down to {count(row.steps, 'step')} took {duration(trained)} and saves "
        f"{number(saved * 1000)} s per 1,000 samples against the teacher at {count(group.most.num_steps, 'step')}: "
        f"it is won back after about {float(f'{trained / saved:.2g}'):,.0f} samples."
    )
