"""Create an objective's additional networks before the first update."""

import re
from typing import Final

import torch

from halfstep.core.draw import seeded
from halfstep.nets import InHalf
from halfstep.objectives import STUDENT, Auxiliary, Average, Models, Stage, Training
from halfstep.train.player import Follower

HELPER_NAME: Final = re.compile("[a-z][a-z0-9_]*")


def make_helpers(
    stage: Stage, models: Models, shape: tuple[int, ...], seed: int, stream: str
) -> tuple[dict[str, tuple[torch.nn.Module, Training]], dict[str, Follower]]:
    """Return an objective's auxiliary networks with their hyperparameters, and its averages and frozen copies.

    Args:
        models: the student and the teacher.
        shape: the shape of one sample.
        seed, stream: the key for the random initial weights.

    Raises:
        ValueError: if a helper's name is invalid, or a helper's hyperparameters contradict those of the stage.
    """
    auxiliaries: dict[str, tuple[torch.nn.Module, Training]] = {}
    helpers = stage.objective.helpers
    for name, helper in helpers.items():
        if name in (STUDENT, "teacher") or not HELPER_NAME.fullmatch(name):
            raise ValueError(f"a helper cannot be named {name!r}. Use lower-case letters, digits and underscores")
        if isinstance(helper, Auxiliary):
            training = helper.training(stage.training)
            for setting in ("num_updates", "batch_size"):
                mine, own = getattr(stage.training, setting), getattr(training, setting)
                if own != mine:
                    raise ValueError(
                        f"helper {name} has {setting} {own}, but its stage has {mine}. Use the stage's value"
                    )
            if training.ema_decay or training.early_end.patience:
                raise ValueError(f"ema_decay and early_end of helper {name} have no effect. Use an Average instead")
            with seeded(seed, stream, "helper", name):
                auxiliaries[name] = helper.start(models, shape), training
            if any(isinstance(part, InHalf) for part in auxiliaries[name][0].modules()):
                raise ValueError(f"helper {name} is a copy of a teacher in bfloat16. Start it from the student")
    followers = {}
    for name, helper in helpers.items():
        if not isinstance(helper, Auxiliary):
            of = {STUDENT: models.student, **{other: model for other, (model, _) in auxiliaries.items()}}
            if helper.of not in of:
                raise ValueError(f"helper {name} copies {helper.of!r}, but the players are {', '.join(of)}")
            followers[name] = Follower(of[helper.of], helper.decay if isinstance(helper, Average) else None)
    return auxiliaries, followers
