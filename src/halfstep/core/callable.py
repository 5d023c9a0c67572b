"""Wrap a callable as a network, and find, train and copy the modules that it uses."""

import copy
import functools
from collections.abc import Callable, Iterator
from types import CellType, FunctionType, MethodType
from typing import Any, final

from torch import Tensor, nn

from halfstep.core.door import got


def _used(value: Any) -> Iterator[nn.Module]:
    """Yield the modules that a callable closes over, is bound to, or stores as attributes."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, FunctionType):
        for held in _closed_over(value).values():
            yield from _used(held)
    elif isinstance(value, MethodType):
        yield from _used(value.__self__)
    elif isinstance(value, functools.partial):
        for held in (value.func, *value.args, *value.keywords.values()):
            yield from _used(held)
    elif not isinstance(value, type) and hasattr(value, "__dict__"):
        yield from (held for held in vars(value).values() if isinstance(held, nn.Module))


def _closed_over(function: FunctionType) -> dict[str, Any]:
    """Return the callables and modules that a function closes over, and the global modules that it uses."""
    found = ((name, function.__globals__.get(name)) for name in function.__code__.co_names)
    held: dict[str, Any] = {name: value for name, value in found if isinstance(value, nn.Module)}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = cell.cell_contents
        if value is not function and isinstance(value, nn.Module | FunctionType | MethodType | functools.partial):
            held[name] = value
    return held


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """Copy a callable together with its modules, so that the copy calls the copied modules."""
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    held = {name: _twin(part, memo) for name, part in _closed_over(value).items()}
    cells = [
        CellType(held[name]) if name in held else cell
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    ]
    around = value.__globals__ | {name: part for name, part in held.items() if name in value.__code__.co_names}
    made = FunctionType(value.__code__, around, value.__name__, value.__defaults__, tuple(cells))
    made.__kwdefaults__ = value.__kwdefaults__
    return made


@final
class CallableNetwork(nn.Module):
    """A module that wraps a callable `(x_t, time, **cond) -> output`, with the modules it calls as submodules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(dict.fromkeys(_used(function)))

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
