"""Formulas as MathML: $...$ and $$...$$ are rendered while the site is built, so its pages need no script for them.

pymdownx.arithmatex finds the formulas (it knows code from text) and leaves them as \\(...\\) and \\[...\\].
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL
)

# What latex2mathml leaves to the browser, and TeX would have set otherwise.
SPACING = [
    # A thin space before the name of a function and after it, but not before a parenthesis.
    (re.compile(r"(</m(?!o)\w+>)(<mi>(?:sin|cos|tan|cot|arctan|log|ln)</mi>)"), r'\1<mspace width="0.167em" />\2'),
    (re.compile(r"(<mi>(?:sin|cos|tan|cot|arctan|log|ln)</mi>)(?!<mo[ >])"), r'\1<mspace width="0.167em" />'),
    # No space round a slash, and none after a minus that is a sign.
    (re.compile(r"<mo>&#x0002F;</mo>"), '<mo lspace="0" rspace="0">&#x0002F;</mo>'),
    (
        re.compile(r"((?:&#x0003D;|&#x00028;|\[|,|&#x0002C;|&#x0005B;)</mo>)<mo>&#x02212;</mo>"),
        r'\1<mo form="prefix">&#x02212;</mo>',
    ),
]


def rendered(found: re.Match[str]) -> str:
    """The formula as MathML.

    Raises:
        ValueError: if a command or an alignment mark of it is left over.
    """
    block = found["block"] is not None
    latex = html.unescape(found["block"] if block else found["inline"]).strip()
    mathml = convert(latex, display="block" if block else "inline")
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        raise ValueError(f"latex2mathml does not know all of {latex!r}")
    for pattern, replacement in SPACING:
        mathml = pattern.sub(replacement, mathml)
    return f'<div class="formula" tabindex="0">{mathml}</div>' if block else mathml


def on_page_content(content: str, **_: Any) -> str:
    """The page with every formula rendered."""
    return FORMULA.sub(rendered, content)
