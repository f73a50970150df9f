"""Where to cut: the sizes with the least predicted error under a budget."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from intrafusion.asked import check_count, least_size
from intrafusion.budget.cost import Cost, add_up, find_distinct
from intrafusion.graph import ChannelGroup, families_of, size_twins

_Piece = tuple[float, list[float], int]
_STEPS = 32  # pieces that a group is cut in until the budget is met; then single channels


def allocate(
    groups: Iterable[ChannelGroup],
    curves: Mapping[str, Tensor],
    cost: Cost | Sequence[Cost],
    budget: float | Sequence[float],
    *,
    weights: Sequence[float] = (1.0,),
    round_to: int | Mapping[str, int] | None = None,
    min_channels: int = 1,
) -> dict[str, int]:
    r"""Cut, again and again, where the least error is added for what is saved, until the budget is met.

        argmin over groups  (e_g(m - k) - e_g(m)) / (cost(m) - cost(m - k)),      in pieces of k channels

    Of several costs, each of which has a limit, what is saved is their weighted sum.

    Twins are cut together. Greedy, and for convex curves and a separable cost optimal up to one piece (Fox 1966).

    Args:
        groups: the groups that may be reduced.
        curves: e_g (n + 1,), predicted error of a group that keeps k channels, k = 0..n; not increasing.
        cost: of the network, as a function of sizes; or several.
        budget: upper limit of the cost, or of each; the last piece is cut in single channels (in `round_to`), to end
            close below.
        weights: of the costs, in one over their units.
        round_to: sizes are multiples of this, or the whole group; one number, or by group.
        min_channels: smallest size of a group (of the whole group where it has fewer); of whole blocks it is one.
    Returns:
        sizes; where even the smallest ones cost more than the budget, those.
    Raises:
        BudgetError: min_channels < 1.
    """
    check_count(min_channels, "min_channels")
    costs = [cost] if isinstance(cost, Cost) else list(cost)
    budgets = [float(budget)] if isinstance(budget, (int, float)) else list(budget)
    step_of = lambda name: round_to[name] if isinstance(round_to, Mapping) else round_to  # noqa: E731
    distinct = find_distinct(costs)
    units = [
        _Unit(twins, curves, costs, distinct, weights, step_of(twins[0].name), min_channels)
        for twins in families_of(groups)
    ]
    sizes = {g.name: g.size for unit in units for g in unit.groups}
    spent = add_up(costs, sizes)
    _cut_(units, sizes, spent, budgets, coarse=True)
    _cut_(units, sizes, spent, budgets, coarse=False)
    return sizes


class _Unit:
    """Groups that are cut together."""

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        curves: Mapping[str, Tensor],
        costs: Sequence[Cost],
        distinct: Mapping[int, tuple[Cost, int]],
        weights: Sequence[float],
        round_to: int | None,
        min_channels: int,
    ) -> None:
        self.groups, self.weights = groups, weights
        self.names = [g.name for g in groups]
        self.touched = {key: place for key, place in distinct.items() if place[0].is_touched(place[1], self.names)}
        self.parts = [[id(part) for part in cost.parts if id(part) in self.touched] for cost in costs]
        self.size = groups[0].size // groups[0].multiple  # of a group whose multiple is 1
        self.curve = torch.stack([curves[g.name].double().cpu()[:: g.multiple] for g in groups]).sum(0)
        self.round_to = round_to or 1
        self.least = min(self.size, least_size(min_channels, round_to)) if groups[0].is_channel else 1
        self.version = 0

    def smaller(self, m: int, coarse: bool) -> int | None:
        """The next size below m; None at the smallest."""
        step = max(1, self.size // _STEPS) if coarse else 1
        step = -(-step // self.round_to) * self.round_to
        following = (m - 1) // self.round_to * self.round_to if m % self.round_to else m - step
        following = max(following, self.least)
        return following if following < m else None

    def piece(self, sizes: Mapping[str, int], coarse: bool) -> _Piece | None:
        """(error per cost, what is saved of each cost, new size) of the next cut."""
        m = sizes[self.names[0]] // self.groups[0].multiple
        following = self.smaller(m, coarse)
        if following is None:
            return None
        after = {**sizes, **size_twins(self.groups, following)}
        less = {key: cost.part(i, sizes) - cost.part(i, after) for key, (cost, i) in self.touched.items()}
        saved = [sum(less[key] for key in parts) for parts in self.parts]
        worth = sum(weight * part for weight, part in zip(self.weights, saved, strict=True))
        added = float(self.curve[following] - self.curve[m])
        return (max(added, 0.0) + 1e-12) / max(worth, 1e-12), saved, following


def _cut_(
    units: list[_Unit], sizes: dict[str, int], spent: list[float], budgets: Sequence[float], *, coarse: bool
) -> None:
    """Cut until the budgets are met; with `coarse`, stop before the piece that would meet them (sizes, spent)."""
    heap: list[tuple[float, int, int, list[float], int]] = []

    def push(index: int) -> None:
        units[index].version += 1
        piece = units[index].piece(sizes, coarse)
        if piece is not None:
            heapq.heappush(heap, (piece[0], index, units[index].version, piece[1], piece[2]))

    sharing = _neighbours(units)
    for index in range(len(units)):
        push(index)
    while any(part > most for part, most in zip(spent, budgets, strict=True)) and heap:
        _, index, version, saved, m = heapq.heappop(heap)
        if version != units[index].version:
            continue
        left = [part - less for part, less in zip(spent, saved, strict=True)]
        if coarse and all(part < most for part, most in zip(left, budgets, strict=True)):
            break  # too large a piece: the rest is left to single channels
        spent[:] = left
        sizes.update(size_twins(units[index].groups, m))
        for other in sharing[index]:
            push(other)


def _neighbours(units: Sequence[_Unit]) -> list[set[int]]:
    """For each unit those, itself included, whose savings depend on its size."""
    users: dict[int, set[int]] = {}
    for index, unit in enumerate(units):
        for part in unit.touched:
            users.setdefault(part, set()).add(index)
    return [{index}.union(*(users[part] for part in unit.touched)) for index, unit in enumerate(units)]
