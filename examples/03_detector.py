"""A detector with several outputs: a dict of boxes and scores on three scales.

Whatever a forward gives is compared: dicts, tuples, dataclasses. Labels are not needed, so neither are boxes.
"""

import torch
import torch.nn.functional as F
from torch import nn

import intrafusion


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)
    )


class Detector(nn.Module):
    """A backbone, a feature pyramid, and heads that all scales share."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.backbone = nn.ModuleList([conv(3, 16, 2), conv(16, 32, 2), conv(32, 64, 2), conv(64, 64, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in (32, 64, 64))
        self.tower = nn.Sequential(conv(32, 32), conv(32, 32))
        self.boxes, self.scores = nn.Conv2d(32, 4, 1), nn.Conv2d(32, classes, 1)

    def forward(self, image):
        levels = []
        for stage in self.backbone:
            image = stage(image)
            levels.append(image)
        top, pyramid = None, []
        for lateral, level in zip(reversed(self.lateral), reversed(levels[1:]), strict=True):
            top = lateral(level) if top is None else lateral(level) + F.interpolate(top, size=level.shape[-2:])
            pyramid.append(self.tower(top))
        return {"boxes": [self.boxes(p) for p in pyramid], "scores": [self.scores(p) for p in pyramid]}


def make_scenes(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise with one bright square of 8 pixels, and (row, column) of its cell on the finest map."""
    images, cells = 0.1 * torch.randn(count, 3, 64, 64), torch.randint(16, (count, 2))
    for image, (row, column) in zip(images, 4 * cells, strict=True):
        image[:, row : row + 8, column : column + 8] += 1
    return images, cells


torch.manual_seed(0)
model = Detector()
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(60):  # trained for a moment, to find the square on the finest scale
    images, cells = make_scenes(32)
    scores = model(images)["scores"][-1].sum(dim=1).flatten(1)
    optimizer.zero_grad()
    F.cross_entropy(scores, 16 * cells[:, 0] + cells[:, 1]).backward()
    optimizer.step()
model.eval()
images, _ = make_scenes(128)

small = intrafusion.compress(model, images[:1], keep={"backbone.*": 0.75, "*": 0.5}, inputs=images)
print(small)


@torch.no_grad()
def found(network: nn.Module, images: torch.Tensor, cells: torch.Tensor) -> float:
    """Share of squares in whose cell the score is highest, in percent."""
    highest = network(images)["scores"][-1].sum(dim=1).flatten(1).argmax(1)
    return 100 * (highest == 16 * cells[:, 0] + cells[:, 1]).float().mean().item()


unseen = make_scenes(200)
print(f"squares found: {found(model, *unseen):.0f} % -> {found(small.model, *unseen):.0f} %")
