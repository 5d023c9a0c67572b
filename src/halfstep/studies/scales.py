"""The three sizes of every study: what is trained, how often, and how it is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import Training
from halfstep.recipes import Recipe, recipes
from halfstep.recipes.schema import IDLE


@final
@dataclass(frozen=True, kw_only=True)
class Scale:
    """The settings of all studies at one size."""

    name: str
    recipe: Recipe
    """Of the teacher and the chain that the studies share, and of the protocol by which all is measured."""
    ablation: Recipe
    """Of the teachers of table 1, before prediction, weighting and seed are set."""
    seeds: int
    """Repetitions of what is trained several times."""
    gamma_levels: int = 11
    """Levels of the search over the variance of ancestral sampling."""
    ablation_gamma_levels: int = 11
    """The same in table 1, whose cells are many."""
    steps: tuple[int, ...]
    """Sampler steps at which methods are compared."""
    ablation_steps: int
    """Sampler steps of table 1."""
    updates: tuple[int, ...]
    """Updates of a stage in the study of schedules."""
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 3e-4)
    """Learning rates of which the best is taken there."""
    factors: tuple[int, ...] = (2, 4)
    """Teacher steps that a student's step replaces there."""

    def as_data(self, uses: Sequence[str]) -> dict[str, Any]:
        """Return the settings named in `uses`, JSON-ready, without fields of a recipe's engine that are `IDLE`.

        "evaluation" is the recipe's.
        """
        data: dict[str, Any] = {"name": self.name}
        for name in uses:
            value = self.recipe.evaluation if name == "evaluation" else getattr(self, name)
            left_out = {"engine": set(IDLE)} if isinstance(value, Recipe) else None
            held = value.model_dump(exclude=left_out) if isinstance(value, BaseModel) else value
            data[name] = said = to_jsonable_python(held)
            for part in (said, said.get("evaluation") if isinstance(said, dict) else None):
                # A setting that is younger than existing studies, and had this value in all of them.
                if isinstance(part, dict) and part.get("precision") == "float32" and "num_samples" in part:
                    del part["precision"]
        return data


def smoke() -> Scale:
    """Digits, minutes on two CPU cores: shows that all runs, and what shows at this size."""
    recipe = recipes["digits"]()
    recipe = recipe.model_copy(update={"evaluation": Evaluation(num_samples=1000, num_reference=1797, batch_size=500)})
    teacher = Training(
        num_updates=700, batch_size=64, learning_rate=2e-3, warmup_updates=20, adam_betas=(0.9, 0.99), ema_decay=0.98
    )
    network = recipe.network.model_copy(update={"block_out_channels": (24, 48)})
    return Scale(
        name="smoke",
        recipe=recipe,
        ablation=recipe.model_copy(update={"teacher": teacher, "network": network}),
        seeds=2,
        gamma_levels=6,
        ablation_gamma_levels=3,
        steps=(1, 2, 4, 8, 16, 32, 64),
        ablation_steps=32,
        updates=(30, 60, 120),
        rates=(3e-4, 1e-3),
    )


def small() -> Scale:
    """Fashion-MNIST, hours on one GPU; `--data FOLDER` where the Hub is out of reach."""
    recipe = recipes["fashion_mnist"]()
    recipe = recipe.model_copy(update={"evaluation": Evaluation(num_samples=5000, batch_size=1000)})
    return Scale(
        name="small",
        recipe=recipe,
        ablation=recipe.model_copy(update={"teacher": replace(recipe.teacher, num_updates=10_000)}),
        seeds=3,
        steps=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        ablation_steps=128,
        updates=(500, 1000, 2500, 5000),
    )


def paper() -> Scale:
    """CIFAR-10 as in the paper, weeks on one GPU."""
    recipe = recipes["cifar10_paper"]()
    return Scale(
        name="paper",
        recipe=recipe,
        ablation=recipe.model_copy(update={"teacher": replace(recipe.teacher, num_updates=2_000_000)}),
        seeds=4,
        steps=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        ablation_steps=1024,
        updates=(5000, 10_000, 25_000, 50_000),
    )


SCALES: Final[dict[str, Callable[[], Scale]]] = {"smoke": smoke, "small": small, "paper": paper}
