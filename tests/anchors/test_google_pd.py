"""Imported checkpoints of the authors' U-Nets give the outputs of the authors' JAX code."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from halfstep.core.denoiser import NetworkDenoiser
from halfstep.core.prediction import predictions
from halfstep.hub import CONFIGS, GooglePDConfig
from halfstep.hub.google_pd import PROCESS, convert, empty_network, read_checkpoint
from support_google_pd import TINY, params, shapes

OFFICIAL = Path(__file__).parents[3] / "shared" / "data" / "official"
needs_official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"needs the authors' toy networks in {OFFICIAL}")

TOYS = {
    "unet_uncond": {"multipliers": (1, 1, 1), "attention": (False, True, True), "layers_per_block": 1,
                    "time_embedding_dim": 128, "prediction": "x0"},
    "unet_class": {"multipliers": (1, 2), "attention": (False, True), "layers_per_block": 2,
                   "time_embedding_dim": 128, "prediction": "both", "num_classes": 7},
    "unet_wide": {"multipliers": (1, 2), "attention": (False, True), "layers_per_block": 1,
                  "time_embedding_dim": 192, "prediction": "both"},
}  # fmt: skip
"""The table of ../shared/data/official/README.md."""


def toy(name: str) -> GooglePDConfig:
    return GooglePDConfig.model_validate(
        {"image_size": 16, "ch": 32, "attention_head_dim": 32, "start_steps": 64} | TOYS[name]
    )


@needs_official
@pytest.mark.parametrize("name", list(TOYS))
@torch.no_grad()
def test_an_imported_network_gives_the_output_of_the_authors_code(name: str) -> None:
    """Outputs agree to 2e-5 of the largest, in float32, at log-SNRs from one end to the other. The denoiser is called
    with its own time, so the test covers the clock, the fold and the class bias."""
    config = toy(name)
    network = convert(read_checkpoint(OFFICIAL / f"{name}.msgpack").params, config)
    held = dict(np.load(OFFICIAL / f"{name}.npz"))
    x_t = torch.from_numpy(held["x"]).permute(0, 3, 1, 2)
    expected = torch.from_numpy(held["output"]).permute(0, 3, 1, 2)
    assert (held["log_snr"].min(), held["log_snr"].max()) == (-20, 20)
    t = PROCESS.time_at(torch.from_numpy(held["log_snr"]).double()).clamp(0, 1)
    seen: list[torch.Tensor] = []
    network.register_forward_hook(lambda module, args, output: seen.append(output))
    cond = {"class_labels": torch.from_numpy(held["y"]).long()} if config.num_classes else None
    NetworkDenoiser(network, PROCESS, predictions[config.prediction]())(x_t, t, cond)
    error = (seen[0] - expected).abs().amax(dim=(1, 2, 3)) / expected.abs().amax(dim=(1, 2, 3))
    assert float(error.max()) < 2e-5


@needs_official
def test_the_toys_differ_from_one_another_and_from_a_network_one_timestep_off() -> None:
    """The previous test would detect a clock that is off by one."""
    config = toy("unet_uncond")
    network = convert(read_checkpoint(OFFICIAL / "unet_uncond.msgpack").params, config)
    x_t = torch.from_numpy(np.load(OFFICIAL / "unet_uncond.npz")["x"]).permute(0, 3, 1, 2)
    with torch.no_grad():
        here, there = (network(x_t, torch.full((6,), t)) for t in (0.5, 0.501))
    assert float((here - there).abs().max() / here.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [
        ("cifar10", 60_004_099, 60_004_099),
        ("imagenet64", 295_905_222, 295_905_222 - 768),
        ("bedroom128", 139_578_502, 139_578_502),
        ("church128", 139_578_502, 139_578_502),
    ],
)
def test_the_released_configurations_map_tensor_by_tensor(name: str, theirs: int, ours: int) -> None:
    """Every array of the authors' tree, described in tests/support_google_pd.py, has one destination, and their total
    size is that of the authors' code."""
    config = CONFIGS[name]
    tree = dict(shapes(config))
    assert sum(math.prod(shape) for shape in tree.values()) == theirs
    network = empty_network(config).model
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == ours
    from halfstep.hub.google_pd import _place, _regroups

    places = [_place(n, tuple(t.shape), len(config.multipliers)) for n, t in network.state_dict().items()]
    paths = [place.path for place in places]
    assert len(set(paths)) == len(paths)
    assert set(tree) - set(paths) == ({"class_emb/bias"} if config.num_classes else set())
    assert set(paths) <= set(tree)
    assert all(_regroups(tree[place.path], place.shape) for place in places)


@torch.no_grad()
def test_the_shift_of_the_clock_and_the_class_bias_fold_into_the_weights() -> None:
    """The embedding of the imported network at timestep k is the authors' at k + 1, computed here from their arrays."""
    held = {path: value.astype(np.float64) for path, value in params(TINY).items()}
    unet = convert(params(TINY), TINY).double().model
    half = TINY.ch // 2
    for timestep in (0.0, 249.0, 998.5):
        angles = (timestep + 1) * np.exp(-math.log(10_000) * np.arange(half) / (half - 1))
        hidden = np.concatenate([np.sin(angles), np.cos(angles)]) @ held["dense0/kernel"] + held["dense0/bias"]
        hidden = hidden / (1 + np.exp(-hidden)) @ held["dense1/kernel"] + held["dense1/bias"]
        expected = hidden + held["class_emb/kernel"][2] + held["class_emb/bias"]
        frequencies = torch.tensor(np.exp(-math.log(10_000) * np.arange(half) / (half - 1)))
        sinusoid = torch.cat([torch.sin(timestep * frequencies), torch.cos(timestep * frequencies)])[None]
        ours = unet.time_embedding(sinusoid) + unet.class_embedding(torch.tensor([2]))
        # The imported weights are float32.
        np.testing.assert_allclose(ours[0].numpy(), expected, rtol=0, atol=2e-6)


def test_the_network_s_clock_is_the_authors() -> None:
    """Compare with 1000 u - 1, where u = 2 / pi arctan(exp(-log_snr / 2)), at many times of our process."""
    network = empty_network(TINY)
    first, last = network.clock_range
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    theirs = 1000 * 2 / math.pi * torch.atan(torch.exp(-PROCESS.log_snr(t) / 2))
    torch.testing.assert_close(1000 * (first + (last - first) * t), theirs, rtol=1e-10, atol=1e-9)
