"""Weights on disk are read completely and unchanged, or rejected by name. Nothing is silently left random."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfstep.cli import main
from halfstep.core.denoiser import NetworkDenoiser, output_gain, warn_of_gain, warn_of_signal
from halfstep.core.noise import VPCosine, VPTable, linear_betas, scaled_linear_betas, zero_terminal_betas
from halfstep.core.prediction import X0, Eps, V
from halfstep.core.warnings import HalfstepWarning
from halfstep.hub import (
    decoder_of,
    export_lora,
    export_pipeline,
    import_pipeline,
    networks_below,
    read_schedule,
    text_conditions,
)
from halfstep.hub.disk import open_part
from halfstep.hub.pipelines import fetch
from halfstep.hub.stock import quiet
from halfstep.models.model import Model
from halfstep.nets import UNet2D, with_lora
from halfstep.objectives import Plan, Training
from halfstep.run.course import Match, Start, course
from support_pipelines import save_ddpm, save_dit, save_sd, tiny_unet, tiny_vae

WEIGHTS = "diffusion_pytorch_model.safetensors"
KIND = "diffusers.UNet2DModel"
Renamer = Callable[[str], str]


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a weights file; its old bytes are read first, because safetensors maps them."""
    held = {name: value.clone() for name, value in load_file(file).items()}
    save_file(change(held), file, {"format": "pt"})


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def weights(folder: Path) -> dict[str, Tensor]:
    network = import_pipeline(folder).denoiser.network
    assert isinstance(network, nn.Module)
    return dict(network.state_dict())


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    torch.set_num_threads(1)
    save_ddpm(folder / "ddpm")
    save_sd(folder / "sd", folder / "tokens")
    tiny_vae().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def ddpm(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved / "ddpm", tmp_path / "ddpm")


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (lambda name: f"_orig_mod.{name}", "All tensor names start with '_orig_mod.', which torch.compile adds"),
        (lambda name: f"module.{name}", "All tensor names start with 'module.', which DataParallel"),
        (lambda name: name.replace(".to_q.", ".to_q.base_layer."), "merge it before saving"),
        (lambda name: name.replace("up_blocks", "gone"), "lacks the tensor up_blocks.0.attentions.0.group_norm.bias"),
    ],
)
def test_renamed_tensors_are_refused_by_name(ddpm: Path, rename: Renamer, said: str) -> None:
    rewrite(ddpm / "unet" / WEIGHTS, lambda held: {rename(name): value for name, value in held.items()})
    with pytest.raises(ValueError, match=r"lacks the tensor .* and has the unexpected tensor") as refusal:
        import_pipeline(ddpm)
    assert said in str(refusal.value)


def test_the_renaming_that_is_advised_restores_the_weights(
    saved: Path, ddpm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite(ddpm / "unet" / WEIGHTS, lambda held: {f"module.{name}": value for name, value in held.items()})
    with pytest.raises(ValueError, match="python -c") as refusal:
        import_pipeline(ddpm)
    monkeypatch.chdir(ddpm / "unet")
    exec(str(refusal.value).split('python -c "')[1].rstrip('"'), {})
    assert_same_weights(weights(ddpm), weights(saved / "ddpm"))


def test_missing_unexpected_and_non_finite_tensors_are_rejected_by_name(ddpm: Path) -> None:
    file = ddpm / "unet" / WEIGHTS
    whole = file.read_bytes()
    spoiled: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
        (
            lambda held: {k: v for k, v in held.items() if k != "conv_in.bias"},
            r"a UNet2DModel, lacks the tensor conv_in\.bias\.",
        ),
        (lambda held: {"extra": torch.ones(1)}, "lacks the tensor .* and has the unexpected tensor extra"),
        (lambda held: held | {"extra": torch.ones(1)}, "read as a UNet2DModel, has the unexpected tensor extra"),
        (
            lambda held: held | {"conv_out.bias": torch.tensor([1.0, torch.nan, torch.inf])},
            r"contains weights that are not finite \(tensor conv_out\.bias\)",
        ),
    ]
    for change, said in spoiled:
        file.write_bytes(whole)
        rewrite(file, change)
        with pytest.raises(ValueError, match=said):
            import_pipeline(ddpm)


