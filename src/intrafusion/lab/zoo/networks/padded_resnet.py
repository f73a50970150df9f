"""CIFAR ResNet with parameter-free shortcuts: where the width grows, new channels of the shortcut are zero."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.lab.zoo.networks.resnet import blocks_per_stage, conv3x3


class PadShortcut(nn.Module):
    """Every second pixel, and `width // 4` zero channels on each side (He et al. 2016, section 4.2, option A)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pad = width // 4

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class _PadBlock(nn.Module):
    """Two 3x3 convolutions around an identity or padded shortcut."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 and inputs == width else PadShortcut(width)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class PaddedResNet(nn.Module):
    """ResNet of 6k + 2 layers and widths 16, 32, 64 without shortcut parameters; the head is called `linear`.

    Raises:
        ValueError: `depth` is not 6k + 2.
    """

    def __init__(self, depth: int, *, num_classes: int = 10) -> None:
        super().__init__()
        blocks = blocks_per_stage(depth)
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(_PadBlock(inputs, width, stride), *(_PadBlock(width, width, 1) for _ in range(blocks - 1)))
