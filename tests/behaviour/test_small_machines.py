"""Options for small machines change the memory, and the result only where documented."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import GUIDANCE, Denoiser, NetworkDenoiser
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import DataConfig, MemoryData, open_data
from halfstep.models.folder import load
from halfstep.models.model import Model
from halfstep.nets import (
    MLP,
    InHalf,
    LoRA,
    UNet2D,
    checkpoint_gradients,
    copy_network,
    merged,
    own_state,
    trainable,
    unet2d_config,
    with_lora,
)
from halfstep.objectives import (
    Denoising,
    Finishing,
    FixedGuidance,
    Guidance,
    GuidanceRange,
    Matching,
    Plan,
    Stage,
    Training,
)
from halfstep.run import runner as pipeline
from halfstep.run.cost import count_forward, memory_of_update
from halfstep.run.events import StageStart
from halfstep.run.runner import run
from halfstep.run.spec import RunSpec
from halfstep.run.start import student_and_teacher, trainer_for
from halfstep.runs import StageFolder
from halfstep.runtime.processes import make_accelerator
from halfstep.train.checkpoint import CheckpointWriter, resume
from halfstep.train.settings import Engine
from support import numbers

DIGITS: Final = open_data(DataConfig(source="digits", labels=False))


def network(seed: int = 0) -> UNet2D:
    torch.manual_seed(seed)
    config = unet2d_config(
        size=(8, 8), in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        attention=(False, True), attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    return UNet2D(config)


def spec(**changes: Any) -> RunSpec:
    """Return a run with a teacher of a few updates, a matching stage, and two students."""
    teacher, student = (Training(updates, 1e-3, batch_size=8, ema_decay=0.9) for updates in (4, 6))
    plan = Plan.of(Denoising(), teacher) + Plan.halvings(4, 1, student, updates_at={})
    engine = {field.name: changes.pop(field.name) for field in dataclasses.fields(Engine) if field.name in changes}
    settings: dict[str, Any] = {
        "recipe": {"name": "small"}, "plan": plan, "data": DIGITS, "process": VPCosine(), "prediction": V(),
        "network": network, "start_steps": 4,
        "engine": Engine(**{"checkpoint_updates": 2, "cpu": True, "trackers": (), **engine}),
    }  # fmt: skip
    return RunSpec(**settings | changes)


def finish(folder: Path, **changes: Any) -> None:
    torch.set_num_threads(1)
    for _ in run(spec(**changes), folder):
        pass


@pytest.fixture(scope="module")
def teacher_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the teacher alone."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    finish(folder, plan=Plan(spec().plan.stages[:1]))
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with LoRA students."""
    folder = tmp_path_factory.mktemp("lora") / "run"
    finish(folder, lora_rank=2)
    return folder


@torch.no_grad()
def test_a_lora_student_starts_as_its_teacher_and_shares_its_weights() -> None:
    base = network()
    student = with_lora(base, 4)
    x_t, time = numbers(3, 1, 8, 8).float(), torch.tensor([0.1, 0.5, 1.0])
    assert torch.equal(student(x_t, time), base(x_t, time))
    held = {parameter.data_ptr() for parameter in base.parameters()}
    own = {parameter.data_ptr() for _, parameter in trainable(student)}
    assert {parameter.data_ptr() for parameter in student.parameters()} - held == own
    twin = copy_network(student)
    assert {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in student.parameters()} == held
    assert not any(parameter.requires_grad for name, parameter in student.named_parameters() if ".lora_" not in name)


def test_a_run_of_lora_students_changes_additions_alone_and_is_read_back_with_its_base(lora_run: Path) -> None:
    stages = lora_run / "stages"
    sizes = {path.parent.name: path.stat().st_size for path in stages.glob("*/model.safetensors")}
    assert max(sizes["01-halve-0002"], sizes["02-halve-0001"]) < 0.15 * sizes["00-denoise"]
    teacher, student = load(stages / "00-denoise"), load(stages / "02-halve-0001")
    assert student.manifest.base == "00-denoise"
    lora = student.denoiser.network
    assert isinstance(lora, LoRA)
    renamed = {name.removeprefix("base.").replace(".base_layer", ""): p for name, p in lora.named_parameters()}
    for name, parameter in teacher.denoiser.network.named_parameters():
        assert torch.equal(parameter, renamed[name]), name
    before, after = load(stages / "01-halve-0002").denoiser.network, lora
    moved = [not torch.equal(a, b) for (_, a), (_, b) in zip(trainable(before), trainable(after), strict=True)]
    assert all(moved)
    assert all(float(p.detach().abs().max()) > 0 for _, p in trainable(after))


