"""The three scales of every study: what is trained, how often, and how it is measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import FINISHING, Training
from halfstep.recipes import Recipe, recipes
from halfstep.recipes.schema import ChainConfig, FinishConfig
from halfstep.train.settings import IDLE

COUNTED: Final = 1_000_000
"""Placeholder for the updates of a training if the study computes them itself."""


@final
@dataclass(frozen=True, kw_only=True)
class RoadSettings:
    """Budgets and training settings of each method in the study of roads; the recipe's chain sets the rest."""

    passes: Mapping[int, int]
    """Forward passes of all stages that lead to a student, by its steps."""
    finish_share: float = 0.4
    """Share of a finished student's passes that is spent on its finish."""
    finish: Training
    consistency: Training
    grid: tuple[int, int]
    """Times in the teacher's grid for consistency distillation, at the first update and from half of the stage on."""
    moments: Training

    @property
    def steps(self) -> tuple[int, ...]:
        """Steps of the students, in descending order."""
        return tuple(sorted(self.passes, reverse=True))


@final
@dataclass(frozen=True, kw_only=True)
class Scale:
    """The settings of all studies at one size."""

    name: str
    recipe: Recipe
    """Recipe for the teacher and the chain that the studies share, and for the protocol of all measurements."""
    ablation: Recipe
    """Recipe for the teachers of table 1, before prediction, weighting and seed are set."""
    seeds: int
    """Number of seeds for repeated training."""
    gamma_levels: int = 11
    """Levels of the search over the variance of ancestral sampling."""
    ablation_gamma_levels: int = 11
    """The same for table 1, which has many cells."""
    steps: tuple[int, ...]
    """Sampler steps at which methods are compared."""
    ablation_steps: int
    """Sampler steps of table 1."""
    updates: tuple[int, ...]
    """Updates per stage to try in the study of schedules."""
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 3e-4)
    """Learning rates to try there; the best one counts."""
    factors: tuple[int, ...] = (2, 4)
    """Teacher steps that one student step replaces there."""
    roads: RoadSettings
    """Settings of the study of roads."""
    road_seeds: int = 3
    """Number of seeds there."""
    passes_per_second: int | None = None
    """Forward passes per second of one sample in training, on the machine that the scale is for; None if unknown."""

    def as_data(self, uses: Sequence[str]) -> dict[str, Any]:
        """Return the settings listed in `uses`, JSON-ready, without `IDLE` fields of a recipe's engine.

        "evaluation" is the recipe's.
        """
        data: dict[str, Any] = {"name": self.name}
        for name in uses:
            value = self.recipe.evaluation if name == "evaluation" else getattr(self, name)
            left_out = {"engine": set(IDLE)} if isinstance(value, Recipe) else None
            held = value.model_dump(exclude=left_out) if isinstance(value, BaseModel) else value
            data[name] = _as_before(to_jsonable_python(held), name)
        return data


YOUNGER: Final[Mapping[tuple[str, str], Any]] = {
    ("evaluation", "precision"): "float32",
    ("evaluation", "teacher_heun_steps"): [32],
    ("chain", "teacher_sampler"): "ddim",
    ("chain", "teacher_steps"): None,
    ("chain", "critic_weight"): None,
    ("data", "accept_changed"): False,
    ("data", "skip_broken"): False,
}
"""Settings that were added after the published studies, with the value that applied to those."""


def _as_before(said: Any, name: str) -> Any:
    """Return the data of `name` without settings that were added after the published studies and change nothing."""
    if not isinstance(said, dict):
        return said
    kept = {key: value for key, value in said.items() if YOUNGER.get((name, key), ...) != value}
    if not kept.get("finish", {}).get("steps", True):
        del kept["finish"]
    return {key: _as_before(value, key) for key, value in kept.items()}


def _with_chain(recipe: Recipe, start_steps: int, training: Training, **changes: Any) -> Recipe:
    """Return the recipe with a chain as in the paper, DDIM from many steps, which the studies examine."""
    chain = ChainConfig(start_steps=start_steps, training=training, **changes)
    return recipe.model_copy(update={"chain": chain, "finish": FinishConfig()})


def smoke() -> Scale:
    """Digits, minutes on two CPU cores: checks that everything runs, and shows the effects visible at this size."""
    recipe = _with_chain(
        recipes["digits"](),
        64,
        Training(num_updates=800, batch_size=64, learning_rate=5e-4, warmup_updates=20, adam_betas=(0.9, 0.99)),
        updates_at={32: 100, 16: 200, 8: 650, 2: 650, 1: 750},
        learning_rate_at={32: 1.5e-4, 16: 2e-4, 8: 4e-4, 2: 7e-4, 1: 1e-3},
    )
    recipe = recipe.model_copy(
        update={
            "teacher": replace(recipe.teacher, num_updates=1500, batch_size=128),
            "evaluation": Evaluation(num_samples=1000, num_reference=1797, batch_size=500),
        }
    )
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
        roads=RoadSettings(
            passes={8: 120_000, 4: 160_000, 2: 200_000, 1: 250_000},
            finish=Training(
                num_updates=COUNTED, batch_size=32, learning_rate=1e-4, adam_betas=(0.0, 0.99), ema_decay=0.98
            ),
            consistency=Training(
                num_updates=COUNTED, batch_size=32, learning_rate=2e-3, warmup_updates=10, adam_betas=(0.9, 0.99)
            ),
            grid=(8, 64),
            moments=Training(
                num_updates=COUNTED,
                batch_size=32,
                learning_rate=5e-4,
                warmup_updates=10,
                adam_betas=(0.0, 0.99),
                ema_decay=0.98,
            ),
        ),
        passes_per_second=4400,
    )


def small() -> Scale:
    """Fashion-MNIST, hours on one GPU; use `--data FOLDER` without access to the Hub."""
    recipe = _with_chain(recipes["fashion_mnist"](), 256, Training(num_updates=4000, learning_rate=1e-4))
    recipe = recipe.model_copy(update={"evaluation": Evaluation(num_samples=5000, batch_size=1000)})
    return Scale(
        name="small",
        recipe=recipe,
        ablation=recipe.model_copy(update={"teacher": replace(recipe.teacher, num_updates=10_000)}),
        seeds=3,
        steps=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        ablation_steps=128,
        updates=(500, 1000, 2500, 5000),
        roads=RoadSettings(
            passes={8: 500_000, 4: 700_000, 2: 900_000, 1: 1_100_000},
            finish=replace(FINISHING, num_updates=COUNTED),
            consistency=Training(num_updates=COUNTED, batch_size=64, learning_rate=3e-4, warmup_updates=100),
            grid=(16, 128),
            moments=Training(
                num_updates=COUNTED,
                batch_size=64,
                learning_rate=2e-4,
                warmup_updates=100,
                adam_betas=(0.0, 0.99),
                ema_decay=0.98,
            ),
        ),
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
        roads=RoadSettings(
            passes={8: 320_000_000, 4: 352_000_000, 2: 416_000_000, 1: 480_000_000},
            finish=replace(FINISHING, num_updates=COUNTED),
            consistency=Training(num_updates=COUNTED, learning_rate=1e-4, warmup_updates=1000),
            grid=(64, 1280),
            moments=Training(
                num_updates=COUNTED, learning_rate=1e-4, warmup_updates=1000, adam_betas=(0.0, 0.99), ema_decay=0.99
            ),
        ),
    )


SCALES: Final[dict[str, Callable[[], Scale]]] = {"smoke": smoke, "small": small, "paper": paper}
