"""Output for people (text and tables) and for machines (JSON)."""

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
"""The width of tables, in characters, for output that is not a terminal."""


@final
class Screen(Console):
    """A console that prints only on rank 0 and ignores markup and control sequences in text.

    Args:
        json: whether stdout is reserved for a JSON document, in which case text goes to stderr.
        file: the file to write to, instead of stdout or stderr.
        is_terminal: whether the output is a terminal, or None to detect it.
    """

    def __init__(self, json: bool = False, file: IO[str] | None = None, is_terminal: bool | None = None) -> None:
        stream = file or (sys.stderr if json else sys.stdout)
        terminal = self.on_terminal = stream.isatty() if is_terminal is None else is_terminal
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
        """Remove control characters from text, but keep rich's own control codes, which are separate segments."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line and let the terminal wrap it."""
        self.print(text, style=style, soft_wrap=True)

    def note(self, text: str, indent: str = "") -> None:
        self.print(Text.assemble(indent, ("note:", "yellow"), f" {text}"), soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """Print a table or a view. If the output is not a terminal, remove trailing spaces."""
        if self.is_terminal or self.quiet:
            self.print(renderable)
            return
        with self.capture() as made:
            self.print(renderable)
        self.say(re.sub(r" +$", "", made.get(), flags=re.MULTILINE).rstrip("\n"))


def print_json(value: Any) -> None:
    """Write a value to stdout as a JSON document; raise ValueError if it contains a non-finite number."""
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
