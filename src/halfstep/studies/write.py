"""The end of a study: its table as Markdown and JSON, its figure as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path

from halfstep.report.study_figure import draw_panels
from halfstep.runtime.files import write_text
from halfstep.studies.base import Row, Study, studies
from halfstep.studies.scales import Scale


def write_study(study: Study, scale: Scale, rows: Sequence[Row], out: Path) -> Path:
    """Writes table.md, figure.png and figure.svg beside the study's study.json; returns the table's path."""
    folder = out / studies.name_of(study)
    table = study.table(rows, scale)
    head = f"# {study.title}\n\n{study.question}\n\n![{study.title}](figure.svg)\n\n"
    write_text(folder / "table.md", head + table.markdown())
    draw_panels(study.panels(rows, scale), folder / "figure")
    return folder / "table.md"
