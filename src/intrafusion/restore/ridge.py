"""Ridge regression from chunks of rows, towards zero change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor


def ridge(
    chunks: Iterable[tuple[Tensor, Tensor]], strength: float, *, scarcity: float = 0.0, intercept: bool = True
) -> tuple[Tensor, Tensor]:
    r"""The smallest change of a linear map that makes up for what its output lacks, from k rows of d inputs.

        min_{D, e}  mean_r || R_r - D x_r - e ||^2 + lam ||D||^2,   lam = (strength + scarcity d / k) mean diag Cov x

    The solution is D = Cov(R, x) (Cov(x, x) + lam I)^-1 and e = mean R - D mean x; without an intercept e = 0 and the
    covariances are second moments.

    Args:
        chunks: rows (inputs (k, d), residuals (k, c)), chunk by chunk.
        strength: part of lam that stays however many rows there are, >= 0.
        scarcity: part of lam that grows as rows get scarce, >= 0.
    Returns:
        D (c, d) and e (c,), float64; zero where all inputs are constant.
    """
    chunks = iter(chunks)
    head, total = [], 0
    for x, r in chunks:
        head.append((x.double(), r.double()))
        total += len(x)
        if total > x.shape[1]:
            return with_many_rows(itertools.chain(head, chunks), strength, scarcity, intercept)
    if not total:
        raise ValueError("ridge: expected at least one row, got none.")
    x, r = (torch.cat(parts) for parts in zip(*head, strict=True))
    return with_few_rows(x, r, strength, scarcity, intercept)


def with_many_rows(
    chunks: Iterable[tuple[Tensor, Tensor]], strength: float, scarcity: float, intercept: bool
) -> tuple[Tensor, Tensor]:
    """The solution by d x d covariances, summed chunk by chunk."""
    total, (xx, xr, mean_x, mean_r) = moments(chunks)
    if intercept:
        xx, xr = xx - torch.outer(mean_x, mean_x), xr - torch.outer(mean_x, mean_r)
    diagonal = xx.diagonal()
    diagonal += ((strength + scarcity * len(xx) / total) * diagonal.mean()).clamp(min=1e-30)
    change = solve(xx, xr).T
    return change, mean_r - change @ mean_x if intercept else torch.zeros_like(mean_r)


def with_few_rows(x: Tensor, r: Tensor, strength: float, scarcity: float, intercept: bool) -> tuple[Tensor, Tensor]:
    """The same solution by the k x k inner products of the rows, D = R^T (X X^T + k lam I)^-1 X."""
    k, d = x.shape
    mean_x, mean_r = (x.mean(0), r.mean(0)) if intercept else (x.new_zeros(d), r.new_zeros(r.shape[1]))
    x, r = x - mean_x, r - mean_r
    inner = x @ x.T
    inner.diagonal().add_(((strength + scarcity * d / k) * x.square().mean() * k).clamp(min=1e-30))
    change = solve(inner, r).T @ x
    return change, mean_r - change @ mean_x


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right for a symmetric matrix >= 0; the least solution where there are many."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.linalg.pinv(matrix, hermitian=True) @ right if failed else torch.cholesky_solve(right, factor)


def moments(chunks: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, list[Tensor]]:
    """Number of rows, and the means over them of x x^T (d, d), x r^T (d, c), x and r, float64."""
    total, sums = 0, []
    for x, r in chunks:
        x, r = x.double(), r.double()
        part = [x.T @ x, x.T @ r, x.sum(0), r.sum(0)]
        sums = [s.add_(p) for s, p in zip(sums, part, strict=True)] if sums else part
        total += len(x)
    return total, [s / total for s in sums]
