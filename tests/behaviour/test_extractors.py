"""Each feature extractor agrees with an independent loader of the same network, and reports missing weights."""

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfstep.data import DataConfig, open_data
from halfstep.metrics import Inception, RealData, extractor_for, extractors
from halfstep.metrics.classifier import train_classifier
from halfstep.metrics.features import conversion
from halfstep.metrics.inception import network_module
from halfstep.metrics.resnet20 import ResNet20
from halfstep.runtime.files import DamagedFile

SHARED = Path(__file__).parents[3] / "shared" / "data"
FIDELITY = Path(sys.prefix) / "torch-fidelity"
"""The folder in which `make` installs it without dependencies, one of which would replace the CPU build of torch."""


def _no_labels() -> tuple[Tensor, Tensor]:
    raise AssertionError("not asked for")


def _real_data(num_classes: int = 0) -> RealData:
    return RealData("0" * 64, num_classes, _no_labels)


def _images(n: int, channels: int, side: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, side, side), generator=generator).float() / 127.5 - 1


def test_the_resnet_knows_cifar10() -> None:
    """Its publisher reports an accuracy of 91.73 % on the test images: normalisation, shortcuts and channel order are
    right."""
    weights, images = SHARED / "weights" / "resnet20-cifar10.safetensors", SHARED / "cifar10"
    if not weights.is_file() or not images.is_dir():
        pytest.skip(f"{SHARED} holds no CIFAR-10 and its classifier")
    extractor = extractor_for(f"resnet20-cifar10={weights}", _real_data())
    data = open_data(DataConfig(source=str(images), split="test", limit=1000))
    batch = data.fetch(torch.arange(1000))
    features = extractor.features(batch.x0)
    assert tuple(features.shape) == (1000, 64)
    logits = extractor.logits(features)
    assert logits is not None
    right = (logits.argmax(1) == batch.cond["class_labels"]).double().mean()
    # Two standard errors of a share of 1,000.
    assert abs(float(right) - 0.9173) < 0.0175


