"""Write docs/pages/commands.md from the verbs: python docs/commands.py. A test compares the page with the verbs."""

from pathlib import Path

from halfstep.cli.verbs import EXIT_CODES, VERBS
from halfstep.runs.heartbeat import SILENT_SECONDS

PAGE = Path(__file__).parent / "pages" / "commands.md"

HEAD = """\
# The command line

`halfstep VERB --help` shows a verb's options, examples and exit codes. `halfstep ls` lists the names that
options accept. If you mistype a verb, option or name, the error suggests the nearest one. Every field of a recipe is an
option: `halfstep run digits --help-all` lists them.

<!-- Written by docs/commands.py from src/halfstep/cli/verbs.py. -->
"""

TAIL = f"""\
## Watch a run from another machine

```bash
halfstep status runs/digits --watch
```

This works from any shell or machine that can access the run's folder, and neither locks nor changes the folder. A run
updates `heartbeat.json` in its folder every five seconds, and records the outcome there at the end. `halfstep status`
reads this file, the plan, the log and the manifests. On the run's own machine, it checks whether the process exists.
On another machine, it assumes that the process has ended after {SILENT_SECONDS:.0f} seconds without a heartbeat, so
the clocks of the two machines must roughly agree.

| state | meaning |
|---|---|
| running | a process is training or measuring |
| finished | all stages are trained and measured |
| stopped | the process was stopped or killed, or sends no heartbeat; rerun the command to resume |
| diverged | a loss or a gradient was not finite |
| failed | another error, which the status shows |

The time left is estimated from the remaining updates, weighted by their forward passes, and the speed in the last rows
of the log. After the first measurement, it also includes the time to measure the remaining models.

## For machines

With `--json`, stdout is one JSON document, and progress and tables go to stderr. `run`, `train`, `distill`, `finish`
and `demo` print the run's status at the end, or the plan with `--dry-run`. `study`, `sample`, `evaluate`, `status`,
`ls` and `doctor` also have this option. If the output is not a terminal, progress is printed as one line per stage,
one line per result, and another line at most every ten seconds.

Environment variables: `HALFSTEP_CACHE` sets the cache folder, which can be deleted at any time. `HALFSTEP_TRACEBACK=1`
shows the traceback of an error.
"""


def text() -> str:
    """Return the page."""
    lines = [HEAD, "## Exit codes", "", "| code | meaning |", "|---:|---|"]
    lines += [f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items()]
    lines += ["", "## Verbs", "", "| verb | what it does | exit codes |", "|---|---|---|"]
    lines += [
        f"| [`{verb.name}`](#{verb.name}) | {verb.summary} | {', '.join(map(str, verb.codes))} |"
        for verb in VERBS.values()
    ]
    for verb in VERBS.values():
        lines += ["", f"### {verb.name}", "", f"`halfstep {verb.usage}`: {verb.summary}.", ""]
        lines += [f"* {note}" for note in verb.notes] + ([""] if verb.notes else [])
        lines += ["```bash", *verb.examples, "```"]
    return "\n".join([*lines, "", TAIL])


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