@pytest.mark.parametrize(
    ("part", "file", "kind"),
    [
        ("vae", WEIGHTS, "diffusers.AutoencoderKL"),
        ("text_encoder", "model.safetensors", "transformers.CLIPTextModel"),
    ],
)
def test_a_vae_and_a_text_encoder_are_checked_likewise(
    saved: Path, tmp_path: Path, part: str, file: str, kind: str
) -> None:
    folder = shutil.copytree(saved / "sd" / part, tmp_path / part)
    open_part(folder, kind)
    rewrite(folder / file, lambda held: {f"module.{name}": value for name, value in held.items()})
    with pytest.raises(ValueError, match=r"lacks the tensor .*'module\.', which DataParallel"):
        open_part(folder, kind)


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("text_encoder/model.safetensors", "CLIPTextModel"),
        (f"unet/{WEIGHTS}", "UNet2DConditionModel"),
        (f"vae/{WEIGHTS}", "AutoencoderKL"),
    ],
)
def test_each_part_of_a_pipeline_of_prompts_is_checked(saved: Path, tmp_path: Path, file: str, kind: str) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    whole = (folder / file).read_bytes()
    rewrite(folder / file, lambda held: dict(list(held.items())[1:]))
    with pytest.raises(ValueError, match=rf"{Path(file).parent}, read as a {kind}, lacks the tensor"):
        import_pipeline(folder)
    (folder / file).write_bytes(whole)
    rewrite(folder / file, lambda held: {name: value * torch.nan for name, value in held.items()})
    with pytest.raises(ValueError, match=rf"{Path(file).parent} contains weights that are not finite"):
        import_pipeline(folder)


def test_averaged_weights_of_a_prompt_pipeline_are_recorded_on_request(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    shutil.copytree(folder / "unet", folder / "unet_ema")
    rewrite(folder / "unet_ema" / WEIGHTS, lambda held: {name: value * 0.5 for name, value in held.items()})
    edit(folder / "unet_ema/config.json", decay=0.999, optimization_step=3, a_field_of_tomorrow=3)
    edit(folder / "unet/config.json", a_field_of_today=3)
    with pytest.warns(HalfstepWarning) as said:
        plain = import_pipeline(folder)
    assert ["--ema" in str(line.message) for line in said] == [True, False]
    assert "sd/unet/config.json has fields" in str(said[1].message)
    with pytest.warns(HalfstepWarning) as said:
        averaged = import_pipeline(folder, ema=True)
    assert len(said) == 1
    assert "a_field_of_tomorrow = 3. " in str(said[0].message)
    assert averaged.manifest.network["config"] == plain.manifest.network["config"]
    assert averaged.manifest.source != plain.manifest.source
    for name, value in averaged.denoiser.network.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, 0.5 * plain.denoiser.network.state_dict()[name])  # type: ignore[union-attr]


