"""Ridge regression towards zero change, of a linear map and of one behind an activation function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from intrafusion.errors import ArgumentError
from intrafusion.network.gram import multiply_rows, square_rows
from intrafusion.network.row_weights import effective_rows

Lacking = Callable[[Tensor | None], Tensor]
"""What is lacking (k, c) if the change already gives this much (k, c); None for no change."""


class Ridge:
    r"""The smallest change of a linear map that makes up for what its output lacks, on k rows of d inputs.

        min_{D, e}  mean_r || R_r - D x_r - e ||^2 + lam ||D||^2,   lam = (strength + scarcity d / k) mean diag Cov x

    The solution is D = Cov(R, x) (Cov(x, x) + lam I)^-1 and e = mean R - D mean x; without an intercept e = 0 and the
    covariances are second moments. The system is set up once, with d x d or with k x k entries, and factored once for
    each strength.

    Args:
        x: inputs (k, d). Products of rows are taken in float32, of float64 rows in float64, and summed in float64; the
            system is solved in float64.
        strength: part of lam that stays however many rows there are, >= 0; infinite for constants only, D = 0.
        scarcity: part of lam that grows as rows get scarce, >= 0.
        weights: how much each row counts, (k, 1) of mean 1; None for all alike. All means and sums are of weighted
            rows then, and k in lam is the number of rows of equal weight that tell as much.
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
        if not x.shape[-2]:
            raise ArgumentError("ridge: expected at least one row, got none.")
        self.intercept, self.scarcity = intercept, scarcity
        self.few = x.dim() == 2 and len(x) <= x.shape[1]  # the system is that of the rows, also of some of them
        x = x if x.dtype == torch.float64 else x.float()
        self.weights = None if weights is None else weights.to(x)
        mean = self.average(x)
        mean = mean if intercept else torch.zeros_like(mean)
        self.x, self.mean = x - mean, mean.double()
        self.rooted = self.root(self.x)
        self.inner = self.square()
        self.damp(strength)

    def square(self) -> Tensor:
        """Products of the inputs, or where the rows are few, of these, with their weights."""
        return square_rows(self.rooted.T) if self.few else square_rows(self.rooted) / len(self.x)

    def without(self, rows: Tensor) -> Ridge:
        """The same of all rows but these, (k,) of True and False: only their products are taken, and taken away."""
        other = copy.copy(self)
        kept = ~rows
        x, weights = self.x[kept], None if self.weights is None else self.weights[kept]
        total = len(x) if weights is None else float(weights.double().sum())
        other.weights = None if weights is None else weights * (len(x) / total)
        moved = other.average(x) if self.intercept else x.new_zeros(x.shape[1])
        other.x, other.mean = x.sub_(moved), self.mean + moved.double()
        other.rooted = other.root(other.x)
        if self.few and weights is None:
            other.inner = _centre(self.inner[kept][:, kept]) if self.intercept else self.inner[kept][:, kept]
        elif self.few:
            other.inner = square_rows(other.rooted.T)
        else:
            rest = len(self.x) * self.inner - square_rows(self.rooted[rows])
            other.inner = rest / total - torch.outer(moved.double(), moved.double())
        other.damp(self.strength)
        return other

    def with_strength(self, strength: float) -> Ridge:
        """The same for another strength; products of rows are not taken again."""
        if strength == self.strength:
            return self
        other = copy.copy(self)
        other.damp(strength)
        return other

    def damp(self, strength: float) -> None:
        self.strength, self.rigid, self.factor = strength, math.isinf(strength), None

    def add_ridge(self) -> Tensor:
        """inner + lam I."""
        k, d = self.x.shape
        size = self.inner.diagonal().mean() * (k / d if self.few else 1)
        scarce = self.scarcity * d / effective_rows(self.weights, k)
        damped = self.inner.clone()
        damped.diagonal().add_(((self.strength + scarce) * size).clamp(min=1e-30))
        return damped

    def average(self, rows: Tensor) -> Tensor:
        return rows.mean(0) if self.weights is None else (rows * self.weights.to(rows)).mean(0)

    def root(self, rows: Tensor) -> Tensor:
        """Rows times the roots of their weights."""
        return rows if self.weights is None else rows * self.weights.sqrt()

    def solve(self, lacking: Lacking, steps: int = 0) -> tuple[Tensor, Tensor]:
        r"""The change that makes up for what is lacking.

        With `steps`, what is lacking is asked for again, given what the change does, and the change is solved for
        anew: D, e regress D x + e + R(D x + e). For R(z) = f(y) - f(z + z_0) with an increasing f of slopes <= 1 this
        minimises the matching loss of f, a convex function, and no step increases it.

        Returns:
            D (c, d) and e (c,), float64; zero where all inputs are constant.
        Reference: matching losses: Helmbold, Kivinen and Warmuth 1999; solving for them by repeated least squares with
            one factored covariance: Agarwal et al. 2014, Algorithm 1.
        """
        return self.fit(self.respond(lacking, steps))

    def respond(self, lacking: Lacking, steps: int = 0) -> Tensor:
        """What the change is regressed on (k, c): what is lacking, or after steps, that on top of what it gives."""
        response = lacking(None)
        for _ in range(steps):
            given = self.predict(response)
            response = given + lacking(given)
        return response

    def fit(self, response: Tensor) -> tuple[Tensor, Tensor]:
        """D and e, as `solve`, for a response (k, c)."""
        return self.fit_each(response, [self.strength])[0]

    def fit_each(self, response: Tensor, strengths: Iterable[float]) -> list[tuple[Tensor, Tensor]]:
        """The same for several strengths; what it shares with the rows is multiplied once."""
        right, shift = self.project(response)
        changes = [self.with_strength(strength).change(right) for strength in strengths]
        return [(change, shift - self.move(change) if self.intercept else shift) for change in changes]

    def move(self, change: Tensor) -> Tensor:
        """What a change gives of the mean of the inputs, (c,)."""
        return change @ self.mean

    def predict(self, response: Tensor) -> Tensor:
        """What the change gives that is fitted to a response, (k, c)."""
        right, shift = self.project(response)
        if self.few and self.weights is None and not self.rigid:  # by the products of rows, which are at hand
            return (self.inner @ self.solved(right)).to(self.x) + shift.to(self.x)
        return self.x @ self.change(right).T.to(self.x) + shift.to(self.x)

    def project(self, response: Tensor) -> tuple[Tensor, Tensor]:
        """What of a response the rows tell, (d, c) or, where they are few, (k, c), and its mean (c,); float64."""
        mean = self.average(response) if self.intercept else response.new_zeros(response.shape[1])
        wanted = self.root((response - mean).to(self.x))
        right = wanted.double() if self.few else multiply_rows(self.rooted, wanted) / len(self.x)
        return right, mean.double()

    def change(self, right: Tensor) -> Tensor:
        """D (c, d) for a projected response."""
        if self.rigid:
            return right.new_zeros(right.shape[1], len(self.mean))
        return self.solved(right).T @ self.rooted.double() if self.few else self.solved(right).T

    def solved(self, right: Tensor) -> Tensor:
        """(inner + lam I)^-1 right; the least solution where there are many."""
        if self.factor is None:
            self.factor, self.failed = torch.linalg.cholesky_ex(self.add_ridge())
        if self.failed:
            return torch.linalg.pinv(self.add_ridge(), hermitian=True) @ right
        return torch.cholesky_solve(right, self.factor)


def _centre(products: Tensor) -> Tensor:
    """Products of rows (k, k), of which the mean row is taken away."""
    mean = products.mean(1)
    return products - mean - mean[:, None] + mean.mean()
