"""Rows and figures about the stages of the chain: training, time, and each student's distance from its teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.quality import Group, has_same_pace
from halfstep.report.reading import LogPoint, RunFacts, StageFacts
from halfstep.report.summary import Summary
from halfstep.report.words import count, duration, number
from halfstep.runs import PlannedStage, finite, is_finite


@dataclass(frozen=True)
class StageRow:
    """One stage, which may be incomplete."""

    name: str
    label: str
    """The label: the number of steps for a student, the role for any other stage, or "?" if neither is known."""
    status: str
    """The status: complete, damaged, not started, or the number of updates done."""
    stage: StageFacts | None
    """The facts about the stage, or None for an incomplete stage."""
    log: Sequence[LogPoint]
    num_updates: int
    learning_rate: float | None
    """Maximum learning rate in the log."""
    to_teacher: float | None
    """Root mean square difference between the kept samples of the student and its teacher, drawn from the same noise,
    each with its own number of steps. Equals `to_first` if the teacher is the first model."""
    to_first: float | None
    """Root mean square difference from the first model of the chain, as stored in metrics.json."""
    num_compared: int
    """Number of kept samples from which `to_teacher` is computed, or 0 if it is read from metrics.json."""


def stage_rows(facts: RunFacts) -> list[StageRow]:
    """Return the stages in the plan, the folder and the log, in order."""
    stages = {stage.name: stage for stage in facts.stages}
    planned = {row.name: row for row in facts.plan}
    rows = []
    for name in dict.fromkeys([*planned, *sorted({*stages, *facts.log, *facts.damaged})]):
        stage, log = stages.get(name), facts.log.get(name, ())
        plan = planned.get(name, PlannedStage(name))
        source, role = (stage.manifest, stage.role) if stage else (plan, plan.role)
        if stage:
            status = "complete"
        elif name in facts.damaged:
            status = "damaged"
        elif log:
            total = f" of {source.num_updates:,}" if source.num_updates else ""
            status = f"{log[-1].update:,}{total} updates done"
        else:
            status = "not started"
        to_teacher, to_first, num_compared = _distances(stage, stages, facts.start)
        rows.append(
            StageRow(
                name=name,
                label=role or "?" if source.num_steps is None else str(source.num_steps),
                status=status,
                stage=stage,
                log=log,
                num_updates=source.num_updates,
                learning_rate=max((p.learning_rate for p in log if p.learning_rate is not None), default=None),
                to_teacher=to_teacher,
                to_first=to_first,
                num_compared=num_compared,
            )
        )
    return rows


def _distances(
    stage: StageFacts | None, stages: Mapping[str, StageFacts], first: StageFacts | None
) -> tuple[float | None, float | None, int]:
    """Return `to_teacher`, `to_first` and `num_compared` of a stage."""
    if stage is None or stage is first or stage.role != "student" or (steps := stage.manifest.num_steps) is None:
        return None, None, 0
    measured = stage.metrics.results if stage.metrics is not None else ()
    to_first = next((finite(one.teacher_rmse) for one in measured if one.num_steps == steps), None)
    teacher = stages.get(stage.manifest.teacher or "")
    # An undistilled teacher may have no samples from the sampler that its student was trained with.
    if teacher is None or teacher.manifest.num_steps is None:
        return to_first, to_first, 0
    own = stage.samples.get(steps)
    to_teacher = _rmse(own, teacher.samples.get(teacher.manifest.num_steps))
    return to_teacher, to_first, 0 if own is None or to_teacher is None else len(own)


def _rmse(a: np.ndarray | None, b: np.ndarray | None) -> float | None:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return None
    scale = 127.5 if a.dtype == np.uint8 else 1.0
    return finite(float(np.sqrt(np.mean(np.square((a.astype(np.float64) - b.astype(np.float64)) / scale)))))


def progress(rows: Sequence[StageRow]) -> str | None:
    """Return a sentence about an unfinished run, or None for a finished run."""
    missing = [row for row in rows if row.status not in ("complete", "damaged")]
    if not missing:
        return None
    done = sum(row.status == "complete" for row in rows)
    names = ", ".join(row.name if row.status == "not started" else f"{row.name} ({row.status})" for row in missing)
    return f"This run is not finished: it has completed {done} of {count(len(rows), 'stage')}. Missing: {names}."


def loss_figure(rows: Sequence[StageRow]) -> Markup | None:
    """Draw the loss and the learning rate of all stages, or return None if there are no losses."""
    stages = []
    for row in rows:
        length = max([row.num_updates, *(point.update for point in row.log)])
        losses = [(point.update, point.loss) for point in row.log if point.loss > 0]
        rates = [(p.update, p.learning_rate) for p in row.log if p.learning_rate is not None and p.learning_rate >= 0]
        if length > 0:
            curves = [figures.Curve.through(row.label, points) for points in (losses, rates)]
            stages.append((curves[0], curves[1], float(length)))
    return figures.chain_figure("chain", stages)


def distance_figure(rows: Sequence[StageRow]) -> Markup | None:
    """Draw the students' distances against their numbers of steps, or return None if no distance is above 0."""
    students = [row for row in rows if row.to_teacher is not None or row.to_first is not None]

    def curve(label: str, distances: Sequence[float | None]) -> figures.Curve:
        # If several students have the same number of steps, the last one is drawn.
        last = {int(row.label): value for row, value in zip(students, distances, strict=True)}
        return figures.Curve.through(label, sorted((steps, value) for steps, value in last.items() if value))

    return figures.steps_figure(
        "distance",
        "RMSE, same noise",
        curve("from the first model", [row.to_first for row in students]),
        curve("from its own teacher", [row.to_teacher for row in students]),
        x_label="sampler steps",
    )


