"""Parse a command line with tyro; report an error in one line that suggests the nearest option or value."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Final,
    Literal,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from pydantic import ValidationError
from tyro import _errors as tyro_errors
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from halfstep.cli.help import HELP, help_text
from halfstep.registry import nearest

Arguments = TypeVar("Arguments")

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""An option without a value, off by default."""

CONFIG: Final = (tyro.conf.PositionalMetavarFromFieldName,)

PLAIN: Final = ConstructorRegistry()
"""Formats values in the help (INT instead of tyro's {None}|INT) and reports bad ones."""

METAVARS: Final = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
BOUNDS: Final = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""Words for the bounds that pydantic checks."""
NEEDED: Final = {int: "a whole number", float: "a number"}


@PLAIN.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    # A word, such as auto, may replace the value.
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    values = [kind for kind in kinds if kind is not NoneType and get_origin(kind) is not Literal]
    if len(values) != 1:
        return None
    # pydantic checks the bounds of an annotated type.
    kind = get_args(values[0])[0] if get_origin(values[0]) is Annotated else values[0]
    if kind not in METAVARS:
        return None

    def read(texts: Sequence[str]) -> Any:
        text = texts[0]
        if text in words or (text == "None" and NoneType in kinds):
            return None if text == "None" else text
        try:
            return kind(text)
        except ValueError:
            raise ValueError(f"needs {' or '.join([NEEDED[kind], *words])}, got {text!r}") from None

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([METAVARS[kind], *words]),
        instance_from_str=read,
        is_instance=lambda value: (
            (value is None and NoneType in kinds)
            or value in words
            or isinstance(value, kind)
            or (kind is float and type(value) is int)
        ),
        str_from_instance=lambda value: [str(value)],
    )


class UsageError(ValueError):
    """An invalid command line; its message is one line."""


def flag(name: str) -> str:
    """Return the option of an argument, as it is typed."""
    return f"--{name.replace('_', '-')}"


class Range(NamedTuple):
    """The range of an argument's values, as an annotation of its type."""

    least: float
    most: float


Count = Annotated[int, Range(1, 1_000_000)]
Steps = Annotated[int, Range(1, 2**20)]
Side = Annotated[int, Range(1, 16_384)]
Rate = Annotated[float, Range(0.01, 1000)]
Share = Annotated[float, Range(0, 1)]
Guidance = Annotated[float, Range(0, 1000)]


def _check_ranges(arguments: object) -> None:
    """Raise UsageError if an argument is outside its range."""
    for name, hint in get_type_hints(type(arguments), include_extras=True).items():
        bounds, value = _range_of(hint), getattr(arguments, name)
        if bounds is None or value is None:
            continue
        for each in value if isinstance(value, tuple) else (value,):
            if not each >= bounds.least:
                raise UsageError(f"{flag(name)} must be at least {bounds.least:,}, got {each}")
            if not each <= bounds.most:
                raise UsageError(f"{flag(name)} must be at most {bounds.most:,}, got {each}")


def _range_of(hint: Any) -> Range | None:
    """Return the range of a type: of `int`, of `int | None` or of a tuple's entries."""
    marks = [mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Range)]
    inner = (_range_of(part) for part in get_args(hint) if not isinstance(part, Range))
    return next((found for found in (*marks, *inner) if found is not None), None)


def first_line(error: ValidationError) -> str:
    """Return a pydantic error in one line: the field, the value and the requirement."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("unet2d", "mlp"))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {where!r}"
    for bound, words in BOUNDS.items():
        if bound in first.get("ctx", {}):
            reason = f"must be {words} {first['ctx'][bound]:,}"
    if first["type"] != "value_error":
        reason = f"{reason[0].lower()}{reason[1:]}, got {first['input']!r}"
    # A contradiction between several fields belongs to none of them.
    return f"{where}: {reason}" if where else reason


def parser_of(kind: type[Arguments], default: Arguments | None = None) -> ArgumentParser:
    """Return an argparse parser for the options that `parse` reads."""
    # Its class derives from argparse's, but type checkers do not see that.
    parser: Any = tyro.extras.get_parser(
        kind, default=tyro.MISSING_NONPROP if default is None else default, config=CONFIG, registry=PLAIN
    )
    assert isinstance(parser, ArgumentParser)
    return parser


def with_flag(reason: str, argv: Sequence[str]) -> str:
    """Replace the setting at the start of an error message with its flag, if exactly one flag matches."""
    first, _, rest = reason.partition(" ")
    name = first.rstrip(":")
    flags = [token.partition("=")[0] for token in argv if token.startswith("--")]
    found = [flag for flag in flags if flag.replace("-", "_").endswith((f".{name}", f"__{name}"))]
    return f"{found[0]}{first[len(name) :]} {rest}" if len(found) == 1 else reason


def parse(
    kind: type[Arguments],
    argv: Sequence[str],
    prog: str,
    default: Arguments | None = None,
    short: Mapping[str, str] = MappingProxyType({}),
) -> Arguments:
    """Parse `argv`, in which options may have `short` names; errors show each option as it was typed.

    Raises:
        UsageError: in one line, if an option is unknown, lacks its value or has a value of the wrong type.
        SystemExit: after --help.
    """

    if asked := [token for token in argv if token in HELP]:
        print(help_text(parser_of(kind, default), prog, short, "--help-all" in asked))
        raise SystemExit(0)
    with as_typed(argv, short):
        return _parsed(kind, expand_short(argv, short), prog, default, short)


@contextmanager
def as_typed(argv: Sequence[str], short: Mapping[str, str]) -> Iterator[None]:
    """Re-raise a ValueError that names an option with the option's short name, if the user typed that."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        for name in short.keys() & {token.partition("=")[0] for token in argv}:
            text = text.replace(short[name], name)
        if text == str(error):
            raise
        raise UsageError(text) from error


