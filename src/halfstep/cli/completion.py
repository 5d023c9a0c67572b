"""`halfstep completion`: prints shell completion scripts, which shtab generates from the verbs' parsers.

tyro can also generate completion scripts, but they would start Python on every key press.
"""

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import shtab
import tyro

from halfstep.cli.usage import parse, parser_of
from halfstep.cli.verbs import VERBS, Verb


@dataclass
class CompletionArguments:
    """Print a script that completes verbs, options, choices and files. Regenerate it after updating halfstep."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish", "tcsh"]]
    """Shell that will run the script."""


def completion(argv: Sequence[str]) -> None:
    arguments = parse(CompletionArguments, argv, "halfstep completion")
    print(shtab.complete(command_line(), arguments.shell))


def arguments_of(verb: Verb) -> Any:
    """Return the dataclass that defines a verb's arguments."""
    return getattr(import_module(f"halfstep.cli.{verb.module}"), f"{verb.name.title()}Arguments")


def command_line() -> ArgumentParser:
    """Return one argparse parser for all verbs. A verb that takes a recipe gets the options of every recipe."""
    line = ArgumentParser("halfstep")
    line.add_argument("--version", "-V", action="store_true", help="print the version")
    verbs = line.add_subparsers()
    verbs.add_parser("help", help="show the options of a verb").add_argument("verb", choices=list(VERBS))
    for name, verb in VERBS.items():
        options = verbs.add_parser(name, help=verb.summary, add_help=False)
        known: set[str] = set()
        for parser in _parsers_of(name, arguments_of(verb)):
            # argparse's `parents` argument rejects parsers whose groups share an option.
            for action in parser._actions:
                if known.isdisjoint(action.option_strings):
                    # Defaults differ between recipes.
                    action.help = (action.help or "").partition(" (default:")[0]
                    # Users select None by omitting the option.
                    action.choices = None if action.choices is None else [c for c in action.choices if c != "None"]
                    options._add_action(action)
                    known.update(action.option_strings)
    return line


def _parsers_of(verb: str, kind: Any) -> list[ArgumentParser]:
    """Return the verb's parsers: one per recipe if the verb takes a recipe, otherwise a single one."""
    from halfstep.cli.training import SHORT, SHORT_OF_FINISH, PlanArguments
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
