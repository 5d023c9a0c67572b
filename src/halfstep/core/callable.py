"""Wrap a callable as a network, and find, train and copy the modules that it uses."""

import contextlib
import copy
import dis
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import resolve_name
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, Literal, NamedTuple, final

from torch import Tensor, nn

from halfstep.core.door import got


@final
class _Search:
    """The modules that a callable uses, directly or through other callables, in the order of their first use."""

    def __init__(self, function: Any) -> None:
        self.modules: list[nn.Module] = []
        # The values are kept, because the id of a deleted value may be reused.
        self._seen: dict[int, Any] = {}
        users: dict[int, list[int]] = {}
        waiting = [function]
        while waiting:
            value = waiting.pop()
            if id(value) in self._seen:
                continue
            self._seen[id(value)] = value
            if isinstance(value, nn.Module):
                self.modules.append(value)
                continue
            parts = [part for part in _parts(value) if _may_use_modules(part)]
            for part in parts:
                users.setdefault(id(part), []).append(id(value))
            waiting.extend(reversed(parts))
        self._using: set[int] = set()
        found = [id(module) for module in self.modules]
        while found:
            using = found.pop()
            if using not in self._using:
                self._using.add(using)
                found.extend(users.get(using, ()))

    def uses_modules(self, part: Any) -> bool:
        """Return whether a part of the callable is a module or uses one."""
        return id(part) in self._using


def _may_use_modules(value: Any) -> bool:
    """Return whether a value can lead to modules. Numbers, text, tensors and arrays cannot."""
    if isinstance(value, type | ModuleType | Tensor):
        return False
    return isinstance(value, MethodType | list | tuple | set | dict) or hasattr(value, "__dict__")


