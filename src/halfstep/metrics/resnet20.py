"""The features of a ResNet-20 trained on CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2).

The network has three groups of three blocks, with 16, 32 and 64 channels. If a block halves the image size, its
shortcut takes every second pixel and pads the channels with zeros on both sides (option A, which has no parameters).
The features are the 64 channel averages before the last layer.
"""

from typing import ClassVar, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from halfstep.metrics.features import NetworkFeatures, RealData, extractors, read_weights
from halfstep.metrics.images import normalised
from halfstep.runtime.files import DamagedFile, last_line


@final
class Block(nn.Module):
    """A block of two 3x3 convolutions, with a shortcut that has no parameters."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.added = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        around = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.added, self.added))
        return F.relu(inner + around)


@final
class ResNet20(nn.Module):
    """A map from normalised RGB images `[n, 3, 32, 32]` to features `[n, 64]`, which `linear` maps to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x))).mean((2, 3))
        return features


@final
@extractors.register("resnet20-cifar10")
class ResNet20Features(NetworkFeatures):
    """64 features of a CIFAR-10 classifier; PATH in resnet20-cifar10=PATH is a safetensors file with its weights.

    Raises:
        ValueError: if there is no safetensors file at `path`.
        DamagedFile: if the file is damaged or contains the weights of another network.
    """

    batch_size: ClassVar[int] = 250

    def __init__(self, path: str | None, measured: RealData) -> None:
        needed = "a safetensors file of a CIFAR-10 ResNet-20 (shortcut option A)"
        network, state = ResNet20(), read_weights("resnet20-cifar10", path, needed)
        try:
            missing = network.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise DamagedFile(f"{path} does not contain the weights of a ResNet-20 ({last_line(error)})") from None
        # Batch counters have no effect, and published files do not contain them.
        lost = [name for name in missing.missing_keys if not name.endswith("num_batches_tracked")]
        if lost or missing.unexpected_keys:
            raise DamagedFile(
                f"{path} does not contain the weights of a ResNet-20 ({(lost + missing.unexpected_keys)[0]})"
            )
        super().__init__("resnet20-cifar10", network, measured.device)
        self.resize = "32 x 32, bilinear with antialiasing; grey as RGB"

    def batch_features(self, samples: Tensor) -> Tensor:
        features: Tensor = self.network(normalised(samples, 32))
        return features

    @torch.no_grad()
    def logits(self, features: Tensor) -> Tensor | None:
        logits: Tensor = self.network.linear(features.to(self.device)).cpu()
        return logits
