"""Frozen low-precision weights under LoRA students, and the published sizes that a dry run counts."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import support_pipelines
from halfstep.cli import main
from halfstep.hub import import_pipeline, text_conditions
from halfstep.hub.published import PUBLISHED, published
from halfstep.models.folder import load
from halfstep.nets import LoRA, Replay, merged, precision_of, with_lora
from halfstep.nets.base import build_network, describe_network
from halfstep.nets.lora import copy_network, load_own_state, own_state, share_base, weight_bytes_of
from halfstep.nets.lowered import PACKAGES, quantised
from halfstep.samplers import sample
from support_cli import Capture, refused
from support_pipelines import noise

CALL: Final = {"height": 8, "width": 8}
PRECISIONS: Final = [
    pytest.param(name, marks=pytest.mark.skipif(name in PACKAGES and find_spec(PACKAGES[name]) is None,
                                                reason=f"needs the package {PACKAGES.get(name)}"))
    for name in ("bf16", "int8", "nf4", "int8wo")
]  # fmt: skip


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lowered")
    support_pipelines.tiny_flux(root / "tokens").save_pretrained(root / "flux")
    return root / "flux"


@pytest.fixture(scope="module")
def plain(flux: Path) -> Any:
    """Return the network in float32, with the conditions of two prompts."""
    model = import_pipeline(flux, CALL)
    return model, text_conditions(model.manifest, ["a", "b c"])


def lowered(model: Any, precision: Any) -> Replay:
    made = build_network(describe_network(model.denoiser.network) | {"precision": precision})
    held = build_network(describe_network(model.denoiser.network))
    held.load_state_dict(model.denoiser.network.state_dict())
    assert isinstance(held, Replay)
    held.lower(precision)
    load_own_state(made, own_state(held))
    assert isinstance(made, Replay)
    return made.eval()


def tensors(layer: Any) -> list[Tensor]:
    from halfstep.nets.lowered import _parts

    return list(_parts(layer))


def size(network: nn.Module) -> int:
    """Return the bytes of the existing weights."""
    total = 0
    for module in network.modules():
        held = list(module.parameters(recurse=False))
        if quantised(module):
            held = [p for p in held if p is not module.weight] + tensors(module)
        total += sum(value.numel() * value.element_size() for value in held)
    return total


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_quantised_network_has_the_counted_size_and_is_read_back_unchanged(plain: Any, precision: str) -> None:
    model, cond = plain
    whole, found = model.denoiser.network, lowered(model, precision)
    again = build_network(describe_network(found))
    load_own_state(again, own_state(found))
    with torch.device("meta"):
        counted = weight_bytes_of(build_network(describe_network(found)))
    assert size(found) == counted < 0.6 * weight_bytes_of(whole)
    x_t, time = noise(2, *model.shape), torch.tensor([0.25, 0.5])
    with torch.no_grad():
        out, before = found(x_t, time, **cond), whole(x_t, time, **cond)
        assert torch.equal(out, again.eval()(x_t, time, **cond))
        restored = merged(found)
        assert precision_of(restored) == "float32"
        # The rest is the rounding of a network that computes in bfloat16, including its guidance scale times 1000.
        assert float((restored(x_t, time, **cond) - out).norm()) < 0.06 * float(out.norm())
    assert out.dtype == torch.float32
    assert 1e-5 < float((out - before).norm()) < 0.3 * float(before.norm())
    with pytest.raises(RuntimeError, match="is missing, is unexpected or has a different shape"):
        load_own_state(again, {name: value for name, value in own_state(found).items() if "x_embedder" not in name})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_students_share_the_lowered_weights_and_learn_through_them(plain: Any, precision: str) -> None:
    model, cond = plain
    base = lowered(model, precision)
    student = with_lora(base, 2)
    twin = copy_network(student)
    layers = [module for module in base.modules() if quantised(module)]
    assert bool(layers) == (precision in PACKAGES)
    for network in (student, twin):
        assert all(any(held is layer for held in network.modules()) for layer in layers)
    other = lowered(model, precision)
    share_base(other, student)
    assert all(any(held is layer for held in other.modules()) for layer in layers)
    frozen = {p.data_ptr() for n, p in student.named_parameters() if ".lora_" not in n}
    assert {p.data_ptr() for p in other.parameters()} <= frozen
    x_t, time = noise(2, *model.shape), torch.tensor([0.25, 0.5])
    student(x_t, time, **cond).square().mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for n, p in student.own() if ".lora_B." in n)
    assert all(float(p.grad.abs().max()) > 0 for n, p in student.own() if ".lora_B." in n and p.grad is not None)
    assert all(p.grad is None for n, p in student.named_parameters() if ".lora_" not in n)


BUDGET: Final = [
    *("--matching.num-updates", "2", "--matching.batch-size", "4", "--chain.num-updates", "2", "--chain.batch-size"),
    *("4", "--chain.start-steps", "8", "--to", "4", "--engine.threads", "1", "--evaluation.no-enabled"),
]


@pytest.mark.parametrize("precision", ["nf4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_student_over_lowered_weights_is_trained_resumed_and_exported(
    flux: Path, precision: str, tmp_path: Path, capsys: Capture
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\nb on a mat\n")
    run = tmp_path / "run"
    words = [
        "distill",
        str(flux),
        "--prompts",
        str(prompts),
        *BUDGET,
        "--out",
        str(run),
        "--call",
        "height=8",
        "width=8",
    ]
    assert "Add --chain.lora-rank" in refused([*words, "--base-precision", precision, "--dry-run"], capsys)
    words += ["--base-precision", precision, "--chain.lora-rank", "2", "--chain.learning-rate", "0.01"]
    assert "in " + precision in refused([*words, "--engine.teacher-precision", "bf16", "--dry-run"], capsys)
    main([*words, "--dry-run", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["data"]["num_samples"] == 2
    assert not run.exists()
    main(words)
    student = load(run)
    network = student.denoiser.network
    assert isinstance(network, LoRA)
    assert precision_of(network) == precision
    x_1, cond = noise(2, *student.shape), text_conditions(student.manifest, ["a", "b c"])
    ours = sample(student, x_1, 4, cond=cond)
    teacher = load(run / "stages" / "00-flux") if (run / "stages" / "00-flux").exists() else None
    assert float(ours.abs().max()) > 0
    # Export itself compares both with the student.
    main(["export", str(run), "--format", "lora", "--out", str(tmp_path / "lora")])
    main(["export", str(run), "--out", str(tmp_path / "out")])
    assert precision in (tmp_path / "lora" / "README.md").read_text()
    again = import_pipeline(tmp_path / "out", CALL)
    merged_samples = sample(again, x_1, 4, cond=cond)
    assert float((merged_samples - ours).norm()) < 0.05 * float(ours.norm())
    assert teacher is None or precision_of(teacher.denoiser.network) == precision


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the package bitsandbytes")
@pytest.mark.parametrize(("precision", "told"), [("nf4", {"load_in_4bit": True}), ("int8", {"load_in_8bit": True})])
def test_a_teacher_that_was_saved_in_fewer_bits_is_opened_as_what_its_weights_stand_for(
    flux: Path, plain: Any, precision: Any, told: dict[str, Any], tmp_path: Path
) -> None:
    import shutil

    model, cond = plain
    found = lowered(model, precision)
    shutil.copytree(flux, tmp_path / "flux")
    folder = tmp_path / "flux" / "transformer"
    config = json.loads((folder / "config.json").read_text())
    save_file({n: v.contiguous() for n, v in found.model.state_dict().items()}, *folder.glob("*.safetensors"))
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", **told}})
    )
    opened = import_pipeline(tmp_path / "flux", CALL)
    x_t, time = noise(2, *model.shape), torch.tensor([0.25, 0.5])
    with torch.no_grad():
        wanted = merged(found)(x_t, time, **cond)
        torch.testing.assert_close(opened.denoiser.network(x_t, time, **cond), wanted, rtol=1e-5, atol=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(ValueError, match="is quantised with gguf, but only bitsandbytes is supported"):
        import_pipeline(tmp_path / "flux", CALL)


SIZES: Final = {"sdxl": "2.57", "flux.1-dev": "11.9", "wan2.1-1.3b": "1.42", "wan2.1-14b": "14.3"}
"""Billions of parameters, as stated by the authors."""


def test_published_networks_have_the_size_that_their_authors_state_and_the_call_of_a_recording(
    plain: Any, tmp_path: Path
) -> None:
    assert SIZES.keys() == PUBLISHED.keys()
    for name, billions in SIZES.items():
        network = published(name).denoiser.network
        assert f"{sum(p.numel() for p in network.parameters()) / 1e9:.3g}" == billions, name
    recorded, written = plain[0], published("flux.1-dev")
    assert _kinds(recorded.denoiser.network.call) == _kinds(PUBLISHED["flux.1-dev"].call)
    assert recorded.denoiser.network.clock["of"] == written.denoiser.network.clock["of"]


def _kinds(node: Any) -> Any:
    items = node.get("items")
    return {name: _kinds(item) for name, item in items.items()} if isinstance(items, dict) else node["is"]


def test_a_dry_run_of_a_published_size_counts_what_fits(capsys: Capture) -> None:
    def told(*words: str) -> dict[str, Any]:
        asked = ["distill", "wan2.1-1.3b", "--to", "64", "--engine.micro-batch", "1", "--evaluation.no-enabled"]
        main([*asked, *words, "--dry-run", "--json"])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert found["estimated_seconds"] is None
        return found

    lora = ["--chain.lora-rank", "16"]
    whole, low = told(), told(*lora, "--base-precision", "nf4", "--engine.gradient-checkpointing")
    assert whole["memory_bytes"]["weights"] == 4 * whole["parameters"]
    # Half a byte per weight, a 4-byte scale per 64 weights, and the LoRA weights.
    assert 4.5 / 8 * whole["parameters"] < low["memory_bytes"]["weights"] < 0.7 * whole["parameters"]
    assert low["memory_bytes"]["activations"] < 0.2 * whole["memory_bytes"]["activations"]
    assert low["fits_gib"] == [24, 48, 80]
    assert 80 not in whole["fits_gib"]
    for facts in (whole, low):
        total = sum(facts["memory_bytes"].values())
        assert all((total <= 0.9 * size * 2**30) == (size in facts["fits_gib"]) for size in (24, 48, 80))
