"""Groups whose unit is a whole block: heads, groups of a convolution."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from intrafusion.graph import BLOCKS, SHARING, ChannelGroup, Member, Role
from intrafusion.trace.arrays import split_runs
from intrafusion.trace.blocks import Blocks
from intrafusion.trace.channels import ChannelTable
from intrafusion.trace.shared import BlockEntry
from intrafusion.trace.uses import Use, decode_roles


class _Twin(NamedTuple):
    """One block: its channels, in an order that corresponds to that of its twins, and the values that serve it all."""

    labels: np.ndarray
    entries: list[BlockEntry]


def find_block_groups(blocks: Blocks, entries: dict[int, list[BlockEntry]]) -> list[ChannelGroup]:
    """Blocks that the network treats alike, channel by channel, are one group of interchangeable blocks.

    Inside a block, what shares its channels is such a group too, as query heads that share a key and a value.
    """
    by_unit = _entries_by_unit(blocks, entries)
    twins: dict[object, list[_Twin]] = defaultdict(list)
    for unit, labels in _list_units(blocks):
        if unit not in blocks.barred and not blocks.table.reasons.index[labels].any():
            found = _Twin(labels, sorted(by_unit.get(unit, [])))
            twins[_profile(blocks, unit, found)].append(found)
    found = []
    for family, units in enumerate(twins.values()):
        inner = [replace(g, family=2 * family) for g in _make_sharing_groups(blocks, units)]
        whole = [replace(_make_block_group(blocks, units), family=2 * family + 1)] if len(units) > 1 else []
        found += [*inner, *whole]  # first: they change what the blocks hold
    return [group for group in found if group.producers or not group.consumers]  # else its sources are unknown


def _list_units(blocks: Blocks) -> list[tuple[int, np.ndarray]]:
    """The used channels of each unit, sorted by what the network does with them, so that twins correspond."""
    table = blocks.table
    members = np.flatnonzero(table.used & (blocks.joined.parent[: len(table.used)] >= 0))
    members = members[np.isin(members, blocks.inside)]
    home = blocks.joined.find(members)
    keys = (table.first, *(sums[:, 0] for sums in (table.arranged, table.colour, table.family)))
    order = np.lexsort((*(key[members] for key in keys), home))
    return list(split_runs(home[order], members[order]))


def _profile(blocks: Blocks, unit: int, found: _Twin) -> object:
    """Everything that twins have in common."""
    table = blocks.table
    labels, pairs = blocks.find_structure(unit, found.labels)
    seen = (table.family[found.labels], table.arranged[found.labels], table.colour[labels], pairs, blocks.above[unit])
    return *(array.tobytes() for array in seen), tuple((e.tensor, e.dim) for e in found.entries)


def _entries_by_unit(blocks: Blocks, entries: dict[int, list[BlockEntry]]) -> dict[int, list[BlockEntry]]:
    found: dict[int, list[BlockEntry]] = defaultdict(list)
    for block, values in entries.items():
        found[int(blocks.joined.find(blocks.relations.roots(np.array([block])))[0])] += values
    return found


def _make_block_group(blocks: Blocks, units: list[_Twin]) -> ChannelGroup:
    members = [*_members_of_channels(blocks.table, units), *_members_of_entries(units)]
    # The blocks are numbered as they lie in the first member, like the channels of a layer.
    first = np.argsort(members[0].positions.min(1), kind="stable")
    members = [replace(m, positions=m.positions[first]) for m in members]
    return _as_blocks(blocks, units, BLOCKS, len(units), members)


def _as_blocks(blocks: Blocks, units: list[_Twin], suffix: str, size: int, members: Sequence[Member]) -> ChannelGroup:
    """A group that is called by its producer and a suffix."""
    notes = tuple(blocks.list_notes(int(units[0].labels[0])))
    return ChannelGroup(suffix, size, tuple(members), None, notes, "its unit is a whole block", 0, "block")


def _make_sharing_groups(blocks: Blocks, units: list[_Twin]) -> list[ChannelGroup]:
    """For each unit the blocks that share its channels, where these are made and read more often than what they share.

    A pair of channels that a rotary embedding turns is one channel at two places; at four, where two heads share a key.
    """
    rank, whole = _rank_channels(blocks.table, units)
    places, least = [_count_places(use, rank) for use in whole], dict[bytes, int]()
    kinds = [np.unique(rank[use.channels]).tobytes() for use in whole]
    for kind, count in zip(kinds, places, strict=True):
        least[kind] = min(count, least.get(kind, count))
    if 0 in places:
        return []
    times = [count / least[kind] for kind, count in zip(kinds, places, strict=True)]
    most = int(max(times))
    shared = [use for use, n in zip(whole, times, strict=True) if n == most > 1]
    members = [_member_of_use(use, rank, len(units)) for use in shared]
    made = frozenset[Role]().union(*(m.roles for m in members))
    if set(times) > {1, most} or not {Role.PRODUCES, Role.CONSUMES} <= made:
        return []
    found = []
    for row in range(len(units)):
        parts = [_split(m.positions[row], most, _count_places(u, rank)) for m, u in zip(members, shared, strict=True)]
        own = [replace(m, positions=part) for m, part in zip(members, parts, strict=True)]
        found.append(_as_blocks(blocks, units, SHARING, most, own))
    return found


def _split(positions: np.ndarray, blocks: int, places: int) -> np.ndarray:
    """Positions of channels at so many places each, channel by channel, as those of blocks: (blocks, slots)."""
    return positions.reshape(-1, blocks, places // blocks).swapaxes(0, 1).reshape(blocks, -1)


def _count_places(use: Use, rank: np.ndarray) -> int:
    """At how many places each channel lies; 0 where that differs."""
    slots = np.unique(use.slots[rank[use.channels] >= 0])
    return int(slots[0]) if len(slots) == 1 else 0


def _members_of_channels(table: ChannelTable, units: list[_Twin]) -> list[Member]:
    rank, whole = _rank_channels(table, units)
    return [_member_of_use(use, rank, len(units)) for use in whole]


def _rank_channels(table: ChannelTable, units: list[_Twin]) -> tuple[np.ndarray, list[Use]]:
    """The number of each channel, unit by unit, -1 for others; and all that holds such channels."""
    rank = np.full(len(table.used), -1)
    for row, (labels, _) in enumerate(units):
        rank[labels] = row * len(labels) + np.arange(len(labels))
    # A grouped convolution is used whole and slice by slice; a block moves with the whole.
    return rank, [use for use in table.uses if use.key[2] is None and (rank[use.labels] >= 0).any()]


def _member_of_use(use: Use, rank: np.ndarray, units: int) -> Member:
    """The positions of each unit, slot by slot in corresponding order."""
    keep = rank[use.labels] >= 0
    order = np.lexsort((use.positions[keep], rank[use.labels[keep]]))
    roles = decode_roles(int(np.bitwise_or.reduce(use.roles[rank[use.channels] >= 0])))
    return Member(*use.key[:2], use.positions[keep][order].reshape(units, -1), roles)


def _members_of_entries(units: list[_Twin]) -> list[Member]:
    """One value per block, such as a scale per head: the j-th entry of every unit is one member."""
    return [
        Member(e.tensor, e.dim, np.array([[block.entries[j].position] for block in units]), frozenset([e.role]))
        for j, e in enumerate(units[0].entries)
    ]
