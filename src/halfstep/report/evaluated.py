"""What `halfstep evaluate` found, as the page shows it: a curve and a table for each protocol, never two in one."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from markupsafe import Markup

from halfstep.report import figures
from halfstep.report.words import duration, flatten, number
from halfstep.runs import EvaluationResult, is_finite
from halfstep.runs.evaluation import EvaluationTable, Figure, MetricInfo, Row, Series

FIRST = ("frechet", "rmse")
"""The metrics whose curve is drawn; the first of a table's others where it has neither."""


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown."""

    value: float | None
    text: str


@dataclass(frozen=True)
class ShownRow:
    """One series at one number of steps."""

    label: str
    role: str
    steps: str
    evals: str
    cells: Sequence[Cell]


@dataclass(frozen=True)
class ShownTable:
    """One protocol."""

    heading: str
    metrics: Sequence[MetricInfo]
    rows: Sequence[ShownRow]
    real: Sequence[Cell]
    """The real data against itself, for each metric and then a dash for the time; empty where that is not known."""
    num_each: int
    figure: Markup | None
    figure_alt: str
    protocol: Mapping[str, str]


@dataclass(frozen=True)
class ShownEvaluation:
    """The section of the page."""

    tables: Sequence[ShownTable]
    notices: Sequence[str]
    complete: bool
    seconds: str


def shown_evaluation(evaluation: EvaluationResult | None) -> ShownEvaluation | None:
    """The section; None without an evaluation, or where it holds no row yet."""
    if evaluation is None:
        return None
    tables = [_table(f"evaluation{i}", table, evaluation) for i, table in enumerate(evaluation.tables) if table.rows]
    if not tables:
        return None
    return ShownEvaluation(tables, evaluation.notices, evaluation.complete, duration(evaluation.seconds))


def _table(name: str, table: EvaluationTable, evaluation: EvaluationResult) -> ShownTable:
    names = [metric for metric in evaluation.metrics if any(metric in row.figures for row in table.rows)]
    series = {line.name: line for line in evaluation.series}
    rows = [
        ShownRow(
            label=(series[row.series].label if row.series in series else row.series) + _searched(row),
            role=series[row.series].role if row.series in series else "other",
            steps="–" if row.num_steps is None else f"{row.num_steps:,}",
            evals="–" if row.num_evals is None else f"{row.num_evals:,}",
            cells=[*(_cell(row.figures.get(metric)) for metric in names), _plain(row.seconds_per_1000)],
        )
        for row in table.rows
    ]
    drawn = next((metric for metric in FIRST if metric in names), names[0] if names else None)
    label = evaluation.metrics[drawn].label if drawn else ""
    return ShownTable(
        heading=_heading(table),
        metrics=[evaluation.metrics[metric] for metric in names],
        rows=rows,
        real=[_plain(table.halves.figures.get(metric)) for metric in names] if table.halves is not None else (),
        num_each=table.halves.num_each if table.halves is not None else 0,
        figure=_figure(name, table, series, drawn, evaluation.metrics[drawn]) if drawn else None,
        figure_alt=f"Line chart: {label} against the number of sampler steps; the table below holds its figures"
        f"{_left_out({row.series for row in table.rows}, series)}.",
        protocol=flatten(table.protocol.model_dump(mode="json")),
    )


def _left_out(shown: Set[str], series: Mapping[str, Series]) -> str:
    """What is said of series for which the chart has no colour: it has one for a student, a teacher, and a few more."""
    roles = {series[name].role for name in shown if name in series}
    more = len(shown) - len(roles & {"student", "teacher"}) - len(figures.OTHERS)
    return f", and {more} more series that have no place in the chart" if more > 0 else ""


def _searched(row: Row) -> str:
    """The variance that was found best for this row; empty where none was searched for."""
    return "" if row.gamma is None else f", gamma {row.gamma:g}"


def _heading(table: EvaluationTable) -> str:
    if table.protocol.kind == "same_noise":
        return f"Against {table.protocol.reference}"
    return f"Against the data, in {table.protocol.extractor} features"


def _cell(figure: Figure | None) -> Cell:
    if figure is None:
        return Cell(None, "–")
    spread = "" if figure.spread is None else f" ± {number(figure.spread)}"
    return Cell(figure.mean, number(figure.mean) + spread)


def _plain(value: float | None) -> Cell:
    return Cell(value, number(value))


def _figure(
    name: str, table: EvaluationTable, series: Mapping[str, Series], metric: str, info: MetricInfo
) -> Markup | None:
    lines: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.num_steps is not None and metric in row.figures:
            lines.setdefault(row.series, []).append(row)
    curves = {
        line: _curve(series[line].label if line in series else line, rows, metric) for line, rows in lines.items()
    }
    roles = {line: series[line].role if line in series else "other" for line in lines}
    student = next((line for line, role in roles.items() if role == "student"), None)
    teacher = next((line for line, role in roles.items() if role == "teacher"), None)
    others = [curve for line, curve in curves.items() if line not in (student, teacher)]
    return figures.steps_figure(
        name,
        curves[teacher] if teacher else None,
        curves[student] if student else None,
        others,
        None,
        f"{info.label} ({info.better} is better)",
    )


def _curve(label: str, rows: Sequence[Row], metric: str) -> figures.Curve:
    """What of a series a logarithmic axis can show."""
    points = sorted(
        (row.num_steps, row.figures[metric].mean, row.figures[metric].spread or 0.0)
        for row in rows
        if row.num_steps and is_finite(row.figures[metric].mean) and row.figures[metric].mean > 0
    )
    spreads = [spread if is_finite(spread) else 0.0 for _, _, spread in points]
    return figures.Curve(label, [x for x, _, _ in points], [y for _, y, _ in points], spreads if any(spreads) else ())
