"""Ridge regression from chunks of rows, towards zero change."""

from __future__ import annotations

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
    total, (xx, xr, mean_x, mean_r) = moments(chunks)
    if intercept:
        xx, xr = xx - torch.outer(mean_x, mean_x), xr - torch.outer(mean_x, mean_r)
    diagonal = xx.diagonal()
    diagonal += ((strength + scarcity * len(xx) / total) * diagonal.mean()).clamp(min=1e-30)
    change = torch.linalg.solve(xx, xr).T
    shift = mean_r - change @ mean_x if intercept else torch.zeros_like(mean_r)
    return change, shift


def moments(chunks: Iterable[tuple[Tensor, Tensor]]) -> tuple[int, list[Tensor]]:
    """Number of rows, and the means over them of x x^T (d, d), x r^T (d, c), x and r, float64."""
    total, sums = 0, []
    for x, r in chunks:
        x, r = x.double(), r.double()
        part = [x.T @ x, x.T @ r, x.sum(0), r.sum(0)]
        sums = [s.add_(p) for s, p in zip(sums, part, strict=True)] if sums else part
        total += len(x)
    if not total:
        raise ValueError("ridge: expected at least one row, got none.")
    return total, [s / total for s in sums]
