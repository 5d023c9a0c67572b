"""`halfstep ls`: lists the names that recipes and options accept."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import tyro
from rich.table import Table

from halfstep.cli.usage import Switch, parse
from halfstep.cli.words import Screen, print_json
from halfstep.core.noise import processes
from halfstep.core.prediction import predictions, weightings
from halfstep.metrics import extractors
from halfstep.nets import networks
from halfstep.objectives import objectives
from halfstep.recipes import recipes
from halfstep.registry import Registry
from halfstep.samplers import samplers
from halfstep.studies import studies

FAMILIES: Final[Mapping[str, Registry[Any]]] = {
    "recipes": recipes,
    "samplers": samplers,
    "predictions": predictions,
    "weightings": weightings,
    "processes": processes,
    "objectives": objectives,
    "networks": networks,
    "studies": studies,
    "extractors": extractors,
}
"""The families of names that recipes and options accept, each with its registry."""

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = tyro.extras.literal_type_from_choices(FAMILIES)


@dataclass
class LsArguments:
    """List the names that recipes and options accept, grouped by family, with a description of each name."""

    families: tyro.conf.Positional[tuple[FamilyName, ...]] = ()
    """Families to list; by default, all families."""
    json: Switch = False
    """Print one JSON document with the families, their members, and a description of each member."""


def ls(argv: Sequence[str]) -> None:
    arguments = parse(LsArguments, argv, "halfstep ls")
    shown = {
        family: {name: _summary(member) for name, member in FAMILIES[family].items()}
        for family in arguments.families or FAMILIES
    }
    if arguments.json:
        print_json(shown)
        return
    screen = Screen()
    for family, members in shown.items():
        table = Table(title=family, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for member, text in members.items():
            table.add_row(f"  {member}", text)
        screen.show(table)


def _summary(thing: object) -> str:
    """Return the first sentence of a docstring, without its full stop."""
    text = " ".join((thing.__doc__ or "").split())
    # A full stop inside a sentence, as in "i = 1, ..., n" or "e.g. a", is not followed by a capital letter.
    return re.split(r"(?<!\.)\.(?= [A-Z])|(?<!\.)\.$", text)[0]