# --- Cost ---

SECTIONS: Final = (
    ("Teacher", "teacher", ("teacher",)),
    ("Matching", "matched", ("matching",)),
    ("Students", "student", ("chain", "finish")),
)
"""For each kind of stage, the heading, the role, and the recipe sections that contain the hyperparameters."""


def cost(facts: RunFacts, groups: Sequence[Group], summary: Summary) -> tuple[list[tuple[str, str]], str | None]:
    """Return the costs as (name, text) pairs, along with a sentence on when training the students pays off."""
    pairs = []
    given = {row.name for row in facts.plan if row.num_updates == 0}
    given |= {stage.name for stage in facts.stages if stage.manifest.num_updates == 0}
    if facts.start is not None and facts.start_name in given:
        what = "Teacher" if facts.start.role == "teacher" else "Start of the chain"
        pairs.append((what, "given, not trained here"))
    for what, role, sections in SECTIONS:
        stages = [stage for stage in facts.stages if stage.role == role and stage.name not in given]
        if not stages:
            continue
        updates = sum(stage.manifest.num_updates for stage in stages)
        seconds = sum(stage.manifest.seconds for stage in stages)
        text = f"{duration(seconds)}, {count(updates, 'update')}"
        if (batch := _batch_size(facts.recipe, sections)) is not None:
            text += f" of {count(batch, 'sample')}"
        if len(stages) > 1:
            text += f", {count(len(stages), 'stage')}"
        pairs.append((what, text))
    network = next((s for s in reversed(facts.stages) if s.num_parameters is not None), None)
    if network is not None:
        kind = network.manifest.network.get("type", "network")
        pairs.append(("Network", f"{kind}, {network.num_parameters:,} parameters in {network.name}"))
    hardware = [str(facts.environment[name]) for name in ("device", "platform") if facts.environment.get(name)]
    for name, user, noun in (("cpu_count", "", "CPU core"), ("threads", "torch on ", "thread")):
        value = facts.environment.get(name)
        if isinstance(value, int) and value > 0:
            hardware.append(user + count(value, noun))
    if hardware:
        pairs.append(("Hardware", ", ".join(hardware)))
    if isinstance(facts.environment.get("started"), str):
        pairs.append(("Started", facts.environment["started"]))
    return pairs, _paid(facts, groups, summary)


def _batch_size(recipe: Mapping[str, Any], sections: Sequence[str]) -> int | None:
    """Return the batch size that these sections share, or None if it is unknown or if the sections differ."""
    sizes = []
    for settings in map(recipe.get, sections):
        # A finish without steps does no training.
        if isinstance(settings, Mapping) and settings.get("steps", True):
            training = settings.get("training", settings)
            sizes.append(training.get("batch_size") if isinstance(training, Mapping) else None)
    size = sizes[0] if sizes and all(size == sizes[0] for size in sizes) else None
    return size if isinstance(size, int) and size > 0 else None


def _paid(facts: RunFacts, groups: Sequence[Group], summary: Summary) -> str | None:
    """Return a sentence that states the number of samples after which the summary's student pays off."""
    group = next((group for group in groups if group.best is not None), None)
    if group is None or group.best is None or summary.best is None:
        return None
    names = [stage.name for stage in facts.others]
    for stage_name, student in group.students:
        if student.num_steps != summary.best.steps:
            continue
        if not has_same_pace(student, group.best):
            return None
        trained = sum(stage.manifest.seconds for stage in facts.others[: names.index(stage_name) + 1])
        saved = ((group.best.seconds_per_1000 or 0.0) - student.seconds_per_1000) / 1000
        if not (is_finite(saved) and saved > 0 and is_finite(trained)):
            return None
        return (
            f"Training the chain down to {count(student.num_steps, 'step')} took {duration(trained)} and saves "
            f"{number(saved * 1000)} s per 1,000 samples compared with the teacher at its best ({group.best_words}): "
            f"it pays off after about {float(f'{trained / saved:.2g}'):,.0f} samples."
        )
    return None
