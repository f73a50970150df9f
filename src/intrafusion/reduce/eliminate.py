"""Elimination: units go one after another from readers that are solved anew without them; heads, or single channels."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from intrafusion.arguments import checked
from intrafusion.brief import show_briefly
from intrafusion.errors import RecipeError
from intrafusion.network.gram import find_scale
from intrafusion.reduce.problem import Moments, ReductionMap
from intrafusion.reduce.select import selection_map
from intrafusion.reduce.sweep import sweep
from intrafusion.reduce.telling import Telling, least_squares_map

_STRENGTH = 1e-3  # of the ridge, as a fraction of the channels' mean variance
_WEAKEST = 1e-9  # covariances of channels that others tell could not be inverted in float64
_LEAST = 1e-30  # ridge of channels that never vary


@checked
@dataclass(frozen=True)
class Eliminate(Telling):
    """Let those channels go, one after another, that the consumers miss least, solved anew each time; see `Telling`.

    Where pivots are picked, from none to m, channels are eliminated here, from all n to m.
    """

    def __post_init__(self) -> None:
        if not self.strength >= _WEAKEST:
            raise RecipeError(f"strength: expected a number >= {_WEAKEST:g}, got {self.strength!r}.")

    def choose(self, moments: Moments, m: int) -> Tensor:
        return eliminate(moments, strength=self.strength).kept(m)

    def list_choice_losses(self, moments: Moments) -> Tensor:
        return eliminate(moments, strength=self.strength).losses

    def tell(self, moments: Moments, kept: Tensor) -> ReductionMap:
        mean, covariance = moments.overall
        ridged = _add_ridge(covariance.double() / find_scale(covariance), self.strength)
        return least_squares_map(mean, ridged, kept, 0.0)


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


_DONE: WeakKeyDictionary[Moments, dict[tuple[int, float], Elimination]] = WeakKeyDictionary()


def eliminate(moments: Moments, size: int = 1, *, strength: float = _STRENGTH) -> Elimination:
    r"""Eliminate n units of `size` channels each, one after another, from readers that are solved anew each time.

    With C the covariance of the channels and a ridge, P its inverse, and Q = sum of W^T W over the readers W, remove
    the unit G with the least

        tr W_G [P_GG]^-1 W_G^T = tr Q_GG [P_GG]^-1,    and then, with T = [P_GG]^-1 P_G:,

        W <- W - W_G T,    P <- P - P_:G T.

    Units that are read at several points have one C for each, and the scores are summed, each point weighing the same.
    The running sum is what the error of the solved readers, ridge included, rises by:

        min_W  tr (W - W_0) C (W - W_0)^T    over the W that read the kept units only.

    O(p (n size)^3), float64; kept with the object.

    Args:
        moments: of n * size channels, unit by unit.
        strength: of the ridge, as a fraction of the channels' mean variance.
    Reference: Hassibi and Stork 1993; for blocks of columns, several readers and a whole layer's rows at once, OURS.
    """
    done = _DONE.setdefault(moments, {})
    if (size, strength) not in done:
        order, scores = _eliminate(moments, size, strength)
        lost = torch.cat([scores.new_zeros(1), scores.clamp(min=0).cumsum(0)])
        done[size, strength] = Elimination(order, lost.flip(0))
    return done[size, strength]


def unit_map(moments: Moments, units: int, m: int) -> ReductionMap:
    """The selection of those m of n units, such as heads, that go last.

    Args:
        moments: of all channels, unit by unit.
    """
    return selection_map(eliminate(moments, len(moments.reader) // units).kept(m), units)


def _eliminate(moments: Moments, size: int, strength: float) -> tuple[Tensor, Tensor]:
    covariances, reader, shares = moments.take_scaled(torch.float64)
    p = torch.linalg.inv(_add_ridge(covariances, strength))
    q = reader.expand_as(p).clone()
    if size > 1:
        return _eliminate_blocks(p, q, shares, size)
    return sweep(p, q, shares, len(moments.reader), floor=0.0, least=True)


def _add_ridge(covariances: Tensor, strength: float) -> Tensor:
    variances = covariances.diagonal(dim1=-2, dim2=-1)
    ridge = (strength * variances.mean(-1, keepdim=True)).clamp(min=_LEAST)
    return covariances + torch.diag_embed(ridge.expand_as(variances))


def _eliminate_blocks(p: Tensor, q: Tensor, shares: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Order (n,) and scores (n,) of units of several channels."""
    units = torch.arange(p.shape[1], device=p.device).reshape(-1, size)
    left, order, found = list(range(len(units))), list[int](), list[float]()
    while left:
        inside = units[left]
        rows, columns = inside[:, :, None], inside[:, None, :]
        own = torch.linalg.inv(p[:, rows, columns])
        scores = shares @ (q[:, rows, columns] * own).sum((2, 3))
        best = int(scores.argmin())
        order.append(left.pop(best))
        found.append(float(scores[best]))
        group = units[order[-1]]
        told = own[:, best] @ p[:, group]
        read = q[:, :, group] @ told
        q = q - read - read.mT + told.mT @ q[:, group][:, :, group] @ told
        p = p - p[:, :, group] @ told
    return torch.tensor(order), torch.tensor(found, dtype=torch.float64)
