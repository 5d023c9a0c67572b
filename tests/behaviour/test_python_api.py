"""`halfstep.fit`, `distill`, `sample`, `save` and `load`, called as in a researcher's script."""

import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import inspect
import io
import os
import re
import signal
import sys
import tomllib
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import halfstep
from halfstep.core import callable as callables
from halfstep.core.draw import Draw
from halfstep.nets import MLP, LoRA, UNet2D, unet2d_config
from halfstep.objectives import (
    STUDENT,
    Batch,
    Evals,
    Frozen,
    Helper,
    Losses,
    Models,
    Objective,
    Outcome,
    Role,
    objectives,
)
from halfstep.runtime.files import DamagedFile
from support import in_turn
from toys import points, weights

CPU = halfstep.Engine(cpu=True, log_every=4, checkpoint_updates=4, trackers=())
TRAINING = halfstep.Training(10, 1e-2, batch_size=8, ema_decay=0.9)
CHAIN: dict[str, Any] = {"start": 4, "to": 1, "training": TRAINING, "plan": None, "engine": CPU}


class Net(nn.Module):
    """A network of the user's own class."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.layers(torch.cat([x_t, time[:, None]], 1))
        return found


class Labelled(nn.Module):
    """A network with a class and an angle as inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.classes, self.layers = nn.Embedding(4, 2), nn.Linear(4, 2)

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor, angle: Tensor | None = None) -> Tensor:
        told = self.classes(class_labels) if angle is None else self.classes(class_labels) + angle[:, None]
        found: Tensor = self.layers(torch.cat([x_t, told], 1))
        return found


def denoiser(network: Any = None) -> halfstep.NetworkDenoiser:
    return halfstep.NetworkDenoiser(Net() if network is None else network, halfstep.VPCosine(), halfstep.V())


def unet() -> UNet2D:
    torch.manual_seed(0)
    config = unet2d_config(
        size=(4, 4), in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
        attention=(False, True), attention_head_dim=4, norm_num_groups=4, mid_attention=False,
    )  # fmt: skip
    return UNet2D(config)


def state(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state(one), state(other), strict=True))


@pytest.fixture(scope="module")
def student() -> halfstep.Model:
    """Return a one-step student."""
    found = halfstep.distill(denoiser(), points(), **CHAIN)
    assert isinstance(found, halfstep.Model)
    return found


# Interrupted runs, and callbacks.


class Cut(Exception):
    """An exception that a user's callback may raise."""


def _raise(*_: Any) -> None:
    raise Cut


