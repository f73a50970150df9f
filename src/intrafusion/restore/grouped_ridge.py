"""Ridge regression of many small linear maps at once: one for each group of a grouped convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.network.gram import multiply_by_group
from intrafusion.restore.ridge import Change, Ridge, Told


class GroupedRidge(Ridge):
    """What `Ridge` does, for each of g groups with its own d inputs, its own outputs and its own lam.

    Of a change (c, d), the outputs of a group lie next to each other. What is told of a response: (g, d, c / g).

    Args:
        x: inputs (g, k, d); the rest is as there. The systems have d x d entries, whatever the rows.
    """

    fewest = 64

    def make_zeros(self) -> Tensor:
        groups, _, size = self.x.shape
        return self.x.new_zeros(groups, 1, size, dtype=self.precision)

    def square(self, rows: Tensor | None = None) -> Tensor:
        groups, _, size = self.x.shape
        total = self.x.new_zeros(groups, size, size, dtype=torch.float64)
        for _, x, weights in self.go_through(rows):
            total += (x if weights is None else x * weights).mT @ x
        return total

    def subtract_(self, products: Tensor, mean: Tensor) -> Tensor:
        return products.sub_(mean.mT @ mean)

    @property
    def size(self) -> Tensor:
        return self.inner.diagonal(dim1=1, dim2=2).mean(1)[:, None]

    def add_ridge(self) -> Tensor:
        scarce = self.scarcity * self.x.shape[-1] / self.effective_count
        damped = self.inner.clone()
        damped.diagonal(dim1=1, dim2=2).add_(((self.strength + scarce) * self.size).clamp(min=1e-30))
        return damped

    def move(self, change: Tensor) -> Tensor:
        return multiply_by_group(self.mean.double(), change)[0]

    def give(self, x: Tensor, change: Change) -> Tensor:
        return multiply_by_group(x, change[0].to(x)).add_(change[1].to(x))

    def multiply(self, x: Tensor, response: Tensor) -> Tensor:
        return x.mT @ response.unflatten(1, (len(x), -1)).transpose(0, 1)

    def change(self, told: Told) -> Tensor:
        right = told[0]
        if self.rigid:
            return right.new_zeros(right.shape[0] * right.shape[2], right.shape[1])
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
