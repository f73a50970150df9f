"""Channels that can go without any loss: exact copies of others, and dead ones. They go before any reducer is asked.

Two channels of a group are copies where everything that makes them is equal bit by bit: rows of all producers, biases,
kernels, per-channel parameters and statistics of norms. A reader that is given one of them reads the sum of their
columns. A channel is dead where nothing reads it, or where it is zero wherever it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.graph import READS, ChannelGraph, ChannelGroup, Member, Role
from intrafusion.importance.features import channel_biases, channel_rows
from intrafusion.network.inputs import Inputs
from intrafusion.reduce.problem import Moments, Reducer, ReductionMap, ReductionProblem
from intrafusion.reduce.select import pick_rows, selection_map
from intrafusion.surgery.proof import FunctionCheck, Reference

_DEAD = -1
_MAKES = (Role.PRODUCES, Role.SHIFTS, Role.MEAN)


@dataclass(frozen=True, eq=False)
class Classes:
    """The different channels of a group: n channels in k classes of copies, dead ones in none.

    first: (k,) the first channel of each class, ascending; owner: (n,) the first channel of the class that each channel
    is in, `_DEAD` for a dead one.
    """

    first: Tensor
    owner: Tensor

    __repr__ = show_briefly

    @property
    def spare(self) -> bool:
        """Whether there are fewer classes than channels."""
        return len(self.first) < len(self.owner)

    @cached_property
    def index(self) -> Tensor:
        """Which class each channel is in (n,); k for a dead one."""
        return torch.where(self.owner == _DEAD, len(self.first), torch.searchsorted(self.first, self.owner))

    def sum_up(self, x: Tensor, dim: int = 0) -> Tensor:
        """Of what each channel has along a dimension, the sum over each class."""
        total = x.new_zeros(*x.shape[:dim], len(self.first) + 1, *x.shape[dim + 1 :])
        return total.index_add_(dim, self.index.to(x.device), x).narrow(dim, 0, len(self.first))

    def spread(self, x: Tensor) -> Tensor:
        """What each class has (k, ...), given to all its channels (n, ...); zero to dead ones."""
        return torch.cat([x, x.new_zeros(1, *x.shape[1:])])[self.index.to(x.device)]


def find_classes(
    group: ChannelGroup, weights: Mapping[str, Tensor], dead: Tensor | None = None, *, copies: bool = True
) -> Classes:
    """Which channels of a group are copies of each other.

    Args:
        weights: tensors by name, norms folded.
        dead: (n,) whether a channel is dead; none by default.
        copies: whether copies make one class; else each is its own.
    """
    owner = _find_first_equal(group, weights) if copies else torch.arange(group.size)
    alive = torch.ones(group.size, dtype=torch.bool) if dead is None else ~dead
    return Classes(owner[alive].unique(), torch.where(alive, owner, _DEAD))


def _find_first_equal(group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """(n,) the first channel that is made like each channel; itself where nothing is known to make them."""
    making = [m for m in group.members if m.roles - READS]
    if not any(Role.PRODUCES in m.roles for m in making):
        return torch.arange(group.size)
    digests = [hashlib.blake2b(digest_size=16) for _ in range(group.size)]
    for member in making:
        rows = (channel_rows(weights, member) + 0.0).cpu().numpy()  # -0.0 becomes 0.0
        for digest, row in zip(digests, rows, strict=True):
            digest.update(np.ascontiguousarray(row).tobytes())
    first: dict[bytes, int] = {}
    return torch.tensor([first.setdefault(d.digest(), c) for c, d in enumerate(digests)])


def find_dead(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    weights: Mapping[str, Tensor],
    inputs: Inputs | None,
) -> dict[str, Tensor]:
    """Dead channels of these groups, (n,) booleans by group name; groups without any are absent.

    Where something looks at all channels together, even zeros count: there, none is dead. What channels are that
    nothing goes into depends on what becomes of zero; whether the output notices them is tried, in float64, on the
    inputs; without inputs, they count as alive.

    Args:
        weights: tensors by name, norms folded.
    """
    groups = [g for g in groups if g.together is None]
    unread = {g.name: _find_unread(graph, g, weights) for g in groups}
    empty = {g.name: _find_empty(graph, g, weights) & ~unread[g.name] for g in groups}
    tried = {name: mask for name, mask in empty.items() if mask.any() and inputs is not None}
    if tried and inputs is not None:
        check = FunctionCheck(Reference(model, graph, inputs))
        if not _is_unnoticed(check, tried):
            tried = {name: mask for name, mask in tried.items() if _is_unnoticed(check, {name: mask})}
    none = torch.zeros(1, dtype=torch.bool)
    found = {name: mask | tried.get(name, none) for name, mask in unread.items()}
    return {name: mask for name, mask in found.items() if mask.any()}


def _find_unread(graph: ChannelGraph, group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """Channels of which every reader's column is zero; none where something else than weights sees them too."""
    readers = group.with_role(*READS)
    seen = group.unmixable is not None or any(m.tensor in graph.derived for m in readers)
    if seen or not readers:
        return torch.zeros(group.size, dtype=torch.bool)
    return torch.stack([_are_zero(channel_rows(weights, m)) for m in readers]).all(0)


