"""The page of a run: the facts turned into sentences, tables, pictures and figures, and those into one file.

Ratios are taken between figures of one protocol only. The teacher at 64 steps (or at its most, if it was not
measured there) is the measure of quality, the teacher at its most steps that of time.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.reading import RunFacts, StageFacts, is_finite, read_run
from halfstep.runs import RunFolder
from halfstep.runs.files import write_text
from halfstep.runs.schema import Result

REFERENCE_STEPS = 64
"""Steps of the teacher whose quality is called 1."""
KEPT = 1.5
"""Quality counts as kept up to this multiple of the teacher's Frechet distance."""
NUM_SEEDS = 8
"""Rows of the strip."""
NUM_WALKED = 20
"""Seeds behind the slider, for small images."""
NOT_BEGUN = "not begun"
WALKED_COLUMNS = 5
MOST_PIXELS = 100_000
"""Pixels of one picture behind the slider."""


def write_report(run: Path) -> Path:
    """RUN/report/index.html, one file that needs nothing else; its path.

    The same run folder gives the same bytes.

    Raises:
        ValueError: if the folder holds no stage that is complete and can be read.
    """
    path = RunFolder(run).report_path
    write_text(path, page(read_run(run)))
    return path


def page(facts: RunFacts) -> str:
    """The HTML of a report."""
    here = files("halfstep.report")
    script = here.joinpath("walk.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "duration": duration, "times": times}
    template = environment.from_string(here.joinpath("template.html.j2").read_text(encoding="utf-8"))
    groups = _groups(facts)
    summary = _summary(facts, groups)
    rows = _stage_rows(facts)
    return template.render(
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
        title=_text(facts.recipe.get("name")) or facts.name,
        facts=facts,
        summary=summary,
        progress=_progress(facts, rows),
        notices=[*facts.notices, *_protocol_notices(groups)],
        gallery=_gallery(facts, groups, summary),
        groups=groups,
        guidance=next((s.manifest.guidance_words() for s in reversed(facts.students) if s.manifest.guidance), None),
        stages=rows,
        losses=_losses(facts, rows),
        recipe=flatten(facts.recipe),
        environment=flatten({k: v for k, v in facts.environment.items() if k != "command"}),
        command=_text(facts.environment.get("command")),
        kept=KEPT,
    )


# --- Words and numbers ---


def number(value: float | None) -> str:
    """Three significant digits, or a dash for nothing."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def times(value: float) -> str:
    """A factor as one says it: "61", "6.3", "1.21"."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 2 else f"{value:.2f}"


def duration(seconds: float) -> str:
    """A time in the two largest of its units."""
    if not math.isfinite(seconds) or seconds < 0:
        return "not known"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {int(seconds % 60)} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def count(num: int, noun: str) -> str:
    """ "1 step", "4 steps"."""
    return f"{num:,} {noun}" + ("" if num == 1 else "s")


def flatten(data: Mapping[Any, Any], prefix: str = "") -> dict[str, str]:
    """Nested data as dotted names and texts."""
    flat: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _ratio(value: float | None, base: float | None) -> float | None:
    if value is None or base is None or not (is_finite(value) and is_finite(base) and base > 0):
        return None
    return value / base


# --- Figures ---


@dataclass(frozen=True)
class Row:
    """One number of steps, with one student or none."""

    steps: int
    sampler: str
    teacher: Result | None
    student: Result | None
    student_stage: str | None
    ratio: float | None
    """The student's Frechet distance over the reference's."""
    speed_up: float | None
    """Of the student, or of the teacher where there is no student, against the teacher at its most steps."""

    @property
    def measured(self) -> Result:
        """Whose network calls and time the row gives."""
        found = self.student or self.teacher
        assert found is not None
        return found


@dataclass(frozen=True)
class Group:
    """Figures of one protocol."""

    protocol: Mapping[str, str]
    rows: Sequence[Row]
    most: Result | None
    """The teacher at its most steps."""
    reference: Result | None
    stages: Sequence[str]
    samplers: Sequence[str]
    figure: Markup | None


def _groups(facts: RunFacts) -> list[Group]:
    by_protocol: dict[str, list[StageFacts]] = {}
    for stage in facts.stages:
        if stage.metrics is not None and stage.metrics.results:
            by_protocol.setdefault(json.dumps(stage.metrics.protocol, sort_keys=True), []).append(stage)
    return [_group(f"quality{index}", stages) for index, stages in enumerate(by_protocol.values())]


def _results(stage: StageFacts) -> Sequence[Result]:
    return stage.metrics.results if stage.metrics is not None else ()


def _group(name: str, stages: Sequence[StageFacts]) -> Group:
    teacher = {(r.num_steps, r.sampler): r for stage in stages if stage.is_teacher for r in _results(stage)}
    students = [(stage.name, r) for stage in stages if not stage.is_teacher for r in _results(stage)]
    most = max(teacher.values(), key=lambda r: r.num_steps, default=None)
    reference = next((r for r in teacher.values() if r.num_steps == REFERENCE_STEPS), most)
    rows = []
    for steps, sampler in sorted({*teacher, *((r.num_steps, r.sampler) for _, r in students)}, reverse=True):
        alone = teacher.get((steps, sampler))
        here: list[tuple[str | None, Result | None]] = [
            *((s, r) for s, r in students if (r.num_steps, r.sampler) == (steps, sampler))
        ]
        for stage_name, student in here or [(None, None)]:
            measured = student or alone
            rows.append(
                Row(
                    steps=steps,
                    sampler=sampler,
                    teacher=alone,
                    student=student,
                    student_stage=stage_name,
                    ratio=_ratio(student.frechet if student else None, reference.frechet if reference else None),
                    speed_up=_ratio(
                        most.seconds_per_1000 if most else None,
                        measured.seconds_per_1000 if measured else None,
                    ),
                )
            )
    figure = figures.quality_figure(
        name,
        _curve("the teacher, not distilled", list(teacher.values())),
        _curve("students, each at its own steps", [r for _, r in students]),
        _curve(f"the teacher at {count(reference.num_steps, 'step')}", [reference]) if reference else None,
    )
    return Group(
        protocol=flatten(next(stage.metrics.protocol for stage in stages if stage.metrics is not None)),
        rows=rows,
        most=most,
        reference=reference,
        stages=[stage.name for stage in stages],
        samplers=sorted({row.sampler for row in rows}),
        figure=figure,
    )


def _curve(label: str, results: Sequence[Result]) -> figures.Curve | None:
    """What of the results a logarithmic axis can show."""
    points = sorted(
        (r.num_steps, r.frechet) for r in results if r.num_steps > 0 and is_finite(r.frechet) and r.frechet > 0
    )
    return figures.Curve(label, [x for x, _ in points], [y for _, y in points]) if points else None


def _protocol_notices(groups: Sequence[Group]) -> list[str]:
    if len(groups) < 2:
        return []
    names = sorted({name for group in groups for name in group.protocol})
    differing = [name for name in names if len({group.protocol.get(name) for group in groups}) > 1]
    return [
        f"Not all stages were measured under the same protocol (different: {', '.join(differing)}). Figures "
        "of different protocols cannot be compared, so each protocol has its own table and figure."
    ]


# --- The first screen ---


@dataclass(frozen=True)
class Summary:
    """The outcome in a sentence or two, and in a few large figures."""

    lead: str
    more: str | None
    tiles: Sequence[tuple[str, str]]
    """Figure, and what it is."""
    best: Row | None
    """The student that the sentence is about."""


def _summary(facts: RunFacts, groups: Sequence[Group]) -> Summary:
    group = next((g for g in groups if g.reference is not None), None)
    rated = [(row, row.ratio) for row in (group.rows if group else ()) if row.ratio is not None]
    tiles = [(duration(sum(stage.manifest.seconds for stage in facts.students)), "training time of all students")]
    if group is None or group.most is None or group.reference is None or not rated:
        return Summary(_unrated(facts), None, tiles if facts.students else [], None)
    kept = [pair for pair in rated if pair[1] <= KEPT]
    best, _ = min(kept, key=lambda pair: pair[0].steps) if kept else min(rated, key=lambda p: (p[1], p[0].steps))
    fewest, _ = min(rated, key=lambda pair: pair[0].steps)
    lead = (
        f"{count(best.steps, 'step').capitalize()} instead of {group.most.num_steps:,}: "
        f"{_said(best)} the teacher’s at {count(group.reference.num_steps, 'step')}."
    )
    more = None
    if fewest is not best:
        more = f"Down to {count(fewest.steps, 'step')}: {_said(fewest)} the teacher’s."
    tiles = [
        (f"{group.most.num_steps:,} → {best.steps:,}", "sampler steps"),
        *([(f"{times(best.speed_up)}×", "faster per sample")] if best.speed_up is not None else []),
        (
            f"{times(best.ratio or 0)}×",
            f"the teacher’s Fréchet distance (at {count(group.reference.num_steps, 'step')})",
        ),
        *tiles,
    ]
    return Summary(lead, more, tiles, best)


def _said(row: Row) -> str:
    speed = ""
    if row.speed_up is not None:
        how = "times faster" if row.speed_up >= 1.05 else "times as fast"
        speed = f"{times(row.speed_up)} {how} per sample, "
    return f"{speed}Fréchet distance {times(row.ratio or 0)} times"


def _unrated(facts: RunFacts) -> str:
    """The sentence where teacher and students cannot be compared."""
    steps = sorted({s.manifest.num_steps for s in facts.students if s.manifest.num_steps is not None}, reverse=True)
    if not facts.students:
        return f"A teacher, trained in {duration(facts.stages[0].manifest.seconds)}; no student is complete yet."
    what = count(len(facts.students), "student")
    if steps:
        what += f" of {steps[0]:,} down to {steps[-1]:,} steps" if steps[1:] else f" of {count(steps[0], 'step')}"
    return f"{what}; there are no figures of teacher and students that could be compared."


def _progress(facts: RunFacts, rows: Sequence["StageRow"]) -> str | None:
    """The sentence about a run that is not at its end."""
    missing = [row for row in rows if not row.complete and not row.damaged]
    if not missing:
        return None
    done = sum(row.complete for row in rows)
    text = f"This run is not at its end: {done} of {count(len(rows), 'stage')} complete. Missing: "
    return text + ", ".join(f"{r.name} ({r.status})" if r.status != NOT_BEGUN else r.name for r in missing) + "."


# --- Pictures ---


@dataclass(frozen=True)
class Picture:
    """What a model makes of the seeds at one number of steps."""

    who: str
    """"student" or "teacher"."""
    alt: str
    image: Markup
    """An <img> or <svg> of ours."""
    frechet: float | None


@dataclass(frozen=True)
class Walked:
    """One place of the slider."""

    steps: int
    student: Picture | None
    teacher: Picture | None


@dataclass(frozen=True)
class Gallery:
    """The same noise through every model."""

    kind: str
    """"images", "points", or why there is no picture."""
    steps: Sequence[int] = ()
    students: Sequence[Picture | None] = ()
    """For each of `steps`, with the teacher above the first student's steps; empty if there is no student."""
    teachers: Sequence[Picture | None] = ()
    num_seeds: int = 0
    row_height: int = 0
    """Pixels from one seed to the next."""
    width: int = 0
    """Pixels of a picture of the strip."""
    walk: Sequence[Walked] = ()
    walk_start: int = 0
    reduced_from: str | None = None


def _gallery(facts: RunFacts, groups: Sequence[Group], summary: Summary) -> Gallery | None:
    """The pictures, None if no stage has samples."""
    teacher = dict(facts.teacher.samples) if facts.teacher else {}
    students: dict[int, np.ndarray] = {}
    for stage in facts.students:
        students |= stage.samples
    arrays = [array for _, array in sorted(teacher.items(), reverse=True)] + list(students.values())
    if not arrays:
        return None
    if {array.shape[1:] for array in arrays} != {arrays[0].shape[1:]}:
        return Gallery("The stages hold samples of different shapes, so they are not shown side by side.")
    if not (all(map(figures.is_images, arrays)) or all(map(figures.is_points, arrays))):
        shape = " × ".join(str(size) for size in arrays[0].shape[1:])
        return Gallery(f"There is no picture for this modality: samples of shape {shape}, {arrays[0].dtype}.")
    images = figures.is_images(arrays[0])
    fewest = min(len(array) for array in arrays)
    num_seeds = min(NUM_SEEDS, fewest)
    measured = _measured(groups)
    box = (0.0, 0.0, 1.0) if images else figures.limits(arrays)

    def picture(who: str, steps: int, chosen: np.ndarray | None, columns: int) -> Picture | None:
        if chosen is None:
            return None
        result = measured.get((steps, who))
        model = "the student" if who == "student" else "the teacher, not distilled,"
        if images:
            data, width, height = figures.png_grid(chosen, columns)
            order = "from top to bottom" if columns == 1 else "row by row"
            alt = f"Seeds 0 to {len(chosen) - 1}, {order}: samples of {model} at {count(steps, 'step')}"
            source = f"data:image/png;base64,{data}"
            image = Markup('<img src="{}" width="{}" height="{}" alt="{}">').format(source, width, height, alt)
        else:
            shown = min(len(chosen), figures.MOST_POINTS)
            alt = f"Scatter plot of {shown} samples of {model} at {count(steps, 'step')}"
            image = Markup('<span role="img" aria-label="{}">{}</span>').format(
                alt, figures.scatter(chosen, box, num_seeds)
            )
        return Picture(who, alt, image, result.frechet if result else None)

    steps = sorted(teacher.keys() | students.keys(), reverse=True)
    walked = fewest
    if images:
        walked = max(
            min(num_seeds, fewest),
            min(NUM_WALKED, fewest, MOST_PIXELS // math.prod(figures.tile_size(arrays[0]))),
        )
    strip = num_seeds if images else fewest
    alone = [picture("teacher", n, _head(teacher.get(n), strip), 1) for n in steps]
    made = [
        picture("student", n, _head(students.get(n), strip), 1) or (shown if n > max(students, default=0) else None)
        for n, shown in zip(steps, alone, strict=True)
    ]
    walk = [
        Walked(
            n,
            picture("student", n, _head(students.get(n), walked), WALKED_COLUMNS),
            picture("teacher", n, _head(teacher.get(n), walked), WALKED_COLUMNS),
        )
        for n in steps
    ]
    start = summary.best.steps if summary.best and summary.best.steps in steps else min(students, default=steps[0])
    height, width = figures.tile_size(arrays[0]) if images else (0, 88)
    size = arrays[0].shape[1:3]
    return Gallery(
        kind="images" if images else "points",
        steps=steps,
        students=made if students else (),
        teachers=alone,
        num_seeds=num_seeds,
        row_height=height + figures.GAP,
        width=width,
        walk=walk if len(walk) > 1 else (),
        walk_start=steps.index(start),
        reduced_from=f"{size[1]} × {size[0]}" if images and max(size) > figures.LARGEST_TILE else None,
    )


def _measured(groups: Sequence[Group]) -> dict[tuple[int, str], Result]:
    """The figures to put below a picture, by its steps and "student" or "teacher"."""
    rows = [row for group in groups for row in group.rows]
    pairs = [(row.steps, "student", row.student) for row in rows] + [
        (row.steps, "teacher", row.teacher) for row in rows
    ]
    return {(steps, who): result for steps, who, result in pairs if result is not None}


def _head(array: np.ndarray | None, length: int) -> np.ndarray | None:
    return None if array is None else array[:length]


# --- Training ---


@dataclass(frozen=True)
class StageRow:
    """One stage, complete or not."""

    name: str
    label: str
    """ "teacher", the student's steps, or the stage's number."""
    status: str
    complete: bool
    damaged: bool
    objective: str | None
    num_updates: int
    seconds: float | None
    share: float
    """Of the longest stage's time, 0 to 1."""
    last_loss: float | None
    samples_per_second: float | None


def _stage_rows(facts: RunFacts) -> list[StageRow]:
    stages = {stage.name: stage for stage in facts.stages}
    planned = {row.name: row for row in facts.plan}
    longest = max((stage.manifest.seconds for stage in facts.stages), default=0.0)
    rows = []
    for name in sorted({*stages, *planned, *facts.log, *facts.damaged}):
        stage, plan, log = stages.get(name), planned.get(name), facts.log.get(name, ())
        num_updates = stage.manifest.num_updates if stage else plan.num_updates if plan else 0
        steps = stage.manifest.num_steps if stage else plan.num_steps if plan else None
        number_ = name.partition("-")[0]
        teacher = number_.strip("0") == ""
        if stage:
            status = "complete"
        elif name in facts.damaged:
            status = "damaged"
        elif log:
            status = f"{log[-1].update:,}" + (f" of {num_updates:,}" if num_updates else "") + " updates done"
        else:
            status = NOT_BEGUN
        seconds = stage.manifest.seconds if stage and is_finite(stage.manifest.seconds) else None
        share = _ratio(seconds, longest) or 0.0
        rows.append(
            StageRow(
                name=name,
                label="teacher" if teacher else number_ if steps is None else str(steps),
                status=status,
                complete=stage is not None,
                damaged=name in facts.damaged,
                objective=stage.manifest.objective if stage else None,
                num_updates=num_updates,
                seconds=seconds,
                share=min(1.0, max(0.0, share)),
                last_loss=log[-1].loss if log else None,
                samples_per_second=log[-1].samples_per_second if log else None,
            )
        )
    return rows


def _losses(facts: RunFacts, rows: Sequence[StageRow]) -> Markup | None:
    curves = []
    for row in rows:
        log = facts.log.get(row.name, ())
        shown = [point for point in log if point.loss > 0]
        length = max([row.num_updates, *(point.update for point in log)])
        if length > 0:
            label = row.label if row.label == "teacher" or row.label.isdecimal() else "?"
            curve = figures.Curve(label, [point.update for point in shown], [point.loss for point in shown])
            curves.append((curve, float(length)))
    return figures.loss_figure("losses", curves)
