"""Ridge regression towards zero change, of a linear map and of one behind an activation function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from intrafusion.errors import ArgumentError
from intrafusion.network.gram import add_square_, mirror_
from intrafusion.network.row_weights import effective_rows

Rows = Tensor | slice
"""Some of the k rows: their numbers (r,) int64, or from where to where."""

Lacking = Callable[[Tensor | None, Rows], Tensor]
"""What is lacking at some rows (r, c) if the change already gives this much there (r, c); None for no change."""

Change = tuple[Tensor, Tensor]
"""D (c, d) and e (c,), float64."""

Told = tuple[Tensor, Tensor]
"""What rows tell of a response: its products with what they read (d, c), and its mean (c,); float64."""

_ENTRIES = 2**18  # of what is read, that are worked on at a time: as many as a cache holds
_MOST = 4096  # rows at a time


class Ridge:
    r"""The smallest change of a linear map that makes up for what its output lacks, on k rows of d inputs.

        min_{D, e}  mean_r || R_r - D x_r - e ||^2 + lam ||D||^2,   lam = (strength + scarcity d / k) mean diag Cov x

    The solution is D = Cov(R, x) (Cov(x, x) + lam I)^-1 and e = mean R - D mean x; without an intercept e = 0 and the
    covariances are second moments. Rows are gone through some at a time, and nothing else as large as all of them is
    made; the d x d system is set up once, and factored once for each strength. See `set_up_ridge`.

    Args:
        x: inputs (k, d). Products of rows are taken in float32, of float64 rows in float64, and summed in float64; the
            system is solved in float64.
        strength: part of lam that stays however many rows there are, >= 0; infinite for constants only, D = 0.
        scarcity: part of lam that grows as rows get scarce, >= 0.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike. All means and sums are of weighted
            rows then, and k in lam is the number of rows of equal weight that tell as much.
    """

    fewest = 1024  # rows at a time, as their products are added up in float64

    def __init__(
        self,
        x: Tensor,
        strength: float,
        *,
        scarcity: float = 0.0,
        intercept: bool = True,
        weights: Tensor | None = None,
    ) -> None:
        if not x.shape[-2]:
            raise ArgumentError("ridge: expected at least one row, got none.")
        self.x, self.intercept, self.scarcity = x, intercept, scarcity
        self.precision = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.weights = None if weights is None else weights.to(self.precision)
        self.fitted: Tensor | None = None  # the rows that it is fitted to; None for all
        self.count = float(x.shape[-2])
        self.mean = self.make_zeros()
        self.mean = self.average().to(self.precision) if intercept else self.mean
        self.inner = self.square().div_(self.count)
        self.damp(strength)

    # ---- rows -------------------------------------------------------------------------------------------------------

    def go_through(self, rows: Tensor | None = None) -> Iterator[tuple[Rows, Tensor, Tensor | None]]:
        """Some rows at a time: which, what they read less the mean (r, d), how much each counts (r, 1) or None.

        Args:
            rows: of which; by default of those that it is fitted to.
        """
        rows = self.fitted if rows is None else rows
        size = max(self.fewest, min(_MOST, _ENTRIES // max(1, self.mean.numel())))
        for start in range(0, self.x.shape[-2] if rows is None else len(rows), size):
            own = slice(start, start + size) if rows is None else rows[start : start + size]
            x = self.x[..., own, :] if isinstance(own, slice) else self.x.index_select(-2, own)
            x = x.to(self.precision)
            x = x - self.mean if isinstance(own, slice) else x.sub_(self.mean)
            yield own, x, None if self.weights is None else self.weights[own]

    def make_zeros(self) -> Tensor:
        """In the form of the mean of the inputs."""
        return self.x.new_zeros(self.x.shape[-1], dtype=self.precision)

    def average(self, rows: Tensor | None = None) -> Tensor:
        """The mean of what some rows read more than the mean; a sum over them as a part of all that it is fitted to."""
        total = self.mean.new_zeros(self.mean.shape, dtype=torch.float64)
        for _, x, weights in self.go_through(rows):
            total += (x if weights is None else x * weights).sum(-2, keepdim=x.dim() > 2)
        return total / self.count

    def square(self, rows: Tensor | None = None) -> Tensor:
        """Products of what some rows read, with their weights, (d, d) float64."""
        size = self.x.shape[-1]
        total = self.x.new_zeros(size, size, dtype=torch.float64)
        for _, x, weights in self.go_through(rows):
            add_square_(total, x if weights is None else x * weights.sqrt())
        return mirror_(total)

    def without(self, rows: Tensor) -> Ridge:
        """The same of all rows but these, (k,) of True and False: only their products are taken, and taken away."""
        other, left = copy.copy(self), rows.nonzero()[:, 0]
        other.fitted = (~rows).nonzero()[:, 0]
        other.count = float(len(other.fitted) if self.weights is None else self.weights[other.fitted].double().sum())
        products = self.square(left).neg_().add_(self.inner, alpha=self.count).div_(other.count)
        if self.intercept:
            moved = self.average(left) * (-self.count / other.count)
            other.mean = (self.mean.double() + moved).to(self.precision)
            products = self.subtract_(products, moved)
        other.inner = products
        other.damp(self.strength)
        return other

    def subtract_(self, products: Tensor, mean: Tensor) -> Tensor:
        """Of products that were taken around another mean."""
        return products.addr_(mean, mean, alpha=-1)

    # ---- strengths --------------------------------------------------------------------------------------------------

    def with_strength(self, strength: float) -> Ridge:
        """The same for another strength; products of rows are not taken again."""
        if strength == self.strength:
            return self
        other = copy.copy(self)
        other.damp(strength)
        return other

    def damp(self, strength: float) -> None:
        self.strength, self.rigid, self.factor = strength, math.isinf(strength), None

    @property
    def effective_count(self) -> float:
        """As how many rows of equal weight those tell that it is fitted to."""
        if self.weights is None:
            return self.count
        weights = self.weights if self.fitted is None else self.weights[self.fitted]
        return effective_rows(weights / weights.mean(), len(weights))

    @property
    def size(self) -> Tensor:
        """The mean variance of the inputs."""
        return self.inner.diagonal().mean()

    def add_ridge(self) -> Tensor:
        """inner + lam I."""
        scarce = self.scarcity * self.x.shape[-1] / self.effective_count
        damped = self.inner.clone()
        damped.diagonal().add_(((self.strength + scarce) * self.size).clamp(min=1e-30))
        return damped

    # ---- solutions --------------------------------------------------------------------------------------------------

    def solve(self, lacking: Lacking, steps: int = 0, start: Change | None = None) -> Change:
        r"""The change that makes up for what is lacking.

        With `steps`, what is lacking is asked for again, given what the change does, and the change is solved for
        anew: D, e regress D x + e + R(D x + e). For R(z) = f(y) - f(z + z_0) with an increasing f of slopes <= 1 this
        minimises the matching loss of f, a convex function, and no step increases it.

        Args:
            start: a change that the first step starts from, in place of the solution for what is lacking without any.
        Returns:
            D (c, d) and e (c,), float64; zero where all inputs are constant.
        Reference: matching losses: Helmbold, Kivinen and Warmuth 1999; solving for them by repeated least squares with
            one factored covariance: Agarwal et al. 2014, Algorithm 1.
        """
        return self.fit(self.respond(lacking, steps, start))

    def respond(self, lacking: Lacking, steps: int = 0, start: Change | None = None) -> Told:
        """What is told of a response: of what is lacking or, after steps, of that on top of what the change gives."""
        if start is None or not steps:
            told = self.project(lacking)
        else:
            told, steps = self.project(lacking, (start[0], self.shift(start))), steps - 1
        for _ in range(steps):
            told = self.project(lacking, (self.change(told), told[1]))
        return told

    def fit(self, told: Told) -> Change:
        """D and e, as `solve`, for a response."""
        change = self.change(told)
        return change, told[1] - self.move(change)

    def shift(self, change: Change) -> Tensor:
        """What a change gives at the mean of the inputs, (c,)."""
        return change[1] + self.move(change[0])

    def move(self, change: Tensor) -> Tensor:
        """What a change gives of the mean of the inputs, (c,)."""
        return change @ self.mean.double()

    def predict(self, change: Change, rows: Tensor) -> Tensor:
        """What a change gives at some rows, (r, c)."""
        own = (change[0], self.shift(change))
        return torch.cat([self.give(x, own) for _, x, _ in self.go_through(rows)])

    def give(self, x: Tensor, change: Change) -> Tensor:
        """What a change gives of centred inputs (r, d), (r, c), with what it gives at their mean."""
        return torch.addmm(change[1].to(x), x, change[0].T.to(x))

    def project(self, lacking: Lacking, change: Change | None = None) -> Told:
        """What the rows tell of what is lacking or, with a change, of what that gives and what is lacking then.

        Args:
            change: D, and what it gives at the mean of the inputs.
        """
        total: Tensor | float = 0.0
        summed: Tensor | float = 0.0
        about: Tensor | None = None  # a mean of some, so that what is large in all of them takes no digits
        change = None if change is None else (change[0].to(self.precision), change[1].to(self.precision))
        for rows, x, weights in self.go_through():
            given = None if change is None else self.give(x, change)
            response = lacking(given, rows).to(x)
            response = response if given is None else given.add_(response)
            about = (response.mean(0) if self.intercept else torch.zeros_like(response[0])) if about is None else about
            response = response - about
            response = response if weights is None else response.mul_(weights)
            total = total + self.multiply(x, response).double()
            summed = summed + response.sum(0, dtype=torch.float64)
        assert isinstance(total, Tensor)
        assert about is not None
        return total / self.count, about.double() + summed / self.count if self.intercept else about.double()

    def multiply(self, x: Tensor, response: Tensor) -> Tensor:
        """x^T response."""
        return x.T @ response

    def change(self, told: Told) -> Tensor:
        """D (c, d) for a response."""
        return told[0].new_zeros(told[0].shape).T if self.rigid else self.solved(told[0]).T

    def solved(self, right: Tensor) -> Tensor:
        """(inner + lam I)^-1 right; the least solution where there are many."""
        if self.factor is None:
            self.factor, self.failed = _factor_(self.add_ridge())
        if self.failed:
            return torch.linalg.pinv(self.add_ridge(), hermitian=True) @ right
        return torch.cholesky_solve(right, self.factor)


def _factor_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor of a symmetric matrix, in its memory, and whether there is none (not 0)."""
    found, failed = matrix.mT, torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(found, out=(found, failed))
    return found, failed
