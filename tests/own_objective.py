"""A researcher's file with an objective with two networks of its own and a recipe that uses it. src contains neither.

python tests/own_objective.py run own_game --data points.npy --out runs/own
"""

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from halfstep.cli import main
from halfstep.core.draw import Draw
from halfstep.core.noise import as_clock
from halfstep.data import DataConfig
from halfstep.nets import copy_denoiser
from halfstep.objectives import (
    STUDENT,
    Auxiliary,
    Average,
    Batch,
    EarlyEnd,
    Evals,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    Training,
    Turn,
    objectives,
)
from halfstep.recipes import ChainConfig, MLPConfig, Recipe, recipes
from halfstep.samplers import Heun
from halfstep.train.settings import Engine


@dataclass(frozen=True)
class Game(Objective):
    """An auxiliary denoiser learns the student's samples, and the student moves to where the teacher is more certain.

    An average of the student stabilises it.
    """

    num_steps: int = 4
    pull: float = 0.5
    needs_teacher: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.STUDENT, self.num_steps, Heun())

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(2, 1), "teacher": Evals(1), "critic": Evals(2, 1), "slow": Evals(1)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {
            "critic": Auxiliary(
                lambda models, _: copy_denoiser(models.student),
                lambda own: replace(own, learning_rate=2 * own.learning_rate, ema_decay=0.0, early_end=EarlyEnd()),
            ),
            "slow": Average(0.9),
        }

    def turns(self, update: int) -> tuple[Turn, ...]:
        return Turn("critic", self.critic_loss), Turn(STUDENT, self.loss)

    def _noisy(self, batch: Batch, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        index = draw.integers("time", self.num_steps)
        t = as_clock((index + 1) / self.num_steps, batch.x0)
        return t, draw.normal("noise", batch.x0.shape[1:]).to(batch.x0)

    def critic_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        t, eps = self._noisy(batch, draw)
        process = models.student.process
        with torch.no_grad():
            made = models.student(process.mix(batch.x0, eps, t), t, batch.cond).x0
        again = process.mix(made, draw.normal("again", batch.x0.shape[1:]).to(batch.x0), t)
        error = (models.helpers["critic"](again, t, batch.cond).x0 - made).square().flatten(1).mean(1)
        return Losses(error, process.log_snr(t))

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        if os.environ.get("KILLED_AT") == str(draw.update):
            # In the student's turn, after the critic's step.
            os.kill(os.getpid(), signal.Signals[os.environ["KILLED_BY"]])
        t, eps = self._noisy(batch, draw)
        process = models.student.process
        x_t = process.mix(batch.x0, eps, t)
        own = models.student(x_t, t, batch.cond).x0
        assert models.teacher is not None
        with torch.no_grad():
            target = models.teacher(x_t, t, batch.cond).x0
            slow = models.helpers["slow"](x_t, t, batch.cond).x0
        # Through the critic's input, so the critic's weights also get gradients unless the engine stops them.
        judged = models.helpers["critic"](process.mix(own, eps, t), t, batch.cond).x0
        error = (own - target).square() + 0.1 * (own - slow).square() + self.pull * (judged - target).square()
        return Losses(error.flatten(1).mean(1), process.log_snr(t))


def own_game() -> Recipe:
    """Return a recipe with points, a small MLP, 8 -> 4 steps, and then the game at 4."""
    student = Training(num_updates=12, batch_size=16, learning_rate=1e-3)
    settings: dict[str, Any] = {"type": "own_game", "num_steps": 4, "pull": 0.5}
    return Recipe.model_validate(
        {
            "name": "own_game",
            "data": DataConfig(source="points.npy"),
            "network": MLPConfig(width=16, depth=1),
            "teacher": Training(num_updates=10, batch_size=16, learning_rate=1e-3),
            "chain": ChainConfig(start_steps=8, end_steps=4, training=replace(student, num_updates=4)),
            "further": [{"objective": settings, "training": replace(student, ema_decay=0.8)}],
            "evaluation": {"num_samples": 24, "num_compared": 8, "num_shown": 4, "features": "pixels"},
            "engine": Engine(cpu=True, threads=1, trackers=(), log_every=2, checkpoint_updates=2),
        }
    )


def register() -> None:
    """Register both. (Decorators would also work, but this file is imported by tests that share a process with others,
    which run over all registered members.)"""
    objectives.register("own_game")(Game)
    recipes.register("own_game")(own_game)


if __name__ == "__main__":
    register()
    main()
