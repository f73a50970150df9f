"""Plain pruning: keep the most important channels and drop the others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.arguments import Count, Indices, Vector, checked
from intrafusion.errors import ArgumentError, BudgetError, show
from intrafusion.reduce.problem import ReductionMap, ReductionProblem


@dataclass(frozen=True)
class Select:
    """Keep the m most important channels as they are."""

    mixes = False  # of the class, not a hyper-parameter

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        return selection_map(most_important(problem.importance, problem.size), len(problem.importance))


@checked
def most_important(importance: Vector, m: int) -> Tensor:
    """Indices of the m largest scores, ascending; of equal scores the lower index is kept.

    >>> most_important(torch.tensor([0.1, 0.7, 0.7, 0.9]), 2).tolist()
    [1, 3]

    Raises:
        BudgetError: m is not in 1..n.
        ArgumentError: a score is NaN or infinite.
    """
    n = len(importance)
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    if not bool(torch.isfinite(importance).all()):
        raise ArgumentError("importance: expected finite scores, got NaN or infinity.")
    return torch.argsort(importance, descending=True, stable=True)[:m].sort().values


@checked
def selection_map(kept: Indices, n: Count) -> ReductionMap:
    """M = S, the kept rows (m,) of the n x n identity, and U = S^T."""
    if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < n:
        raise ArgumentError(f"kept: expected indices of {n} channels, got {show(kept.tolist())}.")
    rows = pick_rows(kept, n)
    return ReductionMap(merge=rows, unmerge=rows.T.contiguous())


def pick_rows(kept: Tensor, n: int) -> Tensor:
    """Rows (m, n) of the identity, float64."""
    rows = torch.zeros(len(kept), n, dtype=torch.float64, device=kept.device)
    return rows.scatter_(1, kept[:, None], 1.0)
