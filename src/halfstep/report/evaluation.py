"""An evaluation to be read: evaluation.md, .csv, and the curve as .svg and .png, from `EvaluationResult` alone.

One table for each protocol, and the protocol beside it: figures of two protocols are never in one row.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from halfstep.report.study_figure import Panel, draw_panels
from halfstep.report.study_figure import Series as Line
from halfstep.runs import EvaluationResult
from halfstep.runs.evaluation import EvaluationTable, Figure, Protocol, Row
from halfstep.runtime.files import write_text


def write_evaluation(result: EvaluationResult, folder: Path) -> list[Path]:
    """Writes evaluation.md and .csv, and .svg and .png if there is a curve; returns their paths."""
    paths = [folder / "evaluation.md", folder / "evaluation.csv"]
    write_text(paths[0], markdown(result))
    write_text(paths[1], comma_separated(result))
    panels = [panel for table in result.tables if (panel := _panel(table, result)) is not None]
    if panels:
        draw_panels(panels, folder / "evaluation")
        paths += [folder / "evaluation.svg", folder / "evaluation.png"]
    return paths


def title_of(table: EvaluationTable) -> str:
    """What a table shows, in some words."""
    if table.protocol.kind == "same_noise":
        return "Against the teacher, from the same noise"
    return f"Against real data, in the features {table.protocol.extractor}"


def headings_of(table: EvaluationTable, result: EvaluationResult) -> list[str]:
    """The headings of a table's columns."""
    shown = [result.metrics[name].label for name in _metrics(table, result)]
    return ["series", "steps", "network calls", *shown, "s per 1,000"]


def cells_of(table: EvaluationTable, result: EvaluationResult) -> Iterator[list[str]]:
    """The cells of a table, row by row, as text."""
    labels = {series.name: series.label for series in result.series}
    names = _metrics(table, result)
    for row in table.rows:
        gamma = "" if row.gamma is None else f" (gamma {row.gamma:g})"
        yield [
            labels.get(row.series, row.series) + gamma,
            _text(row.num_steps),
            _text(row.num_evals),
            *(_figure(row.figures.get(name)) for name in names),
            "-" if row.seconds_per_1000 is None else f"{row.seconds_per_1000:.3g}",
        ]


def protocol_words(protocol: Protocol) -> str:
    """How the figures of a table were made, in one paragraph."""
    sets = (
        f"{len(protocol.seeds)} {'set' if len(protocol.seeds) == 1 else 'sets'} of seeds ({', '.join(protocol.seeds)})"
    )
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


def markdown(result: EvaluationResult) -> str:
    """The tables, their protocols and the notices."""
    lines = [f"# Evaluation of {result.subject}", ""]
    if not result.complete:
        lines += ["It was cut, or still runs: what is there.", ""]
    for table in result.tables:
        headings = headings_of(table, result)
        lines += [f"## {title_of(table)}", ""]
        lines += ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
        lines += ["| " + " | ".join(cells) + " |" for cells in cells_of(table, result)]
        lines += ["", protocol_words(table.protocol), ""]
        if table.halves is not None:
            shown = ", ".join(
                f"{result.metrics[name].label} {value:.4g}"
                for name, value in table.halves.figures.items()
                if name in result.metrics
            )
            lines += [
                f"Two disjoint halves of the real data, {table.halves.num_each:,} samples each: {shown}. They are "
                "fewer than the samples above, so their Frechet distance is biased upwards more.",
                "",
            ]
    if result.notices:
        lines += ["## To be read with care", "", *(f"* {notice}" for notice in result.notices), ""]
    return "\n".join(lines)


COLUMNS = (
    "kind", "extractor", "reference", "reference_split", "reference_fingerprint", "num_reference", "resize", "images",
    "num_samples", "seeds", "guidance_scale", "precision", "series", "stage", "num_steps", "num_evals", "gamma",
    "seconds_per_1000", "metric", "mean", "spread", "values",
)  # fmt: skip
"""Of evaluation.csv: one line for each figure, with its protocol."""


def comma_separated(result: EvaluationResult) -> str:
    """One line for each figure."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for table in result.tables:
        protocol = table.protocol.model_dump(exclude={"extractor_facts", "reference_rows"})
        protocol["seeds"] = " ".join(table.protocol.seeds)
        for row in table.rows:
            for name, figure in row.figures.items():
                values = " ".join(map(repr, figure.values))
                said = {"metric": name, "mean": figure.mean, "spread": figure.spread, "values": values}
                writer.writerow(protocol | row.model_dump(exclude={"figures"}) | said)
    return out.getvalue()


def _metrics(table: EvaluationTable, result: EvaluationResult) -> list[str]:
    return [name for name in result.metrics if any(name in row.figures for row in table.rows)]


def _text(value: int | None) -> str:
    return "-" if value is None else str(value)


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return "-"
    return f"{figure.mean:.4g}" + ("" if figure.spread is None else f" ± {figure.spread:.2g}")


def _panel(table: EvaluationTable, result: EvaluationResult) -> Panel | None:
    """The curve of the table's first metric that is a distance; None for rows without steps."""
    name = "frechet" if table.protocol.kind == "sets" else "rmse"
    lines = []
    for number, series in enumerate(result.series):
        rows: list[Row] = sorted(
            (row for row in table.rows if row.series == series.name and row.num_steps and name in row.figures),
            key=lambda row: row.num_steps or 0,
        )
        if rows:
            figures = [row.figures[name] for row in rows]
            error = [figure.spread or 0.0 for figure in figures]
            lines.append(
                Line(
                    series.label,
                    [float(row.num_steps or 0) for row in rows],
                    [figure.mean for figure in figures],
                    error if any(error) else None,
                    colour=number,
                )
            )
    if not lines or any(y <= 0 for line in lines for y in line.y):
        return None
    return Panel(title_of(table), "sampler steps", result.metrics[name].label, lines)
