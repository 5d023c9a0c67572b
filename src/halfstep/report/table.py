"""A table of texts, as the terminal, a Markdown file, a study's JSON and the report show it."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Headings and rows, with what a reader must know to read them; the first column is text, the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Return the table in Markdown, then its notes."""
        lines = [
            "| " + " | ".join(self.headings) + " |",
            "|---" + "|---:" * (len(self.headings) - 1) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    @classmethod
    def from_json(cls, data: Any) -> "Table":
        """Return the table that `_asdict` made JSON of.

        Raises:
            ValueError: if it is none.
        """
        try:
            table = cls(**{name: data[name] for name in cls._fields})
            texts = [*table.headings, *table.notes, *(text for row in table.rows for text in row)]
            if not all(isinstance(text, str) for text in texts) or any(
                len(row) != len(table.headings) for row in table.rows
            ):
                raise TypeError
        except (LookupError, TypeError):
            raise ValueError("it does not hold a table") from None
        return table
