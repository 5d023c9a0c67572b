"""Parses a command line with tyro and turns errors into one-line messages that suggest the nearest option or value."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import Field, ValidationError
from tyro import _errors as tyro_errors
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from halfstep.cli.help import HELP, help_text
from halfstep.registry import family_of, nearest
from halfstep.runtime.files import user_path

Arguments = TypeVar("Arguments")

Switch = tyro.conf.FlagCreatePairsOff[bool]
"""An option that takes no value and is off by default."""

CONFIG: Final = (tyro.conf.PositionalMetavarFromFieldName,)

PLAIN: Final = ConstructorRegistry()
"""Rules for error messages and for value placeholders in the help (INT instead of tyro's {None}|INT)."""

METAVARS: Final = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}
BOUNDS: Final = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
"""The words that messages use for pydantic's bounds."""
NEEDED: Final = {int: "a whole number", float: "a number"}


@PLAIN.primitive_rule
def _plain(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    # Some options also accept a word, such as auto, instead of a value.
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    values = [kind for kind in kinds if kind is not NoneType and get_origin(kind) is not Literal]
    if len(values) != 1:
        return None
    # If the type is annotated with bounds, pydantic checks them.
    kind = get_args(values[0])[0] if get_origin(values[0]) is Annotated else values[0]
    if kind not in METAVARS:
        return None

    def read(texts: Sequence[str]) -> Any:
        text = texts[0]
        if text in words or (text == "None" and NoneType in kinds):
            return None if text == "None" else text
        try:
            # Shells do not expand ~ in --out=~/runs, and without a shell nothing does.
            return user_path(text) if kind is Path else kind(text)
        except ValueError:
            if kind not in NEEDED:
                raise
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
    """An error in the command line, described by a one-line message."""


def refuse_idle(arguments: Any, where: str, names: Iterable[str], reasons: Mapping[str, str] = {}) -> None:
    """Raise UsageError if the user has set any of the named options, which would have no effect.

    Args:
        arguments: an instance of a dataclass of arguments.
        where: the end of the message "--option has no effect ...", such as "with --format web".
        reasons: the reasons to show in the message for some of the options.
    """
    defaults = {field.name: field.default for field in fields(arguments)}
    for name in names:
        if getattr(arguments, name) != defaults[name]:
            reason = f": {reasons[name]}" if name in reasons else ""
            raise UsageError(f"--{name.replace('_', '-')} has no effect {where}{reason}. Remove it")


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Steps = Annotated[int, Field(ge=1, le=2**20)]
Side = Annotated[int, Field(ge=1, le=16_384)]
Rate = Annotated[float, Field(ge=0.01, le=1000)]
Share = Annotated[float, Field(ge=0, le=1)]
Guidance = Annotated[float, Field(ge=0, le=1000)]


def first_line(error: ValidationError) -> str:
    """Return a one-line description of a pydantic error: the field, the requirement and the value."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("unet2d", "mlp"))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {where!r}"
    for bound, words in BOUNDS.items():
        if bound in first.get("ctx", {}):
            limit = f"{first['ctx'][bound]:,}".removesuffix(".0")
            return f"{where} must be {words} {limit}, got {first['input']!r}"
    if first["type"] != "value_error":
        reason = f"{reason[0].lower()}{reason[1:]}, got {first['input']!r}"
    # An error about contradictory fields has no location.
    return f"{where}: {reason}" if where else reason


def parser_of(kind: type[Arguments], default: Arguments | None = None) -> ArgumentParser:
    """Return an argparse parser for the options that `parse` accepts."""
    # Type checkers do not see that tyro's parser is an argparse.ArgumentParser.
    parser: Any = tyro.extras.get_parser(
        kind, default=tyro.MISSING_NONPROP if default is None else default, config=CONFIG, registry=PLAIN
    )
    assert isinstance(parser, ArgumentParser)
    return parser


def with_flag(reason: str, argv: Sequence[str]) -> str:
    """Replace the setting at the start of an error message with the matching flag, if exactly one flag matches."""
    name, rest = re.split(r"(?:\.\d+)?(?=:? |$)", reason, maxsplit=1)
    flags = [token.partition("=")[0] for token in argv if token.startswith("--")]
    found = [flag for flag in flags if flag.replace("-", "_").endswith((f".{name}", f"__{name}"))]
    return found[0] + rest if len(found) == 1 else reason


def parse(
    kind: type[Arguments],
    argv: Sequence[str],
    prog: str,
    default: Arguments | None = None,
    short: Mapping[str, str] = MappingProxyType({}),
) -> Arguments:
    """Parse `argv`, in which options may have `short` names. Error messages show each option as the user typed it.

    Raises:
        UsageError: if an option is unknown, or if the value of an option is missing or invalid.
        SystemExit: after printing the help.
    """
    if asked := [token for token in argv if token in HELP]:
        print(help_text(parser_of(kind, default), prog, short, "--help-all" in asked))
        raise SystemExit(0)
    with as_typed(argv, short):
        return _parsed(kind, expand_short(argv, short), prog, default, short)


@contextmanager
def as_typed(argv: Sequence[str], short: Mapping[str, str]) -> Iterator[None]:
    """In the message of a ValueError, replace options with the short names that the user typed."""
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
    """Replace short option names with full names."""
    return [short.get(name, name) + equals + value for name, equals, value in (token.partition("=") for token in argv)]


def _parsed(
    kind: type[Arguments], argv: Sequence[str], prog: str, default: Arguments | None, short: Iterable[str]
) -> Arguments:
    def refuse(event: tyro_errors.ParseErrorEvent) -> NoReturn:
        known = [*parser_of(kind, default)._option_string_actions, *short, *HELP]
        # A mistyped option usually causes the other errors, so it is reported first.
        for token in argv:
            name = token.partition("=")[0].replace("_", "-")
            if name.startswith("--") and name not in known:
                raise UsageError(f"unknown option {token!r}{nearest(name, known)}; see {prog} --help")
        raise UsageError(_reason(event, prog, argv))

    try:
        with tyro_errors.on_parse_error(refuse):
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                default=tyro.MISSING_NONPROP if default is None else default,
                config=CONFIG,
                registry=PLAIN,
            )
    except ValidationError as error:
        raise UsageError(with_flag(first_line(error), argv)) from None


def _reason(event: tyro_errors.ParseErrorEvent, prog: str, argv: Sequence[str]) -> str:
    """Return tyro's error message as a single line; tyro itself prints a multi-line box."""

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
            name, choices = name_of(event.argument), list(event.choices)
            if (family := family_of({*choices} - {"None"})) is not None:
                return f"{name}: {family.unknown(event.value)}"
            return f"{name}: {event.value!r} is not one of {', '.join(choices)}{nearest(event.value, choices)}"
        case tyro_errors.InstantiationFailure():
            # If tyro has wrapped the original exception, the original is the `__context__` of tyro's exception.
            error = sys.exception()
            cause = error if isinstance(error, ValueError) else getattr(error, "__context__", None)
            if isinstance(cause, ValidationError):
                return with_flag(first_line(cause), argv)
            if event.argument is None:
                return with_flag(" ".join(str(cause or event.message).split()), argv)
            # The message for a single value comes from `_plain`. The message for several values comes from tyro and
            # contains Python types.
            reason = event.message if event.message.startswith("needs ") else f"needs {event.argument.lowered.metavar}"
            return f"{name_of(event.argument)}: {reason}"
    return f"the command line is invalid{help}"


@contextmanager
def in_own_words(*options: str) -> Iterator[None]:
    """In a ValueError about data, shorten --data.NAME to --NAME, and remove options that this verb lacks.

    Args:
        options: the verb's own options without the prefix, such as `image-size` for --data.image-size.
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
            # If the verb does not have the option, the user must change the files.
            parts = [*(parts or [said.split(": ")[0]]), "resize, convert or remove the files themselves"]
        raise UsageError("; ".join(parts)) from None
