"""The code blocks and commands of README, CONTRIBUTING and the pages of the site."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).parents[1]
PAGES: Final = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs" / "pages").rglob("*.md")),
)


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```([\w-]*)\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    name = page.relative_to(ROOT).as_posix()
    return [Block(name, text[: m.start()].count("\n") + 1, m[2], m[3]) for m in found]


BLOCKS: Final = [block for page in PAGES for block in blocks_of(page)]


def lines_of(block: Block) -> Iterator[str]:
    """Yield the lines of a shell block without comments."""
    for line in block.code.splitlines():
        words = shlex.split(line, comments=True, posix=False) if line.count("'") % 2 == 0 else []
        if words:
            yield " ".join(words)


def inline_commands() -> Iterator[tuple[str, str]]:
    """Yield (page, command) for the halfstep commands in running text and tables."""
    for page in PAGES:
        text = re.sub(r"(?ms)^ *```.*?^ *```", "", page.read_text(encoding="utf-8"))
        for found in re.findall(r"`(halfstep [a-z][^`]*)`", text):
            yield page.relative_to(ROOT).as_posix(), found


def arguments_of(line: str) -> list[str] | None:
    """Return the arguments that a shell line passes to halfstep, or None if it does not call it."""
    words = shlex.split(line.removesuffix("&").partition(" > ")[0])
    if words[0] == "halfstep":
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1] == "halfstep":
        return words[words.index("-m") + 2 :]
    return None
