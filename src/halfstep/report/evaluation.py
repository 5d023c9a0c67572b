"""Present an `EvaluationResult` as evaluation.md, .csv, .svg and .png, and as a section of the report.

Results from different protocols are not comparable, so each protocol has its own table and a description.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.figures import Curve
from halfstep.report.quality import are_earlier
from halfstep.report.study_figure import Panel, draw_panels
from halfstep.report.table import Table
from halfstep.report.words import count, flat_words, method_words, number, with_spread
from halfstep.runs import Best, EvaluationResult, finite, is_finite, teacher_best, too_few
from halfstep.runs.evaluation import EvaluationTable, MetricInfo, Protocol, Series
from halfstep.runtime.files import write_text

DRAWN = ("frechet", "rmse")
"""Metrics to draw, in order of preference. If a table has neither of them, its first metric is drawn."""


def metrics_of(table: EvaluationTable, result: EvaluationResult) -> list[str]:
    """Return the names of the table's metrics in display order."""
    return [name for name in result.metrics if any(name in row.figures for row in table.rows)]


def is_too_few(table: EvaluationTable) -> bool:
    """Return whether there are too few samples for a reliable Frechet distance."""
    protocol = table.protocol
    dimension = finite(protocol.extractor_facts.get("dimension"))
    return dimension is not None and too_few(protocol.num_samples, protocol.num_reference, int(dimension))


def cells_of(table: EvaluationTable, series: Iterable[Series]) -> list[Best]:
    """Return the table's cells for these series, limited to cells with a Frechet distance."""
    samplers = {one.name: one.sampler for one in series}
    cells = []
    for row in table.rows:
        means, sampler = {name: figure.mean for name, figure in row.figures.items()}, samplers.get(row.series)
        if "frechet" in means and sampler is not None and row.num_steps is not None and row.num_evals is not None:
            shares = (means.get("coverage"), means.get("kid"))
            cells.append(Best(sampler, row.num_steps, row.num_evals, means["frechet"], row.seconds_per_1000, *shares))
    return cells


def best_of_table(table: EvaluationTable, result: EvaluationResult) -> Best | None:
    """Return the teacher's best cell in a table, or None if the table contains no Frechet distance for the teacher."""
    teachers = [series for series in result.series if series.role == "teacher"]
    return teacher_best(cells_of(table, teachers), is_too_few(table))


def ratio_base(table: EvaluationTable, result: EvaluationResult) -> Best | None:
    """Return the teacher's best cell, to which the table's ratios of Frechet distances refer, or None if there are no
    ratios.
    """
    return None if is_too_few(table) else best_of_table(table, result)


def earlier_rows(table: EvaluationTable) -> list[bool]:
    """Return, for each row, whether a later stage of its series has the same number of steps."""
    return are_earlier([(row.series, row.num_steps, row.gamma) for row in table.rows])


def title_of(table: EvaluationTable) -> str:
    """Return a table's heading."""
    if table.protocol.kind == "same_noise":
        return "Against the teacher, from the same noise"
    return f"Against real data, in the features {table.protocol.extractor}"


Cell = tuple[str, float | None]
"""The text of a cell, and its measured value if it has one."""


def rows_of(table: EvaluationTable, result: EvaluationResult) -> list[list[Cell]]:
    """Return the cells of a table.

    A row's label consists of its series, its gamma if gamma was tuned, and its stage if a later stage has the same
    number of steps.
    """
    names, best = metrics_of(table, result), ratio_base(table, result)
    labels = {series.name: series.label for series in result.series}
    rows = []
    for row, is_earlier in zip(table.rows, earlier_rows(table), strict=True):
        label = labels.get(row.series, row.series)
        label += ("" if row.gamma is None else f", gamma {row.gamma:g}") + (f", {row.stage}" if is_earlier else "")
        cells: list[Cell] = [(label, None), (number(row.num_steps), None), (number(row.num_evals), None)]
        if best is not None:
            frechet = row.figures.get("frechet")
            ratio = None if frechet is None else best.ratio(frechet.mean)
            cells.append(("–" if ratio is None else f"{ratio:.2f}", ratio))
        for figure in (row.figures.get(name) for name in names):
            cells.append(("–", None) if figure is None else (with_spread(figure.mean, figure.spread), figure.mean))
        rows.append([*cells, (number(row.seconds_per_1000), row.seconds_per_1000)])
    return rows