def expand_short(argv: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Replace the short names of options."""
    return [short.get(name, name) + equals + value for name, equals, value in (token.partition("=") for token in argv)]


def _parsed(
    kind: type[Arguments], argv: Sequence[str], prog: str, default: Arguments | None, short: Iterable[str]
) -> Arguments:
    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        known = [*parser_of(kind, default)._option_string_actions, *short, *HELP]
        # Report a mistyped option first, because other errors are usually caused by it.
        for token in argv:
            name = token.partition("=")[0].replace("_", "-")
            if name.startswith("--") and name not in known:
                raise UsageError(f"unknown option {token!r}{nearest(name, known)}; see {prog} --help")
        raise UsageError(_reason(event, prog, argv))

    try:
        with tyro_errors.on_parse_error(refuse):
            arguments = tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=CONFIG,
                registry=PLAIN,
            )
        _check_ranges(arguments)
        return arguments
    except ValidationError as error:
        raise UsageError(with_flag(first_line(error), argv)) from None


def _reason(event: tyro_errors.ParseErrorEvent, prog: str, argv: Sequence[str]) -> str:
    """Return in one line why tyro rejects a command line.

    tyro prints its reasons in boxes of many lines. Only a private hook provides its events; no other code uses it.
    """

    def name_of(argument: Any) -> str:
        name: str = argument.lowered.name_or_flags[0]
        return name if name.startswith("-") else name.upper()

    help = f"; see {prog} --help"
    match event:
        case tyro_errors.UnrecognizedArgs():
            return f"unexpected argument {event.tokens[0]!r}{help}"
        case tyro_errors.MissingArgs():
            return f"{', '.join(name_of(each.arg) for each in event.missing_arguments)} is missing{help}"
        case tyro_errors.BadValue():
            name, number = name_of(event.argument), event.argument.lowered.nargs
            if not name.startswith("-"):
                return f"{name} is missing{help}"
            return f"{name} needs {'a value' if number in (1, '*') else f'{number} values'}{help}"
        case tyro_errors.InvalidChoice():
            choices = ", ".join(event.choices)
            hint = nearest(event.value, event.choices)
            return f"{name_of(event.argument)}: {event.value!r} is not one of {choices}{hint}"
        case tyro_errors.InstantiationFailure():
            # tyro keeps only the text of an exception; the exception itself is the context of the current one.
            cause = getattr(sys.exception(), "__context__", None)
            if isinstance(cause, ValidationError):
                return with_flag(first_line(cause), argv)
            if event.argument is None:
                return with_flag(" ".join(str(cause or event.message).split()), argv)
            # For several values, tyro's message contains Python types; for one value, `_plain` wrote the message.
            reason = event.message if event.message.startswith("needs ") else f"needs {event.argument.lowered.metavar}"
            return f"{name_of(event.argument)}: {reason}"
    return f"this command line is invalid{help}"


@contextmanager
def in_own_words(*options: str) -> Iterator[None]:
    """Re-raise a ValueError about data without the recipe options in its text, which only training verbs have.

    Args:
        options: recipe options that this verb also has, without their prefix: `image-size` for --data.image-size.
    """
    try:
        yield
    except ValueError as error:
        said = str(error)
        if "--data." not in said:
            raise
        said = re.sub(r"--data\.([a-z-]+)", lambda found: f"--{found[1]}" if found[1] in options else found[0], said)
        parts = [part for part in said.split("; ") if "--data." not in part]
        if not any("remove" in part or "--" in part for part in parts):
            # Without the option, the files themselves must be changed.
            parts = [*(parts or [said.split(": ")[0]]), "resize, convert or remove the files themselves"]
        raise UsageError("; ".join(parts)) from None
