"""Recipes: everything a run needs, as typed data with names; each is a Python function that returns one."""

from halfstep.recipes.builtin import cifar10, digits, fashion_mnist, recipes
from halfstep.recipes.schema import (
    ChainConfig,
    EngineConfig,
    EvaluationConfig,
    MLPConfig,
    ModelConfig,
    Recipe,
    TeacherConfig,
    UNetConfig,
    build,
)

__all__ = [
    "ChainConfig",
    "EngineConfig",
    "EvaluationConfig",
    "MLPConfig",
    "ModelConfig",
    "Recipe",
    "TeacherConfig",
    "UNetConfig",
    "build",
    "cifar10",
    "digits",
    "fashion_mnist",
    "recipes",
]
