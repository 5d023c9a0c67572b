"""From command lines to typed arguments, by tyro; from its complaints to one line that names what is near."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, TypeVar, Union, get_args, get_origin

import tyro
from pydantic import ValidationError
from tyro import _errors as tyro_errors
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from halfstep.cli.verbs import epilogue
from halfstep.registry import nearest

Arguments = TypeVar("Arguments")


Switch = tyro.conf.FlagCreatePairsOff[bool]
"""An option without a value that is off by default."""

PLAIN: Final = ConstructorRegistry()
"""How the help writes options that may be left out: INT, where tyro would write {None}|INT."""

METAVARS: Final = {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}


@PLAIN.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    kinds = get_args(info.type)
    if get_origin(info.type) not in (Union, UnionType) or NoneType not in kinds:
        return None
    # A word, such as auto, may stand in the place of a value.
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    values = [kind for kind in kinds if kind is not NoneType and get_origin(kind) is not Literal]
    if len(values) != 1:
        return None
    kind = values[0]
    if get_origin(kind) is Annotated:
        # A bound of pydantic's, which checks it.
        kind = get_args(kind)[0]
    if kind not in METAVARS:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join([METAVARS[kind], *words]),
        instance_from_str=lambda texts: (
            None if texts[0] == "None" else texts[0] if texts[0] in words else kind(texts[0])
        ),
        is_instance=lambda value: (
            value is None or value in words or isinstance(value, kind) or (kind is float and type(value) is int)
        ),
        str_from_instance=lambda value: [str(value)],
    )


class UsageError(ValueError):
    """A command line that cannot be understood; one line."""


def first_line(error: ValidationError) -> str:
    """A pydantic error in one line: field, what was got, what was needed."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("unet2d", "mlp"))
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {reason}"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown field {where!r}"
    return f"{where}: {reason[0].lower()}{reason[1:]}, got {first['input']!r}"


def plain_reason(message: str) -> str:
    """tyro's and pydantic's words for a bad value, in one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    if len(lines) >= 3 and "validation error" in lines[0]:
        if " [type=" in lines[1]:
            # A contradiction between fields has no field of its own.
            return lines[1].partition(" [type=")[0].removeprefix("Value error, ")
        reason, _, details = lines[2].partition(" [type=")
        got = details.partition("input_value=")[2].partition(", input_type")[0]
        reason = reason.removeprefix("Value error, ")
        return f"{lines[1].replace('_', '-')}: {reason}" + ("" if "got" in reason or not got else f", got {got}")
    for kind, needed in (("int()", "a whole number"), ("float", "a number")):
        if kind in message and ":" in message:
            return f"needs {needed}, got {message.rpartition(':')[2].strip()}"
    return " ".join(lines)


def with_flag(reason: str, argv: Sequence[str]) -> str:
    """Return a complaint that begins with a setting's name, with the one flag of that name in its place."""
    name, _, rest = reason.partition(" ")
    flags = [token.partition("=")[0] for token in argv if token.startswith("--")]
    found = [flag for flag in flags if flag.replace("-", "_").endswith((f".{name}", f"__{name}"))]
    return f"{found[0]} {rest}" if len(found) == 1 else reason


def parse(
    kind: type[Arguments],
    argv: Sequence[str],
    prog: str,
    default: Arguments | None = None,
    flags: Iterable[str] = (),
) -> Arguments:
    """The arguments in `argv`.

    Raises:
        UsageError: one line, if an option is unknown, lacks its value or has one of the wrong type.
        SystemExit: after --help.
    """
    known = [
        *flags,
        *(f"--{name.replace('_', '-')}" for name in getattr(kind, "__dataclass_fields__", {})),
        "--help",
    ]

    def explain(event: tyro_errors.ParseErrorEvent) -> None:
        if isinstance(event, tyro_errors.UnrecognizedArgs):
            token = event.tokens[0]
            raise UsageError(f"unknown option {token!r}{nearest(token.split('=')[0], known)}; see {prog} --help")
        if isinstance(event, tyro_errors.MissingArgs):
            if event.unrecognized_tokens:
                token = event.unrecognized_tokens[0]
                raise UsageError(f"unknown option {token!r}{nearest(token, known)}; see {prog} --help")
            names = ", ".join(argument.arg.lowered.name_or_flags[0] for argument in event.missing_arguments)
            raise UsageError(f"{names} is missing; see {prog} --help")
        if isinstance(event, tyro_errors.BadValue):
            flag = event.argument.lowered.name_or_flags[0]
            if not flag.startswith("-"):
                # What stands in the place of a positional is an option, which may be a mistyped one.
                for token in argv:
                    name = token.partition("=")[0]
                    if name.startswith("--") and name not in known:
                        raise UsageError(f"unknown option {token!r}{nearest(name, known)}; see {prog} --help")
                raise UsageError(f"{flag.upper()} is missing; see {prog} --help")
            raise UsageError(f"{flag} needs a value; see {prog} --help")
        if isinstance(event, tyro_errors.InvalidChoice):
            flag = event.argument.lowered.name_or_flags[0]
            raise UsageError(
                f"{flag}: {event.value!r} is not one of {', '.join(event.choices)}{nearest(event.value, event.choices)}"
            )
        if isinstance(event, tyro_errors.InstantiationFailure):
            flag = event.argument.lowered.name_or_flags[0] if event.argument is not None else ""
            reason = plain_reason(event.message)
            raise UsageError(f"{flag}: {reason}" if flag else with_flag(reason, argv))

    try:
        with tyro_errors.on_parse_error(explain):
            return tyro.cli(
                kind,
                args=list(argv),
                prog=prog,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.PositionalMetavarFromFieldName,),
                registry=PLAIN,
            )
    except SystemExit as end:
        if end.code in (None, 0):
            # After --help.
            print(epilogue(prog.split()[1]))
        raise
    except ValidationError as error:
        raise UsageError(first_line(error)) from None