def test_a_resnet_of_other_weights_has_another_name_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    names = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_file(ResNet20().state_dict(), tmp_path / f"{seed}.safetensors")
        names.append(extractor_for(f"resnet20-cifar10={tmp_path}/{seed}.safetensors", _real_data()).name)
    assert len(set(names)) == 2
    torch.manual_seed(0)
    save_file(ResNet20().state_dict(), tmp_path / "copy.safetensors", metadata={"from": "elsewhere"})
    assert extractor_for(f"resnet20-cifar10={tmp_path}/copy.safetensors", _real_data()).name == names[0]
    lacking = {name: value for name, value in ResNet20().state_dict().items() if name != "linear.bias"}
    save_file(lacking, tmp_path / "lacking.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "0.safetensors").read_bytes()[:100])
    for name, problem in {
        "lacking": "does not contain the weights of a ResNet-20",
        "cut": "is not a complete safetensors file",
    }.items():
        with pytest.raises(DamagedFile, match=problem):
            extractor_for(f"resnet20-cifar10={tmp_path}/{name}.safetensors", _real_data())


def test_grey_images_of_other_sizes_are_shown_to_the_resnet_as_large_rgb(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(ResNet20().state_dict(), tmp_path / "w.safetensors")
    extractor = extractor_for(f"resnet20-cifar10={tmp_path}/w.safetensors", _real_data())
    # A constant image stays constant under any resizing.
    small, large = torch.full((2, 1, 8, 8), 0.25), torch.full((2, 3, 32, 32), 0.25)
    torch.testing.assert_close(extractor.features(small), extractor.features(large))
    with pytest.raises(ValueError, match="are not images with 1 or 3 channels"):
        extractor.features(torch.zeros(2, 5))


def test_dinov2_is_the_class_token_of_transformers_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    model.save_pretrained(tmp_path)
    extractor = extractor_for(f"dinov2={tmp_path}", _real_data())
    images = _images(3, 3, 224)
    processor = transformers.BitImageProcessorPil(
        do_resize=False, do_center_crop=False, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
    )
    pixels = images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    with torch.no_grad():
        shown = processor(list(pixels), return_tensors="pt")["pixel_values"]
        expected = model(shown).pooler_output
    torch.testing.assert_close(extractor.features(images), expected, rtol=1e-4, atol=1e-4)
    assert extractor.logits(expected) is None
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert extractor_for(f"dinov2=~/{tmp_path.name}", _real_data()).name == extractor.name
    with pytest.raises(ValueError, match="cannot load a DINOv2 model"):
        extractor_for(f"dinov2={tmp_path}/none", _real_data())
    # If the network differs, transformers draws missing weights at random.
    other = transformers.Dinov2WithRegistersConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2WithRegistersModel(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="its weights are for a different network"):
        extractor_for(f"dinov2={tmp_path / 'other'}", _real_data())
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot load a DINOv2 model"):
        extractor_for(f"dinov2={tmp_path}", _real_data())


@pytest.fixture
def _fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    # torchmetrics looks for torch-fidelity when it is first imported, and must not find it here.
    import torchmetrics  # noqa: F401

    monkeypatch.syspath_prepend(str(FIDELITY))
    try:
        network_module()
    except ValueError:
        pytest.skip(f"torch-fidelity is neither installed nor in {FIDELITY}")


@pytest.mark.usefixtures("_fidelity")
def test_inception_is_torch_fidelitys_network_on_the_same_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = network_module()
    assert "torch_fidelity" not in sys.modules
    assert "torchvision" not in sys.modules
    state = _random_inception(module)
    save_file(state, tmp_path / "w.safetensors")
    images = _images(3, 1, 16)
    extractor = Inception(str(tmp_path / "w.safetensors"), _real_data())
    features = extractor.features(images)
    assert tuple(features.shape) == (3, 2048)
    module.load_state_dict_from_url = lambda *_, **__: state
    theirs = module.FeatureExtractorInceptionV3("theirs", ["2048", "logits_unbiased"])
    pixels = images.add(1).mul(127.5).round().to(torch.uint8).expand(-1, 3, -1, -1)
    expected, logits = theirs(pixels)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(extractor.logits(features), logits)
    save_file({"fc.bias": torch.zeros(1008)}, tmp_path / "other.safetensors")
    with pytest.raises(DamagedFile, match="does not contain the weights of torch-fidelity's Inception"):
        Inception(str(tmp_path / "other.safetensors"), _real_data())


@pytest.mark.usefixtures("_fidelity")
def test_the_page_and_the_message_say_how_to_convert_the_published_weights() -> None:
    url = network_module().URL_INCEPTION_V3
    with pytest.raises(ValueError, match="Set inception=PATH, where PATH is a safetensors file") as caught:
        extractor_for("inception", _real_data())
    page = (Path(__file__).parents[2] / "docs" / "pages" / "measuring.md").read_text()
    for part in (url, conversion(Path(Path(url).name))):
        assert part in str(caught.value)
        assert part in page
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("_fidelity")
@pytest.mark.parametrize("name", ["inception", "resnet20-cifar10"])
def test_pickled_weights_are_never_read(name: str, tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.bias": Runs()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="halfstep does not read pickles"):
        extractor_for(f"{name}={tmp_path}/w.pth", _real_data())
    (tmp_path / "w.pth").rename(tmp_path / "w.safetensors")
    with pytest.raises(DamagedFile, match="is not a complete safetensors file"):
        extractor_for(f"{name}={tmp_path}/w.safetensors", _real_data())
    assert not (tmp_path / "ran").exists()


def test_the_command_in_the_message_converts_the_weights(tmp_path: Path) -> None:
    # save_file rejects transposed tensors.
    file = tmp_path / 'user\'s "own" weights.pth'
    weights = {name: value.transpose(0, -1) for name, value in ResNet20().state_dict().items() if value.ndim}
    torch.save(weights, file)
    with pytest.raises(ValueError, match="convert it once: python -c") as caught:
        extractor_for(f"resnet20-cifar10={file}", _real_data())
    python, option, code = shlex.split(str(caught.value).partition("convert it once: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code, {})
    torch.testing.assert_close(load_file(file.with_suffix(".safetensors")), weights)


def _random_inception(module: Any) -> dict[str, Tensor]:
    """Return weights with the network's shapes, without the file that its constructor needs."""
    seen: dict[str, Tensor] = {}

    class Stop(Exception):
        pass

    def watch(self: nn.Module, *_: object, **__: object) -> None:
        seen.update(self.state_dict())
        raise Stop

    module.load_state_dict_from_url = lambda *_, **__: {}
    kind = module.FeatureExtractorInceptionV3
    kind.load_state_dict = watch
    try:
        with pytest.raises(Stop):
            kind("shapes", ["2048"])
    finally:
        del kind.load_state_dict
    return {name: value.clone() for name, value in seen.items()}


def test_without_torch_fidelity_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("halfstep.metrics.inception.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'halfstep\[inception\]'"):
        extractor_for("inception", _real_data())


def test_every_extractor_is_registered_and_described() -> None:
    assert list(extractors) == ["pixels", "classifier", "dinov2", "inception", "resnet20-cifar10"]
    assert all((make.__doc__ or "").strip() for _, make in extractors.items())


def test_the_classifiers_logits_are_those_of_its_network() -> None:
    labels = torch.arange(100) % 2
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) + 4 * labels[:, None]
    classifier: Any = extractor_for("classifier", RealData("0" * 64, 2, lambda: (x, labels)))
    with torch.no_grad():
        expected = classifier.network(x)
    torch.testing.assert_close(classifier.logits(classifier.features(x)), expected)
    assert torch.equal(expected.argmax(1), labels)


@pytest.mark.parametrize("shape", [(2, 1, 64), (2, 64, 1), (1, 1, 2), (1, 2, 2), (2, 2, 3)])
def test_the_classifier_learns_arrays_too_small_to_pool(shape: tuple[int, ...]) -> None:
    labels = torch.arange(100) % 2
    x = torch.randn(100, *shape, generator=torch.Generator().manual_seed(0)) + 4 * labels[:, None, None, None]
    classifier = train_classifier(x, labels, 2, "toy", num_updates=60)
    assert classifier.accuracy == 1
    assert torch.equal(classifier.network(x).argmax(1), labels)
