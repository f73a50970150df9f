"""DenseNet-BC for 32 x 32 images: every layer reads all maps before it (Huang et al. 2017, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _DenseLayer(nn.Module):
    """Norm, ReLU, 1x1 bottleneck, norm, ReLU, 3x3; appends `growth` maps to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], dim=1)


class _DenseBlock(nn.Module):
    """`depth` dense layers, one after the other."""

    def __init__(self, inputs: int, depth: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(_DenseLayer(inputs + k * growth, growth) for k in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class _Transition(nn.Module):
    """Norm, ReLU, 1x1 convolution to half the width, 2x2 average pool."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC with compression 1/2; depth 100 is three blocks of 16 layers at growth 12.

    Args:
        depths: layers per dense block.
        growth: maps that each layer adds.
    """

    def __init__(self, depths: Sequence[int] = (16, 16, 16), growth: int = 12, *, num_classes: int = 10) -> None:
        super().__init__()
        width = 2 * growth
        self.features = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        for k, depth in enumerate(depths, start=1):
            self.features.add_module(f"denseblock{k}", _DenseBlock(width, depth, growth))
            width += depth * growth
            if k < len(depths):
                self.features.add_module(f"transition{k}", _Transition(width))
                width //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))
