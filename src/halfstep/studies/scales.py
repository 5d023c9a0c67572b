"""The three scales of the studies. Each defines the training settings, the seeds and the measurements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from halfstep.measure.evaluate import Evaluation
from halfstep.objectives import FINISHING, Training
from halfstep.recipes import Recipe, recipes
from halfstep.recipes.schema import ChainConfig, FinishConfig
from halfstep.train.settings import IDLE

COUNTED: Final = 1_000_000
"""A placeholder for a number of updates that the study computes."""


@final
@dataclass(frozen=True, kw_only=True)
class RoadSettings:
    """Budgets and training settings of the methods in the study `roads`. The recipe's chain sets all other values."""

    passes: Mapping[int, int]
    """The number of forward passes in all stages that lead to a student, by the student's number of steps."""
    finish_share: float = 0.4
    """The share of a student's forward passes that the finish takes."""
    finish: Training = field(default_factory=lambda: replace(FINISHING, num_updates=COUNTED))
    consistency: Training
    grid: tuple[int, int]
    """The numbers of points in the teacher's time grid for consistency distillation: one for the start of training,
    and one for the second half of training."""
    moments: Training

    @property
    def steps(self) -> tuple[int, ...]:
        """The numbers of steps of the students, in descending order."""
        return tuple(sorted(self.passes, reverse=True))


@final
@dataclass(frozen=True, kw_only=True)
class Scale:
    """The settings of all studies at one size."""

    name: str
    recipe: Recipe
    """The recipe for the shared teacher, the shared chain and all measurements."""
    ablation: Recipe
    """The recipe for the teachers in table 1. The study sets the prediction, weighting and seed of each teacher."""
    seeds: int
    """The number of training seeds."""
    gamma_levels: int = 11
    """The number of values of gamma to try with ancestral sampling."""
    ablation_gamma_levels: int = 11
    """The number of values of gamma to try in table 1, which has many cells."""
    steps: tuple[int, ...]
    """The numbers of sampler steps at which methods are compared."""
    ablation_steps: int
    """The number of sampler steps in table 1."""
    updates: tuple[int, ...]
    """The numbers of updates per stage to try in the study `schedules`."""
    rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 3e-4)
    """The learning rates to try in the study `schedules`, which reports the best one."""
    factors: tuple[int, ...] = (2, 4)
    """The numbers of teacher steps per student step to try in the study `schedules`."""
    roads: RoadSettings
    road_seeds: int = 3
    """The number of seeds in the study `roads`."""
    passes_per_second: int | None = None
    """The number of single-sample forward passes per second of training on the intended machine, or None if unknown."""

    def as_data(self, uses: Sequence[str]) -> dict[str, Any]:
        """Return the settings in `uses`, with "evaluation" from the recipe, and without the engine's `IDLE` fields."""
        data: dict[str, Any] = {"name": self.name}
        for name in uses:
            value = self.recipe.evaluation if name == "evaluation" else getattr(self, name)
            idle = {"engine": set(IDLE)} if isinstance(value, Recipe) else None
            held = value.model_dump(exclude=idle) if isinstance(value, BaseModel) else value
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
"""Settings that did not exist when the published studies ran, and the values that reproduce those studies."""


def _as_before(said: Any, name: str) -> Any:
    """Return the data of `name` without newer settings that have the values in `YOUNGER`."""
    if not isinstance(said, dict):
        return said
    kept = {key: value for key, value in said.items() if YOUNGER.get((name, key), ...) != value}
    if not kept.get("finish", {}).get("steps", True):
        del kept["finish"]
    return {key: _as_before(value, key) for key, value in kept.items()}


def _with_chain(recipe: Recipe, start_steps: int, training: Training, **changes: Any) -> Recipe:
    """Return the recipe with the paper's chain, which uses DDIM, starts from many steps and has no finish."""
    chain = ChainConfig(start_steps=start_steps, training=training, **changes)
    return recipe.model_copy(update={"chain": chain, "finish": FinishConfig()})


def smoke() -> Scale:
    """Return a scale for the digits, which takes minutes on two CPU cores."""
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
    consistency = Training(
        num_updates=COUNTED, batch_size=32, learning_rate=2e-3, warmup_updates=10, adam_betas=(0.9, 0.99)
    )
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
                num_updates=COUNTED, batch_size=32, learning_rate=6e-5, adam_betas=(0.0, 0.99), ema_decay=0.98
            ),
            consistency=consistency,
            grid=(8, 64),
            moments=replace(consistency, learning_rate=5e-4, adam_betas=(0.0, 0.99), ema_decay=0.98),
        ),
        passes_per_second=4400,
    )


def small() -> Scale:
    """Return a scale for Fashion-MNIST, which takes hours on one GPU. Without Hub access, use `--data FOLDER`."""
    recipe = _with_chain(recipes["fashion_mnist"](), 256, Training(num_updates=4000, learning_rate=1e-4))
    recipe = recipe.model_copy(update={"evaluation": Evaluation(num_samples=5000, batch_size=1000)})
    consistency = Training(num_updates=COUNTED, batch_size=64, learning_rate=3e-4, warmup_updates=100)
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
            consistency=consistency,
            grid=(16, 128),
            moments=replace(consistency, learning_rate=2e-4, adam_betas=(0.0, 0.99), ema_decay=0.98),
        ),
    )


def paper() -> Scale:
    """Return a scale for CIFAR-10 as in the paper, which takes weeks on one GPU."""
    recipe = recipes["cifar10_paper"]()
    consistency = Training(num_updates=COUNTED, learning_rate=1e-4, warmup_updates=1000)
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
            consistency=consistency,
            grid=(64, 1280),
            moments=replace(consistency, adam_betas=(0.0, 0.99), ema_decay=0.99),
        ),
    )


SCALES: Final[dict[str, Callable[[], Scale]]] = {"smoke": smoke, "small": small, "paper": paper}
