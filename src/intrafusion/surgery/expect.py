"""The graph that the smaller network must show, and the first thing in which it shows another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Slice


def shrink_graph(graph: ChannelGraph, sizes: dict[str, int]) -> ChannelGraph:
    """The graph that the smaller network must show: the same groups, n turned into m, positions moved up.

    Groups inside blocks that are gone are not in it.
    """
    renumber, gone = _Renumbering(graph, sizes), _find_gone(graph, sizes)
    groups = []
    for group in graph.groups:
        if group.is_channel:
            m = sizes.get(group.name, group.size)
            left = (_leave_out(replace(x, positions=x.positions[:m]), gone) for x in group.members)
            members = tuple(renumber(member) for member in left if member.positions.size)
            groups += [replace(group, size=m, members=members)] if members or not group.members else []
    return replace(graph, groups=tuple(groups))


def _find_gone(graph: ChannelGraph, sizes: dict[str, int]) -> dict[tuple[str, int], np.ndarray]:
    """Places along dimensions of tensors that go with whole blocks."""
    gone: dict[tuple[str, int], np.ndarray] = {}
    for group in graph.groups:
        if group.name in sizes and not group.is_channel:
            for m in group.members:
                before = gone.get((m.tensor, m.dim), np.zeros(0, np.int64))
                gone[m.tensor, m.dim] = np.union1d(before, m.positions[sizes[group.name] :])
    return gone


def _leave_out(member: Member, gone: dict[tuple[str, int], np.ndarray]) -> Member:
    """What is left of a member: the slots of each channel that lie in blocks that stay."""
    places = gone.get((member.tensor, member.dim))
    if places is None or member.within is not None:
        return member
    stays = ~np.isin(member.positions, places)
    slots = int(stays[0].sum())
    return replace(member, positions=member.positions[stays].reshape(len(stays) if slots else 0, slots))


class _Renumbering:
    """Old index -> new index along every dimension that loses places."""

    def __init__(self, graph: ChannelGraph, sizes: dict[str, int]) -> None:
        self.dropped: dict[tuple[str, int, Slice | None], np.ndarray] = {}
        for group in graph.groups:
            if group.name in sizes:
                for member in group.members:
                    gone = member.positions[sizes[group.name] :].ravel()
                    before = self.dropped.get(member.key(), np.zeros(0, np.int64))
                    self.dropped[member.key()] = np.union1d(before, gone)

    def shift(self, key: tuple[str, int, Slice | None], index: Any) -> Any:
        gone = self.dropped.get(key)
        return index if gone is None else index - np.searchsorted(gone, index)

    def __call__(self, member: Any) -> Any:
        positions = self.shift(member.key(), member.positions)
        within = member.within
        if within is not None:
            along = (member.tensor, within.dim, None)
            within = Slice(within.dim, int(self.shift(along, within.start)), int(self.shift(along, within.stop)))
        return replace(member, positions=positions, within=within)


def find_missing(expected: ChannelGraph, found: ChannelGraph) -> ChannelGroup | None:
    """A group that the network no longer shows; groups of one channel leave no trace and are not compared."""
    wanted = {_group_signature(g): g for g in expected.groups if g.size > 1 and g.is_channel}
    present = {_group_signature(g) for g in found.groups if g.size > 1 and g.is_channel}
    return next((g for s, g in wanted.items() if s not in present), None)


def find_confusion(expected: ChannelGraph, found: ChannelGraph, alike: list[set[str]]) -> str | None:
    """Groups of one channel that the network now takes for each other, as where it slices at a fixed index.

    Single channels of blocks that were interchangeable as wholes may join.
    """
    single = [g for g in expected.groups if g.is_channel and g.size == 1]
    owner = {(m.key(), p): g.name for g in single for m in g.members for p in m.positions.ravel().tolist()}
    for group in found.reducible:
        if group.is_channel:
            names = {owner.get((m.key(), p), "") for m in group.members for p in m.positions.ravel().tolist()} - {""}
            if len(names) > 1 and not any(names <= blocks for blocks in alike):
                return (
                    f"the smaller network treats the single channels of {' and '.join(map(repr, sorted(names)))} alike"
                )
    return None


def find_siblings(graph: ChannelGraph, sizes: Mapping[str, int] | None = None) -> list[set[str]]:
    """Names of the channel groups that lie in the same interchangeable blocks.

    Args:
        sizes: of groups that are reduced. What lies in blocks of which some go may join across these: what told it
            apart, such as the other head, may be gone.
    """
    blocks, channels = ([g for g in graph.groups if g.is_channel is wanted] for wanted in (False, True))
    inside = {block.name: {g.name for g in channels if lies_in(g, block)} for block in blocks}
    cut = [names for block, names in inside.items() if block in (sizes or {})]
    return [*inside.values(), *([set().union(*cut)] if cut else [])]


def lies_in(group: ChannelGroup, block: ChannelGroup) -> bool:
    """Whether channels of a group are those of whole blocks, as the dimensions of a head are."""
    places = {(m.tensor, m.dim): m.positions for m in block.members}
    own = [m for m in group.members if m.within is None and (m.tensor, m.dim) in places]
    return any(np.isin(m.positions, places[m.tensor, m.dim]).all() for m in own)


def _group_signature(group: ChannelGroup) -> bytes:
    """Which index of which tensor is which channel, in an order of its own."""
    members = sorted(group.members, key=lambda m: (m.tensor, m.dim, str(m.within), sorted(m.roles)))
    order = np.argsort(members[0].positions.min(1), kind="stable")
    parts = [
        f"{m.tensor}|{m.dim}|{m.within}|{sorted(m.roles)}".encode() + np.sort(m.positions[order], 1).tobytes()
        for m in members
    ]
    return b"\n".join(parts)
