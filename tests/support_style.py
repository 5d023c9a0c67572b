"""The style of our English as patterns: what a sentence must not contain, and where sentences are found.

`prose_of_markdown` and `prose_of_python` return the sentences of a file; `faults` returns what is wrong with one.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple


class Sentence(NamedTuple):
    """A sentence, the line on which its paragraph begins, and whether it opens with a word that was written there."""

    line: int
    text: str


TOLD: Final = r"(?:network|teacher|student|denoiser|model|option|setting|page|file|folder|scheduler|classifier|critic|it)s?"
"""Things that people do not talk to."""

PATTERNS: Final[Mapping[str, str]] = {
    # Rule 4: how no sentence opens.
    "opens with 'Of'": r"^Of\b(?! course)",
    "opens with 'In here'": r"^In here\b",
    "opens with 'What'": r"^What\b(?!.*\?$)",
    "opens with 'Where there'": r"^Where there\b",
    "opens with 'Whoever'": r"^Whoever\b",
    # Rule 4: words of another language.
    "'in the place of': instead of": r"\bin (?:the )?place of\b",
    "'in its place': instead": r"\bin its place\b",
    "'anew': again, re-": r"\banew\b",
    "'at hand': available": r"\bat hand\b",
    "'goes on': resumes, continues": r"\b(?:goes|go|went|going) on\b(?! (?:top|the\b))",
    "'but for': except": r"\bbut for\b",
    "'round': around": r"\b(?:all|go|goes|way|loop|space|space) round\b|\bround (?:the|a|it|each|every|its)\b",
    "'is there' as a predicate": r"\b(?:is|are) there(?= all the same|[,.:;]| if| already|$)|\bthat (?:is|are) there\b",
    "'given again': rerun": r"\bgiven again\b",
    "'so many': at most, this number of": r"\bso many\b",
    "'by heart': memorise": r"\bby heart\b",
    "'make it again': reproduce": r"\b(?:make|made) (?:it )?again\b",
    "'could be had': is available": r"\b(?:be|was|is|are) had\b",
    "'gives back': return": r"\b(?:give|gives|gave) (?:it )?back\b",
    "'puts out': returns": r"\bputs? out\b",
    "'so it is for': likewise": r"^So it is (?:for|with)\b",
    "'for want of': because there was no": r"\bfor want of\b",
    "'all the same': anyway": r"\ball the same\b",
    "'what there is to': the difference to": r"\bwhat there is\b|\bthere is to\b",
    "'cut' of a run: interrupted": r"\b(?:was|is|were|that is) cut\b|\b(?:un)cut (?:run|one)\b|\b(?:cut|uncut) and\b",
    # Rule 3: only people ask, tell, say, know and answer.
    "asks a thing": rf"\b(?:asks?|asked|asking) (?:its?|the|a|an|each|every|of) {TOLD}\b|\b{TOLD} (?:is|are|was|be) asked\b",
    "a thing is told": rf"\b{TOLD} (?:is|are|was|were|need(?:s)? not be) told\b|\b(?:tells?|told) (?:the|a|an|its?) {TOLD}\b",
    "a thing tells or asks": rf"\b(?!it){TOLD} (?:tells?|asks?|answers?|knows?)\b",
    "'says nothing': has no effect": r"\bsays? nothing\b",
    "'is shown' to a network": r"\b(?:network|model|student|teacher)s? (?:is|are|was) (?:not )?shown\b",
}

ALLOWED: Final[Mapping[str, str]] = {}
"""Sentences that a pattern finds wrongly, each with the reason."""


def faults(sentence: str) -> list[str]:
    """Return the names of the patterns that a sentence contains."""
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, sentence)]


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
        # A name, a path or a format is no prose.
        if len(text.split()) > 2:
            for place in re.split(r"\n\s*\n", re.sub(r"(?<!`)`[^`\n]+`", "`x`", text)):
                yield from sentences(place, node.lineno)
