"""A denoiser is printed on one line: what it is, its network, prediction, process and number of parameters."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.core.denoiser import Cond, Denoiser, Guided, Reprocessed
from halfstep.core.oracle import GaussianDenoiser, data_set_denoiser
from halfstep.core.prediction import Denoised
from halfstep.nets import MLP
from halfstep.objectives import Outcome, Role

PROCESS = halfstep.VPCosine()
NETWORK = MLP((2,), width=16, depth=1)
NUMBER = sum(parameter.numel() for parameter in NETWORK.parameters())
PLAIN = halfstep.NetworkDenoiser(NETWORK, PROCESS, halfstep.V())
INNER = f"MLP, V(), {PROCESS!r}, {NUMBER:,} parameters"


class Own(Denoiser):
    """A denoiser of a user's own class, which may be printed before it is complete."""

    def __init__(self, process: halfstep.NoiseProcess | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        if process is not None:
            self.process = process

    def forward(self, x_t: Tensor, t: Tensor, cond: Cond | None = None) -> Denoised:
        return Denoised(x_t, x_t)


def shared(x_t: Tensor, time: Tensor) -> Tensor:
    return NETWORK(x_t, time)  # type: ignore[no-any-return]


def student(**facts: Any) -> halfstep.Model:
    return halfstep.Model.of(PLAIN, (2,), made=Outcome(Role.STUDENT, 4), clip=True, **facts)


PRINTED: dict[str, tuple[Any, str]] = {
    "a network": (PLAIN, f"NetworkDenoiser({INNER})"),
    "a function": (
        halfstep.NetworkDenoiser(shared, PROCESS, halfstep.Eps()),
        f"NetworkDenoiser(shared, Eps(), {PROCESS!r}, {NUMBER:,} parameters)",
    ),
    "lazy layers": (
        halfstep.NetworkDenoiser(nn.LazyLinear(2), PROCESS, halfstep.V()),
        f"NetworkDenoiser(LazyLinear, V(), {PROCESS!r}, lazy parameters)",
    ),
    "clipped": (halfstep.Clipped(PLAIN), f"Clipped(NetworkDenoiser({INNER}), low=-1, high=1)"),
    "guided": (
        Guided(PLAIN, {"class_labels": torch.tensor(3)}, 2.0),
        f"Guided(NetworkDenoiser({INNER}), null=['class_labels'], scale=2)",
    ),
    "guided by a condition": (
        Guided(PLAIN, {"class_labels": torch.tensor(3)}),
        f"Guided(NetworkDenoiser({INNER}), null=['class_labels'], scale=the condition guidance_scale)",
    ),
    "of another process": (
        Reprocessed(PLAIN, halfstep.VPCosine(-10, 10)),
        f"Reprocessed(NetworkDenoiser({INNER}), {halfstep.VPCosine(-10, 10)!r})",
    ),
    "exact": (GaussianDenoiser(PROCESS), f"GaussianDenoiser({PROCESS!r}, 0 parameters)"),
    "of a data set": (data_set_denoiser(PROCESS, torch.zeros(3, 2)), f"MixtureDenoiser({PROCESS!r}, 0 parameters)"),
    "own": (Own(PROCESS), f"Own({PROCESS!r}, 1 parameter)"),
    "own, incomplete": (Own(None), "Own(1 parameter)"),
    "a student": (student(), f"Model(student of 4 steps, samples of shape [2], {INNER})"),
    "a conditional teacher": (
        halfstep.Model.of(PLAIN, (2,), num_classes=10, conditions={"angle": ()}),
        f"Model(teacher, samples of shape [2], conditioned on 10 classes, angle, {INNER})",
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_a_denoiser_is_printed_on_one_line(name: str) -> None:
    denoiser, expected = PRINTED[name]
    assert repr(denoiser) == expected
    assert str(denoiser) == expected


def test_the_steps_and_the_shape_that_are_known_are_printed() -> None:
    own = Own(PROCESS)
    own.num_steps, own.shape = 4, (2,)
    assert repr(own) == f"Own({PROCESS!r}, 1 parameter, num_steps=4, shape=(2,))"


def test_the_layers_are_printed_with_the_network() -> None:
    assert "Linear(in_features" in repr(student().network)
