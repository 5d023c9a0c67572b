"""Import and call diffusers' classes without warnings or progress bars."""

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from typing import Any

from halfstep.core.warnings import HalfstepWarning


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and progress bars of diffusers and transformers. Can be nested."""
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
    """Import diffusers quietly and return its attribute `name`, or the default if no such attribute exists."""
    import diffusers

    with quiet():
        return getattr(diffusers, name, *default)


def fields_of(name: str) -> set[str]:
    """Return the config fields of a diffusers class, which are its constructor's arguments."""
    return set(inspect.signature(stock(name).__init__).parameters)


def warn_of_fields(where: str, config: Mapping[str, Any], foreign: Sequence[str]) -> None:
    """Warn about unsupported config fields, as diffusers does."""
    if foreign:
        fields = ", ".join(f"{name} = {config[name]!r}" for name in foreign)
        warnings.warn(
            f"{where} has fields that this diffusers version does not support, so they are ignored: {fields}. Update "
            "diffusers if you need them",
            HalfstepWarning,
            stacklevel=4,
        )


def in_one_line(error: BaseException) -> str:
    """Return the start of an error's text on a single line, for use in a message."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_transformers(what: str) -> None:
    """Raise ValueError if transformers, which `what` needs for its text encoders, is not installed."""
    if find_spec("transformers") is None:
        raise ValueError(f"{what} needs the package transformers: pip install 'halfstep[text]'")
