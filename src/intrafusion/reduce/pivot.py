"""Selection by greedy pivoting on what the channels have in common, and the least-squares unmerge that goes with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import BudgetError, RecipeError
from intrafusion.network.gram import find_scale
from intrafusion.reduce.principal import principal_map
from intrafusion.reduce.problem import Moments, ReductionMap, ReductionProblem
from intrafusion.reduce.rotation import rotation_map
from intrafusion.reduce.select import Select, selection_map

BLOCK = 32  # picks after which the matrices are brought up to date
_KNOWN = 1e-5  # a channel with less than this fraction of its variance left is known already; float32 is off by less


@checked
@dataclass(frozen=True)
class Pivot:
    """Keep the channels from which the others can best be told, and let the consumers read the others off them.

    Where nothing but linear maps lies between the channels and what reads them (queries and keys, values and the layer
    behind it, linear bottlenecks), the best directions are kept instead, see `principal_map`. So they are of streams
    that norms see, as far as a rotation reaches, see `rotation_map`.

    Works on what the consumers read of the channels (`ReductionProblem.moments`) and ignores importance. Groups for
    which that is unknown, such as those that only grouped convolutions read, are selected by importance.

    Attributes:
        strength: of the ridge of the unmerge, as a fraction of the channels' mean variance.
        unmerge: mix the consumers' columns; False only selects.
        rotate: keep directions of streams; False selects channels of them.
    """

    strength: float = 1e-3
    unmerge: bool = True
    rotate: bool = True

    needs_moments = True  # of the class, not a hyper-parameter

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise RecipeError(f"strength: expected a number >= 0, got {self.strength!r}.")

    @property
    def mixes(self) -> bool:
        return self.unmerge

    @property
    def rotates(self) -> bool:
        return self.unmerge and self.rotate

    def selecting(self) -> Pivot:
        return replace(self, unmerge=False)

    @checked
    def __call__(self, problem: ReductionProblem) -> ReductionMap:
        moments = problem.moments
        if moments is None or problem.size == len(problem.importance):
            return Select()(problem)
        if problem.rotation is not None and self.rotates and moments.bare is not None:
            return rotation_map(moments.bare, problem.size, centred=problem.rotation.centred)
        if problem.linear and self.unmerge:
            return principal_map(moments, problem.size)
        kept = pick_channels(moments, problem.size).order[: problem.size].sort().values
        mean, covariance = moments.overall
        if self.unmerge:
            return least_squares_map(mean, covariance, kept, self.strength)
        reduction = selection_map(kept.to(mean.device), len(mean))
        return replace(reduction, shift=mean - reduction.unmerge @ mean[kept])


@dataclass(frozen=True, eq=False)
class Pivots:
    """Channels in the order in which they were picked, and what is still missing after each.

    order (m,): indices of channels; missing (m + 1,): share of the consumers' signal, in [0, 1], that the first k
    channels cannot tell, for k = 0..m.
    """

    order: Tensor
    missing: Tensor

    __repr__ = show_briefly


_PICKED: WeakKeyDictionary[Moments, Pivots] = WeakKeyDictionary()


def pick_channels(moments: Moments, m: int | None = None) -> Pivots:
    """The first m channels (all of them by default), or more, in the order of picking; kept with the object."""
    m = len(moments.reader) if m is None else m
    if moments not in _PICKED or len(_PICKED[moments].order) < m:
        scaled = moments.scaled()
        _PICKED[moments] = pivot_order(scaled.covariances.float(), scaled.reader.float(), scaled.shares.float(), m)
    return _PICKED[moments]


def pivot_order(covariances: Tensor, reader: Tensor, shares: Tensor, m: int) -> Pivots:
    r"""Pick the m channels from which the consumers' signal can best be told, one after another.

    With C the covariance of the channels and Q = sum of W_c^T W_c over the consumers, the next channel is

        argmax_j  (C Q C)_jj / C_jj,     and then  C <- C - C_:j C_j: / C_jj

    which is the greedy choice for min tr(Q Cov(h | h_S)). Channels that are read at several points have one C for each,
    and the gains are summed. With R = C Q C, a pick j with u = C_:j / sqrt(C_jj) and
    v = R_:j / sqrt(C_jj) - R_jj / (2 C_jj) u turns

        C  into  C - u u^T    and    R  into  R - u v^T - v u^T.

    Their diagonals follow every pick; the matrices follow `BLOCK` picks at once, and a column needed in between is made
    up for those of its block. O(p n^2 m), in the precision of what is given.

    Args:
        covariances: C (p, n, n), each positive semi-definite.
        reader: Q (n, n).
        shares: weight of the gains at each point (p,); one over tr(Q C), for what is missing to be a share.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: pivoted Cholesky (Higham 1990), with the weights Q; its use for channels is OURS.
    """
    # What a pick explains it takes out of C, as Gram and Schmidt do: C is then the covariance of what is left of every
    # channel once the picked ones are known. Q weighs a channel by how strongly the consumers read it.
    n = len(reader)
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    c = covariances.clone()
    r = c @ reader @ c
    variances, gains = (matrix.diagonal(dim1=1, dim2=2).clone() for matrix in (c, r))
    # The diagonals alone decide a pick, O(p n) each; a channel whose variance is used up would divide noise by noise.
    known = (_KNOWN * variances).clamp(min=torch.finfo(c.dtype).tiny)
    order, missing, taken = [], [1.0], torch.zeros_like(reader[0], dtype=torch.bool)
    us, vs = c.new_zeros(2, len(c), BLOCK, n)
    for index in range(m):
        # tr(Q C) falls by R_jj / C_jj when j is known; rounding may leave a gain below zero, where there is none.
        gain = shares @ torch.where(variances > known, gains.clamp(min=0) / torch.maximum(variances, known), 0.0)
        best = int(gain.masked_fill_(taken, -1.0).argmax())
        taken[best] = True
        missing.append(max(0.0, missing[-1] - float(gain[best])))
        order.append(best)
        # Column `best` of C and R as they are now: the matrices as of the last whole block, less the picks since then.
        at = index % BLOCK
        u, v, variance, least = us[:, :at], vs[:, :at], variances[:, best, None], known[:, best, None]
        scale = torch.where(variance > least, torch.maximum(variance, least).rsqrt(), 0.0)  # 0: nothing is learnt
        u_best, v_best = u[:, None, :, best], v[:, None, :, best]
        column = scale * (c[:, best] - (u_best @ u)[:, 0])
        half = scale * (r[:, best] - (v_best @ u + u_best @ v)[:, 0]) - gains[:, best, None] / 2 * scale**2 * column
        us[:, at], vs[:, at] = column, half
        # The rank-one terms of the docstring, on the diagonal: (u u^T)_ii = u_i^2, (u v^T + v u^T)_ii = 2 u_i v_i.
        variances -= column.square()
        gains -= 2 * column * half
        if at + 1 == BLOCK:  # 32 rank-one updates as one matrix product: memory is passed over once instead of 32 times
            c.baddbmm_(us.mT, us, alpha=-1)
            r.baddbmm_(torch.cat([us, vs], dim=1).mT, torch.cat([vs, us], dim=1), alpha=-1)
    return Pivots(torch.tensor(order), torch.tensor(missing, dtype=torch.float64))


def least_squares_map(mean: Tensor, covariance: Tensor, kept: Tensor, strength: float = 1e-3) -> ReductionMap:
    r"""Keep some channels and tell the others from them.

    M = S, the kept rows of the identity;  U = C_:S (C_SS + lam I)^-1,  s = mu - U mu_S,  lam = strength * mean C_jj

    Args:
        mean: mu (n,) of what the consumers read.
        covariance: C (n, n) of it.
        kept: (m,) channels.
    Returns:
        the map, float64, with the shift s: without it the consumers' sum misses W_c s.
    """
    mean, covariance = mean.double(), covariance.double() / find_scale(covariance)  # the map knows no unit
    inner = covariance[kept][:, kept]
    inner = inner + (strength * inner.diagonal().mean()).clamp(min=1e-30) * torch.eye(len(kept)).to(inner)
    unmerge = torch.linalg.solve(inner, covariance[kept]).T.contiguous()
    merge = torch.eye(len(mean)).to(covariance)[kept]
    return ReductionMap(merge, unmerge, mean - unmerge @ mean[kept])
