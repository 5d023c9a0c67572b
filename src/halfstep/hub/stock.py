"""diffusers' classes, imported and called quietly."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of diffusers and transformers, which are for direct callers.

    Restores the previous state, so that calls can be nested.
    """
    from diffusers.utils import logging

    libraries = [logging]
    with suppress(ImportError):
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    held = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, (level, has_bars) in zip(libraries, held, strict=True):
            library.set_verbosity(level)
            if has_bars:
                library.enable_progress_bar()


def stock(name: str, *default: Any) -> Any:
    """Return the diffusers class with this name, imported quietly, or the default."""
    import diffusers

    with quiet():
        return getattr(diffusers, name, *default)


def in_one_line(error: BaseException) -> str:
    """Return the start of an error's text without line breaks, to include in our messages."""
    return " ".join(str(error).split())[:200] or type(error).__name__
