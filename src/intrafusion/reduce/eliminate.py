"""Which units can be spared where the layer that reads them is solved anew without them: heads, or single channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.network.gram import find_scale
from intrafusion.reduce.problem import Moments

_STRENGTH = 1e-3  # of the ridge, as a fraction of the channels' mean variance


@dataclass(frozen=True, eq=False)
class Elimination:
    """Units in the order in which they were eliminated, and what is lost.

    order (n,): indices of units, the one that is missed least first; losses (n + 1,): share of the readers' signal that
    is lost when k units are kept, for k = 0..n, not increasing.
    """

    order: Tensor
    losses: Tensor

    __repr__ = show_briefly

    def kept(self, m: int) -> Tensor:
        """The m units that go last, ascending."""
        return self.order[len(self.order) - m :].sort().values


def eliminate(moments: Moments, size: int) -> Elimination:
    r"""Eliminate n units of `size` channels each, one after another, from a reader that is solved anew each time.

    With C the covariance of the channels and a ridge, P its inverse, and Q = W^T W of the reader W, remove the unit G
    with the least

        tr W_G [P_GG]^-1 W_G^T = tr Q_GG [P_GG]^-1,    and then, with T = [P_GG]^-1 P_G:,

        W <- W - W_G T,    P <- P - P_:G T.

    The running sum of these is what the error of the solved reader rises by. O((n size)^3), float64.

    Args:
        moments: of n * size channels, unit by unit.
    Reference: Hassibi and Stork 1993, for blocks of columns at once.
    """
    covariance, reader = moments.overall[1].double(), moments.reader.double()
    covariance, q = covariance / find_scale(covariance), reader / find_scale(reader)
    total = float((covariance * q).sum())
    ridge = max(float(covariance.diagonal().mean()) * _STRENGTH, torch.finfo(torch.float64).tiny)
    p = torch.linalg.inv(covariance + ridge * torch.eye(len(q), dtype=q.dtype, device=q.device))
    units = torch.arange(len(q), device=q.device).reshape(-1, size)
    left, order, lost = list(range(len(units))), list[int](), [0.0]
    while left:
        inside = units[left]
        own = torch.linalg.inv(p[inside[:, :, None], inside[:, None, :]])
        scores = (q[inside[:, :, None], inside[:, None, :]] * own).sum((1, 2))
        best = int(scores.argmin())
        group = units[left.pop(best)]
        order.append(int(group[0]) // size)
        lost.append(lost[-1] + max(float(scores[best]), 0.0))
        told = own[best] @ p[group]
        read = q[:, group] @ told
        q = q - read - read.T + told.T @ q[group][:, group] @ told
        p = p - p[:, group] @ told
    losses = torch.tensor(lost[::-1], dtype=torch.float64) / max(total, 1e-300)
    return Elimination(torch.tensor(order), losses)
