"""The exported graph is the whole sampler: noise in, x0 out, as in torch."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VE, FlowMatching, NoiseProcess, VPCosine, processes
from halfstep.core.prediction import EDM, Both, FlowVelocity, Prediction, V, predictions
from halfstep.hub import export_onnx
from halfstep.hub.onnx import UnrolledSampler, example_conditions
from halfstep.models.model import Model
from halfstep.nets import MLP, describe_network, with_lora
from halfstep.recipes import UNetConfig
from halfstep.runs import Manifest, Outcome
from halfstep.samplers import sample
from support import in_turn, numbers
from support_pipelines import replay, wake


def model(network: Any, process: NoiseProcess, prediction: Prediction, shape: tuple[int, ...], **changes: Any) -> Model:
    facts: dict[str, Any] = {
        "stage": "s", "objective": "halve", "parent": None, "outcome": {"role": "student"}, "num_updates": 1,
        "seconds": 1.0, "shape": shape, "is_image": False, "clip": False, "network": describe_network(network),
        "process": processes.describe(process), "prediction": predictions.describe(prediction), "files": {},
    }  # fmt: skip
    return Model(NetworkDenoiser(network, process, prediction), Manifest(**facts | changes)).eval()


def points(process: NoiseProcess, prediction: Prediction, **network: Any) -> Model:
    torch.manual_seed(0)
    return model(MLP((2,), width=16, depth=1, channels=prediction.channels, **network), process, prediction, (2,))


def images() -> Model:
    """Return a U-Net with classes and outputs far enough from 0 for clipping to have an effect."""
    torch.manual_seed(0)
    config = UNetConfig(
        block_out_channels=(8,),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
        attention=(True,),
        mid_attention=False,
    )
    network = config.build((1, 8, 8), 5, 1)
    wake(network)
    with torch.no_grad():
        network.model.conv_out.weight.mul_(4)
    return model(network, VPCosine(), V(), (1, 8, 8), num_classes=5, is_image=True, clip=True)


def ran(file: Path, **inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(["x0"], {name: value.numpy() for name, value in inputs.items()})[0]
    return torch.from_numpy(found)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))


MEMBERS: Final = {
    "v": (VPCosine(), V()),
    "both": (VPCosine(), Both()),
    "edm": (VE(), EDM()),
    "flow": (FlowMatching(3.0), FlowVelocity()),
}
EXPORTED: Final = (1, 2)
"""Numbers of steps of the graphs: torch takes about a second to export a step, and a second step shows what a step
passes to the next. The test of the unrolled program, which the graph is converted from, covers more steps."""
QUICK: Final = {"v": 1, "both": 1, "edm": 1, "flow": 2}
"""Numbers of steps of the graphs in the fast suite."""


@pytest.mark.parametrize(("process", "prediction"), MEMBERS.values(), ids=MEMBERS)
@in_turn("num_steps", (1, 2, 4, 8))
def test_the_unrolled_program_samples_as_the_sampler(
    process: NoiseProcess, prediction: Prediction, num_steps: int
) -> None:
    """The exporter converts this program. It takes unit noise, whatever the scale of the process."""
    made = points(process, prediction)
    noise = numbers(5, 2).float()
    with torch.no_grad():
        assert_same(UnrolledSampler(made, num_steps, ())(noise), sample(made, noise * process.start_scale, num_steps))


@pytest.mark.parametrize(
    ("process", "prediction", "num_steps"),
    [
        *(pytest.param(*MEMBERS[name], steps, id=f"{name}-{steps}") for name, steps in QUICK.items()),
        *(
            pytest.param(*member, steps, id=f"{name}-{steps}", marks=pytest.mark.slow)
            for name, member in MEMBERS.items()
            for steps in EXPORTED
            if steps != QUICK[name]
        ),
    ],
)
def test_a_graph_of_points_samples_as_torch_for_batches_of_any_length(
    tmp_path: Path, process: NoiseProcess, prediction: Prediction, num_steps: int
) -> None:
    """The graph takes unit noise, whatever the scale of the process's noise."""
    made = points(process, prediction)
    file = export_onnx(made, tmp_path / "sampler.onnx", num_steps)
    for length in (1, 5, 32):
        noise = torch.randn(length, 2, generator=torch.Generator().manual_seed(length))
        assert_same(ran(file, noise=noise), sample(made, noise * process.start_scale, num_steps))
    assert list(tmp_path.iterdir()) == [file]


def over_bfloat16() -> Model:
    """Return LoRA weights over weights in bfloat16."""
    config: dict[str, Any] = {
        "sample_size": 4, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "layers_per_block": 1,
        "down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "add_attention": False,
        "norm_num_groups": 4, "attention_head_dim": 8,
    }  # fmt: skip
    torch.manual_seed(0)
    base = replay("UNet2DModel", config, {})
    wake(base)
    base.lower("bf16")
    made = model(with_lora(base, 2), VPCosine(), V(), (1, 4, 4))
    for _, parameter in made.network.own():
        nn.init.normal_(parameter, std=0.3)
    return made


def test_a_graph_is_compared_with_the_model_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, noise, seen = over_bfloat16(), numbers(2, 1, 4, 4).float(), list[Any]()
    graph = SimpleNamespace(graph=SimpleNamespace(all_nodes=list), metadata_props={})
    program = SimpleNamespace(model=graph, save=lambda file, external_data: file.touch())

    def recorded(place: int, result: object) -> Callable[..., object]:
        def called(*arguments: object, **_: object) -> object:
            seen.append(arguments[place])
            return result

        return called

    monkeypatch.setattr(torch.onnx, "export", recorded(0, program))
    monkeypatch.setattr("halfstep.hub.onnx.distance_from_torch", recorded(1, 0.0))
    before = sample(made, noise, 1)
    export_onnx(made, tmp_path / "sampler.onnx", 1)
    sampler, compared = seen
    with torch.no_grad():
        assert_same(sampler(noise), sample(compared, noise, 1))
    assert float((sample(compared, noise, 1) - before).abs().max()) > 1e-3
    assert torch.equal(sample(made, noise, 1), before)


