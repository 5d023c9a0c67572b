"""Writes docs/pages/commands.md from the verbs: python docs/commands.py. A test holds the page to them."""

from pathlib import Path

from halfstep.cli.verbs import EXIT_CODES, VERBS
from halfstep.runs.heartbeat import SILENT_SECONDS

PAGE = Path(__file__).parent / "pages" / "commands.md"

HEAD = """\
# The command line

`halfstep VERB --help` shows all options of a verb, its examples and its exit codes; `halfstep ls` what options can
name. A mistyped verb, option or name is refused with the one that is near. Any field of a recipe is an option:
`halfstep run digits --help`.

<!-- Written by docs/commands.py from src/halfstep/cli/verbs.py. -->
"""

TAIL = f"""\
## A run that is watched from elsewhere

A run writes `heartbeat.json` into its folder every five seconds, and how it ended. `halfstep status RUN` reads that,
the plan, the log and the manifests, from any shell or any machine that sees the folder; it locks and changes nothing.
A process on the same machine is looked for; one on another counts as gone after {SILENT_SECONDS:.0f} seconds without
a sign of life, so the clocks of the two must agree about as well. States:

| state | means |
|---|---|
| running | a process is at work |
| finished | all stages are trained and measured |
| stopped | by a signal, killed, or without a sign of life; the same command goes on |
| diverged | a loss or a gradient was not finite |
| failed | by another error, which is told |

Time left is training time: updates that are left, weighed by the forward passes of each, at the pace of the last rows
of the log. Measuring the models comes on top.

## For machines

With `--json` stdout is one JSON document, and progress and tables go to stderr. `run`, `train`, `distill` and `demo`
print the run's status at its end, or the plan with `--dry-run`; `study`, `sample`, `evaluate`, `status`, `ls` and
`doctor` have it too. Where the output is no terminal, progress is a line for each stage and figure, and one every ten
seconds.

Other variables: `HALFSTEP_CACHE` is the folder for what can be made again, `HALFSTEP_TRACEBACK=1` shows where an
error came from.
"""


def text() -> str:
    """The page."""
    lines = [HEAD, "## Exit codes", "", "| code | means |", "|---:|---|"]
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
