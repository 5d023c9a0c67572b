"""A table of texts, for the terminal, a Markdown file, a study's JSON and the report."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """Headings, rows and notes; the first column is text, the others are numbers."""

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
        """Return the table from the JSON of its `_asdict`.

        Raises:
            ValueError: if the data is not a table.
        """
        try:
            table = cls(**{name: data[name] for name in cls._fields})
            texts = [*table.headings, *table.notes, *(text for row in table.rows for text in row)]
            if not all(isinstance(text, str) for text in texts) or any(
                len(row) != len(table.headings) for row in table.rows
            ):
                raise TypeError
        except (LookupError, TypeError):
            raise ValueError("it does not contain a table") from None
        return table
