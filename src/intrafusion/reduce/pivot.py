"""Selection by greedy pivoting on what the channels have in common, and the least-squares unmerge that goes with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.errors import BudgetError
from intrafusion.reduce.problem import ReductionMap


@dataclass(frozen=True, eq=False)
class Pivots:
    """Channels in the order in which they were picked, and what is still missing after each.

    order (m,): indices of channels; missing (m + 1,): share of the consumers' signal, in [0, 1], that the first k
    channels cannot tell, for k = 0..m.
    """

    order: Tensor
    missing: Tensor


def pivots(covariances: Sequence[Tensor], readers: Sequence[Tensor], m: int) -> Pivots:
    r"""Pick the m channels from which the consumers' signal can best be told, one after another.

    With C the covariance of the channels and Q = sum of W_c^T W_c over the consumers, the next channel is

        argmax_j  (C Q C)_jj / C_jj,     and then  C <- C - C_:j C_j: / C_jj

    which is the greedy choice for min tr(Q Cov(h | h_S)). Channels that are read at several points have one covariance
    and one Q for each; the gains are summed, each point weighing the same.

    Args:
        covariances: (n, n) each, positive semi-definite.
        readers: (n, n) each, one per covariance.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: pivoted Cholesky (Higham 1990), with the weights Q; its use for channels is OURS.
    """
    n = len(covariances[0])
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    shares = [1 / (c * q).sum().clamp(min=1e-300) / len(covariances) for c, q in zip(covariances, readers, strict=True)]
    left = [c.double().clone() for c in covariances]
    least = [1e-10 * c.diagonal().max().clamp(min=1e-300) for c in left]
    order: list[int] = []
    missing = [1.0]
    for _ in range(m):
        points = zip(shares, left, readers, least, strict=True)
        gains = torch.stack([s * gain(c, q, e) for s, c, q, e in points]).sum(0)
        gains[order] = -1.0
        best = int(gains.argmax())
        missing.append(max(0.0, missing[-1] - float(gains[best])))
        left = [without(c, best, e) for c, e in zip(left, least, strict=True)]
        order.append(best)
    return Pivots(torch.tensor(order), torch.tensor(missing, dtype=torch.float64))


def gain(covariance: Tensor, reader: Tensor, least: Tensor) -> Tensor:
    """How much less is missing once a channel is known, for each; 0 for what is known already."""
    variance = covariance.diagonal()
    explained = (covariance * (reader @ covariance)).sum(0)
    return torch.where(variance > least, explained / variance.clamp(min=least), 0.0)


def without(covariance: Tensor, index: int, least: Tensor) -> Tensor:
    """The covariance given one channel."""
    column = covariance[:, index]
    return covariance - torch.outer(column, column) / column[index] if column[index] > least else covariance


def least_squares_map(
    mean: Tensor, covariance: Tensor, kept: Tensor, strength: float = 1e-3
) -> tuple[ReductionMap, Tensor]:
    r"""Keep some channels and tell the others from them.

    M = S, the kept rows of the identity;  U = C_:S (C_SS + lam I)^-1,  s = mu - U mu_S,  lam = strength * mean C_jj

    Args:
        mean: mu (n,) of what the consumers read.
        covariance: C (n, n) of it.
        kept: (m,) channels.
    Returns:
        the map, float64, and the shift (n,): the consumers' sum misses W_c s.
    """
    mean, covariance = mean.double(), covariance.double()
    inner = covariance[kept][:, kept]
    inner = inner + (strength * inner.diagonal().mean()).clamp(min=1e-30) * torch.eye(len(kept)).to(inner)
    unmerge = torch.linalg.solve(inner, covariance[kept]).T
    merge = torch.eye(len(mean)).to(covariance)[kept]
    return ReductionMap(merge, unmerge.contiguous()), mean - unmerge @ mean[kept]