def text_table(table: EvaluationTable, result: EvaluationResult) -> Table:
    """Return the table as text."""
    best = ratio_base(table, result)
    rows = [[text for text, _ in row] for row in rows_of(table, result)]
    headings = ["series", "steps", "network calls", *([] if best is None else ["ratio"])]
    headings += [*(result.metrics[name].label for name in metrics_of(table, result)), "s per 1,000"]
    if best is None:
        return Table(headings, rows)
    return Table(
        headings,
        rows,
        [f"The ratio is the Frechet distance relative to the teacher's best, {method_words(*best[:3])}."],
    )


def protocol_words(protocol: Protocol) -> str:
    """Return a paragraph that describes how a table was measured."""
    sets = f"{count(len(protocol.seeds), 'set')} of seeds ({', '.join(protocol.seeds)})"
    guidance = "" if protocol.guidance_scale is None else f", guidance scale {protocol.guidance_scale:g}"
    bf16 = "" if protocol.precision == "float32" else f", sampled in {protocol.precision}"
    counts = f"{protocol.num_samples:,} samples in each of {sets}, {protocol.images}{guidance}{bf16}"
    if protocol.kind == "same_noise":
        return f"Protocol: {counts}, against {protocol.reference}."
    split = "" if protocol.reference_split is None else f", split {protocol.reference_split}"
    facts = "".join(f"; {name.replace('_', ' ')} {value}" for name, value in protocol.extractor_facts.items())
    return (
        f"Protocol: extractor {protocol.extractor}{facts}; resize: {protocol.resize}. {counts}, against "
        f"{protocol.num_reference:,} samples of {protocol.reference}{split} ({protocol.reference_rows}; content "
        f"{protocol.reference_fingerprint[:12]})."
    )


def curves_of(table: EvaluationTable, result: EvaluationResult, metric: str) -> list[tuple[Series, Curve]]:
    """Return, for each series, the curve of a metric against network calls, without points that a log scale cannot
    show.
    """
    curves = []
    for place, series in enumerate(result.series):
        points = sorted(
            (float(row.num_evals), figure.mean, finite(figure.spread) or 0.0)
            for row, is_earlier in zip(table.rows, earlier_rows(table), strict=True)
            if row.series == series.name and row.num_evals and (figure := row.figures.get(metric)) is not None
            if not is_earlier and is_finite(figure.mean) and figure.mean > 0
        )
        if points:
            curves.append((series, Curve.through(series.label, points, place)))
    return curves


# --- Files ---


def write_evaluation(result: EvaluationResult, folder: Path) -> list[Path]:
    """Write evaluation.md and .csv, plus .svg and .png if there is a curve to draw; return the paths."""
    texts = {folder / "evaluation.md": markdown(result), folder / "evaluation.csv": comma_separated(result)}
    for path, text in texts.items():
        write_text(path, text)
    paths, panels = list(texts), []
    for table in result.tables:
        metric = "frechet" if table.protocol.kind == "sets" else "rmse"
        if curves := [curve for _, curve in curves_of(table, result, metric)]:
            panels.append(Panel(title_of(table), "network calls", result.metrics[metric].label, curves))
    if panels:
        draw_panels(panels, folder / "evaluation")
        paths += [folder / "evaluation.svg", folder / "evaluation.png"]
    return paths


