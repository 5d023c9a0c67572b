"""README, CONTRIBUTING and docs are written in the style that `support_style` states as patterns."""

from pathlib import Path
from typing import Final

import pytest

from support_style import ALLOWED, PATTERNS, faults, prose_of_markdown, prose_of_python

ROOT: Final = Path(__file__).parents[2]

WRITTEN_BY_SRC: Final = {
    "docs/pages/commands.md",  # from the texts of cli/verbs.py
    "docs/pages/reproductions.md",  # from those of studies/, and docs/reproductions/*.md, which are held below
    "docs/pages/cost.md",  # from docs/cost.md, which is held below
}
"""Pages that scripts write. When src is held too, they need no exception."""

PAGES: Final = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
    if str(path.relative_to(ROOT)) not in WRITTEN_BY_SRC
)


def found_in(path: Path) -> list[str]:
    """Return `line: pattern: sentence` for each fault in a page or module."""
    prose = prose_of_python if path.suffix == ".py" else prose_of_markdown
    return [
        f"{sentence.line}: {fault}: {sentence.text}"
        for sentence in prose(path.read_text(encoding="utf-8"))
        if sentence.text not in ALLOWED
        for fault in faults(sentence.text)
    ]


@pytest.mark.parametrize("page", PAGES)
def test_the_page_is_written_in_our_style(page: str) -> None:
    assert found_in(ROOT / page) == []
