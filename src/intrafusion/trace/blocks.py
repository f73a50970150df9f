"""Blocks of channels that only make sense together, such as heads and the groups of a convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from intrafusion.graph import ChannelGroup, Member
from intrafusion.trace.channels import Channels, roles_from, scrambled
from intrafusion.trace.relations import Cause, Relations, UnionFind
from intrafusion.trace.shared import BlockParam


class Cells:
    """Blocks of channels that were seen together, joined where they share channels."""

    def __init__(self, relations: Relations, channels: Channels) -> None:
        self.relations = relations
        self.content = edges(relations, channels.slot, relations.block_members)  # a channel, a block that it is in
        self.met = edges(relations, channels.slot, relations.meetings)  # a channel, a block that it meets
        both = np.concatenate([self.content, self.met])
        self.key = sums(relations.count, both[:, 0], scrambled(both[:, 1], 0) ^ both[:, 2].view(np.uint64))
        above = self._of_blocks()
        joins = np.concatenate([self.content[~above], self.met, ties(relations)])
        self.inside = np.unique(joins[:, :2])
        self.joined = UnionFind(relations.count)
        self.joined.unite(joins[:, 0], joins[:, 1])
        home = self.joined.find(joins[:, 0])
        order = np.argsort(home, kind="stable")
        self.joins = dict(split_by(home[order], joins[order]))
        blocks, seen_by = self.content[above, :2].T
        self.above = sums(relations.count, self.joined.find(blocks), seen_by)  # of what sees several blocks at once
        barred = np.flatnonzero(relations.is_block[: relations.count] & (channels.reason > 0))
        self.barred = set(self.joined.find(barred).tolist())

    def _of_blocks(self) -> np.ndarray:
        """Which pairs belong to a block of blocks only, such as a mean over heads: it does not join them."""
        names_channel = np.zeros(self.relations.count, bool)
        members, blocks = self.content[:, :2].T
        names_channel[blocks[~self.relations.is_block[members]]] = True
        return ~names_channel[blocks]

    def structure(self, block: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All labels of a joined block, those of members first, and its edges between them by number."""
        joins = self.joins[block].copy()
        labels = np.concatenate([rows, np.setdiff1d(joins[:, :2], rows)])
        order = np.argsort(labels)
        joins[:, :2] = order[np.searchsorted(labels, joins[:, :2], sorter=order)]
        return labels, joins[np.lexsort(joins.T)]

    def causes(self, channel: int) -> list[tuple[Cause, str]]:
        """What saw this channel together with others."""
        return self._causes(self.content, channel)

    def notes(self, channel: int) -> list[str]:
        """What saw this channel, or computed what it met, in words."""
        found = [*self._causes(self.content, channel), *self._causes(self.met, channel)]
        return list(dict.fromkeys(f"{cause}: {where}" for cause, where in sorted(found)))

    def _causes(self, pairs: np.ndarray, channel: int) -> list[tuple[Cause, str]]:
        blocks = pairs[pairs[:, 0] == channel, 1].tolist()
        return sorted({self.relations.causes[b] for b in blocks if b in self.relations.causes})

    def groups(self, channels: Channels, block_params: dict[int, list[BlockParam]]) -> list[ChannelGroup]:
        """Groups whose unit is a whole block: heads, groups of a convolution."""
        members = np.flatnonzero(channels.used & (self.joined.parent[: len(channels.used)] >= 0))
        members = members[np.isin(members, self.inside)]
        home = self.joined.find(members)
        keys = (channels.first, *(a[:, 0] for a in (channels.arranged, channels.colour, channels.family)))
        order = np.lexsort((*(key[members] for key in keys), home))
        members, home = members[order], home[order]
        extras = self._extras(block_params)
        profiles: dict[object, list[tuple[np.ndarray, list[BlockParam]]]] = defaultdict(list)
        for block, rows in split_by(home, members):
            if block not in self.barred and not channels.reason[rows].any():
                extra = sorted(extras.get(int(block), []))
                labels, edges = self.structure(block, rows)
                seen = [
                    channels.family[rows],
                    channels.arranged[rows],
                    channels.colour[labels],
                    edges,
                    self.above[block],
                ]
                profile = (*(a.tobytes() for a in seen), tuple((e[0], e[1]) for e in extra))
                profiles[profile].append((rows, extra))
        found = [block_group(self, channels, twins) for twins in profiles.values() if len(twins) > 1]
        return [group for group in found if group.producers or not group.consumers]  # else its sources are unknown

    def _extras(self, block_params: dict[int, list[BlockParam]]) -> dict[int, list[BlockParam]]:
        extras: dict[int, list[BlockParam]] = defaultdict(list)
        for block, params in block_params.items():
            extras[int(self.joined.find(self.relations.roots(np.array([block])))[0])] += params
        return extras


def edges(relations: Relations, slot: np.ndarray, found: list[tuple[np.ndarray, int, int]]) -> np.ndarray:
    """Distinct rows: a channel, a block, and a number for where and as what the channel is in it or meets it."""
    if not found:
        return np.zeros((0, 3), np.int64)
    sizes = [len(labels) for labels, *_ in found]
    labels = np.concatenate([labels for labels, *_ in found])
    blocks, calls = (np.repeat(numbers, sizes) for numbers in ([f[1] for f in found], [f[2] for f in found]))
    what = (scrambled(calls, 0) ^ slot[labels]).view(np.int64)
    return np.unique(np.stack([relations.roots(labels), blocks, what], axis=1), axis=0)


def ties(relations: Relations) -> np.ndarray:
    """The same rows for blocks that move together."""
    if not relations.ties:
        return np.zeros((0, 3), np.int64)
    left, right = (np.concatenate(side) for side in zip(*relations.ties, strict=True))
    return np.stack([left, right, np.zeros_like(left)], axis=1)


def sums(count: int, where: np.ndarray, what: np.ndarray) -> np.ndarray:
    """A fingerprint of the set of numbers that each label is paired with."""
    total = np.zeros((count, 2), np.uint64)
    for salt in (0, 1):
        np.add.at(total[:, salt], where, scrambled(what, salt))
    return total


def split_by(keys: np.ndarray, values: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Runs of equal keys of a sorted array, with their values."""
    if not len(keys):
        return []
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return zip(keys[starts].tolist(), np.split(values, starts[1:]), strict=True)


def block_group(cells: Cells, channels: Channels, twins: list[tuple[np.ndarray, list[BlockParam]]]) -> ChannelGroup:
    rank = np.full(len(channels.used), -1)
    for row, (labels, _) in enumerate(twins):
        rank[labels] = row * len(labels) + np.arange(len(labels))
    members = []
    for use in channels.uses:
        keep = rank[use.labels] >= 0
        if use.key[2] is None and keep.any():
            order = np.lexsort((use.positions[keep], rank[use.labels[keep]]))
            roles = roles_from(int(np.bitwise_or.reduce(use.roles[rank[use.channels] >= 0])))
            members.append(Member(*use.key[:2], use.positions[keep][order].reshape(len(twins), -1), roles))
    for j, (tensor, dim, _, role) in enumerate(twins[0][1]):
        entry = np.array([[extra[j][2]] for _, extra in twins])
        members.append(Member(tensor, dim, entry, frozenset([role])))
    first = np.argsort(members[0].positions.min(1), kind="stable")
    members = [replace(m, positions=m.positions[first]) for m in members]
    notes = tuple(cells.notes(int(twins[0][0][0])))
    return ChannelGroup("", len(twins), tuple(members), None, notes, "its unit is a whole block", 0, "block")
