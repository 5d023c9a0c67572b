"""Networks keep their clock, their conditions and their description."""

import pytest
import torch

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.noise import VPCosine
from halfstep.core.prediction import V
from halfstep.nets import MLP, UNet2D, build_network, describe_network, networks, set_dropout
from halfstep.nets.stock import to_channels_last
from halfstep.recipes import UNetConfig
from halfstep.recipes.paper import PAPER_CIFAR10, PAPER_IMAGENET64, PAPER_LSUN128

SMALL = UNetConfig(
    block_out_channels=(8, 16), layers_per_block=1, attention=(False, True), attention_head_dim=8, norm_num_groups=4
)


def _unet(num_classes: int = 0, channels: int = 1) -> UNet2D:
    torch.manual_seed(0)
    return SMALL.build((3, 8, 8), num_classes, channels).eval()


def test_time_becomes_diffusers_whole_timesteps() -> None:
    network = _unet()
    x_t = torch.randn(4, 3, 8, 8)
    steps = torch.tensor([0, 255, 511, 1023])
    expected = network.model(x_t, steps).sample
    # t = (timestep + 1) / T, exactly, also in float32.
    seen = network(x_t, ((steps + 1) / 1024).float())
    assert torch.equal(seen, expected)


def test_convolution_weights_have_the_devices_fastest_memory_format() -> None:
    network = _unet()
    kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert kernels
    assert all(kernel.is_contiguous() for kernel in kernels)
    if not torch.cuda.is_available():
        pytest.skip("the CPU's half holds; that of a GPU needs one")
    network.to("cuda")
    kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)


def test_only_weights_of_2d_convolutions_become_channels_last() -> None:
    """The networks of videos also have 3-D convolutions."""
    images, videos = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv3d(3, 4, 3)
    x = torch.randn(1, 3, 4, 4)
    before, kernels, held = images(x), list(videos.parameters()), images.weight
    to_channels_last(torch.nn.ModuleList([images, videos]))
    assert images.weight is held
    assert images.weight.is_contiguous(memory_format=torch.channels_last)
    assert not images.weight.is_contiguous()
    assert all(kernel.is_contiguous() for kernel in kernels)
    torch.testing.assert_close(images(x), before)


def test_every_power_of_two_grid_falls_on_whole_timesteps() -> None:
    network = _unet()
    asked: list[torch.Tensor] = []
    network.model.register_forward_pre_hook(lambda _, args: asked.append(args[1]))
    denoiser = NetworkDenoiser(network, VPCosine(), V())
    for num_steps in (1, 2, 8, 128, 1024):
        denoiser(torch.randn(1, 3, 8, 8), 1 / num_steps)
    for timestep in asked:
        assert torch.equal(timestep, timestep.round())


def test_class_labels_reach_the_network() -> None:
    network = _unet(num_classes=5)
    denoiser = NetworkDenoiser(network, VPCosine(), V())
    x_t = torch.randn(2, 3, 8, 8)
    outputs = [denoiser(x_t, 0.5, {"class_labels": torch.tensor([k, k])}).x0 for k in (0, 1)]
    assert not torch.equal(outputs[0], outputs[1])
    with pytest.raises(ValueError, match="class_labels"):
        denoiser(x_t, 0.5)


@pytest.mark.parametrize("network", [_unet(5, 2), MLP((3, 4), width=8, depth=2, channels=2, num_classes=3)])
def test_a_described_network_is_built_again(network: UNet2D | MLP) -> None:
    twin = build_network(describe_network(network))
    twin.load_state_dict(network.state_dict())
    assert type(twin) is type(network)
    assert describe_network(twin) == describe_network(network)
    shape = (2, 3, 8, 8) if isinstance(network, UNet2D) else (2, 3, 4)
    x_t, time, labels = torch.randn(shape), torch.tensor([0.3, 0.9]), torch.tensor([0, 2])
    assert torch.equal(twin.eval()(x_t, time, class_labels=labels), network.eval()(x_t, time, class_labels=labels))