def _press(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _of_kind(kind: str, **more: Any) -> halfstep.Model:
    """Return a short call of each kind."""
    if kind == "fit":
        found = halfstep.fit(denoiser(), points(), TRAINING, engine=CPU, **more)
    elif kind == "lora":
        images = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        found = halfstep.distill(denoiser(unet()), images, lora_rank=2, **CHAIN | {"start": 2}, **more)
    else:
        found = halfstep.distill(denoiser(), points(), **CHAIN, **more)
    assert isinstance(found, halfstep.Model)
    return found


@pytest.mark.parametrize("kind", ["fit", "distill", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_interrupted_call_resumes_bit_for_bit_and_equals_the_call_in_memory(kind: str, tmp_path: Path) -> None:
    whole = _of_kind(kind, out=tmp_path / "whole")
    end = 10 if kind == "fit" else 20
    cuts = [
        ("raised", 2, _raise, Cut),
        ("before the first state", 1, _raise, Cut),
        ("pressed", 1, _press, KeyboardInterrupt),
    ]
    for name, after, cut, error in cuts[:1] if kind == "lora" else cuts:
        seen: list[int] = []

        def at(_: str, window: halfstep.Window, seen: list[int] = seen, after: int = after, cut: Any = cut) -> None:
            seen.append(window.update)
            if len(seen) == after:
                cut()

        with pytest.raises(error):
            _of_kind(kind, out=tmp_path / name, on_window=at)
        later: list[int] = []
        again = _of_kind(
            kind, out=tmp_path / name, on_window=lambda _, window, later=later: later.append(window.update)
        )
        assert later[-1] == end
        assert weights(tmp_path / name) == weights(tmp_path / "whole"), name
        assert equal(again, whole)
        if name == "pressed":
            assert later[0] > seen[-1], "the state was saved when Ctrl-C came"
    # Nothing is trained again, and a call in memory gives the same numbers.
    assert equal(_of_kind(kind, out=tmp_path / "whole", on_window=_raise), whole)
    assert all(map(torch.allclose, state(_of_kind(kind)), state(whole)))


def test_an_interrupted_call_does_not_change_the_next_calls_network(tmp_path: Path) -> None:
    own = denoiser()
    before = state(own)
    with pytest.raises(Cut):
        halfstep.fit(own, points(), TRAINING, engine=CPU, out=tmp_path / "run", on_window=_raise)
    assert all(map(torch.equal, state(own), before))
    model = halfstep.fit(own, points(), TRAINING, engine=CPU, out=tmp_path / "run")
    assert equal(own, model.denoiser), "a call that ends trains in place"


def test_a_folder_of_another_call_is_refused_and_names_what_differs(tmp_path: Path) -> None:
    halfstep.fit(denoiser(), points(), TRAINING, engine=CPU, out=tmp_path / "run")
    for changes, words in (
        ({"seed": 1}, "seed: 1"),
        (
            {"training": halfstep.Training(10, 1e-3, batch_size=8, ema_decay=0.9)},
            r"stages\.0\.learning_rate: 0\.001 \(the",
        ),
        ({"data": points() + 1}, "different data.*choose another"),
    ):
        arguments: dict[str, Any] = {"data": points(), "training": TRAINING, "engine": CPU} | changes
        with pytest.raises(ValueError, match=words):
            halfstep.fit(denoiser(), **arguments, out=tmp_path / "run")
    halfstep.distill(denoiser(), points(), **CHAIN, out=tmp_path / "chain")
    # The same weights with another meaning.
    for process, prediction, words in (
        (halfstep.VPCosine(), halfstep.X0(), r"prediction\.type: x0 \(the folder has v\)"),
        (halfstep.VPCosine(-10, 10), halfstep.V(), r"process\.digest"),
    ):
        other = halfstep.NetworkDenoiser(Net(), process, prediction)
        with pytest.raises(ValueError, match=words):
            halfstep.fit(other, points(), TRAINING, engine=CPU, out=tmp_path / "run")
        with pytest.raises(ValueError, match=words):
            halfstep.distill(other, points(), **CHAIN, out=tmp_path / "chain")
    moved = denoiser()
    with torch.no_grad():
        moved.network.layers[0].bias += 1e-3
    with pytest.raises(ValueError, match=r"different recipe.*teacher: "):
        halfstep.distill(moved, points(), **CHAIN, out=tmp_path / "chain")
    labelled = (points(), {"class_labels": torch.arange(200) % 2})
    guided = CHAIN | {"guidance": halfstep.FixedGuidance(2.0), "matching": TRAINING}
    for null, is_refused in ((2, False), (3, True)):
        told = guided | {"null": {"class_labels": torch.tensor(null)}, "out": tmp_path / "guided"}
        with pytest.raises(ValueError, match="null: ") if is_refused else contextlib.nullcontext():
            halfstep.distill(denoiser(Labelled()), labelled, **told)
    # Logging, measurements and location may change.
    (tmp_path / "run").rename(tmp_path / "moved")
    free: dict[str, Any] = {"engine": halfstep.Engine(cpu=True, trackers=()), "on_window": _raise}
    halfstep.fit(denoiser(), points(), TRAINING, out=tmp_path / "moved", **free)


@pytest.mark.parametrize("kept", [False, True])
def test_students_of_floats_are_images_of_the_same_classes_and_origin_as_their_teacher(
    kept: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = MLP((1, 4, 4), width=8, depth=1, num_classes=3)
    facts: dict[str, Any] = {"num_classes": 3, "class_names": ("a", "b", "c"), "clip": True, "is_image": True}
    teacher = halfstep.Model.of(denoiser(network), (1, 4, 4), source="here (weights sha256 0)", **facts)
    data = (torch.rand(40, 1, 4, 4) * 2 - 1, {"class_labels": torch.arange(40) % 2})
    student = halfstep.distill(teacher, data, **CHAIN, out=tmp_path / "run" if kept else None)
    assert isinstance(student, halfstep.Model)
    found = student.manifest.model_dump()
    assert {name: found[name] for name in facts} == facts
    assert found["source"] == "here (weights sha256 0)"
    # By default, only classes of the training data are sampled.
    assert set(student.cond(range(6))["class_labels"].tolist()) == {0, 1}


def test_a_chain_in_memory_holds_the_moments_of_one_stage_at_a_time() -> None:
    held: list[int] = []

    def optimizers() -> set[int]:
        gc.collect()
        return {id(each) for each in gc.get_objects() if isinstance(each, torch.optim.Optimizer)}

    # Other tests may have left optimisers.
    others = optimizers()
    halfstep.distill(denoiser(), points(), **CHAIN, on_window=lambda *_: held.append(len(optimizers() - others)))
    assert len(held) > 2
    assert max(held) == held[0]


@pytest.mark.parametrize("kept", [True, False], ids=["folder", "memory"])
def test_callbacks_see_every_window_and_every_stage(kept: bool, tmp_path: Path) -> None:
    windows: list[tuple[str, halfstep.Window]] = []
    stages: list[tuple[str, Any]] = []
    engine = halfstep.Engine(cpu=True, log_every=3, trackers=())  # the last window is shorter
    found = halfstep.distill(
        denoiser(), points(), **CHAIN | {"engine": engine}, out=tmp_path / "run" if kept else None,
        on_window=lambda name, window: windows.append((name, window)),
        on_stage=lambda name, model: stages.append((name, model)),
    )  # fmt: skip
    lengths = [stage.training.num_updates for stage in halfstep.Plan.halvings(4, 1, TRAINING).stages]
    expected = [
        (name, update)
        for name, length in zip(("01-halve-0002", "02-halve-0001"), lengths, strict=True)
        for update in sorted({*range(3, length + 1, 3), length})
    ]
    assert [(name, window.update) for name, window in windows] == expected
    assert all(isinstance(window, halfstep.Window) and window.loss >= 0 for _, window in windows)
    assert [(name, model.num_steps) for name, model in stages] == [("01-halve-0002", 2), ("02-halve-0001", 1)]
    assert equal(stages[-1][1], found)
    assert not equal(stages[0][1], found)


def test_the_moving_average_is_the_one_written_out() -> None:
    """avg <- d avg + (1 - d) w with d = min(decay, (1 + n) / (10 + n)), over the weights after each update."""
    own = denoiser()
    decay = 0.45  # above the bound of the first updates, below that of the last
    averages = [value.double() for value in state(own)]

    def at(_: str, window: halfstep.Window) -> None:
        kept = min(decay, (1 + window.update) / (10 + window.update))
        for average, weight in zip(averages, state(own), strict=True):
            average.mul_(kept).add_((1 - kept) * weight)

    training = halfstep.Training(12, 1e-2, batch_size=8, ema_decay=decay)
    engine = halfstep.Engine(cpu=True, log_every=1, trackers=())
    model = halfstep.fit(own, points(), training, engine=engine, on_window=at)
    for found, expected in zip(state(model.denoiser), averages, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert equal(own, model.denoiser)


def test_a_folder_is_measured_if_asked(tmp_path: Path) -> None:
    measured = halfstep.Evaluation(
        num_samples=24, num_compared=8, num_shown=4, features="pixels", teacher_heun_steps=()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", halfstep.HalfstepWarning)  # few samples
        halfstep.distill(denoiser(), points(40), **CHAIN, out=tmp_path / "run", evaluation=measured)
    assert all((path / "metrics.json").is_file() for path in (tmp_path / "run" / "stages").iterdir())


def test_a_terminal_gets_a_bar_and_any_other_output_gets_lines(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**more: Any) -> str:
        halfstep.fit(denoiser(), points(), TRAINING, engine=CPU, **more)
        out, err = capfd.readouterr()
        assert out == ""
        return str(err)

    monkeypatch.delenv("FORCE_COLOR", raising=False)
    start, update, end = said().splitlines()
    assert start == "00-denoise: 10 updates"
    assert re.match(r"00-denoise: update \d+/10  loss \S+  \S+ samples/s  ", update)
    assert update.endswith(" of training left in this run")
    assert end.startswith("00-denoise: done in ")
    assert said(progress=False) == ""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in the logs of many CI services
    monkeypatch.setenv("TERM", "xterm")
    assert said().splitlines()[0] == "00-denoise: 10 updates"
    monkeypatch.setattr("halfstep.run.progress.on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    shown = said()
    assert "00-denoise" in shown
    assert "10/10" in shown
    assert said(progress=False) == ""


def test_training_outlives_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log on a full disk or a closed pipe (`2>&1 | head`) loses progress lines, not the training."""

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in (Closed(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert isinstance(halfstep.fit(denoiser(), points(), TRAINING, engine=CPU), halfstep.Denoiser)


def test_the_lines_of_a_chain_name_its_stages_as_the_command_line_does(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def said(**more: Any) -> list[str]:
        halfstep.distill(denoiser(), points(40), **CHAIN, **more)
        out, err = capfd.readouterr()
        assert out == ""
        return [line.partition(" in ")[0] for line in err.splitlines() if ": update " not in line]

    in_memory, in_folder = said(), said(out=tmp_path / "run")
    assert in_memory[:2] == ["01-halve-0002: 20 updates", "01-halve-0002: done"]
    assert in_folder == ["00-teacher: complete", *in_memory]
    # Stages that were trained by an earlier call.
    assert said(out=tmp_path / "run") == [
        f"{name}: complete" for name in ("00-teacher", "01-halve-0002", "02-halve-0001")
    ]
    assert said(out=tmp_path / "run", progress=False) == []


class Level(nn.Module):
    """Another network, with a level that is added to its output and starts at random."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.level = network, nn.Parameter(torch.randn(2))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.network(x_t, time) + self.level
        return found


@dataclasses.dataclass(frozen=True)
class Alone(Objective):
    """Denoising by a researcher's objective, which also pulls the student to where it started."""

    needs_teacher: ClassVar[bool] = False
    grown: bool = False

    @property
    def outcome(self) -> Outcome:
        return Outcome(Role.TEACHER)

    @property
    def evals(self) -> Mapping[str, Evals]:
        return {STUDENT: Evals(1, 1), "first": Evals(1)}

    @property
    def helpers(self) -> Mapping[str, Helper]:
        return {"first": Frozen()}

    def start(self, teacher: halfstep.Denoiser) -> halfstep.Denoiser:
        if not self.grown:
            return teacher
        assert isinstance(teacher, halfstep.NetworkDenoiser)
        if isinstance(teacher.network, MLP):
            wide = MLP((2,), width=8, depth=2)
            wide.load_state_dict(teacher.network.state_dict(), strict=False)
            return halfstep.NetworkDenoiser(wide, teacher.process, teacher.prediction)
        return halfstep.NetworkDenoiser(Level(teacher.network), teacher.process, teacher.prediction)

    def loss(self, models: Models, batch: Batch, draw: Draw) -> Losses:
        losses = halfstep.Denoising().loss(models, batch, draw)
        x_t = draw.normal("other", batch.x0.shape[1:]).to(batch.x0)
        with torch.no_grad():
            first = models.helpers["first"](x_t, 1.0, batch.cond).x0
        pull = (models.student(x_t, 1.0, batch.cond).x0 - first).square().mean(1)
        return Losses(losses.loss + pull, losses.log_snr)


@pytest.fixture(scope="module")
def alone() -> Iterator[type[Alone]]:
    """Register the researcher's objective for one test."""
    objectives.register("alone")(Alone)
    yield Alone
    del objectives["alone"]


@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("kind", ["denoising", "alone"])
def test_a_stage_without_a_teacher_trains_a_copy_in_memory_as_in_a_folder(
    tmp_path: Path, alone: type[Alone], kind: str, place: str
) -> None:
    training = halfstep.Training(6, 1e-2, batch_size=8)
    one = halfstep.Plan.of(halfstep.Denoising() if kind == "denoising" else alone(), training)
    two, four = (halfstep.Plan.halvings(2 * steps, steps, training, updates_at={}) for steps in (2, 4))
    plan = {"first": one + four + two, "middle": four + one + two, "last": four + two + one}[place]
    results, names = [], []
    for out in (None, tmp_path / "run"):
        teacher, stages = denoiser(), list[str]()
        before = state(teacher)
        found = halfstep.distill(
            teacher,
            points(),
            plan=plan,
            engine=CPU,
            out=out,
            on_stage=lambda name, _, stages=stages: stages.append(name),
        )
        assert all(map(torch.equal, state(teacher), before))
        assert all(parameter.requires_grad for parameter in teacher.parameters())
        results.append(found)
        names.append([name for name in stages if name != "00-teacher"])
    assert equal(*results)
    assert names[0] == names[1] == plan.names(1)


def test_a_model_keeps_the_guidance_of_its_parent_in_memory_as_in_a_folder(tmp_path: Path) -> None:
    data = points(), {"class_labels": torch.arange(200) % 3}
    plan = halfstep.Plan.of(halfstep.Denoising(), TRAINING)
    for out in (None, tmp_path / "run"):
        found = halfstep.distill(
            denoiser(Labelled()), data, plan=plan, guidance=halfstep.FixedGuidance(2.0), null={"class_labels": 3},
            matching=TRAINING, engine=CPU, out=out,
        )  # fmt: skip
        assert found.guidance == halfstep.FixedGuidance(2.0), out


def test_random_weights_that_an_objective_adds_depend_only_on_the_seed(tmp_path: Path, alone: type[Alone]) -> None:
    plan = halfstep.Plan.of(alone(grown=True), TRAINING)

    def level(global_seed: int, seed: int) -> Tensor:
        teacher = denoiser()
        torch.manual_seed(global_seed)
        found: Tensor = halfstep.distill(teacher, points(), plan=plan, engine=CPU, seed=seed).network.level
        return found

    assert torch.equal(level(0, 0), level(1, 0))
    assert not torch.allclose(level(0, 0), level(0, 1), atol=0.1)

    # A frozen copy of the start is made again when the run resumes.
    def kept(name: str, global_seed: int, **more: Any) -> halfstep.Model:
        torch.manual_seed(3)
        teacher = denoiser(MLP((2,), width=8, depth=1))
        torch.manual_seed(global_seed)
        found = halfstep.distill(teacher, points(), plan=plan, engine=CPU, out=tmp_path / name, **more)
        assert isinstance(found, halfstep.Model)
        return found

    whole, windows = kept("whole", 0), list[int]()

    def cut(_: str, window: halfstep.Window) -> None:
        windows.append(window.update)
        if len(windows) == 2:
            raise Cut

    with pytest.raises(Cut):
        kept("cut", 1, on_window=cut)
    assert equal(kept("cut", 2, on_window=lambda _, window: windows.append(window.update)), whole)
    assert windows[2] > windows[0], "the call resumed"


def test_a_network_on_another_process_is_loaded_into_the_users_own(tmp_path: Path) -> None:
    process, further = halfstep.VPCosine(-10, 10), halfstep.VPCosine(-6, 6)
    student = halfstep.distill(denoiser(), points(), **CHAIN, process=process, out=tmp_path / "run")
    halfstep.save(student, tmp_path / "saved")
    for path in ("run", "saved"):
        for network in (Net(), student.network):
            loaded = halfstep.load(tmp_path / path, network=network)
            assert loaded.process == process
            assert torch.equal(loaded.sample(range(4)), student.sample(range(4)))
    # Twice, from a matched model.
    matched = halfstep.load(tmp_path / "run" / "stages" / "01-match", network=Net())
    twice = halfstep.distill(matched, points(), **CHAIN, process=further, out=tmp_path / "twice")
    assert torch.equal(halfstep.load(tmp_path / "twice", network=Net()).sample(range(4)), twice.sample(range(4)))


# Data.


def test_the_forms_of_data_mean_the_same() -> None:
    x0 = points(32)
    array = x0.double().numpy()
    forms: dict[str, Any] = {
        "float32": x0, "float64": array, "big-endian": array.astype(">f8"), "backwards": array[::-1].copy()[::-1],
        "float64 tensor": x0.double(), "pair": (x0, {}), "opened": halfstep.data.MemoryData("memory", x0),
    }  # fmt: skip
    expected = state(halfstep.fit(denoiser(), x0, TRAINING, engine=CPU))
    for name, form in forms.items():
        assert all(map(torch.equal, state(halfstep.fit(denoiser(), form, TRAINING, engine=CPU)), expected)), name
    other = state(halfstep.fit(denoiser(), x0.flip(0), TRAINING, engine=CPU))
    assert not all(map(torch.equal, other, expected))
    # Streams: a pair of tensors is a pair of batches, not samples with conditions.
    streams: tuple[Any, ...] = ([x0], (x0, x0), [array], [(x0, {})])
    first, *rest = (state(halfstep.fit(denoiser(), form, TRAINING, engine=CPU)) for form in streams)
    assert all(all(map(torch.equal, found, first)) for found in rest)


def test_conditions_reach_the_network_row_by_row_and_classes_can_be_sampled(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Told(Labelled):
        def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor, angle: Tensor | None = None) -> Tensor:
            assert angle is not None
            seen.append((class_labels, angle))
            return super().forward(x_t, time, class_labels, angle)

    labels = np.arange(32) % 3
    angles = labels.astype(np.float64) / 2
    for out in (None, tmp_path / "run"):
        data = (points(32), {"class_labels": labels, "angle": angles})
        model = halfstep.fit(denoiser(Told()), data, TRAINING, engine=CPU, out=out)
        assert seen
        assert all(torch.equal(label / 2, angle) for label, angle in seen)
        assert {int(label) for labels_, _ in seen for label in labels_} == {0, 1, 2}
        assert (model.num_classes, model.manifest.conditions) == (3, {"angle": ()})
        with pytest.raises(ValueError, match="needs the condition angle"):
            model.sample(range(3), 4)
        assert model.sample(range(3), 4, class_label=2, cond={"angle": torch.ones(3)}).shape == (3, 2)
        seen.clear()
    with pytest.raises(ValueError, match=r"conditioned on angle, which the data does not contain. Pass \(x0, \{'"):
        halfstep.distill(model, (points(32), {"class_labels": labels}), **CHAIN)


def test_a_scale_far_from_the_noise_gives_a_warning() -> None:
    for data in (1000 * points(), [1000 * points()]):
        with pytest.warns(halfstep.HalfstepWarning, match=r"noise has unit variance.*Train on \(x - mean\) / std"):
            halfstep.fit(denoiser(), data, TRAINING, engine=CPU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        halfstep.fit(denoiser(), points(), TRAINING, engine=CPU)


# Callables.

GLOBAL = Net()
FIRST, LAST = GLOBAL.layers[0], GLOBAL.layers[2]
NETS = types.ModuleType("nets")


def _global(x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = GLOBAL(x_t, time)
    return found


class Caller:
    """An object that calls a module without being one."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        return self.run(x_t, time)

    def run(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.network(x_t, time)
        return found


def _called(network: nn.Module, x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = network(x_t, time)
    return found


def _closure(network: nn.Module) -> Callable[..., Tensor]:
    def inner(x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = network(x_t, time)
        return found

    return lambda x_t, time: inner(x_t, time)


def _embedded(x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = FIRST(torch.cat([x_t, time[:, None]], 1))
    return nn.functional.silu(found)


def _through_a_function(x_t: Tensor, time: Tensor) -> Tensor:
    hidden = _embedded(x_t, time)
    found: Tensor = LAST(hidden)
    return found


def _through_inner_functions(x_t: Tensor, time: Tensor) -> Tensor:
    def inner() -> Tensor:
        return functools.reduce(lambda hidden, layer: layer(hidden), [_embedded(x_t, time), *[LAST for _ in range(1)]])

    return inner()


def _in_a_circle(x_t: Tensor, time: Tensor, left: int = 2) -> Tensor:
    return _in_a_circle(x_t, time, left - 1) if left else _global(x_t, time)


def _by_default(network: nn.Module) -> Callable[..., Tensor]:
    def inner(x_t: Tensor, time: Tensor, network: nn.Module = network) -> Tensor:
        found: Tensor = network(x_t, time)
        return found

    return inner


class Half:
    """An object that has one of its modules in a global variable."""

    def __init__(self) -> None:
        self.first = FIRST

    def run(self, x_t: Tensor, time: Tensor) -> Tensor:
        hidden = nn.functional.silu(self.first(torch.cat([x_t, time[:, None]], 1)))
        found: Tensor = LAST(hidden)
        return found


def _of_a_python_module(x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = NETS.unet(x_t, time)
    return found


class Nets:
    """A class that only holds modules."""

    first = Net()
    called: ClassVar = staticmethod(_closure(Net()))


def _of_a_class(x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = Nets.first(x_t, time)
    return found


def _by_a_static_method(x_t: Tensor, time: Tensor) -> Tensor:
    found: Tensor = Nets.called(x_t, time)
    return found


def _of_a_class_in_a_closure() -> Callable[..., Tensor]:
    class Held:
        first = Net()

    def inner(x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = Held.first(x_t, time)
        return found

    return inner


class Classy:
    """An object whose module is an attribute of its class."""

    first = Net()

    def __call__(self, x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = self.first(x_t, time)
        return found


def _of_an_alias(x_t: Tensor, time: Tensor) -> Tensor:
    nets = NETS
    found: Tensor = nets.unet(x_t, time)
    return found


def _imported(x_t: Tensor, time: Tensor) -> Tensor:
    import held_nets.inner  # type: ignore[import-not-found]

    found: Tensor = held_nets.inner.unet(x_t, time)
    return found


def _imported_under_another_name(x_t: Tensor, time: Tensor) -> Tensor:
    import held_nets.inner as nets

    found: Tensor = nets.unet(x_t, time)
    return found


def _imported_from(x_t: Tensor, time: Tensor) -> Tensor:
    from held_nets.inner import unet

    def inner() -> Tensor:
        found: Tensor = unet(x_t, time)
        return found

    return inner()


def _by_attribute() -> Callable[..., Tensor]:
    def inner(x_t: Tensor, time: Tensor) -> Tensor:
        found: Tensor = inner.network(x_t, time)  # type: ignore[attr-defined]
        return found

    inner.network = Net()  # type: ignore[attr-defined]
    return inner


@in_turn(
    "make",
    [
        lambda: _closure(Net()),
        lambda: _global,
        lambda: Net().forward,
        lambda: Caller(Net()).run,
        lambda: Caller(Net()),
        lambda: functools.partial(_called, Net()),
        lambda: _through_a_function,
        lambda: _through_inner_functions,
        lambda: _in_a_circle,
        lambda: _by_default(Net()),
        lambda: _by_attribute(),
        lambda: Half().run,
        lambda: functools.partial(_closure(Net())),
        lambda: _closure(_through_a_function),
    ],
)
def test_any_callable_is_trained_as_the_module_that_it_calls(make: Callable[[], Any]) -> None:
    GLOBAL.load_state_dict(Net().state_dict())
    teacher = denoiser(make())
    before = state(teacher)
    student = halfstep.distill(teacher, points(), **CHAIN)
    assert all(map(torch.equal, state(teacher), before)), "the teacher's own modules stay"
    expected = halfstep.distill(denoiser(), points(), **CHAIN)
    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(halfstep.sample(student, noise), halfstep.sample(expected, noise))
    assert not torch.equal(halfstep.sample(student, noise), halfstep.sample(teacher, noise, 1))


def test_a_callable_whose_modules_cannot_be_found_or_copied_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no weights to train.*Make the network an nn.Module"):
        halfstep.fit(denoiser(lambda x_t, time: x_t), points(), TRAINING)
    NETS.unet = Net()  # type: ignore[attr-defined]
    hidden = Caller(_closure(Net()))  # type: ignore[arg-type]
    for function, network in ((_of_a_python_module, NETS.unet), (hidden, denoiser(hidden).network)):
        before = state(network)
        with pytest.raises(ValueError, match=r"modules cannot be copied. Make it an nn.Module"):
            halfstep.distill(denoiser(function), points(), **CHAIN)
        halfstep.fit(denoiser(function), points(), TRAINING, engine=CPU)
        assert not any(map(torch.equal, state(network), before)), "training needs no copy"


@pytest.mark.parametrize(
    "function",
    [
        _of_a_class,
        _by_a_static_method,
        _of_a_class_in_a_closure(),
        Classy(),
        _of_an_alias,
        _imported,
        _imported_under_another_name,
        _imported_from,
    ],
)
def test_modules_that_are_found_but_cannot_be_copied_are_never_shared(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Tensor]
) -> None:
    for name in ("held_nets", "held_nets.inner"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["held_nets"].inner = sys.modules["held_nets.inner"]  # type: ignore[attr-defined]
    NETS.unet = sys.modules["held_nets.inner"].unet = Net()  # type: ignore[attr-defined]
    network = denoiser(function).network
    assert [type(part) for part in network.parts] == [Net]
    with pytest.raises(ValueError, match="modules cannot be copied"):
        copy.deepcopy(network)


def test_relative_imports_in_a_function_are_found() -> None:
    package, unet = types.ModuleType("held_nets"), Net()
    package.unet = unet  # type: ignore[attr-defined]
    names: dict[str, Any] = {"__package__": "held_nets", "__name__": "held_nets.calls"}
    exec("def called(x_t, time):\n    from . import other, unet\n    return unet(x_t, time)\n", names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "held_nets", package)
        assert list(denoiser(names["called"]).network.parts) == [unet]
    assert not list(denoiser(names["called"]).network.parts)


class Counted(list[float]):
    """A list that counts how often it is read."""

    reads = 0

    def __iter__(self) -> Iterator[float]:
        self.reads += 1
        return super().__iter__()


NUMBERS = Counted([0.5])


def _reads_numbers(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def outer(x_t: Tensor, time: Tensor) -> Tensor:
        return inner(x_t, time) + NUMBERS[0]

    return outer


def test_long_lists_are_read_once_in_each_search(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, searched, parts_of = Counted([0.5]), [], callables._parts
    numbers *= 10**6
    monkeypatch.setitem(globals(), "NUMBERS", numbers)

    def parts(value: Any) -> Any:
        searched.append(value)
        return parts_of(value)

    monkeypatch.setattr(callables, "_parts", parts)
    network = denoiser(functools.reduce(lambda inner, _: _reads_numbers(inner), range(20), _global)).network
    assert numbers.reads == 1
    assert len(searched) < 30
    copy.deepcopy(network)
    assert numbers.reads == 3, "once for the original and once for the copy"
    assert len(searched) < 90


# Models.


def test_saved_models_can_be_loaded(tmp_path: Path, student: halfstep.Model) -> None:
    halfstep.save(student, tmp_path / "student")
    with pytest.raises(ValueError, match=r"of your own class .*Net.*halfstep.load\(path, network=MyNetwork\(\)\)"):
        halfstep.load(tmp_path / "student")
    given = Net()
    again = halfstep.load(tmp_path / "student", network=given)
    assert equal(again, student)
    assert not equal(again, denoiser(given)), "the network that is passed is copied"
    assert torch.equal(again.sample(range(4)), student.sample(range(4)))
    assert (again.num_steps, again.shape, again.role) == (1, (2,), "student")
    halfstep.save(again, tmp_path / "student")  # overwriting itself
    assert equal(halfstep.load(tmp_path / "student", network=Net()), student)


def test_a_saved_model_of_the_library_needs_no_network_and_keeps_classes_and_null(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MLP((2,), width=8, depth=1, num_classes=3)
    null = {"class_labels": torch.tensor(2)}
    model = halfstep.Model.of(denoiser(network), (2,), num_classes=3, null=null)
    halfstep.save(model, tmp_path / "teacher")
    again = halfstep.load(tmp_path / "teacher")
    assert equal(again, model)
    asked: dict[str, Any] = {"num_steps": 4, "class_label": [0, 1], "guidance_scale": 3.0}
    assert torch.equal(again.sample(range(2), **asked), model.sample(range(2), **asked))
    assert not torch.equal(again.sample(range(2), **asked), again.sample(range(2), **asked | {"guidance_scale": 1.0}))


def test_lora_weights_are_merged_when_saved(tmp_path: Path) -> None:
    _of_kind("lora", out=tmp_path / "run")
    student = halfstep.load(tmp_path / "run")
    halfstep.save(student, tmp_path / "student")
    again = halfstep.load(tmp_path / "student")
    torch.testing.assert_close(again.sample(range(4)), student.sample(range(4)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [None, 3])
def test_a_lora_teacher_is_merged_in_memory_as_in_a_folder(tmp_path: Path, lora_rank: int | None) -> None:
    images = torch.randn(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    told: dict[str, Any] = {"training": halfstep.Training(3, 1e-2, batch_size=4), "engine": CPU}
    halfstep.distill(denoiser(unet()), images, start=4, to=2, lora_rank=2, out=tmp_path / "teacher", **told)
    teacher = halfstep.load(tmp_path / "teacher")
    assert isinstance(teacher.network, LoRA)
    before, frozen = state(teacher), [parameter.requires_grad for parameter in teacher.parameters()]
    more: dict[str, Any] = told | {"start": 2, "to": 1, "lora_rank": lora_rank}
    stored = halfstep.distill(teacher, images, out=tmp_path / "student", **more)
    student = halfstep.distill(teacher, images, **more)
    assert isinstance(student.network, UNet2D)
    assert list(student.state_dict()) == list(stored.state_dict())
    assert all(map(torch.allclose, state(student), state(stored)))
    assert not all(map(torch.allclose, state(student), state(teacher.merged())))
    assert all(map(torch.equal, state(teacher), before))
    assert [parameter.requires_grad for parameter in teacher.parameters()] == frozen


def test_save_overwrites_models_only(tmp_path: Path, student: halfstep.Model) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    halfstep.fit(denoiser(), points(), TRAINING, engine=CPU, out=tmp_path / "run")
    stage = tmp_path / "run" / "stages" / "00-denoise"
    for path, words in (
        (tmp_path / "thesis", "contains thesis.tex"),
        (tmp_path / "file", "a file"),
        (stage, "of a run"),
    ):
        with pytest.raises(ValueError, match=f"{words}.*Choose another path"):
            halfstep.save(student, path)
    assert halfstep.load(stage, network=Net()).role == "teacher"


def test_a_save_that_fails_keeps_the_old_model_and_one_that_was_killed_does_not_block_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(weight: float, **changes: Any) -> halfstep.Model:
        network = MLP((2,), width=8, depth=1, num_classes=3)
        with torch.no_grad():
            network.time.weight.fill_(weight)
        return halfstep.Model.of(denoiser(network), (2,), num_classes=3, **changes)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    good, place = model(1.0, null={"class_labels": torch.tensor(2)}), tmp_path / "best"
    halfstep.save(good, place)
    with pytest.raises(DamagedFile, match="not finite"):
        halfstep.save(model(float("nan")), place)
    for name in ("save_file", "check_written"):
        with monkeypatch.context() as patch:
            patch.setattr(f"halfstep.runtime.tensors.{name}", full)
            with pytest.raises(OSError, match="No space left"):
                halfstep.save(model(2.0), place)
    again = halfstep.load(place)
    assert equal(again, good)
    assert again.null
    (place / ".model.safetensors.0123456789ab.tmp").mkdir()
    (place / ".null.safetensors.0123456789ab.tmp").write_text("half")
    halfstep.save(other := model(3.0), place)
    assert equal(halfstep.load(place), other)
    assert sorted(path.name for path in place.iterdir()) == ["manifest.json", "model.safetensors"]


def test_a_saved_model_that_was_altered_is_refused(tmp_path: Path, student: halfstep.Model) -> None:
    halfstep.save(student, tmp_path / "student")
    file = tmp_path / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(DamagedFile, match=r"model\.safetensors"):
        halfstep.load(tmp_path / "student", network=Net())


def test_sample_uses_the_steps_and_the_sampler_of_a_student(student: halfstep.Model) -> None:
    noise = student.noise(range(3))
    assert len(list(halfstep.trajectory(student, noise))) == 1
    assert torch.equal(halfstep.sample(student, noise), halfstep.sample(student, noise, 1, halfstep.DDIM()))
    for wrapper in (halfstep.Clipped(student), halfstep.Clipped(halfstep.Clipped(student))):
        assert len(list(halfstep.trajectory(wrapper, noise))) == 1
    with pytest.raises(ValueError, match=r"works with any number of steps\. Pass num_steps"):
        halfstep.sample(denoiser(), noise)


def test_one_number_is_one_seed(student: halfstep.Model) -> None:
    many = student.sample(range(5))
    for seeds in (3, np.int64(3), torch.tensor(3), [3], torch.tensor([3]), np.array([3]), range(3, 4), (3,)):
        torch.testing.assert_close(student.sample(seeds), many[3:4], rtol=0, atol=1e-6)  # type: ignore[arg-type]
        assert torch.equal(halfstep.sample_noise(seeds, (2,)), student.noise([3]))  # type: ignore[arg-type]


def test_class_labels_belong_to_their_samples() -> None:
    model = halfstep.fit(denoiser(Labelled()), (points(32), {"class_labels": np.arange(32) % 4}), TRAINING, engine=CPU)
    labels = [3, 0, 2, 2, 1]
    one_by_one = torch.cat([model.sample(seed, 4, class_label=label) for seed, label in enumerate(labels)])
    for given in (labels, torch.tensor(labels), np.array(labels)):
        for size in (None, 2):
            found = model.sample(range(5), 4, class_label=given, batch_size=size)  # type: ignore[arg-type]
            torch.testing.assert_close(found, one_by_one, rtol=0, atol=1e-5)
    assert not torch.allclose(model.sample(range(5), 4, class_label=3), one_by_one)


# Argument checks.


def _fit(own: Any = None, **changes: Any) -> Any:
    arguments: dict[str, Any] = {"denoiser": denoiser() if own is None else own, "data": points()} | changes
    arguments = {"training": TRAINING} | arguments
    return halfstep.fit(**arguments)


def _distill(teacher: Any = None, **changes: Any) -> Any:
    return halfstep.distill(denoiser() if teacher is None else teacher, **CHAIN | {"data": points()} | changes)


def _sample(model: Any = None, noise: Any = None, *rest: Any, **more: Any) -> Any:
    x_t = torch.zeros(3, 2) if noise is None else noise
    return halfstep.sample(denoiser() if model is None else model, x_t, *(rest or (4,)), **more)


BUILD = r"halfstep\.NetworkDenoiser\(network, halfstep\.VPCosine\(\), halfstep\.V\(\)\)"
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "a module to fit": (lambda: _fit(denoiser=Net()), BUILD),
    "a module to distill": (lambda: _distill(Net()), BUILD),
    "a module to sample": (lambda: _sample(Net()), BUILD),
    "a function to distill": (lambda: _distill(_global), BUILD),
    "a module to clip": (lambda: halfstep.Clipped(Net()), BUILD),  # type: ignore[arg-type]
    "a path to distill": (lambda: _distill("runs/x"), r"halfstep\.load\('runs/x'\)"),
    "a path to sample": (lambda: _sample(Path("runs/x")), r"halfstep\.load\('runs/x'\)"),
    "a class as teacher": (lambda: _distill(halfstep.NetworkDenoiser), r"Call it: NetworkDenoiser\(\.\.\.\)"),
    "a class as network": (lambda: denoiser(Net), "the class Net. Pass an instance"),
    "a path as network": (lambda: denoiser("net.pt"), "the str 'net.pt'. Pass an instance"),
    "a denoiser as network": (
        lambda: denoiser(denoiser()),
        r"already a denoiser \(a NetworkDenoiser\)\. Use it directly",
    ),
    "a class as process": (
        lambda: halfstep.NetworkDenoiser(Net(), halfstep.VPCosine, halfstep.V()),  # type: ignore[arg-type]
        r"Call it: VPCosine\(\.\.\.\)",
    ),
    "a string as prediction": (
        lambda: halfstep.NetworkDenoiser(Net(), halfstep.VPCosine(), "v"),  # type: ignore[arg-type]
        r"Pass halfstep\.V\(\)",
    ),
    "a string as sampler": (lambda: _sample(sampler="ddim"), r"Pass halfstep\.DDIM\(\) or halfstep\.Heun\(\)"),
    "a class as sampler": (lambda: _sample(sampler=halfstep.Heun), r"Call it: Heun\(\.\.\.\)"),
    "a string as the teacher's sampler": (lambda: _distill(teacher_sampler="heun"), r"Pass halfstep\.Heun\(\)"),
    "a clipped denoiser to fit": (
        lambda: halfstep.fit(halfstep.Clipped(denoiser()), points(), TRAINING),
        r"Pass its \.denoiser",
    ),
    **{
        f"a {name} inside a denoiser to {call.__name__[1:]}": (
            functools.partial(call, halfstep.Reprocessed(wrap(), halfstep.VPCosine(-10, 10))),
            rf"contains a {name}, which .* Pass the {name}'s \.denoiser",
        )
        for call in (_fit, _distill)
        for name, wrap in (
            ("Clipped", lambda: halfstep.Clipped(denoiser())),
            ("Guided", lambda: halfstep.Guided(denoiser(Labelled()), {"class_labels": torch.tensor(0)}, 2.0)),
            ("Model", lambda: halfstep.Model.of(denoiser(), (2,), clip=True)),
        )
    },
    "a number as training": (lambda: _distill(training=100), r"Pass halfstep\.Training\(num_updates"),
    "a number as guidance": (lambda: _distill(guidance=4.0), r"Pass halfstep\.FixedGuidance\(4\.0\)"),
    "a class as prediction": (lambda: _distill(prediction=halfstep.X0), r"Call it: X0\(\.\.\.\)"),
    "a fraction of steps": (lambda: _distill(to=0.5), "to must be a whole number"),
    "a word as start": (lambda: _distill(start="64"), "start must be a whole number"),
    "a number to finish": (lambda: _distill(finish=1), r"finish=\[2, 1\]"),
    "a number of Heun steps": (lambda: halfstep.Evaluation(teacher_heun_steps=2), r"Pass \(2,\)"),  # type: ignore[arg-type]
    "a dict as engine": (lambda: _fit(engine={}), r"Pass halfstep\.Engine\("),
    "True as evaluation": (lambda: _fit(evaluation=True), r"Pass halfstep\.Evaluation\(\)"),
    "evaluation without out": (lambda: _fit(evaluation=halfstep.Evaluation()), "Pass out"),
    "a bar as callback": (lambda: _fit(on_window="print"), "must be a function"),
    "a string as seed": (lambda: _fit(seed="0"), "Pass seed=0"),
    "a number as out": (lambda: _fit(out=3), "Pass out='runs/mine'"),
    "no such device": (lambda: _fit(device="gpu"), "the device 'gpu' does not exist here. Choose one of cpu"),
    "no such number": (lambda: _fit(device="cuda:99"), "the device 'cuda:99' does not exist here. Choose one of cpu"),
    "no such device to load": (lambda: halfstep.load("runs/x", "gpu"), "does not exist here. Choose one of cpu"),
    "batches into a folder": (lambda: _fit(data=[points()], out="x"), "data that can be resumed.*remove out"),
    "no data": (lambda: _fit(data=None), "Pass one of them"),
    "a module as data": (lambda: _fit(data=Net()), "Pass one of them"),
    "a dict as data": (lambda: _fit(data={"x0": points()}), "Pass one of them"),
    "a Dataset": (lambda: _fit(data=torch.utils.data.TensorDataset(points())), "DataLoader"),
    "whole numbers": (lambda: _fit(data=torch.zeros(8, 2, dtype=torch.int64)), r"Scale pixels to \[-1, 1\]"),
    "channels last": (lambda: _fit(data=torch.zeros(8, 5, 5, 3, dtype=torch.uint8)), r"permute\(0, 3, 1, 2\)"),
    "names as data": (lambda: _fit(data=np.array(["a"])), r"Pass floats \[n, \*dims\]"),
    "labels without a name": (lambda: _fit(data=(points(), torch.arange(200))), r"\{'class_labels': labels\}"),
    "labels of a loader": (lambda: _fit(data=[(points(), torch.arange(200))]), r"\{'class_labels': labels\}"),
    "a list as labels": (lambda: _fit(data=(points(), {"class_labels": [0] * 200})), r"Pass torch\.tensor"),
    "too few labels": (lambda: _fit(data=(points(), {"angle": torch.zeros(3)})), "Pass one row per sample"),
    "a model to save": (lambda: halfstep.save(denoiser(), "x"), r"halfstep\.Model\.of\(denoiser, shape\)"),  # type: ignore[arg-type]
    "a path to save": (lambda: halfstep.save("x", "y"), "save needs a model, got the str 'x'"),  # type: ignore[arg-type]
    "a model to load": (lambda: halfstep.load(denoiser()), "Pass the folder of a run"),  # type: ignore[arg-type]
    "whole noise": (lambda: _sample(noise=torch.zeros(3, 2, dtype=torch.int64)), "Pass torch.randn"),
    "an array as noise": (lambda: _sample(noise=np.zeros((3, 2))), "Pass torch.randn"),
    "one condition for all": (lambda: _sample(cond={"angle": torch.zeros(1)}), "Repeat the condition for each sample"),
    "a fraction as seeds": (lambda: halfstep.sample_noise(1.5, (2,)), "Pass seeds=0"),  # type: ignore[arg-type]
    "a word as seeds": (lambda: halfstep.sample_noise("12", (2,)), "Pass seeds=0"),  # type: ignore[arg-type]
    "a fraction among seeds": (lambda: halfstep.sample_noise([1, 2.5], (2,)), r"Pass seeds=range\(64\)"),  # type: ignore[list-item]
}  # fmt: skip


@in_turn("case", list(WRONG))
def test_a_wrong_argument_is_one_line_with_the_usual_fix(case: str) -> None:
    call, remedy = WRONG[case]
    with pytest.raises(ValueError, match=remedy) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unsupported_requests_to_a_model_are_rejected(student: halfstep.Model) -> None:
    for call, remedy in (
        (lambda: halfstep.sample(student, torch.zeros(3, 4)), r"Pass noise of shape \[batch, 2\]"),
        (lambda: halfstep.sample(student, torch.zeros(2)), r"Pass noise of shape \[batch, 2\]"),
        (lambda: student.sample(3, sampler="ddim"), r"Pass halfstep\.DDIM\(\)"),
        (lambda: student.sample(3, class_label=1), "Remove it"),
        (
            lambda: halfstep.distill(halfstep.Model.of(denoiser(), (2,)), torch.zeros(8, 3), to=1),
            "Pass the data that it was trained on",
        ),
        (lambda: halfstep.sample(student, torch.zeros(3, 2, device="meta")), "Move one of them: noise.to"),
    ):
        with pytest.raises(ValueError, match=remedy):
            call()
    model = halfstep.Model.of(denoiser(Labelled()), (2,), num_classes=4)
    for labels, words in (([0, 1], "class for each of the 3 samples"), ([0, 1, 4], "class 4"), (0.5, "torch.float32")):
        with pytest.raises(ValueError, match=words):
            model.sample(range(3), 4, class_label=labels)  # type: ignore[arg-type]


# The package.


def test_the_package_says_its_version_and_is_typed() -> None:
    root = Path(__file__).parents[2]
    assert halfstep.__version__ == tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    assert (files("halfstep") / "py.typed").is_file()


def test_every_public_name_can_be_imported() -> None:
    for name in halfstep.__all__:
        assert getattr(halfstep, name) is not None
    assert inspect.isclass(halfstep.Window)


def test_an_error_that_names_options_notes_what_they_are_in_python(tmp_path: Path) -> None:
    def notes(call: Callable[[], object]) -> list[str]:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (the notes are what is checked)
            call()
        return caught.value.__notes__

    for side in (8, 9):
        Image.new("L", (side, side)).save(tmp_path / f"{side}.png")
    config = halfstep.DataConfig(source=str(tmp_path))
    size = "In Python, --data.image-size is halfstep.DataConfig(image_size=...)."
    assert notes(lambda: halfstep.open_data(config)) == [size]
    np.savez(tmp_path / "x.npz", x=np.zeros((9, 2)), y=np.full(9, -1))
    labelled = halfstep.DataConfig(source=str(tmp_path / "x.npz"))
    assert notes(lambda: halfstep.open_data(labelled)) == [
        "In Python, --data.no-labels is halfstep.DataConfig(labels=False)."
    ]
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ValueError, match=r"mine is a file, so it cannot be a folder\. Choose another path"):
        halfstep.fit(denoiser(), points(), TRAINING, engine=CPU, out=tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("callback", ["on_window", "on_stage"])
def test_a_failed_callback_does_not_keep_the_run_locked(tmp_path: Path, callback: str) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    told: dict[str, Any] = CHAIN | {"out": tmp_path / "run"}
    try:
        halfstep.distill(denoiser(), points(), **told, **{callback: fail})
    except ZeroDivisionError as error:
        # Like a notebook, this keeps the frames of the failed call.
        kept = error
        halfstep.distill(denoiser(), points(), **told)
    assert kept.__traceback__ is not None
