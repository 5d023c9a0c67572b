"""Registries of objects that the command line and manifests refer to by name."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, TypeVar

Member = TypeVar("Member")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint `; did you mean 'x'?` for a mistyped `name`, or "" if no known name is similar."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


_families: "dict[str, Registry[Any]]" = {}


def family_of(names: Set[str]) -> "Registry[Any] | None":
    """Return the registry whose member names are exactly `names`, or None."""
    return next((family for family in _families.values() if family.keys() == names), None)


class Registry(dict[str, Member]):
    """The named members of one family, in order of registration. Looking up an unknown name raises ValueError."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family
        _families[family] = self

    def register(self, name: str) -> Callable[[Member], Member]:
        """Return a decorator that registers the decorated object under `name`.

        Raises:
            ValueError: if the name is already registered.
        """

        def enter(member: Member) -> Member:
            if name in self:
                raise ValueError(f"the {self.family} {name!r} is registered twice. Rename one of them")
            self[name] = member
            return member

        return enter

    def __missing__(self, name: str) -> Member:
        raise ValueError(self.unknown(name))

    def unknown(self, name: str) -> str:
        """Return the error message for a name that is not registered, including advice on how to register it."""
        return (
            f"unknown {self.family} {name!r}{nearest(name, self)} (known: {', '.join(self)}). If your own file "
            "registers it, import that file. On the command line, end the file with halfstep.cli.main() and run: "
            "python FILE VERB ..."
        )

    def describe(self, member: object) -> dict[str, Any]:
        """Describe an instance of a registered dataclass as a dict from which `rebuild` recreates the instance.

        The dict is {"type": name, **fields}. An instance of another registered dataclass in a field, or in a tuple
        or dict in a field, is described as {"family": family, **description}.

        Raises:
            ValueError: if `member` is not a dataclass, or its class is not registered.
        """
        if not dataclasses.is_dataclass(member):
            raise ValueError(f"{member!r} cannot be stored. Make its class a dataclass: @dataclass(frozen=True)")
        fields = {field.name: _described(getattr(member, field.name)) for field in dataclasses.fields(member)}
        return {"type": self.name_of(member), **fields}

    def rebuild(self, data: Mapping[str, Any]) -> Any:
        """Recreate an instance from its description, as returned by `describe`. Lists, as in JSON, become tuples.

        Raises:
            ValueError: if the type is unknown, or if the description does not match the type's fields.
        """
        fields = {name: _rebuilt(value) for name, value in data.items()}
        kind: Any = self[str(fields.pop("type", "(none)"))]
        try:
            return kind(**fields)
        except TypeError as error:
            raise ValueError(f"the fields of this {self.family} do not match {kind.__name__}: {error}") from None

    def name_of(self, member: object) -> str:
        """Return the name under which `member` or its class is registered.

        Raises:
            ValueError: if neither `member` nor its class is registered.
        """
        for name, known in self.items():
            if known is member or known is type(member):
                return name
        raise ValueError(
            f"{member!r} is not a registered {self.family}. Decorate its class with the .register('my_name') method "
            "of the family's registry, as CONTRIBUTING.md shows"
        )


def _described(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_described(part) for part in value)
    if isinstance(value, Mapping):
        return {name: _described(part) for name, part in value.items()}
    if dataclasses.is_dataclass(value):
        for registry in _families.values():
            if type(value) in registry.values():
                return {"family": registry.family, **registry.describe(value)}
    return value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list | tuple):
        # JSON has no tuples, and a frozen dataclass with a list in a field has no hash.
        return tuple(_rebuilt(part) for part in value)
    if not isinstance(value, Mapping):
        return value
    if value.get("family") in _families:
        return _families[value["family"]].rebuild({name: part for name, part in value.items() if name != "family"})
    return {name: _rebuilt(part) for name, part in value.items()}