def test_weights_of_the_variant_fp16_are_read_if_there_are_no_others(saved: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    plain = import_pipeline(saved / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(saved / "sd", safety_checker=None)
    folder = tmp_path / "sd"
    pipe.to(dtype=torch.float16).save_pretrained(folder, variant="fp16", max_shard_size="20KB")
    assert not list(folder.glob("*/diffusion_pytorch_model.safetensors"))
    assert len(list(folder.glob("unet/*.fp16-*.safetensors"))) > 1
    model = import_pipeline(folder)
    found, wanted = (made.denoiser.network.state_dict() for made in (model, plain))  # type: ignore[union-attr]
    assert all(torch.equal(value, wanted[name].half().float()) for name, value in found.items())
    out = export_pipeline(model, tmp_path / "out")
    # A converted copy loads without a message about its variant.
    again = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
    assert all(torch.equal(a, b) for a, b in zip(again.vae.parameters(), pipe.vae.parameters(), strict=True))
    shard = next(folder.glob("unet/*00002-of*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=r", a shard of .*, is missing"):
        import_pipeline(folder)


@pytest.mark.parametrize("sizes", [("20KB", "20KB"), ("20KB", "1GB"), ("1GB", "20KB")])
def test_a_part_in_two_precisions_is_exported_with_the_shards_that_are_read(
    saved: Path, tmp_path: Path, sizes: tuple[str, str]
) -> None:
    from diffusers import AutoencoderKL

    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    (folder / "vae" / WEIGHTS).unlink()
    vae.save_pretrained(folder / "vae", max_shard_size=sizes[0])
    vae.half().save_pretrained(folder / "vae", variant="fp16", max_shard_size=sizes[1])
    (folder / "vae/pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    out = export_pipeline(import_pipeline(folder), tmp_path / "out")
    found, wanted = (AutoencoderKL.from_pretrained(place / "vae").state_dict() for place in (out, saved / "sd"))
    assert_same_weights(found, wanted)
    assert not list(out.glob("vae/*fp16*"))
    assert len(list(out.glob("vae/*.index.json"))) == (sizes[0] == "20KB")


def test_a_vae_that_is_not_read_is_refused_when_the_teacher_is_opened(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"vae has pickled weights \(diffusion_pytorch_model.bin\)"):
        import_pipeline(folder)


def checked(folder: Path) -> Path:
    """Add a safety checker, and the processor of its images, to a Stable Diffusion pipeline."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        text_config={**size, "vocab_size": 60}, vision_config={**size, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )  # fmt: skip
    StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    edit(
        folder / "model_index.json",
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    return folder


def test_a_safety_checker_is_exported_though_it_is_not_loaded(saved: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    folder = checked(shutil.copytree(saved / "sd", tmp_path / "sd"))
    out = export_pipeline(import_pipeline(folder), tmp_path / "out")
    pipes = [StableDiffusionPipeline.from_pretrained(place) for place in (folder, out)]
    wanted, found = (pipe.safety_checker.state_dict() for pipe in pipes)
    assert_same_weights(found, wanted)
    assert pipes[1].feature_extractor.to_dict() == pipes[0].feature_extractor.to_dict()
    assert pipes[1].config.requires_safety_checker


@pytest.mark.parametrize(
    ("part", "left_out"),
    [
        ("safety_checker", {"safety_checker"}),
        ("feature_extractor", {"safety_checker", "feature_extractor"}),
        ("image_encoder", {"image_encoder"}),
    ],
)
def test_a_part_that_only_other_uses_need_may_be_missing(
    saved: Path, tmp_path: Path, part: str, left_out: set[str]
) -> None:
    from diffusers import StableDiffusionPipeline

    folder = checked(shutil.copytree(saved / "sd", tmp_path / "sd"))
    shutil.copytree(folder / "safety_checker", folder / "image_encoder")
    (folder / "image_encoder" / "model.safetensors").rename(folder / "image_encoder" / "pytorch_model.bin")
    edit(folder / "model_index.json", image_encoder=["transformers", "CLIPVisionModelWithProjection"])
    for is_there in (True, False):
        if not is_there:
            shutil.rmtree(folder / part)
        out = export_pipeline(import_pipeline(folder), tmp_path / f"out-{is_there}")
        pipe = StableDiffusionPipeline.from_pretrained(out)
        missing = {name for name, value in pipe.components.items() if value is None}
        assert missing == {"image_encoder"} | (set() if is_there else left_out)
        assert pipe.config.requires_safety_checker == (pipe.safety_checker is not None)
        assert f'from_pretrained("{out.name}")' in (out / "README.md").read_text()


def test_a_missing_vae_is_reported_before_training(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    shutil.rmtree(folder / "vae")
    with pytest.warns(HalfstepWarning, match=r"sd has no vae, .* Copy vae into this folder before you export"):
        model = import_pipeline(folder)
    with pytest.raises(ValueError, match=r"sd has no vae, which the exported pipeline needs\. Copy vae into"):
        export_pipeline(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pipeline_that_was_moved_is_reported_with_its_path(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    model = import_pipeline(folder)
    folder.rename(tmp_path / "moved")
    uses: list[Callable[[], Any]] = [
        lambda: export_pipeline(model, tmp_path / "out"),
        lambda: text_conditions(model.manifest, ["a"]),
        lambda: decoder_of(model.manifest),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=rf"pipeline {folder} is missing\. .* link: ln -s FOLDER {folder}$"):
            use()
    folder.symlink_to(tmp_path / "moved")
    assert decoder_of(model.manifest)(torch.zeros(1, *model.shape)).shape == (1, 3, 8, 8)


def test_only_parts_without_other_weights_are_downloaded_in_half_precision(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    repository, half = shutil.copytree(saved / "sd", tmp_path / "sd"), "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(repository / "vae" / WEIGHTS, repository / "vae" / half)
    shutil.copytree(repository / "vae", repository / "safety_checker")
    (repository / "safety_checker" / WEIGHTS).rename(repository / "safety_checker/pytorch_model.bin")

    def download(name: str, **patterns: Any) -> str:
        held = [str(file.relative_to(repository)) for file in repository.rglob("*.*")]
        for file in filter_repo_objects(held, **patterns):
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / file, tmp_path / name / file)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    text = "text_encoder/model.safetensors"
    found = {str(file.relative_to(tmp_path / "a/sd")) for file in fetch("a/sd").glob("*/*.safetensors")}
    assert found == {text, f"unet/{WEIGHTS}", f"vae/{WEIGHTS}"}
    (repository / "unet" / WEIGHTS).rename(repository / "unet" / half)
    found = {str(file.relative_to(tmp_path / "b/sd")) for file in fetch("b/sd").glob("*/*.safetensors")}
    assert found == {text, f"unet/{half}", f"vae/{WEIGHTS}", f"safety_checker/{half}"}


def test_lora_weights_over_averaged_weights_are_not_exported_alone(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    shutil.copytree(folder / "unet", folder / "unet_ema")
    model = import_pipeline(folder, ema=True)
    student = NetworkDenoiser(with_lora(model.denoiser.network, 2), model.process, model.denoiser.prediction)
    trained = model.manifest.model_copy(update={"num_updates": 2})
    for base in (None, trained):
        with pytest.raises(
            ValueError, match=r"averaged weights \(EMA\) in .*unet_ema, but a StableDiffusionPipeline loads"
        ):
            export_lora(Model(student, model.manifest), tmp_path / "lora", base)


def test_quiet_is_restored_to_what_it_was_inside_another() -> None:
    from diffusers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with quiet():
        with quiet():
            pass
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    logging.disable_progress_bar()
    try:
        with quiet():
            pass
        assert not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_a_vae_of_2022_is_read_with_its_old_names(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved / "vae", tmp_path / "vae")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        return name

    rewrite(folder / WEIGHTS, lambda held: {renamed(name): value for name, value in held.items()})
    assert any("proj_attn" in name for name in load_file(folder / WEIGHTS))
    found, known = (open_part(place, "diffusers.AutoencoderKL") for place in (folder, saved / "vae"))
    assert_same_weights(found.state_dict(), known.state_dict())


def sharded(folder: Path) -> Path:
    tiny_unet().save_pretrained(folder, max_shard_size="100KB")
    return next(folder.glob("*.index.json"))


def test_shards_are_read_and_what_their_index_names_elsewhere_is_refused(tmp_path: Path) -> None:
    index = sharded(tmp_path / "net")
    folder = index.parent
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_weights(dict(open_part(folder, KIND).state_dict()), dict(tiny_unet().state_dict()))
    known = json.loads(index.read_text())["weight_map"]
    first = min(known)

    def refused(said: str, **changes: Any) -> None:
        edit(index, weight_map=known | changes)
        with pytest.raises(ValueError, match=said):
            open_part(folder, KIND)
        edit(index, weight_map=known)

    # Each has a decoy next to it.
    (folder / "ok.bin").write_bytes(b"boom")
    shutil.copy(folder / known[first], tmp_path / "up.safetensors")
    for name in ("ok.bin", "../up.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "x.pt"):
        refused("lists the shard .*, but only .safetensors files next to the index are read", **{first: name})
    refused("gone.safetensors, a shard of .*, is missing", **{first: "gone.safetensors"})
    refused("lacks a_tensor_that_no_shard_holds, contrary to its index", a_tensor_that_no_shard_holds=known[first])
    edit(index, weight_map={name: shard for name, shard in known.items() if name != first})
    with pytest.raises(ValueError, match=f"contains {first}, contrary to its index"):
        open_part(folder, KIND)
    edit(index, weight_map=[])
    with pytest.raises(ValueError, match="lists no tensors"):
        open_part(folder, KIND)


def test_an_index_of_transformers_cannot_name_a_pickle_beside_a_decoy(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unpickled(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr(torch, "load", unpickled)
    folder = shutil.copytree(saved / "sd/text_encoder", tmp_path / "text")
    (folder / "model.safetensors").rename(folder / "decoy.safetensors")
    (folder / "ok.bin").write_bytes(b"boom")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "ok.bin"}}))
    with pytest.raises(ValueError, match=r"lists the shard 'ok\.bin'"):
        open_part(folder, "transformers.CLIPTextModel")
    index.unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="contains an adapter"):
        open_part(folder, "transformers.CLIPTextModel")
    (folder / "adapter_config.json").unlink()
    edit(folder / "config.json", transformers_weights="adapter_model.bin")
    with pytest.raises(ValueError, match=r"refers to other files \(transformers_weights\)"):
        open_part(folder, "transformers.CLIPTextModel")


def test_averaged_weights_are_reported_and_used_on_request(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    folder, unet = tmp_path / "out" / "checkpoint-500", tiny_unet()
    averaged = {f"model.{name}": value.clone() for name, value in unet.state_dict().items()}
    ema = EMAModel(unet.parameters(), model_cls=diffusers.UNet2DModel, model_config=unet.config, use_ema_warmup=True)
    ema.save_pretrained(folder / "unet_ema")
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    unet.save_pretrained(folder / "unet")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    with pytest.warns(HalfstepWarning, match=r"checkpoint-500/unet are used, .*unet_ema.*--ema"):
        plain = import_pipeline(folder)
    assert isinstance(plain.denoiser.network, UNet2D)
    torch.testing.assert_close(
        plain.denoiser.network.state_dict()["model.conv_in.bias"], averaged["model.conv_in.bias"] + 1
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for found in (import_pipeline(folder, ema=True), import_pipeline(folder / "unet_ema")):
            assert isinstance(found.denoiser.network, UNet2D)
            assert_same_weights(dict(found.denoiser.network.state_dict()), averaged)
    assert networks_below(tmp_path / "out") == [folder]
    with pytest.raises(ValueError, match=r"Pass one of its subfolders, such as .*checkpoint-500"):
        import_pipeline(tmp_path / "out")
    shutil.rmtree(folder / "unet_ema")
    with pytest.raises(ValueError, match="has no averaged weights"):
        import_pipeline(folder, ema=True)


def test_a_field_of_a_newer_diffusers_warns_and_the_weights_stay(saved: Path, ddpm: Path) -> None:
    edit(ddpm / "unet/config.json", a_field_of_tomorrow=3)
    edit(ddpm / "scheduler/scheduler_config.json", a_schedule_of_tomorrow="x", steps_offset=1)
    with pytest.warns(HalfstepWarning) as said:
        found = weights(ddpm)
    lines = [str(line.message) for line in said]
    assert len(lines) == 2
    assert "a_schedule_of_tomorrow = 'x'" in lines[0]
    assert "a_field_of_tomorrow = 3" in lines[1]
    assert_same_weights(found, weights(saved / "ddpm"))


def test_a_dit_of_fewer_classes_than_its_pipeline_guides_by_is_a_teacher_without_guidance(tmp_path: Path) -> None:
    """DiTPipeline uses 1000 for "no class"."""
    folder = save_dit(tmp_path / "dit", num_classes=10)
    with pytest.warns(HalfstepWarning, match="the teacher is imported without guidance"):
        model = import_pipeline(folder)
    assert (model.num_classes, dict(model.null), dict(model.manifest.conditions)) == (10, {}, {})
    assert model.manifest.pipeline is not None
    assert (model.manifest.pipeline.guidance, model.manifest.pipeline.off) == ("guidance_scale", 1.0)
    pipe = diffusers.DiTPipeline.from_pretrained(folder)
    x_t = model.noise(range(2))
    with torch.no_grad():
        eps = pipe.transformer(x_t, torch.full((2,), 500), torch.tensor([3, 4])).sample[:, :4]
    t = torch.full((2,), 501 / 1000, dtype=torch.float64)
    found = model.denoiser(x_t, t, {"class_labels": torch.tensor([3, 4])})
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("declared", ["Transformer2DModel", "DiTTransformer2DModel"])
def test_a_dit_as_it_was_published_is_the_same_network(tmp_path: Path, declared: str) -> None:
    folder = save_dit(tmp_path / "dit")
    known = weights(folder)
    edit(folder / "transformer/config.json", _class_name=declared, cross_attention_dim=None, only_cross_attention=False)
    edit(folder / "model_index.json", transformer=["diffusers", declared])
    with warnings.catch_warnings():
        warnings.simplefilter("error", HalfstepWarning)
        assert_same_weights(weights(folder), known)
    edit(folder / "transformer/config.json", norm_type="layer_norm")
    with pytest.raises(ValueError, match=r"cannot be read as a DiT|contains a Transformer2DModel"):
        import_pipeline(folder)


def test_the_scheduler_of_2022_says_what_the_network_predicts() -> None:
    old = {"_class_name": "DDPMScheduler", "tensor_format": "pt", "timestep_values": None, "trained_betas": None}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_schedule(old | {"predict_epsilon": False}).prediction == X0()
        assert read_schedule(old | {"predict_epsilon": True}).prediction == Eps()
        # In between, diffusers wrote both fields, with the old one at its default.
        assert read_schedule(old | {"predict_epsilon": True, "prediction_type": "v_prediction"}).prediction == V()
        assert read_schedule(old | {"predict_epsilon": False, "prediction_type": "sample"}).prediction == X0()
    with pytest.raises(ValueError, match="predict_epsilon False and prediction_type 'epsilon', which contradict"):
        read_schedule(old | {"predict_epsilon": False, "prediction_type": "epsilon"})


def test_a_pipeline_of_prompts_with_the_scheduler_of_2022_is_recorded_as_it_was_meant(
    saved: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    file = folder / "scheduler/scheduler_config.json"
    config = {name: value for name, value in json.loads(file.read_text()).items() if name != "prediction_type"}
    file.write_text(json.dumps(config | {"predict_epsilon": False}))
    assert import_pipeline(folder).denoiser.prediction == X0()


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_checkpoint_in_one_file_is_refused_with_the_call_that_converts_it(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"v1-5{suffix}"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"from_single_file\(.*\)\.save_pretrained"):
        fetch(str(file))


def test_eps_at_zero_terminal_snr_is_matched_to_v_and_no_option_of_a_new_teacher_is_advised() -> None:
    process = VPTable(zero_terminal_betas(linear_betas(1000, 1e-4, 0.02)))
    assert output_gain(process, Eps()) == torch.inf
    matching = Match(Training(1, 1e-4)).objective(Start(process, Eps(), may_move=True))
    assert matching is not None
    assert matching.prediction == V()
    with pytest.warns(HalfstepWarning, match=r"its output does not determine x0.*--matching\.prediction v") as said:
        warn_of_gain(process, Eps(), given=True)
    assert "--model." not in str(said[0].message)


def test_eps_at_zero_terminal_snr_is_refused_if_a_pipeline_is_recorded(saved: Path, tmp_path: Path) -> None:
    """The stock pipeline divides by zero, so its first step cannot be compared with ours."""
    folder = shutil.copytree(saved / "sd", tmp_path / "sd")
    config = folder / "scheduler/scheduler_config.json"
    edit(config, _class_name="EulerDiscreteScheduler", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"v_prediction if .* set rescale_betas_zero_snr to false"):
        import_pipeline(folder)
    edit(config, prediction_type="v_prediction")
    assert import_pipeline(folder).denoiser.prediction == V()


def test_samples_that_are_not_finite_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zero = diffusers.DDPMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    main(["import", "diffusers", str(save_ddpm(tmp_path / "zt", zero)), "--out", str(tmp_path / "stage")])
    out = tmp_path / "samples.npz"
    with pytest.raises(SystemExit) as end:
        main(["sample", str(tmp_path / "stage"), "--num-steps", "2", "--num-samples", "3", "--out", str(out)])
    assert end.value.code == 1
    assert f"3 of 3 samples are not finite, so {out} was not written" in capsys.readouterr().err
    assert not out.exists()


def test_a_last_level_with_signal_warns_and_gives_the_amount() -> None:
    betas = linear_betas(50, 1e-4, 0.02)
    power = torch.tensor(betas, dtype=torch.float64).neg().add(1).prod()
    with pytest.warns(HalfstepWarning, match=f"retains {power:.2f} of the signal's power"):
        warn_of_signal(VPTable(betas))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_signal(VPTable(linear_betas(1000, 1e-4, 0.02)))
        warn_of_signal(VPCosine())
        warn_of_signal(VPTable(scaled_linear_betas(1000, 0.00085, 0.012)))


@pytest.mark.parametrize(("num_steps", "warns"), [(4, True), (5, False), (2, False)])
def test_a_chain_whose_student_cannot_be_exported_says_so_before_training(num_steps: int, warns: bool) -> None:
    from halfstep.objectives import Halving, Stage

    start = Start(VPTable(linear_betas(50, 1e-4, 0.02)), V(), may_move=True, is_stock=True)
    plan = Plan((Stage(Halving(num_steps), Training(1, 1e-4)),))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        course(start, Match(Training(1, 1e-4)), lambda _: plan)
        course(start, Match(Training(1, 1e-4)), lambda _: plan, lora_rank=4)
    found = [line for line in said if "cannot be exported" in str(line.message)]
    assert len(found) == 2 * warns
    if warns:
        # A LoRA student cannot move to another process, so this is not suggested.
        assert ["--matching.process" in str(line.message) for line in found] == [True, False]
        assert "on the teacher's 50 timesteps" in str(found[0].message)
        assert "1, 2, 5, 10, 25, 50" in str(found[0].message)


def test_oblong_images_of_classes_are_not_exported_to_a_pipeline_of_squares(tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    model = import_pipeline(save_ddpm(tmp_path / "rect", scheduler, sample_size=(8, 16), num_class_embeds=5))
    with pytest.raises(
        ValueError, match=r"square images, but this model generates images of size \[8, 16\]\. Use --format onnx"
    ):
        export_pipeline(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
