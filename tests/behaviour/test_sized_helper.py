"""An objective whose auxiliary network depends on the shape of a sample: a critic with a linear layer over the entries.

The objective, its network and its recipe are all in this file, as in a researcher's file.
"""

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import halfstep
from halfstep.cli import main
from halfstep.core.draw import Draw
from halfstep.core.prediction import Constant
from halfstep.nets import MLP
from halfstep.objectives import (
    STUDENT,
    Auxiliary,
    Batch,
    Evals,
    Halving,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Training,
    Turn,
    objectives,
)
from halfstep.recipes import ChainConfig, MLPConfig, Recipe, recipes
from halfstep.train.settings import Engine
from toys import points

WIDTH = 8
TRAINING = Training(num_updates=8, batch_size=12, learning_rate=1e-2)


class Critic(nn.Module):
    """A discriminator of clean samples that is a plain perceptron over all entries of a sample."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(math.prod(shape), WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x0: Tensor) -> Tensor:
        found: Tensor = self.leave(F.silu(self.enter(x0.flatten(1))))[:, 0]
        return found


@dataclass(frozen=True)
class Judged(Objective):
    """Halving, with a critic that compares the student's x0 at t = 1 with data."""

    num_steps: int = 4
    needs_teacher: ClassVar[bool] = True
    loss_falls: ClassVar[bool] = False

    @property
    def _halving(self) -> Halving:
        return Halving(self.num_steps, weighting=Constant())

    @property
    def outcome(self) -> Outcome:
        return self._halving.outcome

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(3, 2), "teacher": Evals(2), "critic": Evals(3, 3)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {"critic": Auxiliary(lambda models, shape: Critic(shape), lambda own: own.of_helper(2.0))}

    def turns(self, update: int) -> tuple[Turn, ...]:
        return Turn("critic", self.critic_loss), Turn(STUDENT, self.loss)

    def _made(self, models: Models, batch: Batch, draw: Draw) -> Tensor:
        noise = draw.normal("made", batch.x0.shape[1:]).to(batch.x0)
        return models.student(noise, torch.ones(len(noise), dtype=torch.float64), batch.cond).x0

    def critic_loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        with torch.no_grad():
            made = self._made(models, batch, draw)
        critic = models.helpers["critic"]
        loss = F.softplus(critic(made)) + F.softplus(-critic(batch.x0))
        return Losses(loss, loss.new_zeros(len(loss), dtype=torch.float64))

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        if os.environ.get("STOPPED_AT") == str(draw.update):
            # In the student's turn, after the critic's step.
            os.kill(os.getpid(), signal.SIGTERM)
        own = self._halving.loss(models, batch, draw)
        judged = F.softplus(-models.helpers["critic"](self._made(models, batch, draw)))
        return Losses(own.loss + 0.1 * judged, own.log_snr)


def judged() -> Recipe:
    """Return a recipe with a small MLP, 8 -> 4 steps, and then the critic at 4."""
    further: dict[str, Any] = {"objective": {"type": "judged", "num_steps": 4}, "training": TRAINING}
    return Recipe.model_validate(
        {
            "name": "judged",
            "network": MLPConfig(width=16, depth=1),
            "teacher": TRAINING,
            "chain": ChainConfig(start_steps=8, end_steps=4, training=TRAINING),
            "further": [further],
            "evaluation": {"enabled": False},
            "engine": Engine(cpu=True, threads=1, trackers=(), checkpoint_updates=2),
        }
    )


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    objectives.register("judged")(Judged)
    recipes.register("judged")(judged)
    yield
    for registry in (objectives, recipes):
        del registry["judged"]


def words(folder: Path, out: str, *more: str) -> list[str]:
    data = folder / "cubes.npy"
    np.save(data, points(64).repeat(1, 6).reshape(64, 3, 2, 2).numpy())
    return ["run", "judged", "--data", str(data), "--out", str(folder / out), *more]


def test_a_recipe_runs_and_resumes_with_a_network_sized_by_the_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(words(tmp_path, "uncut"))
    monkeypatch.setenv("STOPPED_AT", "5")
    with pytest.raises(SystemExit) as ended:
        main(words(tmp_path, "cut"))
    assert ended.value.code == 128 + signal.SIGTERM
    monkeypatch.delenv("STOPPED_AT")
    held, *_ = (tmp_path / "cut").glob("stages/02-judged-0004/checkpoint-*/helper-critic.safetensors")
    assert load_file(held)["enter.weight"].shape == (WIDTH, 3 * 2 * 2)
    main(words(tmp_path, "cut"))
    one, other = (load_file(tmp_path / run / "stages/02-judged-0004/model.safetensors") for run in ("uncut", "cut"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_dry_run_counts_the_network_for_the_shape_of_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(words(tmp_path, "none", "--dry-run", "--json"))
    parameters = (3 * 2 * 2 + 1) * WIDTH + WIDTH + 1
    assert json.loads(capsys.readouterr().out)["memory_bytes"]["helpers"] == 4 * parameters


def test_distill_in_memory_passes_the_shape_of_the_data() -> None:
    torch.manual_seed(0)
    teacher = halfstep.NetworkDenoiser(MLP((2,), width=16, depth=1), halfstep.VPCosine(), halfstep.V())
    plan = halfstep.Plan.of(Judged(2), TRAINING)
    student = halfstep.distill(teacher, points(), plan=plan, engine=Engine(cpu=True, threads=1))
    assert (student.num_steps, student.manifest.objective) == (2, "judged")
