"""Names what the theme leaves without a name for screen readers."""

from typing import Any

SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'


def on_post_page(output: str, **_: Any) -> str:
    """Name the dialog of the search.

    Raises:
        ValueError: if the theme has changed and has no such dialog.
    """
    if SEARCH not in output:
        raise ValueError("the theme has no search dialog as docs/hooks/accessible.py expects it. Update the hook.")
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')
