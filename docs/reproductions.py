"""Writes docs/pages/reproductions.md and its figures from the studies' JSON in docs/results/studies/.

To publish a study: run it (`halfstep study table1 --scale smoke`), copy its study.json to
docs/results/studies/table1-smoke.json, say in docs/reproductions/table1.md what it shows and what it does not, and run
`python docs/reproductions.py`. Tables and figures are made from the JSON alone, so they cannot drift from it.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from halfstep.report.study_figure import draw_panels
from halfstep.studies import SCALES, Finding, Table, studies

DOCS = Path(__file__).parent
ORDER = ("table1", "table2", "steps", "stochastic", "schedules", "integrators", "cost", "roads")
HEAD = """# Reproductions

```bash
halfstep study table1 --scale smoke
```

Each of the paper's tables and figures is a study: a resumable plan of runs that ends in a table and a figure. The
larger scales are `small` and `paper`. This page is generated from the studies' JSON (`docs/results/studies/`) by
`docs/reproductions.py`; only the paragraphs on what a study repeats of the paper are written by hand. The last study,
`roads`, is not the paper's: it compares methods of distillation.

The paper's figures stand beside ours where they are known. They are FID of Inception features on CIFAR-10 or ImageNet;
ours are distances in the features of a small classifier, on other data. Compare orders and ratios, never numbers.
Figures that no source confirms are not shown as the paper's.

Run so far: {run}. Not run yet (`small` and `paper` need a GPU): {missing}.
"""


def head(name: str) -> list[str]:
    """Return the lines with which a study's part of the page opens: title, question and comment."""
    study = studies[name]()
    comment = (DOCS / "reproductions" / f"{name}.md").read_text(encoding="utf-8").strip()
    return [f"## {study.title}", "", f"*{study.question}*", "", comment, ""]


def section(name: str, held: dict[str, Any], figure: str) -> str:
    """A study's part of the page."""
    study = studies[name]()
    environment = held["environment"]
    return "\n".join(
        [
            *head(name),
            f"![{study.title}: ours, and the paper's where they are known]({figure})",
            "",
            Table.from_json(held["table"]).markdown(),
            f"Command: `halfstep study {name} --scale {held['scale']['name']}`, {spent(held['seconds'])} on "
            f"{environment['cpu_count']} CPU cores ({environment['device']}), without what another study of the scale "
            "had trained or measured before; torch "
            f"{environment['versions']['torch']}, commit {environment['git_commit'] or 'unknown'}, "
            f"{environment['started'][:10]}.",
            "",
        ]
    )


def spent(seconds: float) -> str:
    """Minutes, or seconds where they are few."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def page(figures: Path) -> str:
    """The whole page; draws its figures into `figures`."""
    parts, run, missing = [], [], []
    for name in ORDER:
        for scale_name, scale in SCALES.items():
            file = DOCS / "results" / "studies" / f"{name}-{scale_name}.json"
            if not file.is_file():
                missing.append(f"{name} ({scale_name})")
                continue
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["scale"] != scale().as_data(studies[name].uses):
                raise SystemExit(f"{file} was made by other settings of the scale {scale_name}: run the study again")
            run.append(f"{name} ({scale_name})")
            figures.mkdir(parents=True, exist_ok=True)
            rows = [Finding(row["axes"], row["figures"]) for row in held["rows"]]
            draw_panels(studies[name]().panels(rows, scale()), figures / f"{name}-{scale_name}")
            (figures / f"{name}-{scale_name}.png").unlink()
            parts.append(section(name, held, f"studies/{name}-{scale_name}.svg"))
        if not any(one.startswith(f"{name} ") for one in run):
            parts.append("\n".join(head(name)))
    return HEAD.format(run=", ".join(run) or "none", missing=", ".join(missing) or "none") + "\n" + "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS / "pages", help="folder of the page and of studies/")
    out: Path = parser.parse_args().out
    text = page(out / "studies")
    (out / "reproductions.md").write_text(text, encoding="utf-8")
    print(out / "reproductions.md")
