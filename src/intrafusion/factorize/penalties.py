"""Terms of a training loss that make layers easy to compress afterwards."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intrafusion.arguments import Matrix, NotNegative, checked
from intrafusion.surgery.lowrank import is_splittable


@checked
@dataclass(frozen=True)
class Smooth:
    r"""Towards low-rank or smooth weights.

    nuclear * sum sigma_i  +  first * sum |w_{i+1} - w_i|  +  second * sum |w_{i+1} - 2 w_i + w_{i-1}|

    w_i are the flattened filters of a convolution or linear layer, in the order of its output channels; summed over
    all layers. Norm (Euclidean) and weights of the differences are OURS.

    Reference: Runkel et al. 2025.
    """

    nuclear: NotNegative = 0.0
    first: NotNegative = 0.0
    second: NotNegative = 0.0

    @checked
    def __call__(self, model: nn.Module) -> Tensor:
        """The penalty of a network, a scalar that can be differentiated; 0 where it has no such layer."""
        weights = [m.weight for m in model.modules() if is_splittable(m)]
        return sum((self.of(w.flatten(1)) for w in weights if isinstance(w, Tensor)), torch.zeros(()))

    @checked
    def of(self, rows: Matrix) -> Tensor:
        total = rows.new_zeros(())
        if self.nuclear:
            total = total + self.nuclear * torch.linalg.matrix_norm(rows, "nuc")
        if self.first:
            total = total + self.first * _row_lengths(rows.diff(dim=0))
        if self.second:
            total = total + self.second * _row_lengths(rows.diff(n=2, dim=0))
        return total


def _row_lengths(rows: Tensor) -> Tensor:
    """Sum of the Euclidean lengths of rows, with gradient 0 where a row is 0."""
    return torch.where((rows == 0).all(1), 0.0, (rows.square().sum(1) + 1e-24).sqrt()).sum()
