"""Your own network, a few hundred unlabelled images, a target: half of the parameters.

The images are scikit-learn's digits, so that this runs anywhere in seconds. Yours may be a DataLoader.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import intrafusion


class MyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.wide = nn.Sequential(nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.block(x))  # a residual connection: these channels stay together
        return self.head(self.wide(x).mean(dim=(2, 3)))


pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
train, unlabelled, test = slice(0, 1200), slice(0, 256), slice(1200, None)

torch.manual_seed(0)
model = MyNet()
optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
for _ in range(8):
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[train][batch]), labels[train][batch]).backward()
        optimizer.step()
model.eval()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return 100 * (network(images[test]).argmax(1) == labels[test]).float().mean().item()


small = intrafusion.compress(model, images[:1], target={"params": 0.5}, inputs=images[unlabelled])
print(small)
print(f"accuracy on {len(labels[test])} test images: {accuracy(model):.1f} % -> {accuracy(small.model):.1f} %")

small.save("mynet-small")
loaded = intrafusion.load("mynet-small", MyNet)
assert torch.equal(loaded(images[:8]), small.model(images[:8]))
