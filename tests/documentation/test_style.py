"""README, CONTRIBUTING, docs and src (docstrings, comments, messages, help texts) follow `support_style`."""

from pathlib import Path
from typing import Final

import pytest

from support_style import ALLOWED, PATTERNS, faults, found_in, prose_of_markdown, prose_of_python, sentences_of

ROOT: Final = Path(__file__).parents[2]

RECORDED: Final = {"docs/pages/reproductions.md"}
"""Pages generated from recorded results, with the texts of the version that measured them."""

FILES: Final = sorted(
    str(path.relative_to(ROOT))
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.py"),
    )
    if str(path.relative_to(ROOT)) not in RECORDED
)


def test_each_pattern_finds_its_example_and_no_other_pattern_does() -> None:
    for name, pattern in PATTERNS.items():
        assert faults(pattern.example) == [name]
    assert faults("To resume an interrupted run, rerun the same command.") == []


def test_sentences_are_found_in_pages_and_not_in_code() -> None:
    page = (
        "# What it costs\n\nOne. Of two\nlines, `Of code`.\n\n* An item\n\n| a | Where there is a cell |\n|---|---|\n\n"
        "```bash\n# Of a comment\n```\n$$\nOf\n$$\n[Whoever](Of.md) reads\n"
    )
    found = [(sentence.line, sentence.text) for sentence in prose_of_markdown(page)]
    assert [(line, text) for line, text in found if faults(text)] == [
        (1, "What it costs"),
        (3, "Of two lines, `x`."),
        (8, "Where there is a cell"),
        (17, "Whoever reads"),
    ]


def test_sentences_are_found_in_comments_docstrings_and_messages() -> None:
    module = (
        '"""Of the module. Fine."""\n\n\ndef f(x):\n    # Of a comment,\n    # and more.\n'
        '    raise ValueError(f"{x} goes on " f"and on: leave {x} out")\n'
    )
    found = [(sentence.line, sentence.text) for sentence in prose_of_python(module) if faults(sentence.text)]
    assert sorted(found) == [
        (1, "Of the module."),
        (5, "Of a comment, and more."),
        (7, "`x` goes on and on: leave `x` out"),
    ]


def test_every_exception_is_needed() -> None:
    texts = {sentence.text for name in FILES for sentence in sentences_of(ROOT / name)}
    for sentence in ALLOWED:
        assert sentence in texts
        assert faults(sentence)


def test_help_texts_are_among_the_sentences() -> None:
    """tyro shows the docstrings of the arguments' fields, whose modules are in `FILES`."""
    texts = {sentence.text for sentence in sentences_of(ROOT / "src/halfstep/cli/sampling.py")}
    assert "Number of samples to draw." in texts


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_written_in_our_style(name: str) -> None:
    assert found_in(ROOT / name) == []
