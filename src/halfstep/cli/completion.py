"""`halfstep completion`: scripts for shells, which complete verbs, options, their choices, and files.

tyro writes such scripts too, but for one parser at a time and by starting Python at each key; a verb's options here
depend on what stands behind it. So the words are written out once, and the script needs nothing else.
"""

import typing
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import tyro
from pydantic import BaseModel

from halfstep.cli.usage import parse
from halfstep.cli.verbs import VERBS

Words = tuple[str, ...]


@dataclass
class CompletionArguments:
    """Print a script with which a shell completes verbs, options, their choices and files. Write it anew after an
    update of halfstep."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def completion(argv: Sequence[str]) -> None:
    """Prints the script."""
    arguments = parse(CompletionArguments, argv, "halfstep completion")
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell]())


def argument_kinds() -> dict[str, type]:
    """The dataclass of each verb's arguments."""
    from halfstep.cli import arguments, doctor, exploring, exporting, importing, status, studying

    return {
        "run": arguments.RunArguments,
        "train": arguments.RunArguments,
        "demo": arguments.RunArguments,
        "distill": arguments.DistillArguments,
        "study": studying.StudyArguments,
        "sample": arguments.SampleArguments,
        "evaluate": arguments.EvaluateArguments,
        "report": arguments.ReportArguments,
        "explore": exploring.ExploreArguments,
        "export": exporting.ExportArguments,
        "import": importing.ImportArguments,
        "encode": exporting.EncodeArguments,
        "status": status.StatusArguments,
        "ls": arguments.ListArguments,
        "doctor": doctor.DoctorArguments,
        "completion": CompletionArguments,
    }


def options_of(verb: str) -> dict[str, Words]:
    """The options of a verb with the choices of their values, which are empty for free ones."""
    from halfstep.cli.arguments import RunArguments
    from halfstep.recipes import Recipe, recipes
    from halfstep.samplers import samplers

    kind = argument_kinds()[verb]
    options: dict[str, Words] = {"--help": ()}
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint = hints[field.name]
        if field.name == "recipe" and Recipe in _unwrapped(hint):
            for make in recipes.values():
                options |= _fields(make())
            options |= {"--data": (), "--to": (), "--start": ()}
        elif not _is_positional(hint):
            options[f"--{field.name.replace('_', '-')}"] = _choices(hint)
    if "--sampler" in options:
        options["--sampler"] = tuple(samplers)
    if kind is RunArguments:
        options.pop("--recipe", None)
    return options


def members_of(verb: str) -> Words:
    """The names that may stand right behind a verb, besides files."""
    from halfstep.cli.commands import families
    from halfstep.recipes import recipes
    from halfstep.studies import studies

    known: dict[str, Iterable[str]] = {"run": recipes, "train": recipes, "study": studies, "ls": families()}
    known |= {"import": ("diffusers", "google-pd"), "completion": ("bash", "zsh", "fish")}
    return tuple(known.get(verb, ()))


def _unwrapped(hint: Any) -> tuple[Any, ...]:
    """The hint and all that it is made of."""
    return (hint, *(part for argument in get_args(hint) for part in _unwrapped(argument)))


def _is_positional(hint: Any) -> bool:
    return any("Positional" in repr(part) for part in getattr(hint, "__metadata__", ()))


def _choices(hint: Any) -> Words:
    parts = _unwrapped(hint)
    if any(get_origin(part) in (tuple, list) for part in parts):
        return ()
    return tuple(str(value) for part in parts if get_origin(part) is Literal for value in get_args(part))


def _is_flag(hint: Any) -> bool:
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return bool in kinds and NoneType not in kinds


def _fields(model: Any, prefix: str = "") -> dict[str, Words]:
    from halfstep.cli.arguments import settings_of

    options: dict[str, Words] = {}
    for name, hint in settings_of(model).items():
        value, plain = getattr(model, name), name.replace("_", "-")
        if isinstance(value, BaseModel) or is_dataclass(value):
            options |= _fields(value, f"{prefix}{plain}.")
            continue
        if any(isinstance(part, type) and issubclass(part, BaseModel) for part in get_args(hint)):
            # Left out of this recipe: its help has no options for it either.
            continue
        options[f"--{prefix}{plain}"] = () if _is_flag(hint) else _choices(hint)
        if _is_flag(hint):
            options[f"--{prefix}no-{plain}"] = ()
    return options


def bash() -> str:
    """The script for bash."""
    values, after, options = [], [], []
    for verb in VERBS:
        known = options_of(verb)
        options.append(f'    {verb}) words="{" ".join(sorted(known))}" ;;')
        values += [f'    "{verb} {option}") words="{" ".join(c)}" ;;' for option, c in known.items() if c]
        if members := members_of(verb):
            after.append(f'    {verb}) words="{" ".join(members)}" ;;')
    return "\n".join(
        [
            "# bash completion for halfstep; written by `halfstep completion bash`",
            "_halfstep() {",
            '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"',
            '  local verb="${COMP_WORDS[1]}" words=""',
            "  COMPREPLY=()",
            "  if (( COMP_CWORD == 1 )); then",
            f'    COMPREPLY=( $(compgen -W "{" ".join(VERBS)} help --help --version" -- "$cur") )',
            "    return",
            "  fi",
            '  case "$verb $prev" in',
            f'    "help help") words="{" ".join(VERBS)}" ;;',
            *values,
            "  esac",
            '  if [[ -n "$words" ]]; then',
            '    COMPREPLY=( $(compgen -W "$words" -- "$cur") )',
            "    return",
            "  fi",
            '  if [[ "$cur" == -* ]]; then',
            '    case "$verb" in',
            *(f"  {line}" for line in options),
            "    esac",
            '    COMPREPLY=( $(compgen -W "$words" -- "$cur") )',
            "    return",
            "  fi",
            "  if (( COMP_CWORD == 2 )); then",
            '    case "$verb" in',
            *(f"  {line}" for line in after),
            "    esac",
            '    COMPREPLY=( $(compgen -W "$words" -- "$cur") )',
            "  fi",
            "  # With nothing of ours, bash completes files.",
            "}",
            "complete -o bashdefault -o default -F _halfstep halfstep",
        ]
    )


def zsh() -> str:
    """The script for zsh: the one of bash, which zsh reads through its own layer for that."""
    return f"#compdef halfstep\nautoload -U +X bashcompinit && bashcompinit\n{bash()}"


def fish() -> str:
    """The script for fish."""
    lines = ["# fish completion for halfstep; written by `halfstep completion fish`"]
    lines.append("complete -c halfstep -n __fish_use_subcommand -f")
    for verb in VERBS.values():
        lines.append(f"complete -c halfstep -n __fish_use_subcommand -a {verb.name} -d {_quoted(verb.summary)}")
    for verb_name in VERBS:
        at = f"complete -c halfstep -n '__fish_seen_subcommand_from {verb_name}'"
        if members := members_of(verb_name):
            lines.append(f"{at} -a '{' '.join(members)}'")
        for option, choices in sorted(options_of(verb_name).items()):
            lines.append(f"{at} -l {option[2:]}" + (f" -x -a '{' '.join(choices)}'" if choices else ""))
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
