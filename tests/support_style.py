"""Patterns that our English avoids, and the search for them in files.

`prose_of_markdown` and `prose_of_python` return the sentences of a file, and `faults` returns the patterns in one.
`python tests/support_style.py src` lists the faults in files and folders.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple


class Sentence(NamedTuple):
    """A sentence, and the line on which its paragraph starts."""

    line: int
    text: str


class Pattern(NamedTuple):
    """A regular expression that must not match a sentence, and a sentence that it matches."""

    regex: str
    example: str


THING: Final = (
    r"(?:network|teacher|student|denoiser|model|option|setting|page|file|folder|scheduler|classifier|critic)s?"
)
"""Things that cannot talk."""

PATTERNS: Final[Mapping[str, Pattern]] = {
    # Openings of sentences.
    "opens with 'Of'": Pattern(r"^Of\b(?! course)", "Of the data a part is used."),
    "opens with 'In here'": Pattern(r"^In here\b", "In here an exception is caught."),
    "opens with 'What'": Pattern(r"^What\b(?!.*\?$)", "What a run lacks is left out."),
    "opens with 'Where there'": Pattern(r"^Where there\b", "Where there is a class, it is used."),
    "opens with 'Whoever'": Pattern(r"^Whoever\b", "Whoever samples needs no trainer."),
    # Literal translations, each with the English expression.
    "'in place of': instead of": Pattern(r"\bin (?:the )?place of\b", "A float in the place of a tensor."),
    "'in its place': instead": Pattern(r"\bin its place\b", "It puts another in its place."),
    "'anew': again, re-": Pattern(r"\banew\b", "The stage begins anew."),
    "'at hand': available": Pattern(r"\bat hand\b", "No GPU was at hand."),
    "'goes on': resumes, continues": Pattern(
        r"\b(?:goes|go|went|going) on\b(?! (?:top|the\b))", "The run goes on where it was."
    ),
    "'but for': except": Pattern(r"\bbut for\b", "Equal but for rounding."),
    "'round': around": Pattern(
        r"\b(?:all|goes?|way|loop|space) round\b|\bround (?:the|a|it|each|every|its)\b", "A space round a slash."
    ),
    "'is there': exists, is installed": Pattern(
        r"\b(?:is|are) there(?=[,.:;]| if| already|$)|\bthat (?:is|are) there\b", "Use the package if it is there."
    ),
    "'given again': rerun": Pattern(r"\bgiven again\b", "The command may be given again."),
    "'so many': at most, this number of": Pattern(r"\bso many\b", "Use so many samples at most."),
    "'by heart': memorise": Pattern(r"\bby heart\b", "It knows its data by heart."),
    "'make again': reproduce": Pattern(r"\b(?:make|made) (?:it )?again\b", "To make it again."),
    "'be had': is available": Pattern(r"\b(?:be|was|is|are) had\b", "Memory could not be had."),
    "'give back': return": Pattern(r"\b(?:gives?|gave) (?:it )?back\b", "The disk does not give back a file."),
    "'put out': returns": Pattern(r"\bputs? out\b", "The network puts out its negative."),
    "'so it is for': likewise": Pattern(r"^So it is (?:for|with)\b", "So it is for a student."),
    "'for want of': without": Pattern(r"\bfor want of\b", "On a CPU for want of a GPU."),
    "'all the same': still, anyway": Pattern(r"\ball the same\b", "It works all the same."),
    "'what there is to': rephrase": Pattern(r"\bwhat there is\b|\bthere is to\b", "This is what there is to learn."),
    "'cut' of a run: interrupted": Pattern(
        r"\b(?:was|is|were|that is) cut\b|\buncut (?:run|one)\b|\b(?:cut|uncut) and\b", "A run that was cut resumes."
    ),
    # Only people ask, tell, say, know and answer.
    "asks a thing": Pattern(
        rf"\b(?:asks?|asked|asking) (?:its?|the|an?|each|every|of) {THING}\b|\b{THING} (?:is|are|was|be) asked\b",
        "The sampler asks its network twice.",
    ),
    "tells a thing": Pattern(
        rf"\b{THING} (?:is|are|was|were|need not be) told\b|\b(?:tells?|told) (?:the|an?|its?) {THING}\b",
        "The network is told the time.",
    ),
    "a thing tells or asks": Pattern(rf"\b{THING} (?:tells?|asks?|answers?|knows?)\b", "The page tells how."),
    "'says nothing': has no effect": Pattern(r"\bsays? nothing\b", "The option says nothing here."),
    "shows a thing": Pattern(
        r"\b(?:network|model|student|teacher)s? (?:is|are|was) (?:not )?shown\b", "The network is shown the scale."
    ),
}

ALLOWED: Final[Mapping[str, str]] = {}
"""False positives of the patterns, each with the reason."""


def faults(sentence: str) -> list[str]:
    """Return the names of the patterns that a sentence contains."""
    return [name for name, pattern in PATTERNS.items() if re.search(pattern.regex, sentence)]


def sentences(paragraph: str, line: int) -> Iterator[Sentence]:
    """Yield the sentences of a paragraph."""
    for text in re.split(r"(?<=[.?!])[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`])", " ".join(paragraph.split())):
        if text:
            yield Sentence(line, text.strip(" *_()\"'"))


def prose_of_markdown(text: str) -> Iterator[Sentence]:
    """Yield the sentences of a page: paragraphs, items, table cells and headings, without code and formulas."""
    blank = re.compile(r"[^\n]")
    for pattern in (r"(?ms)^( *)```.*?^\1```", r"(?s)<!--.*?-->", r"(?ms)^\$\$.*?\$\$", r"(?m)^::: .*\n(?:    .*\n)*"):
        text = re.sub(pattern, lambda found: blank.sub(" ", found[0]), text)
    text = re.sub(r"`[^`\n]*`|\$[^$]*\$", "`x`", text)
    text = re.sub(r"\]\([^)\s]*\)", "]", text)
    text = re.sub(r"[\[\]]|(?<!\w)[*_]{1,2}|[*_]{1,2}(?!\w)", "", text)
    held: list[str] = []
    start = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        cells = re.match(r"^\s*\|(.*)\|\s*$", line)
        begins = re.match(r"^\s*(?:[-*+>] |\d+\. |#+ |!{3} )", line)
        if (not line.strip() or cells or begins) and held:
            yield from sentences(" ".join(held), start)
            held = []
        if cells:
            for cell in cells[1].split("|"):
                yield from sentences(cell, number)
        elif line.strip():
            if not held:
                start = number
            held.append(re.sub(r"^\s*(?:[-*+>] |\d+\. |#+ |!{3} \w+)", "", line).strip())
            if re.match(r"^#+ ", line):
                yield from sentences(held.pop(), number)


def prose_of_python(source: str) -> Iterator[Sentence]:
    """Yield the sentences of a module: comments, docstrings, messages and help texts. An f-string's fields read `x`."""
    comments: list[tuple[int, str]] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"# (?:type:|noqa|fmt:)", token.string):
            row, text = token.start[0], token.string.lstrip("#: ")
            if comments and comments[-1][0] + comments[-1][1].count("\n") + 1 == row:
                comments[-1] = (comments[-1][0], comments[-1][1] + "\n" + text)
            else:
                comments.append((row, text))
    for row, text in comments:
        yield from sentences(text, row)
    tree = ast.parse(source)
    pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "`x`" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            text = node.value
        else:
            continue
        # A name, a path or a format is not prose.
        if len(text.split()) > 2:
            for place in re.split(r"\n\s*\n", re.sub(r"(?<!`)`[^`\n]+`", "`x`", text)):
                yield from sentences(place, node.lineno)


def sentences_of(path: Path) -> Iterator[Sentence]:
    """Yield the sentences of a page or module."""
    prose = prose_of_python if path.suffix == ".py" else prose_of_markdown
    return prose(path.read_text(encoding="utf-8"))


def found_in(path: Path) -> list[str]:
    """Return `line: pattern: sentence` for each fault in a page or module."""
    return [
        f"{sentence.line}: {fault}: {sentence.text}"
        for sentence in sentences_of(path)
        if sentence.text not in ALLOWED
        for fault in faults(sentence.text)
    ]


if __name__ == "__main__":
    for name in sys.argv[1:]:
        inside = (path for path in sorted(Path(name).rglob("*")) if path.suffix in (".md", ".py"))
        for path in inside if Path(name).is_dir() else [Path(name)]:
            for fault in found_in(path):
                print(f"{path}:{fault}")
