"""Output for people (texts, tables) and for machines (JSON)."""

import json
import re
import sys
from collections.abc import Iterable
from typing import IO, Any, Final, final

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table as RichTable
from rich.text import Text

from halfstep.report.table import Table
from halfstep.runtime.launch import rank
from halfstep.runtime.terminal import printable

PIPE_WIDTH: Final = 160
"""Width of tables, in characters, if the output is not a terminal."""


@final
class Screen(Console):
    """A console that prints on rank 0 only, and ignores markup and control sequences in texts.

    Args:
        json: whether stdout is reserved for a JSON document; texts then go to stderr.
        file: output instead of stdout or stderr.
        is_terminal: whether the output is a terminal; detected if None.
    """

    def __init__(self, json: bool = False, file: IO[str] | None = None, is_terminal: bool | None = None) -> None:
        stream = file or (sys.stderr if json else sys.stdout)
        terminal = stream.isatty() if is_terminal is None else is_terminal
        super().__init__(
            file=file,
            stderr=json,
            width=None if terminal else PIPE_WIDTH,
            quiet=bool(rank()),
            force_terminal=is_terminal,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Remove control characters from texts; rich's own control codes are separate segments."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line, which the terminal wraps."""
        self.print(text, style=style, soft_wrap=True)

    def note(self, text: str, indent: str = "") -> None:
        self.print(Text.assemble(indent, ("note:", "yellow"), f" {text}"), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a view, without trailing spaces if the output is a pipe."""
        if self.is_terminal or self.quiet:
            self.print(renderable)
            return
        with self.capture() as made:
            self.print(renderable)
        self.say(re.sub(r" +$", "", made.get(), flags=re.MULTILINE).rstrip("\n"))


def print_json(value: Any) -> None:
    """Write a JSON document to stdout; raise ValueError if a number is not finite."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(table: Table, title: str, screen: Screen) -> None:
    """Print a table and its notes."""
    shown = RichTable(title=title, title_justify="left")
    for index, heading in enumerate(table.headings):
        shown.add_column(heading, justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*row)
    screen.show(shown)
    for note in table.notes:
        screen.say(note)
