"""A criterion of your own beside the library's, and the laws that any must keep. More kinds: docs/extend.md."""

import torch
from torch import nn

import intrafusion
from intrafusion.checks import check_importance
from intrafusion.importance.features import channel_features


def largest_weight(group, weights, observations=None):
    """A channel is as important as its largest weight. `weights` are tensors by name, batch norms folded."""
    return channel_features(group, weights).abs().amax(dim=1)


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 5))
images = torch.randn(64, 3, 8, 8)

print(check_importance(largest_weight))
for importance in ("l1", "l2", largest_weight):
    small = intrafusion.compress(model, images[:1], keep=0.5, reducer="select", importance=importance, inputs=images)
    print(importance if isinstance(importance, str) else importance.__name__, small.restored[-1])
