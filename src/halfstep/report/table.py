"""A table of strings for the terminal, Markdown, a study's JSON and the report."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError


class Table(NamedTuple):
    """Headings, rows and notes. The first column contains text, and the others contain numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the table in Markdown, with its notes below."""
        lines = [
            "| " + " | ".join(self.headings) + " |",
            "|---" + "|---:" * (len(self.headings) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    @classmethod
    def from_json(cls, data: Any) -> "Table":
        """Restore a table from its `_asdict` in JSON.

        Raises:
            ValueError: if the data is not a table.
        """
        with contextlib.suppress(ValidationError):
            table = TypeAdapter(cls).validate_python(data)
            if all(len(row) == len(table.headings) for row in table.rows):
                return table
        raise ValueError("it does not contain a table")
