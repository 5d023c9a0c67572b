"""An update of the engine does what its definition says, however the batch is split."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.draw import Draw
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.data import MemoryData, training_batch
from halfstep.nets import MLP, copy_network
from halfstep.objectives import (
    Batch,
    Consistency,
    Denoising,
    Halving,
    Losses,
    Models,
    Plan,
    Stage,
    StepObjective,
    Training,
)
from halfstep.runs import StageFolder
from halfstep.runtime.failures import NonFinite
from halfstep.runtime.processes import make_accelerator
from halfstep.train import player
from halfstep.train.checkpoint import resume, write_checkpoint
from halfstep.train.engine import StageTrainer
from halfstep.train.optimizers import make_optimizer
from halfstep.train.player import EMA, Follower, KeptBuffers
from halfstep.train.settings import Engine
from halfstep.train.sharding import fill, load_whole, skeleton
from toys import finish, points, toy_plan, toy_spec, tuned, weights


def _batches(draw: Draw) -> Batch:
    return training_batch(MemoryData("toy", points()), draw, False)


def _denoiser(seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    return NetworkDenoiser(MLP((2,), width=16, depth=1), VPCosine(), V())


def _trainer(stage: Stage, micro_batch: int | None = None, denoiser: NetworkDenoiser | None = None) -> StageTrainer:
    return StageTrainer(
        denoiser or _denoiser(),
        None,
        stage,
        _batches,
        (2,),
        seed=0,
        stream="00-denoise",
        accelerator=make_accelerator(cpu=True),
        engine=Engine(micro_batch=micro_batch),
    )


def test_accumulating_micro_batches_equals_the_large_batch() -> None:
    stage = tuned(toy_plan(dropout=0.0).stages[0], num_updates=20)
    results = []
    for micro_batch in (None, 4, 5):
        trainer = _trainer(stage, micro_batch)
        list(trainer.run())
        results.append(torch.cat([p.flatten() for p in trainer.finish().parameters()]))
    assert torch.linalg.norm(results[1] - results[0]) < 1e-5 * torch.linalg.norm(results[0])
    assert torch.linalg.norm(results[2] - results[0]) < 1e-5 * torch.linalg.norm(results[0])


def test_an_update_is_adamw_on_the_clipped_gradient_of_the_mean_loss() -> None:
    stage = Stage(Denoising(), Training(3, 1e-2, batch_size=16, weight_decay=0.1, grad_clip=0.05))
    trainer = _trainer(stage)
    list(trainer.run())

    # The same three updates, written in plain torch from the definition.
    denoiser = _denoiser()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    for update in range(3):
        draw = Draw(0, "00-denoise", update, 16, range(16))
        loss = Denoising().loss(Models(denoiser), _batches(draw), draw).loss.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(
            sum((p.grad.square().sum() for p in denoiser.parameters() if p.grad is not None), torch.zeros(()))
        )
        for parameter in denoiser.parameters():
            assert parameter.grad is not None
            parameter.grad *= min(1.0, 0.05 / float(norm))
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - update / 3)
        optimizer.step()
    for ours, theirs in zip(trainer.finish().parameters(), denoiser.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=2e-6)


@dataclass(frozen=True)
class _Misshapen(StepObjective):
    """Halving with its losses in another shape."""

    change: Callable[[Losses], Losses]
    num_steps: int = 2

    @property
    def evals(self) -> Any:
        return Halving(2).evals

    def step_losses(self, *arguments: Any) -> Losses:
        return self.change(Halving(2).step_losses(*arguments))


@pytest.mark.parametrize("micro_batch", [None, 1, 8])
@pytest.mark.parametrize(
    ("change", "loss", "log_snr"),
    [
        (lambda losses: losses._replace(loss=losses.loss.mean()), "[]", "[{0}]"),
        (lambda losses: losses._replace(loss=losses.loss[:, None].expand(-1, 2)), "[{0}, 2]", "[{0}]"),
        (lambda losses: losses._replace(loss=losses.loss[:, None] + losses.loss), "[{0}, {0}]", "[{0}]"),
        (lambda losses: losses._replace(loss=losses.loss[:, None]), "[{0}, 1]", "[{0}]"),
        (lambda losses: losses._replace(loss=losses.loss.repeat(2)), "[{1}]", "[{0}]"),
        (lambda losses: losses._replace(log_snr=losses.log_snr.mean()), "[{0}]", "[]"),
    ],
    ids=["mean", "entries", "pairs", "column", "twice", "log_snr"],
)
def test_losses_that_are_not_one_number_per_sample_are_rejected(
    change: Callable[[Losses], Losses], loss: str, log_snr: str, micro_batch: int | None
) -> None:
    """Their sum is finite, so they would train with a gradient of another scale."""
    trainer = StageTrainer(
        _denoiser(), _denoiser(1), Stage(_Misshapen(change), Training(2, 1e-2, batch_size=16)), _batches, (2,),
        seed=0, stream="01", accelerator=make_accelerator(cpu=True), engine=Engine(micro_batch=micro_batch),
    )  # fmt: skip
    number = micro_batch or 16
    shapes = [text.format(number, 2 * number) for text in (loss, log_snr)]
    with pytest.raises(ValueError, match="turn of student returned") as caught:
        next(trainer.run())
    assert f"a loss of shape {shapes[0]} and a log_snr of shape {shapes[1]} for a micro batch of {number}" in str(
        caught.value
    )
    assert str(caught.value).endswith(f"Return Losses with one number per sample in both, each of shape [{number}]")


def test_betas_may_be_whole_numbers() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    made = make_optimizer("adamw", [weight], Training(1, 0.1, adam_betas=(0, 0.99)))
    weight.sum().backward()
    made.step()
    assert float(weight[0]) == pytest.approx(0.9, abs=1e-6), "the first step of Adam is the rate"


def test_the_moving_average_is_the_weighted_mean_of_all_weights() -> None:
    """Average and current value have different weights in the first updates (up to 80, where the decay reaches 0.9) and
    later."""
    module = torch.nn.Linear(3, 2).double().float()
    ema = EMA(module, decay=0.9)
    expected = module.weight.detach().double().clone()
    for n in range(1, 101):
        with torch.no_grad():
            module.weight += torch.randn(2, 3, generator=torch.Generator().manual_seed(n))
        ema.update(n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * module.weight.detach().double()
    assert torch.allclose(ema.state_dict()["weight"].double(), expected, rtol=0, atol=1e-5)


def test_the_average_of_a_tied_weight_replaces_it_under_all_its_names() -> None:
    tied = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "two": torch.nn.Linear(2, 2)})
    tied["two"].weight = tied["one"].weight
    ema = EMA(tied, decay=0.9)
    with torch.no_grad():
        tied["one"].weight += 1
    ema.update(1)
    state = ema.state_dict()
    assert torch.equal(state["two.weight"], state["one.weight"])
    assert not torch.equal(state["two.weight"], tied["two"].weight)
    # As when a sharded stage ends.
    twin = skeleton(tied)
    load_whole(tied, {name: value.clone() for name, value in state.items()})
    fill(twin, tied)
    assert twin["two"].weight is twin["one"].weight
    assert torch.equal(twin["two"].weight, state["one.weight"])
    assert all(parameter.requires_grad for parameter in twin.parameters())


class _Normalised(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2)

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.leave(self.norm(self.enter(torch.cat([x_t, time[:, None]], 1))).relu())
        return found


def test_a_resumed_average_has_the_buffers_of_its_network() -> None:
    def made() -> StageTrainer:
        torch.manual_seed(0)
        student, teacher = (NetworkDenoiser(_Normalised(), VPCosine(), V()) for _ in range(2))
        stage = Stage(Consistency(1, 8, 8, self_teacher=0.9), Training(6, 1e-2, batch_size=16))
        accelerator = make_accelerator(cpu=True)
        return StageTrainer(student, teacher, stage, _batches, (2,), seed=0, stream="01", accelerator=accelerator)

    whole, again = made(), made()
    for update in whole.run():
        if update == 3:
            again.load_state(whole.state(), 3, 0.0)
            held, expected = (dict(trainer._copies["reference"].named_buffers()) for trainer in (again, whole))
            assert all(torch.equal(held[name], expected[name]) for name in expected)
    list(again.run())
    expected, found = whole.finish().state_dict(), again.finish().state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class _Cast(torch.nn.Module):
    """A network in another precision that converts its inputs itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.SiLU(), torch.nn.Linear(16, 2)).to(dtype)
        self.scale, self.dtype = torch.nn.Buffer(torch.tensor(1.25, dtype=dtype)), dtype

    def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        inputs = torch.cat([x_t, time[:, None]], 1).to(self.dtype)
        found: torch.Tensor = self.layers(inputs) * self.scale
        return found.to(x_t)


