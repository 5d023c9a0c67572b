"""Label the theme's search dialog for screen readers."""

from typing import Any

SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'


def on_post_page(output: str, **_: Any) -> str:
    """Label the search dialog.

    Raises:
        ValueError: if the theme has changed and has no such dialog.
    """
    if SEARCH not in output:
        raise ValueError(
            "the theme's search dialog is not the one that docs/hooks/accessible.py expects. Update the hook."
        )
    return output.replace(SEARCH, f'{SEARCH} aria-label="Search"')