def _find_empty(graph: ChannelGraph, group: ChannelGroup, weights: Mapping[str, Tensor]) -> Tensor:
    """Channels that nothing goes into: rows and biases are zero (of a weight with a length of its own, the length)."""
    directions = {w.direction for w in graph.weight_norms}
    making = [m for m in group.with_role(*_MAKES) if m.tensor not in directions]
    if not any(Role.PRODUCES in m.roles for m in making):
        return torch.zeros(group.size, dtype=torch.bool)
    return torch.stack([_are_zero(channel_rows(weights, m)) for m in making]).all(0)


def _are_zero(rows: Tensor) -> Tensor:
    return (rows == 0).all(1).cpu()


def _is_unnoticed(check: FunctionCheck, dead: Mapping[str, Tensor]) -> bool:
    """Whether the output is the same where nothing comes in from these channels."""
    return check.is_same_without(
        {name: selection_map(torch.nonzero(~mask).flatten(), len(mask)) for name, mask in dead.items()}
    )


# ---- before the reducer ---------------------------------------------------------------------------------------------


def reduce_distinct(
    reducer: Reducer,
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    whole: ReductionProblem,
    classes: Classes,
    rows: Sequence[tuple[Member, Tensor]],
) -> ReductionMap:
    """The map of a group of which only the different channels are put before the reducer.

    With C the membership of `classes` (`spread`), F their first channels, and the reducer's map M, U of the k classes,

        M <- M F,    U <- C U.

    If there are fewer classes than channels to keep, nothing is lost: each class keeps its first channel, and the most
    important of the others stay as they are.

    Args:
        rows: what the features of the problem were made of.
    """
    if not classes.spare:
        return reducer(whole)
    if len(classes.first) <= whole.size:
        return _fill(classes, whole)
    found = reducer(_restrict_to_classes(group, weights, whole, classes, rows))
    merge = found.merge.new_zeros(len(found.merge), group.size)
    merge[:, classes.first.to(merge.device)] = found.merge
    shift = None if found.shift is None else classes.spread(found.shift)
    return ReductionMap(merge, classes.spread(found.unmerge), shift)


def _restrict_to_classes(
    group: ChannelGroup,
    weights: Mapping[str, Tensor],
    whole: ReductionProblem,
    classes: Classes,
    rows: Sequence[tuple[Member, Tensor]],
) -> ReductionProblem:
    """The problem in which each class is one channel, read by the sum of its channels' columns."""
    first = classes.first.to(whole.features.device)
    features = [classes.sum_up(r) if m.roles & READS else r[first] for m, r in rows]
    moments = whole.moments
    if moments is not None:
        at, columns, squares = first.to(moments.means.device), moments.columns, moments.squares
        moments = Moments(
            moments.means[:, at],
            moments.covariances[:, at][:, :, at],
            None if squares is None else classes.sum_up(classes.sum_up(squares), 1),
            columns=None if columns is None else classes.sum_up(columns, 1),
        )
    scores = classes.sum_up(whole.importance)
    added = channel_biases(group, weights)
    return ReductionProblem(
        torch.cat(features, dim=1), scores, whole.size, whole.seed, added[first.to(added.device)], moments, whole.linear
    )


def _fill(classes: Classes, whole: ReductionProblem) -> ReductionMap:
    """Every class keeps its first channel, and others stay until the size is reached; exact."""
    n, first = len(whole.importance), classes.first
    others = whole.importance.cpu().clone()
    others[first] = float("inf")
    kept = others.argsort(descending=True, stable=True)[: whole.size].sort().values
    stays = torch.zeros(n, dtype=torch.bool)
    stays[kept] = True
    rows = pick_rows(kept, n)
    unmerge = classes.spread((first[:, None] == kept).double())
    unmerge[stays] = rows.T[stays]
    device = whole.importance.device
    return ReductionMap(rows.to(device), unmerge.to(device).contiguous())
