"""Multi-layer perceptron without biases, layers `fc1`, `fc2`, ..."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers of the given widths with ReLU between them; images are flattened first.

    Args:
        inputs: values per image.
        hidden: widths of the hidden layers.
    """

    def __init__(self, inputs: int = 784, hidden: Sequence[int] = (400, 200, 100), *, num_classes: int = 10) -> None:
        super().__init__()
        widths = [inputs, *hidden, num_classes]
        self.layers = [f"fc{k}" for k in range(1, len(widths))]
        for name, (fan_in, fan_out) in zip(self.layers, pairwise(widths), strict=True):
            self.add_module(name, nn.Linear(fan_in, fan_out, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for name in self.layers[:-1]:
            x = F.relu(self.get_submodule(name)(x))
        return self.get_submodule(self.layers[-1])(x)
