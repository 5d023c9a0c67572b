"""Embed the web page of the packaged student in the home page, where it samples in the reader's browser.

The export takes onnxruntime-web from the cache, or downloads it once from the npm registry. If neither is possible, the
home page keeps the picture between the two marks in index.md.
"""

import logging
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page

import halfstep
from halfstep.hub.web import export_web

NAME = "fashion"
FILE = f"{NAME}.html"
FRAME = (
    f'<iframe src="{FILE}" title="A one-step student that samples clothes in this browser" loading="lazy" '
    'style="width: 100%; height: 34rem; border: 0"></iframe>'
)
MARKED = re.compile(r"<!-- live -->.*<!-- /live -->", re.DOTALL)

log = logging.getLogger("mkdocs.hooks.live")
made: list[Path] = []


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Replace the picture on the home page with the frame."""
    if page.file.src_uri != "index.md" or not _is_made(Path(config.site_dir)):
        return markdown
    found, count = MARKED.subn(FRAME, markdown)
    if count != 1:
        raise ValueError("index.md must have one part between <!-- live --> and <!-- /live -->")
    return found


def _is_made(site: Path) -> bool:
    out = site / FILE
    if out not in made:
        try:
            out.unlink(missing_ok=True)
            export_web([(halfstep.load(NAME), None)], out, NAME, single_file=True)
        except ValueError as error:
            log.info("the home page shows a picture instead of the live page: %s", error)
            return False
        made.append(out)
    return True