@pytest.mark.parametrize("match_first", [False, True])
def test_the_teacher_and_the_auxiliary_of_a_finish_share_the_base_of_a_lora_student(
    tmp_path: Path, match_first: bool
) -> None:
    """Memory contains one base, whether the teacher is the base itself or has LoRA weights of its own."""
    student = Training(2, 1e-3, batch_size=8)
    chain = Plan.halvings(4, 2, student, updates_at={})
    matching = Plan.of(Matching(), student) if match_first else Plan()
    finishes = Plan.finishes([2], student, lambda number: Finishing(number, lead_updates=1))
    plan = Plan((spec().plan.stages[0],)) + matching + chain + finishes
    made = spec(plan=plan, lora_rank=2)
    finish(tmp_path / "run", plan=plan, lora_rank=2)
    stages = tmp_path / "run" / "stages"
    start, teacher = (load(stages / made.stages[place][0]) for place in made.parents[-1] or ())
    trainer = trainer_for(made, plan.stages[-1], "s", start, make_accelerator(cpu=True), teacher)
    models = trainer._models["auxiliary"]
    held = [models.student, models.teacher, *models.helpers.values()]
    frozen = [{id(p) for n, p in model.named_parameters() if ".lora_" not in n} for model in held]
    assert all(ids == frozen[0] for ids in frozen)
    added = [{id(p) for n, p in model.named_parameters() if ".lora_" in n} for model in held]
    assert sum(map(len, added)) == len(set().union(*added)) > 0
    finished = load(tmp_path / "run")
    assert (finished.manifest.base, finished.manifest.teacher) == ("00-denoise", made.stages[int(match_first)][0])
    assert isinstance(finished.denoiser.network, LoRA)


def test_merged_lora_weights_give_the_same_output(lora_run: Path) -> None:
    lora = load(lora_run).denoiser.network
    x_t, time = numbers(3, 1, 8, 8).float(), torch.tensor([0.1, 0.5, 1.0])
    plain = merged(lora).requires_grad_(False)
    lora.requires_grad_(False)
    assert isinstance(plain, UNet2D)
    assert set(plain.state_dict()) == set(network().state_dict())
    torch.testing.assert_close(plain(x_t, time), lora(x_t, time), rtol=0, atol=2e-6)
    teacher = load(lora_run / "stages" / "00-denoise").denoiser.network
    assert float((plain(x_t, time) - teacher(x_t, time)).detach().abs().max()) > 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 2},
        {"optimizer": "adamw8bit"},
        {"teacher_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"lora_rank": 2, "optimizer": "adamw8bit", "teacher_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=lambda changes: "+".join(changes),
)
def test_a_stage_that_was_cut_and_resumed_is_the_uncut_one_bit_for_bit(
    teacher_run: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    made = spec(**changes)
    stage = made.plan.stages[1]
    accelerator = make_accelerator(cpu=True)

    def trained(upto: int, folder: StageFolder | None = None) -> Any:
        trainer = trainer_for(made, stage, "s", load(teacher_run), accelerator)
        if folder is not None:
            assert resume(trainer, folder, "run", print) == folder.path / "checkpoint-00000003"
            assert trainer.update == 3
        for update in trainer.run():
            if update == upto:
                break
        return trainer

    whole = own_state(trained(6).finish().network)
    folder = StageFolder(tmp_path / "cut")
    cut = trained(3)
    writer = CheckpointWriter(folder, "run", cut.processes)
    writer.save(cut)
    writer.wait()
    again = own_state(trained(6, folder).finish().network)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}], ids=lambda changes: "+".join(changes) or "whole")
