"""ResNets with projection shortcuts, parameter names as in torchvision (He et al. 2016, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from intrafusion.errors import ArgumentError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + identity)


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 convolutions, around a shortcut; the stride sits on the 3x3."""

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + identity)


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global average pooling, linear head.

    Args:
        block: kind of residual block.
        depths: blocks per stage; stage i is called `layer{i}` (from 1), and every stage but the first halves the image.
        widths: channels per stage, before the block's expansion.
        stem: "cifar" is one 3x3 convolution; "imagenet" a 7x7 one of stride 2 and a max pool.
        channels: channels of the input images.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int],
        *,
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        channels: int = 3,
    ) -> None:
        super().__init__()
        width = widths[0]
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(channels, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(channels, width)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = [f"layer{i + 1}" for i in range(len(depths))]
        for name, depth, planes in zip(self.stages, depths, widths, strict=True):
            first = block(width, planes, stride=1 if name == "layer1" else 2)
            width = planes * block.expansion
            rest = (block(width, planes, stride=1) for _ in range(depth - 1))
            self.add_module(name, nn.Sequential(first, *rest))
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(x.mean((2, 3)))


def cifar_resnet(depth: int, *, num_classes: int = 10) -> ResNet:
    """ResNet of 6k + 2 layers and widths 16, 32, 64 for 32 x 32 images (He et al. 2016, section 4.2).

    Raises:
        ArgumentError: `depth` is not 6k + 2.
    """
    return ResNet(BasicBlock, [blocks_per_stage(depth)] * 3, [16, 32, 64], num_classes=num_classes)


def resnet18(*, num_classes: int = 10, stem: Literal["cifar", "imagenet"] = "cifar") -> ResNet:
    """ResNet-18 (He et al. 2016, Table 1); by default with the 3x3 stem used on CIFAR."""
    return ResNet(BasicBlock, [2, 2, 2, 2], [64, 128, 256, 512], num_classes=num_classes, stem=stem)


def resnet50(*, num_classes: int = 1000, stem: Literal["cifar", "imagenet"] = "imagenet") -> ResNet:
    """ResNet-50 (He et al. 2016, Table 1), stride on the 3x3 convolutions."""
    return ResNet(Bottleneck, [3, 4, 6, 3], [64, 128, 256, 512], num_classes=num_classes, stem=stem)


def digits_resnet(*, num_classes: int = 10) -> ResNet:
    """Three blocks for 8 x 8 grey images: one with an identity shortcut, two with a projection."""
    return ResNet(BasicBlock, [1, 1, 1], [16, 32, 64], num_classes=num_classes, channels=1)


def blocks_per_stage(depth: int) -> int:
    """k of a CIFAR ResNet of 6k + 2 layers."""
    if depth < 8 or (depth - 2) % 6:
        raise ArgumentError(f"CIFAR ResNet: expected a depth of 6k + 2 (8, 14, 20, 32, 44, 56, 110), got {depth}.")
    return (depth - 2) // 6


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """1x1 convolution and batch norm where the shape changes; None where the identity fits."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
