"""Ridge regression of many small linear maps at once: one for each group of a grouped convolution."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from intrafusion.errors import ArgumentError
from intrafusion.network.gram import multiply_by_group
from intrafusion.network.row_weights import effective_rows, weigh_evenly
from intrafusion.restore.ridge import Lacking

_ROWS = 1024  # that are multiplied at a time in float32


class GroupedRidge:
    """What `Ridge` does, for each of g groups with its own d inputs, its own outputs and its own lam.

    Args:
        x: inputs (g, k, d); the rest is as there. The systems have d x d entries, whatever the rows.
    """

    def __init__(
        self,
        x: Tensor,
        strength: float,
        *,
        scarcity: float = 0.0,
        intercept: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        _, k, d = x.shape
        if not k:
            raise ArgumentError("ridge: expected at least one row, got none.")
        self.intercept, self.scarcity = intercept, scarcity
        x = x if x.dtype == torch.float64 else x.float()
        self.weights = None if weights is None else weights.to(x)
        mean = self.average(x) if intercept else x.new_zeros(len(x), 1, d)
        self.x, self.mean = x - mean, mean.double()
        self.rooted = self.root(self.x)
        self.inner = _multiply(self.rooted, self.rooted) / k
        self.damp(strength)

    def without(self, rows: Tensor) -> GroupedRidge:
        """The same of all rows but these, (k,) of True and False; see `Ridge.without`."""
        weights = None if self.weights is None else weigh_evenly(self.weights[~rows][:, 0])
        how = {"scarcity": self.scarcity, "intercept": self.intercept}
        other = GroupedRidge(self.x[:, ~rows], self.strength, **how, weights=weights)
        other.mean = other.mean + self.mean
        return other

    def with_strength(self, strength: float) -> GroupedRidge:
        """The same for another strength; products of rows are not taken again."""
        if strength == self.strength:
            return self
        other = copy.copy(self)
        other.damp(strength)
        return other

    def damp(self, strength: float) -> None:
        _, k, d = self.x.shape
        self.strength, self.rigid = strength, math.isinf(strength)
        if self.rigid:
            return
        damped = self.inner.clone()
        size = damped.diagonal(dim1=1, dim2=2).mean(1)
        lam = (strength + self.scarcity * d / effective_rows(self.weights, k)) * size
        damped.diagonal(dim1=1, dim2=2).add_(lam.clamp(min=1e-30)[:, None])
        self.factor, failed = torch.linalg.cholesky_ex(damped)
        self.singular = failed.nonzero()[:, 0]
        self.inverse = torch.linalg.pinv(damped[self.singular], hermitian=True)

    def average(self, rows: Tensor) -> Tensor:
        """Over rows, (g, 1, d)."""
        return (rows if self.weights is None else rows * self.weights.to(rows)).mean(1, keepdim=True)

    def root(self, rows: Tensor) -> Tensor:
        """Rows times the roots of their weights."""
        return rows if self.weights is None else rows * self.weights.sqrt()

    def solve(self, lacking: Lacking, steps: int = 0) -> tuple[Tensor, Tensor]:
        """The change that makes up for what is lacking (k, c), as `Ridge.solve` finds it for each group.

        Returns:
            D (c, d), in which the outputs of a group lie next to each other, and e (c,), float64.
        """
        residual = lacking(None)
        change, shift = self.change(residual)
        for _ in range(steps):
            given = multiply_by_group(self.x, change.to(self.x))
            residual = lacking(given + shift.to(given))
            change, moved = self.change(residual, given)
            shift = shift + moved
        return change, shift - multiply_by_group(self.mean, change)[0] if self.intercept else shift

    def change(self, residual: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """D for the residual (k, c) on top of what is given already, without its mean, and that mean."""
        groups = residual.unflatten(1, (len(self.x), -1)).transpose(0, 1)
        mean = self.average(groups) if self.intercept else torch.zeros_like(groups[:, :1])
        if self.rigid:
            return self.mean.new_zeros(residual.shape[1], self.mean.shape[2]), mean.double().flatten()
        wanted = (groups - mean).to(self.x)
        wanted = wanted if given is None else wanted + given.unflatten(1, (len(self.x), -1)).transpose(0, 1)
        right = _multiply(self.rooted, self.root(wanted)) / self.x.shape[1]
        return self.solved(right).mT.flatten(0, 1), mean.double().flatten()

    def solved(self, right: Tensor) -> Tensor:
        """(inner + lam I)^-1 right of each group; the least solution where there are many."""
        found = torch.cholesky_solve(right, self.factor)
        found[self.singular] = self.inverse @ right[self.singular]
        return found


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of each group, multiplied in their precision some rows at a time, summed in float64."""
    total = x.new_zeros(len(x), x.shape[2], y.shape[2], dtype=torch.float64)
    for left, right in zip(x.split(_ROWS, 1), y.split(_ROWS, 1), strict=True):
        total += left.mT @ right
    return total