@pytest.mark.slow
def test_a_graph_of_lora_weights_over_bfloat16_ones_samples_as_the_merged_model(tmp_path: Path) -> None:
    made, noise = over_bfloat16(), numbers(2, 1, 4, 4).float()
    found = ran(export_onnx(made, tmp_path / "sampler.onnx", 1), noise=noise)
    assert_same(found, sample(made.merged(), noise, 1))


def classes() -> Model:
    """Return a network of points with classes, with weights large enough for clipping to matter at every step."""
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=1, num_classes=5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model(network, VPCosine(), V(), (2,), num_classes=5, clip=True)


@pytest.mark.parametrize(
    "made",
    [classes, pytest.param(images, marks=pytest.mark.slow)],
    ids=["points", "images"],
)
def test_a_graph_of_classes_clips_and_depends_on_the_class(tmp_path: Path, made: Callable[[], Model]) -> None:
    bare = made()
    student = Outcome(role="student", num_steps=2)
    clipped = Model(bare.denoiser, bare.manifest.model_copy(update={"outcome": student}))
    file = export_onnx(clipped, tmp_path / "sampler.onnx")
    label, generator = torch.tensor([4, 0, 2]), torch.Generator().manual_seed(9)
    noise = 2 * torch.randn(3, *clipped.shape, generator=generator)
    found = ran(file, noise=noise, class_labels=label)
    expected = sample(clipped, noise, 2, cond={"class_labels": label})
    assert_same(found, expected)
    assert float(found.abs().max()) == 1
    free = sample(clipped.denoiser, noise, 2, cond={"class_labels": label})
    assert float((free.clamp(-1, 1) - expected).abs().max()) > 1e-2
    assert float((found - ran(file, noise=noise, class_labels=label.flip(0))).abs().max()) > 1e-2
    facts = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert (facts["num_steps"], facts["prediction"], facts["clip"]) == ("2", "v", "True")


def test_a_graph_of_a_guided_student_takes_the_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = MLP((2,), width=16, depth=1, num_classes=3, guided=True)
    guidance = {"type": "range", "low": 1.0, "high": 4.0}
    made = model(network, VPCosine(), V(), (2,), num_classes=3, guidance=guidance, guidance_scale=2.5)
    assert set(example_conditions(made, 2)) == {"class_labels", "guidance_scale"}
    file = export_onnx(made, tmp_path / "sampler.onnx", 1)
    noise, label, scale = torch.randn(3, 2), torch.tensor([2, 0, 1]), torch.tensor([1.0, 2.0, 4.0])
    cond = {"class_labels": label, "guidance_scale": scale}
    assert_same(ran(file, noise=noise, **cond), sample(made, noise, 1, cond=cond))


def test_a_step_more_is_a_network_call_more(tmp_path: Path) -> None:
    def products(num_steps: int) -> int:
        file = export_onnx(points(VPCosine(), V()), tmp_path / f"{num_steps}.onnx", num_steps)
        return sum(node.op_type in ("Gemm", "MatMul") for node in onnx.load(file).graph.node)

    made = points(VPCosine(), V())
    layers = sum(isinstance(module, nn.Linear) for module in made.modules())
    of_1, of_2 = products(1), products(2)
    assert of_2 - of_1 >= layers - 1
    assert of_2 % 2 == 0


def test_a_graph_that_samples_otherwise_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.hub import onnx as room

    monkeypatch.setattr(room, "sample", lambda *args, **kwargs: sample(*args, **kwargs) + 1e-2)
    with pytest.raises(ValueError, match=r"samples differ from torch's by up to 0\.01, so the graph was not written"):
        export_onnx(points(VPCosine(), V()), tmp_path / "sampler.onnx", 1)
    assert not list(tmp_path.iterdir())


def test_weights_next_to_the_graph_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.hub import onnx as room

    monkeypatch.setattr(room, "LARGEST", 0)
    made = points(VPCosine(), V())
    file = export_onnx(made, tmp_path / "sampler.onnx", 1)
    assert sorted(held.name for held in tmp_path.iterdir()) == ["sampler.onnx", "sampler.onnx.data"]
    noise = torch.randn(3, 2)
    assert_same(ran(file, noise=noise), sample(made, noise, 1))


def test_the_weights_of_a_renamed_graph_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from halfstep.hub import onnx as room

    made, out, held = points(VPCosine(), V()), tmp_path / "sampler.onnx", tmp_path / "sampler.onnx.data"
    held.write_bytes(b"the weights of a graph that was renamed")
    assert export_onnx(made, tmp_path / "small.onnx", 1).exists()
    monkeypatch.setattr(room, "LARGEST", 0)
    with pytest.raises(ValueError, match=r"sampler\.onnx\.data already exists: choose another name for the graph"):
        export_onnx(made, out, 1)
    assert not out.exists()
    assert held.read_bytes() == b"the weights of a graph that was renamed"


def test_a_missing_package_and_a_missing_number_of_steps_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = points(VPCosine(), V())
    with pytest.raises(ValueError, match=r"works with any number of steps\. Choose one"):
        export_onnx(made, tmp_path / "sampler.onnx")
    monkeypatch.setattr("halfstep.hub.onnx.find_spec", lambda name: None if name == "onnxscript" else sys)
    with pytest.raises(ValueError, match=r"needs the package onnxscript: pip install 'halfstep\[onnx\]'"):
        export_onnx(made, tmp_path / "sampler.onnx", 1)
