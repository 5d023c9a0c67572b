"""Recipes: named functions that return everything a run needs, as typed data."""

from halfstep.recipes.building import build
from halfstep.recipes.builtin import arrays, cifar10, digits, digits_long, fashion_mnist, images
from halfstep.recipes.networks import MLPConfig, UNetConfig
from halfstep.recipes.paper import cifar10_paper, imagenet64_paper, lsun_bedroom128_paper, lsun_church128_paper
from halfstep.recipes.schema import ChainConfig, DataFacts, ModelConfig, Recipe, recipes
