"""Wrap a callable as a network, and find, train and copy the modules that it uses."""

import copy
import dis
import functools
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, final

from torch import Tensor, nn

from halfstep.core.door import got


def _used(value: Any) -> list[nn.Module]:
    """Return the modules that a callable uses, directly or through other callables, in the order of their first use."""
    found: list[nn.Module] = []
    # The values are kept, because the id of a deleted value may be reused.
    seen: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            found.append(value)
        else:
            waiting.extend(reversed(list(_parts(value))))
    return found


def _parts(value: Any) -> Iterable[Any]:
    """Return what a callable closes over, is bound to, stores as attributes or reads from global variables."""
    if isinstance(value, FunctionType):
        if str(value.__module__).partition(".")[0] == "torch":
            # Thousands of torch's functions call each other, but none of them uses a module of the user.
            return [_content(cell) for cell in value.__closure__ or ()]
        held = [part for _, part in _globals(value)]
        held += [_content(cell) for cell in value.__closure__ or ()]
        return [*held, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, list | tuple | set):
        return value
    if isinstance(value, dict):
        return value.values()
    if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
        return ()
    # Objects in attributes are not searched, because they may lead to any other object of the program.
    held = [
        part
        for part in vars(value).values()
        if isinstance(part, nn.Module | FunctionType | MethodType | functools.partial | list | tuple | set | dict)
    ]
    return [*held, type(value).__call__] if callable(value) else held


def _globals(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the global variables that a function and the functions inside it read, with their names.

    An attribute of a Python module, such as `nets.unet`, follows under its dotted name.
    """
    codes = [function.__code__]
    for code in codes:
        codes.extend(constant for constant in code.co_consts if isinstance(constant, CodeType))
        name, value = "", None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                name, value = step.argval, function.__globals__.get(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(value, ModuleType):
                name, value = f"{name}.{step.argval}", vars(value).get(step.argval)
            elif step.opname != "EXTENDED_ARG":
                value = None
            if value is not None:
                yield name, value


def _content(cell: CellType) -> Any:
    """Return the value of a variable of an enclosing function, or None if it has no value yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a callable together with its modules, so that the copy calls the copied modules."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_replaced(value.__func__, memo), _twin(value.__self__, memo))
    if isinstance(value, functools.partial):
        keywords = {name: _twin(part, memo) for name, part in value.keywords.items()}
        return functools.partial(_twin(value.func, memo), *(_twin(part, memo) for part in value.args), **keywords)
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    named = {name: part for name, part in _globals(value) if "." not in name and _used(part)}
    # Functions of one Python module share their global variables, and so do their copies.
    around = memo.setdefault(id(value.__globals__), dict(value.__globals__)) if named else value.__globals__
    cells = [CellType() if _used(_content(cell)) else cell for cell in value.__closure__ or ()]
    made = FunctionType(value.__code__, around, value.__name__, None, tuple(cells))
    # Stored before the parts are copied, because functions may call each other in a circle.
    memo[id(value)] = made
    around.update({name: _twin(part, memo) for name, part in named.items()})
    for cell, before in zip(cells, value.__closure__ or (), strict=True):
        if cell is not before:
            cell.cell_contents = _twin(before.cell_contents, memo)
    made.__defaults__ = value.__defaults__ and tuple(_replaced(part, memo) for part in value.__defaults__)
    made.__kwdefaults__ = value.__kwdefaults__ and {
        name: _replaced(part, memo) for name, part in value.__kwdefaults__.items()
    }
    made.__module__, made.__qualname__ = value.__module__, value.__qualname__
    vars(made).update(vars(value))
    return made


def _replaced(value: Any, memo: dict[int, Any]) -> Any:
    """Return a copy of a value that uses modules, or any other value itself."""
    return _twin(value, memo) if _used(value) else value


@final
class CallableNetwork(nn.Module):
    """A module that wraps a callable `(x_t, time, **cond) -> output`, with the modules that it uses as submodules.

    Modules are found in variables of enclosing functions, default values, global variables, attributes of Python
    modules and of the callable, and lists, tuples, sets and dicts of these. The same applies to all callables that the
    callable uses. A copy is refused if modules are used in a way that cannot be copied.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(_used(function))

    def forward(self, x_t: Tensor, time: Tensor, **cond: Tensor) -> Tensor:
        return self.function(x_t, time, **cond)

    def __deepcopy__(self, memo: dict[int, Any]) -> "CallableNetwork":
        for part in self.parts:
            copy.deepcopy(part, memo)
        twin = CallableNetwork(_twin(self.function, memo))
        if set(twin.parts) & set(self.parts) or len(twin.parts) != len(self.parts):
            raise ValueError(
                f"the network is {got(self.function)}, and its modules cannot be copied. Make it an nn.Module that "
                "contains these modules"
            )
        memo[id(self)] = twin
        return twin.train(self.training)
