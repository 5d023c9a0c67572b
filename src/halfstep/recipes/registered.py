"""The registry of recipes, apart from them so that each file of recipes can enter its own."""

from collections.abc import Callable

from halfstep.recipes.schema import Recipe
from halfstep.registry import Registry

recipes: Registry[Callable[[], Recipe]] = Registry("recipe")
