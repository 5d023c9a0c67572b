"""The output of `halfstep VERB --help`: the most commonly used options or, with --help-all, every option."""

import re
import shutil
import textwrap
from argparse import Action, ArgumentParser
from collections.abc import Iterator, Mapping
from typing import Final

from halfstep.cli.verbs import VERBS, epilogue
from halfstep.runtime.terminal import printable

HELP: Final = ("-h", "--help", "--help-all")
"""The options that print the help."""
WIDEST: Final = 100
HEAD: Final = 28
"""The width, in characters, of the column with option names and values."""


def help_text(parser: ArgumentParser, prog: str, short: Mapping[str, str], everything: bool) -> str:
    """Return the help text of a verb.

    Args:
        prog: the command without its options.
        short: the short names of options, which are shown unless `everything` is set.
        everything: whether to show all options.
    """
    verb = VERBS[prog.split()[1]]
    chosen = () if everything else verb.shown
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    groups = [(group.title or "", list(_shown(group._group_actions, chosen, short))) for group in parser._action_groups]
    names = [name for title, rows in groups for name, _ in rows if title.startswith("positional")]
    lines = [*_wrap(f"usage: {prog} {' '.join([*names, '[OPTIONS]'])}", width, "  ", ""), ""]
    lines += [*_wrap(_words(parser.description), width), ""]
    if chosen:
        texts = {name: _first_sentence(text) for _, rows in groups for name, text in rows}
        lines += ["options:"]
        for option in chosen:
            lines += next(
                _lines(name, text, width) for name, text in texts.items() if re.split("[ ,]", name)[0] == option
            )
        lines += [*_lines("--help-all", "Show every option.", width), ""]
    else:
        for title, rows in groups:
            if rows:
                lines += [f"{title.removeprefix('positional ')}:"]
                lines += [line for name, text in rows for line in _lines(name, text, width)] + [""]
    lines += epilogue(verb.name, width, short=bool(chosen))
    return printable("\n".join(lines)).replace(r"\xa0", " ")


def _shown(actions: list[Action], chosen: tuple[str, ...], short: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each option of a group with its help text. Chosen options are shown with their short names."""
    shorter = {long: name for name, long in short.items() if name in chosen}
    for action in actions:
        if action.option_strings[:1] == ["-h"]:
            if not chosen:
                yield "-h, --help", "Show this help; --help-all shows every option."
            continue
        names = [shorter.get(name, name) for name in action.option_strings]
        value = "" if action.nargs == 0 else _metavar(str(action.metavar))
        text, default = _parted(action.help or "")
        is_off = default in ("", "None", "required") or "by default" in text
        if action.nargs == 0:
            is_off = len(names) == 1
            default = "on" if default == "True" else "off"
        yield f"{', '.join(names)} {value}".strip(), text if is_off else f"{text} (default:\xa0{default})"


def _first_sentence(text: str) -> str:
    """Return the first sentence of an option's help text, followed by the option's default."""
    sentence, mark, rest = text.partition(". ")
    default = re.search(r"\(default:\xa0.*\)$", rest)
    return f"{sentence}{mark.rstrip()}" + (f" {default[0]}" if default else "")


def _words(text: str | None) -> str:
    return " ".join((text or "").split())


def _parted(text: str) -> tuple[str, str]:
    """Split a help text from tyro into the description and the default."""
    found = re.fullmatch(r"(.*?)(?: ?\(default: (.*)\)| ?\((required)\))?", _words(text))
    assert found is not None
    return found[1], found[2] or found[3] or ""


def _metavar(text: str) -> str:
    """Remove {None} and nested brackets from tyro's placeholder for a value."""
    text = re.sub(r"\{None\}\|\{(.*)\}$", r"\1", text)
    text = re.sub(r"\[(.+) \[\1 \.\.\.\]\]", r"\1 ...", text)
    return text.replace("{None,", "{").replace(",None}", "}")


def _wrap(text: str, width: int, indent: str = "", first: str | None = None) -> list[str]:
    """Wrap text, breaking lines only at spaces."""
    head = indent if first is None else first
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)


def _lines(name: str, text: str, width: int) -> list[str]:
    indent = " " * (HEAD + 2)
    wrapped = _wrap(text, width, indent)
    if len(name) + 4 <= len(indent) and wrapped:
        return [f"  {name}".ljust(len(indent)) + wrapped[0].lstrip(), *wrapped[1:]]
    return [f"  {name}", *wrapped]
