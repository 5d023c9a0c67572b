"""Write docs/pages/reproductions.md and its figures from the studies' JSON in docs/results/studies/.

To publish a study, run it (`halfstep study table1 --scale smoke`), copy its study.json to
docs/results/studies/table1-smoke.json, describe its findings and their limits in docs/reproductions/table1.md, and run
`python docs/reproductions.py`. The numbers in tables and figures come only from the JSON, so they always agree with it.
"""

import argparse
import json
from collections.abc import Sequence
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

Each of the paper's tables and figures is a study: a resumable set of runs, summarised in a table and a figure. The
scales `small` and `paper` are larger than `smoke`. `docs/reproductions.py` generates this page from the studies' JSON
(`docs/results/studies/`); only the comparisons with the paper are written by hand. The last study,
`roads`, is not from the paper: it compares distillation methods.

Where the paper's values are known, they are shown next to ours. They are FIDs with Inception features on CIFAR-10 or
ImageNet. Ours are distances in the features of a small classifier, on other data. Compare rankings and ratios, not
absolute values. A value is only attributed to the paper if a source confirms it.

Run so far: {run}. Not run yet (`small` and `paper` need a GPU): {missing}.
"""


def head(name: str) -> list[str]:
    """Return the first lines of a study's section: title, question and comment."""
    study = studies[name]()
    comment = (DOCS / "reproductions" / f"{name}.md").read_text(encoding="utf-8").strip()
    return [f"## {study.title}", "", f"*{study.question}*", "", comment, ""]


def section(name: str, held: dict[str, Any], notes: Sequence[str], figure: str) -> str:
    """Return a study's section of the page, with these notes below its table."""
    study = studies[name]()
    environment = held["environment"]
    return "\n".join(
        [
            *head(name),
            f"![{study.title}: our results, and the paper's where they are known]({figure})",
            "",
            Table.from_json(held["table"])._replace(notes=notes).markdown(),
            f"Command: `halfstep study {name} --scale {held['scale']['name']}`, {spent(held['seconds'])} on "
            f"{environment['cpu_count']} CPU cores ({environment['device']}), "
            "not counting the results that this study shares with others; torch "
            f"{environment['versions']['torch']}, commit {environment['git_commit'] or 'unknown'}, "
            f"{environment['started'][:10]}.",
            "",
        ]
    )


def spent(seconds: float) -> str:
    """Return a duration in minutes, or in seconds if it is short."""
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def page(figures: Path) -> str:
    """Return the whole page, and write its figures to `figures`."""
    parts, run, missing = [], [], []
    for name in ORDER:
        for scale_name, scale in SCALES.items():
            file = DOCS / "results" / "studies" / f"{name}-{scale_name}.json"
            if not file.is_file():
                missing.append(f"{name} ({scale_name})")
                continue
            held = json.loads(file.read_text(encoding="utf-8"))
            if held["scale"] != scale().as_data(studies[name].uses):
                raise SystemExit(f"{file} was run with different settings of {scale_name}. Rerun the study")
            run.append(f"{name} ({scale_name})")
            figures.mkdir(parents=True, exist_ok=True)
            rows = [Finding(row["axes"], row["figures"]) for row in held["rows"]]
            draw_panels(studies[name]().panels(rows, scale()), figures / f"{name}-{scale_name}")
            (figures / f"{name}-{scale_name}.png").unlink()
            notes = studies[name]().table(rows, scale()).notes
            parts.append(section(name, held, notes, f"studies/{name}-{scale_name}.svg"))
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
