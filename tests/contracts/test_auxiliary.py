"""An auxiliary denoiser starts as its teacher without guidance, and shares no trained weight."""

import pytest
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE, Denoiser, Guided, NetworkDenoiser, Reprocessed
from halfstep.core.noise import VE, VPCosine
from halfstep.core.oracle import GaussianDenoiser
from halfstep.core.prediction import Eps, V
from halfstep.models.students import in_precision
from halfstep.nets import (
    MLP,
    LoRA,
    Network,
    UNet2D,
    checkpoint_gradients,
    checkpoints_gradients,
    copy_denoiser,
    takes_guidance,
    trainable,
    unet2d_config,
    with_guidance,
    with_lora,
)
from halfstep.objectives import Models, auxiliary_denoiser
from support import clock, gaussian, numbers


def seen(network: nn.Module) -> NetworkDenoiser:
    return NetworkDenoiser(network, VPCosine(), V())


def mlp(seed: int, **arguments: int) -> MLP:
    """Return a network of points without zero weights."""
    torch.manual_seed(seed)
    network = MLP((2,), width=8, depth=1, **arguments)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    return network


def unet(seed: int = 0) -> UNet2D:
    torch.manual_seed(seed)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(8, 16), layers_per_block=1,
        attention=(False, True), attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    network = UNet2D(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


def lora(base: Network, seed: int) -> LoRA:
    """Add LoRA weights that change the output of the base."""
    network = with_lora(base, 2)
    torch.manual_seed(seed)
    for _, parameter in trainable(network):
        nn.init.normal_(parameter, std=0.3)
    return network


def assert_trainable_and_own(auxiliary: Denoiser, models: Models) -> None:
    """Assert that all its trained weights are float32 or float64 parameters that neither student nor teacher has."""
    network = auxiliary.network if isinstance(auxiliary, NetworkDenoiser) else auxiliary
    own = [parameter for _, parameter in trainable(network)]
    assert own
    assert models.teacher is not None
    others = {p.data_ptr() for model in (models.student, models.teacher) for p in model.parameters()}
    for parameter in own:
        assert parameter.requires_grad
        assert parameter.dtype in (torch.float32, torch.float64)
        assert parameter.data_ptr() not in others


POINTS = numbers(5, 2).float()
TIMES = clock(0.1, 0.3, 0.5, 0.9, 1.0)


@torch.no_grad()
def assert_same(one: Denoiser, other: Denoiser, x_t: Tensor = POINTS, **cond: Tensor) -> None:
    """Assert that the outputs are equal to the last bit."""
    t = TIMES[: len(x_t)]
    assert torch.equal(one(x_t, t, cond).x0, other(x_t, t, cond).x0)


@torch.no_grad()
def differ(one: Denoiser, other: Denoiser, x_t: Tensor = POINTS, **cond: Tensor) -> bool:
    t = TIMES[: len(x_t)]
    return float((one(x_t, t, cond).x0 - other(x_t, t, cond).x0).abs().max()) > 1e-3


def test_it_starts_as_the_teacher_and_not_as_the_student() -> None:
    teacher = seen(mlp(0)).requires_grad_(False)
    student = NetworkDenoiser(mlp(1), VPCosine(), Eps())
    models = Models(student, teacher)
    auxiliary = auxiliary_denoiser(models)
    assert_trainable_and_own(auxiliary, models)
    assert_same(auxiliary, teacher)
    assert differ(auxiliary, student)


def test_it_is_not_guided_whatever_the_guidance_of_its_teacher() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1])
    plain, student = seen(mlp(0, num_classes=4)), seen(mlp(1, num_classes=4))
    for scale in (3.0, None):
        guided = Guided(plain, {"class_labels": torch.tensor(3)}, scale)
        auxiliary = auxiliary_denoiser(Models(student, guided))
        assert_same(auxiliary, plain, class_labels=labels)
        if scale is not None:
            assert differ(auxiliary, guided, class_labels=labels)


def test_it_receives_its_students_scale_and_ignores_it_at_first() -> None:
    labels, scale = torch.tensor([0, 1, 2, 0, 1]), torch.linspace(1, 4, 5)
    plain = seen(mlp(0, num_classes=4))
    student = seen(with_guidance(mlp(1, num_classes=4)))
    auxiliary = auxiliary_denoiser(Models(student, Guided(plain, {"class_labels": torch.tensor(3)})))
    assert isinstance(auxiliary, NetworkDenoiser)
    assert takes_guidance(auxiliary.network)
    with torch.no_grad():
        found = auxiliary(POINTS, TIMES, {"class_labels": labels, GUIDANCE: scale}).x0
        assert torch.equal(found, plain(POINTS, TIMES, {"class_labels": labels}).x0)
    auxiliary(POINTS, TIMES, {"class_labels": labels, GUIDANCE: scale}).x0.sum().backward()
    assert auxiliary.network.scale is not None
    grad = auxiliary.network.scale.weight.grad
    assert grad is not None
    assert bool(grad.any())