def test_descriptions_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown network 'unet3d'; did you mean 'unet2d'"):
        build_network({"type": "unet3d"})
    with pytest.raises(ValueError, match="do not match MLP"):
        build_network({"type": "mlp", "shape": [2], "widht": 3})
    assert set(networks) >= {"unet2d", "mlp"}


def test_dropout_is_set_in_every_layer() -> None:
    network = _unet()
    set_dropout(network, 0.3)
    layers = [module for module in network.modules() if isinstance(module, torch.nn.Dropout)]
    assert layers
    assert {layer.p for layer in layers} == {0.3}


def test_dropout_is_set_in_layers_without_a_dropout_layer_of_their_own() -> None:
    class Mixed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block = torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5, batch_first=True)
            self.recurrent = torch.nn.GRU(4, 4, num_layers=2, dropout=0.5, batch_first=True)
            self.channels, self.alpha = torch.nn.Dropout2d(0.5), torch.nn.AlphaDropout(0.5)
            self.others = torch.nn.ModuleList(
                kind(0.5) for kind in (torch.nn.Dropout1d, torch.nn.Dropout3d, torch.nn.FeatureAlphaDropout)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.recurrent(self.block(x))[0]
            return self.alpha(self.channels(x[..., None]))

    network, x = Mixed().double(), torch.randn(3, 5, 4, dtype=torch.float64)
    assert not torch.allclose(network.train()(x), network.eval()(x))
    set_dropout(network, 0.0)
    torch.testing.assert_close(network.train()(x), network.eval()(x))
    set_dropout(network, 0.3)
    block = network.block
    layers = [block.dropout, block.dropout1, block.dropout2, network.channels, network.alpha, *network.others]
    assert {layer.p for layer in layers} | {block.self_attn.dropout, network.recurrent.dropout} == {0.3}


@pytest.mark.parametrize(
    ("changes", "shape", "said"),
    [
        ({}, (3, 9, 8), "multiples of 2"),
        ({}, (4,), "Use the recipe `arrays`"),
        ({"norm_num_groups": 3}, (3, 8, 8), "norm_num_groups 3 does not divide 8"),
        ({"attention_head_dim": 5}, (3, 8, 8), "attention_head_dim 5 does not divide 16"),
        ({"attention": (True,)}, (3, 8, 8), "1 entries for 2 resolutions"),
    ],
)
def test_networks_that_cannot_be_built_are_refused(
    changes: dict[str, object], shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        SMALL.model_copy(update=changes).build(shape, 0, 1)


def test_a_constant_clock_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"must be a power of two, .* got 1000"):
        UNetConfig(num_train_timesteps=1000)
    with pytest.raises(ValueError, match="num_train_timesteps must be at least 1, got 0"):
        UNet2D({}, num_train_timesteps=0)
    with pytest.raises(ValueError, match=r"clock_range must increase from t = 0 to t = 1, got 1\.0 and 0\.5"):
        UNet2D({}, clock_range=(1.0, 0.5))


def test_a_network_with_another_clock_is_called_at_its_own_times() -> None:
    ours, theirs = _unet(), _unet()
    theirs.clock_range = (0.25, 0.75)
    x_t = torch.randn(3, 3, 8, 8)
    time = torch.tensor([0.0, 0.5, 1.0])
    assert torch.equal(theirs(x_t, time), ours(x_t, torch.tensor([0.25, 0.5, 0.75])))


@pytest.mark.parametrize(
    ("config", "shape", "num_classes", "channels", "parameters"),
    [
        pytest.param(PAPER_CIFAR10, (3, 32, 32), 0, 1, 60_004_099, id="cifar10"),
        # The authors' network has 768 more: the bias of its class embedding, which is folded into the embedding.
        pytest.param(PAPER_IMAGENET64, (3, 64, 64), 1000, 2, 295_905_222 - 768, id="imagenet64"),
        pytest.param(PAPER_LSUN128, (3, 128, 128), 0, 2, 139_578_502, id="lsun128"),
    ],
)
def test_the_papers_networks_have_as_many_parameters_as_the_authors_counted(
    config: UNetConfig, shape: tuple[int, ...], num_classes: int, channels: int, parameters: int
) -> None:
    with torch.device("meta"):
        network = config.build(shape, num_classes, channels)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