def test_with_a_bfloat16_teacher_its_float32_weights_are_freed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    parents: list[Model] = []
    monkeypatch.setattr(
        pipeline, "load", lambda path, network=None: parents.append(load(path, network=network)) or parents[-1]
    )
    torch.set_num_threads(1)
    one = Training(1, 1e-3, batch_size=8)
    plan = Plan.of(Denoising(), one) + Plan.halvings(4, 1, one, updates_at={})
    for precision, gone in (("float32", False), ("bf16", True)):
        parents.clear()
        students = 0
        for event in run(spec(teacher_precision=precision, plan=plan, **changes), tmp_path / precision):
            if isinstance(event, StageStart) and event.index:
                students += 1
                assert {parameter.is_meta for parameter in parents[-1].parameters()} == {gone}
        assert students == 2
        assert all(bool(p.isfinite().all()) for p in load(tmp_path / precision).parameters())


def test_moments_of_8_bits_take_a_quarter_of_the_memory() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(128, 128)

        def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
            out: Tensor = self.inner(x_t)
            return out

    def moments(kind: str) -> int:
        made = spec(
            network=Wide, data=MemoryData("rows", numbers(32, 128).float()), optimizer=kind,
            plan=Plan.of(Denoising(), Training(2, 1e-3, batch_size=8)),
        )  # fmt: skip
        trainer = trainer_for(made, made.plan.stages[0], "s", None, make_accelerator(cpu=True))
        list(trainer.run())
        state = trainer.state()["optimizer"]
        return sum(v.numel() * v.element_size() for name, v in state.items() if name.endswith("inner.weight"))

    # The quantile tables and scales come on top of one byte per moment.
    assert moments("adamw") >= 8 * 128 * 128
    assert moments("adamw8bit") < 0.4 * moments("adamw")


def test_gradient_checkpointing_keeps_less_and_gives_the_same_gradient() -> None:
    plain = spec(network=lambda: network(3))
    thrifty = spec(network=lambda: network(3), gradient_checkpointing=True)
    assert count_forward(thrifty).saved_bytes < 0.7 * count_forward(plain).saved_bytes

    def gradient(checkpointed: bool) -> list[Tensor]:
        made = network(3).train()
        if checkpointed:
            checkpoint_gradients(made)
        made(numbers(4, 1, 8, 8).float(), torch.linspace(0.1, 1, 4)).square().sum().backward()
        return [parameter.grad for parameter in made.parameters() if parameter.grad is not None]

    for a, b in zip(gradient(False), gradient(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_teacher_in_half_precision_gives_nearly_the_same_output_in_half_the_memory() -> None:
    plain = network()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    half = InHalf(plain)
    x_t, time = numbers(16, 1, 8, 8).float(), torch.linspace(0.05, 1, 16)
    found, wanted = half(x_t, time), plain(x_t, time)
    assert found.dtype == torch.float32
    assert float((found - wanted).square().mean().sqrt()) < 0.02 * float(wanted.square().mean().sqrt())
    assert not torch.equal(found, wanted)

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())

    assert size(half) * 2 == size(plain)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())


@torch.no_grad()
def test_networks_of_arrays_are_called_in_half_precision_too() -> None:
    torch.manual_seed(0)
    plain = MLP((3,), width=32, depth=2, guided=True)
    x_t, time, scale = torch.randn(16, 3), torch.linspace(0.05, 1, 16), torch.linspace(1, 8, 16)
    found, wanted = InHalf(plain)(x_t, time, guidance_scale=scale), plain(x_t, time, guidance_scale=scale)
    assert float((found - wanted).square().mean().sqrt()) < 0.02 * float(wanted.square().mean().sqrt())