def test_on_another_process_it_is_converted_like_the_teacher() -> None:
    teacher = Reprocessed(NetworkDenoiser(mlp(0), VE(0.001, 100.0), V()), VPCosine(-9, 9))
    models = Models(NetworkDenoiser(mlp(1), VPCosine(-9, 9), V()), teacher)
    auxiliary = auxiliary_denoiser(models)
    assert auxiliary.process == VPCosine(-9, 9)
    assert_trainable_and_own(auxiliary, models)
    assert_same(auxiliary, teacher)


def test_for_a_lora_student_it_is_a_second_set_of_lora_weights_on_one_base() -> None:
    images, base = numbers(2, 1, 8, 8).float(), unet()
    models = Models(seen(lora(base, 1)), seen(base))
    auxiliary = auxiliary_denoiser(models)
    assert isinstance(auxiliary, NetworkDenoiser)
    network = auxiliary.network
    assert isinstance(network, LoRA)
    held = {id(parameter) for parameter in base.parameters()}
    own = {id(parameter) for _, parameter in trainable(network)}
    assert {id(parameter) for parameter in network.parameters()} == held | own
    assert not any(parameter.requires_grad for parameter in network.parameters() if id(parameter) in held)
    assert all(not bool(parameter.any()) for name, parameter in trainable(network) if ".lora_B." in name)
    assert any(bool(parameter.any()) for name, parameter in trainable(network) if ".lora_A." in name)
    assert_same(auxiliary, seen(base), images)
    assert differ(auxiliary, models.student, images)
    auxiliary(images, 0.5).x0.sum().backward()
    for name, parameter in models.student.named_parameters():
        assert parameter.grad is None, name
    assert all(parameter.grad is not None for _, parameter in trainable(network))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_starts_with_the_additions_of_a_lora_teacher(precision: str) -> None:
    images, base = numbers(2, 1, 8, 8).float(), unet()
    teacher = seen(lora(base, 2))
    auxiliary = auxiliary_denoiser(Models(seen(lora(base, 1)), in_precision(teacher, precision)))
    if precision == "float32":
        assert_same(auxiliary, teacher, images)
    assert isinstance(auxiliary, NetworkDenoiser)
    held = {id(parameter) for parameter in base.parameters()}
    assert held <= {id(parameter) for parameter in auxiliary.network.parameters()}
    for (_, one), (_, other) in zip(trainable(auxiliary.network), trainable(teacher.network), strict=True):
        rounded = other.bfloat16().float() if precision == "bf16" else other
        assert torch.equal(one, rounded)
        assert id(one) != id(other)


def test_a_teacher_in_bfloat16_is_copied_in_float32_with_the_weights_that_it_computes_with() -> None:
    teacher = seen(mlp(0))
    models = Models(seen(mlp(1)), in_precision(teacher, "bf16"))
    auxiliary = auxiliary_denoiser(models)
    assert_trainable_and_own(auxiliary, models)
    for one, other in zip(auxiliary.parameters(), teacher.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.bfloat16().float())


def test_it_computes_its_activations_again_where_the_student_does() -> None:
    for student in (unet(1), lora(unet(0), 1)):
        auxiliary = auxiliary_denoiser(Models(seen(student), seen(unet(0))))
        assert isinstance(auxiliary, NetworkDenoiser)
        assert not checkpoints_gradients(auxiliary.network)
        checkpoint_gradients(student)
        auxiliary = auxiliary_denoiser(Models(seen(student), seen(unet(0))))
        assert isinstance(auxiliary, NetworkDenoiser)
        assert checkpoints_gradients(auxiliary.network)


class Own(Denoiser):
    """A user's denoiser with one weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.process = VPCosine()
        self.exact = GaussianDenoiser(self.process)
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x_t: Tensor, t: Tensor, cond: object = None) -> object:  # type: ignore[override]
        x0, eps = self.exact(x_t, t)
        return type(self.exact(x_t, t))(self.weight * x0, eps)


def test_a_user_defined_denoiser_is_copied() -> None:
    teacher = Own(0.7).requires_grad_(False)
    models = Models(Own(1.3), teacher)
    auxiliary = auxiliary_denoiser(models)
    assert_trainable_and_own(auxiliary, models)
    assert_same(auxiliary, teacher)
    guided = Guided(teacher, {"class_labels": torch.tensor(3)}, 2.0)
    assert isinstance(auxiliary_denoiser(Models(models.student, guided)), Own)


def test_without_a_teacher_there_is_no_start() -> None:
    with pytest.raises(ValueError, match="starts as a copy of the teacher, but no teacher is given"):
        auxiliary_denoiser(Models(copy_denoiser(gaussian(VPCosine()))))
