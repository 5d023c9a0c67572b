"""`halfstep completion`: shell completion scripts, which shtab generates from the verbs' parsers.

The scripts that tyro generates would start Python at every key press.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import shtab
import tyro

from halfstep.cli.usage import parse, parser_of
from halfstep.cli.verbs import VERBS


@dataclass
class CompletionArguments:
    """Print a shell completion script for verbs, options, their choices and files. Regenerate it after updating
    halfstep.
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish", "tcsh"]]
    """The shell."""


def completion(argv: Sequence[str]) -> None:
    """Print the script."""
    arguments = parse(CompletionArguments, argv, "halfstep completion")
    print(shtab.complete(command_line(), arguments.shell))


def argument_kinds() -> dict[str, type]:
    """Return the dataclass of each verb's arguments."""
    from halfstep.cli import arguments, doctor, exploring, exporting, importing, status, studying

    return {
        "run": arguments.RunArguments,
        "train": arguments.RunArguments,
        "distill": arguments.DistillArguments,
        "finish": arguments.FinishArguments,
        "study": studying.StudyArguments,
        "demo": arguments.RunArguments,
        "sample": arguments.SampleArguments,
        "evaluate": arguments.EvaluateArguments,
        "report": arguments.ReportArguments,
        "explore": exploring.ExploreArguments,
        "export": exporting.ExportArguments,
        "import": importing.ImportArguments,
        "encode": exporting.EncodeArguments,
        "status": status.StatusArguments,
        "ls": arguments.ListArguments,
        "doctor": doctor.DoctorArguments,
        "completion": CompletionArguments,
    }


def command_line() -> ArgumentParser:
    """Return all verbs as one argparse parser; a verb that takes a recipe has the options of every recipe."""
    line = ArgumentParser("halfstep")
    line.add_argument("--version", "-V", action="store_true", help="print the version")
    verbs = line.add_subparsers()
    verbs.add_parser("help", help="show the options of a verb").add_argument("verb", choices=list(VERBS))
    for name, kind in argument_kinds().items():
        verb = verbs.add_parser(name, help=VERBS[name].summary, add_help=False)
        known: set[str] = set()
        for parser in _parsers_of(name, kind):
            # argparse can merge parsers with `parents`, but rejects parsers that share an option in a group.
            for action in parser._actions:
                if known.isdisjoint(action.option_strings):
                    # The default in the help text is that of one recipe only.
                    action.help = (action.help or "").partition(" (default:")[0]
                    # Omitting the option selects None.
                    action.choices = None if action.choices is None else [c for c in action.choices if c != "None"]
                    verb._add_action(action)
                    known.update(action.option_strings)
    return line


def _parsers_of(verb: str, kind: Any) -> list[ArgumentParser]:
    """Return the parsers of a verb: one, or one for each recipe if the verb takes a recipe."""
    from halfstep.cli.arguments import SHORT, SHORT_OF_FINISH, PlanArguments
    from halfstep.recipes import recipes

    if not issubclass(kind, PlanArguments):
        return [parser_of(kind)]
    more = ArgumentParser(add_help=False)
    more.add_argument("--help-all", action="store_true", help="show every option")
    if verb == "distill":
        more.add_argument("model").complete = shtab.FILE  # type: ignore[attr-defined]
    elif verb == "finish":
        more.add_argument("run").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    elif verb != "demo":
        more.add_argument("recipe", choices=list(recipes))
    for short, field in (SHORT_OF_FINISH if verb == "finish" else SHORT).items():
        more.add_argument(short, help=f"short for {field}")
    return [more, *(parser_of(kind, kind(make())) for make in recipes.values())]