def _cast(dtype: torch.dtype, seed: int = 0) -> NetworkDenoiser:
    torch.manual_seed(seed)
    return NetworkDenoiser(_Cast(dtype), VPCosine(), V())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("decay", [None, 0.99])
@torch.no_grad()
def test_a_copy_for_the_objective_is_exactly_its_player_and_follows_it_in_high_precision(
    dtype: torch.dtype, decay: float | None
) -> None:
    model = _cast(dtype)
    follower = Follower(model, decay)
    x_t, t = torch.randn(8, 2), torch.rand(8).double()
    assert torch.equal(follower.model(x_t, t).x0, model(x_t, t).x0)
    tensors = model.network.state_dict()
    assert {name: value.dtype for name, value in follower.network.state_dict().items()} == {
        name: value.dtype for name, value in tensors.items()
    }
    if decay is None:
        return
    ema = EMA(model.network, decay, follower.network)
    expected = {name: value.double().clone() for name, value in tensors.items()}
    for n in range(1, 41):
        for parameter in model.network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        ema.update(n)
        share = min(decay, (1 + n) / (10 + n))
        for name, value in model.network.state_dict().items():
            expected[name] = share * expected[name] + (1 - share) * value.double()
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    for name, parameter in follower.network.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name].double(), expected[name], rtol=0, atol=tolerance)
        assert torch.equal(parameter, ema.state_dict()[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_saved_average_is_not_rounded_to_the_weights_and_an_older_one_still_loads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.Linear(8, 8).to(dtype)
    for copied in (None, copy_network(module)):
        average = EMA(module, 0.999, copied)
        for n in range(1, 6):
            with torch.no_grad():
                module.weight += 0.1 * torch.randn(8, 8, generator=generator).to(dtype)
            average.update(n)
        state = {name: value.clone() for name, value in average.state_dict().items()}
        assert not torch.equal(state["weight"], state["weight"].to(torch.bfloat16).to(state["weight"]))
        again = EMA(module, 0.999, None if copied is None else copy_network(module))
        again.load_state_dict(state)
        assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
        if copied is not None:
            assert again._into is not None
            assert torch.equal(again._into.weight, copied.weight)
        # Older checkpoints contain the averages of half-precision weights in half precision.
        older = {name: value.to(torch.bfloat16) for name, value in state.items()}
        again.load_state_dict(older)
        assert all(torch.equal(value.to(torch.bfloat16), older[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("self_teacher", [0.0, 0.99])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_resumed_stage_of_another_precision_equals_an_uninterrupted_one(
    dtype: torch.dtype, self_teacher: float
) -> None:
    """The stage returns an average of its weights, and its objective calls another average."""

    def made() -> StageTrainer:
        training = Training(12, 1e-2, batch_size=16, ema_decay=0.99)
        return StageTrainer(
            _cast(dtype), _cast(dtype, 1), Stage(Consistency(1, 8, 8, self_teacher=self_teacher), training), _batches,
            (2,), seed=0, stream="01", accelerator=make_accelerator(cpu=True),
        )  # fmt: skip

    whole, again = made(), made()
    for update in whole.run():
        # Late, because further updates would hide the rounding of a checkpoint.
        if update == 11:
            again.load_state(whole.state(), 11, 0.0)
    list(again.run())
    for part, tensors in whole.state().items():
        assert all(torch.equal(again.state()[part][name], value) for name, value in tensors.items()), part
    average = whole.state()["ema"]
    expected, found = whole.finish().state_dict(), again.finish().state_dict()
    for name, value in expected.items():
        assert torch.equal(found[name], value)
        assert torch.equal(value, average[name.removeprefix("network.")].to(dtype))


class _Buffered(torch.nn.Module):
    """A network with a constant and with buffers that calls change in each possible way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.norms = torch.nn.ModuleList(torch.nn.BatchNorm1d(2) for _ in range(3))
        self.constant, self.late = torch.nn.Module(), torch.nn.Module()
        self.constant.register_buffer("table", torch.randn(10_000))
        self.late.register_buffer("value", torch.zeros(5_000))
        for name in ("added", "assigned", "hidden", "grows"):
            held = torch.nn.Module()
            held.register_buffer("value", torch.zeros(3))
            self.add_module(name, held)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.added.value += 1
        self.assigned.value = self.assigned.value + 1
        self.hidden.value.data += 1
        self.grows.value = torch.full((self.calls + 3,), float(self.calls))
        if self.calls > 4:
            self.late.value += 1
        for norm in self.norms:
            x = norm(x)
        return x * self.weight


class _Copied(TorchDispatchMode):
    """Records the functions that copy tensors, with the size of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_", "_foreach_copy_"):
            held = args[0] if isinstance(args[0], list) else [args[0]]
            self.copies.append((name, max(tensor.numel() for tensor in held)))
        return func(*args, **kwargs or {})


def _kept(network: torch.nn.Module) -> KeptBuffers:
    player: Any = SimpleNamespace(network=network)
    return KeptBuffers([player])


@pytest.mark.parametrize("abandoned", range(8))
def test_the_buffers_of_an_abandoned_update_are_restored_bit_for_bit(abandoned: int) -> None:
    network = _Buffered()
    kept = _kept(network)
    for _ in range(abandoned):
        kept.keep()
        network(torch.randn(4, 2))
    kept.keep()
    before = {name: value.clone() for name, value in network.named_buffers()}
    for _ in range(2):
        network(torch.randn(4, 2))
        kept.restore()
        after = dict(network.named_buffers())
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)


def test_constant_buffers_are_copied_once_and_changing_ones_together() -> None:
    network = _Buffered()
    kept, found = _kept(network), []
    for _ in range(7):
        with _Copied() as copied:
            kept.keep()
        found.append(copied.copies)
        network(torch.randn(4, 2))
    assert [name for name, _ in found[0]] == ["clone"] * 15
    # Only the buffer that grows needs a new copy. The others are copied into their old copies, together for each dtype.
    assert [sorted(name for name, _ in copies) for copies in found[1:]] == [["_foreach_copy_"] * 2 + ["clone"]] * 6
    assert [max(size for _, size in copies) for copies in found] == [10_000, 4, 5, 6, 7, 5_000, 5_000]


def test_buffers_that_cannot_change_need_no_version() -> None:
    with torch.inference_mode():
        table = torch.ones(3)
    network = torch.nn.Module()
    network.register_buffer("table", table)
    kept = _kept(network)
    for _ in range(3):
        kept.keep()
    assert network.table is table


def test_a_tied_weight_that_the_state_lacks_is_still_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    network = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2, bias=False), "two": torch.nn.Linear(2, 2, bias=False)})
    network["two"].weight = network["one"].weight
    average = EMA(network, 0.9)
    assert set(average.state_dict()) == {"one.weight", "two.weight"}
    monkeypatch.setattr(player, "own_state", lambda module: {})
    assert set(average.state_dict()) == {"one.weight"}


def test_a_stage_averages_its_weights_as_they_are_after_each_update() -> None:
    stage = toy_plan(12).stages[0]
    trainer = _trainer(stage)
    expected = {name: value.double() for name, value in trainer.state()["student"].items()}
    for n in trainer.run():
        decay = min(0.9, (1 + n) / (10 + n))
        for name, value in trainer.state()["student"].items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    for name, value in trainer.state()["ema"].items():
        torch.testing.assert_close(value.double(), expected[name], rtol=0, atol=1e-6)


def test_a_stage_hands_on_its_average_and_a_student_without_one_its_weights(tmp_path: Path) -> None:
    trainer = _trainer(tuned(toy_plan().stages[0], num_updates=10))
    list(trainer.run())
    state = copy.deepcopy(trainer.state())
    handed_on = trainer.finish().network.state_dict()
    assert all(torch.equal(handed_on[name], state["ema"][name]) for name in handed_on)
    assert any(not torch.equal(state["student"][name], state["ema"][name]) for name in handed_on)
    plain = _trainer(Stage(Denoising(), Training(2, 1e-3, batch_size=4)))
    list(plain.run())
    assert "ema" not in plain.state()


def test_a_resumed_stage_counts_its_seconds_from_those_of_the_checkpoint(tmp_path: Path) -> None:
    stage, folder = toy_plan().stages[0], StageFolder(tmp_path)
    trainer, again = _trainer(stage), _trainer(stage)
    next(trainer.run())
    write_checkpoint(trainer.state(), {"run": "run", "stage": trainer.stream, "update": 1, "seconds": 1234.5}, folder)
    resume(again, folder, "run", print)
    assert (again.update, again.seconds) == (1, 1234.5)
    next(again.run())
    assert 1234.5 < again.window().seconds < 1334.5


def test_a_non_finite_loss_reports_stage_and_update_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    broken = points()

    class Poisoned(MLP.__mro__[1]):  # type: ignore[name-defined,misc]
        """Fail from the 9th training call on."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            self.calls = 0

        def arguments(self) -> dict[str, object]:
            return {}

        def forward(self, x_t: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            output: torch.Tensor = self.inner(x_t)
            return output * (float("nan") if self.calls > 8 else 1.0)

    spec = toy_spec(network=Poisoned, data=MemoryData("toy", broken), log_every=1)
    with pytest.raises(NonFinite, match=r"stage 00-denoise at update 8 \(.*\)\. Lower the learning rate"):
        finish(spec, tmp_path / "run")
    kept = [path.name for path in (tmp_path / "run").glob("stages/*/checkpoint-*")]
    assert sorted(kept) == ["checkpoint-00000003", "checkpoint-00000006"]


def test_dropout_acts_in_the_stage_that_asks_for_it_only(tmp_path: Path) -> None:
    without = toy_plan(teacher_updates=5, student_updates=2, dropout=0.0)
    with_dropout = toy_plan(teacher_updates=5, student_updates=2, dropout=0.5)
    finish(toy_spec(plan=without), tmp_path / "a")
    finish(toy_spec(plan=with_dropout), tmp_path / "b")
    assert weights(tmp_path / "a")["00-denoise"] != weights(tmp_path / "b")["00-denoise"]
    student = toy_plan().stages[1]
    trainer = StageTrainer(
        _denoiser(),
        _denoiser(),
        student,
        _batches,
        (2,),
        seed=0,
        stream="01",
        accelerator=make_accelerator(cpu=True),
    )
    layers = [m for m in trainer.finish().network.modules() if isinstance(m, torch.nn.Dropout)]
    assert layers
    assert all(layer.p == 0 for layer in layers)


def test_a_halving_stage_without_a_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="learns from a teacher, but none is given"):
        _trainer(Plan.halvings(4, 2, Training(2, 1e-3), updates_at={}).stages[0])


def test_bfloat16_trains_float32_weights_close_to_float32() -> None:
    stage = Stage(Denoising(), Training(30, 1e-3, batch_size=64))
    losses = []
    for precision in ("float32", "bf16"):
        trainer = StageTrainer(
            _denoiser(),
            None,
            stage,
            _batches,
            (2,),
            seed=0,
            stream="00",
            accelerator=make_accelerator(precision, cpu=True),
        )
        list(trainer.run())
        losses.append(trainer.window().loss)
        result = trainer.finish()
        assert {p.dtype for p in result.parameters()} == {torch.float32}
        x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
        # The result computes in float32 again, without autocast.
        assert result(x, 0.5).x0.dtype == torch.float32
    assert abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert losses[1] != losses[0]
