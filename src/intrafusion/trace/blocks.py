"""Blocks of channels that only make sense together, such as heads and the groups of a convolution."""

from __future__ import annotations

import numpy as np

from intrafusion.trace.arrays import split_runs
from intrafusion.trace.channels import ChannelTable
from intrafusion.trace.fingerprints import mix, sum_facts
from intrafusion.trace.relations import Cause, Relations, UnionFind

_WHOLE = {Cause.STATISTICS, Cause.SOFTMAX}


def _is_average(where: str) -> bool:
    """Whether an operation (as in `Call.where`) divides by the number of what it sees."""
    name = where.partition(" ")[0]
    return "avg_pool" in name or "mean" in name or "var" in name or "std" in name


def _is_extreme(where: str) -> bool:
    """Whether an operation may give another result where zeros are added to what it sees; sums and lengths do not."""
    name = where.partition(" ")[0]
    return "max" in name or "min" in name or name in ("prod", "logsumexp", "median")


class Blocks:
    """Blocks of channels that were seen together, joined where they share channels.

    The channels of a grouped convolution's group are a block, and those that a group norm sees together; where the norm
    reads what the convolution computes, the two share channels and are joined into one unit, which moves as a whole.

    Attributes:
        key: fingerprint of the blocks that each label is in or meets; only channels with the same may change places.
        inside: labels that are in some block, and block labels.
        joined: the unit that each of them is in, as disjoint sets.
        joins: for each unit the pairs (label, block label, what the label is there).
        above: for each unit a fingerprint of what sees several units at once, such as a mean over heads.
        barred: units that may not move.
    """

    def __init__(self, relations: Relations, table: ChannelTable) -> None:
        self.relations, self.table = relations, table
        self._content = _list_pairs(relations, table.slot, relations.block_members)  # a channel, a block that it is in
        met = _list_pairs(relations, table.slot, relations.meetings)  # a channel, a block or a gate that it meets
        self._met = np.concatenate([met, _list_gated(relations, table.slot)])
        both = np.concatenate([self._content, self._met, _list_dissolved(relations, table.slot)])
        self.key = sum_facts(relations.count, both[:, 0], mix(both[:, 1], 0) ^ both[:, 2].view(np.uint64))
        # A block of nothing but blocks does not join them: heads that are averaged are still heads.
        above = self._is_of_blocks_only()
        joins = np.concatenate([self._content[~above], self._met, _list_ties(relations)])
        self._tied = UnionFind(relations.count)
        self._tied.unite(*_list_ties(relations)[:, :2].T)
        self.inside = np.unique(joins[:, :2])
        self.joined = UnionFind(relations.count)
        self.joined.unite(joins[:, 0], joins[:, 1])
        self.joins = self._sort_by_unit(joins)
        members, seen_by = self._content[above, :2].T
        self.above = sum_facts(relations.count, self.joined.find(members), seen_by)
        self.barred = self._find_barred()

    def _is_of_blocks_only(self) -> np.ndarray:
        """Which pairs belong to a block of blocks only, such as a mean over heads."""
        names_channel = np.zeros(self.relations.count, bool)
        members, blocks = self._content[:, :2].T
        names_channel[blocks[~self.relations.is_block[members]]] = True
        return ~names_channel[blocks]

    def _sort_by_unit(self, joins: np.ndarray) -> dict[int, np.ndarray]:
        home = self.joined.find(joins[:, 0])
        order = np.argsort(home, kind="stable")
        return dict(split_runs(home[order], joins[order]))

    def _find_barred(self) -> set[int]:
        """Units of which a block label itself was forbidden."""
        forbidden = self.table.reasons.index > 0
        barred = np.flatnonzero(self.relations.is_block[: self.relations.count] & forbidden)
        return set(self.joined.find(barred).tolist())

    def find_structure(self, unit: int, members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All labels of a unit, those of members first, and its pairs with labels replaced by their numbers.

        Two units whose members are given in corresponding order are alike exactly where these pairs are equal.
        """
        pairs = self.joins[unit].copy()
        labels = np.concatenate([members, np.setdiff1d(pairs[:, :2], members)])
        order = np.argsort(labels)
        pairs[:, :2] = order[np.searchsorted(labels, pairs[:, :2], sorter=order)]
        return labels, pairs[np.lexsort(pairs.T)]

    def list_causes(self, channel: int) -> list[tuple[Cause, str]]:
        """What saw this channel together with others."""
        return self._list_causes(self._content, channel)

    def list_notes(self, channel: int) -> list[str]:
        """What saw this channel, or computed what it met, in words."""
        found = [*self._list_causes(self._content, channel), *self._list_causes(self._met, channel)]
        return list(dict.fromkeys(f"{cause}: {where}" for cause, where in sorted(found)))

    def explain_together(self, channel: int) -> str | None:
        """What sees this channel with others so that one that is zero counts, in words; None if nothing does.

        An average counts as the statistics of a norm where what it gives meets the channels again.
        """
        blocks = self._content[self._content[:, 0] == channel, 1].tolist()
        met = set(self._tied.find(self._met[self._met[:, 0] == channel, 1]).tolist())
        for block in sorted(set(blocks) & self.relations.causes.keys()):
            cause, where = self.relations.causes[block]
            again = _is_average(where) and int(self._tied.find(np.array([block]))[0]) in met
            if cause in _WHOLE or (cause is Cause.REDUCTION and (_is_extreme(where) or again)):
                return f"{cause}: {where}"
        return None

    def _list_causes(self, pairs: np.ndarray, channel: int) -> list[tuple[Cause, str]]:
        blocks = pairs[pairs[:, 0] == channel, 1].tolist()
        return sorted({self.relations.causes[b] for b in blocks if b in self.relations.causes})


def _list_pairs(relations: Relations, slot: np.ndarray, found: list[tuple[np.ndarray, int, int]]) -> np.ndarray:
    """Distinct rows: a channel, a block, and a number for where and as what the channel is in it or meets it."""
    if not found:
        return np.zeros((0, 3), np.int64)
    sizes = [len(labels) for labels, *_ in found]
    labels = np.concatenate([labels for labels, *_ in found])
    blocks = np.repeat([block for _, block, _ in found], sizes)
    calls = np.repeat([call for *_, call in found], sizes)
    what = (mix(calls, 0) ^ slot[labels]).view(np.int64)
    return np.unique(np.stack([relations.roots(labels), blocks, what], axis=1), axis=0)


def _list_gated(relations: Relations, slot: np.ndarray) -> np.ndarray:
    """The same rows for gates; each meets itself too, so that no two of them are alike."""
    rows = [np.zeros((0, 3), np.int64)]
    for members, gates, call, _ in relations.gates:
        names = np.where(slot[gates], slot[gates], mix(gates, 1))  # which of its places, where it has several
        what = (mix(np.full(len(members), call), 0) ^ slot[members]) + mix(names, 1)
        met, own = relations.roots(members), relations.roots(gates)
        rows += [np.stack([met, own, what.view(np.int64)], 1), np.stack([own, own, np.full(len(own), call)], 1)]
    return np.unique(np.concatenate(rows), axis=0)


def _list_dissolved(relations: Relations, slot: np.ndarray) -> np.ndarray:
    """The same rows for blocks that are one channel: which of its places something saw together."""
    rows = [np.zeros((0, 3), np.int64)]
    for labels, _, call in relations.dissolved:
        seen = mix(np.array([call]), 0) + mix(np.unique(slot[labels]), 1).sum(keepdims=True)
        rows.append(np.stack([relations.roots(labels[:1]), np.zeros(1, np.int64), seen.view(np.int64)], 1))
    return np.concatenate(rows)


def _list_ties(relations: Relations) -> np.ndarray:
    """The same rows for blocks that move together."""
    if not relations.ties:
        return np.zeros((0, 3), np.int64)
    left, right = (np.concatenate(side) for side in zip(*relations.ties, strict=True))
    return np.stack([left, right, np.zeros_like(left)], axis=1)
