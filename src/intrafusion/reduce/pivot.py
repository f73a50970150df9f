"""Selection by greedy pivoting on what the channels have in common."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import BudgetError
from intrafusion.network.gram import multiply_between
from intrafusion.reduce.problem import Moments
from intrafusion.reduce.sweep import sweep
from intrafusion.reduce.telling import Telling

_KNOWN = 1e-5  # a channel with less than this fraction of its variance left is known already; float32 is off by less


@checked
@dataclass(frozen=True)
class Pivot(Telling):
    """Keep the channels from which the others can best be told, the most telling first; see `Telling`."""

    def choose(self, moments: Moments, m: int) -> Tensor:
        return pick_channels(moments, m).order[:m].sort().values

    def list_choice_losses(self, moments: Moments) -> Tensor:
        return pick_channels(moments).missing


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
    m = moments.means.shape[1] if m is None else m
    if moments not in _PICKED or len(_PICKED[moments].order) < m:
        _PICKED[moments] = _pick_(*moments.take_readings(torch.float32), m)
    return _PICKED[moments]


def pivot_order(covariances: Tensor, reader: Tensor, shares: Tensor, m: int) -> Pivots:
    r"""Pick the m channels from which the consumers' signal can best be told, one after another.

    With C the covariance of the channels and Q = sum of W_c^T W_c over the consumers, the next channel is

        argmax_j  (C Q C)_jj / C_jj,     and then  C <- C - C_:j C_j: / C_jj

    which is the greedy choice for min tr(Q Cov(h | h_S)). Channels that are read at several points have one C for each,
    and the gains are summed. O(p n^2 m), see `sweep`, in the precision of what is given.

    Args:
        covariances: C (p, n, n), each positive semi-definite.
        reader: Q (n, n).
        shares: weight of the gains at each point (p,); one over tr(Q C), for what is missing to be a share.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: pivoted Cholesky (Higham 1990), with the weights Q; its use for channels is OURS.
    """
    n = len(reader)
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    return _pick_(covariances.clone(), multiply_between(covariances, reader), shares, m)


def _pick_(c: Tensor, readings: Tensor, shares: Tensor, m: int) -> Pivots:
    """The same with C Q C, in place."""
    # What a pick explains it takes out of C, as Gram and Schmidt do: C is then the covariance of what is left of every
    # channel once the picked ones are known. Q weighs a channel by how strongly the consumers read it.
    order, gains = sweep(c, readings, shares, m, floor=_KNOWN)
    missing = [1.0]
    for gain in gains.tolist():  # tr(Q C) falls by R_jj / C_jj when j is known
        missing.append(max(0.0, missing[-1] - gain))
    return Pivots(order, torch.tensor(missing, dtype=torch.float64))
