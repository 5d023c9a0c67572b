"""Write a run's report: text, tables, images and figures in a single HTML file."""

import base64
import functools
import hashlib
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from halfstep.report.chain import cost, distance_figure, loss_figure, progress, stage_rows
from halfstep.report.evaluation import shown_tables
from halfstep.report.figures import data_url
from halfstep.report.gallery import Sizes, gallery
from halfstep.report.nearest import shown_nearest
from halfstep.report.quality import protocol_notices, quality_groups
from halfstep.report.reading import RunFacts, read_run
from halfstep.report.summary import summarise
from halfstep.report.words import count, duration, flat_words, number, times
from halfstep.runs import RunFolder
from halfstep.runtime.files import write_text

MOST_BYTES = 7_500_000
"""Maximum size of a page in bytes, which limits the number and the size of its images."""


def write_report(run: Path, studies: Path | None = None, without_nearest: str | None = None) -> Path:
    """Write RUN/report/index.html and return its path. The same run folder always produces the same file.

    Args:
        studies: folder of studies to show, or None for RUN/studies.
        without_nearest: the reason why the nearest training samples are missing.

    Raises:
        ValueError: if the folder contains neither a readable stage nor the log of a stage in training.
    """
    path = RunFolder(run).report_path
    write_text(path, page(read_run(run, studies), without_nearest))
    return path


def headline(facts: RunFacts) -> tuple[str, int] | None:
    """Return the stage and the number of steps that represent the run.

    This is the best student or, if no student is rated, the last stage with samples.
    """
    best = summarise(facts, quality_groups(facts.stages, facts.start)).best
    if best is not None:
        for stage in reversed(facts.students):
            if stage.manifest.num_steps == best.steps and best.steps in stage.samples:
                return stage.name, best.steps
    last = next((stage for stage in reversed(facts.stages) if stage.samples), None)
    if last is None:
        return None
    own = last.manifest.num_steps
    return last.name, own if own is not None and own in last.samples else max(last.samples)


def page(facts: RunFacts, without_nearest: str | None = None) -> str:
    """Return the HTML of a report, with fewer images if it would otherwise exceed `MOST_BYTES`."""
    sizes = Sizes()
    while len(html := _page(facts, without_nearest, sizes)) > MOST_BYTES and (smaller := sizes.smaller()) is not None:
        sizes = smaller
    return html


@functools.cache
def _template() -> Template:
    """Return the page's template, compiled only once, together with the templates that it includes."""
    environment = Environment(
        loader=PackageLoader("halfstep.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in (number, duration, times, count)}
    return environment.get_template("page.html.j2")


def _page(facts: RunFacts, without_nearest: str | None, sizes: Sizes) -> str:
    script = files("halfstep.report").joinpath("walk.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    groups = quality_groups(facts.stages, facts.start)
    summary = summarise(facts, groups)
    rows = stage_rows(facts)
    tables = shown_tables(facts.evaluation)
    spent, paid = cost(facts, groups, summary)
    return _template().render(
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
        facts=facts,
        summary=summary,
        progress=progress(rows),
        notices=[*facts.notices, *protocol_notices(groups)],
        gallery=gallery(facts, summary, sizes, next((group.best for group in groups), None)),
        groups=groups,
        tables=tables,
        guidance=next((s.manifest.guidance_words() for s in reversed(facts.others) if s.manifest.guidance), None),
        stages=rows,
        losses=loss_figure(rows),
        distances=distance_figure(rows),
        data_url=data_url,
        nearest=shown_nearest(facts.nearest),
        without_nearest=without_nearest,
        cost=spent,
        paid=paid,
        recipe=flat_words(facts.recipe),
        environment=flat_words({k: v for k, v in facts.environment.items() if k != "command"}),
    )