def _parts(value: Any) -> Iterable[Any]:
    """Return what a callable closes over, is bound to, stores as attributes or reads from global variables."""
    if isinstance(value, FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        if str(value.__module__).partition(".")[0] == "torch":
            # Thousands of torch's functions call each other, but none of them uses a module of the user.
            return cells
        held = [*(part for _, part in _read(value)), *cells]
        return [*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, dict):
        return value.values()
    if not _may_use_modules(value):
        return ()
    # Objects in attributes are not searched, because they may lead to any other object of the program.
    held = [
        part
        for part in vars(value).values()
        if isinstance(part, nn.Module | FunctionType | MethodType | functools.partial | list | tuple | set | dict)
    ]
    held += [part for kind in type(value).__mro__ for part in vars(kind).values() if isinstance(part, nn.Module)]
    return [*held, type(value).__call__] if callable(value) else held


class _Path(NamedTuple):
    """A global variable, a variable of an enclosing function or a Python module, followed by names of attributes."""

    source: Literal["global", "closure", "import"]
    names: tuple[str, ...]


def _read(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function and the functions inside it read, with their names.

    An attribute of a Python module or of a class, such as `nets.unet`, follows under its dotted name.
    """
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    for path in _paths(function.__code__):
        first, *names = path.names
        value: Any = None
        if path.source == "global":
            value = function.__globals__.get(first)
        elif path.source == "import":
            with contextlib.suppress(ImportError):
                value = sys.modules.get(resolve_name(first, function.__globals__.get("__package__")))
        elif first in closure:
            value = _content(closure[first])
        for name in names:
            value = _attribute(value, name)
        if value is not None:
            yield ".".join(path.names), value


def _attribute(value: Any, name: str) -> Any:
    """Return an attribute of a Python module or of a class, without running a descriptor, or None."""
    if isinstance(value, ModuleType):
        return vars(value).get(name)
    if isinstance(value, type):
        found = next((vars(kind)[name] for kind in value.__mro__ if name in vars(kind)), None)
        return found.__func__ if isinstance(found, staticmethod | classmethod) else found
    return None


@functools.lru_cache(4096)
def _paths(code: CodeType) -> tuple[_Path, ...]:
    """Return the paths of the global variables and attributes that a function and its inner functions read."""
    codes = [code]
    cells: dict[str, _Path] = {}
    found: dict[_Path, None] = {}
    for inner in codes:
        codes.extend(constant for constant in inner.co_consts if isinstance(constant, CodeType))
        found |= dict.fromkeys(_paths_of_one(inner, cells))
    return tuple(found)


def _paths_of_one(code: CodeType, cells: dict[str, _Path]) -> Iterator[_Path]:
    """Yield what one code object reads.

    Args:
        cells: the paths assigned so far to variables shared with inner functions, keyed by name.
    """
    variables: dict[str, _Path] = {}
    steps = [(name, value) for step in dis.get_instructions(code) for name, value in _operations(step)]
    path = imported = None
    for number, (operation, name) in enumerate(steps):
        known = cells if operation.endswith("DEREF") else variables
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            path = _Path("global", (name,))
            yield path
        elif operation.startswith("LOAD_FAST"):
            path = known.get(name)
        elif operation == "LOAD_DEREF":
            path = known.get(name, _Path("closure", (name,)))
        elif operation in ("STORE_FAST", "STORE_DEREF"):
            known.pop(name, None)
            if path is not None:
                known[name] = path
            path = None
        elif operation in ("LOAD_ATTR", "LOAD_METHOD") and path is not None:
            path = _Path(path.source, (*path.names, name))
            yield path
        elif operation == "IMPORT_NAME":
            (_, level), (_, of) = steps[number - 2 : number]
            # `import a.b` assigns the package a.
            path = imported = _Path("import", ("." * level + name if of or level else name.partition(".")[0],))
        elif operation == "IMPORT_FROM" and imported is not None:
            path = _Path("import", (*imported.names, name))
            if not of:
                imported = path
            yield path
        elif operation not in ("SWAP", "POP_TOP", "PUSH_NULL"):
            path = None


def _operations(step: dis.Instruction) -> Iterator[tuple[str, Any]]:
    """Yield the operations of an instruction. Since Python 3.13, an instruction may use two variables."""
    if step.opname.count("_FAST") == 2:
        first, second = step.argval
        yield "STORE_FAST" if step.opname.startswith("STORE") else "LOAD_FAST", first
        yield "STORE_FAST" if step.opname.endswith("STORE_FAST") else "LOAD_FAST", second
    elif step.opname != "EXTENDED_ARG":
        yield step.opname, step.argval


def _content(cell: CellType) -> Any:
    """Return the value of a variable of an enclosing function, or None if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


@final
class _Copier:
    """Copies a callable together with its modules, so that the copy calls the copied modules.

    Args:
        search: the modules of the callable.
        memo: the copies made so far, keyed by id, as in `copy.deepcopy`.
    """

    def __init__(self, search: _Search, memo: dict[int, Any]) -> None:
        self._search, self._memo = search, memo

    def twin(self, value: Any) -> Any:
        """Copy a value that uses modules."""
        memo = self._memo
        if id(value) in memo:
            return memo[id(value)]
        if isinstance(value, MethodType):
            return MethodType(self._replaced(value.__func__), self.twin(value.__self__))
        if isinstance(value, functools.partial):
            keywords = {name: self.twin(part) for name, part in value.keywords.items()}
            return functools.partial(self.twin(value.func), *(self.twin(part) for part in value.args), **keywords)
        if not isinstance(value, FunctionType):
            return copy.deepcopy(value, memo)
        uses = self._search.uses_modules
        named = {name: part for name, part in _read(value) if "." not in name and uses(part)}
        # Functions of one Python module share their global variables, and so do their copies.
        around = memo.setdefault(id(value.__globals__), dict(value.__globals__)) if named else value.__globals__
        cells = [CellType() if uses(_content(cell)) else cell for cell in value.__closure__ or ()]
        made = FunctionType(value.__code__, around, value.__name__, None, tuple(cells))
        # Stored before the parts are copied, because functions may be mutually recursive.
        memo[id(value)] = made
        around.update({name: self.twin(part) for name, part in named.items()})
        for cell, before in zip(cells, value.__closure__ or (), strict=True):
            if cell is not before:
                cell.cell_contents = self.twin(before.cell_contents)
        made.__defaults__ = value.__defaults__ and tuple(map(self._replaced, value.__defaults__))
        made.__kwdefaults__ = value.__kwdefaults__ and self._all_replaced(value.__kwdefaults__)
        made.__module__, made.__qualname__ = value.__module__, value.__qualname__
        vars(made).update(self._all_replaced(vars(value)))
        return made

    def _replaced(self, value: Any) -> Any:
        """Return a copy of a value that uses modules, or any other value itself."""
        return self.twin(value) if self._search.uses_modules(value) else value

    def _all_replaced(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: self._replaced(value) for name, value in values.items()}


@final
class CallableNetwork(nn.Module):
    """A module that wraps a callable `(x_t, time, **cond) -> output`, with the modules that it uses as submodules.

    The search follows global variables, variables of enclosing functions, default values, and attributes of the
    callable and its class. It also follows attributes of functions, classes and Python modules that the code names,
    and the entries of lists, tuples, sets and dicts. Every callable that it finds is searched in the same way. Copying
    raises ValueError if the copy would still use one of the original modules, for example an attribute of a Python
    module.

    Modules that are used in any other way are neither trained nor copied, for example those returned by a call such as
    `getattr`, those in attributes of an object in an attribute, or those that only a method called through `self` uses.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(_Search(function).modules)

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.function(x_t, time, **cond)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallableNetwork":
        for part in self.parts:
            copy.deepcopy(part, memo)
        twin = CallableNetwork(_Copier(_Search(self.function), memo).twin(self.function))
        if set(twin.parts) & set(self.parts) or len(twin.parts) != len(self.parts):
            raise ValueError(
                f"the network is {got(self.function)}, and its modules cannot be copied. Make it an nn.Module that "
                "contains these modules"
            )
        memo[id(self)] = twin
        return twin.train(self.training)
