"""Add README.md and CONTRIBUTING.md to the site, which also checks their links.

Links to the sources of pages become links to the pages. Pictures and data under docs/ are published. Links to other
files in the repository, which the site does not contain, become plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add the repository's own pages, and the files that they link to."""
    shown: dict[str, Path] = {}

    def link(found: re.Match[str]) -> str:
        image, text, path, anchor = found[1], found[2], posixpath.normpath(found[3]), found[4] or ""
        if path in PAGES:
            return f"[{text}]({PAGES[path]}{anchor})"
        if path.startswith("docs/pages/"):
            return f"{image}[{text}]({path.removeprefix('docs/pages/')}{anchor})"
        if path.startswith("docs/") and (ROOT / path).is_file():
            shown[path] = ROOT / path
            return f"{image}[{text}]({path})"
        return text if (ROOT / path).exists() else found[0]

    for source, page in PAGES.items():
        content = LINK.sub(link, (ROOT / source).read_text())
        files.append(File.generated(config, page, content=content))
    for path, source_file in shown.items():
        files.append(File.generated(config, path, abs_src_path=str(source_file)))
    return files
