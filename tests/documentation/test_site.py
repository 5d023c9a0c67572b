"""The site's navigation contains every page, its links are valid, and it fetches nothing."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ROOT / "docs" / "pages"
FROM_ELSEWHERE: Final = {"readme.md": ROOT / "README.md", "contributing.md": ROOT / "CONTRIBUTING.md"}
"""Pages that docs/hooks/repository.py adds."""


def navigation() -> list[str]:
    """Return the pages in mkdocs.yml, in order."""

    def leaves(item: Any) -> Iterator[str]:
        if isinstance(item, str):
            yield item
        else:
            for value in item.values() if isinstance(item, dict) else item:
                yield from leaves(value)

    return list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, and of the names in the reference."""
    text = re.sub(r"(?ms)^```.*?^```", "", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", re.sub(r"`|\]\(.*?\)|\$.*?\$", "", title).lower()).strip() for title in titles]
    return {re.sub(r"[\s-]+", "-", title) for title in plain}


def links_of(page: Path) -> list[tuple[str, str]]:
    """Return (file, anchor) of the links from a page to others."""
    text = re.sub(r"(?ms)^```.*?^```|`[^`\n]*`|\$[^$]*\$", "", page.read_text(encoding="utf-8"))
    return re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", text)


def test_the_navigation_contains_every_page_once() -> None:
    found = navigation()
    written = {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.md")}
    assert sorted(found) == sorted(written | FROM_ELSEWHERE.keys())


@pytest.mark.parametrize("page", navigation())
def test_the_links_of_a_page_are_valid(page: str) -> None:
    source = FROM_ELSEWHERE.get(page, PAGES / page)
    for path, anchor in links_of(source):
        if path in ("docs/fashion.png", "llms.txt"):
            continue
        target = source.parent / path if path else source
        target = FROM_ELSEWHERE.get(path.removeprefix("../"), target)
        assert target.exists(), f"{page}: {path}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors_of(target), f"{page}: {path}#{anchor}"


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    """Build the whole site. The fast tests above check the same without building it."""
    pytest.importorskip("mkdocs", reason="the group docs is not installed")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, check=True
    )
    listed = re.findall(r"\]\(([^)]*)\)", (tmp_path / "llms.txt").read_text())
    assert listed == navigation()
    for page in listed:
        assert (tmp_path / page).read_text().startswith("#")
        html = (tmp_path / page).with_suffix(".html").read_text()
        assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?https?:", html) == []
    reference = (tmp_path / "reference" / "denoisers.html").read_text()
    assert 'id="halfstep.Denoiser"' in reference
    assert "load_state_dict" not in reference
