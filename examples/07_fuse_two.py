"""Two networks that were trained apart, fused into one of the same size."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import intrafusion

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)


def train(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(10):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    return 100 * (network(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()


a, b = train(1), train(2)
averaged = nn.Sequential(
    *[type(layer)(*layer.weight.T.shape) if isinstance(layer, nn.Linear) else layer for layer in a]
)
averaged.load_state_dict({k: (v + b.state_dict()[k]) / 2 for k, v in a.state_dict().items()})

fused = intrafusion.fuse([a, b], images[:1], using="activations", inputs=images[:200])
print(f"first {accuracy(a):.1f} %, second {accuracy(b):.1f} %")
print(f"averaged as they are {accuracy(averaged):.1f} %, fused {accuracy(fused.model):.1f} %")
assert accuracy(fused.model) > accuracy(averaged)
