"""What comes out is an ordinary network: it compiles, exports, and goes on in PyTorch's own tools."""

import torch
from torch import nn

import intrafusion

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(3, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 32, 3, padding=1),
    nn.ReLU(),
    nn.AdaptiveAvgPool2d(1),
    nn.Flatten(),
    nn.Linear(32, 10),
).eval()
images = torch.randn(128, 3, 16, 16)
small = intrafusion.compress(model, images[:1], keep=0.5, inputs=images)

batch = {"input": {0: torch.export.Dim.DYNAMIC}}
program = torch.export.export(small.model, (images[:2],), dynamic_shapes=tuple(batch.values()))
torch.export.save(program, "small.pt2")
loaded = torch.export.load("small.pt2").module()
assert torch.allclose(loaded(images), small.model(images), atol=1e-6)
print("exported and loaded back:", tuple(loaded(images).shape))
