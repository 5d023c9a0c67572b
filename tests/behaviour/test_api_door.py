"""The Python API rejects wrong data, networks and settings with a one-line fix before training."""

import math
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import halfstep
import halfstep.run.call as calls
from halfstep.hub import import_pipeline
from halfstep.nets import copy_denoiser
from halfstep.objectives.metric import PseudoHuber
from halfstep.recipes import build, recipes
from halfstep.run.arguments import check_data
from halfstep.run.probe import check_called
from halfstep.run.sources import as_source
from halfstep.run.start import trainer_for
from halfstep.runtime.processes import make_accelerator
from support import in_turn
from support_pipelines import save_ddpm
from toys import points

CPU = halfstep.Engine(cpu=True, trackers=())
TRAINING = halfstep.Training(4, 1e-2, batch_size=8)
X0 = points(64)
CLASSES = torch.arange(64) % 4


class Net(nn.Module):
    """A network that must not be trained."""

    is_trained = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 2))

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        assert self.is_trained or not self.training, "an update was run"
        found: Tensor = self.layers(torch.cat([x_t, time[:, None]], 1))
        return found


class Trained(Net):
    is_trained = True


class Labelled(Net):
    """A network that needs a class from four."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = nn.Embedding(4, 2)

    def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        return super().forward(x_t, time) + self.classes(class_labels)


class LabelledTrained(Labelled):
    is_trained = True


def denoiser(network: Any) -> halfstep.NetworkDenoiser:
    return halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())


def _fit(network: Any = None, data: Any = X0, **more: Any) -> Any:
    arguments: dict[str, Any] = {"training": TRAINING, "engine": CPU} | more
    return halfstep.fit(denoiser(Net() if network is None else network), data, **arguments)


def _distill(teacher: Any = None, data: Any = X0, **more: Any) -> Any:
    teacher = denoiser(Net() if teacher is None else teacher) if not isinstance(teacher, halfstep.Denoiser) else teacher
    return halfstep.distill(teacher, data, **{"to": 1, "start": 2, "training": TRAINING, "engine": CPU} | more)


def _labelled(labels: Any) -> tuple[Tensor, dict[str, Any]]:
    return X0, {"class_labels": labels}


def _made(**body: Any) -> nn.Module:
    return type("Made", (Net,), body)()


def _in_place(self: Net, x_t: Tensor, time: Tensor) -> Tensor:
    return Net.forward(self, x_t.mul_(0.5), time)


def _without_gradient(self: Net, x_t: Tensor, time: Tensor) -> Tensor:
    return Net.forward(self, x_t, time).detach()


def _two_outputs(self: Net, x_t: Tensor, time: Tensor) -> tuple[Tensor, None]:
    return Net.forward(self, x_t, time), None


def _lazy(self: Net) -> None:
    Net.__init__(self)
    self.more = nn.LazyLinear(2)


def _spoiled() -> nn.Module:
    network = Net()
    network.layers[0].bias.data[0] = math.nan
    return network


ONE_OUTSIDE = CLASSES.clone().index_fill(0, torch.tensor([37]), 4)
TEACHER = halfstep.Model.of(denoiser(Net()), (2,)).eval()
CLASS_TEACHER = halfstep.Model.of(denoiser(Labelled()), (2,), num_classes=4).eval()

DATA: dict[str, tuple[Callable[[], Any], str]] = {
    "labels for a network without": (
        lambda: _fit(data=_labelled(CLASSES)),
        "contains class_labels, which the network does not take. Pass x0 alone",
    ),
    "labels for a teacher without": (
        lambda: _distill(data=_labelled(CLASSES)),
        "contains class_labels, which the network does not take. Pass x0 alone",
    ),
    "labels for a model without": (
        lambda: _distill(TEACHER, _labelled(CLASSES)),
        "contains class_labels, which the teacher does not take. Pass x0 alone",
    ),
    "classes of a file": (lambda: _fit(data="digits"), r"DataConfig\(source='digits', labels=False\)"),
    "labels in batches": (lambda: _fit(data=[_labelled(CLASSES)]), "which the network does not take"),
    "no labels": (lambda: _fit(Labelled()), r"needs the condition class_labels.*\(x0, \{'class_labels': tensor\}\)"),
    "no labels for a teacher": (lambda: _distill(Labelled()), "needs the condition class_labels"),
    "no labels for a model": (lambda: _distill(CLASS_TEACHER), "is conditioned on class_labels"),
    "another name": (lambda: _fit(Labelled(), (X0, {"label": CLASSES})), "class_labels, but the data contains label"),
    "a label outside": (lambda: _fit(Labelled(), _labelled(ONE_OUTSIDE)), "two samples.*index out of range"),
    "a label outside a model": (
        lambda: _distill(CLASS_TEACHER, _labelled(ONE_OUTSIDE)),
        "classes 0 to 4, but the teacher has the classes 0 to 3",
    ),
    "float labels": (lambda: _fit(Labelled(), _labelled(CLASSES.float())), r"class indices, got torch\.float32"),
    "labels of flags": (lambda: _fit(Labelled(), _labelled(CLASSES > 1)), r"class indices, got torch\.bool"),
    "labels below 0": (lambda: _fit(Labelled(), _labelled(CLASSES - 1)), "has the label -1"),
    "labels in a column": (lambda: _fit(Labelled(), _labelled(CLASSES[:, None])), r"Pass labels\.flatten\(\)"),
    "one-hot labels": (lambda: _fit(Labelled(), _labelled(torch.eye(4)[CLASSES])), r"\[2, 4\] \(RuntimeError"),
    "identifiers": (lambda: _fit(Labelled(), _labelled(CLASSES + 10**9)), "presumably an identifier"),
    "label strings": (lambda: _fit(Labelled(), _labelled(np.array(["a"] * 64))), "must be numbers"),
    "float labels in batches": (lambda: _fit(Labelled(), [_labelled(CLASSES.float())]), "must be integer class"),
    "a condition of another width": (
        lambda: check_data(
            halfstep.Model.of(denoiser(Net()), (2,), conditions={"text": (3,)}),
            as_source((X0, {"text": torch.zeros(64, 4)})),
        ),
        r"takes text of shape \[3\] per sample, but the data contains text of shape \[4\]",
    ),
    "a condition with NaN": (lambda: _fit(Labelled(), (X0, {"angle": torch.full((64,), math.nan)})), "angle.*finite"),
    "NaN": (lambda: _fit(data=X0.index_fill(0, torch.tensor([3]), math.nan)), r"not finite.*first.*index \[3, 0\]"),
    "infinite in float32": (lambda: _fit(data=X0.double() * 1e300), "not finite in float32"),
    "NaN in a batch": (lambda: _fit(data=[X0 * math.nan]), "not finite"),
    "complex": (lambda: _fit(data=X0.to(torch.complex64)), "dense real numbers.*complex"),
    "a complex array": (lambda: _fit(data=X0.numpy().astype(np.complex64)), "must be numbers"),
    "complex batches": (lambda: _fit(data=[X0.to(torch.complex64)]), "dense real numbers.*complex"),
    "sparse": (lambda: _fit(data=X0.to_sparse()), "dense real numbers.*sparse"),
    "on meta": (lambda: _fit(data=X0.to("meta")), "dense real numbers.*on meta"),
    "nested": (lambda: _fit(data=torch.nested.nested_tensor([X0[:2], X0[:3]])), "dense real numbers.*nested"),
    "masked": (lambda: _fit(data=np.ma.masked_array(X0.numpy(), X0.numpy() > 0)), "masked entries"),
    "flags": (lambda: _fit(data=X0 > 0), r"got torch\.bool"),
    "no axis": (lambda: _fit(data=X0[:, 0]), r"Pass x\[:, None\]"),
    "one number": (lambda: _fit(data=torch.tensor(1.0)), r"shape \(\)"),
    "nothing": (lambda: _fit(data=X0[:0]), "no samples"),
    "single samples": (lambda: _fit(data=list(X0)), r"torch\.stack\(samples\)"),
    "no batch": (lambda: _fit(data=torch.utils.data.DataLoader(X0, batch_size=99, drop_last=True)), "ended after 0"),
    "an empty path": (lambda: _fit(data=""), "path of the data is empty"),
    "another shape": (lambda: _fit(data=torch.randn(8, 3)), r"two samples of the data, fails on x_t .*\[2, 3\]"),
}  # fmt: skip

NETWORKS: dict[str, tuple[Callable[[], Any], str]] = {
    "in place": (lambda: _fit(_made(forward=_in_place)), r"in place.*x_t\.clone\(\)"),
    "no gradient": (lambda: _distill(_made(forward=_without_gradient)), "no gradient.*Remove"),
    "two outputs": (lambda: _fit(_made(forward=_two_outputs)), "two samples.*'tuple' object"),
    "no time": (lambda: _fit(nn.Linear(2, 2)), "two samples.*positional arguments"),
    "half": (lambda: _fit(Net().half()), r"weights are torch\.float16: convert them with \.float\(\)"),
    "double": (lambda: _distill(Net().double()), r"weights are torch\.float64: convert them with \.float\(\)"),
    "on meta": (lambda: _distill(Net().to("meta")), "on the device meta.*Load them first"),
    "weights of NaN": (lambda: _distill(_spoiled()), "not finite.*Check its weights"),
    "all frozen": (lambda: _fit(Net().requires_grad_(False)), r"network\.requires_grad_\(True\)"),
    "lazy": (lambda: _fit(_made(__init__=_lazy)), "lazy layers.*Call it once"),
    "behind DataParallel": (lambda: _distill(nn.DataParallel(Net())), r"Pass its \.module"),
    "scripted": (lambda: _distill(torch.jit.script(nn.Linear(2, 2))), "ScriptModule"),
    "compiled": (lambda: _fit(torch.compile(Net())), r"engine=halfstep\.Engine\(compile=True\)"),
    "additions": (lambda: _distill(lora_rank=2), "only diffusers networks.*Remove lora_rank"),
    "rank 0": (lambda: _distill(lora_rank=0), "lora_rank must be a whole number"),
    "clipped twice": (lambda: _distill(halfstep.Clipped(halfstep.Clipped(denoiser(Net())))), r"Pass its \.denoiser"),
    "other bounds in a folder": (
        lambda: _distill(halfstep.Clipped(denoiser(Net()), -2, 2), out="x"),
        r"clipped to \[-1, 1\], got \[-2, 2\]",
    ),
}  # fmt: skip


def _training(**changes: Any) -> halfstep.Training:
    return halfstep.Training(**{"num_updates": 4, "learning_rate": 1e-3} | changes)


def _bare_fit(denoiser: Any, data: Any) -> Any:
    return halfstep.fit(denoiser, data, TRAINING)


def _fit_by_name() -> Any:
    return halfstep.fit(denoiser(Net()), X0, "fast")  # type: ignore[arg-type]


def _each(make: Callable[..., Any], values: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Callable[[], Any], str]]:
    """Return a call for each value of each setting, and the name that its message must contain."""
    return {
        f"{make.__name__} {name} {value!r}": (lambda name=name, value=value: make(**{name: value}), name)
        for name, held in values.items()
        for value in held
    }


def _sampled(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {"num_steps": 2} | changes
    return halfstep.sample(denoiser(Net().eval()), torch.zeros(3, 2), **arguments)


def _drawn(noise: Any) -> Tensor:
    return halfstep.sample(denoiser(Net().eval()), torch.zeros(3, 2), 2, halfstep.Ancestral(), noise=noise)


def _guided(null: Any) -> Any:
    return _distill(CLASS_TEACHER, _labelled(CLASSES), guidance=halfstep.FixedGuidance(2.0), null=null)


WORDS = ("1", None, math.nan)
NUMBERS = ("1", None, [1], True, math.nan, -1)
SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    **_each(
        _training,
        {
            **dict.fromkeys(("num_updates", "batch_size"), (*NUMBERS, 0, 1.5, math.inf)),
            "warmup_updates": (*NUMBERS, 1.5),
            **dict.fromkeys(("learning_rate", "grad_clip"), (*NUMBERS, 0, math.inf)),
            "weight_decay": (*NUMBERS, math.inf),
            **dict.fromkeys(("ema_decay", "dropout"), (*NUMBERS, 1.0, 2)),
            "adam_betas": (0.9, (0.9,), (0.9, 1.0), "ab", None, (0.9, math.nan)),
            "anneal": (1, None, "no"),
            "early_end": (None, 3, True),
        },
    ),
    **_each(
        halfstep.Engine,
        {
            **dict.fromkeys(("cpu", "compile", "gradient_checkpointing"), (1, None, "cpu")),
            **dict.fromkeys(("log_every", "checkpoint_updates", "threads", "micro_batch"), (0, -1, 1.5, "1", True)),
            **dict.fromkeys(("timeout_minutes", "checkpoint_minutes"), (*NUMBERS, 0, math.inf)),
            "trackers": (1, "wandb", ("tensorbord",)),
            "requeue_code": (0, 256, 1.5, "1", True),
        },
    ),
    **_each(
        halfstep.Evaluation,
        {
            **dict.fromkeys(("num_samples", "num_reference", "num_compared", "num_shown"), (*NUMBERS, 0, 1.5)),
            "enabled": (1, None),
            "features": (3, None),
            "batch_size": (0, 1.5, "1"),
            "teacher_steps": (8, (1.5,), (0,), None, ("8",)),
        },
    ),
    **_each(_distill, {"to": (0, -1, 1.5, True, "4", 3), "start": (0, -1, 1.5, True, "4", 3)}),
    **_each(_distill, {"teacher_steps": (0, 1.5, "2", True), "null": (3, "x", [1]), "progress": (1, None)}),
    **_each(_fit, {"seed": (1.5, "0", None, True, [1], np.array([1])), "progress": (1, "no")}),
    "a file as out": (lambda: _fit(out=__file__), "is a file, so it cannot be a folder. Choose another path"),
    "out on meta": (lambda: _fit(device="meta"), "the device 'meta' stores no values"),
    "a plan of numbers": (lambda: halfstep.Plan(3), r"Pass \(halfstep\.Stage\(\.\.\.\),\)"),  # type: ignore[arg-type]
    "a plan of names": (lambda: halfstep.Plan(("halve",)), "a stage of a plan must be a Stage"),  # type: ignore[arg-type]
    "a stage of a class": (lambda: halfstep.Stage(halfstep.Halving, TRAINING), r"Call it: Halving"),  # type: ignore[arg-type]
    "a list among finishes": (lambda: halfstep.Plan.finishes([[2]]), "num_steps must be"),  # type: ignore[list-item]
    "samples at once": (lambda: TEACHER.sample(3, 2, batch_size=-1), "batch_size must be"),
    "half a batch": (lambda: TEACHER.sample(3, 2, batch_size=1.5), "batch_size must be"),  # type: ignore[arg-type]
    "a shape below 0": (lambda: halfstep.sample_noise(3, (-1,)), r"Pass a shape such as \(3, 32, 32\)"),
    "a shape of text": (lambda: halfstep.step_noise(3, "2"), r"Pass a shape such as \(3, 32, 32\)"),
    "one number as shape": (lambda: halfstep.Model.of(denoiser(Net()), 2), r"Pass a shape such as \(3, 32, 32\)"),  # type: ignore[arg-type]
    "a negative number of classes": (lambda: halfstep.Model.of(denoiser(Net()), (2,), num_classes=-1), "num_classes"),
    "no classes to draw": (lambda: halfstep.sample_labels(3, 0), "num_classes"),
    "samples of another shape": (lambda: halfstep.samples_of(TEACHER, 4, (3,)), r"have the shape \[2\], got \[3\]"),
    "a fraction of samples": (lambda: halfstep.samples_of(TEACHER, 1.5), "number of samples must be"),  # type: ignore[arg-type]
    "samples by a name": (lambda: halfstep.samples_of(TEACHER, 4, sampler="heun"), r"Pass halfstep\.Heun\(\)"),  # type: ignore[arg-type]
    **_each(halfstep.VPCosine, {"log_snr_min": WORDS[:2], "log_snr_max": WORDS[:2]}),
    **_each(halfstep.FlowMatching, {"shift": (*WORDS, 0)}),
    **_each(halfstep.VE, {"sigma_min": (*WORDS, 0), "rho": WORDS}),
    **_each(halfstep.EDM, {"sigma_data": (*WORDS, 0)}),
    **_each(halfstep.PseudoHuber, {"c": (*WORDS, 0)}),
    **_each(halfstep.Ancestral, {"gamma": (*WORDS, 2)}),
    **_each(halfstep.FixedGuidance, {"scale": (*WORDS, -1)}),
    **_each(halfstep.VPTable, {"betas": (*WORDS, [0.1, "0.2"], [0.1, None])}),
    **_each(halfstep.linear_betas, {"num": (0, 1, 1.5, "9"), "first": WORDS[:2]}),
    **_each(halfstep.cosine_betas, {"num": (0, 1.5, "9"), "largest": WORDS[:2]}),
    **_each(halfstep.zero_terminal_betas, {"betas": (*WORDS, [])}),
    **_each(_sampled, {
        "grid": ("x", 3, lambda n: torch.zeros(n + 1), lambda n: torch.linspace(0, 1, n + 1), lambda n: [1.0]),
        "cond": ("x", [1], torch.zeros(3), {"class_labels": [0, 1, 2]}), "num_steps": (0, -1, 1.5, True, "4"),
    }),
    **_each(_drawn, {"noise": (torch.zeros(3, 2), 3, lambda number: torch.zeros(1, 2))}),
    "a clock beyond 1": (
        lambda: _sampled(grid=lambda n: torch.linspace(1.5, 0, n + 1)),
        r"decreasing times in \[0, 1\]",
    ),
    "float64 noise": (lambda: halfstep.sample(TEACHER, torch.zeros(3, 2).double(), 2), "fails on x_t torch.float64"),
    "noise of more axes": (
        lambda: halfstep.sample(denoiser(Net().eval()), torch.zeros(3, 2, 2), 2),
        r"fails on .*\[3, 2, 2\]",
    ),
    "a foreign condition": (lambda: _sampled(cond={"foo": torch.zeros(3)}), "foo torch.float32.*unexpected keyword"),
    "a condition left out": (lambda: halfstep.sample(CLASS_TEACHER, torch.zeros(3, 2), 2), "missing 1 required"),
    "labels beyond": (
        lambda: halfstep.sample(CLASS_TEACHER, torch.zeros(3, 2), 2, cond={"class_labels": torch.full((3,), 9)}),
        "class_labels torch.int64.*index out of range",
    ),
    "a list as cond of a model": (lambda: TEACHER.sample(3, 2, cond=[1]), "cond must be a mapping of names"),  # type: ignore[arg-type]
    "a class by name": (lambda: CLASS_TEACHER.sample(3, 2, class_label="cat"), "got 'cat'"),  # type: ignore[arg-type]
    "a scale by name": (lambda: TEACHER.sample(3, 2, guidance_scale="3"), "guidance_scale must be a number"),  # type: ignore[arg-type]
    "bounds by name": (lambda: halfstep.Clipped(denoiser(Net()), "low"), "low must be a number"),  # type: ignore[arg-type]
    "guidance of NaN": (lambda: halfstep.Guided(denoiser(Net()), {"a": torch.ones(1)}, math.nan), "must be finite"),
    "a range by name": (lambda: halfstep.GuidanceRange(1, "8"), "high must be a number"),  # type: ignore[arg-type]
    "no denoiser to copy": (lambda: halfstep.copy_denoiser(Net()), r"halfstep\.NetworkDenoiser\("),  # type: ignore[arg-type]
    "no process": (lambda: halfstep.Reprocessed(denoiser(Net()), "cosine"), r"Pass halfstep\.VPCosine\(\)"),  # type: ignore[arg-type]
    "a name as config": (lambda: halfstep.open_data("digits"), r"halfstep\.DataConfig\(source='digits'\)"),  # type: ignore[arg-type]
    "a list of points": (lambda: halfstep.data_set_denoiser(halfstep.VPCosine(), [1.0]), "the means must be a Tensor"),  # type: ignore[arg-type]
    "a mean by name": (lambda: halfstep.GaussianDenoiser(halfstep.VPCosine(), "0"), "mean must be a number"),  # type: ignore[arg-type]
    "no spread": (lambda: halfstep.GaussianDenoiser(halfstep.VPCosine(), 0.0, -1.0), "at least 0"),
    "a typing error in facts": (lambda: halfstep.Model.of(denoiser(Net()), (2,), clips=True), "clips is not a field"),
    "conditions as a list": (lambda: halfstep.Model.of(denoiser(Net()), (2,), conditions=["a"]), "names to shapes"),  # type: ignore[arg-type]
    "a number as path to save": (lambda: halfstep.save(TEACHER, 3), "Pass 'my-student'"),  # type: ignore[arg-type]
    "no path to save": (lambda: halfstep.save(TEACHER, ""), "Pass 'my-student'"),
    "a file on the way": (lambda: halfstep.save(TEACHER, f"{__file__}/x"), "is a file, so .* cannot be a folder"),
    "no path as out": (lambda: _fit(out=""), "Pass out='runs/mine'"),
    "load on meta": (lambda: halfstep.load("fashion", "meta"), "stores no values"),
    "a network for one of the library": (lambda: halfstep.load("fashion", network=Net()), "one of halfstep's networks"),
    "a plan of no stages": (lambda: _distill(plan=halfstep.Plan()), "the plan has no stages"),
    "null of another name": (lambda: _guided({"label": torch.tensor(3)}), "null contains label, but the data does not"),
    "null beyond": (lambda: _guided({"class_labels": torch.tensor(4)}), "index out of range"),
    "bounds of one": (lambda: halfstep.Matching(8, clip=1.0), "two bounds"),  # type: ignore[arg-type]
    "bounds that fall": (lambda: halfstep.Matching(8, clip=(1.0, -1.0)), "must increase"),
}  # fmt: skip


@in_turn("case", [("data", name) for name in DATA] + [("networks", name) for name in NETWORKS])
def test_mismatches_are_reported_before_an_update(case: tuple[str, str]) -> None:
    call, words = {"data": DATA, "networks": NETWORKS}[case[0]][case[1]]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["denoiser", "teacher"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("runs/x", "is the path 'runs/x', but a loaded model is needed. Load it: halfstep.load('runs/x')"),
        (Path("x"), "is the path 'x', but a loaded model is needed. Load it: halfstep.load('x')"),
        (Net(), "is the network Net alone, whose noise process and prediction are unknown. Wrap it: NETWORK"),
        (points, "is the network points alone, whose noise process and prediction are unknown. Wrap it: NETWORK"),
        (3, "is an int, which cannot denoise. Pass NETWORK"),
        (Net, "is the class Net, which cannot denoise. Pass NETWORK"),
        (halfstep.Clipped, "is the class Clipped, not an instance. Call it: Clipped(...)"),
    ],
)
def test_what_is_no_denoiser_is_named_with_the_line_that_makes_it_one(name: str, given: Any, message: str) -> None:
    call = _bare_fit if name == "denoiser" else halfstep.distill
    with pytest.raises(ValueError, match=r"\w") as caught:
        call(given, X0)
    message = message.replace("NETWORK", "halfstep.NetworkDenoiser(network, halfstep.VPCosine(), halfstep.V())")
    assert str(caught.value) == f"the {name} {message}"


def test_class_names_have_the_right_article() -> None:
    for call, words in ((lambda: _fit(engine=3), "be an Engine, got an int"), (_fit_by_name, "be a Training, got the")):
        with pytest.raises(ValueError, match=words):
            call()


@in_turn("case", list(SETTINGS))
def test_a_setting_of_another_kind_is_one_line_that_names_it(case: str) -> None:
    call, words = SETTINGS[case]
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


# Rejected before the teacher is sampled, which takes minutes.


@in_turn(
    "changes",
    [
        {"to": 3, "start": 8}, {"seed": "0"}, {"engine": None}, {"device": "meta"}, {"training": 3}, {"on_stage": 3},
        {"evaluation": halfstep.Evaluation()}, {"out": __file__}, {"null": {"class_labels": torch.tensor(3)}},
        {"matching": TRAINING}, {"lora_rank": 2}, {"finish": [8]}, {"guidance": halfstep.FixedGuidance(2.0)},
        {"engine": halfstep.Engine(cpu=True, sharding="full")}, {"teacher_sampler": halfstep.Ancestral()},
        {"plan": halfstep.Plan.halvings(2, 1), "teacher_steps": 4}, {"process": halfstep.VPCosine(-30.0, 30.0)},
    ],
)  # fmt: skip
def test_all_is_checked_before_the_teacher_is_sampled(changes: dict[str, Any]) -> None:
    def sampled(*_: Any, **__: Any) -> None:
        raise AssertionError("the teacher was sampled")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("halfstep.run.distill.samples_of", sampled)
        with pytest.raises(AssertionError, match="was sampled"):
            _distill(TEACHER, None)
        with pytest.raises(ValueError, match=r"\w"):
            _distill(TEACHER, None, **changes)


def test_the_samples_of_a_teacher_are_those_that_it_would_make_itself() -> None:
    """A denoiser with a shape, steps and a sampler needs no arguments."""
    teacher = denoiser(Trained())
    with pytest.raises(ValueError, match="sample shape is unknown"):
        halfstep.distill(teacher, to=1)
    model = halfstep.Model.of(teacher, (2,), made=halfstep.Outcome(halfstep.Role.STUDENT, 2))
    teacher.shape, teacher.num_steps = (2,), 2
    for seed in (3, np.int64(3)):
        own, known = (halfstep.samples_of(it, 5, seed=seed) for it in (teacher, model))  # type: ignore[arg-type]
        assert own.fingerprint == known.fingerprint
    assert own.fingerprint != halfstep.samples_of(teacher, 5, num_steps=3, seed=3).fingerprint


# The one-line call.


def test_the_call_before_training_leaves_no_trace() -> None:
    network = nn.Sequential(Trained())
    network.forward = lambda x_t, time: network.norm(network[0](x_t, time))  # type: ignore[method-assign]
    network.norm, network.drop = nn.BatchNorm1d(2), nn.Dropout(0.5).eval()
    own = denoiser(network)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    modes, random = [part.training for part in own.modules()], torch.get_rng_state()
    check_called(own, as_source(X0))
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    assert [part.training for part in own.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in own.parameters())


def test_frozen_parts_default_conditions_and_any_keyword_are_accepted() -> None:
    class Free(Trained):
        def forward(self, x_t: Tensor, time: Tensor, scale: float = 1.0, **further: Tensor) -> Tensor:
            return scale * super().forward(x_t, time) + sum(value.sum() * 0 for value in further.values())

    network = Free()
    network.layers[0].requires_grad_(False)
    before = network.layers[0].weight.clone()
    _fit(network, (X0, {"anything": torch.zeros(64, 3)}))
    assert torch.equal(network.layers[0].weight, before)
    halfstep.distill(denoiser(Trained().requires_grad_(False)), X0, start=2, to=1, training=TRAINING, engine=CPU)


# Forms of data.


def test_loaders_and_pairs_of_one_are_the_samples_alone() -> None:
    def state(data: Any) -> list[Tensor]:
        model = _fit(Trained(), data)
        return [value.clone() for value in model.state_dict().values()]

    def equal(one: Any, other: Any) -> bool:
        return all(map(torch.equal, state(one), state(other)))

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X0), batch_size=16)
    assert equal(loader, [X0])
    assert equal((X0, None), X0)
    assert equal(X0.numpy().astype(np.longdouble), X0)
    assert equal(X0.clone().requires_grad_(), X0)
    assert equal(X0.T.contiguous().T, X0)
    assert not equal(X0.flip(0), X0)
    # Conditions of batches are converted like those of tensors: to float32 and int64.
    seen: list[dict[str, Tensor]] = []

    class Told(LabelledTrained):
        def forward(self, x_t: Tensor, time: Tensor, class_labels: Tensor, angle: Tensor | None = None) -> Tensor:
            assert angle is not None
            seen.append({"class_labels": class_labels, "angle": angle})
            return super().forward(x_t, time, class_labels)

    cond = {"class_labels": CLASSES.to(torch.uint8).numpy(), "angle": CLASSES.double().numpy()}
    for data in ((X0, cond), [(X0, cond)]):
        _fit(Told(), data)
        assert {(told["class_labels"].dtype, told["angle"].dtype) for told in seen} == {(torch.int64, torch.float32)}
        assert all(torch.equal(told["class_labels"].float(), told["angle"]) for told in seen)
        seen.clear()


def test_batches_that_change_their_conditions_are_refused() -> None:
    first = (X0[:8], {"angle": torch.zeros(8, 2)})
    for second in ((X0[:8], {"angle": torch.zeros(8, 3)}), (X0[:8], {"other": torch.zeros(8, 2)}), X0[:8]):

        class Told(Trained):
            def forward(self, x_t: Tensor, time: Tensor, angle: Tensor) -> Tensor:
                return super().forward(x_t, time) + 0 * angle

        with pytest.raises(ValueError, match="every batch needs the same conditions"):
            _fit(Told(), [first, second])


def test_classes_without_samples_give_a_warning() -> None:
    with pytest.warns(
        halfstep.HalfstepWarning, match="go up to 3, but there are no samples of class 0 \\(and 1 more\\)"
    ):
        as_source(_labelled(2 * (CLASSES % 2) + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_source(_labelled(CLASSES))


# Networks and engines.


def test_tied_weights_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    class Tied(Trained):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.layers

    student = halfstep.distill(denoiser(Tied()), X0, start=2, to=1, training=TRAINING, engine=CPU, out=tmp_path / "run")
    halfstep.save(student, tmp_path / "saved")
    for path in (tmp_path / "run", tmp_path / "saved"):
        again = halfstep.load(path, network=Tied())
        assert again.network.again is again.network.layers
        assert torch.equal(again.sample(range(4)), student.sample(range(4)))


def test_settings_of_the_engine_act_in_memory_as_in_a_folder(tmp_path: Path) -> None:
    def made(name: str, **engine: Any) -> Tensor:
        chain: dict[str, Any] = {"start": 2, "to": 1, "training": TRAINING}
        chain["engine"] = halfstep.Engine(cpu=True, trackers=(), **engine)
        memory, folder = (
            halfstep.distill(denoiser(Trained()), X0, **chain, out=out) for out in (None, tmp_path / name)
        )
        found = memory.sample(range(4))
        torch.testing.assert_close(folder.sample(range(4)), found, rtol=0, atol=1e-6)
        return found

    plain = made("plain")
    torch.testing.assert_close(made("auto", micro_batch="auto"), plain, rtol=0, atol=1e-6)
    assert not torch.allclose(made("bf16", teacher_precision="bf16"), plain, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="does not support gradient checkpointing"):
        made("again", gradient_checkpointing=True)


def test_a_callback_may_do_what_it_likes_with_its_model(tmp_path: Path) -> None:
    """Callbacks get a copy, both in memory and in a folder."""

    def spoil(_: str, model: halfstep.Model) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)

    chain: dict[str, Any] = {"start": 4, "to": 1, "training": TRAINING, "engine": CPU}
    students = [
        halfstep.distill(denoiser(Trained()), X0, **chain, out=out, on_stage=hook)
        for hook in (None, spoil)
        for out in (None, tmp_path / str(hook is None))
    ]
    first = students[0].sample(range(4))
    assert all(torch.allclose(student.sample(range(4)), first, atol=1e-6) for student in students)


# Recipes and Python give the same target for a clipped teacher.


class Recorded(Exception):
    """An exception that ends a call at its first stage."""


def test_a_clipped_teacher_gives_one_target_by_recipe_and_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = import_pipeline(save_ddpm(tmp_path / "ddpm"))
    assert teacher.manifest.clip
    images = torch.randint(0, 256, (8, *teacher.shape), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    data = as_source(images)
    recipe = recipes["images"]().model_copy(update={"evaluation": halfstep.Evaluation(enabled=False)})
    spec = build(recipe, what="chain", teacher=copy_model(teacher), data=data)  # type: ignore[arg-type]
    found: dict[str, tuple[Any, Any]] = {}
    trainer = trainer_for(spec, spec.plan.stages[0], "s", copy_model(teacher), make_accelerator("float32", True))
    found["recipe"] = trainer._teacher, spec.plan.stages[0].objective

    given = {"model": teacher, "clipped": halfstep.Clipped(teacher.denoiser), "bare": teacher.denoiser}
    for name, start in given.items():

        def record(student: Any, seen: Any, stage: Any, *_: Any, name: str = name, **__: Any) -> None:
            found[name] = seen, stage.objective
            raise Recorded

        monkeypatch.setattr(calls, "StageTrainer", record)
        with pytest.raises(Recorded):
            halfstep.distill(start, images, to=4, start=8, training=TRAINING, engine=CPU)
    assert len({repr(found[it][1]) for it in ("recipe", "model", "clipped")}) == 1
    x_t, t = torch.randn(4, *teacher.shape), torch.tensor([0.3, 0.6, 0.9, 1.0], dtype=torch.float64)
    targets = {it: seen(x_t, t).x0.detach() for it, (seen, _) in found.items()}
    assert torch.equal(targets["recipe"], targets["model"])
    assert torch.equal(targets["recipe"], targets["clipped"])
    assert torch.equal(targets["recipe"], targets["bare"].clamp(-1, 1))
    assert float(targets["bare"].abs().max()) > 1.5


def copy_model(model: halfstep.Model) -> halfstep.Model:
    """Return the model with a copy of its weights."""
    copied = copy_denoiser(model.denoiser)
    assert isinstance(copied, halfstep.NetworkDenoiser)
    return halfstep.Model(copied, model.manifest, model.null)


@pytest.mark.parametrize("kept", [True, False], ids=["folder", "memory"])
def test_a_clipped_teacher_is_distilled_into_a_student_that_samples_clipped(kept: bool, tmp_path: Path) -> None:
    out = tmp_path / "run" if kept else None
    x0 = X0.clamp(-0.9, 0.9)
    names: list[str] = []
    student = halfstep.distill(
        halfstep.Clipped(denoiser(Trained())), x0, start=2, to=1, training=TRAINING, engine=CPU, out=out,
        on_stage=lambda name, model: names.append(f"{name} {model.manifest.clip}"),
    )  # fmt: skip
    assert names == ["01-match True", "02-halve-0001 True"]
    assert student.manifest.clip
    assert not student.manifest.is_image


def test_a_network_that_does_not_fit_what_was_saved_is_no_damage(tmp_path: Path) -> None:
    halfstep.save(TEACHER, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"does not match the weights of .*saved.*Build it like the") as caught:
        halfstep.load(tmp_path / "saved", network=nn.Linear(2, 2))
    assert type(caught.value) is ValueError


def test_home_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    halfstep.save(TEACHER, "~/saved")
    assert halfstep.load(tmp_path / "saved", network=Net()).shape == (2,)
    assert halfstep.load("~/saved", network=Net()).shape == (2,)
    _fit(Trained(), out="~/run")
    assert (tmp_path / "run" / "recipe.json").is_file()


def test_an_unregistered_process_is_reported_before_training() -> None:
    class Own(halfstep.NoiseProcess):
        def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
            return halfstep.VPCosine().alpha_sigma(t)

        def log_snr(self, t: Tensor) -> Tensor:
            return halfstep.VPCosine().log_snr(t)

        def time_at(self, log_snr: Tensor) -> Tensor:
            return halfstep.VPCosine().time_at(log_snr)

    own = halfstep.NetworkDenoiser(Net(), Own(), halfstep.V())
    for call in (halfstep.fit, halfstep.distill):
        with pytest.raises(ValueError, match=r"cannot be stored\. Make its class a dataclass"):
            call(own, X0, training=TRAINING, engine=CPU)  # type: ignore[operator]


def test_every_setting_of_training_is_held_to_its_kind() -> None:
    """Each field of `Training` must be in `SETTINGS`."""
    assert {field.name for field in fields(halfstep.Training)} == {
        case.split()[1] for case in SETTINGS if case.startswith("_training")
    }


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.float16(0.5)])
def test_any_real_number_is_a_number(number: Any) -> None:
    assert halfstep.Training(1, learning_rate=number, ema_decay=number).ema_decay == 0.5
    assert PseudoHuber(c=number)(torch.zeros(1, dtype=torch.float64)) == 0
