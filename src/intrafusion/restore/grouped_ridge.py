"""Ridge regression of many small linear maps at once: one for each group of a grouped convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.network.gram import multiply_by_group
from intrafusion.network.row_weights import effective_rows, weigh_evenly
from intrafusion.restore.ridge import Ridge

_ROWS = 1024  # that are multiplied at a time in float32


class GroupedRidge(Ridge):
    """What `Ridge` does, for each of g groups with its own d inputs, its own outputs and its own lam.

    Of a change (c, d), the outputs of a group lie next to each other.

    Args:
        x: inputs (g, k, d); the rest is as there. The systems have d x d entries, whatever the rows.
    """

    def square(self) -> Tensor:
        return _multiply(self.rooted, self.rooted) / self.x.shape[1]

    def without(self, rows: Tensor) -> GroupedRidge:
        """The same of all rows but these, (k,) of True and False; products of so few inputs are taken again."""
        weights = None if self.weights is None else weigh_evenly(self.weights[~rows][:, 0])
        how = {"scarcity": self.scarcity, "intercept": self.intercept}
        other = GroupedRidge(self.x[:, ~rows], self.strength, **how, weights=weights)
        other.mean = other.mean + self.mean
        return other

    def add_ridge(self) -> Tensor:
        _, k, d = self.x.shape
        damped = self.inner.clone()
        size = damped.diagonal(dim1=1, dim2=2).mean(1)
        lam = (self.strength + self.scarcity * d / effective_rows(self.weights, k)) * size
        damped.diagonal(dim1=1, dim2=2).add_(lam.clamp(min=1e-30)[:, None])
        return damped

    def average(self, rows: Tensor) -> Tensor:
        """Over rows, (g, 1, d)."""
        return (rows if self.weights is None else rows * self.weights.to(rows)).mean(1, keepdim=True)

    def move(self, change: Tensor) -> Tensor:
        return multiply_by_group(self.mean, change)[0]

    def predict(self, response: Tensor) -> Tensor:
        right, shift = self.project(response)
        return multiply_by_group(self.x, self.change(right).to(self.x)) + shift.to(self.x)

    def project(self, response: Tensor) -> tuple[Tensor, Tensor]:
        """What of a response the rows of each group tell, (g, d, c / g), and its mean (c,); float64."""
        groups = response.unflatten(1, (len(self.x), -1)).transpose(0, 1)
        mean = self.average(groups) if self.intercept else torch.zeros_like(groups[:, :1])
        wanted = self.root((groups - mean).to(self.x))
        return _multiply(self.rooted, wanted) / self.x.shape[1], mean.double().flatten()

    def change(self, right: Tensor) -> Tensor:
        if self.rigid:
            return right.new_zeros(right.shape[0] * right.shape[2], self.mean.shape[2])
        return self.solved(right).mT.flatten(0, 1)

    def solved(self, right: Tensor) -> Tensor:
        """(inner + lam I)^-1 right of each group; the least solution where there are many."""
        if self.factor is None:
            damped = self.add_ridge()
            self.factor, failed = torch.linalg.cholesky_ex(damped)
            self.singular = failed.nonzero()[:, 0]
            self.inverse = torch.linalg.pinv(damped[self.singular], hermitian=True)
        found = torch.cholesky_solve(right, self.factor)
        found[self.singular] = self.inverse @ right[self.singular]
        return found


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of each group, multiplied in their precision some rows at a time, summed in float64."""
    total = x.new_zeros(len(x), x.shape[2], y.shape[2], dtype=torch.float64)
    for left, right in zip(x.split(_ROWS, 1), y.split(_ROWS, 1), strict=True):
        total += left.mT @ right
    return total
