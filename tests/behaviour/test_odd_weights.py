"""Networks may have weights that cannot be trained, such as integers, or weights in another precision."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import halfstep
from halfstep.core.prediction import Denoised
from halfstep.nets import copy_denoiser
from halfstep.objectives import Finishing
from toys import points

CPU = halfstep.Engine(cpu=True, trackers=())
TRAINING = halfstep.Training(4, 1e-2, batch_size=8, ema_decay=0.9)


class Shuffled(nn.Module):
    """A network with an integer parameter that is too large for float32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.order = nn.Parameter(torch.tensor([2**24 + 1, 2**24]), requires_grad=False)

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.cat([x_t, time[:, None]], 1))[:, self.order - 2**24]
        return found


class Turned(nn.Module):
    """A network with a complex parameter."""

    def __init__(self, requires_grad: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.turn = nn.Parameter(torch.tensor([0.6 + 0.8j]), requires_grad=requires_grad)

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.cat([x_t, time[:, None]], 1))
        return torch.view_as_real(torch.complex(found[:, 0], found[:, 1]) * self.turn)


class Cast(nn.Module):
    """A network in another precision that converts its inputs itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.dtype = nn.Linear(3, 2, dtype=dtype), dtype

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.layer(torch.cat([x_t, time[:, None]], 1).to(self.dtype))
        return found.to(x_t)


class Own(halfstep.Denoiser):
    """A custom denoiser around a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.process = halfstep.VPCosine()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor] | None = None) -> Denoised:
        return denoiser(self.network)(x_t, t)


def denoiser(network: nn.Module) -> halfstep.NetworkDenoiser:
    return halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())


def test_integer_parameters_are_copied_and_not_trained() -> None:
    before = Shuffled()
    teacher = halfstep.fit(denoiser(Shuffled()), points(), TRAINING, engine=CPU)
    # The auxiliary denoiser and the student before finishing are copies too.
    finish = halfstep.Plan.finishes([2], TRAINING, lambda number: Finishing(number, lead_updates=1))
    student = halfstep.distill(teacher, points(), start=4, to=2, training=TRAINING, finish=finish, engine=CPU)
    for one, other in ((before, teacher.network), (teacher.network, student.network)):
        assert torch.equal(one.order, other.order)
        assert one.order.data_ptr() != other.order.data_ptr()
        assert not torch.equal(one.layer.weight, other.layer.weight)


def test_integer_parameters_of_a_custom_denoiser_are_copied() -> None:
    own = Own(Shuffled()).requires_grad_(False)
    twin = copy_denoiser(own)
    assert isinstance(twin, Own)
    assert torch.equal(twin.network.order, own.network.order)
    assert all(parameter.requires_grad == parameter.is_floating_point() for parameter in twin.parameters())


def test_complex_weights_are_rejected_unless_they_are_constant() -> None:
    words = r"the weight turn is complex, .*Store torch\.view_as_real\(weight\), or make it a buffer if it is constant"
    for call in (
        lambda: halfstep.fit(denoiser(Turned(True)), points(), TRAINING, engine=CPU),
        # Distillation trains all weights of a copy, even if those of the teacher are frozen.
        lambda: halfstep.distill(denoiser(Turned(False)), points(), start=4, to=2, training=TRAINING, engine=CPU),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    teacher = halfstep.fit(denoiser(Turned(False)), points(), TRAINING, engine=CPU)
    assert torch.equal(teacher.network.turn, Turned(False).turn)


@pytest.mark.parametrize(
    ("dtype", "precision"), [(torch.float64, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "bf16")]
)
def test_networks_in_another_precision_are_distilled_and_finished(dtype: torch.dtype, precision: str) -> None:
    """A finish calls a frozen copy of the student, and a consistency stage can call its average.

    In a finish, the auxiliary denoiser of a teacher in bfloat16 is a copy of the network before its conversion.
    """
    engine = halfstep.Engine(cpu=True, trackers=(), teacher_precision=precision)
    finish = halfstep.Plan.finishes([2], TRAINING, lambda number: Finishing(number, lead_updates=1))
    student = halfstep.distill(
        denoiser(Cast(dtype)), points(), start=4, to=2, training=TRAINING, finish=finish, engine=engine
    )
    assert all(parameter.dtype == dtype for parameter in student.parameters())
    assert bool(student.sample(range(2)).isfinite().all())
    plan = halfstep.Plan.of(halfstep.Consistency(2, 4, 4, self_teacher=0.9), TRAINING)
    student = halfstep.distill(denoiser(Cast(dtype)), points(), plan=plan, engine=engine)
    assert all(parameter.dtype == dtype for parameter in student.parameters())