@torch.no_grad()
def test_half_precision_keeps_complex_tensors_and_the_frequencies_of_the_time() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(8, 8)
            self.register_buffer("turns", torch.polar(torch.ones(4), torch.linspace(0.1, 3, 4)))

        def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
            pairs = torch.view_as_complex(self.layer(x_t).float().unflatten(1, (4, 2)))
            return torch.view_as_real(pairs * self.turns).flatten(1)

    plain = Rotary()
    half = InHalf(plain)
    assert torch.equal(half.network.turns, plain.turns)
    assert half.network.layer.weight.dtype == torch.bfloat16
    x_t, time = torch.randn(16, 8), torch.linspace(0.05, 1, 16)
    found, wanted = half(x_t, time), plain(x_t, time)
    assert float((found - wanted).square().mean().sqrt()) < 0.02 * float(wanted.square().mean().sqrt())

    mlp = MLP((3,), width=8, depth=1)
    held = InHalf(mlp).network
    assert held.frequencies.dtype == torch.float32
    assert torch.equal(held.frequencies, mlp.frequencies)
    assert held.enter.weight.dtype == torch.bfloat16
    cast = held.to("meta", torch.float64)
    assert cast.frequencies.is_meta
    assert cast.frequencies.dtype == torch.float32
    assert cast.enter.weight.dtype == torch.float64


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_teacher_that_takes_the_scale_is_not_guided_twice_in_any_precision(precision: str) -> None:
    torch.manual_seed(0)
    teacher = NetworkDenoiser(MLP((3,), width=32, depth=2, num_classes=3, guided=True), VPCosine(), V())
    null, training = {"class_labels": torch.tensor(2)}, Training(1, 1e-3)
    engine = Engine(teacher_precision=precision)  # type: ignore[arg-type]

    def seen_by(guidance: Guidance) -> Denoiser:
        stage = Stage(Matching(8, guidance=guidance), training)
        return student_and_teacher(stage, teacher, teacher, null, None, engine, seed=0, stream="test")[1]

    x_t, labels, scale = torch.randn(16, 3), torch.arange(16) % 2, torch.linspace(1, 8, 16)
    found, wanted = (
        denoiser(x_t, 0.5, {"class_labels": labels, GUIDANCE: scale}).x0
        for denoiser in (seen_by(GuidanceRange(1.0, 8.0)), teacher)
    )
    assert float((found - wanted).square().mean().sqrt()) < 0.02 * float(wanted.square().mean().sqrt())
    with pytest.raises(ValueError, match="a fixed scale of 3 cannot be matched"):
        seen_by(FixedGuidance(3.0))


def test_the_memory_that_is_counted_is_that_of_the_tensors_that_are_there(teacher_run: Path) -> None:
    teacher = load(teacher_run)
    made = spec(teacher=teacher, network=None, lora_rank=2)
    stage = made.plan.stages[1]
    forward = count_forward(made)
    counted = memory_of_update(stage, forward, made.engine, {})
    trainer = trainer_for(made, stage, "s", teacher, make_accelerator(cpu=True))
    student, held = trainer.finish().network, trainer._teacher

    def size(*modules: nn.Module) -> int:
        there = {p.data_ptr(): p.numel() * p.element_size() for module in modules for p in module.parameters()}
        return sum(there.values())

    assert held is not None
    assert size(student) == counted.weights
    assert size(student, held) == counted.weights + 0 * counted.teacher
    assert counted.gradients == 4 * sum(p.numel() for _, p in trainable(student))
    assert counted.moments == 2 * counted.gradients
    assert counted.gradients < 0.1 * counted.weights


def test_what_cannot_be_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got the class MLP\. Train it without"):
        with_lora(MLP((2,)), 4)
    with pytest.raises(ValueError, match="no layer of UNet2DModel has a name ending in nothing"):
        with_lora(network(), 4, ("nothing",))
    with pytest.raises(ValueError, match="MLP does not support gradient checkpointing"):
        checkpoint_gradients(MLP((2,)))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    made = spec(optimizer="adamw8bit")
    with pytest.raises(ValueError, match="needs the package bitsandbytes: pip install bitsandbytes"):
        trainer_for(made, made.plan.stages[0], "s", None, make_accelerator(cpu=True))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match="LoRA needs the package peft"):
        with_lora(network(), 4)
    student = NetworkDenoiser(network(), VPCosine(), V())
    assert student.prediction == V()
