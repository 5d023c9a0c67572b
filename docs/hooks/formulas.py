"""Render formulas ($...$ and $$...$$) as MathML when the site is built, so pages need no script.

pymdownx.arithmatex finds the formulas outside code and marks them with \\(...\\) and \\[...\\].
"""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</\1>', re.DOTALL
)

# Spaces that latex2mathml leaves to the browser, as TeX would set them.
SPACING = [
    # A thin space before and after the name of a function, but not before a parenthesis.
    (re.compile(r"(</m(?!o)\w+>)(<mi>(?:sin|cos|tan|cot|arctan|log|ln)</mi>)"), r'\1<mspace width="0.167em" />\2'),
    (re.compile(r"(<mi>(?:sin|cos|tan|cot|arctan|log|ln)</mi>)(?!<mo[ >])"), r'\1<mspace width="0.167em" />'),
    # No space around a slash or after the minus sign of a number.
    (re.compile(r"<mo>&#x0002F;</mo>"), '<mo lspace="0" rspace="0">&#x0002F;</mo>'),
    (
        re.compile(r"((?:&#x0003D;|&#x00028;|\[|,|&#x0002C;|&#x0005B;)</mo>)<mo>&#x02212;</mo>"),
        r'\1<mo form="prefix">&#x02212;</mo>',
    ),
]


def rendered(found: re.Match[str]) -> str:
    """Return a formula as MathML.

    Raises:
        ValueError: if latex2mathml leaves a command or an alignment mark unconverted.
    """
    block = found["block"] is not None
    latex = html.unescape(found["block"] if block else found["inline"]).strip()
    mathml = convert(latex, display="block" if block else "inline")
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        raise ValueError(f"latex2mathml does not support all of {latex!r}. Rewrite the formula")
    for pattern, replacement in SPACING:
        mathml = pattern.sub(replacement, mathml)
    return f'<div class="formula" tabindex="0">{mathml}</div>' if block else mathml


def on_page_content(content: str, **_: Any) -> str:
    """Render every formula of a page."""
    return FORMULA.sub(rendered, content)
