"""VGG with batch norm for 32 x 32 images: one Sequential of convolutions, and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class VGG(nn.Module):
    """Convolutions with bias, batch norm and ReLU; a 2x2 max pool ends each stage (Simonyan & Zisserman 2015, Table 1).

    Args:
        stages: widths of the convolutions of each stage.
        num_classes: the head is `Linear(last width, num_classes)`, so five stages bring 32 x 32 images to one pixel.
    """

    def __init__(self, stages: Sequence[Sequence[int]], *, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage in stages:
            for width in stage:
                layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))