def markdown(result: EvaluationResult) -> str:
    """Return the tables, their protocols and the notices in Markdown."""
    lines = [f"# Evaluation of {result.subject}", ""]
    if not result.complete:
        lines += ["The evaluation was interrupted or is still running; these are the results so far.", ""]
    for table in result.tables:
        lines += [f"## {title_of(table)}", "", text_table(table, result).markdown(), protocol_words(table.protocol), ""]
        if table.halves is not None:
            shown = ", ".join(
                f"{result.metrics[name].label} {number(value)}"
                for name, value in table.halves.figures.items()
                if name in result.metrics
            )
            lines += [
                f"For two disjoint halves of the real data, with {table.halves.num_each:,} samples each: {shown}. "
                "Frechet distances are biased upwards, more so with fewer samples.",
                "",
            ]
    if result.notices:
        lines += ["## Notices", "", *(f"* {notice}" for notice in result.notices), ""]
    return "\n".join(lines)


COLUMNS = (
    "kind", "extractor", "reference", "reference_split", "reference_fingerprint", "num_reference", "resize", "images",
    "num_samples", "seeds", "guidance_scale", "precision", "series", "stage", "num_steps", "num_evals", "gamma",
    "seconds_per_1000", "metric", "mean", "spread", "values",
)  # fmt: skip
"""Columns of evaluation.csv."""


def comma_separated(result: EvaluationResult) -> str:
    """Return the CSV text, with a line for each metric of each row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    gammas = {series.name: series.gamma for series in result.series}
    for table in result.tables:
        protocol = table.protocol.model_dump(exclude={"extractor_facts", "reference_rows"})
        protocol["seeds"] = " ".join(table.protocol.seeds)
        for row in table.rows:
            gamma = gammas.get(row.series) if row.gamma is None else row.gamma
            for name, figure in row.figures.items():
                values = " ".join(map(repr, figure.values))
                said = {"metric": name, "mean": figure.mean, "spread": figure.spread, "values": values}
                writer.writerow(protocol | row.model_dump(exclude={"figures"}) | {"gamma": gamma} | said)
    return out.getvalue()


# --- The page's section ---


class Shown(NamedTuple):
    """A table as shown in the report."""

    table: EvaluationTable
    heading: str
    metrics: Mapping[str, MetricInfo]
    roles: Sequence[str]
    """The role of each row's series."""
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str]
    """Notes on the ratios, or empty if the table has no ratios."""
    figure: Markup | None
    figure_alt: str
    protocol: Mapping[str, str]


def shown_tables(result: EvaluationResult | None) -> list[Shown]:
    """Return the tables that have rows."""
    if result is None:
        return []
    known = {series.name: series.role for series in result.series}
    shown = []
    for index, table in enumerate(table for table in result.tables if table.rows):
        figure, alt = _figure(f"evaluation{index}", table, result)
        metrics = {name: result.metrics[name] for name in metrics_of(table, result)}
        roles = [known.get(row.series, "other") for row in table.rows]
        rows, notes = rows_of(table, result), text_table(table, result).notes
        protocol = flat_words(table.protocol.model_dump(mode="json"))
        shown.append(Shown(table, title_of(table), metrics, roles, rows, notes, figure, alt, protocol))
    return shown


def _figure(name: str, table: EvaluationTable, result: EvaluationResult) -> tuple[Markup | None, str]:
    """Return the chart and its description, including the number of series omitted for lack of colours."""
    names = metrics_of(table, result)
    if not names:
        return None, ""
    metric = next((one for one in DRAWN if one in names), names[0])
    info, curves = result.metrics[metric], curves_of(table, result, metric)
    teacher, student = (
        next((curve for series, curve in curves if series.role == role), None) for role in ("teacher", "student")
    )
    others = [curve for _, curve in curves if curve not in (teacher, student)]
    more = len(others) - len(figures.OTHERS)
    rest = f", and {more} more series that are not in the chart" if more > 0 else ""
    text = f"Line chart: {info.label} against the number of network calls; the table below contains its values{rest}."
    best = best_of_table(table, result) if metric == "frechet" else None
    label, level = f"{info.label} ({info.better} is better)", None if best is None else best.frechet
    return figures.steps_figure(name, label, teacher, student, others, level), text
