"""Silence of the libraries that the border talks to: their hints are for those who call them directly."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """Within it diffusers and transformers neither warn nor draw progress bars; errors are raised as ever."""
    from diffusers.utils import logging

    libraries = [logging]
    with suppress(ImportError):
        from transformers.utils import logging as of_transformers

        libraries.append(of_transformers)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def stock(name: str) -> Any:
    """The class of diffusers with that name, without what is said while it is imported."""
    import diffusers

    with quiet():
        return getattr(diffusers, name)
