"""Where to cut: the sizes with the least predicted error under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from intrafusion.asked import check_count, least_size
from intrafusion.budget.cost import Cost
from intrafusion.graph import ChannelGroup, families_of, size_twins

_STEPS = 32  # pieces that a group is cut in until the budget is met; then single channels


def allocate(
    groups: Iterable[ChannelGroup],
    curves: Mapping[str, Tensor],
    cost: Cost,
    budget: float,
    *,
    round_to: int | None = None,
    min_channels: int = 1,
) -> dict[str, int]:
    r"""Cut, again and again, where the least error is added for what is saved, until the budget is met.

        argmin over groups  (e_g(m - k) - e_g(m)) / (cost(m) - cost(m - k)),      in pieces of k channels

    Twins are cut together. Greedy, and for convex curves and a separable cost optimal up to one piece (Fox 1966).

    Args:
        groups: the groups that may be reduced.
        curves: e_g (n + 1,), predicted error of a group that keeps k channels, k = 0..n; not increasing.
        cost: of the network, as a function of sizes.
        budget: upper limit of the cost; the last piece is cut in single channels (in `round_to`), to end close below.
        round_to: sizes are multiples of this, or the whole group.
        min_channels: smallest size of a group (of the whole group where it has fewer).
    Returns:
        sizes; where even the smallest ones cost more than the budget, those.
    Raises:
        BudgetError: min_channels < 1.
    """
    check_count(min_channels, "min_channels")
    units = [_Unit(twins, curves, cost, round_to, min_channels) for twins in families_of(groups)]
    sizes = {g.name: g.size for unit in units for g in unit.groups}
    spent = _cut_(units, sizes, cost(sizes), budget, coarse=True)
    if spent > budget:
        _cut_(units, sizes, spent, budget, coarse=False)
    return sizes


class _Unit:
    """Groups that are cut together."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        curves: Mapping[str, Tensor],
        cost: Cost,
        round_to: int | None,
        min_channels: int,
    ) -> None:
        self.groups, self.cost = groups, cost
        self.names = [g.name for g in groups]
        self.parts = cost.touched(self.names)
        self.size = groups[0].size // groups[0].multiple  # of a group whose multiple is 1
        self.curve = torch.stack([curves[g.name].double().cpu()[:: g.multiple] for g in groups]).sum(0)
        self.round_to = round_to or 1
        self.least = min(self.size, least_size(min_channels, round_to))
        self.version = 0

    def smaller(self, m: int, coarse: bool) -> int | None:
        """The next size below m; None at the smallest."""
        step = max(1, self.size // _STEPS) if coarse else 1
        step = -(-step // self.round_to) * self.round_to
        following = (m - 1) // self.round_to * self.round_to if m % self.round_to else m - step
        following = max(following, self.least)
        return following if following < m else None

    def piece(self, sizes: Mapping[str, int], coarse: bool) -> tuple[float, float, int] | None:
        """(error per cost, cost saved, new size) of the next cut."""
        m = sizes[self.names[0]] // self.groups[0].multiple
        following = self.smaller(m, coarse)
        if following is None:
            return None
        after = {**sizes, **size_twins(self.groups, following)}
        saved = sum(self.cost.part(i, sizes) - self.cost.part(i, after) for i in self.parts)
        added = float(self.curve[following] - self.curve[m])
        return (max(added, 0.0) + 1e-12) / max(saved, 1e-12), saved, following


def _cut_(units: list[_Unit], sizes: dict[str, int], spent: float, budget: float, *, coarse: bool) -> float:
    """Cut until the budget is met; with `coarse`, stop before the piece that would meet it (in place)."""
    heap: list[tuple[float, int, int, float, int]] = []

    def push(index: int) -> None:
        units[index].version += 1
        piece = units[index].piece(sizes, coarse)
        if piece is not None:
            heapq.heappush(heap, (piece[0], index, units[index].version, piece[1], piece[2]))

    sharing = _neighbours(units)
    for index in range(len(units)):
        push(index)
    while spent > budget and heap:
        _, index, version, saved, m = heapq.heappop(heap)
        if version != units[index].version:
            continue
        if coarse and spent - saved < budget:
            break  # too large a piece: the rest is left to single channels
        spent -= saved
        sizes.update(size_twins(units[index].groups, m))
        for other in sharing[index]:
            push(other)
    return spent


def _neighbours(units: Sequence[_Unit]) -> list[set[int]]:
    """For each unit those, itself included, whose savings depend on its size."""
    users: dict[int, set[int]] = {}
    for index, unit in enumerate(units):
        for part in unit.parts:
            users.setdefault(part, set()).add(index)
    return [{index}.union(*(users[p] for p in unit.parts)) for index, unit in enumerate(units)]
