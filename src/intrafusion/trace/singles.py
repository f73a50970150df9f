"""Why a channel is alone in its group, in words: a gate, channels that became one, or one that nothing else is like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.channels import ChannelTable
from intrafusion.trace.relations import Relations, UnionFind
from intrafusion.trace.uses import ROLE_BITS, Use


class Singles:
    """Explains groups of one channel; what that takes is only found where there are such groups."""

    def __init__(self, relations: Relations, table: ChannelTable) -> None:
        self.relations, self.table = relations, table

    def explain(self, channel: int, notes: Sequence[str]) -> str:
        """Why this channel has no company.

        Args:
            notes: what was seen to happen to it, the most telling last.
        """
        if channel in self._planes:
            return f"{self._planes[channel]} gives it along two dimensions at once, as heads and dimensions of each"
        if channel in self._gates:
            return f"one value for several channels at once: {self._gates[channel]}"
        whole, where = self._fusions.get(channel, (False, ""))
        if whole:
            return f"channels that can only move together, as one: {where}"
        told = notes[-1] if notes else f"its parts meet: {where}" if where else ""
        return "no other channel is treated like it" + (f" ({told})" if told else "")

    @cached_property
    def _gates(self) -> dict[int, str]:
        """Channels that several others meet, and where."""
        met = reversed(self.relations.gates)
        return {gate: m.where for m in met for gate in np.unique(self.relations.roots(m.gates)).tolist()}

    @cached_property
    def _planes(self) -> dict[int, str]:
        """Channels that a tensor produces along two of its dimensions, and which."""
        dims, found = defaultdict[tuple[str, int], set[int]](set), dict[int, str]()
        for use in self.table.uses:
            made = use.channels[(use.roles & ROLE_BITS[Role.PRODUCES]) > 0]
            for channel in made.tolist():
                dims[use.key[0], channel].add(use.key[1])
        for (tensor, channel), own in dims.items():
            if len(own) > 1:
                found.setdefault(channel, tensor)
        return found

    @cached_property
    def _fusions(self) -> dict[int, tuple[bool, str]]:
        """Channels of which one layer produces several rows: whether all, and what first made two of them one."""
        pairs = [_list_pairs(use) for use in reversed(self.table.uses)]
        channel, one, other, whole = np.concatenate([np.zeros((4, 0), np.int64), *pairs], axis=1)
        made = zip(whole.astype(bool).tolist(), _find_fusers(self.relations, one, other), strict=True)
        return dict(zip(channel.tolist(), made, strict=True))


def _list_pairs(use: Use) -> np.ndarray:
    """Columns (channel, one of its rows, another, whether it has all), rows as the labels that they had first."""
    several = (use.slots > 1) & ((use.roles & ROLE_BITS[Role.PRODUCES]) > 0)
    first = np.full(len(use.channels), len(use.found))
    np.minimum.at(first, use.which, np.arange(len(use.found)))
    last = np.zeros(len(use.channels), np.int64)
    np.maximum.at(last, use.which, np.arange(len(use.found)))
    rows = use.found[first[several]], use.found[last[several]]
    return np.stack([use.channels[several], *rows, use.slots[several] == len(use.found)])


def _find_fusers(relations: Relations, one: np.ndarray, other: np.ndarray) -> list[str]:
    """The first operation after which one[i] and other[i] were one: everything that was united, once more in order."""
    sets, found = UnionFind(relations.count), [""] * len(one)
    for copies, origins, _ in relations.copies:
        sets.unite(copies, origins)
    left = np.arange(len(one))
    for x, y, where, _ in relations.unions:
        if not len(left):
            break
        sets.unite(x, y)
        joined = sets.find(one[left]) == sets.find(other[left])
        for index in left[joined].tolist():
            found[index] = where
        left = left[~joined]
    return found
