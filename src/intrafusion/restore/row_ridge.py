"""Ridge regression where rows are few: the system is that of the rows, not that of the inputs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from intrafusion.network.gram import square_rows
from intrafusion.restore.ridge import Change, Lacking, Ridge, Rows, Told

_COLUMNS = 1024  # that are multiplied at a time in float64


class RowRidge(Ridge):
    """What `Ridge` does, by a system of k x k entries, for k rows of more inputs.

    What is told of a response is the response less its mean, times the root of the weights: (k, c).
    """

    def square(self, rows: Tensor | None = None) -> Tensor:
        """Products of rows with each other; what they read is kept less its mean."""
        self.rows = torch.cat([x for _, x, _ in self.go_through(rows)])
        return square_rows(self.root(self.rows).T)

    def without(self, rows: Tensor) -> RowRidge:
        other, kept = copy.copy(self), ~rows
        other.fitted = kept.nonzero()[:, 0]
        other.count = float(len(other.fitted) if self.weights is None else self.weights[kept].double().sum())
        if self.intercept:
            other.mean = self.mean + other.average().to(self.precision)
        if self.weights is not None:
            other.inner = other.square().div_(other.count)
        else:
            other.rows = self.rows[kept] - (other.mean - self.mean)
            products = self.inner[kept][:, kept] * (self.count / other.count)
            other.inner = _centre(products) if self.intercept else products
        other.damp(self.strength)
        return other

    @property
    def size(self) -> Tensor:
        return self.inner.diagonal().sum() / self.x.shape[-1]

    def root(self, rows: Tensor) -> Tensor:
        """Those that it is fitted to, times the roots of their weights."""
        if self.weights is None:
            return rows
        weights = self.weights if self.fitted is None else self.weights[self.fitted]
        return rows * weights.sqrt()

    def respond(self, lacking: Lacking, steps: int = 0, start: Change | None = None) -> Told:
        where: Rows = slice(0, len(self.rows)) if self.fitted is None else self.fitted
        if start is None or not steps:
            told = self.tell(lacking(None, where))
        else:
            given = self.give(self.rows, (start[0], self.shift(start)))
            told, steps = self.tell(given + lacking(given, where)), steps - 1
        for _ in range(steps):
            given = self.predict_rows(told)
            told = self.tell(given + lacking(given, where))
        return told

    def tell(self, response: Tensor) -> Told:
        weighed = response if self.weights is None else self.root(self.root(response))
        mean = (
            weighed.sum(0, dtype=torch.float64) / self.count if self.intercept else weighed.new_zeros(weighed.shape[1])
        )
        return self.root((response - mean.to(response)).to(self.precision)).double(), mean.double()

    def predict_rows(self, told: Told) -> Tensor:
        """What the change that is fitted to a response gives, by the products of rows, which are at hand."""
        if self.weights is None and not self.rigid:
            return (self.inner @ self.solved(told[0]) + told[1]).to(self.precision)
        return self.give(self.rows, (self.change(told), told[1]))

    def change(self, told: Told) -> Tensor:
        size = self.x.shape[-1]
        if self.rigid:
            return told[0].new_zeros(told[0].shape[1], size)
        solved, rows = self.solved(told[0]).T / self.count, self.root(self.rows)
        return torch.cat([solved @ part.double() for part in rows.split(_COLUMNS, 1)], 1)


def set_up_ridge(
    x: Tensor, strength: float, *, scarcity: float = 0.0, intercept: bool = True, weights: Tensor | None = None
) -> Ridge:
    """A `Ridge`, or a `RowRidge` where there are no more rows than inputs.

    The arguments are those of `Ridge`.
    """
    kind = RowRidge if len(x) <= x.shape[1] else Ridge
    return kind(x, strength, scarcity=scarcity, intercept=intercept, weights=weights)


def _centre(products: Tensor) -> Tensor:
    """Products of rows (k, k), of which the mean row is taken away."""
    mean = products.mean(1)
    return products - mean - mean[:, None] + mean.mean()
