"""Write site/llms.txt, an index of the site for language models, and each page's Markdown next to its HTML.

The index follows the navigation in mkdocs.yml: a section per group, and a line with the first sentence of each page.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

pages: dict[str, str] = {}
"""The Markdown of each page, by source path."""
groups: list[tuple[str, list[tuple[str, str]]]] = []
"""(group, [(title, source path)]) in the order of the navigation."""


def first_sentence(markdown: str) -> str:
    """Return the first sentence of a page outside headings, blocks and tables, or an empty string."""
    text = re.sub(r"(?ms)^```.*?^```|<!--.*?-->", "", markdown)
    for paragraph in re.split(r"\n\s*\n", text):
        plain = " ".join(paragraph.split())
        if plain and not re.match(r"[#|!:*>]|- |\d+\. |---", plain):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", plain)
            return re.split(r"(?<=[.:])\s+(?=[A-Z`]|$)", plain)[0].rstrip(":")
    return ""


def on_nav(nav: Navigation, **_: Any) -> Navigation:
    """Record the groups of the navigation."""
    groups.clear()
    for item in nav.items:
        found = [item] if isinstance(item, Page) else list(item.children or ())
        name = "Start" if isinstance(item, Page) else item.title
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].extend((page.title or "", page.file.src_uri) for page in found if isinstance(page, Page))
    return nav


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Record the Markdown of a page."""
    pages[page.file.src_uri] = markdown
    return markdown


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Write the index and the Markdown files."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for group, members in groups:
        lines += [f"## {group}", ""]
        for title, path in members:
            lines.append(f"- [{title}]({path}): {first_sentence(pages[path])}".removesuffix(": "))
        lines.append("")
    (site / "llms.txt").write_text("\n".join(lines), encoding="utf-8")
    for path, markdown in pages.items():
        (site / path).write_text(markdown, encoding="utf-8")
